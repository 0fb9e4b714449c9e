"""Average activation: experts know their own data by the mean of a site's inputs.

Legend as in ``gate``.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import chosen, dots, standard_scores, standardised
from mixmerge.bank.gates.places import SiteOptions
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.mix import Mix


class AverageActivationOptions(SiteOptions):
    """Of the average activation.

    Args:
        score: ``dot``, ``u . m_e`` as mttl; ``standardised``, as PHATGOOSE's release scores its average activations;
            ``cosine``.
        top_k: experts of a token.
        temperature: scores are divided by it before the softmax.
        samples: rows of each expert, of those it has; the first ones.
        batch_size: rows of a batch.
        max_tokens: of a row; what is longer is cut.
    """

    score: Literal["dot", "standardised", "cosine"] = "dot"
    top_k: int = Field(default=2, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    samples: int = Field(default=1000, ge=1)
    batch_size: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=512, ge=2)


class AverageActivationGate(PrototypeGate[AverageActivationOptions]):
    """A score of u and ``m_e``, the mean of the site's inputs over the expert's own rows, with that expert alone on.

    All real tokens count, those of prompts and answers.

    Source: the baseline "Average Activation" of PHATGOOSE (Muqeeth et al., 2024), section 4.

    Deviations: the paper keeps the mean of the activations of a thousand examples, mttl of ten: ``samples``; an expert
    without factors at a site cannot be chosen there.
    """

    kind = "average_activation"
    options = AverageActivationOptions
    fitter = "mixmerge.bank.fitting_alone:average_activation"
    wants = ("model", "rows of each expert")

    def scores(self, site: str, u: Tensor, run: Run) -> Tensor:
        means, said = self.prototypes[site], self.said
        if said.score == "dot":
            return dots(u, means)
        if said.score == "standardised":
            return standard_scores(u, standardised(means))
        unit = torch.nn.functional.normalize
        return dots(unit(u.float(), dim=-1), unit(means, dim=-1))

    def pick(self, scores: Tensor, absent: Tensor | None) -> Mix:
        return chosen(scores, self.said.top_k, temperature=self.said.temperature, absent=absent)
