"""How strongly the experts shift a base, matched token by token: the base moves as far as the reference did.

Legend: N rows of logits, V entries of the vocabulary, T experts. P is the base's distribution, Q the reference's, Q_t
an expert's, D_t = log Q_t - log Q its shift, and P~(alpha) is proportional to P exp(sum_t alpha_t D_t).

For one expert KL(P~||P) = alpha mu(alpha) - log Z(alpha) and KL(P||P~) = log Z(alpha) - alpha mu(0), with mu the mean
of D under P~. Both grow with alpha >= 0; their derivatives are alpha Var(D) and mu(alpha) - mu(0). So one pass of sums
gives values and derivatives, and two residuals can be solved by Gauss-Newton instead of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = 2.0  # of a matched alpha
START = 1.0  # proxy tuning's alpha
EVALUATIONS = 3
JOINTLY = 2  # of each expert by itself, and then of all together
_TINY = 1e-12
_CACHED = 210_000  # logits that are passed over at once on a CPU: what they take stays in its caches


@dataclass(frozen=True)
class Found:
    """Matched strengths.

    Args:
        alphas: ``(N, T)``.
        value: ``(N,)``: of the objective there, as ``objective`` has it.
        evaluations: passes over the distributions that each search took.
    """

    alphas: Tensor
    value: Tensor
    evaluations: int


@dataclass(frozen=True)
class Apart:
    """KL(P~||P) and KL(P||P~) at some alpha, both ``(N,)``."""

    forward: Tensor
    backward: Tensor


@dataclass(frozen=True)
class Moments(Apart):
    """With their gradients: ``(N,)`` and, of several experts, ``(N, T)``."""

    d_forward: Tensor
    d_backward: Tensor


class Path:
    """P~ along the shift of one expert.

    Args:
        logp: ``(N, V)`` log-probabilities of the base; minus infinity for what is cut.
        delta: ``(N, V)`` the shift, finite and of mean 0 under the base.
    """

    def __init__(self, logp: Tensor, delta: Tensor) -> None:
        self._logp, self._delta = logp, delta

    def at(self, alpha: Tensor) -> Moments:
        """At ``(N,)`` alphas, by one softmax: the means of D and D^2 under P~, and what it was divided by."""
        log_z, mean, square = self._sums(alpha, 2)
        variance = (square - mean * mean).clamp(min=0)
        return Moments(alpha * mean - log_z, log_z, alpha * variance, mean)

    def apart(self, alpha: Tensor) -> Apart:
        """``at`` without the derivatives, in fewer passes."""
        log_z, mean = self._sums(alpha, 1)
        return Apart(alpha * mean - log_z, log_z)

    def _sums(self, alpha: Tensor, powers: int) -> list[Tensor]:
        """log Z, and the means under P~ of D and of its powers up to this one."""
        found = []
        for some in blocks(self._logp):
            delta = self._delta[some]
            weights, log_z = _tilted(torch.addcmul(self._logp[some], delta, alpha[some, None]))
            # mu(0) is 0
            found.append([log_z, *(weights.mul_(delta).sum(dim=-1) for _ in range(powers))])
        return joined(found)


def blocks(rows: Tensor) -> list[slice]:
    """``(N, V)`` by rows that are passed over at once."""
    count, width = rows.shape
    step = max(1, _CACHED // width) if rows.device.type == "cpu" else max(1, count)
    return [slice(at, at + step) for at in range(0, count, step)]


def joined(found: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """What was found block by block, of all rows."""
    return list(found[0]) if len(found) == 1 else [torch.cat(one) for one in zip(*found, strict=True)]


def centred(logp: Tensor, deltas: Sequence[Tensor]) -> list[Tensor]:
    """The ``(N, V)`` shifts less their means under P: the same P~, and small divergences are no difference of large."""
    found = []
    for some in blocks(logp):
        share = torch.softmax(logp[some], dim=-1)
        found.append([one[some] - (share * one[some]).sum(dim=-1, keepdim=True) for one in deltas])
    return joined(found)


def _tilted(logits: Tensor) -> tuple[Tensor, Tensor]:
    """P~ ``(N, V)`` and log Z ``(N,)``: the likeliest token's logit is its log-probability plus log Z."""
    weights = torch.softmax(logits, dim=-1)
    return weights, logits.amax(dim=-1) - weights.amax(dim=-1).log()


