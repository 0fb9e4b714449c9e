"""Synthetic Llama checkpoints, written straight as safetensors and kept for the next run. No torch.

The base has normal weights. Experts differ from it as fine-tuned models do: by a few per cent, in some rows more
than in others, and not at all where the change is lost in rounding. Every byte is decided by sizes and seed.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# our name -> (safetensors' name, bytes)
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_HEAD = 64
_BLOCK = 1 << 20
_WEIGHT, _DELTA, _ROWS = 0.02, 0.0004, 0.5  # deviations of weights and deltas; spread of the rows' deltas


@dataclass(frozen=True)
class Size:
    """The dimensions of a Llama without shared head."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the file."""
        h, f = self.hidden, self.intermediate
        layer = {
            "input_layernorm": (h,),
            "mlp.down_proj": (h, f),
            "mlp.gate_proj": (f, h),
            "mlp.up_proj": (f, h),
            "post_attention_layernorm": (h,),
            "self_attn.k_proj": (h, h),
            "self_attn.o_proj": (h, h),
            "self_attn.q_proj": (h, h),
            "self_attn.v_proj": (h, h),
        }
        shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (self.vocabulary, h)}
        shapes["model.embed_tokens.weight"] = (self.vocabulary, h)
        for number in range(self.layers):
            shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        return shapes | {"model.norm.weight": (h,)}

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(math.prod(shape) for shape in self.tensors.values())

    def with_layers(self, layers: int) -> Size:
        return Size(self.hidden, self.intermediate, max(1, layers), self.vocabulary)

    def halved(self) -> Size:
        """About half the parameters in tensors of the same shapes: fewer layers."""
        per_layer = self.with_layers(2).parameters - self.with_layers(1).parameters
        return self.with_layers(self.layers - round(self.parameters / 2 / per_layer))


def parse_count(text: str) -> int:
    """``350M`` -> 350,000,000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if match is None:
        raise ValueError(f"{text!r} is no size. Write a number with K, M or B, such as 350M")
    return round(float(match[1]) * _UNITS[match[2]])


def of_parameters(parameters: int) -> Size:
    """Dimensions of about so many parameters, in the proportions of known Llamas."""
    vocabulary = 32000 if parameters >= 200e6 else 8000 if parameters >= 10e6 else 1000
    found = []
    for hidden in range(_HEAD, 8192 + 1, _HEAD):
        one = Size(hidden, max(1, round(2.75 * hidden / _HEAD)) * _HEAD, 1, vocabulary)
        per_layer = one.with_layers(2).parameters - one.parameters
        layers = round((parameters - one.parameters) / per_layer) + 1
        if layers >= 2:
            found.append((abs(layers - hidden / 46), one.with_layers(layers)))
    if not found:
        raise ValueError(f"{parameters:,} parameters are too few: 300K is the least")
    return min(found, key=lambda pair: pair[0])[1]


def of_tensors(tensors: int) -> Size:
    """Tiny tensors, about so many."""
    return Size(hidden=16, intermediate=48, layers=max(1, round((tensors - 3) / 9)), vocabulary=256)


@dataclass(frozen=True)
class Models:
    """A base and its experts on the disk."""

    base: Path
    experts: tuple[Path, ...]
    size: Size
    dtype: str


def build(
    work: Path, size: Size, *, dtype: str, experts: int, note: Callable[[str], None], seed: int = 0
) -> Models:
    """Write what is not there yet of a base and its experts."""
    dimensions = f"h{size.hidden}-f{size.intermediate}-l{size.layers}-v{size.vocabulary}-s{seed}"
    family = work / "models" / f"llama-{dtype}-{dimensions}"
    base = family / "base"
    folders = [base, *(family / f"expert{number}" for number in range(experts))]
    missing = [folder for folder in folders if not folder.exists()]
    if missing:
        total = len(missing) * size.parameters * DTYPES[dtype][1] / 1e9
        note(f"writing {len(missing)} checkpoints, {total:.2f} GB in all, to {family.name}")
    for number, folder in enumerate(folders):
        if folder in missing:
            _write(folder, size, dtype, seed=(seed, number), base=base if number else None)
    return Models(base, tuple(folders[1:]), size, dtype)


def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _write(folder: Path, size: Size, dtype: str, *, seed: tuple[int, int], base: Path | None) -> None:
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    header = _header(size, dtype)
    stored = None
    if base is not None:
        stored = np.memmap(weights(base), _storage(dtype), mode="r", offset=len(header))
    at = 0
    with weights(partial).open("wb") as file:
        file.write(header)
        for number, shape in enumerate(size.tensors.values()):
            generator = np.random.Generator(np.random.SFC64((*seed, number)))
            elements, columns = math.prod(shape), shape[-1]
            step = max(1, _BLOCK // columns) * columns
            for start in range(0, elements, step):
                stop = min(start + step, elements)
                if stored is None:
                    values = _base_block(generator, stop - start, norm=len(shape) == 1)
                else:
                    values = _decoded(stored[at + start : at + stop])
                    values += _delta_block(generator, stop - start, columns)
                file.write(_encoded(values, dtype).data)
            at += elements
    (partial / "config.json").write_text(json.dumps(_config(size, dtype), indent=2) + "\n", encoding="utf-8")
    partial.rename(folder)


def _header(size: Size, dtype: str) -> bytes:
    stored, width = DTYPES[dtype]
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in size.tensors.items():
        stop = at + math.prod(shape) * width
        entries[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _config(size: Size, dtype: str) -> dict[str, object]:
    heads = max(1, size.hidden // _HEAD)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }


def _base_block(generator: np.random.Generator, n: int, *, norm: bool) -> NDArray[np.float32]:
    values = generator.standard_normal(n, np.float32)
    values *= np.float32(_WEIGHT)
    if norm:
        values += np.float32(1)
    return values


def _delta_block(generator: np.random.Generator, n: int, columns: int) -> NDArray[np.float32]:
    values = generator.standard_normal(n, np.float32).reshape(-1, columns)
    values *= (_DELTA * generator.lognormal(0, _ROWS, (len(values), 1))).astype(np.float32)
    return values.reshape(-1)


def _storage(dtype: str) -> np.dtype[Any]:
    return np.dtype({"bfloat16": "uint16", "float16": "float16", "float32": "float32"}[dtype])


def _decoded(stored: NDArray[np.generic]) -> NDArray[np.float32]:
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def _encoded(values: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    if dtype != "bfloat16":
        return values.astype(_storage(dtype))
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )
