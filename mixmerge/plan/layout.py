"""Where every output tensor goes: shards no larger than asked, and their headers, before any byte is computed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from mixmerge.checkpoint.header import DTYPE_BYTES
from mixmerge.plan.model import Shard, Target


@dataclass(frozen=True)
class Wanted:
    """An output tensor without a place yet."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def lay_out(wanted: list[Wanted], shard_size: int) -> tuple[list[Target], list[Shard]]:
    """Split tensors into shards in the order given; a tensor larger than ``shard_size`` gets one of its own."""
    groups: list[list[Wanted]] = [[]]
    room = shard_size
    for tensor in wanted:
        if tensor.nbytes > room and groups[-1]:
            groups.append([])
            room = shard_size
        groups[-1].append(tensor)
        room -= tensor.nbytes
    targets: list[Target] = []
    shards = []
    for number, group in enumerate(groups):
        file = "model.safetensors" if len(groups) == 1 else _shard_name(number, len(groups))
        placed, shard = _place(group, number, file)
        targets += placed
        shards.append(shard)
    return targets, shards


def _shard_name(number: int, of: int) -> str:
    return f"model-{number + 1:05d}-of-{of:05d}.safetensors"


def _place(group: list[Wanted], number: int, file: str) -> tuple[list[Target], Shard]:
    # Wide dtypes first keeps every tensor aligned to its own width, as the format's reference writer does.
    ordered = sorted(group, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    starts = []
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        starts.append(at)
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    prefix = len(text).to_bytes(8, "little") + text
    targets = [
        Target(tensor.name, tensor.shape, tensor.dtype, number, len(prefix) + start, tensor.nbytes)
        for tensor, start in zip(ordered, starts, strict=True)
    ]
    return targets, Shard(file, prefix, len(prefix) + at)


def index_json(targets: list[Target], shards: list[Shard]) -> str:
    """``model.safetensors.index.json`` for an output of several shards."""
    total = sum(target.nbytes for target in targets)
    weight_map = {target.name: shards[target.shard].file for target in sorted(targets, key=lambda t: t.name)}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
