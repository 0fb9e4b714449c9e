"""Shifts of a small reference's log-probabilities, and a base's logits under them.

Legend: N rows of logits, V entries of the vocabulary, T experts. All maths is float32, or float64 if that is given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shift(expert: Tensor, reference: Tensor, *, clip: float | None = None) -> Tensor:
    """``(N, V)``: log Q_t - log Q, what tuning changed in the small model.

    Source: Liu et al., Tuning Language Models by Proxy (COLM 2024), section 2; clipping is ours, for where Q is tiny
    and the difference is of two numbers that nothing was learned of.

    Args:
        expert, reference: ``(N, V)`` logits of the small expert and of the small model it was tuned from.
        clip: nats, above 0: shifts are no larger, in either direction; None: they are as they are.

    Deviations: of log-probabilities, not logits: after a softmax that is the same, and a clip has a meaning. Where
    either is not finite the shift is 0: nothing is known there.
    """
    return shifts_of([expert], reference, clip=clip)[0]


def shifts_of(experts: Sequence[Tensor], reference: Tensor, *, clip: float | None = None) -> list[Tensor]:
    """``shift`` of each expert from one reference."""
    known = torch.log_softmax(reference, dim=-1)
    found = []
    for one in experts:
        change = torch.log_softmax(one, dim=-1).sub_(known).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        found.append(change if clip is None else change.clamp_(-clip, clip))
    return found


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """``(N, V)`` logits, minus infinity outside the likeliest tokens that have ``top_p`` of the probability together.

    Source: Liu et al., DExperts (ACL 2021), section 2.1: the base is cut before experts shift it.

    Args:
        logits: ``(N, V)``.
        top_p: above 0; from 1 on nothing is cut. At least one token stays; of equal ones the first.
    """
    if top_p >= 1:
        return logits
    ordered, tokens = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    beyond = ordered.cumsum(dim=-1) - ordered >= top_p
    beyond[:, 0] = False
    outside = torch.zeros_like(beyond).scatter_(1, tokens, beyond)
    return logits.masked_fill(outside, -torch.inf)


def fused(base: Tensor, shifts: Sequence[Tensor], alphas: Tensor) -> Tensor:
    """``(N, V)``: M_L + sum_t alpha_t (log Q_t - log Q).

    Source: Liu et al., Tuning Language Models by Proxy, equation 1, for one expert; Liu et al., DExperts, equation 1;
    Fan et al., On Giant's Shoulders: Effortless Weak to Strong by Dynamic Logits Fusion (NeurIPS 2024), equation 3.

    Args:
        base: ``(N, V)`` logits of the large model.
        shifts: T of ``(N, V)``.
        alphas: ``(N, T)``; where a row's are all 0 it is the base's, bit for bit.
    """
    made = base.clone()
    for at, one in enumerate(shifts):
        made.addcmul_(one, alphas[:, at : at + 1].to(one.dtype))
    return made


def divergences(
    experts: Sequence[Tensor], reference: Tensor, changes: Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """KL(Q_t || Q) and KL(Q || Q_t), both ``(N, T)``, of ``(N, V)`` logits.

    Tokens where either is not finite are left out, as ``shift`` leaves them.

    Args:
        experts, reference: as of ``shifts_of``.
        changes: what ``shifts_of`` gives without a clip, where it is known.
    """
    known = shifts_of(experts, reference) if changes is None else changes
    plain = torch.softmax(reference, dim=-1)
    forward, backward = [], []
    for one, change in zip(experts, known, strict=True):
        forward.append(torch.softmax(one, dim=-1).mul_(change).sum(dim=-1))
        backward.append((plain * change).sum(dim=-1).neg_())
    return torch.stack(forward, dim=1).clamp_(min=0), torch.stack(backward, dim=1).clamp_(min=0)
