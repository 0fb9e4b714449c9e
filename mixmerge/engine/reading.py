"""One input tensor as torch holds it, its adapter added."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mixmerge.checkpoint.files import Files
from mixmerge.engine.worker import Adapters
from mixmerge.plan import Source

if TYPE_CHECKING:
    import torch

    from mixmerge.methods.lowrank import LowRank

TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def read_tensor(
    source: Source,
    files: Files,
    adapters: Adapters,
    work: torch.dtype,
    device: str,
    *,
    part: int | None = None,
) -> torch.Tensor:
    """One input in the working dtype, its adapter added; the adapter's delta alone where that is exact.

    Args:
        source: the input.
        files, adapters: what reads it.
        work: dtype of the result.
        device: where the result goes.
        part: of a stack of matrices, only this one.
    """
    import torch

    header = source.tensor
    first, last = (0, header.shape[0] if header.shape else 1) if part is None else (part, part + 1)
    shape = header.shape if part is None else header.shape[1:]
    if header.elements == 0:
        return torch.zeros(shape, dtype=work, device=device)
    row = header.nbytes // max(1, header.shape[0]) if header.shape else header.nbytes
    data = np.empty((last - first) * row, np.uint8)
    files.read(header, first * row, data.data)
    stored = torch.from_numpy(data).view(getattr(torch, TORCH[header.dtype])).reshape(shape)
    value = stored.to(work)
    if source.adapter is not None:
        loaded = adapters.get(source.adapter)
        weight = value.float().reshape(last - first, -1).numpy()
        if source.delta_only:
            changed = loaded.rows(first, last, weight if loaded.needs_weight else None)
        else:
            changed = loaded.expert(first, last, weight)
        value = torch.from_numpy(changed).reshape(shape).to(work)
    return value.to(device)


def read_factors(
    source: Source, adapters: Adapters, work: torch.dtype, device: str, *, part: int | None = None
) -> LowRank | None:
    """The delta of an adapter as its two factors; None where it is not their product. Arguments as above."""
    import torch

    from mixmerge.methods.lowrank import LowRank

    adapter = source.adapter
    if not source.delta_only or adapter is None or adapter.kind != "lowrank" or adapter.needs_weight:
        return None
    loaded, shape = adapters.get(adapter), source.tensor.shape
    if loaded.left is None or loaded.right is None or adapter.a is None:
        return None
    rank, groups = adapter.a.shape[0] // adapter.experts, loaded.right.shape[0]
    b, a = loaded.left[:, :rank], loaded.right[:, :rank]  # without the zeros that fill the ranks up
    if len(shape) == 3 and groups == shape[0]:
        b = b.reshape(groups, -1, rank)
        b, a = (b, a) if part is None else (b[part], a[part])
    elif len(shape) == 2 and groups == 1:
        a = a[0]
    else:
        return None
    return LowRank(*(torch.from_numpy(np.ascontiguousarray(each)).to(device, work) for each in (b, a)))
