"""Full experts as entries of a bank: what they changed of the base, low-rank, read tensor by tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixmerge.bank.factors import allocate, check_size, low_rank, spectrum
from mixmerge.bank.layout import Layout, Place, layout_of
from mixmerge.bank.records import Entry, Kind
from mixmerge.checkpoint.adapter_delta import read_values
from mixmerge.checkpoint.adapter_names import HEADS
from mixmerge.checkpoint.header import FLOATS, TensorHeader
from mixmerge.checkpoint.reader import Checkpoint, open_checkpoint
from mixmerge.errors import CheckpointError, Fault, MixmergeError

_MERGE = "Leave that expert out, or merge it (mixmerge merge) instead"


def to_low_rank(
    expert: str | Path,
    base: str | Path,
    rank: int | Mapping[str, int] | None = None,
    *,
    energy: float | None = None,
    budget: int | None = None,
) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """What a full expert changed of its base: every matrix and table at low rank, every bias and gain whole.

    Both folders are read a tensor at a time, with ``budget`` twice. A head that is tied to its table in both stays
    tied; if it is in one only, table and head change apart.

    Source: FlexMoRE, heterogeneous ranks for experts of one base (post hoc, by truncated SVD); Eckart and Young, 1936.

    Args:
        expert, base: model folders of one architecture.
        rank: at most so many at every site, 1 or more; or at each site, 0 or absent for no change there.
        energy: over 0 to 1: as few ranks as hold this share of a site's energy.
        budget: numbers in all factors together (``allocate``); vectors are not counted.

    Returns:
        entries of matrices and vectors ``(n,)``, by the name of the base's tensor.

    Raises:
        CheckpointError: a folder cannot be read.
        MixmergeError: none of rank, energy and budget, or one out of range; tensors that are missing, of other shapes,
            not finite, or changed without a place in a bank. All faults at once.
    """
    if rank is None and energy is None and budget is None:
        raise MixmergeError(Fault("to_low_rank", "has no size", "rank, energy or budget"))
    if not isinstance(rank, Mapping):
        check_size(rank, energy, "to_low_rank")
    found = Difference.of(expert, base)
    if budget is not None:
        spectra = found.spectra()
        ranks = allocate(
            {name: [values] for name, values in spectra.items()}, found.sides(spectra), budget=budget
        )
        bought = {name: one[0] for name, one in ranks.items()}
        if isinstance(rank, int):
            bought = {name: min(one, rank) for name, one in bought.items()}
        rank = bought
    return found.entries(rank=rank, energy=energy)


@dataclass(frozen=True)
class Difference:
    """Two models of one architecture, to be compared tensor by tensor.

    Args:
        expert, base: their headers.
        layout: of the base.
        pairs: name in the base's model -> the expert's tensor and the base's; of a head either may be a table.
        tied: name of a table whose head changes with it; empty if there is none.
    """

    expert: Checkpoint
    base: Checkpoint
    layout: Layout
    pairs: Mapping[str, tuple[TensorHeader, TensorHeader]]
    tied: str

    @classmethod
    def of(cls, expert: str | Path, base: str | Path) -> Difference:
        """Headers and layouts of two folders.

        Raises:
            CheckpointError: one cannot be read.
            MixmergeError: tensors that one of them lacks, or that are of other shapes.
        """
        ours, theirs = (open_checkpoint(Path(one), name=str(one)) for one in (expert, base))
        layout = layout_of(theirs.path, theirs.tensors)
        own = layout_of(ours.path, ours.tensors)
        pairs = {
            name: (ours.tensors[name], one) for name, one in theirs.tensors.items() if name in ours.tensors
        }
        tied = layout.table if layout.table and own.table else ""
        heads = {name for name in (*ours.tensors, *theirs.tensors) if _is_head(name, layout, own)}
        if tied:
            pairs = {name: pair for name, pair in pairs.items() if name not in heads}
        elif layout.table or own.table:
            name = next((name for name in heads if name in theirs.tensors), next(iter(heads), layout.head))
            pairs[name] = _head(ours, own, heads), _head(theirs, layout, heads)
        apart = (ours.tensors.keys() ^ theirs.tensors.keys()) - heads - pairs.keys()
        _check(ours, theirs, apart, pairs)
        return cls(ours, theirs, layout, pairs, tied)

    def spectra(self) -> dict[str, Tensor]:
        """Singular values of every change of a matrix or table, largest first; those without any left out."""
        return {
            name: spectrum(delta, where=str(self.expert.path))
            for name, place, delta in self._changed()
            if place != "vector"
        }

    def sides(self, names: Mapping[str, object]) -> dict[str, tuple[int, int]]:
        """The two sides of matrices."""
        return {name: (self.pairs[name][1].shape[0], self.pairs[name][1].shape[1]) for name in names}

    def entries(
        self, *, rank: int | Mapping[str, int] | None, energy: float | None
    ) -> tuple[dict[str, Entry], dict[str, Tensor]]:
        """The changes as ``to_low_rank`` gives them.

        Raises:
            MixmergeError: values that are not finite, or changes without a place in a bank; all at once.
        """
        found: dict[str, Entry] = {}
        vectors: dict[str, Tensor] = {}
        for name, place, delta in self._changed():
            most = rank.get(name, 0) if isinstance(rank, Mapping) else rank
            if place == "vector":
                vectors[name] = delta
            elif most != 0:
                kind: Kind = "embedding" if place == "embedding" else "linear"
                where = f"{self.expert.path}: {name}"
                made = low_rank(
                    delta, rank=most, energy=energy, kind=kind, tied=name == self.tied, where=where
                )
                if made.rank:
                    found[name] = made
        return found, vectors

    def _changed(self) -> Iterator[tuple[str, Place, Tensor]]:
        """(name, place, delta) of what differs; of a ``turned`` map its transpose, ``(o, d)``."""
        faults: list[Fault] = []
        homeless: dict[str, list[str]] = defaultdict(list)
        for name, (one, other) in self.pairs.items():
            try:
                delta = _delta(one, other)
            except CheckpointError as error:
                faults += error.faults
                continue
            if delta is None:
                continue
            place = self.layout.places.get(name, "linear" if name == self.layout.head else "other")
            if name == self.tied and self.layout.shared:
                homeless[f"changed, and {', '.join(self.layout.shared)} use it too"].append(name)
            elif place == "other":
                homeless["changed, but is of no linear layer, embedding, bias or norm"].append(name)
            elif not faults and not homeless:
                yield name, place, delta.T if place == "turned" else delta
        for why, names in homeless.items():
            more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
            faults.append(
                Fault(str(self.expert.path), f"{', '.join(names[:3])}{more}: {why}", _PLACES, _MERGE)
            )
        if faults:
            raise MixmergeError(faults)


_PLACES = "Linear layers, embeddings, biases and gains have places in a bank"


def _is_head(name: str, *layouts: Layout) -> bool:
    known = {*(f"{head}.weight" for head in HEADS), *(one.head for one in layouts)}
    return name in known


def _head(model: Checkpoint, layout: Layout, heads: set[str]) -> TensorHeader:
    """What a model multiplies with at its head: a tensor of its own, or the table it is tied to."""
    own = [model.tensors[name] for name in sorted(heads) if name in model.tensors]
    return model.tensors[layout.table] if layout.table or not own else own[0]


def _check(
    expert: Checkpoint,
    base: Checkpoint,
    apart: set[str],
    pairs: Mapping[str, tuple[TensorHeader, TensorHeader]],
) -> None:
    faults = []
    for model, other in ((expert, base), (base, expert)):
        lacking = sorted(name for name in apart if name not in model.tensors)
        if lacking:
            more = f" and {len(lacking) - 3:,} more" if len(lacking) > 3 else ""
            what = f"it lacks {', '.join(lacking[:3])}{more}, which {other.path} has"
            faults.append(Fault(str(model.path), what, "Expert and base of one architecture and head"))
    for name, (one, known) in pairs.items():
        if one.shape != known.shape:
            what = f"{name} is {_sizes(one)}, the base's {_sizes(known)}"
            faults.append(Fault(str(expert.path), what, "Expert and base of one architecture and vocabulary"))
    if faults:
        raise MixmergeError(faults)


def _delta(one: TensorHeader, other: TensorHeader) -> Tensor | None:
    """Expert less base in float32, in the tensor's shape; None where they are equal."""
    if one.dtype not in FLOATS or other.dtype not in FLOATS:
        if one.dtype == other.dtype and _bytes(one) == _bytes(other):
            return None
        what = f"{one.name} is {one.dtype}, and differs from the base's {other.dtype}"
        raise CheckpointError(Fault(str(one.file), what, f"Known: {', '.join(FLOATS)}"))
    values = read_values(one)
    values -= read_values(other)
    return torch.from_numpy(values).view(one.shape) if values.any() else None


def _bytes(header: TensorHeader) -> bytes:
    with header.file.open("rb") as file:
        file.seek(header.offset)
        return file.read(header.nbytes)


def _sizes(tensor: TensorHeader) -> str:
    return " x ".join(f"{size:,}" for size in tensor.shape) or "a single value"
