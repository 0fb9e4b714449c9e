"""Glider: PHATGOOSE's scores of each token, and how near a whole query is to what each expert is for.

Legend as in ``gate``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import chosen, standard_scores
from mixmerge.bank.gates.phatgoose import PhatgooseOptions
from mixmerge.bank.gates.places import Places
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices


class GliderOptions(PhatgooseOptions):
    """PHATGOOSE's, and of the global part.

    Args:
        beta: how much the nearness of a query counts, always.
        gamma: how much more where the nearest expert's cosine is ``threshold`` or above.
        threshold: of that cosine.
        alpha: a fixed one in place of beta and gamma: the released scripts set 100 for tasks that were held in, 3 for
            held out, by hand.
        descriptions: what each expert is for, by its name. An expert without one is described by rows of its own.
        samples: how many rows then.
    """

    beta: float = Field(default=3.0, ge=0)
    gamma: float = Field(default=100.0, ge=0)
    threshold: float = Field(default=0.8, ge=-1, le=1)
    alpha: float | None = Field(default=None, ge=0)
    descriptions: dict[str, str] = Field(default_factory=dict)
    samples: int = Field(default=3, ge=1)


class GliderGate(PrototypeGate[GliderOptions]):
    """``LN(u) . LN(v_e) / sqrt(d) + alpha * cos(g_e, query)``; softmax over all, the best two renormalised.

    ``alpha = beta + gamma * 1[max_e cos(g_e, query) >= threshold]``: 3 far from all experts, 103 near one.

    Source: Glider (Li et al., "GLIDER: Global and Local Instruction-Driven Expert Router", 2024), section 3 and its
    released scripts.

    Deviations: descriptions are given, or are the mean of the features of a few rows, where the paper has a large
    model write them; the query is embedded as it is, each by itself, where the release has one embedding for a task.

    Args:
        places: of the bank.
        options: of the gate.
        width: f, of the text features.
    """

    kind = "glider"
    features = "text"
    options = GliderOptions
    fitter = "mixmerge.bank.fitting_alone:glider"
    wants = ("model", "rows of each expert", "encode")

    def __init__(self, places: Places, options: GliderOptions, width: int = 1) -> None:
        super().__init__(places, options)
        self.purposes: Tensor
        self.register_buffer("purposes", torch.zeros(places.experts, width))  # (E, f)

    @classmethod
    def faults(cls, bank: Bank, options: BaseModel) -> list[Fault]:
        described = getattr(options, "descriptions", {})
        return [
            Fault(f"gate.descriptions.{name}", "there is no such expert", choices(name, list(bank.experts)))
            for name in described
            if name not in bank.experts
        ]

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "width": int(self.purposes.shape[1])}

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        options = GliderOptions.model_validate(settings["options"])
        return cls(Places.read(settings["places"]), options, settings["width"])

    def query(self, features: Tensor) -> Tensor:
        """``(B, f)`` text features to ``(B, E)``: alpha times the cosine to each expert's purpose."""
        unit = torch.nn.functional.normalize
        near = unit(features.float(), dim=-1) @ unit(self.purposes, dim=-1).T  # (B, E)
        if self.said.alpha is not None:
            return self.said.alpha * near
        close = near.amax(-1, keepdim=True) >= self.said.threshold
        return (self.said.beta + self.said.gamma * close) * near

    def scores(self, site: str, u: Tensor, run: Run) -> Tensor:
        if run.rows is None:
            what = "was given no features of the queries"
            raise MixmergeError(Fault("gate glider", what, "Each query's text features, by Gate.query"))
        return standard_scores(u, self.prototypes[site]) + run.rows[:, None]  # (B, T, E)

    def pick(self, scores: Tensor, absent: Tensor | None) -> Mix:
        return chosen(scores, self.said.top_k, absent=absent)

    @classmethod
    def like(cls, places: Places, parts: Sequence[Self]) -> Self:
        made = cls(places, parts[0].said, int(parts[0].purposes.shape[1]))
        made.purposes.copy_(torch.cat([one.purposes.cpu() for one in parts]))
        return made