def solve(path: Path, forward: Tensor, backward: Tensor, *, evaluations: int = EVALUATIONS) -> Found:
    """The alpha in [0, 2] with the least (KL(P~||P) - forward)^2 + (KL(P||P~) - backward)^2, for each row.

    Gauss-Newton from 1. The sign of the objective's slope keeps a bracket; a step that leaves it goes to its middle.
    The best alpha that was evaluated is taken.

    Args:
        path: of one expert.
        forward, backward: ``(N,)``, 0 or more.
        evaluations: of the path, 1 or more.
    """
    alpha = torch.full_like(forward, START)
    low, high = torch.zeros_like(alpha), torch.full_like(alpha, LARGEST)
    best, least = alpha, torch.full_like(alpha, torch.inf)
    for turn in range(evaluations):
        here = path.at(alpha) if turn < evaluations - 1 else path.apart(alpha)
        ahead, behind = here.forward - forward, here.backward - backward
        value = ahead * ahead + behind * behind
        best = torch.where(value < least, alpha, best)
        least = torch.minimum(value, least)
        if not isinstance(here, Moments):
            break
        slope = ahead * here.d_forward + behind * here.d_backward
        curvature = here.d_forward * here.d_forward + here.d_backward * here.d_backward
        low, high = torch.where(slope < 0, alpha, low), torch.where(slope > 0, alpha, high)
        step = torch.where(curvature > _TINY, slope / curvature.clamp(min=_TINY), 0)
        wanted = (alpha - step).clamp(max=LARGEST)
        astray = ((slope > 0) & (wanted <= low)) | ((slope < 0) & (wanted >= high) & (high < LARGEST))
        alpha = torch.where(astray, (low + high) / 2, wanted)
    return Found(best[:, None], least, evaluations)


def match_one(
    logp: Tensor,
    deltas: Sequence[Tensor],
    forward: Tensor,
    backward: Tensor,
    *,
    evaluations: int = EVALUATIONS,
) -> Found:
    """One expert shifts each row, the others do not: the one that gets nearest to what all did to the reference.

    Source: Fan et al., Dynamic Logits Fusion (NeurIPS 2024), section 3.3: the minimum over alpha in [0, 2] of
    sum_t [KL(P~||P) - KL(Q_t||Q)]^2 + [KL(P||P~) - KL(Q||Q_t)]^2 with at most one alpha_t that is not 0.

    Args:
        logp: ``(N, V)``.
        deltas: T shifts, each ``(N, V)``.
        forward, backward: ``(N, T)``: KL(Q_t||Q) and KL(Q||Q_t).
        evaluations: of each expert.

    Deviations: Gauss-Newton where the paper tries up to 20 values (``match_grid``). Of equal experts the first.
    """
    wanted, rest = _means(forward, backward)
    found = [solve(Path(logp, one), *wanted, evaluations=evaluations) for one in centred(logp, deltas)]
    values = torch.stack([one.value for one in found], dim=1)  # (N, T)
    least, which = values.min(dim=1)
    chosen = torch.cat([one.alphas for one in found], dim=1)
    alphas = torch.zeros_like(chosen).scatter(1, which[:, None], chosen.gather(1, which[:, None]))
    return Found(alphas, len(deltas) * least + rest, evaluations)


