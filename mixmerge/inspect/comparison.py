"""How experts differ from their base and from each other: what there is to know before a method is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mixmerge.inspect.contents import Input
from mixmerge.inspect.matching import Skipped, match
from mixmerge.inspect.names import By, groups
from mixmerge.inspect.streaming import Progress, Sums, sum_tensors

Share = float | None


@dataclass(frozen=True)
class Difference:
    """How the experts differ in one row of the table: a layer, a kind of module, a tensor, or all.

    E experts, in the order of ``Comparison.experts``. A delta is expert - base. None where it is not defined:
    the cosine with a delta that is zero, or a share of nothing.

    Args:
        name: of the row.
        tensors, parameters: compared.
        base_norm: Euclidean norm of the base.
        norms: ``(E,)``, of the deltas.
        relative: ``(E,)``, norms over base_norm.
        zeros: ``(E,)``, share of a delta's entries that are exactly zero.
        cosines: ``(E, E)``, between the deltas.
        opposite: ``(E, E)``, share of all entries that one expert raises and the other lowers.
        conflicts: share of all entries that at least one expert raises and another lowers.
    """

    name: str
    tensors: int
    parameters: int
    base_norm: float
    norms: tuple[float, ...]
    relative: tuple[Share, ...]
    zeros: tuple[Share, ...]
    cosines: tuple[tuple[Share, ...], ...]
    opposite: tuple[tuple[Share, ...], ...]
    conflicts: Share


@dataclass(frozen=True)
class Comparison:
    """How experts differ.

    Args:
        base: its name.
        experts: their names.
        by: what a row is: layer, kind or tensor.
        rows: in the order of the model; kinds in a fixed order.
        total: over all rows.
        skipped: tensors that are not in every model, or not floating point.
    """

    base: str
    experts: tuple[str, ...]
    by: By
    rows: tuple[Difference, ...]
    total: Difference
    skipped: tuple[Skipped, ...]


def compare(
    base: Input, experts: Sequence[Input], *, by: By, threads: int, progress: Progress | None = None
) -> Comparison:
    """Read base and experts once, and add up their differences.

    Raises:
        CheckpointError: shapes differ, nothing is in common, a file cannot be read, or holds NaN or Inf.
    """
    matched, skipped = match(base, experts)
    sums = sum_tensors(matched, threads=threads, progress=progress)
    rows = [_difference(row, names, sums, len(experts)) for row, names in groups(sums, by).items()]
    total = _difference("all", list(sums), sums, len(experts))
    names = tuple(expert.name for expert in experts)
    return Comparison(base.name, names, by, tuple(rows), total, tuple(skipped))


def _difference(row: str, names: Sequence[str], sums: Mapping[str, Sums], experts: int) -> Difference:
    total = Sums.none(experts)
    for name in names:
        total = total.plus(sums[name])
    every = range(experts)
    base_norm = math.sqrt(total.square)
    norms = [math.sqrt(total.products[i, i]) for i in every]

    def cosine(i: int, j: int) -> Share:
        if not norms[i] or not norms[j]:
            return None
        if i == j:
            return 1.0
        exact = float(total.products[min(i, j), max(i, j)]) / norms[i] / norms[j]
        return max(-1.0, min(1.0, exact))

    def share(count: float) -> Share:
        return int(count) / total.elements if total.elements else None

    def opposite(i: int, j: int) -> Share:
        return share(0 if i == j else total.counts[min(i, j), max(i, j)])

    return Difference(
        name=row,
        tensors=len(names),
        parameters=total.elements,
        base_norm=base_norm,
        norms=tuple(norms),
        relative=tuple(norm / base_norm if base_norm else None for norm in norms),
        zeros=tuple(share(total.counts[i, i]) for i in every),
        cosines=tuple(tuple(cosine(i, j) for j in every) for i in every),
        opposite=tuple(tuple(opposite(i, j) for j in every) for i in every),
        conflicts=share(total.conflicts),
    )
