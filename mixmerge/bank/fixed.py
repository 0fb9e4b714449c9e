"""A fixed mixture of a bank's experts: one change of each tensor, and where it goes in the base.

Legend as in ``records``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixmerge.bank.assembling import outer, turned
from mixmerge.bank.factors import low_rank, scaled
from mixmerge.bank.layout import Layout, layout_of
from mixmerge.bank.mix import How, crossed
from mixmerge.bank.records import Bank, Entry, Site
from mixmerge.checkpoint.reader import Checkpoint, open_checkpoint
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

Weights = Tensor | Sequence[float] | Mapping[str, float]
_BASE = "A bank goes with the base it was made for"


@dataclass(frozen=True)
class Placed:
    """A mixture's changes in its base.

    Args:
        base: the checkpoint.
        layout: of its model.
        entries: of matrices and tables, by the name of the base's tensor; the head's apart.
        head: what happens to the head, its table's change included where that is tied; None for nothing.
        head_name: of the head's tensor: as the base stores it, or as it would be called.
        untied: head and table change apart, and the base has one tensor for both.
        vectors: what is added to biases and gains, by name.
    """

    base: Checkpoint
    layout: Layout
    entries: Mapping[str, Entry]
    head: Entry | None
    head_name: str
    untied: bool
    vectors: Mapping[str, Tensor]


def weights_of(bank: Bank, weights: Weights) -> Tensor:
    """``(E,)``, float32.

    Args:
        weights: of every expert in the bank's order; or by name, 0 for those not named.

    Raises:
        MixmergeError: another number of weights, unknown names, weights that are not finite.
    """
    if isinstance(weights, Mapping):
        strange = [name for name in weights if name not in bank.experts]
        if strange:
            raise MixmergeError(
                [
                    Fault("weights", f"no expert is called {one!r}", choices(one, list(bank.experts)))
                    for one in strange
                ]
            )
        weights = [weights.get(name, 0.0) for name in bank.experts]
    found = torch.as_tensor(weights, dtype=torch.float32).detach().cpu()
    if found.shape != (len(bank.experts),):
        what = f"are {tuple(found.shape)} for {len(bank.experts)} experts"
        raise MixmergeError(Fault("weights", what, f"One for each of {', '.join(bank.experts)}"))
    if not found.isfinite().all():
        raise MixmergeError(Fault("weights", f"are {found.tolist()}", "Finite numbers"))
    return found


def mixture_of(
    bank: Bank, weights: Weights, *, how: How = "outputs"
) -> tuple[dict[str, Entry], dict[str, Tensor]]:
    """A fixed mixture as the changes of one expert.

    ``outputs``: exact, ranks side by side, never A and B apart; those of weight 0 are left out, and where more are left
    than the matrix has, they are joined to as many (``low_rank``, exact). ``factors``: the mixed A and the mixed B.

    Args:
        bank: of the experts.
        weights: as ``weights_of`` takes them.
        how: as in ``Mix``.

    Returns:
        entries with a scale of ``(r,)``, and vectors ``(n,)``; what does not change is left out.

    Raises:
        MixmergeError: the weights; or ``factors`` of ranks that differ at a site.
    """
    each = weights_of(bank, weights)
    entries: dict[str, Entry] = {}
    faults = []
    for name, site in bank.sites.items():
        if how == "factors" and len({rank for rank in site.ranks if rank}) > 1:
            what = f"has ranks {', '.join(map(str, site.ranks))}, so factors cannot be mixed"
            faults.append(Fault(f"bank: {name}", what, "Equal ranks, or the mixture of outputs"))
            continue
        entry = _side_by_side(site, each) if how == "outputs" else _crossed(site, each)
        if entry.rank > min(outer(entry)):
            entry = low_rank(entry, where=name)
        if entry.rank:
            entries[name] = entry
    if faults:
        raise MixmergeError(faults)
    vectors = {name: each.to(one.device) @ one.float() for name, one in bank.vectors.items()}
    return entries, {name: one for name, one in vectors.items() if bool(one.any())}


def placed(base: str | Path, changes: tuple[Mapping[str, Entry], Mapping[str, Tensor]]) -> Placed:
    """The changes of one expert in a base.

    Raises:
        CheckpointError: the base cannot be read.
        MixmergeError: names or shapes that are not the base's, a tie that the base has not. All faults at once.
    """
    entries, vectors = changes
    model = open_checkpoint(Path(base), name=str(base))
    layout = layout_of(model.path, [*model.tensors, *entries, *vectors])
    heads = [
        name for name in layout.modules if layout.head and f"{layout.modules[name]}.weight" == layout.head
    ]
    own = [one for name, one in entries.items() if name in heads]
    faults = _faults(model, layout, entries, vectors, set(heads))
    if faults:
        raise MixmergeError(faults)
    table = entries.get(layout.table)
    parts = ([turned(table)] if table is not None and table.tied else []) + own
    stored = [name for name in heads if name in model.tensors]
    return Placed(
        base=model,
        layout=layout,
        entries={name: one for name, one in entries.items() if name not in heads},
        head=_together(parts) if parts else None,
        head_name=stored[0] if stored else layout.head,
        untied=bool(layout.table) and (bool(own) or (table is not None and not table.tied)),
        vectors=vectors,
    )


def _side_by_side(site: Site, weights: Tensor) -> Entry:
    each = weights.to(site.scale)[site.owners] * site.scale.float()  # (R,)
    kept = each != 0
    a = site.a[:, kept] if site.kind == "embedding" else site.a[kept]
    return Entry(a, site.b[kept], each[kept], site.kind, site.tied)


def _crossed(site: Site, weights: Tensor) -> Entry:
    whole = scaled(crossed(site, weights))
    there = bool(whole.a.any() and whole.b.any())
    return whole if there else _side_by_side(site, torch.zeros_like(weights))


def _together(parts: Sequence[Entry]) -> Entry:
    """The sum of changes of a linear map."""
    even = [scaled(one) for one in parts]
    scale = torch.cat([torch.as_tensor(one.scale) for one in even])
    return Entry(torch.cat([one.a for one in even]), torch.cat([one.b for one in even]), scale)


def _faults(
    model: Checkpoint,
    layout: Layout,
    entries: Mapping[str, Entry],
    vectors: Mapping[str, Tensor],
    heads: set[str],
) -> list[Fault]:
    faults = []
    for name, one in entries.items():
        place = layout.places.get(name)
        header = model.tensors.get(name) or (model.tensors.get(layout.table) if name in heads else None)
        inputs, outputs = outer(one)
        shape = (inputs, outputs) if place in ("embedding", "turned") else (outputs, inputs)
        where = f"bank: {name}"
        if header is None or place is None:
            faults.append(Fault(where, f"{model.path} has no such tensor", _BASE))
        elif (place == "embedding") != (one.kind == "embedding") or place in ("vector", "other"):
            faults.append(Fault(where, f"is of a {one.kind} map, and the base's is not", _BASE))
        elif header.shape != shape:
            faults.append(
                Fault(where, f"is for {inputs} to {outputs}, and the base's is {header.shape}", _BASE)
            )
        elif one.tied and layout.head and name != layout.table:
            faults.append(Fault(where, "has a head tied to it, and the base's head is not", _BASE))
        elif name == layout.table and layout.shared:
            faults.append(Fault(where, f"is used by {', '.join(layout.shared)} too, in other ways", _BASE))
    for name, value in vectors.items():
        header = model.tensors.get(name)
        if header is None or layout.places.get(name) != "vector" or header.shape != tuple(value.shape):
            what = f"is {tuple(value.shape)}, and {model.path} has no such bias or gain"
            faults.append(Fault(f"bank: {name}", what, _BASE))
    return faults