def match_grid(
    logp: Tensor, deltas: Sequence[Tensor], forward: Tensor, backward: Tensor, *, points: int = 20
) -> Found:
    """As ``match_one`` by trying ``points`` values from 0 to 2, as published."""
    wanted, rest = _means(forward, backward)
    alphas = torch.zeros(len(logp), len(deltas), dtype=logp.dtype, device=logp.device)
    least = torch.full_like(wanted[0], torch.inf)
    for at, delta in enumerate(centred(logp, deltas)):
        path = Path(logp, delta)
        for alpha in torch.linspace(0, LARGEST, points).tolist():
            there = path.apart(torch.full_like(least, alpha))
            value = (there.forward - wanted[0]) ** 2 + (there.backward - wanted[1]) ** 2
            better = value < least
            least = torch.where(better, value, least)
            tried = torch.zeros_like(alphas)
            tried[:, at] = alpha
            alphas = torch.where(better[:, None], tried, alphas)
    return Found(alphas, len(deltas) * least + rest, points)


def match_joint(
    logp: Tensor,
    deltas: Sequence[Tensor],
    forward: Tensor,
    backward: Tensor,
    *,
    damping: float = 1.0,
    evaluations: int = JOINTLY,
) -> Found:
    """All experts shift each row together: the published objective, without its restriction to one of them.

    The objective has only two residuals that depend on alpha, for T unknowns. What it leaves open is taken from the
    experts by themselves: the minimum over alpha in [0, 2]^T of

        sum_t [KL(P~||P) - KL(Q_t||Q)]^2 + [KL(P||P~) - KL(Q||Q_t)]^2 + damping * |alpha - alpha*|^2

    where alpha*_t matches expert t alone to its own two divergences. Levenberg-Marquardt from alpha*; the gradients are
    covariances under P~: Cov(D) alpha, and the means of D less those under P. With one expert it is ``match_one``.

    Source: the objective as in ``match_one``; damping and search are ours.

    Args:
        logp, deltas, forward, backward: as ``match_one`` takes them.
        damping: nats squared, above 0; the larger, the nearer to alpha*.
        evaluations: of each expert alone, and then of all together; 2 or more.
    """
    if len(deltas) == 1:
        return match_one(logp, deltas, forward, backward)
    deltas = centred(logp, deltas)
    pairs = zip(deltas, forward.unbind(1), backward.unbind(1), strict=True)
    alone = [solve(Path(logp, one), *wanted, evaluations=evaluations) for one, *wanted in pairs]
    anchor = torch.cat([one.alphas for one in alone], dim=1)  # (N, T)
    wanted, rest = _means(forward, backward)
    search = _Joint(deltas, logp, anchor, wanted, damping)
    return search.run(evaluations, rest)


class _Joint:
    """Levenberg-Marquardt over all experts' alphas, row by row; a step that makes a row worse is taken back."""

    def __init__(
        self,
        deltas: Sequence[Tensor],
        logp: Tensor,
        anchor: Tensor,
        wanted: tuple[Tensor, Tensor],
        damping: float,
    ) -> None:
        self._deltas, self._logp, self._anchor = deltas, logp, anchor
        self._wanted, self._damping = wanted, damping

    def run(self, evaluations: int, rest: Tensor) -> Found:
        count = self._anchor.shape[1]
        alphas = best = self._anchor
        least = torch.full_like(rest, torch.inf)
        careful = torch.zeros_like(rest)  # beside the damping, where steps were too long
        hessian, slope = self._logp.new_zeros(len(rest), count, count), torch.zeros_like(best)
        for turn in range(evaluations):
            passed = moments if turn < evaluations - 1 else apart
            here = passed(self._logp, self._deltas, alphas)
            ahead, behind = here.forward - self._wanted[0], here.backward - self._wanted[1]
            away = alphas - self._anchor
            value = count * (ahead**2 + behind**2) + self._damping * (away**2).sum(dim=1)
            better = value < least
            best, least = torch.where(better[:, None], alphas, best), torch.where(better, value, least)
            if not isinstance(here, Moments):
                break
            # A row of a masked place may be nan, and a solver refuses the batch for it.
            gradients = torch.stack([here.d_forward, here.d_backward], dim=1).nan_to_num(0, 0, 0)  # (N, 2, T)
            residuals = torch.stack([ahead, behind], dim=1)[:, None]  # (N, 1, 2)
            new_slope = count * (residuals.nan_to_num(0, 0, 0) @ gradients)[:, 0] + self._damping * away
            slope = torch.where(better[:, None], new_slope, slope)
            hessian = torch.where(better[:, None, None], count * gradients.mT @ gradients, hessian)
            scale = hessian.diagonal(dim1=1, dim2=2).amax(dim=1)
            careful = torch.where(better, careful / 4, torch.maximum(4 * careful, scale + self._damping))
            held = torch.eye(count, dtype=hessian.dtype, device=hessian.device)
            damped = hessian + (self._damping + careful)[:, None, None] * held
            step = torch.linalg.solve(damped, slope)
            alphas = (best - step).clamp(0, LARGEST)
        matched = least - self._damping * ((best - self._anchor) ** 2).sum(dim=1)
        return Found(best, matched + rest, 2 * evaluations)


