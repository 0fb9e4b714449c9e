"""Arrow: the direction of inputs that an expert changes most.

Legend as in ``gate``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import chosen, dots
from mixmerge.bank.gates.places import SiteOptions
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank
from mixmerge.errors import Fault


class ArrowOptions(SiteOptions):
    """Of Arrow.

    Args:
        top_k: experts of a token: 3 in PEFT, 4 in mttl's README.
        temperature: scores are divided by it before the softmax.
        mix: ``outputs``, as PEFT: the experts' changes are mixed. ``factors``, as mttl with ``lora_merge_after`` off:
            A and B are mixed apart, which has cross terms and takes equal ranks at each site.
    """

    top_k: int = Field(default=3, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    mix: Literal["outputs", "factors"] = "outputs"


class ArrowGate(PrototypeGate[ArrowOptions]):
    """``|u . p_e|``, p_e the first right singular vector of the expert's change; softmax over the best k.

    Scores grow with the length of u: it is no cosine. The sign of p_e plays no part.

    Source: Arrow (Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024),
    section 4; ``ArrowConfig`` of PEFT.

    Deviations: p_e is exact, from the factors, where PEFT takes 15 power iterations from a random start; an expert
    without factors at a site cannot be chosen there; no general knowledge is subtracted.
    """

    kind = "arrow"
    options = ArrowOptions
    fitter = "mixmerge.bank.fitting_closed:arrow"

    @classmethod
    def faults(cls, bank: Bank, options: BaseModel) -> list[Fault]:
        mixes = getattr(options, "mix", "outputs")
        return unequal_ranks(bank, where="gate.mix") if mixes == "factors" else []

    def scores(self, site: str, u: Tensor, run: Run) -> Tensor:
        return dots(u, self.prototypes[site]).abs()

    def pick(self, scores: Tensor, absent: Tensor | None) -> Mix:
        said = self.said
        return chosen(scores, said.top_k, temperature=said.temperature, absent=absent, how=said.mix)


def unequal_ranks(bank: Bank, *, where: str) -> list[Fault]:
    """A fault if experts of different ranks meet at a site, whose factors cannot be mixed."""
    sites = [name for name, site in bank.sites.items() if len({rank for rank in site.ranks if rank}) > 1]
    if not sites:
        return []
    ranks = sorted({rank for rank in bank.sites[sites[0]].ranks if rank})
    what = f"is factors, and at {len(sites)} sites the ranks differ: {ranks} at {sites[0]}"
    return [Fault(where, what, "Factors are mixed where all ranks are equal", "Say outputs")]
