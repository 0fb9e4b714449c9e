"""PCB-Merging: an average of the deltas, entry by entry, whose weights say how much an entry matters to its expert and
how well the experts agree on it. Only the highest weights of each expert's whole delta count.

All is relative to whole deltas: their smallest and largest magnitudes, the share of weights that counts. ``PcbSketch``
finds those exactly in five passes, so that nothing of the size of the model is held or sorted.

Shapes: deltas, base and result ``S``; T experts; d entries of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixmerge.errors import Fault, MethodError
from mixmerge.methods.average import scalar
from mixmerge.methods.quantiles import BINS, Counts, blocks, locate, lower_counts, upper_counts, values
from mixmerge.methods.sketch import Group, Totals
from mixmerge.methods.sums import total

Inter = Literal["prod", "norm", "pairwise", "softmax"]
TINY = 1e-12  # a sum of weights below this does not divide


@dataclass(frozen=True)
class Balance:
    """What the passes over the model found.

    Args:
        counts: of upper halves, after the first pass of two.
        low, high: of each row, the least and largest value that counts: rows are the experts' magnitudes, or for
            ``softmax`` the products of each pair of experts, in the order of ``pairs``.
        means: ``softmax``: of each pair, the mean of its exponentials; those of the experts with themselves are at
            the places of their pairs, with the factor T in the exponent, after the T (T + 1) / 2 of the pairs.
        cut, top: of each expert, the least score that counts and the largest.
    """

    counts: Counts = field(default_factory=lambda: np.zeros((0, BINS), np.int64))
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    cut: tuple[float, ...] = ()
    top: tuple[float, ...] = ()


def pairs(count: int) -> list[tuple[int, int]]:
    """Each two of ``count`` experts once, and each with itself."""
    return [(one, other) for one in range(count) for other in range(one, count)]


def minmax(raw: Tensor, low: float, high: float) -> Tensor:
    """``S`` values from [low, high] to [0, 1]; where low is high, 1 for those above 0."""
    spread = high - low
    return ((raw - low) / spread).clamp(0, 1) if spread > 0 else (raw > 0).to(raw.dtype)


def pcb(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[float],
    density: Sequence[float],
    inter: Inter = "norm",
    clamp: float = 0.01,
    sketch: Balance | None = None,
) -> Tensor:
    """``base + sum_t b_t * w_t * delta_t / sum_t b_t``, with weights ``b_t`` for every entry.

    ``b_t = intra_t * inter_t`` over expert t's whole delta. In the authors' code (``inter`` prod, norm, pairwise):
    magnitudes are clamped to their quantiles ``clamp`` and ``1 - clamp``, also those that are averaged, but not those
    ``inter_t`` multiplies, and ``m_t`` is them on a scale from 0 to 1;
    ``intra_t = exp(T * m_t ** 2)``; the scores below their quantile ``1 - density`` are raised to it, and the result is
    put on a scale from 0 to 1: so they count 0, as do entries the other experts oppose. With s_t = sign * m_t:

    - ``prod``: ``inter_t = tanh(delta_t * sum_j delta_j)`` (the language code, and pcb-merging.py with its clamp 1e-4);
    - ``norm``: ``tanh(delta_t * sum_j s_j)`` (vision/pcb.py);
    - ``pairwise``: ``sum_j tanh(s_t * s_j)`` (vision/pcb_ES.py).

    ``softmax`` is the formula of the paper: ``intra_t = softmax(T * N(delta_t ** 2))`` and ``inter_t = sum_j
    softmax(N(delta_t * delta_j))`` over the entries of the whole model, N to a scale from 0 to 1; the scores from
    their quantile ``1 - density`` on count as they are, the others 0; nothing is clamped.

    Source: PCB-Merging (arXiv:2410.02396), section 3, and its authors' code. Defaults of the recipe are those of
    vision/pcb.py: ``norm``, clamp 0.01, density 0.05, weight 1.2.

    Args:
        deltas, base: one tensor group. ``prod`` and ``norm`` ask for each delta twice and hold one; ``pairwise`` and
            ``softmax`` hold all T of a tensor.
        weight: the paper's lambda, one finite number per delta; around 1 (0.8 to 2.2 in its sweeps).
        density: share of each whole delta that counts, 0 to 1; the paper's r. 0 gives the base. Found by the sketch.
        inter: which of the published forms.
        clamp: share of magnitudes at either end, 0 to 0.5. Found by the sketch.
        sketch: what ``PcbSketch`` found in the whole model.

    Raises:
        MethodError: no sketch, or another ``inter``.

    Deviations:
        where all magnitudes or all scores that count are one value, the published code divides 0 by 0. Here they are
        1 on their scale if above 0, else 0: an expert that is the base takes no part, and the largest score always
        counts. What N is, the paper does not say: it is what the code has.
    """
    if inter not in ("prod", "norm", "pairwise", "softmax"):
        raise MethodError(Fault("inter", f"is {inter!r}", "Known: norm, pairwise, prod, softmax"))
    if sketch is None:
        raise MethodError(Fault("sketch", "pcb needs figures of whole deltas", run="use merge_state_dicts"))
    if not base.numel():
        return base.clone()
    above, below = torch.zeros_like(base).reshape(-1), torch.zeros_like(base).reshape(-1)
    for at, start, delta, score in _scored(deltas, base, inter, sketch):
        part = slice(start, start + delta.numel())
        if inter == "softmax":
            share = torch.where(score >= sketch.cut[at], score, torch.zeros_like(score))
            kept = delta
        else:
            share = _share(score, sketch.cut[at], sketch.top[at])
            kept = torch.sign(delta) * delta.abs().clamp(sketch.low[at], sketch.high[at])
        share = share if density[at] > 0 else torch.zeros_like(share)
        above[part] += kept * scalar(weight[at], base).to(base.dtype) * share
        below[part] += share
    return base + (above / below.clamp(min=TINY)).reshape(base.shape)


def _share(score: Tensor, cut: float, top: float) -> Tensor:
    if top > cut:
        return minmax(score, cut, top)
    return ((score >= cut) & (score > 0)).to(score.dtype)


def _scored(
    deltas: Sequence[Tensor], like: Tensor, inter: Inter, sketch: Balance
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Expert, first entry, its delta and its scores there, by blocks of one tensor: ``(n,)`` each."""
    held = list(deltas) if inter in ("pairwise", "softmax") else []
    beside = torch.zeros_like(like)
    if not held:
        for at in range(len(deltas)):
            delta = deltas[at]
            beside = beside + (delta if inter == "prod" else _signed(delta, sketch, at))
    for at in range(len(deltas)):
        start = 0
        for block, *others in blocks(held[at] if held else deltas[at], *(held or [beside])):
            if inter == "softmax":
                score = _softmax(block, others, at, sketch)
            else:
                score = _competed(block, others, at, inter, sketch, len(deltas))
            # The cut is a float32: a float64 just above it must not count where the cut itself does not.
            yield at, start, block, score.float().to(score.dtype)
            start += block.numel()


