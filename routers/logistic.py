"""Logistic regression of scores between 0 and 1. N training queries, E experts, D dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.errors import Fault, MixmergeError
from mixmerge.routers.base import Embedding, Options, Prediction, State, Training
from mixmerge.routers.linear import Frame, Linear, LinearRouter

Floats = NDArray[np.float64]
# Strongest first, as the search stops when weaker ones do worse.
PENALTIES = (1e4, 1e3, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
_ENOUGH = 5.0  # wins and losses that a recalibration needs


def sigmoid(value: Floats) -> Floats:
    """``1 / (1 + exp(-value))`` without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * value)), np.float64)


@dataclass(frozen=True, eq=False)
class Fitted:
    """Coefficients ``(D + 1,)``, the intercept last, and the second derivatives of the loss there."""

    weights: Floats
    hessian: Floats


def logistic(
    design: Floats, label: Floats, *, alpha: float, prior: float = 1.0, start: Floats | None = None
) -> Fitted:
    """Minimise cross-entropy plus ``alpha / 2`` times the squared coefficients, by Newton's method.

    A label between 0 and 1 counts as the two rows it stands for, a 1 with its weight and a 0 with the rest. The
    intercept has no penalty; ``prior`` observations of one half at the origin keep it finite where all labels are
    alike.

    Args:
        design: ``(N, D + 1)``, the last column ones.
        label: ``(N,)`` in 0..1.
        alpha: above 0.
        prior: 0 or more.
        start: coefficients to begin from.
    """
    penalty = np.append(np.full(design.shape[1] - 1, alpha), 0.0)
    weights = np.zeros(design.shape[1]) if start is None else start

    def loss(at: Floats) -> float:
        value = design @ at
        fit = np.logaddexp(0.0, value).sum() - label @ value
        return float(fit + 0.5 * penalty @ at**2 + prior * (np.logaddexp(0.0, at[-1]) - 0.5 * at[-1]))

    now = loss(weights)
    for _ in range(100):
        chance, rest = sigmoid(design @ weights), float(sigmoid(weights[-1]))
        gradient = design.T @ (chance - label) + penalty * weights
        gradient[-1] += prior * (rest - 0.5)
        scaled = design * np.sqrt(chance * (1 - chance))[:, None]
        hessian = scaled.T @ scaled + np.diag(penalty)
        hessian[-1, -1] += prior * rest * (1 - rest)
        if np.abs(gradient).max() <= 1e-9 * len(design):
            break
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while (after := loss(weights - size * step)) > now and size > 1e-6:
            size /= 2
        if after >= now:  # as near as the floats of the loss can tell
            break
        weights, now = weights - size * step, after
    return Fitted(weights, hessian)


def left_out(design: Floats, label: Floats, fitted: Fitted) -> Floats:
    """``(N,)`` log-odds of every row, had it been left out: one Newton step from the fit with all rows.

    Source: Rahnama Rad and Maleki (2020), A scalable estimate of the out-of-sample prediction error via approximate
    leave-one-out cross-validation, arXiv 1801.10243.
    """
    value = design @ fitted.weights
    chance = sigmoid(value)
    reach = np.einsum("nd,nd->n", design, np.linalg.solve(fitted.hessian, design.T).T)
    return np.asarray(
        value + reach * (chance - label) / np.maximum(1 - reach * chance * (1 - chance), 1e-6), np.float64
    )


def choose(design: Floats, label: Floats, *, alpha: float | None) -> tuple[float, Fitted, Floats]:
    """The penalty with the least cross-entropy of rows left out, its fit, and their log-odds.

    From the strongest penalty on, until two weaker ones in a row are worse.
    """
    best: tuple[float, float, Fitted, Floats] | None = None
    start, worse = None, 0
    for penalty in PENALTIES if alpha is None else (alpha,):
        fitted = logistic(design, label, alpha=penalty, start=start)
        start, odds = fitted.weights, left_out(design, label, fitted)
        loss = float(np.logaddexp(0.0, odds).mean() - label @ odds / len(odds))
        if best is None or loss < best[0] * (1 - 1e-9):
            best, worse = (loss, penalty, fitted, odds), 0
        elif (worse := worse + 1) == 2:
            break
    if best is None:
        raise ValueError("no penalty was tried")
    return best[1:]


