"""Compiled loops without numba at run time: machine code is made once, kept, and loaded by llvmlite alone.

Importing numba and readying its first call takes longer than many a merge. So numba compiles a loop when a
machine first needs it; from then on its object code is read from the cache. The key holds all that the code
depends on: the loops' source, the versions of the compilers, the CPU and its features.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixmerge.machine import cache_root

if TYPE_CHECKING:
    from llvmlite.binding import ExecutionEngine, ModuleRef, TargetMachine, ValueRef

_NUMBERS: dict[str, Any] = {
    "u4": ctypes.c_uint32,
    "i8": ctypes.c_int64,
    "f4": ctypes.c_float,
    "f8": ctypes.c_double,
}
# What loops name and never call: numba's handling of exceptions, which they do not raise, and of arrays, which they do
# not own; and Python's names for the same.
_UNREACHABLE = frozenset(
    ("NRT_Free", "NRT_MemInfo_call_dtor", "numba_do_raise", "numba_gil_ensure", "numba_gil_release",
     "numba_runtime_build_excinfo_struct", "numba_unpickle")
)  # fmt: skip
_PYTHON = ("Py", "_Py")
_OTHERS_MAY_WRITE = 0o022
_LOCK = threading.RLock()


@dataclass(frozen=True)
class _Kind:
    """One argument: a number (rank 0) or a contiguous array."""

    dtype: np.dtype[Any]
    rank: int

    @classmethod
    def parse(cls, text: str) -> _Kind:
        code, _, axes = text.partition("[")
        return cls(np.dtype(code), axes.count(":"))

    def number(self, value: Any) -> float:
        return float(value) if self.dtype.kind == "f" else int(value)


@dataclass(frozen=True)
class _Code:
    """Object code of one loop.

    Args:
        symbol: the name of its function.
        machine: the object file.
    """

    symbol: str
    machine: bytes

    def pack(self) -> bytes:
        body = self.symbol.encode() + b"\n" + self.machine
        return hashlib.sha256(body).hexdigest().encode() + b"\n" + body

    @classmethod
    def unpack(cls, data: bytes) -> _Code | None:
        """None if it is not just what ``pack`` made."""
        digest, _, body = data.partition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        symbol, _, machine = body.partition(b"\n")
        return cls(symbol.decode(), machine)


class Loop:
    """A function of ``mixmerge.kernels.compiled`` as machine code. Calls release the GIL.

    Args:
        name: ``module.function``.
        signature: numpy's codes of the arguments in order, ``[:]`` behind arrays for each axis; behind ``->`` that
            of the number returned, if any: ``"u1[:] i8 f4[:,:] -> i8"``. Arrays are C-contiguous.
    """

    def __init__(self, name: str, signature: str) -> None:
        given, _, result = signature.partition("->")
        self.name = name
        self._kinds = tuple(_Kind.parse(text) for text in given.split())
        self._result = result.strip()
        self._function: Callable[..., Any] | None = None
        self._engine: ExecutionEngine | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Run it.

        Raises:
            TypeError: an argument's dtype, rank or layout is not the signature's.
        """
        function = self._function or self._load()
        flat: list[Any] = []
        for value, kind in zip(arguments, self._kinds, strict=True):
            if not kind.rank:
                flat.append(kind.number(value))
                continue
            if value.dtype != kind.dtype or value.ndim != kind.rank or not value.flags.c_contiguous:
                wanted = f"{kind.dtype} and {kind.rank} axes, contiguous"
                raise TypeError(f"{self.name}: {value.dtype} {value.shape} given, {wanted}, wanted")
            flat.append(value.__array_interface__["data"][0])
            flat += value.shape
        return function(*flat)

    def direct(self) -> Callable[..., Any]:
        """The function itself, for loops whose arguments are all numbers: nothing is checked.

        Raises:
            TypeError: it takes arrays.
        """
        if any(kind.rank for kind in self._kinds):
            raise TypeError(f"{self.name} takes arrays, which have to be checked")
        return self._function or self._load()

    def _load(self) -> Callable[..., Any]:
        with _LOCK:
            if self._function is None:
                code = _read(self.name) or self._compile()
                self._engine, address = _link(code)
                self._function = self._prototype()(address)
            return self._function

    def _prototype(self) -> Any:
        flat: list[Any] = []
        for kind in self._kinds:
            array = [ctypes.c_void_p, *[ctypes.c_int64] * kind.rank]
            flat += array if kind.rank else [_NUMBERS[kind.dtype.str[1:]]]
        return ctypes.CFUNCTYPE(_NUMBERS[self._result] if self._result else None, *flat)

    def _compile(self) -> _Code:
        import numba
        from llvmlite import binding

        flat = []
        for kind in self._kinds:
            scalar = numba.from_dtype(kind.dtype)
            pointer = [numba.types.CPointer(scalar), *[numba.types.int64] * kind.rank]
            flat += pointer if kind.rank else [scalar]
        result = numba.from_dtype(np.dtype(self._result)) if self._result else numba.types.void
        compiled = numba.cfunc(result(*flat))(self._face())
        module = binding.parse_assembly(compiled.inspect_llvm())
        _close(self.name, module)
        code = _Code(compiled.native_name, _machine().emit_object(module))
        _write(self.name, code)
        return code

    def _face(self) -> Callable[..., Any]:
        """The loop, taking arrays apart: an address, then the shape."""
        import numba

        module, _, name = self.name.partition(".")
        loop = getattr(import_module(f"mixmerge.kernels.compiled.{module}"), name)
        names, values = [], []
        for at, kind in enumerate(self._kinds):
            shape = [f"n{at}_{axis}" for axis in range(kind.rank)]
            names += [f"a{at}", *shape]
            values.append(f"carray(a{at}, ({', '.join(shape)},))" if shape else f"a{at}")
        scope: dict[str, Any] = {"carray": numba.carray, "loop": loop}
        exec(f"def face({', '.join(names)}):\n    return loop({', '.join(values)})", scope)
        face: Callable[..., Any] = scope["face"]
        return face


