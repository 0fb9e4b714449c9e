"""What an executor is, and the two that multiply with factors side by side: of all experts, or of a unit's own.

Legend as in ``executors``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mixmerge.bank.picks import Picks, spans_of
from mixmerge.bank.records import Site

if TYPE_CHECKING:
    from mixmerge.bank.segmented import Compiled


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
            z = looked_up(self.site, each, self.experts.repeat_interleave(self.tokens))
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
        found = of_pairs(self.site, given, self.experts, scaled=scaled)  # (m * k, r or 1)
        return found.expand(-1, self.rank).reshape(picks.units, 1, -1)

    def mixed(self, z: Tensor) -> Tensor:
        return z.view(*z.shape[:2], -1, self.rank).sum(-2).repeat(1, 1, self.picks.each)


def of_pairs(site: Site, given: Tensor, experts: Tensor, *, scaled: bool) -> Tensor:
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


def looked_up(site: Site, tokens: Tensor, experts: Tensor) -> Tensor:
    """Of an embedding: ``(P, r)``, what each token's row has for an expert."""
    places = tokens[:, None] * site.rank + site.grid.index_select(0, experts)
    return site.a.reshape(-1).index_select(0, places.reshape(-1)).view(-1, max(site.ranks))
