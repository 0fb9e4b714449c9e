"""Experts' changes put side by side in a bank; experts added to one, chosen from it, put in another order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from mixmerge.bank.records import Bank, Entry, Site, side_by_side
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

Changes = tuple[Mapping[str, Entry], Mapping[str, Tensor]]
"""What one expert changes: entries of matrices and ``(n,)`` of vectors, by the name of the base's tensor."""

HEAD = "lm_head.weight"
_Factors = TypeVar("_Factors", Entry, Site)


def assembled(experts: Mapping[str, Changes], *, head: str = HEAD) -> Bank:
    """A bank of several experts' changes of one base, in the order given.

    Where some change a table alone and others its head with it, the latter get an entry of the head of their own.

    Args:
        experts: name -> what it changes.
        head: name of the tensor of a head that is tied to a table.

    Raises:
        MixmergeError: no experts; one that changes nothing; changes of one tensor that do not fit each other; values
            that are not finite. All faults at once.
    """
    faults = [] if experts else [Fault("bank", "has no experts", "One or more")]
    for name, (entries, vectors) in experts.items():
        faults += _faults_of(name, entries, vectors)
    changes: dict[str, Changes] = {
        name: (_present(entries), vectors) for name, (entries, vectors) in experts.items()
    }
    faults += _misfits(changes)
    if faults:
        raise MixmergeError(faults)
    changes = _untied(changes, head)
    sites = {
        site: side_by_side(site, [entries.get(site) for entries, _ in changes.values()])
        for site in _names(entries for entries, _ in changes.values())
    }
    whole = {
        name: _stacked([vectors.get(name) for _, vectors in changes.values()])
        for name in _names(vectors for _, vectors in changes.values())
    }
    return Bank(tuple(experts), sites, whole)


def changes_of(bank: Bank) -> dict[str, Changes]:
    """What each expert of a bank changes, as views of its factors."""
    found: dict[str, Changes] = {}
    for number, name in enumerate(bank.experts):
        entries = {site.name: site.entry(number) for site in bank.sites.values() if site.ranks[number]}
        vectors = {key: one[number] for key, one in bank.vectors.items() if bool(one[number].any())}
        found[name] = entries, vectors
    return found


def extended(bank: Bank, name: str, changes: Changes, *, head: str = HEAD) -> Bank:
    """The bank with one more expert at its end.

    Raises:
        MixmergeError: the name is taken; or as ``assembled``.
    """
    if name in bank.experts:
        raise MixmergeError(
            Fault("bank", f"an expert is called {name!r} already", f"Experts: {', '.join(bank.experts)}")
        )
    return assembled({**changes_of(bank), name: changes}, head=head)


def chosen(bank: Bank, experts: Sequence[str]) -> Bank:
    """The bank of some of its experts, in the order given: a part of it, or all of it permuted.

    Raises:
        MixmergeError: one is not in the bank, or there twice; or as ``assembled``.
    """
    known = changes_of(bank)
    faults = [
        Fault("bank", f"no expert is called {name!r}", choices(name, list(known)))
        for name in dict.fromkeys(experts)
        if name not in known
    ]
    if len(set(experts)) < len(experts):
        faults.append(Fault("bank", "an expert is named twice", "Each once"))
    if faults:
        raise MixmergeError(faults)
    return assembled({name: known[name] for name in experts})


def compact(bank: Bank) -> Bank:
    """The same bank, factors in bfloat16 or float16 at sites where that holds every one of them exactly."""
    return Bank(bank.experts, _compacted(bank.sites), bank.vectors)


def compact_changes(changes: Changes) -> Changes:
    """The same of one expert's changes."""
    entries, vectors = changes
    return _compacted(entries), vectors


def _compacted(held: Mapping[str, _Factors]) -> dict[str, _Factors]:
    return {name: replace(one, a=a, b=b) for name, one in held.items() for a, b in [_short(one.a, one.b)]}


