"""X-LoRA: the base reads first, and a classifier of what it makes of each token says who goes over it again.

Legend as in ``gate``; G groups of sites that share weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self
from weakref import WeakKeyDictionary

from pydantic import Field
from torch import Tensor, nn

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.choosing import chosen
from mixmerge.bank.gates.places import Places, SiteGate, TrainingOptions
from mixmerge.bank.mix import Mix
from mixmerge.errors import Fault, MixmergeError

_LAYER = re.compile(r"\.(\d+)\.")


class XLoraOptions(TrainingOptions):
    """The classifier as in PEFT's ``XLoraConfig``; steps and rate are ours.

    Args:
        scope: which sites share their weights: ``shared``, all; ``layer``, those of a layer; ``site``, none (PEFT's
            ``layerwise_scalings``).
        depth: linear maps of the classifier.
        size: width between them.
        dropout: between them, while it trains.
        temperature: of the softmax.
        top_k: experts of a token, renormalised; None for all.
    """

    steps: int = Field(default=200, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    scope: Literal["shared", "layer", "site"] = "shared"
    depth: int = Field(default=1, ge=1)
    size: int = Field(default=2048, ge=1)
    dropout: float = Field(default=0.2, ge=0, lt=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: int | None = Field(default=None, ge=1)


class XLoraGate(SiteGate[XLoraOptions]):
    """Softmax of a classifier of the base's last hidden state of a token, the same for the sites of a group.

    The base's pass over a token looks at none after it, so neither do the weights.

    Source: X-LoRA (Buehler and Buehler, 2024), section 2; ``XLoraConfig`` of PEFT.

    Deviations: with ``top_k`` the softmax is over the best k, where PEFT keeps their weights of the softmax over all,
    or takes the softmax of those once more; an expert without factors at a site gets none of it.

    Args:
        places: of the bank.
        options: of the gate.
        width: h, of the hidden states.
    """

    kind = "xlora"
    second_pass = True
    options = XLoraOptions
    fitter = "mixmerge.bank.fitting_jointly:xlora"
    wants = ("model", "rows")

    def __init__(self, places: Places, options: XLoraOptions, width: int) -> None:
        super().__init__(places, options)
        self.width = width
        groups = {site: _group(site, options.scope) for site in places.widths}
        numbers = {group: number for number, group in enumerate(dict.fromkeys(groups.values()))}
        self._number = {site: numbers[group] for site, group in groups.items()}
        outputs = len(numbers) * places.experts
        layers: list[nn.Module] = []
        for _ in range(options.depth - 1):
            layers += [nn.Linear(width, options.size), nn.ReLU(), nn.Dropout(options.dropout)]
            width = options.size
        self.classifier = nn.Sequential(*layers, nn.Linear(width, outputs))
        self._seen: WeakKeyDictionary[Run, Tensor] = WeakKeyDictionary()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "width": self.width}

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        options = XLoraOptions.model_validate(settings["options"])
        return cls(Places.read(settings["places"]), options, settings["width"])

    def decide(self, site: str, u: Tensor, run: Run) -> Mix | None:
        scores = self._scores(run)[:, :, self._number[site]]  # (B, T, E)
        if u.shape[:-1].numel() != scores.shape[:-1].numel():  # a pooler sees one token of each row
            return self.elsewhere(u)
        scores = scores.reshape(*u.shape[:-1], -1)
        said = self.said
        return chosen(scores, said.top_k, temperature=said.temperature, absent=self.absent.get(site))

    def _scores(self, run: Run) -> Tensor:
        """``(B, T, G, E)`` of a run: all sites of a pass ask for the same."""
        if run.hidden is None:
            what = "was not given the base's hidden states"
            raise MixmergeError(
                Fault("gate xlora", what, "Those of every token, from a pass without the bank")
            )
        if run not in self._seen:
            self._seen[run] = self.classifier(run.hidden.float()).unflatten(-1, (-1, self.places.experts))
        return self._seen[run]


def _group(site: str, scope: str) -> str:
    layer = _LAYER.search(site)
    return "" if scope == "shared" else site if scope == "site" or layer is None else layer.group(1)
