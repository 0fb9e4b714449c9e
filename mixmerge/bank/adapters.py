"""PEFT's LoRA adapters as entries of a bank: exact, or refused by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mixmerge.bank.records import Entry, Kind
from mixmerge.checkpoint.adapter import AdapterDelta, read_adapter
from mixmerge.checkpoint.adapter_config import CONFIG, read_config
from mixmerge.checkpoint.adapter_delta import read_values
from mixmerge.checkpoint.adapter_names import BaseNames, parse
from mixmerge.checkpoint.header import TensorHeader
from mixmerge.checkpoint.identity import SAMPLE
from mixmerge.checkpoint.reader import read_json, read_weights
from mixmerge.errors import CheckpointError, Fault, MixmergeError

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_ALLOWED = "LoRA of linear layers and embeddings, lora_bias, biases and whole vectors have places in a bank"
_MERGE = "Merge it into its base (mixmerge merge) and name that folder: it is made low-rank"


def adapter_entries(
    folder: str | Path, base: Mapping[str, TensorHeader], *, where: str
) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """What an adapter changes, exactly: entries of matrices and vectors ``(n,)``, by the name of the base's tensor.

    alpha over r, rsLoRA, rank and alpha patterns, Linear, Conv1D and Embedding layers; the bias of ``lora_bias``; the
    biases of ``bias`` and the vectors of ``modules_to_save``, as what they add to the base's. What is saved whole and
    equals the base's is no change. A head that is tied to a table follows it only where PEFT does
    (``ensure_weight_tying``).

    Source: Hu et al., LoRA, arXiv:2106.09685, section 4.1; Kalajdzievski, rsLoRA, arXiv:2312.03732.

    Args:
        folder: of the adapter, as PEFT writes it.
        base: every tensor of the model the adapter was trained on.
        where: what refers to the adapter, for errors.

    Raises:
        CheckpointError: as ``read_adapter``.
        MixmergeError: DoRA, matrices that were replaced, experts' tensors of ``target_parameters``; factors that are
            not finite. All faults at once.
    """
    deltas = read_adapter(Path(folder), base, where=where)
    reading = _Reading(where)
    for delta in deltas.values():
        try:
            reading.read(delta)
        except CheckpointError as error:
            reading.faults += error.faults
    reading.raise_faults()
    names = BaseNames(base, ())
    own_head = names.has_head or any(name not in base for name in deltas)
    follows = not own_head and read_config(Path(folder), where=where).predicts_tokens
    entries = {
        name: Entry(one.a, one.b, one.scale, one.kind, follows and names.is_embedding(name))
        for name, one in reading.entries.items()
    }
    return entries, reading.vectors


def base_faults(adapters: Mapping[str, Path], base: Path) -> list[Fault]:
    """What speaks against adapters of this base, and of one base, in what their configs call it.

    A base that they name by a folder which is here is compared by the first values of its tensors, in the
    shorter of two types. Of hub ids nothing can be known but that they differ from each other.

    Args:
        adapters: name -> folder.
        base: the folder they are to be used with.

    Raises:
        CheckpointError: the headers of a base cannot be read.
    """
    named: dict[str, str] = {}
    faults = []
    for name, folder in adapters.items():
        try:
            said = read_json(folder / CONFIG).get("base_model_name_or_path")
        except CheckpointError:  # what is wrong with it, reading it says too
            continue
        if not isinstance(said, str) or not said:
            continue
        place = Path(said).expanduser()
        if not (place / "config.json").is_file():
            named[name] = said
        elif place.resolve() != base.resolve() and (same := _same_weights(place, base)) is not True:
            what = f"was trained on {said}, whose weights are not those of {base}"
            if same is None:
                what = f"was trained on {said}, which has no tensor to compare with those of {base}"
            faults.append(Fault(f"expert {name}", what, "Adapters of one base", "Name the base it is of"))
    if len({said.rstrip("/").rpartition("/")[2] for said in named.values()}) > 1:
        listed = ", ".join(f"{name} of {said}" for name, said in named.items())
        run = f"If these are one model, make base_model_name_or_path in their {CONFIG} the same"
        faults.append(Fault("experts", f"adapters of different bases: {listed}", "Adapters of one base", run))
    return faults


def _same_weights(one: Path, other: Path) -> bool | None:
    """Whether all floating tensors that both have begin with the same values; None if none can be compared.

    Of two types the values are compared in the shorter one, into which the other was rounded.
    """
    mine, (theirs, _) = read_weights(one)[0], read_weights(other)
    found = None
    for name, header in mine.items():
        known = theirs.get(name)
        if known is None or known.shape != header.shape or not {known.dtype, header.dtype} <= _TORCH.keys():
            continue
        if not _same_start(known, header):
            return False
        found = True
    return found


def _same_start(one: TensorHeader, other: TensorHeader) -> bool:
    left, right = _start(one), _start(other)
    count = min(len(left), len(right))
    left, right = left[:count], right[:count]
    if left.dtype.itemsize == right.dtype.itemsize and left.dtype != right.dtype:
        # Each rounded what neither has: they differ by a step of bfloat16 at most, or are beyond float16.
        return bool(torch.isclose(left.float(), right.float(), rtol=2**-7, atol=2**-14).all())
    shorter = min(left.dtype, right.dtype, key=lambda dtype: dtype.itemsize)
    return bool(torch.equal(left.to(shorter), right.to(shorter)))


def _start(header: TensorHeader) -> Tensor:
    with header.file.open("rb") as file:
        file.seek(header.offset)
        data = bytearray(file.read(min(SAMPLE, header.nbytes)))
    dtype = _TORCH[header.dtype]
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


class _Reading:
    """One adapter's changes as they are read; what has no place in a bank is kept by its reason."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.entries: dict[str, Entry] = {}
        self.vectors: dict[str, Tensor] = {}
        self.faults: list[Fault] = []
        self._refused: dict[str, list[str]] = defaultdict(list)

    def read(self, delta: AdapterDelta) -> None:
        """Keep one tensor's change."""
        if delta.kind == "same":
            return
        if delta.experts > 1 or delta.slot is not None or ".experts." in delta.target:
            self._refused["experts of a layer do not see every token of every row"].append(delta.target)
        elif delta.kind == "dora":
            self._refused["DoRA scales the base's rows too, so its change has no low rank"].append(
                delta.target
            )
        elif len(delta.weight.shape) == 1:
            self._vector(delta)
        elif delta.full is not None and not _unchanged(delta.full, delta.weight):
            self._refused["replaced whole, so its change has no low rank"].append(delta.target)
        elif delta.kind == "lowrank" and delta.a is not None and delta.b is not None:
            self._entry(delta.target, delta.a, delta.b, delta.scale)

    def _vector(self, delta: AdapterDelta) -> None:
        change = torch.zeros(delta.weight.elements)
        if delta.full is not None:
            change += torch.from_numpy(read_values(delta.full) - read_values(delta.weight))
        if delta.kind == "bias" and delta.b is not None:
            change += torch.from_numpy(read_values(delta.b)) * delta.scale
        if change.any():
            self.vectors[delta.target] = change

    def _entry(self, target: str, a: TensorHeader, b: TensorHeader, scale: float) -> None:
        down = torch.from_numpy(read_values(a)).view(a.shape)  # (r, d)
        up = torch.from_numpy(read_values(b)).view(b.shape)  # (o, r)
        if not (down.any() and up.any() and scale):
            return
        kind: Kind = "embedding" if parse(a.name).embedding else "linear"
        left = down.T.contiguous() if kind == "embedding" else down
        self.entries[target] = Entry(left, up.T.contiguous(), scale, kind)

    def raise_faults(self) -> None:
        """Raise all that was found, a reason at a time."""
        for why, names in self._refused.items():
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            self.faults.append(Fault(self.where, f"{', '.join(names[:3])}{more}: {why}", _ALLOWED, _MERGE))
        if self.faults:
            raise MixmergeError(self.faults)


def _unchanged(full: TensorHeader, weight: TensorHeader) -> bool:
    """Whether a tensor that was saved whole is the base's, in its own type: PEFT saves tables it did not train."""
    saved, stored = torch.from_numpy(read_values(full)), torch.from_numpy(read_values(weight))
    return bool(torch.equal(saved, stored.to(_TORCH[full.dtype]).float()))
