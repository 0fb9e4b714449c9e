"""LoRA-Mixer: a linear router at every site.

Legend as in ``gate``.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import chosen, dots
from mixmerge.bank.gates.places import TrainingOptions
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.mix import Mix


class LoraMixerOptions(TrainingOptions):
    """Of the router; the paper gives neither rate nor the weights of its losses.

    Args:
        top_k: experts of a token once it is trained. While it trains, a token gets something of every expert.
        balance: alpha, how much ``sum_e p_e f_e`` counts: p_e the mean weight of an expert, f_e its share of the
            choices.
        entropy: lambda, of ``- lambda * H``, as the paper prints it: above 0 the weights become flatter, below 0
            peakier, which is what its text says it does.
        domain: how much the cross-entropy between a token's weights and its row's own expert counts.
    """

    steps: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    top_k: int = Field(default=2, ge=1)
    balance: float = Field(default=0.01, ge=0)
    entropy: float = 0.01
    domain: float = Field(default=0.0, ge=0)


class LoraMixerGate(PrototypeGate[LoraMixerOptions]):
    """``softmax(W u)`` at each site; the best k of a token are renormalised.

    Source: LoRA-Mixer (2026), its second stage: the experts, trained each on its own domain, stay as they are, and the
    routers learn from rows of all domains.

    Deviations: the task's loss and the two of the routing are all, no expert's weights move, so there is no penalty
    on that; the gate works at every linear site of the bank, not at attention's alone; ``domain`` is ours.
    """

    kind = "lora_mixer"
    options = LoraMixerOptions
    fitter = "mixmerge.bank.fitting_jointly:lora_mixer"
    wants = ("model", "rows of each expert")
    grows = False
    learned = True

    def scores(self, site: str, u: Tensor, run: Run) -> Tensor:
        return dots(u, self.prototypes[site])

    def pick(self, scores: Tensor, absent: Tensor | None) -> Mix:
        return chosen(scores, None if self.training else self.said.top_k, absent=absent)
