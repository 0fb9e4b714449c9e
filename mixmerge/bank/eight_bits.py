"""Factors in eight bits: whole numbers, and one scale for each rank.

Legend as in ``records``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from mixmerge.bank.records import Site

_MOST = 127
# Codes are used over this, so that they are at most 1 and exact in every type a model may have.
_UNIT = 128.0


def to_codes(site: Site) -> Site:
    """The site with int8 factors. Each rank of ``a`` and of ``b`` is divided by its largest size over 127 and rounded
    to even, so no number is off by more than half of that; both divisors go into ``scale``.

    Source: symmetric absmax quantisation, one scale for each vector; Dettmers et al., LLM.int8(), arXiv:2208.07339,
    section 2.1.
    """
    a, of_a = _codes(site.a, dim=0 if site.kind == "embedding" else 1)
    b, of_b = _codes(site.b, dim=1)
    return replace(site, a=a, b=b, scale=site.scale.float() * of_a * of_b)


def from_codes(site: Site) -> Site:
    """A site of int8 factors as one that is computed with: the codes over 128, exact in bfloat16."""
    a, b = (one.to(torch.bfloat16) / _UNIT for one in (site.a, site.b))
    return replace(site, a=a, b=b, scale=site.scale * _UNIT**2)


def _codes(factor: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Codes in the factor's shape, and ``(R,)`` what they are to be multiplied by."""
    step = factor.float().abs().amax(dim, keepdim=True) / _MOST
    codes = (factor.float() / step.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return codes.clamp(-_MOST, _MOST).to(torch.int8), step.flatten()
