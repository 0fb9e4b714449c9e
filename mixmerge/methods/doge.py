"""DOGE-TA: one shared correction of all deltas, and the largest entries of each.

Legend: as in ``mixmerge.methods.spectral``; R the ranks of all factors together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mixmerge.methods.descent import descend
from mixmerge.methods.emr import expert_at
from mixmerge.methods.lowrank import Delta, LowRank, add_to, blocks, square, stacked
from mixmerge.methods.quantiles import (
    BINS,
    Counts,
    Sought,
    from_top,
    locate,
    lower_counts,
    upper_counts,
    values,
)
from mixmerge.methods.records import Role
from mixmerge.methods.roles import Tables, is_matrix
from mixmerge.methods.sketch import Group, Totals
from mixmerge.methods.spectral import by_matrix, triplets

Project = Callable[[Tensor], object]


@dataclass(frozen=True)
class Thresholds:
    """What the passes over the model find.

    Args:
        sought: after the first pass, the bins of the thresholds.
        values: after the second, for each expert the smallest magnitude that is kept.
    """

    sought: tuple[Sought, ...] = ()
    values: tuple[float, ...] = ()


class LargestEntries:
    """The sketch of ``doge_ta``: of each expert the K-th largest magnitude over all its matrices, exactly.

    K is the sum of ``density`` times the entries of every matrix. Two passes; a megabyte for each expert.
    """

    def passes(self) -> int:
        """Two: the upper halves of the magnitudes' bits, then the lower."""
        return 2

    def observe(self, number: int, group: Group, state: Thresholds | None) -> Totals:
        """One matrix's counts; other tensors have none."""
        deltas: Sequence[Any] = group.tensors
        shape = deltas[0].shape if group.base is None else group.base.shape
        if not is_matrix(shape, group.role, group.parameters.get("tables") or "base"):
            return {}
        density = group.parameters.get("density") or [0.3] * len(deltas)
        found: Totals = {"wanted": np.array([float(share) * int(np.prod(shape)) for share in density])}
        counts = [self._counts(deltas[index], number, index, state) for index in range(len(deltas))]
        return found | {"counts": np.concatenate(counts)}

    def _counts(self, delta: Delta, number: int, index: int, state: Thresholds | None) -> Counts:
        """Of one expert, ``(1, bins)`` in the first pass and a row for each of its thresholds in the second."""
        sought = [one for one in (state or Thresholds()).sought if one.row == index]
        counts = np.zeros((len(sought) if number else 1, BINS), np.int64)
        for piece in [delta] if delta.ndim == 2 else [delta[at] for at in range(delta.shape[0])]:
            for _, _, rows in blocks(piece):
                counts += lower_counts(rows.abs(), sought) if number else upper_counts(rows.abs())
        return counts

    def settle(self, number: int, totals: Totals, state: Thresholds | None) -> Thresholds:
        """The bins, then the values."""
        if not totals:
            return Thresholds()
        if number == 0:
            sizes = totals["counts"].sum(axis=1)
            kept = np.minimum(np.floor(totals["wanted"] + 1e-6).astype(np.int64), sizes)
            wanted = [
                (at, from_top(int(size), int(k)))
                for at, (size, k) in enumerate(zip(sizes, kept, strict=True))
                if k
            ]
            return Thresholds(locate(totals["counts"], wanted), (float("inf"),) * len(sizes))
        sought = (state or Thresholds()).sought
        found = [float("inf")] * len(totals["wanted"])
        for one, value in zip(sought, values(totals["counts"], sought), strict=True):
            found[one.row] = value
        return Thresholds(sought, tuple(found))


