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
            counted = _counted(self._by_expert(site, mix), there, by_row=mix.by_row)
            if counted is None:
                continue
            sums, tokens_there = counted
            if site not in self._sums:
                self._sums[site] = torch.zeros(self._rows, sums.shape[-1])
                self._tokens[site] = torch.zeros(self._rows)
            self._sums[site].index_add_(0, at, sums)
            self._tokens[site].index_add_(0, at, tokens_there)

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


def _counted(weights: Tensor, there: Tensor, *, by_row: bool) -> tuple[Tensor, Tensor] | None:
    """Sums of weights over each row's tokens ``(B, E)``, and how many tokens those are ``(B,)``.

    None where a layer saw tokens of which it is not known whose they are.

    Args:
        weights: ``(B, 1, E)`` of rows; ``(B, T, E)`` of tokens, ``(1, B * T, E)`` of layers that see rows and tokens as
            one, or fewer: the last ones of each row, or one of each, which a pooler or a head sees.
        there: ``(B, T)``, 1 for tokens that are no padding.
        by_row: the weights are of rows.
    """
    rows, tokens = there.shape
    count = there.sum(1)
    if by_row:
        return weights[:, 0].expand(rows, -1) * count[:, None], count
    seen = weights.shape[0] * weights.shape[1]
    if seen == rows * tokens:
        return (weights.reshape(rows, tokens, -1) * there[..., None]).sum(1), count
    if seen == rows:
        return weights.reshape(rows, -1), torch.ones(rows)
    if seen % rows or seen > rows * tokens:
        return None
    last = there[:, -(seen // rows) :]
    return (weights.reshape(rows, seen // rows, -1) * last[..., None]).sum(1), last.sum(1)
