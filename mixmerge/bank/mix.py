"""How much of each expert every token gets at a site, and the plain definition of what that adds.

Legend as in ``records``; B rows, T tokens, k experts that a token gets something of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mixmerge.bank.records import Entry, Site

if TYPE_CHECKING:
    from mixmerge.bank.picks import Shared

By = Literal["expert", "rank"]
How = Literal["outputs", "factors"]


@dataclass(frozen=True, eq=False)
class Mix:
    """Weights of a batch at one site. One set for a row, or one for each of its tokens.

    Args:
        weights: ``(B, k)`` or ``(B, T, k)``.
        entries: of the same shape, int64: which experts the weights are of. No expert twice for a token. None: the
            weights are of all experts in their order, k = E; or, by rank, of all ranks, k = R.
        by: what a weight is of.
        how: ``outputs``: ``sum_e w_e s_e B_e A_e u``, the exact mixture of the experts' changes. ``factors``:
            ``(sum_f w_f s_f B_f) (sum_e w_e A_e) u``, with cross terms; all ranks that are not 0 have to be equal.
    """

    weights: Tensor
    entries: Tensor | None = None
    by: By = "expert"
    how: How = "outputs"

    @property
    def by_row(self) -> bool:
        return self.weights.dim() == 2


def dense(mix: Mix, experts: int) -> Tensor:
    """The weights of all experts, 0 where one is not among a token's: ``(B, 1 or T, E)``; by rank ``(.., R)``."""
    weights = mix.weights[:, None] if mix.by_row else mix.weights
    if mix.entries is None:
        return weights
    entries = mix.entries[:, None] if mix.by_row else mix.entries
    whole = weights.new_zeros(*weights.shape[:-1], experts)
    return whole.scatter(-1, entries, weights)


def by_rank(site: Site, mix: Mix) -> Tensor:
    """The weight of each rank: ``(B, 1 or T, R)``."""
    weights = dense(mix, len(site.ranks))
    return weights if mix.by == "rank" else weights[..., site.owners]


def change(site: Site, u: Tensor, mix: Mix) -> Tensor:
    """What a mixture adds to a site's output: the plain definition, which every executor is tested against.

    Args:
        site: of the bank.
        u: ``(B, T, d)``; of an embedding ``(B, T)`` tokens.
        mix: of the batch.

    Returns:
        ``(B, T, o)`` in the type of the factors.
    """
    g = by_rank(site, mix).to(site.b.dtype)  # (B, 1 or T, R)
    s = site.scale.to(site.b.dtype)
    z = site.a[u] if site.kind == "embedding" else u @ site.a.T  # (B, T, R)
    if mix.how == "outputs":
        return (z * (g * s)) @ site.b
    count = sum(1 for rank in site.ranks if rank)
    z = (z * g).view(*z.shape[:-1], count, -1).sum(-2)  # (B, T, r): one z of the mixed A
    spread = z.repeat(1, 1, count)  # (B, T, R)
    added: Tensor = (spread * (g * s)) @ site.b
    return added


def crossed(site: Site, weights: Tensor) -> Entry:
    """The factors of one mixture, mixed apart: ``(sum_f w_f s_f B_f) (sum_e w_e A_e)``.

    Args:
        site: whose ranks that are not 0 are equal.
        weights: ``(E,)``.
    """
    shares = weights.to(site.scale)[site.owners]  # (R,)
    count = sum(1 for rank in site.ranks if rank)
    b = (site.b.float() * (shares * site.scale)[:, None]).view(count, -1, site.b.shape[1]).sum(0)
    if site.kind == "embedding":
        a = (site.a.float() * shares).view(len(site.a), count, -1).sum(1)
    else:
        a = (site.a.float() * shares[:, None]).view(count, -1, site.a.shape[1]).sum(0)
    return Entry(a, b, 1.0, site.kind, site.tied)


def apply(
    site: Site,
    u: Tensor,
    y: Tensor,
    mix: Mix,
    *,
    executor: Literal["auto", "concat", "segmented", "gather"] = "auto",
    shared: Shared | None = None,
    fresh: bool = False,
) -> Tensor:
    """``y + change(site, u, mix)``. Gradients go to ``u``, ``y`` and the weights; the factors are frozen.

    Args:
        site, u, mix: as ``change``.
        y: ``(B, T, o)``, the base's output.
        executor: which of ``executors`` does it; ``auto``: the cheapest by ``costs``.
        shared: what sites of one model have in common; None: nothing.
        fresh: nobody else has ``y``: without gradients it may be changed and returned.
    """
    from mixmerge.bank.run import run

    return run(site, u, y, mix, executor=executor, shared=shared, fresh=fresh)


def fixed(weights: Tensor | list[float], rows: int) -> Mix:
    """The same weights ``(E,)`` for every row."""
    return Mix(torch.as_tensor(weights, dtype=torch.float32).expand(rows, -1))
