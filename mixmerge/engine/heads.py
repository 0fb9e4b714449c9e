"""The experts' own heads, written beside the merged trunk: ``heads/<expert>/head.safetensors`` and ``config.json``."""

from __future__ import annotations

import json

import numpy as np

from mixmerge.checkpoint.files import Files
from mixmerge.engine.output import Output
from mixmerge.engine.worker import Adapters
from mixmerge.plan import Head, Plan, Source
from mixmerge.plan.layout import Wanted, lay_out

FOLDER, WEIGHTS = "heads", "head.safetensors"


def add_heads(output: Output, plan: Plan, files: Files) -> None:
    """Write every head of a plan: its tensors as the expert stores them, and the expert's config."""
    for head in plan.heads:
        folder = f"{FOLDER}/{head.expert}"
        output.add(f"{folder}/{WEIGHTS}", _weights(head, files))
        output.add(f"{folder}/config.json", json.dumps(head.config, indent=2) + "\n")


def _weights(head: Head, files: Files) -> bytes:
    sources = {source.tensor.name: source for source in head.tensors}
    wanted = [Wanted(name, source.tensor.shape, source.tensor.dtype) for name, source in sources.items()]
    targets, (shard,) = lay_out(wanted, 1 << 62)
    content = bytearray(shard.header)
    for target in targets:
        content += stored_bytes(sources[target.name], target.dtype, files)
    return bytes(content)


def stored_bytes(source: Source, dtype: str, files: Files) -> bytes:
    """A tensor of a head as it is written: with what an adapter puts in its place, in this dtype."""
    if source.adapter is None and source.tensor.dtype == dtype:
        data = np.empty(source.tensor.nbytes, np.uint8)
        files.read(source.tensor, 0, data.data)
        return data.tobytes()
    import torch

    from mixmerge.engine.reading import TORCH, read_tensor

    work = torch.float64 if source.tensor.dtype == "F64" else torch.float32
    value = read_tensor(source, files, Adapters(), work, "cpu")
    stored = value.to(getattr(torch, TORCH[dtype])).contiguous()
    return stored.reshape(-1).view(torch.uint8).numpy().tobytes()
