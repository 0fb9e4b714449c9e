"""The executor that sorts units by expert, and the compiled loop that does it all at once while decoding.

Legend as in ``executors``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mixmerge.bank.costs import Product, product_for
from mixmerge.bank.paths import Path, looked_up, of_pairs
from mixmerge.bank.picks import Order, Picks
from mixmerge.bank.records import Site
from mixmerge.kernels import loops


class Segmented(Path):
    """Units sorted by expert, and one product for each expert that has some; z is ``(P, t, r)``.

    Args:
        product: ``compiled``: a loop that adds to the outputs as it goes, without gradients; ``batched``: all experts
            get as many pairs, and a batch of products takes them at once; ``grouped``: torch's product of groups;
            ``loop``: one expert after the other, of any ranks. None: the cheapest that can.
    """

    def __init__(self, site: Site, picks: Picks, tokens: int, *, product: Product | None = None) -> None:
        super().__init__(site, picks, tokens)
        self.order, self.rank = picks.order, max(site.ranks)
        self.product = product_for(site, picks, tokens) if product is None else product
        if self.product == "compiled":
            self.compiled = Compiled(site, self.order, self.weights(scaled=True).detach(), picks.units)
            self.product = product_for(site, picks, tokens, compiled=False)
        if self.product == "batched":
            self.order = self.order.evened
        self.ends = self.order.ends if tokens == 1 else self.order.ends * tokens
        if self.product != "loop":
            self.b = site.b.view(-1, self.rank, site.b.shape[1])  # (E, r, o)
            self.a = site.a.view(-1, self.rank, site.a.shape[1]) if site.kind == "linear" else self.b

    def shrink(self, u: Tensor) -> Tensor:
        if self.site.kind == "embedding":
            z = looked_up(self.site, self._sorted(u[:, None])[:, 0], self._experts())
        elif self.product == "loop":
            z = self._to_ranks(self._sorted(u), self.site.a)
        else:
            z = self._products(self._sorted(u), self.a.transpose(1, 2))
        return z.view(-1, self.tokens, self.rank)

    def expand(self, z: Tensor, y: Tensor) -> None:
        self._gathered(self._from_ranks(z, self.site.b, "b"), y)

    def shrink_back(self, z: Tensor) -> Tensor:
        u = z.new_zeros(self.picks.units * self.tokens, self.site.a.shape[1])
        self._gathered(self._from_ranks(z, self.site.a, "a"), u)
        return u

    def expand_back(self, y: Tensor) -> Tensor:
        y = self._sorted(y)
        looped = self.product == "loop"
        z = self._to_ranks(y, self.site.b) if looped else self._products(y, self.b.transpose(1, 2))
        return z.view(-1, self.tokens, self.rank)

    def add_(self, u: Tensor, y: Tensor) -> None:
        if self.compiled is None:
            super().add_(u, y)
        else:
            self.compiled(u, y)

    def _products(self, x: Tensor, factors: Tensor) -> Tensor:
        """``(P * t, .)`` and ``(E, ., :)`` to ``(P * t, :)``."""
        if self.product == "batched":
            return torch.bmm(x.view(len(factors), -1, x.shape[1]), factors).flatten(0, 1)
        return torch.nn.functional.grouped_mm(x, factors, offs=self.ends)

    def _to_ranks(self, x: Tensor, factors: Tensor) -> Tensor:
        z = x.new_zeros(len(x), self.rank)
        for pairs, ranks in self._segments():
            torch.mm(x[pairs], factors[ranks].T, out=z[pairs, : ranks.stop - ranks.start])
        return z

    def _from_ranks(self, z: Tensor, factors: Tensor, name: Literal["a", "b"]) -> Tensor:
        z = z.flatten(0, 1)
        if self.product != "loop":
            return self._products(z, getattr(self, name))
        x = z.new_zeros(len(z), factors.shape[1])
        for pairs, ranks in self._segments():
            torch.mm(z[pairs, : ranks.stop - ranks.start], factors[ranks], out=x[pairs])
        return x

    def _segments(self) -> list[tuple[slice, slice]]:
        """Rows of the sorted pairs, and the ranks that they meet."""
        pairs, ranks, t = self.order.bounds, self.site.bounds, self.tokens
        return [
            (slice(pairs[e] * t, pairs[e + 1] * t), slice(ranks[e], ranks[e + 1]))
            for e in range(len(self.site.ranks))
            if pairs[e + 1] > pairs[e] and self.site.ranks[e]
        ]

    def _sorted(self, x: Tensor) -> Tensor:
        """``(n, .)`` to ``(P * t, .)``."""
        if self.tokens == 1:
            return x.index_select(0, self.order.units)
        by_unit = x.reshape(self.picks.units, -1)
        return by_unit.index_select(0, self.order.units).view(-1, x.shape[-1])

    def _gathered(self, each: Tensor, total: Tensor) -> None:
        """Add ``(P * t, .)`` to the ``(n, .)`` of its units; of one unit in the order of the experts."""
        units = self.picks.units
        total.view(units, -1).index_add_(0, self.order.units, each.view(len(self.order.units), -1))

    def _experts(self) -> Tensor:
        experts = self.order.experts
        return experts if self.tokens == 1 else experts.repeat_interleave(self.tokens)

    def weights(self, *, scaled: bool) -> Tensor:
        order = self.order
        given = self.picks.weights
        if self.picks.by == "expert":
            given = given.reshape(-1).index_select(0, order.places)
        else:
            given = given.index_select(0, order.units)
        found = of_pairs(self.site, given, order.experts, scaled=scaled)[:, None]  # (P, 1, r or 1)
        return found if order.real is None else found * order.real[:, None, None]

    def mixed(self, z: Tensor) -> Tensor:
        units = self.order.units
        return z.new_zeros(self.picks.units, *z.shape[1:]).index_add(0, units, z).index_select(0, units)


class Compiled:
    """The arguments of ``kernels.loops.add_pairs``: addresses of tensors, which are held here.

    Args:
        site: of a linear map, float32.
        order: of tokens.
        gains: ``(P, 1, r or 1)``.
        tokens: n.
    """

    def __init__(self, site: Site, order: Order, gains: Tensor, tokens: int) -> None:
        rank, pairs = max(site.ranks), len(order.units)
        whole = gains[:, 0].to(torch.float32).expand(-1, rank).contiguous()
        self._held = site.a, site.b, order.units, order.edges, site.edges, whole, torch.empty_like(whole)
        sizes = (tokens, site.a.shape[1], site.b.shape[1], site.rank, len(site.ranks), rank, pairs)
        self._given = torch.tensor([*(one.data_ptr() for one in self._held), *sizes])
        self._at = self._given.data_ptr()
        self._add = loops.add_pairs.direct()
        self._inputs, self._outputs = tokens * site.a.shape[1], tokens * site.b.shape[1]

    def __call__(self, u: Tensor, y: Tensor) -> None:
        """Of ``u`` with n x d numbers and contiguous ``y`` with n x o, both float32, of any shape."""
        u = u.contiguous()
        if u.numel() != self._inputs or y.numel() != self._outputs:  # the loop writes wherever it is told to
            raise ValueError(f"{tuple(u.shape)} and {tuple(y.shape)} given for another decision")
        self._add(u.data_ptr(), y.data_ptr(), self._at)
