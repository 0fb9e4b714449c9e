"""Which tensors of base and experts are the same one. Headers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mixmerge.checkpoint.adapter import AdapterDelta
from mixmerge.checkpoint.adapter_names import HEADS, BaseNames
from mixmerge.checkpoint.header import FLOATS, TensorHeader
from mixmerge.errors import CheckpointError, Fault
from mixmerge.inspect.contents import Input

_TIE = "tie_word_embeddings"
_Places = Mapping[Path, tuple[int, int]]  # a file's device and inode: two paths may lead to one file


@dataclass(frozen=True)
class Source:
    """One tensor of one model.

    Args:
        header: where the stored bytes are.
        adapter: what to add to them, if anything.
        same: the bytes are the base's own, so the delta is the adapter alone, or nothing.
    """

    header: TensorHeader
    adapter: AdapterDelta | None
    same: bool


@dataclass(frozen=True)
class Matched:
    """One tensor of all models: ``sources[0]`` is the base's."""

    name: str
    sources: tuple[Source, ...]

    @property
    def elements(self) -> int:
        return self.sources[0].header.elements

    @property
    def nbytes(self) -> int:
        return sum(source.header.nbytes for source in self.sources)


@dataclass(frozen=True)
class Skipped:
    """A tensor that is not compared, and why."""

    name: str
    reason: str


def match(base: Input, experts: Sequence[Input]) -> tuple[list[Matched], list[Skipped]]:
    """Every tensor that all of them have, in the base's order; and what is left out.

    A head that is tied in one model and stored in another is compared with the embedding it is tied to.

    Raises:
        CheckpointError: shapes differ, or nothing is in common; every model that does not fit is named.
    """
    models = [base, *experts]
    names = dict.fromkeys(name for model in models for name in (*model.checkpoint.tensors, *model.deltas))
    ties = [_ties(model, names) for model in models]
    places = _places(models)
    matched, skipped = [], []
    different: dict[int, list[str]] = {}
    for name in names:
        found = [_find(model, name, tied) for model, tied in zip(models, ties, strict=True)]
        headers = [header for header in found if header is not None]
        if reason := _reason(name, models, found):
            skipped.append(Skipped(name, reason))
            continue
        for number, header in enumerate(headers):
            if header.shape != headers[0].shape:
                both = f"{name} is {list(header.shape)}, there {list(headers[0].shape)}"
                different.setdefault(number, []).append(both)
        sources = [
            _source(model, name, header, headers[0], base=base, places=places)
            for model, header in zip(models, headers, strict=True)
        ]
        matched.append(Matched(name, tuple(sources)))
    if different:
        raise CheckpointError(
            [_shape_fault(models[n].name, base.name, all_) for n, all_ in different.items()]
        )
    if not matched:
        what = f"no tensor is in all of {', '.join(model.name for model in models)}"
        raise CheckpointError(
            Fault(base.name, what, "Experts are compared with the base they were fine-tuned from")
        )
    return matched, skipped


def _ties(model: Input, names: Mapping[str, None]) -> dict[str, str]:
    """Heads the model does not store, and the embedding that stands in."""
    if model.checkpoint.config.get(_TIE) is False:
        return {}
    known = BaseNames(model.checkpoint.tensors, ())
    heads = [name for name in names if name not in model.checkpoint.tensors]
    return {head: embedding for head in heads if (embedding := known.tied(head))}


def _find(model: Input, name: str, ties: Mapping[str, str]) -> TensorHeader | None:
    if name in model.deltas:
        return model.deltas[name].weight
    return model.checkpoint.tensors.get(ties.get(name, name))


def _reason(name: str, models: Sequence[Input], found: Sequence[TensorHeader | None]) -> str | None:
    missing = [model.name for model, header in zip(models, found, strict=True) if header is None]
    if missing:
        return f"not in {', '.join(missing)}"
    odd = sorted({header.dtype for header in found if header is not None} - set(FLOATS))
    if odd:
        return f"{', '.join(odd)}: only {', '.join(FLOATS)} are compared"
    is_head = name.removesuffix(".weight").rpartition(".")[2] in HEADS
    if is_head and all(model.checkpoint.config.get(_TIE) and name not in model.deltas for model in models):
        return "tied to the embedding by every config"
    return None


def _source(
    model: Input, name: str, header: TensorHeader, root: TensorHeader, *, base: Input, places: _Places
) -> Source:
    delta = model.deltas.get(name)
    # What replaces a tensor is stored whole; its difference to the base has to be taken.
    exact = delta is None or delta.kind != "replace"
    stored_once = header.offset == root.offset and places[header.file] == places[root.file]
    return Source(header, delta, stored_once and exact and model is not base and name not in base.deltas)


def _places(models: Sequence[Input]) -> _Places:
    files = {header.file for model in models for header in model.checkpoint.tensors.values()}
    stats = {file: file.stat() for file in files}
    return {file: (stat.st_dev, stat.st_ino) for file, stat in stats.items()}


def _shape_fault(name: str, base: str, different: Sequence[str]) -> Fault:
    count = (
        f"{len(different)} tensors have other shapes" if len(different) > 1 else "a tensor has another shape"
    )
    return Fault(
        name,
        f"{count} than in {base}: {different[0]}",
        run="Name the base it was fine-tuned from, or inspect them one at a time",
    )
