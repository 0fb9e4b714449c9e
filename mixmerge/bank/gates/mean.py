"""The same share of every expert, for every token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.gates.places import Options
from mixmerge.bank.mix import How, Mix
from mixmerge.bank.records import Bank


class MeanGate(Gate):
    """``1 / E`` of each of E experts: the plain average of their changes, which any gate has to beat.

    Args:
        experts: E, 1 or more.
    """

    kind = "mean"
    options = Options
    fitter = "mixmerge.bank.fitting_closed:mean"
    grows = True

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def settings(self) -> dict[str, Any]:
        return {"experts": self.experts}

    def known(self) -> int:
        return self.experts

    def grown(self, bank: Bank) -> MeanGate:
        return MeanGate(len(bank.experts))

    def fixed(self) -> tuple[Tensor, How]:
        return torch.full((self.experts,), 1 / self.experts), "outputs"

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        return Mix(torch.full((len(u), self.experts), 1 / self.experts, device=u.device))
