"""LoraHub: one weight of each expert, the same for every token, searched on a few rows of a task.

Legend as in ``gate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.gates.arrow import unequal_ranks
from mixmerge.bank.gates.places import Options
from mixmerge.bank.mix import How, Mix
from mixmerge.bank.records import Bank
from mixmerge.errors import Fault


class LorahubOptions(Options):
    """Defaults of the release.

    Args:
        how: ``factors``, as published: A and B are mixed apart, which has cross terms and takes equal ranks at each
            site. ``outputs``: the experts' changes are mixed.
        budget: mixtures that are tried.
        bound: weights are between minus this and this.
        l1: how much the mean of ``|w_e|`` counts beside the loss.
        samples: rows at most; the first ones.
        batch_size: rows of a batch.
        max_tokens: of a row; what is longer is cut.
    """

    how: Literal["factors", "outputs"] = "factors"
    budget: int = Field(default=40, ge=1)
    bound: float = Field(default=1.5, gt=0)
    l1: float = Field(default=0.05, ge=0)
    samples: int = Field(default=64, ge=1)
    batch_size: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=512, ge=2)


class LorahubGate(Gate):
    """``w_e``, one number of each expert, for all sites and tokens; a gate for each task.

    It is a constant, so it folds into the weights of the base. An expert that comes later gets 0: the mixture that was
    found stays what it is until a search that knows of it.

    Source: LoraHub (Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", 2023),
    section 3, and its release: Nevergrad's NGOpt from 0.

    Deviations: the loss is the mean over all tokens of answers, where the release divides it once more by the number
    of rows.

    Args:
        experts: E.
        options: of the gate.
    """

    kind = "lorahub"
    options = LorahubOptions
    fitter = "mixmerge.bank.fitting_search:lorahub"
    wants = ("model", "rows")
    grows = True

    def __init__(self, experts: int, options: LorahubOptions) -> None:
        super().__init__()
        self.said = options
        self.weights: Tensor
        self.register_buffer("weights", torch.zeros(experts))

    def settings(self) -> dict[str, Any]:
        return {"experts": len(self.weights), "options": self.said.model_dump(mode="json")}

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        return cls(settings["experts"], LorahubOptions.model_validate(settings["options"]))

    @classmethod
    def faults(cls, bank: Bank, options: BaseModel) -> list[Fault]:
        factors = getattr(options, "how", "") == "factors"
        return unequal_ranks(bank, where="gate.how") if factors else []

    def known(self) -> int:
        return len(self.weights)

    def grown(self, bank: Bank) -> Self:
        made = type(self)(len(bank.experts), self.said)
        made.weights[: len(self.weights)] = self.weights.cpu()
        return made

    def fixed(self) -> tuple[Tensor, How]:
        return self.weights.detach().cpu(), self.said.how

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        return Mix(self.weights.expand(len(u), -1), how=self.said.how)
