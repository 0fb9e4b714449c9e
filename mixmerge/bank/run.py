"""From a decision to the executor that carries it out. Legend as in ``executors``."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mixmerge.bank.costs import Executor, cheapest
from mixmerge.bank.executors import PATHS, added
from mixmerge.bank.mix import Mix
from mixmerge.bank.picks import Shared, picks_of, state_of
from mixmerge.bank.records import Site
from mixmerge.bank.segmented import Compiled
from mixmerge.errors import Fault, MixmergeError

Choice = Literal["auto"] | Executor


class Again:
    """What a decision came to at a site while decoding, to be done again: the next token asks the same.

    Args:
        mix: the decision.
        y: an output that it was added to.
        compiled: what adds it.
    """

    __slots__ = ("_by", "_compiled", "_entries", "_how", "_shape", "_state", "_weights")

    def __init__(self, mix: Mix, y: Tensor, compiled: Compiled) -> None:
        self._weights, self._entries, self._by, self._how = mix.weights, mix.entries, mix.by, mix.how
        self._shape, self._state, self._compiled = y.shape, state_of(mix), compiled

    @classmethod
    def of(cls, site: Site, y: Tensor, mix: Mix, shared: Shared) -> Again | None:
        """Of a decision that ``run`` has just carried out; None if it was not by the compiled loop."""
        picks = shared.picks(mix, len(site.ranks))
        path = picks.paths.get((site, y.shape[1] if picks.by_row else 1, "auto", torch.is_grad_enabled()))
        return None if path is None or path.compiled is None else cls(mix, y, path.compiled)

    def add(self, u: Tensor, y: Tensor, mix: Mix) -> bool:
        """Add to ``y``, in place; False if it has to be looked at anew."""
        if (
            mix.weights is not self._weights
            or mix.entries is not self._entries
            or y.shape != self._shape
            or not u.dtype is y.dtype is torch.float32
            or (mix.by, mix.how) != (self._by, self._how)
            or torch.is_grad_enabled()
            or state_of(mix) != self._state
            or not y.is_contiguous()
        ):
            return False
        self._compiled(u, y)
        return True


def run(
    site: Site,
    u: Tensor,
    y: Tensor,
    mix: Mix,
    *,
    executor: Choice = "auto",
    shared: Shared | None = None,
    fresh: bool = False,
) -> Tensor:
    """``mix.apply``: arguments and result are described there.

    Raises:
        MixmergeError: u is of another number of rows than the mix; of one row it is every row's.
    """
    device = y.device.type
    # Executors write into what they made, of the factors' type; where that is autocast's own it changes nothing.
    if torch.is_autocast_enabled(device) and not y.dtype is site.b.dtype is torch.get_autocast_dtype(device):
        with torch.autocast(device, enabled=False):
            return run(site, u, y, mix, executor=executor, shared=shared, fresh=fresh)
    rows = mix.weights.shape[0]
    if y.shape[0] != rows:
        if y.shape[0] != 1:
            what = f"{site.name} sees {y.shape[0]} rows, and the decision is of {rows}"
            raise MixmergeError(Fault("bank", what, "Layers that see every token of every row"))
        u, y = u.expand(rows, *u.shape[1:]), y.expand(rows, -1, -1)
    experts = len(site.ranks)
    picks = picks_of(mix, experts) if shared is None else shared.picks(mix, experts)
    tokens = y.shape[1] if picks.by_row else 1
    if not (site.rank and y.numel() and picks.each and picks.used != ()):
        return y if fresh else y.clone()
    key = site, tokens, executor, torch.is_grad_enabled()
    path = picks.paths.get(key)
    if path is None:
        chosen = cheapest(site, picks, tokens) if executor == "auto" else executor
        path = PATHS[chosen](site, picks, tokens)
        if not picks.trained:
            picks.paths[key] = path
    if path.compiled is not None and fresh and y.dtype is u.dtype is site.b.dtype and y.is_contiguous():
        path.compiled(u, y)
        return y
    width = y.shape[-1]
    if site.kind == "linear":
        u = u.reshape(-1, u.shape[-1])
        u = u if u.dtype is site.a.dtype else u.to(site.a.dtype)
    else:
        u = u.reshape(-1)
    if torch.is_grad_enabled() and (mix.weights.requires_grad or u.requires_grad or y.requires_grad):
        if y.dtype is site.b.dtype:
            return added(path, u, y.reshape(-1, width)).view(y.shape)
        none = y.new_zeros(u.shape[0], width, dtype=site.b.dtype)
        return y + added(path, u, none).view(y.shape).to(y.dtype)
    if y.dtype is not site.b.dtype:
        change = y.new_zeros(u.shape[0], width, dtype=site.b.dtype)
        path.add_(u, change)
        return y + change.view(y.shape).to(y.dtype)
    total = y if fresh and y.is_contiguous() else y.clone(memory_format=torch.contiguous_format)
    path.add_(u, total.view(-1, width))
    return total