def doge_ta(
    deltas: Sequence[Delta],
    *,
    base: Tensor,
    weight: Sequence[float] | None = None,
    density: Sequence[float] | None = None,
    lambda_: float = 1.0,
    eta: float = 0.07,
    subspace: float = 6,
    steps: float = 400,
    lr: float = 1e-4,
    projection: Literal["gradient", "step"] = "gradient",
    part: float | None = None,
    scaled: bool = False,
    tables: Literal["base", "spectral"] = "base",
    tolerance: float | None = None,
    role: Role = "linear",
    sketch: Thresholds | None = None,
) -> Tensor:
    """Base plus ``sum_i l_i (delta_i + D) * M_i``, D one correction for all experts, M_i the largest of delta_i.

    ``l_i = eta / |delta_i|`` for each matrix. D starts at 0 and is trained by Adam to make, summed over experts
    j and rows, ``<delta_j, delta_j - sum_i l_i delta_i - (sum_i l_i) D>^2`` small, outside a shared subspace: its
    gradient loses its part in the first ``floor(k / subspace)`` left singular vectors of the experts' first
    ``max(1, floor(k / T))`` left singular vectors side by side. M_i keeps the share ``density`` of the entries of
    expert i with the largest ``|delta_i|`` over all matrices of the model. What is no matrix stays the base's.

    Source: Modeling Multi-Task Model Merging as Adaptive Projective Gradient Descent (arXiv:2501.01230), DOGE-TA;
    the row-wise objective and the defaults are those of the authors' code in FusionBench.

    Args:
        deltas, base, tables, tolerance, role: as in ``mixmerge.methods.spectral``.
        weight: a factor on each ``l_i``; 1 by default (the paper has none).
        density: of each expert, the share of entries kept, 0 to 1; 0.3 in the code. Obeyed by ``LargestEntries``.
        lambda_: factor on what is added; 1 in the paper.
        eta: as above, 0 or more; 0.07 in the code.
        subspace: as above, 1 or more; 6 in the code.
        steps, lr: of Adam; 400 and 1e-4 in the code.
        projection: ``gradient`` is the code's: Adam is given projected gradients, and as it scales each entry by
            itself, D does not stay outside the subspace. ``step`` projects D after every step as well, so it does.
        part: position of an expert, from 0: base plus ``(delta_i + D) * M_i`` of this one alone. DOGE-AM is
            ``adamerging`` of the parts of all; the authors' code starts at 0.3 of parts that are not scaled.
        scaled: of ``part``: times ``l_i``, so that the parts of all add up to the merge.
        sketch: of ``LargestEntries``; without it, this tensor alone is the model.

    Raises:
        MethodError: ``part`` is no position of an expert.

    Memory:
        beyond base and result, T deltas of one matrix, or the factors, one delta and its SVD, the stack of
        ``T max(1, floor(k / T))`` columns of m, T m + R m numbers a step, D and Adam's three buffers (m x n each): the
        objective needs every delta in every step.

    Deviations:
        every architecture's matrices, not names with ``encoder``; more experts than k still give a direction each to
        the subspace (the code: none); a zero delta has l_i = 0 (published: 0/0); exactly
        the K-th largest is the threshold (the code keeps one more), values equal to it are kept as in the code, but
        for zeros; D takes no part in the mask, as in the code (FusionBench's page says otherwise). The code's DOGE-AM
        trains a D for each expert: their gradients are multiples of one another, which Adam does not see, so that but
        for its epsilon they are the one D of here, with ``subspace`` T.
    """
    limits = (sketch or _alone(deltas, base, role, tables, density)).values
    only = None if part is None else expert_at(part, len(deltas), name="part")
    factors = [float(eta) * float(each) for each in ([1.0] * len(deltas) if weight is None else weight)]

    def matrix(each: Sequence[Delta]) -> Tensor:
        held, beside = _held(each)
        sizes = [square(delta) ** 0.5 for delta in held]
        scales = [factor / size if size else 0.0 for factor, size in zip(factors, sizes, strict=True)]
        project = _projector(held, int(subspace), tolerance)
        settle = project if projection == "step" else None
        correction = _correction(held, beside, scales, project, settle, steps=int(steps), lr=float(lr))
        if only is not None:
            scales = [(scale if scaled else 1.0) * (at == only) for at, scale in enumerate(scales)]
        return _masked(held, correction, scales, limits)

    return by_matrix(
        deltas, matrix, base=base, weight=None, lambda_=lambda_, role=role, tables=tables, rest="base"
    )


def _held(each: Sequence[Delta]) -> tuple[list[Delta], Tensor | None]:
    """The deltas and, unless they are factors thin enough, all of them as ``(m, T, n)``: a row's deltas lie together.

    What is not factors is held there alone: what is returned are views of it.
    """
    held: list[Delta] = []
    beside: Tensor | None = None
    ranks = 0
    for index in range(len(each)):
        delta = each[index]
        (m, n), thin = delta.shape, isinstance(delta, LowRank)
        ranks += delta.rank if isinstance(delta, LowRank) else 0
        if beside is None and (not thin or ranks > min(m, n)):
            beside = torch.zeros((m, len(each), n), dtype=delta.dtype, device=delta.device)
            for at, earlier in enumerate(held):
                add_to(beside[:, at], earlier)
        if beside is not None:
            add_to(beside[:, index], delta)
        held.append(delta if beside is None or thin else beside[:, index])
    return held, beside


