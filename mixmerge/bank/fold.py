"""A fixed mixture as an ordinary checkpoint. As an adapter: ``fold_adapter``. Legend as in ``records``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixmerge import __version__
from mixmerge.bank.factors import scaled
from mixmerge.bank.fixed import Placed, Weights, mixture_of, placed, weights_of
from mixmerge.bank.fold_adapter import export_adapter, lineage
from mixmerge.bank.mix import How
from mixmerge.bank.publishing import making
from mixmerge.bank.records import Bank, Entry
from mixmerge.checkpoint.companions import companions
from mixmerge.checkpoint.files import Files, opened
from mixmerge.checkpoint.header import DTYPE_BYTES, FLOATS, TensorHeader, read_header
from mixmerge.checkpoint.identity import content, fingerprint
from mixmerge.checkpoint.used_rows import MANIFEST, inherited
from mixmerge.errors import Fault, MixmergeError, OutputError
from mixmerge.experts.loading import HEADS

__all__ = ["export_adapter", "export_checkpoint"]

Dtype = Literal["bfloat16", "float16", "float32"]
_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_BLOCK = 1 << 22  # entries that are computed at a time


def export_checkpoint(
    base: str | Path,
    bank: Bank,
    weights: Weights,
    out: str | Path,
    *,
    how: How = "outputs",
    dtype: Dtype | None = None,
    network: Path | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``base + sum_e w_e delta_e`` as a model folder that transformers loads.

    A block of rows at a time: float32, rounded once. Tied tables stay tied; where head and table change apart, the head
    gets a tensor of its own. Config, tokenizer and the experts' ``heads/`` are the base's.

    Args:
        base: the folder the bank was made for.
        bank: in any type.
        weights: ``(E,)``, or by name, 0 for those not named.
        out: folder; appears when it is whole.
        how: as in ``Mix``.
        dtype: of all floating tensors; by default each keeps its own.
        network: the folder that the bank is of, whose manifest names the rows its gate and experts have seen.
        overwrite: a model folder that is there is replaced.
        progress: told bytes written, and of how many.

    Returns:
        the folder.

    Raises:
        CheckpointError: the base cannot be read.
        MixmergeError: a bank of another base; weights that are not finite; a value beyond the type's range.
        OutputError: it exists, or cannot be written.
    """
    out = Path(out)
    made = placed(base, mixture_of(bank, weights, how=how))
    model = made.base
    with making(out, overwrite=overwrite, of=["config.json"], inputs=[model.path]) as new:
        shards = _shards(made, dtype)
        total, written = sum(one.nbytes for tensors in shards.values() for one in tensors), 0
        with opened() as files:
            for file, tensors in shards.items():
                for count in _write(new / file, tensors, files):
                    written += count
                    if progress is not None:
                        progress(written, total)
        if len(shards) > 1:
            (new / "model.safetensors.index.json").write_text(_index(shards), encoding="utf-8")
        config = _config(model.config, untied=made.untied, dtype=dtype)
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in companions(model.path, model.config):
            (new / name).write_bytes(content(model.path / name))
        if (model.path / HEADS).is_dir():
            shutil.copytree(model.path / HEADS, new / HEADS)
        facts = _manifest(made, bank, weights_of(bank, weights), how, network)
        (new / MANIFEST).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _check(new, shards)
    return out


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the output.

    Args:
        name, dtype: in the output.
        source: of the base.
        change: what is added: a matrix's factors, or a vector; None to copy it.
        turned: a linear map that is stored the other way round.
    """

    name: str
    dtype: str
    source: TensorHeader
    change: Entry | Tensor | None
    turned: bool

    @property
    def nbytes(self) -> int:
        return self.source.elements * DTYPE_BYTES[self.dtype]

    def sides(self) -> tuple[Tensor, Tensor]:
        """``(rows, r)`` and ``(r, columns)``, whose product is the change as it is stored."""
        if not isinstance(self.change, Entry):
            raise TypeError(f"{self.name} is no matrix")
        one = scaled(self.change)
        a, b = one.a.float(), one.b.float() * torch.as_tensor(one.scale)[:, None]
        if one.kind == "embedding":
            return a, b
        return (a.T, b) if self.turned else (b.T, a)


def _shards(made: Placed, dtype: Dtype | None) -> dict[str, list[_Tensor]]:
    """The output's files: those of the base, renamed as safetensors are; the widest types first, for alignment."""

    def tensor(name: str, source: TensorHeader, change: Entry | Tensor | None) -> _Tensor:
        stored = _STORED[dtype] if dtype is not None and source.dtype in FLOATS else source.dtype
        return _Tensor(name, stored, source, change, made.layout.places.get(name) == "turned")

    model, count = made.base, len(made.base.files)
    groups: dict[Path, list[_Tensor]] = {file: [] for file in model.files}
    for name, header in model.tensors.items():
        change = made.head if name == made.head_name else made.entries.get(name, made.vectors.get(name))
        groups[header.file].append(tensor(name, header, change))
    if made.untied and made.head_name not in model.tensors:
        table = model.tensors[made.layout.table]
        groups[table.file].append(tensor(made.head_name, table, made.head))
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return {
        "model.safetensors" if count == 1 else name: sorted(
            group, key=lambda one: (-DTYPE_BYTES[one.dtype], one.name)
        )
        for name, group in zip(names, groups.values(), strict=True)
    }


