"""From scores to weights, and the scores that several gates share.

Legend as in ``gate``; k experts that a token gets something of. All of it is in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixmerge.bank.mix import How, Mix

EPS = 1e-5


def chosen(
    scores: Tensor,
    k: int | None,
    *,
    temperature: float = 1.0,
    absent: Tensor | None = None,
    how: How = "outputs",
) -> Mix:
    """Softmax over the best k: the same as softmax over all of them, of which the best k are renormalised.

    Args:
        scores: ``(..., E)``.
        k: 1 or more; all experts if there are no more than k, or None.
        temperature: above 0; scores are divided by it.
        absent: ``(E,)``, True for experts that change nothing there; they get the weight 0.
        how: as in ``Mix``.
    """
    if absent is not None:
        scores = scores.masked_fill(absent, -torch.inf)
    if k is None or k >= scores.shape[-1]:
        return Mix(torch.softmax(scores / temperature, -1), how=how)
    values, entries = scores.topk(k, -1)
    return Mix(torch.softmax(values / temperature, -1), entries, how=how)


def dots(u: Tensor, vectors: Tensor) -> Tensor:
    """``u . v_e``: ``(..., d)`` and ``(E, d)`` to ``(..., E)``."""
    return u.float() @ vectors.T


def standardised(vectors: Tensor) -> Tensor:
    """Each vector with mean 0 and variance 1 over its entries: a layer norm without gain and bias."""
    return torch.nn.functional.layer_norm(vectors.float(), vectors.shape[-1:], eps=EPS)


def standard_scores(u: Tensor, vectors: Tensor) -> Tensor:
    """``standardised(u) . v_e / sqrt(d)``.

    Args:
        u: ``(..., d)``.
        vectors: ``(E, d)``, standardised.

    Returns:
        ``(..., E)``.
    """
    scores: Tensor = dots(standardised(u), vectors) * u.shape[-1] ** -0.5
    return scores