@functools.cache
def _machine() -> TargetMachine:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    cpu, features = host()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=cpu, features=features, opt=3, codemodel="jitdefault", jit=True
    )


def host() -> tuple[str, str]:
    """Name of this CPU, and its features as LLVM writes them."""
    from llvmlite import binding

    try:
        return binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM does not know the features of every CPU
        return binding.get_host_cpu_name(), ""


def _link(code: _Code) -> tuple[ExecutionEngine, int]:
    """Object code in memory, and the address of its function."""
    from llvmlite import binding

    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code.machine))
    engine.finalize_object()
    return engine, engine.get_function_address(code.symbol)


def _close(name: str, module: ModuleRef) -> None:
    """Define what a loop names and never calls as a trap of its own, so that it needs nothing but the C library.

    Raises:
        RuntimeError: it needs something else that only numba has: it makes an array, reshapes one or the like.
    """
    from llvmlite import binding

    functions = [item.name for item in module.functions if _is_foreign(item)]
    variables = [item.name for item in module.global_variables if _is_foreign(item)]
    traps = [symbol for symbol in functions if symbol in _UNREACHABLE or symbol.startswith(_PYTHON)]
    zeros = [symbol for symbol in variables if symbol.startswith(_PYTHON)]
    wrong = [
        symbol
        for symbol in {*functions, *variables} - {*traps, *zeros}
        if symbol.startswith(("NRT_", "numba_")) or binding.address_of_symbol(symbol) is None
    ]
    if wrong:
        raise RuntimeError(f"{name} needs {', '.join(sorted(wrong))}, which only numba has")
    text = [f'define void @"{symbol}"() {{\n call void @llvm.trap()\n unreachable\n}}' for symbol in traps]
    text += [f'@"{symbol}" = global i64 0' for symbol in zeros]
    ends = binding.parse_assembly("\n".join(["declare void @llvm.trap()", *text]))
    ends.triple, ends.data_layout = module.triple, module.data_layout
    module.link_in(ends)
    for symbol in traps:
        module.get_function(symbol).linkage = "internal"
    for symbol in zeros:
        module.get_global_variable(symbol).linkage = "internal"


def _is_foreign(item: ValueRef) -> bool:
    return bool(item.is_declaration) and not item.name.startswith("llvm.")


@functools.cache
def _key() -> str:
    here = Path(__file__).parent
    versions = [version(package) for package in ("numba", "llvmlite", "numpy")]
    digest = hashlib.sha256(json.dumps([*versions, *host()]).encode())
    for path in [*sorted(here.glob("*.py")), *sorted((here / "compiled").glob("*.py"))]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _place(name: str) -> Path:
    return cache_root() / "kernels" / _key() / f"{name}.o"


def _read(name: str) -> _Code | None:
    """What is kept of a loop, unless it is damaged, or someone else could have put it there."""
    try:
        path = _place(name)
        return _Code.unpack(path.read_bytes()) if _is_ours(path.stat()) else None
    except (OSError, RuntimeError):
        return None


def _is_ours(facts: os.stat_result) -> bool:
    if not hasattr(os, "getuid"):
        return True
    return facts.st_uid in (0, os.getuid()) and not facts.st_mode & _OTHERS_MAY_WRITE


def _write(name: str, code: _Code) -> None:
    """Keep it if that can be done: without it, the next process compiles again."""
    try:
        path = _place(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, spare = tempfile.mkstemp(dir=path.parent, prefix=f".{name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(code.pack())
            Path(spare).replace(path)
        except OSError:
            Path(spare).unlink(missing_ok=True)
    except (OSError, RuntimeError):
        return
