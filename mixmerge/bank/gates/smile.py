"""SMILE: an expert is asked where inputs lie in the directions that it changes most.

Legend as in ``gate``; g directions of each expert.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import chosen, dots
from mixmerge.bank.gates.places import SiteOptions
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.mix import Mix


class SmileOptions(SiteOptions):
    """Generic defaults of the release; for language models it takes 8 directions and experts of rank 64.

    Args:
        gate_k: g, directions of each expert.
        top_k: experts of a token.
    """

    gate_k: int = Field(default=1, ge=1)
    top_k: int = Field(default=1, ge=1)
    others: Literal["mean", "base"] = "base"


class SmileGate(PrototypeGate[SmileOptions]):
    """Softmax of ``|| V_e^T u ||``, V_e the first g right singular vectors of the expert's change; the best k.

    Zero-shot: nothing but the experts. Their rank is the bank's: make it of full checkpoints by ``to_low_rank``.

    Source: SMILE (Tang et al., "SMILE: Zero-Shot Sparse Mixture of Low-Rank Experts Construction From Pre-Trained
    Foundation Models", 2024), section 4.

    Deviations: an expert that equals the base at a site cannot be chosen there; biases beside a linear site are mixed
    as it is, all else stays the base's unless ``others: mean`` (its ``average_experts``).
    """

    kind = "smile"
    options = SmileOptions
    fitter = "mixmerge.bank.fitting_closed:smile"

    def shape(self, site: str) -> tuple[int, ...]:
        return (self.said.gate_k, self.places.widths[site])

    def scores(self, site: str, u: Tensor, run: Run) -> Tensor:
        directions = self.prototypes[site]  # (E, g, d)
        seen = dots(u, directions.flatten(0, 1))  # (..., E * g)
        sizes: Tensor = seen.view(*seen.shape[:-1], *directions.shape[:2]).norm(dim=-1)
        return sizes

    def pick(self, scores: Tensor, absent: Tensor | None) -> Mix:
        return chosen(scores, self.said.top_k, absent=absent)
