"""Random draws that are a function of a seed and a query's id, and their trimming. Q queries, E experts, K draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.choosing import Floats, Integers, blocks

_EACH = 4  # numbers in one digest of SHA-256


def uniforms(ids: Sequence[str], draws: int, *, seed: int, purpose: str) -> Floats:
    """``(Q, draws)`` numbers from 0 up to, not including, 1.

    Each is 53 bits of SHA-256 of seed, purpose, place and id: the same whatever else is in the batch and in
    whatever order. Queries with the same id get the same numbers.

    Args:
        ids: of the queries, Q.
        draws: numbers for each, 0 or more.
        seed: any integer.
        purpose: what they are for; other purposes get other numbers.
    """
    blocks = -(-draws // _EACH)
    starts = [hashlib.sha256(f"{seed}\0{purpose}\0{block}\0".encode()) for block in range(blocks)]
    digests = bytearray()
    for name in ids:
        encoded = name.encode("utf-8", "surrogatepass")
        for start in starts:
            one = start.copy()
            one.update(encoded)
            digests += one.digest()
    words = np.frombuffer(bytes(digests), ">u8").reshape(len(ids), blocks * _EACH)[:, :draws]
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def likelihoods(score: Floats, temperature: float) -> Floats:
    """``(Q, E)`` chances of a draw, in proportion to ``score ** (1 / temperature)``; rows sum to 1.

    Experts that score 0 or less have none. Where no expert scores more than 0, all are moved up until the worst
    has 1.

    Source: Symbolic-MoE (Chen et al., 2025, arXiv 2503.05641), recruitment of experts as in its released code, with
    temperature 0.5.
    There the power is taken of the global one of two factors, here of the whole score.

    Args:
        score: ``(Q, E)``, minus infinity for experts that may not be drawn; one of each row is finite.
        temperature: above 0. Near 0 only the best is drawn; when large all alike.
    """
    able, positive = np.isfinite(score), score > 0
    some = positive.any(axis=1, keepdims=True)
    worst = np.where(able, score, np.inf).min(axis=1, keepdims=True)
    moved = np.where(some, score, score - worst + 1)
    usable = np.where(some, positive, able)
    logs = np.where(usable, np.log(np.where(usable, moved, 1.0)), -np.inf)
    chance = np.exp((logs - logs.max(axis=1, keepdims=True)) / temperature)
    return np.asarray(chance / chance.sum(axis=1, keepdims=True))


def draw(chance: Floats, uniform: Floats) -> Integers:
    """``(Q, K)`` places, drawn with replacement: of row q, e with probability ``chance[q, e]`` over its sum.

    Args:
        chance: ``(Q, E)``, 0 or more, each row with one above 0. Columns in an order that does not depend on how
            the experts were given, or the draws would.
        uniform: ``(Q, K)`` from 0 to below 1.
    """
    summed = np.cumsum(chance, axis=1)
    total = summed[:, -1]
    # Rounding may lift the product to the total, which lies beyond the last expert with a chance.
    sought = np.minimum(uniform * total[:, None], np.nextafter(total, 0)[:, None])
    picks = np.empty(uniform.shape, np.int64)
    for k in range(uniform.shape[1]):
        picks[:, k] = (summed <= sought[:, k, None]).sum(axis=1)
    return picks


def trim(
    picks: Integers,
    *,
    able: NDArray[np.bool_],
    share: float,
    ids: Sequence[str],
    tasks: Sequence[str],
    seed: int,
) -> Integers:
    """The draws, with those of experts that hardly anybody drew drawn again.

    For each task: an expert with less than ``share`` of the draws is removed, and each draw of it becomes a draw
    among the others in proportion to how often they were drawn. If all have less, none is removed.

    Source: Symbolic-MoE (Chen et al., 2025, arXiv 2503.05641), recruitment of experts, with a share of 0.05; its
    released code defines this and never calls it.

    Args:
        picks: ``(Q, K)`` places.
        able: ``(Q, E)`` the experts that a query may go to; all that it went to are.
        share: from 0 to below 1.
        ids, tasks: of the queries, Q each.
        seed: of the new draws, keyed by query as the first ones.
    """
    kept, experts = picks.copy(), able.shape[1]
    _, group = np.unique(np.asarray(tasks, dtype=object), return_inverse=True)
    for g in range(int(group.max(initial=-1)) + 1):
        rows = np.flatnonzero(group == g)
        count = np.bincount(picks[rows].ravel(), minlength=experts)
        stays = count >= share * count.sum()
        if stays.all() or not stays.any():
            continue
        rows = rows[~stays[picks[rows]].all(axis=1)]
        for part in blocks(len(rows), experts):
            some = rows[part]
            chance = np.where(stays & able[some], count, 0).astype(np.float64)
            some, chance = some[chance.any(axis=1)], chance[chance.any(axis=1)]
            uniform = uniforms([ids[q] for q in some], picks.shape[1], seed=seed, purpose="trim")
            kept[some] = np.where(stays[picks[some]], picks[some], draw(chance, uniform))
    return kept
