"""Decisions in the form executors want: who gets something of whom, sorted once for all sites that share a decision.

Legend as in ``mix``; m units (rows, or tokens), P pairs of a unit and an expert, k pairs of one unit.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mixmerge.bank.mix import By, How, Mix
from mixmerge.bank.records import Site

# Decisions that are remembered: the sites of one layer that share one follow each other.
_HELD = 8
# Experts from which it pays to look which of them a token gets nothing of.
_MANY = 16


@dataclass(frozen=True, eq=False)
class Order:
    """Pairs sorted by expert; those of one expert keep the order of their units.

    Args:
        places: ``(P,)``: of each pair among the weights, flattened.
        units: ``(P,)``.
        experts: ``(P,)``.
        ends: ``(E,)``, int32: one past the last pair of each expert.
        real: ``(P,)``, False for pairs that are there only to make each expert have as many; None: all are real.
        length: of each expert, where all have as many.
    """

    places: Tensor
    units: Tensor
    experts: Tensor
    ends: Tensor
    real: Tensor | None = None
    length: int | None = None

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """``E + 1`` numbers: the pairs of expert e are ``bounds[e]`` up to ``bounds[e + 1]``."""
        return (0, *self.ends.tolist())

    @cached_property
    def edges(self) -> Tensor:
        """``bounds`` as a tensor of int64."""
        return torch.nn.functional.pad(self.ends.to(torch.int64), (1, 0))

    @cached_property
    def longest(self) -> int:
        """Pairs of the expert that has most."""
        return max(stop - start for start, stop in pairwise(self.bounds))

    @cached_property
    def evened(self) -> Order:
        """As many pairs of each expert: a product of all at once takes them without looking where one ends."""
        steps = torch.arange(self.longest, device=self.ends.device)
        starts, stops = self.edges[:-1, None], self.edges[1:, None]
        taken = starts + steps  # (E, longest)
        real = taken < stops
        taken = taken.clamp(max=max(len(self.units) - 1, 0)).reshape(-1)
        experts = torch.arange(len(self.ends), device=self.ends.device).repeat_interleave(self.longest)
        ends = (torch.arange(len(self.ends), device=self.ends.device) + 1) * self.longest
        return Order(
            self.places[taken],
            self.units[taken],
            experts,
            ends.to(torch.int32),
            None if bool(real.all()) else real.reshape(-1),
            self.longest,
        )

    @classmethod
    def of(cls, entries: Tensor, experts: int) -> Order:
        """Of ``(m, k)`` experts."""
        flat, places = entries.reshape(-1).sort(stable=True)
        units = places if entries.shape[1] == 1 else places // entries.shape[1]
        each = torch.arange(experts, device=entries.device)
        return cls(places, units, flat, torch.searchsorted(flat, each, right=True, out_int32=True))


@dataclass(eq=False)
class Picks:
    """A decision. What executors work out from it is kept in ``paths``, since decoding asks the same again.

    Args:
        weights: ``(m, k)``; by rank ``(m, R)``.
        entries: ``(m, k)``, or None for all experts in their order.
        by, how: as in ``Mix``.
        by_row: units are rows and not tokens.
        experts: E.
        used: those that have a weight, ascending, where that is known; None: any.
        same: all units have the same weights.
    """

    weights: Tensor
    entries: Tensor | None
    by: By
    how: How
    by_row: bool
    experts: int
    used: tuple[int, ...] | None = None
    same: bool = False
    paths: dict[Hashable, Any] = field(default_factory=dict)
    _order: Order | None = None

    @property
    def units(self) -> int:
        return int(self.weights.shape[0])

    @property
    def each(self) -> int:
        """k: how many experts a unit gets something of, at most."""
        return self.experts if self.entries is None else int(self.entries.shape[1])

    @property
    def listed(self) -> Tensor:
        """``entries``, spelled out."""
        if self.entries is not None:
            return self.entries
        return torch.arange(self.experts, device=self.weights.device).expand(self.units, -1)

    @property
    def order(self) -> Order:
        if self._order is None:
            self._order = Order.of(self.listed, self.experts)
        return self._order

    @property
    def trained(self) -> bool:
        return torch.is_grad_enabled() and self.weights.requires_grad


class Shared:
    """Decisions seen lately, so that sites that are given the same tensors sort them once.

    In inference mode torch does not count changes in place: there a decision's tensors have to stay as they are.
    """

    def __init__(self) -> None:
        self._picks: list[tuple[Mix, tuple[object, ...], Picks]] = []

    def picks(self, mix: Mix, experts: int) -> Picks:
        """A mix for a bank of so many experts."""
        order = None
        state = experts, *state_of(mix)
        for seen, when, held in self._picks:
            if seen.entries is not mix.entries or when != state:
                continue
            if seen.weights is mix.weights and seen.by == mix.by and seen.how == mix.how:
                return held
            if mix.entries is not None:
                order = held._order
        made = picks_of(mix, experts)
        if not made.trained:
            self._picks = [(mix, state, made), *self._picks[: _HELD - 1]]
        if order is not None:
            made._order = order
        return made


def state_of(mix: Mix) -> tuple[bool, int, int]:
    """What else than its tensors being the same a decision needs, to be the one it was."""
    return torch.is_inference_mode_enabled(), _version(mix.weights), _version(mix.entries)


def _version(tensor: Tensor | None) -> int:
    """How often a tensor was changed in place."""
    return -1 if tensor is None or tensor.is_inference() else int(tensor._version)


def picks_of(mix: Mix, experts: int) -> Picks:
    """The same decision; of weights for all experts those that are not 0, where looking costs little: of rows, and of
    tokens where there are many experts and few of them get something."""
    weights, entries = mix.weights, mix.entries
    if not mix.by_row:
        weights = weights.reshape(-1, weights.shape[-1])  # (B * T, k)
        entries = None if entries is None else entries.reshape(-1, entries.shape[-1])
    made = Picks(weights, entries, mix.by, mix.how, mix.by_row, experts)
    looked = mix.by == "expert" and entries is None and not made.trained
    looked = looked and (mix.by_row or experts >= _MANY) and weights.device.type == "cpu"
    return _thinned(made) if looked else made


def _thinned(picks: Picks) -> Picks:
    """Weights of all experts as those of k of them, k the most that one unit has."""
    weights = picks.weights
    there = weights != 0  # (m, E)
    count = int(there.sum(-1).max()) if weights.numel() else 0
    if not picks.by_row and 2 * count > picks.experts:
        return picks
    used = tuple(there.any(0).nonzero()[:, 0].tolist())
    same = bool((weights == weights[:1]).all())
    entries = None
    if count < picks.experts:
        places = there.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[:, :count]
        entries, weights = places, weights.gather(-1, places)
    return Picks(weights, entries, picks.by, picks.how, picks.by_row, picks.experts, used, same)


def spans_of(site: Site, picks: Picks) -> tuple[tuple[int, int], ...]:
    """Runs of ranks of the experts that are used."""
    if picks.used is None or picks.by == "rank" or picks.how == "factors" or picks.trained:
        return ((0, site.rank),)
    found: list[tuple[int, int]] = []
    for expert in picks.used:
        start, stop = site.bounds[expert], site.bounds[expert + 1]
        if found and found[-1][1] == start:
            found[-1] = found[-1][0], stop
        elif stop > start:
            found.append((start, stop))
    return tuple(found) or ((0, 0),)