def _signed(delta: Tensor, sketch: Balance, at: int) -> Tensor:
    return torch.sign(delta) * minmax(delta.abs(), sketch.low[at], sketch.high[at])


def _competed(
    delta: Tensor, others: Sequence[Tensor], at: int, inter: Inter, sketch: Balance, count: int
) -> Tensor:
    """The scores of the authors' code: ``(n,)`` each; others are all experts' deltas, or one sum of them."""
    signed = _signed(delta, sketch, at)
    if inter == "pairwise":
        agreed = torch.zeros_like(delta)
        for number, other in enumerate(others):
            agreed = agreed + torch.tanh(signed * _signed(other, sketch, number))
    else:
        agreed = torch.tanh(delta * others[0])
    return torch.exp(count * minmax(delta.abs(), sketch.low[at], sketch.high[at]) ** 2) * agreed


def _softmax(delta: Tensor, others: Sequence[Tensor], at: int, sketch: Balance) -> Tensor:
    """The scores of the paper, times d squared, which cancels in the end: ``(n,)`` each."""
    order = {pair: number for number, pair in enumerate(pairs(len(others)))}
    own, agreed = order[at, at], torch.zeros_like(delta)
    if sketch.high[own] == 0:
        return agreed  # the base: all its entries would score alike, and every one of them would count
    for number, other in enumerate(others):
        pair = order[min(at, number), max(at, number)]
        agreed = (
            agreed
            + torch.exp(minmax(delta * other, sketch.low[pair], sketch.high[pair])) / sketch.means[pair]
        )
    intra = torch.exp(len(others) * minmax(delta * delta, sketch.low[own], sketch.high[own]))
    return intra / sketch.means[len(order) + at] * agreed


