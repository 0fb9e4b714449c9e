"""Engines for what is loaded, and what that takes, before anything is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.header import DTYPE_BYTES, read_header
from mixmerge.engines.base import Engine
from mixmerge.experts import Expert
from mixmerge.registry import find

_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def arguments_of(unit: Sequence[Expert], *, device: str) -> dict[str, Any]:
    """What the engine of these experts is made with, as JSON values."""
    first = unit[0]
    options = dict(first.options)
    if first.engine == "echo":
        return {"name": first.model, **options}
    if first.remote:
        about = {"endpoint": first.endpoint, "model": first.model, "name": first.name}
        return {**about, "api_key_env": first.api_key_env, **options}
    about = {"model": first.model, "name": first.model, "device": device, **options}
    adapters = {one.name: one.adapter for one in unit if one.adapter is not None}
    return {**about, "adapters": adapters} if adapters else about


def open_engine(unit: Sequence[Expert], *, device: str) -> Engine:
    """The engine that runs these experts, not loaded. On a GPU it is a process of its own.

    Raises:
        MixmergeError: there is no engine of that name, or it does not take the options.
    """
    arguments = arguments_of(unit, device=device)
    if device.startswith("cuda") and not unit[0].remote:
        from mixmerge.engines.process import ProcessEngine

        apart: Engine = ProcessEngine(unit[0].engine, arguments, name=unit[0].model)
        return apart
    made: Engine = find("engine", unit[0].engine)(**arguments)
    return made


def size_of(unit: Sequence[Expert]) -> int:
    """Bytes of the weights that are loaded for these experts; 0 if that cannot be told from files here."""
    first = unit[0]
    if first.remote or first.engine == "echo":
        return 0
    places = [first.model, *(one.adapter for one in unit if one.adapter is not None)]
    wanted = _DTYPES.get(str(first.options.get("dtype", "auto")))
    return sum(_weights(Path(place).expanduser(), wanted) for place in places)


def _weights(folder: Path, dtype: str | None) -> int:
    headers = [one for file in sorted(folder.glob("*.safetensors")) for one in read_header(file).values()]
    if dtype is None:
        return sum(one.nbytes for one in headers)
    return sum(one.elements for one in headers) * DTYPE_BYTES[dtype]