def recalibrate(odds: Floats, label: Floats) -> tuple[float, float]:
    """Slope and shift that make log-odds calibrated (Platt), with a normal prior of variance 1 around 1 and 0.

    A penalised fit is too timid, and this is what takes it back. ``(1, 0)`` with fewer than five wins or losses;
    slope 0 where the odds point the wrong way.
    """
    wins = float(label.sum())
    if min(wins, len(label) - wins) < _ENOUGH:
        return 1.0, 0.0
    design = np.stack([odds, np.ones_like(odds)], axis=1)
    at = np.array([1.0, 0.0])
    for _ in range(50):
        chance = sigmoid(design @ at)
        gradient = design.T @ (chance - label) + at - [1.0, 0.0]
        step = np.linalg.solve((design * (chance * (1 - chance))[:, None]).T @ design + np.eye(2), gradient)
        at = at - step / max(1.0, float(np.abs(step).max()))
        if np.abs(step).max() < 1e-10:
            break
    if at[0] < 0:
        return 0.0, float(np.log(wins / (len(label) - wins)))
    return float(at[0]), float(at[1])


class LogisticOptions(Options):
    """``alpha``: the penalty, above 0; None chooses one for each expert."""

    alpha: float | None = Field(None, gt=0)


class LogisticRouter(LinearRouter):
    """Logistic regression of each expert's score on the embedding, calibrated on rows left out.

    Scores between 0 and 1 count as soft labels. The penalty and the recalibration come from approximate
    leave-one-out. The standard deviation is that of Laplace's approximation, carried through the logistic function
    by its slope; its covariance is kept by its diagonal along the axes of all the queries (and exactly between
    intercept and coefficients).
    """

    kind = "logistic"
    options_type = LogisticOptions
    options: LogisticOptions

    def learn(self, data: Training) -> State:
        _bounded(data)
        return super().learn(data)

    def extend(self, state: State, data: Training) -> State:
        _bounded(data)
        return super().extend(state, data)

    def solve(self, embedding: Embedding, score: Floats, frame: Frame) -> Linear:
        size, experts = embedding.shape[1], score.shape[1]
        wide, flat = np.empty((3, size, experts)), np.empty((3, experts))
        for e in range(experts):
            rows = ~np.isnan(score[:, e])
            x = embedding[rows].astype(np.float64) - frame.center
            design = np.concatenate([x, np.ones((len(x), 1))], axis=1)
            alpha, fitted, odds = choose(design, score[rows, e], alpha=self.options.alpha)
            slope, shift = recalibrate(odds, score[rows, e])
            covariance = np.linalg.inv(fitted.hessian) * slope**2
            across = np.einsum("dk,de,ek->k", frame.axes, covariance[:-1, :-1], frame.axes, optimize=True)
            lean = -(frame.axes.T @ covariance[:-1, -1])
            wide[..., e] = slope * fitted.weights[:-1], across, lean
            flat[..., e] = shift + slope * fitted.weights[-1], covariance[-1, -1], alpha
        return Linear(wide[0], flat[0], wide[1], wide[2], flat[1], flat[2])

    def link(self, value: Floats, variance: Floats) -> Prediction:
        chance = sigmoid(value)
        return Prediction(chance, chance * (1 - chance) * np.sqrt(variance))


def _bounded(data: Training) -> None:
    outside = np.asarray((data.score < 0) | (data.score > 1), np.bool_)
    if outside.any():
        names = [name for e, name in enumerate(data.experts) if outside[:, e].any()]
        raise MixmergeError(
            Fault(
                "router logistic",
                f"scores of {', '.join(names)} are not between 0 and 1",
                run="Divide them by their maximum, or use the router ridge",
            )
        )