class PcbSketch:
    """Five passes: two for the range of magnitudes, one for the softmax's sums, two for the scores that count.

    The third looks at the experts for ``inter: softmax`` only. Memory: half a megabyte for each expert, for ``softmax``
    for each pair of experts, twice that in the second pass of two.
    """

    def passes(self) -> int:
        return 5

    def observe(self, number: int, group: Group, state: Any) -> Totals:
        inter, base = group.parameters["inter"], group.base
        if base is None or not base.numel():
            return {}
        if number == 2:
            return _sums(group, state) if inter == "softmax" else {}
        if number == 0:
            return {"upper": np.stack([upper_counts(row) for row in _rows(group)])}
        if number == 3:
            upper = np.zeros((len(group.tensors), BINS), np.int64)
            for at, _, _, score in _scored(group.tensors, base, inter, state):
                upper[at] += upper_counts(score)
            return {"upper": upper}
        ranks = _clamp_ranks(group, state.counts) if number == 1 else _score_ranks(group, state.counts)
        sought = locate(state.counts, _wanted(ranks))
        lower = np.zeros((len(sought), BINS), np.int64)
        if number == 1:
            for at, row in enumerate(_rows(group)):
                lower[2 * at : 2 * at + 2] = lower_counts(row, sought[2 * at : 2 * at + 2])
        else:
            for at, _, _, score in _scored(group.tensors, base, inter, state):
                lower[2 * at : 2 * at + 2] += lower_counts(score, sought[2 * at : 2 * at + 2])
        return {"lower": lower, "ranks": np.array(ranks), "groups": np.array(1)}

    def settle(self, number: int, totals: Totals, state: Any) -> Balance:
        before = Balance() if state is None else state
        if not totals:
            return before
        if "upper" in totals:
            return replace(before, counts=totals["upper"])
        if "sums" in totals:
            return replace(before, means=tuple((totals["sums"] / totals["size"]).tolist()))
        # Every tensor knows the ranks, from the recipe; their sums over the tensors bring them here.
        ranks = (totals["ranks"] // totals["groups"]).tolist()
        found = values(totals["lower"], locate(before.counts, _wanted(ranks)))
        if number == 1:
            return replace(before, low=found[::2], high=found[1::2])
        return replace(before, cut=found[::2], top=found[1::2])


def _rows(group: Group) -> Iterator[Tensor]:
    """What the first two passes look at: the magnitudes, or the products of each pair: ``S`` each."""
    if group.parameters["inter"] == "softmax":
        held = list(group.tensors)
        for one, other in pairs(len(held)):
            yield held[one] * held[other]
    else:
        for at in range(len(group.tensors)):
            yield group.tensors[at].abs()


def _sums(group: Group, state: Balance) -> Totals:
    """The exponentials of a tensor's pairs, then of each expert with itself, added up."""
    held = list(group.tensors)
    sums: NDArray[np.float64] = np.zeros(len(pairs(len(held))) + len(held))
    for at, (one, other) in enumerate(pairs(len(held))):
        products = minmax(held[one] * held[other], state.low[at], state.high[at])
        sums[at] = total(torch.exp(products))
        if one == other:
            sums[len(pairs(len(held))) + one] = total(torch.exp(len(held) * products))
    return {"sums": sums, "size": np.array(held[0].numel())}


def _wanted(ranks: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    return [(row, int(rank)) for row, both in enumerate(ranks) for rank in both]


def _clamp_ranks(group: Group, counts: Counts) -> list[tuple[int, int]]:
    """Of every row, the ranks of the smallest and the largest value that is not clamped."""
    share = 0.0 if group.parameters["inter"] == "softmax" else group.parameters["clamp"]
    found = []
    for size in counts.sum(axis=1).tolist():
        low = min(int(size * share) + 1, size)
        found.append((low, max(int(size * (1 - share)), low)))
    return found


def _score_ranks(group: Group, counts: Counts) -> list[tuple[int, int]]:
    """Of every expert, the ranks of the least score that counts and of the largest."""
    sizes = counts.sum(axis=1).tolist()
    return [
        (min(math.floor(size * (1 - share)) + 1, size), size)
        for size, share in zip(sizes, group.parameters["density"], strict=True)
    ]