def _correction(
    held: Sequence[Delta],
    beside: Tensor | None,
    scales: Sequence[float],
    project: Project,
    settle: Project | None,
    *,
    steps: int,
    lr: float,
) -> Tensor:
    """D, for experts that have a delta here."""
    start = torch.zeros(held[0].shape, dtype=held[0].dtype, device=held[0].device)
    if not any(scales):
        return start
    slope = _slope_of_factors(held, scales) if beside is None else _slope(beside, scales)

    def gradient(point: Tensor, out: Tensor) -> Tensor:
        slope(point, out)
        project(out)
        return out

    return descend(start, gradient, steps=steps, lr=lr, settle=settle)


def _alone(
    deltas: Sequence[Delta], base: Tensor, role: Role, tables: Tables, density: Sequence[float] | None
) -> Thresholds:
    sketch, state = LargestEntries(), None
    given: Any = deltas
    for number in range(sketch.passes()):
        group = Group(given, base, role, {"density": density, "tables": tables})
        state = sketch.settle(number, sketch.observe(number, group, state), state)
    return state or Thresholds()


def _projector(held: Sequence[Delta], subspace: int, tolerance: float | None) -> Project:
    """``x -= P x`` in place, P on the shared subspace of the rows' side."""
    k = min(held[0].shape)
    count = max(1, k // len(held))
    stack = torch.cat([triplets(delta, tolerance=tolerance, count=count).u for delta in held], 1)
    if not stack.shape[1] or not k // subspace:
        return lambda x: x
    basis = triplets(stack, tolerance=tolerance, count=k // subspace).u.contiguous()

    def project(x: Tensor) -> object:
        return x.addmm_(basis, basis.mT @ x, alpha=-1)

    return project


def _slope(tensors: Tensor, scales: Sequence[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient of the objective: ``-2 l sum_j e_j delta_j``, e_j the rows' inner products, l the sum of scales.

    Args:
        tensors: ``(m, T, n)``.
        scales: T.
    """
    merged = torch.zeros_like(tensors[:, 0])
    for at, scale in enumerate(scales):
        add_to(merged, tensors[:, at], scale)
    rows = [(tensors[:, at] * (tensors[:, at] - merged)).sum(1) for at in range(len(scales))]
    fixed = torch.stack(rows, 1)  # (m, T)
    step = sum(scales)

    def slope(point: Tensor, out: Tensor) -> Tensor:
        gaps = torch.baddbmm(fixed[:, :, None], tensors, point[:, :, None], alpha=-step)  # (m, T, 1)
        torch.bmm(gaps.mT.mul_(-2 * step), tensors, out=out[:, None])
        return out

    return slope


def _slope_of_factors(held: Sequence[Delta], scales: Sequence[float]) -> Callable[[Tensor, Tensor], Tensor]:
    """The same from the factors of all: b ``(m, R)`` and a ``(R, n)``."""
    thin = [delta for delta in held if isinstance(delta, LowRank)]
    whole = stacked(thin)
    owner = torch.cat([torch.full((delta.rank,), at) for at, delta in enumerate(thin)]).to(whole.device)
    member = torch.nn.functional.one_hot(owner, len(thin)).to(whole.dtype)  # (R, T)
    gram = whole.a @ whole.a.mT
    merged = (whole.b * whole.b.new_tensor(scales)[owner]) @ gram  # every row of the sum times a.T
    fixed = (
        torch.stack([((delta.b @ (delta.a @ delta.a.mT)) * delta.b).sum(1) for delta in thin], 1)
        - (whole.b * merged) @ member
    )  # (m, T)
    step = sum(scales)

    def slope(point: Tensor, out: Tensor) -> Tensor:
        gaps = fixed - step * ((whole.b * (point @ whole.a.mT)) @ member)
        return torch.mm((gaps @ member.mT) * whole.b * (-2 * step), whole.a, out=out)

    return slope


def _masked(
    held: Sequence[Delta], correction: Tensor, scales: Sequence[float], limits: Sequence[float]
) -> Tensor:
    """``sum_i l_i (delta_i + D) * M_i``."""
    merged = torch.zeros_like(correction)
    for delta, scale, limit in zip(held, scales, limits, strict=True):
        for start, stop, rows in blocks(delta):
            size = rows.abs()
            kept = (size.float() >= limit) & (size > 0)
            merged[start:stop] += torch.where(kept, rows + correction[start:stop], 0.0) * scale
    return merged
