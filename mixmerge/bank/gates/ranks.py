"""Gates that weigh single ranks: SMoRA, FlyLoRA, and rank-1 experts that say themselves how relevant they are.

Their factors, and their routers if they have any, are trained elsewhere; here they are at work. In training their
balancing biases move, here never. A gate chooses among all ranks of a site: what is published is one adapter in a bank.

Legend as in ``gate``; R ranks of a site.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import dots
from mixmerge.bank.gates.places import PerSite, Places, Said, SiteGate, SiteOptions
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank


class SmoraOptions(SiteOptions):
    """Of SMoRA.

    Args:
        active: k, ranks of a token: 8 of 64.
        gain: multiplies the weights. By default what makes the published scale, alpha / k, of a bank's, which PEFT's
            adapters have as alpha / rank: at each site rank / k, of the rank of each adapter; say 1 where the scale is
            alpha / k already, sqrt(rank) / k of rsLoRA.
    """

    active: int = Field(default=8, ge=1)
    gain: float | None = Field(default=None, gt=0)


class FlyloraOptions(SiteOptions):
    """Of FlyLoRA.

    Args:
        active: k, ranks of a token: 8 of 32.
        by: ``magnitude``, of ``|A u + d|``, as the release's own module; ``signed``, of ``A u + d``, as its fork of
            PEFT.
    """

    active: int = Field(default=8, ge=1)
    by: Literal["magnitude", "signed"] = "magnitude"


class SelfRankOptions(SiteOptions):
    """Of rank-1 experts.

    Args:
        active: k, ranks of a token.
        values: what those get: ``mask``, 1 each; ``softmax``, k times the softmax of their relevance.
        temperature: of that softmax.
    """

    active: int = Field(default=8, ge=1)
    values: Literal["mask", "softmax"] = "mask"
    temperature: float = Field(default=1.0, gt=0)


def strongest(relevance: Tensor, k: int) -> Tensor:
    """1 for the k largest of ``(..., R)``, 0 for the others."""
    best = relevance.topk(min(k, relevance.shape[-1]), -1).indices
    return torch.zeros_like(relevance).scatter(-1, best, 1.0)


class RankGate(SiteGate[Said]):
    """Weights of ranks at linear sites; all else, biases too, is weighed by expert, as ``others`` says."""

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        return super().mix(site, u, run) if site in self.places.widths else self.elsewhere(u)


class SmoraGate(RankGate[SmoraOptions]):
    """``g_i = k p_i / sum of p over the k largest``, ``p = sigmoid(W u) + b``; 0 for the other ranks.

    The change is ``(alpha / k) B (g * A u)``: see ``gain``.

    Source: SMoRA (2026), its release: b is part of the values, not of the choice alone.

    Given: ``SITE.router`` of ``(R, d)``; ``SITE.bias`` of ``(R,)``, 0 if it is not there.
    """

    kind = "smora"
    options = SmoraOptions
    fitter = "mixmerge.bank.fitting_closed:given_ranks"
    wants = ("given",)

    def __init__(self, places: Places, options: SmoraOptions) -> None:
        super().__init__(places, options)
        totals = {site: sum(ranks) for site, ranks in places.ranks.items()}
        self.router = PerSite({site: torch.zeros(totals[site], places.widths[site]) for site in totals})
        self.bias = PerSite({site: torch.zeros(total) for site, total in totals.items()})
        gains = {site: _gains(ranks, options) for site, ranks in places.ranks.items()}
        self._gains = PerSite(gains, saved=False)

    def decide(self, site: str, u: Tensor, run: Run) -> Mix:
        p = torch.sigmoid(dots(u, self.router[site])) + self.bias[site]
        kept = p * strongest(p, self.said.active)
        total = min(self.said.active, p.shape[-1])
        return Mix(kept * (total / kept.sum(-1, keepdim=True)) * self._gains[site], by="rank")


def _gains(ranks: tuple[int, ...], options: SmoraOptions) -> Tensor:
    """``(R,)``: what a rank's weight is multiplied with."""
    own = torch.tensor([float(rank) for rank in ranks for _ in range(rank)])
    if options.gain is not None:
        return torch.full_like(own, options.gain)
    return own / min(options.active, max(1, len(own)))


class _OwnFactors(RankGate[Said]):
    """Reads the experts' A at every site, which is the bank's and not saved again."""

    def bind(self, bank: Bank) -> None:
        self._inner = {name: bank.sites[name].a for name in self.places.widths}

    def _inside(self, site: str, u: Tensor) -> Tensor:
        """``A u``: ``(..., R)``."""
        return dots(u, self._inner[site].float())


class FlyloraGate(_OwnFactors[FlyloraOptions]):
    """1 for the k ranks whose ``|A u + d|`` is largest, 0 for the others.

    Source: FlyLoRA (2025), its release, whose two modules differ: ``by``.

    Given: ``SITE.bias`` of ``(R,)``, the balancing d, 0 if it is not there.

    Deviations: d stays as it is, where the fork of PEFT moves it in evaluation too.
    """

    kind = "flylora"
    options = FlyloraOptions
    fitter = "mixmerge.bank.fitting_closed:given_ranks"

    def __init__(self, places: Places, options: FlyloraOptions) -> None:
        super().__init__(places, options)
        self.bias = PerSite({site: torch.zeros(sum(ranks)) for site, ranks in places.ranks.items()})

    def decide(self, site: str, u: Tensor, run: Run) -> Mix:
        moved = self._inside(site, u) + self.bias[site]
        seen = moved.abs() if self.said.by == "magnitude" else moved
        return Mix(strongest(seen, self.said.active), by="rank")


class SelfRankGate(_OwnFactors[SelfRankOptions]):
    """Rank-1 experts by their own activation: the k ranks whose ``|a_i . u| / (|a_i| |u|)`` is largest.

    Source: after MoRA (2026), abstract: rank-1 experts infer their relevance from their own activations, under a
    budget of ranks.

    Deviations: MoRA's exact gate is not published. The cosine, the mask and the softmax are ours, and no rank is
    pruned: a bank of fewer ranks does that.
    """

    kind = "self_rank"
    options = SelfRankOptions
    fitter = "mixmerge.bank.fitting_closed:given_ranks"
    grows = True  # each rank speaks for itself

    def grown(self, bank: Bank) -> SelfRankGate:
        return SelfRankGate(Places.of(bank), self.said)

    def decide(self, site: str, u: Tensor, run: Run) -> Mix:
        lengths = self._inner[site].float().norm(dim=-1) * u.float().norm(dim=-1, keepdim=True)
        relevance = self._inside(site, u).abs() / lengths.clamp_min(1e-12)  # (..., R)
        kept = strongest(relevance, self.said.active)
        if self.said.values == "mask":
            return Mix(kept, by="rank")
        scores = (relevance / self.said.temperature).masked_fill(kept == 0, -torch.inf)
        return Mix(torch.softmax(scores, -1) * kept.sum(-1, keepdim=True), by="rank")