def _write(path: Path, tensors: list[_Tensor], files: Files) -> Iterator[int]:
    """Write a file; the bytes of each tensor, when it is there."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in tensors:
        header[one.name] = {
            "dtype": one.dtype,
            "shape": list(one.source.shape),
            "data_offsets": [at, at + one.nbytes],
        }
        at += one.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for one in tensors:
            for block in _blocks(one, files):
                file.write(block.reshape(-1).view(torch.uint8).numpy().data)
            yield one.nbytes


def _blocks(one: _Tensor, files: Files) -> Iterator[Tensor]:
    """A tensor's values in the type of the output, some rows at a time."""
    source = one.source
    rows = source.shape[0] if source.shape else 1
    columns = source.elements // rows if rows else 0
    step = max(1, _BLOCK // max(1, columns))
    left, right = one.sides() if isinstance(one.change, Entry) else (None, None)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        stored = _stored(source, start * columns, stop * columns, files)
        if one.change is None and one.dtype == source.dtype:
            yield stored
            continue
        values = stored.to(torch.float64 if source.dtype == "F64" else torch.float32)
        if left is not None and right is not None:
            values += (left[start:stop] @ right).reshape(-1)
        elif isinstance(one.change, Tensor):
            values += one.change[start:stop].float()
        rounded = values.to(_TORCH[one.dtype])
        if not rounded.isfinite().all():
            what = f"has values beyond {one.dtype}, or that are not finite"
            raise MixmergeError(
                Fault(f"{source.file}: {one.name}", what, run="Export in bfloat16 or float32")
            )
        yield rounded


def _stored(source: TensorHeader, start: int, stop: int, files: Files) -> Tensor:
    """Elements of a tensor, flat; of a type that is no float its bytes."""
    width = DTYPE_BYTES[source.dtype]
    data = torch.empty((stop - start) * width, dtype=torch.uint8)
    files.read(source, start * width, data.numpy().data)
    return data.view(_TORCH[source.dtype]) if source.dtype in FLOATS else data


def _index(shards: Mapping[str, list[_Tensor]]) -> str:
    weight_map = {one.name: file for file, tensors in shards.items() for one in tensors}
    total = sum(one.nbytes for tensors in shards.values() for one in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2) + "\n"


def _config(config: Mapping[str, Any], *, untied: bool, dtype: Dtype | None) -> dict[str, Any]:
    found = json.loads(json.dumps(dict(config)))
    inner = [found, *(one for one in found.values() if isinstance(one, dict))]
    if untied:
        found["tie_word_embeddings"] = False
        for one in inner:
            if "tie_word_embeddings" in one:
                one["tie_word_embeddings"] = False
    if dtype is not None:
        for one in inner:
            for key in {"dtype", "torch_dtype"} & one.keys():
                one[key] = dtype
    return dict(found)


def _manifest(made: Placed, bank: Bank, weights: Tensor, how: How, network: Path | None) -> dict[str, Any]:
    return {
        "mixmerge": __version__,
        "mixture": {
            "base": fingerprint(made.base.path, made.base.tensors.values()),
            "experts": dict(zip(bank.experts, weights.tolist(), strict=True)),
            "mix": how,
        },
        **inherited(lineage(made, network)),
    }


def _check(folder: Path, shards: Mapping[str, list[_Tensor]]) -> None:
    for file, tensors in shards.items():
        written = {name: (one.shape, one.dtype) for name, one in read_header(folder / file).items()}
        if written != {one.name: (one.source.shape, one.dtype) for one in tensors}:
            raise OutputError(Fault(str(folder / file), "is not what was to be written", run="Run it again"))
