"""What a bank holds: at every site the factors of all experts, side by side.

Legend: E experts, r_e the rank of one at a site, R the sum of theirs, d inputs and o outputs of a site, V entries of a
vocabulary, n length of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class Entry:
    """One expert's change of one matrix: ``scale * b.T @ a``, of rank r.

    Args:
        a: ``(r, d)``; of an embedding ``(V, r)``, whose rows belong to tokens, and the change is ``scale * a @ b``.
        b: ``(r, o)``.
        scale: one factor, or ``(r,)`` one of each rank.
        kind, tied: as in ``Site``.
    """

    a: Tensor
    b: Tensor
    scale: float | Tensor = 1.0
    kind: Kind = "linear"
    tied: bool = False

    @property
    def rank(self) -> int:
        return int(self.b.shape[0])


@dataclass(frozen=True, eq=False)
class Site:
    """All experts' changes of one matrix of the base.

    Args:
        name: of the tensor in the base's checkpoint (``model.layers.0.self_attn.q_proj.weight``).
        a: ``(R, d)``; of an embedding ``(V, R)``.
        b: ``(R, o)``.
        scale: ``(R,)``, float32.
        ranks: of each expert, in the bank's order; 0 where one changes nothing.
        kind: a linear map, whichever way round it is stored, or a table that tokens are looked up in.
        tied: the table is the model's head too, and the experts' heads changed with it.
    """

    name: str
    a: Tensor
    b: Tensor
    scale: Tensor
    ranks: tuple[int, ...]
    kind: Kind = "linear"
    tied: bool = False

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """``E + 1`` numbers: expert e has ranks ``bounds[e]`` up to ``bounds[e + 1]``."""
        return tuple(accumulate(self.ranks, initial=0))

    @cached_property
    @torch.inference_mode(False)  # it is kept, and gradients may want it later
    def edges(self) -> Tensor:
        """``bounds`` as a tensor."""
        return torch.tensor(self.bounds, device=self.b.device)

    @cached_property
    def owners(self) -> Tensor:
        """``(R,)``: whose each rank is."""
        with torch.inference_mode(False):  # it is kept, and a gate may be trained afterwards
            counts = torch.tensor(self.ranks, device=self.b.device)
            return torch.repeat_interleave(torch.arange(len(self.ranks), device=self.b.device), counts)

    @property
    def rank(self) -> int:
        """R."""
        return self.bounds[-1]

    @cached_property
    def even(self) -> int | None:
        """The rank of every expert, where all have the same and it is not 0."""
        return self.ranks[0] or None if len(set(self.ranks)) == 1 else None

    @cached_property
    def one_scale(self) -> float | None:
        """The scale of every rank, where all are the same."""
        same = self.rank and bool((self.scale == self.scale[0]).all())
        return float(self.scale[0]) if same else None

    @cached_property
    @torch.inference_mode(False)
    def grid(self) -> Tensor:
        """``(E, r)``, r the largest rank: the place of each rank of an expert; past its own, one of its own again."""
        starts = self.edges[:-1]
        own = torch.tensor(self.ranks, device=self.b.device)
        steps = torch.arange(max(self.ranks, default=0), device=self.b.device)
        last = (starts + own - 1).clamp(min=0)
        return torch.minimum(starts[:, None] + steps, last[:, None])

    @cached_property
    @torch.inference_mode(False)
    def own(self) -> Tensor:
        """``(E, r)``, of the scale's type: 1 for an expert's ranks, 0 past them."""
        ranks = torch.tensor(self.ranks, device=self.b.device)
        steps = torch.arange(max(self.ranks, default=0), device=self.b.device)
        return (steps < ranks[:, None]).to(self.scale.dtype)

    @cached_property
    @torch.inference_mode(False)
    def grid_scale(self) -> Tensor:
        """``(E, r)``: the scale of each rank of an expert, 0 past them."""
        return self.scale[self.grid] * self.own if self.rank else self.own

    @property
    def nbytes(self) -> int:
        return sum(int(one.numel() * one.element_size()) for one in (self.a, self.b, self.scale))

    def entry(self, expert: int) -> Entry:
        """One expert's part, as views."""
        start, stop = self.bounds[expert], self.bounds[expert + 1]
        a = self.a[:, start:stop] if self.kind == "embedding" else self.a[start:stop]
        return Entry(a, self.b[start:stop], self.scale[start:stop], self.kind, self.tied)

    def delta(self, weights: Tensor) -> Tensor:
        """``sum_e w_e * delta_e``, dense and in float32: ``(o, d)``; of an embedding ``(V, o)``.

        Args:
            weights: ``(E,)``.
        """
        b = self.b.float() * (self.scale * weights[self.owners].to(self.scale))[:, None]
        return self.a.float() @ b if self.kind == "embedding" else b.T @ self.a.float()

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Site:
        """The same on a device, its factors in a type; the scale stays in float32."""
        a, b = self.a.to(device, dtype).contiguous(), self.b.to(device, dtype).contiguous()
        return Site(self.name, a, b, self.scale.to(device), self.ranks, self.kind, self.tied)


def side_by_side(
    name: str, entries: list[Entry | None], *, kind: Kind | None = None, tied: bool | None = None
) -> Site:
    """One site of what each expert has there.

    Args:
        name: of the tensor.
        entries: in the bank's order; None where an expert changes nothing. At least one is there.
        kind, tied: as in ``Site``; by default those of the first entry.
    """
    there = [one for one in entries if one is not None]
    kind, tied = kind or there[0].kind, there[0].tied if tied is None else tied
    ranks = tuple(0 if one is None else one.rank for one in entries)
    scale = torch.cat([torch.as_tensor(one.scale, dtype=torch.float32).expand(one.rank) for one in there])
    a = torch.cat([one.a for one in there], dim=1 if kind == "embedding" else 0).contiguous()
    return Site(name, a, torch.cat([one.b for one in there]).contiguous(), scale, ranks, kind, tied)


@dataclass(frozen=True, eq=False)
class Bank:
    """Several experts as changes of one base.

    Args:
        experts: their names; the order of all that is side by side.
        sites: by the name of the base's tensor.
        vectors: biases and gains of norms, whole: name -> ``(E, n)``, what each expert adds.
    """

    experts: tuple[str, ...]
    sites: Mapping[str, Site]
    vectors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        whole = sum(int(one.numel() * one.element_size()) for one in self.vectors.values())
        return whole + sum(site.nbytes for site in self.sites.values())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Bank:
        """The same on a device and in a type."""
        return Bank(
            self.experts,
            {name: site.to(device, dtype) for name, site in self.sites.items()},
            {name: one.to(device, dtype) for name, one in self.vectors.items()},
        )
