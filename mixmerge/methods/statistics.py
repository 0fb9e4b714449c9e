"""Closed forms from statistics of calibration data: Fisher, RegMean, trimming by activations.

All take T tensors of one group in recipe order and ``statistics``: by name, one tensor for each of them, or None
where an expert has none for this tensor. A tensor that lacks one of any expert is merged without: averaged, and
trimmed by magnitude.

Shapes: S of a tensor; a matrix is m x n for role ``linear`` (outputs x inputs), n x m for ``transposed``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mixmerge.errors import Fault, MethodError
from mixmerge.methods import Role
from mixmerge.methods.average import linear
from mixmerge.methods.sparsify import RescaleBy, keep_count, largest, survivors
from mixmerge.methods.task_vectors import Agg, Number, consensus

Found = Mapping[str, Sequence[Tensor | None]] | None
_TINY = 1e-300


def _of_all(statistics: Found, name: str) -> list[Tensor] | None:
    """The statistic of every expert, or None if one lacks it."""
    found = list((statistics or {}).get(name) or ())
    given = [each for each in found if each is not None]
    return given if given and len(given) == len(found) else None


def fisher(
    experts: Sequence[Tensor],
    *,
    weight: Sequence[float] | None = None,
    normalize_fisher: bool = True,
    floor: float = 1e-6,
    relative_floor: bool = False,
    statistics: Found = None,
) -> Tensor:
    """Average of every entry by how much each expert's predictions depend on it: ``sum_t c_t F_t x_t / sum_t c_t F_t``.

    ``F_t`` is the mean over examples of the squared gradient of ``log p_t(y | x)``, the label drawn from the expert's
    own distribution, plus ``floor``; ``c_t`` is ``weight_t``, over the norm of the expert's whole Fisher if
    ``normalize_fisher``, scaled to sum 1.

    Source: Merging Models with Fisher-Weighted Averaging (arXiv:2111.09832), section 3; floor and norms as in the
    authors' and MergeLM's code.

    Args:
        experts: ``S`` each.
        weight: one number from 0 for each; None is 1.
        normalize_fisher: experts whose gradients are larger everywhere do not win for that.
        floor: added to every ``F_t``; where all are far below it, the norms alone decide: the expert with the
            smallest wins.
        relative_floor: the floor of each expert is that share of its norm, if ``normalize_fisher``: where all are
            far below, the result is the average.
        statistics: ``fisher``: ``S`` each; ``norm``: of the whole model's Fisher, a number each.

    Shapes:
        experts ``S`` each, result ``S``.

    Raises:
        MethodError: no weight is above 0, or a norm is 0 (an expert whose predictions depend on nothing).

    Deviations:
        released implementations (MergeLM, FusionBench) square the summed gradient of a batch, which keeps products of
        different examples and classes, so that the result depends on the batch size (32 there). Here gradients are
        squared example by example; ``squares: batches`` of a recipe, which is gathered, not seen here, is theirs.
    """
    coefficients = _shares(weight, len(experts))
    found = _of_all(statistics, "fisher")
    if found is None:
        return linear(experts, weight=coefficients)
    floors = [floor] * len(experts)
    if normalize_fisher:
        norms = [float(norm) for norm in _of_all(statistics, "norm") or [torch.ones(())] * len(experts)]
        if min(norms) <= 0:
            what = f"expert {norms.index(min(norms))} has a Fisher of zero everywhere"
            raise MethodError(Fault("fisher", what, run="Give it other data, or set normalize_fisher: false"))
        coefficients = [share / norm for share, norm in zip(coefficients, norms, strict=True)]
        if relative_floor:
            floors = [floor * norm for norm in norms]
    total = sum(coefficients)
    above, below = torch.zeros_like(experts[0]), torch.zeros_like(experts[0])
    for expert, each, coefficient, least in zip(experts, found, coefficients, floors, strict=True):
        share = (each.to(expert) + least) * (coefficient / total)
        above, below = above + share * expert, below + share
    if not bool((below > 0).all()):
        run = "Set floor above 0"
        raise MethodError(
            Fault("floor", "no expert has a Fisher above 0 for some entries, and floor is 0", run=run)
        )
    return above / below


def _shares(weight: Sequence[float] | None, count: int) -> list[float]:
    """The weights, scaled to sum 1."""
    given = [1.0] * count if weight is None else [float(value) for value in weight]
    if min(given) < 0 or sum(given) < _TINY:
        raise MethodError(Fault("weight", f"is {given}", "Numbers from 0, one of them above"))
    return [value / sum(given) for value in given]


def regmean(
    experts: Sequence[Tensor],
    *,
    weight: Sequence[float] | None = None,
    alpha: float = 0.9,
    ridge: float = 1e-6,
    role: Role = "other",
    statistics: Found = None,
) -> Tensor:
    """The matrix whose outputs are nearest to every expert's on that expert's own inputs, by least squares.

    ``W^T = (sum_t A_t)^-1 sum_t A_t W_t^T`` with ``A_t = w_t (alpha G_t + (1 - alpha) diag G_t + ridge g_t I)``,
    ``G_t = E[x x^T]`` over the expert's tokens and ``g_t`` the mean of its diagonal. Solved in float64. Tensors that
    are no matrix of a linear map are averaged.

    Source: Dataless Knowledge Fusion by Merging Weights of Language Models (arXiv:2212.09849), section 3.

    Args:
        experts: ``S`` each.
        weight: one number from 0 for each; None is 1.
        alpha: factor on what is off the diagonal of a Gram matrix, 0 to 1; 0 averages by the inputs' energy.
        ridge: 0 or more. It pulls towards the average of the experts, not towards 0.
        role: what the tensor is for.
        statistics: ``gram``: n x n each.

    Shapes:
        experts ``S`` each, result ``S``.

    Raises:
        MethodError: the sum is singular: alpha 1, ridge 0 and fewer tokens than inputs, or inputs that are always 0.

    Deviations:
        the paper has no ridge and sums over tokens, so an expert with more of them counts for more; here each counts
        by its weight. Released code inverts in the model's precision and counts padding.
    """
    shares = _shares(weight, len(experts))
    grams = _of_all(statistics, "gram")
    if grams is None or role not in ("linear", "transposed") or experts[0].ndim != 2:
        return linear(experts, weight=shares)
    width = grams[0].shape[0]
    left = torch.zeros((width, width), dtype=torch.float64, device=experts[0].device)
    right = None
    for expert, gram, share in zip(experts, grams, shares, strict=True):
        matrix = _scaled(gram.to(left), alpha, ridge) * share
        inputs_first = (expert.T if role == "linear" else expert).double()
        left += matrix
        right = matrix @ inputs_first if right is None else right + matrix @ inputs_first
    factor, failed = torch.linalg.cholesky_ex(left)
    # Rounding may leave a pivot a little above 0 that is 0 in truth: what is solved by it is noise.
    least = width * torch.finfo(left.dtype).eps * left.diagonal()
    if right is None or int(failed) or bool((factor.diagonal().square() <= least).any()):
        raise MethodError(
            Fault(
                "regmean",
                f"the sum of the Gram matrices ({width} inputs) is singular",
                "alpha below 1, ridge above 0, or more tokens than inputs",
                "Give more calibration data, or leave alpha and ridge at their defaults",
            )
        )
    solved = torch.cholesky_solve(right, factor)
    return (solved.T if role == "linear" else solved).to(experts[0].dtype).contiguous()


def _scaled(gram: Tensor, alpha: float, ridge: float) -> Tensor:
    """The Gram matrix with its off-diagonal entries scaled and its ridge: ``(n, n)`` to ``(n, n)``."""
    diagonal = gram.diagonal()
    scaled = alpha * gram
    scaled.diagonal().copy_(diagonal + ridge * diagonal.mean())
    return scaled


def activation_ties(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number] | None = None,
    density: Sequence[float] | None = None,
    elect: bool = True,
    normalize: bool = True,
    agg: Agg = None,
    rescale: bool = False,
    lambda_: Number = 1.0,
    role: Role = "other",
    statistics: Found = None,
) -> Tensor:
    """TIES that trims by what a delta does to the activations: score ``sqrt(E[x_j^2]) * |delta_ij|``.

    Of each delta of a linear map the entries with the largest scores are kept, ``E[x_j^2]`` being of its own expert's
    inputs; other tensors are trimmed by magnitude. Then TIES goes on, or with ``elect: false`` a weighted sum.

    Source: ours: the score is that of Wanda (A Simple and Effective Pruning Approach for Large Language Models,
    arXiv:2306.11695, section 3), there of a weight within its row; the rest is TIES-Merging (arXiv:2306.01708).

    Args:
        deltas, base: one tensor group.
        weight: one finite number per delta; None is 1.
        density: share kept of each delta, 0 to 1, exactly ``int(density * n)`` of a tensor, the first among equals.
        elect, normalize, agg, rescale, lambda_: as in ``mixmerge.methods.task_vectors``.
        role: what the tensor is for.
        statistics: ``second_moment``: n each.

    Shapes:
        deltas and base ``S`` each, result ``S``.
    """
    moments = _of_all(statistics, "second_moment") if role in ("linear", "transposed") else None
    shares = [1.0] * len(deltas) if density is None else density
    by: RescaleBy | None = "l1" if rescale else None
    kept = []
    for place, (delta, share) in enumerate(zip(deltas, shares, strict=True)):
        score = delta.detach()
        if moments is not None:
            scale = moments[place].to(delta).sqrt()
            score = score * (scale if role == "linear" else scale[:, None])
        kept.append(survivors(delta, largest(score, keep_count(share, delta.numel())), rescale_by=by))
    weights = [1.0] * len(deltas) if weight is None else weight
    return consensus(
        kept,
        base=base,
        weight=weights,
        elect=elect,
        normalize=normalize if agg is None else agg == "mean",
        lambda_=lambda_,
    )
