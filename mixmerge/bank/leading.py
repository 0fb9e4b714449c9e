"""The leading singular vectors of a matrix whose whole decomposition nobody needs.

Legend: a matrix ``(k, n)``, k the smaller side; r vectors that are wanted, l that are followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below, the whole decomposition takes no time.
_SMALLEST = 256
_SHARE = 6  # of k that may be followed at most, as 1 / so much
_MORE = 16  # vectors that are followed beside those wanted, at least
_ROUNDS = 12
# What may be missing of the energy that could be held, as a share of the energy that is not: the error is then within
# 0.3 % of the least there is.
_MISSING = 5e-3
_EXACT = 1e-13  # a share of all energy that float64 sums do not see
_BLOCK = 1 << 22  # entries that are taken to float64 at a time


def leading(thin: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, float] | None:
    """The first singular vectors and values, by subspace iteration from a drawn start, in float64.

    Each round can only add to the energy (the sum of squared singular values) that is held. It ends when what further
    rounds would add, estimated as a geometric series from the last two gains, is below half a percent of the energy
    that is not held.

    Source: Halko, Martinsson and Tropp, "Finding Structure with Randomness", 2011, algorithms 4.4 and 5.1.

    Deviations: as many rounds as the estimate asks for, instead of a number that is given. The start is the same for
    every matrix of one shape, so the result depends on the matrix alone.

    Args:
        thin: ``(k, n)``, k at most n, finite.
        count: r, 1 or more.

    Returns:
        ``(k, r)``, ``(r,)`` and ``(n, r)``, and all energy of the matrix; None where this does not pay, or did not end.
    """
    rows, columns = thin.shape
    followed = count + max(_MORE, count // 2)
    if rows < _SMALLEST or followed * _SHARE > rows:
        return None
    total = sum(float(part.double().square().sum()) for _, part in _blocks(thin))
    start = torch.randn(columns, followed, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    near = torch.linalg.qr(_times(thin, start))[0]  # (k, l)
    gain, held = 0.0, 0.0
    for done in range(_ROUNDS):
        far = _times_turned(thin, near)  # (n, l)
        squares, turn = torch.linalg.eigh(far.T @ far)  # ascending
        now = float(squares[-count:].sum())
        before, gain, held = gain, max(now - held, 0.0), now
        left = max(total - held, 0.0)
        if left <= _EXACT * total or (done > 1 and _rest(gain, before) <= _MISSING * left):
            best = turn[:, -count:].flip(1)  # (l, r)
            values = squares[-count:].flip(0).clamp_min(0).sqrt()
            return near @ best, values, (far @ best) / values.clamp_min(1e-300), total
        near = torch.linalg.qr(_times(thin, far))[0]
    return None


def _rest(gain: float, before: float) -> float:
    """What is still to come after two gains, if each is the same share of the one before."""
    return gain * gain / (before - gain) if gain < 0.95 * before else (0.0 if gain == 0 else float("inf"))


def _blocks(thin: Tensor) -> list[tuple[slice, Tensor]]:
    step = max(1, _BLOCK // thin.shape[1])
    return [(slice(at, at + step), thin[at : at + step]) for at in range(0, len(thin), step)]


def _times(thin: Tensor, right: Tensor) -> Tensor:
    """``thin @ right``: ``(k, l)``."""
    return torch.cat([part.double() @ right for _, part in _blocks(thin)])


def _times_turned(thin: Tensor, left: Tensor) -> Tensor:
    """``thin.T @ left``: ``(n, l)``."""
    total = left.new_zeros(thin.shape[1], left.shape[1])
    for rows, part in _blocks(thin):
        total.addmm_(part.double().T, left[rows])
    return total
