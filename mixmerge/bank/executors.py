"""Three ways to add a mixture's change to a site's output; all give what ``mix.change`` defines.

Each is a pair of linear maps, ``shrink`` to the ranks and ``expand`` to the outputs, with the weights between them.
The factors are frozen: gradients go to weights and inputs only, through the same maps the other way round. What is
kept for them is what lies between, of the size of the ranks. None makes a tensor of (tokens x experts x width).

Source: the layouts of Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285), with weights and several experts a
token.

Legend as in ``picks``; n = B * T tokens, t tokens of a unit (T where units are rows, else 1), r largest rank of a site,
Q ranks that ``concat`` takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from mixmerge.bank.costs import Executor, Product, product_for
from mixmerge.bank.picks import Order, Picks, spans_of
from mixmerge.bank.records import Site
from mixmerge.kernels import loops


class Path:
    """One way, for one site and decision.

    Args:
        site: of the bank.
        picks: the decision.
        tokens: t.
    """

    def __init__(self, site: Site, picks: Picks, tokens: int) -> None:
        self.site, self.picks, self.tokens = site, picks, tokens
        self.compiled: Compiled | None = None  # a way to do ``add_`` at once
        self._gains: Tensor | None = None

    def shrink(self, u: Tensor) -> Tensor:
        """``A u`` of what is picked: ``(n, d)`` to z, laid out as the executor likes."""
        raise NotImplementedError

    def expand(self, z: Tensor, y: Tensor) -> None:
        """Add ``B z`` to ``y``, ``(n, o)``, in place."""
        raise NotImplementedError

    def shrink_back(self, z: Tensor) -> Tensor:
        """``A^T z``: ``(n, d)``."""
        raise NotImplementedError

    def expand_back(self, y: Tensor) -> Tensor:
        """``B^T y``, laid out as z."""
        raise NotImplementedError

    def weights(self, *, scaled: bool) -> Tensor:
        """What z is multiplied by, ready to broadcast; times the scales or not."""
        raise NotImplementedError

    def mixed(self, z: Tensor) -> Tensor:
        """One z of a mixed A, for each expert of a unit again; all ranks are r."""
        raise NotImplementedError

    def add_(self, u: Tensor, y: Tensor) -> None:
        """Add the change to ``y``, ``(n, o)``, in place, without gradients; ``u`` is ``(n, d)``, or ``(n,)`` tokens."""
        self.expand(self.between_(self.shrink(u)), y)

    def between(self, z: Tensor) -> Tensor:
        """z, mixed as the decision says; differentiable."""
        if self.picks.how == "factors":
            z = self.mixed(z * self.weights(scaled=False).to(z.dtype))
        return _weighed(z, self.weights(scaled=True).to(z.dtype))

    def between_(self, z: Tensor) -> Tensor:
        """``between`` without gradients, in place."""
        if self.picks.how == "factors":
            return self.between(z)
        if self._gains is None:
            self._gains = self.weights(scaled=True)
        z.mul_(self._gains)
        return z.masked_fill_(self._gains == 0, 0) if z.dtype is torch.float16 else z


def _weighed(z: Tensor, gains: Tensor) -> Tensor:
    """``z * gains``. Half precision overflows soon, and what has no weight must not make others nan."""
    z = z * gains
    return z.masked_fill(gains == 0, 0) if z.dtype is torch.float16 else z


class Concat(Path):
    """Two products with the factors of all experts, or of runs of experts that are used; z is ``(m, t, Q)``."""

    def __init__(self, site: Site, picks: Picks, tokens: int) -> None:
        super().__init__(site, picks, tokens)
        self.spans = spans_of(site, picks)
        self.width = sum(stop - start for start, stop in self.spans)
        self._whole = self.spans == ((0, site.rank),)

    def shrink(self, u: Tensor) -> Tensor:
        a = self.site.a
        if self.site.kind == "embedding":
            z = a.index_select(0, u)
            z = z if self._whole else torch.cat([z[:, start:stop] for start, stop in self.spans], dim=1)
        elif self._whole:
            z = u @ a.T
        else:
            z = u.new_empty(len(u), self.width)
            for (start, stop), into in zip(self.spans, self._parts(z), strict=True):
                torch.mm(u, a[start:stop].T, out=into)
        return z.view(self.picks.units, self.tokens, self.width)

    def expand(self, z: Tensor, y: Tensor) -> None:
        z = z.flatten(0, 1)
        if self._whole:
            y.addmm_(z, self.site.b)
            return
        for (start, stop), part in zip(self.spans, self._parts(z), strict=True):
            y.addmm_(part, self.site.b[start:stop])

    def shrink_back(self, z: Tensor) -> Tensor:
        z = z.flatten(0, 1)
        u = z.new_zeros(len(z), self.site.a.shape[1])
        for (start, stop), part in zip(self.spans, self._parts(z), strict=True):
            u.addmm_(part, self.site.a[start:stop])
        return u

    def expand_back(self, y: Tensor) -> Tensor:
        z = y.new_empty(len(y), self.width)
        for (start, stop), into in zip(self.spans, self._parts(z), strict=True):
            torch.mm(y, self.site.b[start:stop].T, out=into)
        return z.view(self.picks.units, self.tokens, self.width)

    def _parts(self, z: Tensor) -> tuple[Tensor, ...]:
        return torch.split(z, [stop - start for start, stop in self.spans], dim=1)

    def weights(self, *, scaled: bool) -> Tensor:
        picks, site = self.picks, self.site
        given = picks.weights[:1] if picks.same else picks.weights
        if picks.by == "expert":
            if picks.entries is not None:
                entries = picks.entries[: len(given)]
                given = given.new_zeros(len(given), picks.experts).scatter(-1, entries, given)  # (m, E)
            given = given.index_select(-1, site.owners)  # (m, R)
        if scaled:
            given = given * site.scale
        if not self._whole:
            given = torch.cat([given[:, start:stop] for start, stop in self.spans], dim=1)
        return given[:, None]  # (m or 1, 1, Q)

    def mixed(self, z: Tensor) -> Tensor:
        rank = max(self.site.ranks)
        parts = z.view(*z.shape[:2], -1, rank)
        return parts.sum(-2).repeat(1, 1, parts.shape[-2])


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
            z = _looked_up(self.site, self._sorted(u[:, None])[:, 0], self._experts())
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
        found = _of_pairs(self.site, given, order.experts, scaled=scaled)[:, None]  # (P, 1, r or 1)
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
        self._inputs, self._outputs = tokens * site.a.shape[1], tokens * site.b.shape[1]

    def __call__(self, u: Tensor, y: Tensor) -> None:
        """Of ``u`` with n x d numbers and contiguous ``y`` with n x o, both float32, of any shape."""
        u = u.contiguous()
        if u.numel() != self._inputs or y.numel() != self._outputs:  # the loop writes wherever it is told to
            raise ValueError(f"{tuple(u.shape)} and {tuple(y.shape)} given for another decision")
        loops.add_pairs(u.data_ptr(), y.data_ptr(), self._at)


class Gather(Path):
    """Each unit's own factors side by side, copied: for few units of many experts; z is ``(m, t, k * r)``."""

    def __init__(self, site: Site, picks: Picks, tokens: int) -> None:
        super().__init__(site, picks, tokens)
        self.rank = max(site.ranks)
        self.experts = picks.listed.reshape(-1)  # (m * k)

    def _own(self, factors: Tensor) -> Tensor:
        """``(R, .)`` to ``(m, k * r, .)``."""
        if self.site.even:
            found = factors.view(-1, self.rank, factors.shape[1]).index_select(0, self.experts)
        else:
            found = factors.index_select(0, self.site.grid.index_select(0, self.experts).view(-1))
        return found.view(self.picks.units, -1, factors.shape[1])

    def shrink(self, u: Tensor) -> Tensor:
        units = self.picks.units
        if self.site.kind == "embedding":
            each = u.view(units, 1, self.tokens).expand(-1, self.picks.each, -1).reshape(-1)
            z = _looked_up(self.site, each, self.experts.repeat_interleave(self.tokens))
            return z.view(units, -1, self.tokens, self.rank).transpose(1, 2).flatten(2)
        return torch.bmm(u.view(units, self.tokens, -1), self._own(self.site.a).transpose(1, 2))

    def expand(self, z: Tensor, y: Tensor) -> None:
        y.view(self.picks.units, self.tokens, -1).baddbmm_(z, self._own(self.site.b))

    def shrink_back(self, z: Tensor) -> Tensor:
        return torch.bmm(z, self._own(self.site.a)).flatten(0, 1)

    def expand_back(self, y: Tensor) -> Tensor:
        y = y.reshape(self.picks.units, self.tokens, -1)
        return torch.bmm(y, self._own(self.site.b).transpose(1, 2))

    def weights(self, *, scaled: bool) -> Tensor:
        picks, given = self.picks, self.picks.weights
        if picks.by == "expert":
            given = given.reshape(-1)
        else:
            given = given.repeat_interleave(picks.each, dim=0)
        found = _of_pairs(self.site, given, self.experts, scaled=scaled)  # (m * k, r or 1)
        return found.expand(-1, self.rank).reshape(picks.units, 1, -1)

    def mixed(self, z: Tensor) -> Tensor:
        return z.view(*z.shape[:2], -1, self.rank).sum(-2).repeat(1, 1, self.picks.each)


