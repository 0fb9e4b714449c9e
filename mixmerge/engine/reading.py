"""One input tensor as torch holds it, its adapter added."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mixmerge.checkpoint.files import Files
from mixmerge.engine.worker import Adapters
from mixmerge.plan import Source

if TYPE_CHECKING:
    import torch

TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


def read_tensor(
    source: Source, files: Files, adapters: Adapters, work: torch.dtype, device: str
) -> torch.Tensor:
    """One input in the working dtype, its adapter added; the adapter's delta alone where that is exact."""
    import torch

    header = source.tensor
    if header.elements == 0:
        return torch.zeros(header.shape, dtype=work, device=device)
    data = np.empty(header.nbytes, np.uint8)
    files.read(header, 0, data.data)
    stored = torch.from_numpy(data).view(getattr(torch, TORCH[header.dtype])).reshape(header.shape)
    value = stored.to(work)
    if source.adapter is not None:
        loaded = adapters.get(source.adapter)
        rows, weight = header.shape[0], value.float().reshape(header.shape[0], -1).numpy()
        if source.delta_only:
            changed = loaded.rows(0, rows, weight if loaded.needs_weight else None)
        else:
            changed = loaded.expert(0, rows, weight)
        value = torch.from_numpy(changed).reshape(header.shape).to(work)
    return value.to(device)
