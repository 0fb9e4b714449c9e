"""The header of a safetensors file: every claim is checked against the file before it is believed."""

from __future__ import annotations

import json
import math
import os
import reprlib
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, Fault

# Bytes per element of every dtype of the format.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
FLOATS = ("BF16", "F16", "F32", "F64")

# The reference implementation refuses longer headers too.
MAX_HEADER = 100_000_000
# Beyond these no array library can hold it, and products of sizes stay small numbers.
_MAX_RANK, _MAX_SIZE = 64, 1 << 63
_SHOWN = 300


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor is.

    Args:
        name: as in the file.
        dtype: safetensors' name, a key of ``DTYPE_BYTES``.
        shape: sizes, outermost first.
        file: the file that holds it.
        offset: of its first byte from the start of the file.
        nbytes: its size in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def _bad(path: Path, what: str, allowed: str = "") -> CheckpointError:
    return CheckpointError(
        Fault(str(path), what, allowed, "The file is damaged or not safetensors: copy or download it again")
    )


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen = dict(pairs)
    if len(seen) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = [reprlib.repr(name) for name, count in counts.items() if count > 1]
        raise _bad(path, f"its header names {', '.join(sorted(twice)[:5])} twice")
    return seen


def _header_json(path: Path) -> tuple[dict[str, Any], int, int]:
    try:
        # A pipe in the place of a file must not block the open.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            facts = os.fstat(file.fileno())
            if not stat.S_ISREG(facts.st_mode):
                raise CheckpointError(Fault(str(path), "it is not a regular file"))
            size = facts.st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _bad(path, f"it ends at byte {len(prefix)}, inside the 8-byte header length")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER:
                raise _bad(path, f"its header claims {length:,} bytes", f"At most {MAX_HEADER:,}")
            if 8 + length > size:
                raise _bad(path, f"its header ends at byte {8 + length:,}, the file at byte {size:,}")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(Fault(str(path), f"cannot be read: {error.strerror}")) from error
    try:
        header = json.loads(raw.decode(), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise _bad(path, "its header (from byte 8) is not JSON") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header (from byte 8) is not a JSON object")
    return header, 8 + length, size


def _natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_SIZE


def _label(name: str) -> str:
    # A hostile name is shown shortened, and always with its control characters escaped.
    return f"tensor {name!r}" if len(name) <= _SHOWN else f"tensor {reprlib.repr(name)}"


def is_text(name: str) -> bool:
    """Whether a name has a UTF-8 form; a lone surrogate, which JSON and pickle can spell, has none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _entry(path: Path, name: str, entry: Any, data: int, size: int) -> TensorHeader:
    tensor = _label(name)
    if not is_text(name):
        raise _bad(path, f"{tensor} has a name that is not text")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, f"{tensor} has a header entry that is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            Fault(
                str(path),
                f"{tensor} has dtype {reprlib.repr(dtype)}",
                f"Known: {', '.join(sorted(DTYPE_BYTES))}",
            )
        )
    if not isinstance(shape, list) or len(shape) > _MAX_RANK or not all(map(_natural, shape)):
        raise _bad(path, f"{tensor} has shape {reprlib.repr(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_natural, offsets)):
        raise _bad(path, f"{tensor} has data_offsets {reprlib.repr(offsets)}")
    begin, end = offsets
    needed = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != needed:
        raise _bad(
            path,
            f"{tensor} of shape {reprlib.repr(shape)} and {dtype} needs {needed:,} bytes, not {end - begin:,}",
        )
    if data + end > size:
        raise _bad(path, f"{tensor} ends at byte {data + end:,}, the file at byte {size:,}")
    return TensorHeader(name, dtype, tuple(shape), path, data + begin, needed)


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: truncated, too long, not JSON, or any tensor's entry contradicts its shape, its
            dtype, the file's size or another tensor; names the file and the byte.
    """
    header, data, size = _header_json(path)
    header.pop("__metadata__", None)
    tensors = [_entry(path, name, entry, data, size) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end = data
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlaps the tensor before it" if tensor.offset < end else "leaves a gap before it"
            raise _bad(path, f"{_label(tensor.name)} at byte {tensor.offset:,} {kind} (byte {end:,})")
        end = tensor.offset + tensor.nbytes
    if end != size:
        raise _bad(path, f"its last tensor ends at byte {end:,}, the file at byte {size:,}")
    return {tensor.name: tensor for tensor in tensors}