PATHS: dict[Executor, type[Path]] = {"concat": Concat, "segmented": Segmented, "gather": Gather}


def _of_pairs(site: Site, given: Tensor, experts: Tensor, *, scaled: bool) -> Tensor:
    """Weights ``(P,)``, or of all ranks ``(P, R)``, to ``(P, r)``, or ``(P, 1)`` where ranks do not differ."""
    if given.dim() == 2:
        given = given.gather(1, site.grid.index_select(0, experts))
    elif site.even and not scaled:
        return given[:, None]
    elif site.even and site.one_scale is not None:
        return (given * site.one_scale)[:, None]
    else:
        given = given[:, None]
    return given * (site.grid_scale if scaled else site.own).index_select(0, experts)


def _looked_up(site: Site, tokens: Tensor, experts: Tensor) -> Tensor:
    """Of an embedding: ``(P, r)``, what each token's row has for an expert."""
    places = tokens[:, None] * site.rank + site.grid.index_select(0, experts)
    return site.a.reshape(-1).index_select(0, places.reshape(-1)).view(-1, max(site.ranks))


class _Shrink(torch.autograd.Function):
    """``Path.shrink``, whose gradient is ``shrink_back``; it keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, path: Path) -> Tensor:
        ctx.path = path
        return path.shrink(u)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, None]:
        wanted = ctx.needs_input_grad[0]
        return ctx.path.shrink_back(dz.contiguous()) if wanted else None, None


class _Expand(torch.autograd.Function):
    """``y`` and ``Path.expand``, whose gradient is ``expand_back``; it keeps no tensor."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor, path: Path) -> Tensor:
        ctx.path = path
        total = y.clone()
        path.expand(z, total)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        wanted = ctx.needs_input_grad[0]
        return ctx.path.expand_back(dy.contiguous()) if wanted else None, dy, None


def added(path: Path, u: Tensor, y: Tensor) -> Tensor:
    """``y`` and the change: with gradients to ``u``, ``y`` and the weights.

    Args:
        path: of the site and decision.
        u: ``(n, d)``, or ``(n,)`` tokens.
        y: ``(n, o)``, in the type of the factors.
    """
    shrink: Callable[[Tensor, Path], Tensor] = _Shrink.apply
    expand: Callable[[Tensor, Tensor, Path], Tensor] = _Expand.apply
    z = shrink(u, path) if path.site.kind == "linear" else path.shrink(u)
    return expand(path.between(z), y, path)
