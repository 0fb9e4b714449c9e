"""How much of each expert a text got, layer by layer.

Legend: B rows of a batch, T tokens, E experts, R ranks of a site.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmerge.bank.mix import Mix, dense
from mixmerge.bank.records import Bank

_NUMBER = re.compile(r"\.(\d+)\.")
_DIGITS = 6


@dataclass(frozen=True)
class Explanation:
    """Weights of one row.

    Args:
        experts: their names.
        sites: name of a tensor -> the weight of each expert there, the mean over the row's tokens.
    """

    experts: tuple[str, ...]
    sites: Mapping[str, tuple[float, ...]]

    def layers(self) -> dict[str, tuple[float, ...]]:
        """The means over the sites of each layer, in the order of the model; what is in no layer has its own name."""
        groups: dict[str, list[tuple[float, ...]]] = {}
        for name, weights in self.sites.items():
            groups.setdefault(layer_of(name), []).append(weights)
        return {layer: _mean(found) for layer, found in groups.items()}

    def mean(self) -> dict[str, float]:
        """The mean over all sites, by expert; empty where nothing was mixed."""
        if not self.sites:
            return {}
        return dict(zip(self.experts, _mean(list(self.sites.values())), strict=True))

    def as_dict(self) -> dict[str, Any]:
        """As JSON values: ``experts``, ``layers`` and ``mean``."""
        return {"experts": list(self.experts), "layers": self.layers(), "mean": self.mean()}


def layer_of(site: str) -> str:
    """The number of a tensor's layer; the name of its module if it is in none."""
    found = _NUMBER.search(site)
    return found[1] if found else site.rpartition(".")[0]


def _mean(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(round(sum(column) / len(rows), _DIGITS) for column in zip(*rows, strict=True))


class Tally:
    """Sums of what the rows of a batch got, while they are read and answered.

    Args:
        bank: whose experts these are.
        rows: of the batch at its start.
    """

    def __init__(self, bank: Bank, rows: int) -> None:
        self._bank, self._rows = bank, rows
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}

    def add(
        self, log: Sequence[tuple[str, Mix]], left: Sequence[int], mask: Tensor | None, *, tokens: int
    ) -> None:
        """What one pass decided.

        Args:
            log: as ``Attached.logged`` gives it.
            left: places of its rows at the start.
            mask: as in ``Run``.
            tokens: T.
        """
        at = torch.tensor(left)
        there = torch.ones(len(left), tokens) if mask is None else mask.float().cpu()  # (B, T)
        for site, mix in log:
            weights = self._by_expert(site, mix)  # (B, 1 or T, E)
            if site not in self._sums:
                self._sums[site] = torch.zeros(self._rows, weights.shape[-1])
                self._tokens[site] = torch.zeros(self._rows)
            self._sums[site].index_add_(0, at, (weights * there[..., None]).sum(1))
            self._tokens[site].index_add_(0, at, there.sum(1))

    def _by_expert(self, name: str, mix: Mix) -> Tensor:
        """``(B, 1 or T, E)``; of ranks the mean over an expert's own."""
        experts = len(self._bank.experts)
        if mix.by == "expert":
            return dense(mix, experts).detach().float().cpu()
        site = self._bank.sites[name]
        weights = dense(mix, site.rank).detach().float().cpu()  # (B, 1 or T, R)
        sums = weights.new_zeros(*weights.shape[:-1], experts).index_add_(-1, site.owners.cpu(), weights)
        return sums / torch.tensor(site.ranks).clamp(min=1)

    def explanation(self, row: int) -> Explanation:
        """Of a row, by its place at the start."""
        sites = {
            name: tuple(round(value, _DIGITS) for value in (total[row] / self._tokens[name][row]).tolist())
            for name, total in self._sums.items()
            if self._tokens[name][row] > 0
        }
        return Explanation(self._bank.experts, sites)
