"""PHATGOOSE: a vector of each expert at each site, trained after the expert and without the others.

Legend as in ``gate``.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import chosen, standard_scores
from mixmerge.bank.gates.places import TrainingOptions
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.mix import Mix


class PhatgooseOptions(TrainingOptions):
    """Defaults as published, but for the batch.

    Args:
        top_k: experts of a token.
    """

    top_k: int = Field(default=2, ge=1)


class PhatgooseGate(PrototypeGate[PhatgooseOptions]):
    """Softmax over all experts of ``LN(u) . LN(v_e) / sqrt(d)``, the best two of them renormalised.

    LN has no gain and no bias. Each token at each linear site has its own. What is kept is ``LN(v_e)``, which is all
    that scoring needs of ``v_e``.

    Source: PHATGOOSE (Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization",
    2024), section 3.

    Deviations: a batch of 8 rows where they took 1024; an expert without factors at a site cannot be chosen there;
    the warm-up's first step is not of rate 0.
    """

    kind = "phatgoose"
    options = PhatgooseOptions
    fitter = "mixmerge.bank.fitting_alone:phatgoose"
    wants = ("model", "rows of each expert")

    def scores(self, site: str, u: Tensor, run: Run) -> Tensor:
        return standard_scores(u, self.prototypes[site])

    def pick(self, scores: Tensor, absent: Tensor | None) -> Mix:
        return chosen(scores, self.said.top_k, absent=absent)
