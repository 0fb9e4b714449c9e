"""Methods whose coefficients are learned from data: how they mix once the coefficients are there.

All take the T deltas (expert - base) of one tensor, the base, and for each expert a coefficient: a number, or a tensor
of the shape of the base where chunks of the tensor have their own. Shapes: deltas, base and result ``S``. What learns
the coefficients is ``mixmerge.calibrate``; what of it is whose, and the published defaults, is in the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.methods.sparsify import Scope, largest_entries
from mixmerge.methods.task_vectors import Number, consensus


def adamerging(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    normalize: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """``base + sum_t w_t * delta_t``, the coefficients learned by minimising the entropy of predictions.

    Source: AdaMerging (arXiv:2310.02575), task-wise and layer-wise.

    Args:
        deltas, base: one tensor group.
        weight: of each delta.
        normalize, lambda_: as ``task_arithmetic``; the engine leaves them as they are.

    Deviations:
        the paper learns on the unlabeled test inputs; here on the calibration rows, ``transductive`` if they are the
        same. A coefficient that leaves [0, 1] is put back after the step; the released code clamps it in the
        forward pass, after which it has no gradient any more (``clamp: dead``). Language models without a classifier:
        the entropy is over a row's choices, by their mean log-likelihood per token.
    """
    return consensus(deltas, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)


def adamerging_plus(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    density: Sequence[float],
    scope: Scope = "model",
    cuts: Sequence[tuple[float, int]] | None = None,
    normalize: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """``adamerging`` of deltas without their small entries and without those that most experts oppose.

    Source: AdaMerging (arXiv:2310.02575), AdaMerging++; the processing is that of TIES-Merging (arXiv:2306.01708).

    Args:
        deltas, base, weight, normalize, lambda_: as ``adamerging``.
        density: share of each delta that is kept, 0 to 1; 0.2 in the paper.
        scope: where the largest are looked for: the whole ``model`` (paper) or each ``tensor``.
        cuts: with ``scope="model"``, per delta its threshold, as ``ties`` takes them.

    Raises:
        MethodError: ``scope="model"`` without cuts.
    """
    kept = agreeing(list(deltas), density=density, scope=scope, cuts=cuts)
    return consensus(kept, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)


def agreeing(
    deltas: Sequence[Tensor],
    *,
    density: Sequence[float],
    scope: Scope = "model",
    cuts: Sequence[tuple[float, int]] | None = None,
) -> list[Tensor]:
    """Deltas with their largest entries only, and of these those that have the sign of the sum of all experts'.

    An entry whose sum is 0 has the sign +, as in ``ties``. Nothing is averaged.
    """
    masks = largest_entries(deltas, density=density, scope=scope, cuts=cuts)
    return elected([torch.where(mask, delta, 0.0) for delta, mask in zip(deltas, masks, strict=True)])


def elected(trimmed: Sequence[Tensor]) -> list[Tensor]:
    """Of trimmed deltas, the entries that have the sign of their sum over the experts."""
    total = torch.zeros_like(trimmed[0])
    for delta in trimmed:
        total = total + delta
    positive = total >= 0
    return [torch.where(torch.where(positive, delta > 0, delta < 0), delta, 0.0) for delta in trimmed]


def adamerging_labels(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    normalize: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """``base + sum_t w_t * delta_t``, the coefficients learned by cross-entropy on rows with answers or labels.

    Source: AdaMerging (arXiv:2310.02575) for the coefficients; all else is FusionBench's variant for Llama
        (github.com/tanganke/fusion_bench, ``LayerWiseAdaMergingForLlamaSFT``).

    Args: as ``adamerging``. By default they are a softmax over the experts, so a share of one for each. Attention, and
        the first 30 % of the layers, are the mean of the experts; what is in no layer is the base's.

    Deviations:
        the model is in evaluation mode while it is learned (released code: with dropout; Llama has none). A
        learning rate of 1e-4 is that of the released default; a later configuration has 1e-3. With ``transform:
        none`` a coefficient is learned itself. Classifiers learn from the labels of rows, each by its own head. The
        released ``sparsity_ratio``, off by default, is not there: docs/parity.md says what does it.
    """
    return consensus(deltas, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)


def expert_merging(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    normalize: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """``base + sum_t w_t * delta_t``, the coefficients learned so that the merge answers as each expert does.

    Source: Expert Merging (arXiv:2509.25712), and the released code (github.com/Littleor/ExpertMerging) for defaults.

    Args: as ``adamerging``; of tensors with ``chunks`` above 1 a coefficient for each, a contiguous slice of the
        row-major tensor.

    Deviations:
        the model is in evaluation mode while it is learned (released code: with dropout). The loss counts all
        positions, prompts included, as in the released code. KL (paper) and soft cross-entropy (released code) have
        the same gradient; hidden losses as sum (paper) or mean (released code) are ``hidden_loss``.
    """
    return consensus(deltas, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)


def expert_merging_plus(
    deltas: Sequence[Tensor],
    *,
    base: Tensor,
    weight: Sequence[Number],
    normalize: bool = False,
    lambda_: Number = 1.0,
) -> Tensor:
    """``expert_merging`` in two runs: tensors that mattered in the first get more coefficients in the second.

    Source: Expert Merging++ (arXiv:2509.25712).

    Args: as ``adamerging``; a coefficient per chunk, a contiguous slice of the row-major tensor.

    Deviations:
        as ``expert_merging``. The exponent on the importance, kappa, is not published: it is a parameter, 1 by
        default. Where the share of a tensor comes to no chunk it keeps one coefficient, unless ``least_chunks: 0``
        freezes it at its start.
    """
    return consensus(deltas, base=base, weight=weight, elect=False, normalize=normalize, lambda_=lambda_)
