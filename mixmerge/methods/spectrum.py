"""Merging with learned singular values. Legend: as in ``mixmerge.methods.spectral``; c the factors of r directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.errors import Fault, MethodError
from mixmerge.methods.lowrank import Delta, total
from mixmerge.methods.records import Role
from mixmerge.methods.roles import Tables, is_matrix
from mixmerge.methods.spectral import by_matrix, triplets

_SAME = 1e-3  # sums whose nuclear norms differ by a larger share than this are not the same sum
_AGAIN = "Use the base, models, weights and tolerance they were learned with, or learn again"


def learned_spectrum(
    deltas: Sequence[Delta],
    *,
    base: Tensor,
    weight: Sequence[float] | None = None,
    lambda_: float = 1.0,
    tables: Tables = "mean",
    tolerance: float | None = None,
    factors: Sequence[float] = (1.0,),
    nuclear: float = 0.0,
    role: Role = "linear",
) -> Tensor:
    """The sum of the deltas with its singular values replaced by their mean times a factor: ``mean(S) U diag(c) V.T``.

    With factors 1 it is ``iso_c``. Learning chooses them so that the merge answers on each expert's rows as that
    expert does: ``mixmerge.calibrate.spectrum``.

    Source: ours. The start is Iso-C of No Task Left Behind (arXiv:2502.04959), the loss that of Expert Merging
    (arXiv:2509.25712).

    Args:
        deltas, base, tables, role: as in ``mixmerge.methods.spectral``.
        weight: a factor on each delta; 1 by default.
        lambda_: factor on what is merged; 1 by default.
        tolerance: as ``iso_c`` takes it.
        factors: one for each direction, by falling singular value, of a stack those of its matrices one behind the
            other; or one number for all, which is also what a tensor that is no matrix takes.
        nuclear: sum of the singular values the factors were learned with, of a stack of all its matrices; 0: unknown.

    Memory:
        as ``iso_c``.

    Raises:
        MethodError: the factors are more or fewer than the directions, or ``nuclear`` is that of another sum.
    """
    decomposed = is_matrix(base.shape, role, tables)
    if not decomposed:
        _check(factors, 1)
    given = torch.tensor(factors, dtype=torch.float64)
    used, norm = 0, 0.0

    def matrix(each: Sequence[Delta]) -> Tensor:
        nonlocal used, norm
        found = triplets(total(each), tolerance=tolerance)
        rank, norm = len(found.s), norm + float(found.s.sum())
        mine = given.expand(rank) if len(factors) == 1 else given[used : used + rank]
        used += rank
        if not rank or len(mine) < rank:  # too few of them are told when all directions are known
            return found.u.new_zeros(found.u.shape[0], found.v.shape[0])
        return (found.u * (found.s.mean() * mine.to(found.u))) @ found.v.mT

    scale = lambda_ if decomposed else lambda_ * float(factors[0])
    merged = by_matrix(deltas, matrix, base=base, weight=weight, lambda_=scale, role=role, tables=tables)
    if len(factors) > 1:
        _check(factors, used)
    if nuclear and abs(norm - nuclear) > _SAME * nuclear:
        what = f"were learned for a sum of nuclear norm {nuclear:.6g}, and this one's is {norm:.6g}"
        raise MethodError(Fault("factors", what, run=_AGAIN))
    return merged


def _check(factors: Sequence[float], directions: int) -> None:
    if len(factors) != directions:
        what = f"are {len(factors)} for {directions} directions"
        raise MethodError(Fault("factors", what, "One for each direction, or one for all", _AGAIN))
