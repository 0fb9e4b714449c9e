"""TALL masks: which entries of a multi-task vector an expert needs, and which of them several experts need.

``tall`` makes the model of one task, ``tall_masks`` what all tasks' models are made of; ``consensus`` makes one model
for all tasks. Shapes: deltas, base and result ``S``; T experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mixmerge.errors import Fault, MethodError
from mixmerge.methods.average import scalar
from mixmerge.methods.emr import Masked, expert_at
from mixmerge.methods.quantiles import BINS, Counts, locate, lower_counts, upper_counts, values
from mixmerge.methods.records import ALL
from mixmerge.methods.sketch import Group, Totals

Multi = Literal["sum", "ties"]


@dataclass(frozen=True)
class Trim:
    """What TIES must know of whole deltas.

    Args:
        counts: ``(T, 65536)``: of the magnitudes' upper halves, between the first pass and the second.
        thresholds: of each expert, the least magnitude that is kept.
        majority: the sign of entries whose kept deltas sum to 0: 1, -1, or 0 for a tie.
    """

    counts: Counts = field(default_factory=lambda: np.zeros((0, BINS), np.int64))
    thresholds: tuple[float, ...] = ()
    majority: int = 0


def multi_task(deltas: Sequence[Tensor], like: Tensor, *, multi: Multi, trim: Trim | None) -> Tensor:
    """The experts' deltas as one: ``S``.

    Args:
        deltas: ``S`` each; each is asked for once, for ``ties`` twice.
        like: ``S``, for shape, dtype and device.
        multi: ``sum``; or ``ties``: trim each whole delta, elect signs, add up those that agree.
        trim: for ``ties``.

    Raises:
        MethodError: another ``multi``, or ``ties`` without ``trim``.
    """
    if multi not in ("sum", "ties"):
        raise MethodError(Fault("multi", f"is {multi!r}", "Known: sum, ties"))
    added = torch.zeros_like(like)
    if multi == "sum":
        for delta in deltas:
            added = added + delta
        return added
    if trim is None:
        what = "multi: ties needs the thresholds of whole deltas"
        raise MethodError(Fault("sketch", what, run="use merge_state_dicts"))
    sign = torch.sign(_trimmed_sum(deltas, like, trim))
    sign = torch.where(sign == 0, float(trim.majority), sign)
    for delta in _trimmed(deltas, trim):
        # A tie of the majority elects negative entries, as the released code does.
        agrees = torch.where(sign > 0, delta > 0, delta < 0)
        added = added + torch.where(agrees, delta, torch.zeros_like(like))
    return added


def _trimmed(deltas: Sequence[Tensor], trim: Trim) -> Iterator[Tensor]:
    for at, threshold in enumerate(trim.thresholds):
        delta = deltas[at]
        yield torch.where(delta.detach().abs().float() >= threshold, delta, torch.zeros_like(delta))


def _trimmed_sum(deltas: Sequence[Tensor], like: Tensor, trim: Trim) -> Tensor:
    added = torch.zeros_like(like)
    for delta in _trimmed(deltas, trim):
        added = added + delta
    return added


def needed(delta: Tensor, together: Tensor, mask_lambda: float) -> Tensor:
    """TALL mask: where the expert's delta is larger than ``mask_lambda`` times what the others add to it.

    Source: Localizing Task Information (arXiv:2405.07813), TALL masks.

    Args:
        delta, together: ``S`` each, of the expert and of all.
        mask_lambda: 0 and more; the larger, the fewer entries.
    """
    return delta.detach().abs() > (together - delta).detach().abs() * mask_lambda


def tall(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    task: float,
    mask_lambda: Sequence[float] | None = None,
    multi: Multi = "sum",
    density: Sequence[float] | None = None,
    sketch: Trim | None = None,
    lambda_: float | Tensor = 1.0,
) -> Tensor:
    """The model of one task: ``base + lambda * M_t * together``, with ``M_t = |delta_t| > l_t |together - delta_t|``.

    With one expert it is that expert.

    Source: Localizing Task Information (arXiv:2405.07813), TALL masks.

    Args:
        deltas, base: one tensor group.
        task: position of the expert the model is for, from 0.
        mask_lambda: l_t, one per delta, 0 and more; 0.6 if not given. The authors pick each on validation data from
            0.2, 0.3, 0.4, 0.5 and 0.6.
        multi: how ``together`` is made: ``sum``, or ``ties`` (the sum of those entries, of the largest of each whole
            delta, that have the elected sign).
        density: share of each whole delta that ``ties`` keeps, 0.2 in the paper; found by the sketch.
        sketch: thresholds of whole deltas, for ``multi: ties``.
        lambda_: factor on what is kept; 1 in the paper.

    Raises:
        MethodError: ``task`` is no position of an expert; ``multi: ties`` without sketch.
    """
    at = expert_at(task, len(deltas))
    together = multi_task(deltas, base, multi=multi, trim=sketch)
    keep = needed(deltas[at], together, 0.6 if mask_lambda is None else mask_lambda[at])
    kept = torch.where(keep, together, torch.zeros_like(together))
    return base + scalar(lambda_, base).to(base.dtype) * kept


def tall_masks(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    task: str = ALL,
    mask_lambda: Sequence[float] | None = None,
    multi: Multi = "sum",
    density: Sequence[float] | None = None,
    sketch: Trim | None = None,
    lambda_: float | Tensor = 1.0,
) -> Masked:
    """What ``tall`` of every task is made of, to the bit.

    Source: as ``tall``.

    Args:
        deltas, base: one tensor group.
        task: all of them.
        mask_lambda, multi, density, sketch, lambda_: as in ``tall``.

    Raises:
        MethodError: ``multi: ties`` without sketch.
    """
    together = multi_task(deltas, base, multi=multi, trim=sketch)

    def keep(at: int) -> Tensor:
        return needed(deltas[at], together, 0.6 if mask_lambda is None else mask_lambda[at])

    return Masked(together, keep, scalar(lambda_, base).to(base.dtype).expand(len(deltas)))


def consensus(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    mask_lambda: Sequence[float] | None = None,
    least: float = 2,
    multi: Multi = "sum",
    density: Sequence[float] | None = None,
    sketch: Trim | None = None,
    lambda_: float | Tensor = 0.3,
) -> Tensor:
    """``base + lambda * together`` where at least ``least`` experts need the entry, by their TALL masks; else base.

    What no expert needs (catastrophic) or one alone (selfish) is left out.

    Source: Localizing Task Information (arXiv:2405.07813), Consensus Merging.

    Args:
        deltas, base: one tensor group, two experts or more.
        mask_lambda, multi, density, sketch: as in ``tall``.
        least: 2 in the paper. 0 keeps all, more than there are experts keeps none.
        lambda_: factor on the merged delta. The authors pick it on validation data from 0.1 to 1; 0.3 is what is
            usual for sums of deltas.

    Raises:
        MethodError: ``multi: ties`` without sketch.
    """
    together = multi_task(deltas, base, multi=multi, trim=sketch)
    count = torch.zeros_like(base)
    for at in range(len(deltas)):
        count = count + needed(deltas[at], together, 0.6 if mask_lambda is None else mask_lambda[at])
    kept = torch.where(count >= least, together, torch.zeros_like(together))
    return base + scalar(lambda_, base).to(base.dtype) * kept


class TrimSketch:
    """Three passes for ``multi: ties``, none of which looks at the experts for ``multi: sum``.

    Two find the threshold of each whole delta, the third the sign that most elected entries have.
    """

    def passes(self) -> int:
        return 3

    def observe(self, number: int, group: Group, state: Any) -> Totals:
        deltas, base, parameters = group.tensors, group.base, group.parameters
        if parameters["multi"] != "ties" or base is None or not base.numel():
            return {}
        if number == 0:
            return {"counts": np.stack([upper_counts(deltas[at].abs()) for at in range(len(deltas))])}
        if number == 1:
            sizes = state.counts.sum(axis=1).tolist()
            ranks = [_rank(share, size) for share, size in zip(parameters["density"], sizes, strict=True)]
            sought = locate(state.counts, list(enumerate(ranks)))
            lower = [lower_counts(deltas[at].abs(), sought[at : at + 1]) for at in range(len(deltas))]
            return {"lower": np.concatenate(lower), "ranks": np.array(ranks), "groups": np.array(1)}
        signs = torch.sign(_trimmed_sum(deltas, base, state))
        return {"majority": np.array(int(signs.sum(dtype=torch.int64)))}

    def settle(self, number: int, totals: Totals, state: Any) -> Any:
        if not totals:
            return state
        if number == 0:
            return Trim(counts=totals["counts"])
        if number == 1:
            # Every tensor knows the ranks, from the recipe; their sums over the tensors bring them here.
            ranks = (totals["ranks"] // totals["groups"]).tolist()
            return Trim(thresholds=values(totals["lower"], locate(state.counts, list(enumerate(ranks)))))
        return Trim(thresholds=state.thresholds, majority=int(np.sign(totals["majority"])))


def _rank(density: float, size: int) -> int:
    """The rank of the least magnitude that is kept, of 0 the largest's; its equals are too, as in the released code."""
    return max(size - int(density * size), 1)