def _short(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for dtype in (torch.bfloat16, torch.float16):
        shorter = a.to(dtype), b.to(dtype)
        if all(torch.equal(one.to(other.dtype), other) for one, other in zip(shorter, (a, b), strict=True)):
            return shorter
    return a, b


def turned(entry: Entry) -> Entry:
    """The change of a tied head that goes with that of its table."""
    return Entry(entry.b, entry.a.T.contiguous(), entry.scale)


def outer(entry: Entry) -> tuple[int, int]:
    """Inputs (of a table, entries of the vocabulary) and outputs."""
    return int(entry.a.shape[0 if entry.kind == "embedding" else 1]), int(entry.b.shape[1])


def shape_fault(name: str, a: Tensor, b: Tensor, scale: Tensor, *, table: bool, where: str) -> Fault | None:
    """What is wrong with the shapes or values of factors."""
    ranks = a.shape[-1] if table else a.shape[0]
    if a.dim() != 2 or b.dim() != 2 or not ranks == b.shape[0] == len(scale):
        sizes = f"a {tuple(a.shape)}, b {tuple(b.shape)}, scale {tuple(scale.shape)}"
        return Fault(where, f"the factors of {name} do not fit each other: {sizes}")
    if not all(bool(one.isfinite().all()) for one in (a, b, scale)):
        return Fault(where, f"the factors of {name} hold NaN or Inf", run="Use an earlier checkpoint of it")
    return None


def _faults_of(name: str, entries: Mapping[str, Entry], vectors: Mapping[str, Tensor]) -> list[Fault]:
    where = f"expert {name}"
    found = []
    for site, one in entries.items():
        scale = torch.as_tensor(one.scale, dtype=torch.float32)
        scale = scale.expand(one.rank) if scale.dim() == 0 else scale
        found.append(shape_fault(site, one.a, one.b, scale, table=one.kind == "embedding", where=where))
    for key, value in vectors.items():
        if value.dim() != 1 or not bool(value.isfinite().all()):
            what = f"the change of {key} is {tuple(value.shape)}, or not finite"
            found.append(Fault(where, what, "A vector of finite numbers"))
    if not any(one.rank for one in entries.values()) and not any(bool(one.any()) for one in vectors.values()):
        found.append(Fault(where, "changes nothing: it equals the base", run="Leave it out"))
    return [fault for fault in found if fault is not None]


def _misfits(experts: Mapping[str, Changes]) -> list[Fault]:
    """Changes of one tensor that are of tensors of different shapes: the experts' bases differ."""
    faults = []
    first: dict[str, tuple[str, object]] = {}
    for name, (entries, vectors) in experts.items():
        shapes: dict[str, object] = {site: (one.kind, *outer(one)) for site, one in entries.items()}
        shapes |= {key: ("vector", *one.shape) for key, one in vectors.items()}
        for site, shape in shapes.items():
            other, known = first.setdefault(site, (name, shape))
            if known != shape:
                what = f"changes {site} as {_said(shape)}, and {other} as {_said(known)}"
                faults.append(Fault(f"expert {name}", what, "Experts of one base"))
    return faults


def _said(shape: object) -> str:
    kind, *sizes = shape if isinstance(shape, tuple) else (shape,)
    return f"{kind} {' x '.join(map(str, sizes))}"


def _present(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    return {name: one for name, one in entries.items() if one.rank}


def _untied(experts: Mapping[str, Changes], head: str) -> dict[str, Changes]:
    """Changes whose tables are tied in every expert or in none; a head's change stands apart in the latter."""
    found = dict(experts)
    for site in _names(entries for entries, _ in experts.values()):
        ties = {name: entries[site].tied for name, (entries, _) in experts.items() if site in entries}
        if len(set(ties.values())) < 2:
            continue
        for name in (name for name, tied in ties.items() if tied):
            entries, vectors = found[name]
            own = {site: replace(entries[site], tied=False), head: turned(entries[site])}
            found[name] = {**entries, **own}, vectors
    return found


def _names(parts: Iterable[Mapping[str, object]]) -> list[str]:
    names: dict[str, None] = {}
    for part in parts:
        names.update(dict.fromkeys(part))
    return list(names)


def _stacked(vectors: Sequence[Tensor | None]) -> Tensor:
    like = next(one for one in vectors if one is not None)
    return torch.stack([torch.zeros_like(like) if one is None else one for one in vectors])