def moments(logp: Tensor, deltas: Sequence[Tensor], alphas: Tensor) -> Moments:
    """P~ under all experts: its divergences ``(N,)`` and their gradients ``(N, T)``.

    Args:
        logp: ``(N, V)``.
        deltas: T of ``(N, V)``, of mean 0 under P.
        alphas: ``(N, T)``.
    """
    found = []
    for some in blocks(logp):
        weights, push, log_z = _pushed(logp, deltas, alphas, some)
        means = torch.stack([(weights * one[some]).sum(dim=-1) for one in deltas], dim=1)  # (n, T)
        pushed = weights.mul_(push)
        products = torch.stack([(pushed * one[some]).sum(dim=-1) for one in deltas], dim=1)
        found.append([log_z, pushed.sum(dim=-1), means, products])
    log_z, mean_push, means, products = joined(found)
    covariance = products - means * mean_push[:, None]  # Cov(D) alpha
    return Moments(mean_push - log_z, log_z, covariance, means)


def apart(logp: Tensor, deltas: Sequence[Tensor], alphas: Tensor) -> Apart:
    """``moments`` without the gradients, in fewer passes."""
    found = []
    for some in blocks(logp):
        weights, push, log_z = _pushed(logp, deltas, alphas, some)
        found.append([log_z, weights.mul_(push).sum(dim=-1)])
    log_z, mean_push = joined(found)
    return Apart(mean_push - log_z, log_z)


def _pushed(
    logp: Tensor, deltas: Sequence[Tensor], alphas: Tensor, some: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows P~ and what all experts add to log P, both ``(n, V)``, and log Z ``(n,)``."""
    push = deltas[0][some] * alphas[some, :1]
    for at, one in enumerate(deltas[1:], 1):
        push.addcmul_(one[some], alphas[some, at : at + 1])
    weights, log_z = _tilted(logp[some] + push)
    return weights, push, log_z


def objective(
    logp: Tensor, deltas: Sequence[Tensor], alphas: Tensor, forward: Tensor, backward: Tensor
) -> Tensor:
    """``(N,)``: the published sum of squares at ``(N, T)`` alphas; ``forward`` and ``backward`` as in ``match_one``."""
    there = apart(logp, centred(logp, deltas), alphas)
    ahead, behind = there.forward[:, None] - forward, there.backward[:, None] - backward
    return (ahead**2 + behind**2).sum(dim=1)


def _means(forward: Tensor, backward: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """What the two residuals are to, and what of the objective does not depend on alpha: all ``(N,)``.

    sum_t (x - a_t)^2 is T (x - mean a)^2 plus the sum of squares about the mean.
    """
    means = forward.mean(dim=1), backward.mean(dim=1)
    rest = ((forward - means[0][:, None]) ** 2 + (backward - means[1][:, None]) ** 2).sum(dim=1)
    return means, rest
