"""Ridge regression of score vectors. N training queries, Q queries, E experts, D dimensions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.routers.base import Embedding, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.shrinkage import moments
from mixmerge.routers.strengths import moves

Floats = NDArray[np.float64]
# Strongest first: where penalties do equally well, the strongest is taken.
PENALTIES = tuple(10.0 ** (half / 2) for half in range(12, -5, -1))
_LEAST_NOISE = 1e-4  # variance of a score around its line where no expert's is known


@dataclass(frozen=True, eq=False)
class Frame:
    """Coordinates that all experts share: the mean of the training queries ``(D,)``, and their axes ``(D, D)``."""

    center: Floats
    axes: Floats

    @classmethod
    def of(cls, embedding: Embedding) -> Frame:
        """The axes are the eigenvectors of the Gram matrix of the centred embeddings."""
        rows = embedding.astype(np.float64)
        center = rows.mean(axis=0)
        return cls(center, np.linalg.eigh((rows - center).T @ (rows - center))[1])

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {"center": _single(self.center), "axes": _single(self.axes)}


@dataclass(frozen=True, eq=False)
class Linear:
    """E linear functions of a query, and the variance of what they say.

    With ``u`` the query less the frame's center and ``z`` the same along its axes: the value is
    ``u @ coef + intercept`` and its variance ``z**2 @ spread - 2 * z @ lean + offset``.

    Args:
        coef, spread, lean: ``(D, E)``.
        intercept, offset, alpha: ``(E,)``; ``alpha`` is the penalty.
    """

    coef: Floats
    intercept: Floats
    spread: Floats
    lean: Floats
    offset: Floats
    alpha: Floats

    def plus(self, other: Linear) -> Linear:
        """The sum of two that do not know of each other: values and variances add. Keeps this one's ``alpha``."""
        return Linear(
            self.coef + other.coef,
            self.intercept + other.intercept,
            self.spread + other.spread,
            self.lean + other.lean,
            self.offset + other.offset,
            self.alpha,
        )


def ridge(embedding: Embedding, score: Floats, frame: Frame, *, alpha: float | None = None) -> Linear:
    """Least squares of every expert's known scores with a penalty on the squared coefficients, none on the intercept.

    The penalty of an expert is the one of ``PENALTIES`` with the least squared leave-one-out error, in closed
    form: residual over one less the leverage. Experts with scores on the same queries share one eigendecomposition;
    with each on its own, it takes E of them, ``O(E N D^2)``.

    The variance is that of the mean of Bayes' posterior under the same penalty, with the leave-one-out error as
    noise. Its covariance is kept by its diagonal along the frame's axes: exact for an expert with a score on every
    query of the frame, near for one that misses some.

    Args:
        embedding: ``(N, D)``.
        score: ``(N, E)``, NaN where missing; each expert has at least one.
        frame: of these queries, or of those the other experts were fitted on.
        alpha: one penalty for all, above 0.

    Source: Hoerl and Kennard (1970), Ridge regression: biased estimation for nonorthogonal problems; leave-one-out:
    Allen (1974), The relationship between variable selection and data augmentation and a method for prediction.
    """
    size, experts = embedding.shape[1], score.shape[1]
    wide, flat = np.empty((3, size, experts)), np.empty((4, experts))
    known, same = ~np.isnan(score), dict[bytes, list[int]]()
    for e in range(experts):
        same.setdefault(known[:, e].tobytes(), []).append(e)
    for columns in same.values():
        rows = known[:, columns[0]]
        x = embedding[rows].astype(np.float64) - frame.center
        wide[..., columns], flat[..., columns] = _solve(
            x, score[rows][:, columns], frame.axes, PENALTIES if alpha is None else (alpha,)
        )
    coef, spread, lean = wide
    intercept, offset, chosen, noise = flat
    usable = (known.sum(axis=0) > 2) & (noise > 1e-12)
    noise = np.where(usable, noise, noise[usable].mean() if usable.any() else _LEAST_NOISE)
    return Linear(coef, intercept, noise * spread, noise * lean, noise * offset, chosen)


def _solve(x: Floats, y: Floats, axes: Floats, penalties: Sequence[float]) -> tuple[Floats, Floats]:
    """Experts that share their queries: coefficients, spread and lean; intercept, offset, penalty and noise."""
    center, level = x.mean(axis=0), y.mean(axis=0)
    x, y = x - center, y - level
    size, own = np.linalg.eigh(x.T @ x)
    size = np.maximum(size, 0.0)
    turned = x @ own
    along = turned.T @ y  # (D, E)
    alpha, noise = _choose(turned, size, along, y, penalties)
    kept = 1.0 / (size[:, None] + alpha)
    coef = own @ (along * kept)
    spread = (axes.T @ own) ** 2 @ kept
    at = axes.T @ center
    offset = 1.0 / len(y) + at**2 @ spread
    wide = np.stack([coef, spread, spread * at[:, None]])
    return wide, np.stack([level - center @ coef, offset, alpha, noise])


def _choose(
    turned: Floats, size: Floats, along: Floats, y: Floats, penalties: Sequence[float]
) -> tuple[Floats, Floats]:
    """``(E,)`` penalty with the least mean squared leave-one-out error, and that error."""
    alpha, least = np.full(y.shape[1], penalties[0]), np.full(y.shape[1], np.inf)
    squares = turned**2
    for penalty in penalties:
        kept = 1.0 / (size + penalty)
        left = np.maximum(1.0 - 1.0 / len(y) - squares @ kept, 1e-9)  # 1 - leverage
        error = (((y - turned @ (along * kept[:, None])) / left[:, None]) ** 2).mean(axis=0)
        better = error < least * (1 - 1e-9)
        alpha, least = np.where(better, penalty, alpha), np.where(better, error, least)
    return alpha, least


class LinearRouter(Router):
    """What ridge and logistic regression share: a frame, a linear function for each expert, and what is saved."""

    per_expert = ("coef", "intercept", "spread", "lean", "offset", "alpha", "average")

    @property
    def independent(self) -> bool:
        return True

    @abstractmethod
    def solve(self, embedding: Embedding, score: Floats, frame: Frame) -> Linear:
        """The linear functions of some experts, each from its own scores."""

    @abstractmethod
    def link(self, value: Floats, variance: Floats) -> Prediction:
        """From the linear functions to scores."""

    def learn(self, data: Training) -> State:
        frame = Frame.of(data.inputs.embedded())
        linear = self.solve(data.inputs.embedded(), data.score, frame)
        return State({**frame.arrays(), **_arrays(linear, data.score)})

    def extend(self, state: State, data: Training) -> State:
        frame = Frame(*(state.arrays[name].astype(np.float64) for name in ("center", "axes")))
        more = _arrays(self.solve(data.inputs.embedded(), data.score, frame), data.score)
        both = {name: np.concatenate([state.arrays[name], more[name]], axis=-1) for name in self.per_expert}
        return State({**state.arrays, **both}, state.values)

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        return self.link(*evaluate(state.arrays, inputs.embedded()))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        mean = self.predict(state, inputs).mean
        return moves(self.experts, state.arrays["average"], mean, top=top)


def _arrays(linear: Linear, score: Floats) -> dict[str, NDArray[Any]]:
    return {
        "coef": _single(linear.coef),
        "spread": _single(linear.spread),
        "lean": _single(linear.lean),
        "intercept": linear.intercept,
        "offset": linear.offset,
        "alpha": linear.alpha,
        "average": moments(score)[0],
    }


def _single(array: Floats) -> NDArray[np.float32]:
    return np.ascontiguousarray(array, np.float32)


def evaluate(arrays: Mapping[str, NDArray[Any]], embedding: Embedding) -> tuple[Floats, Floats]:
    """``(Q, E)`` values of the linear functions and their variances; the products in float32."""
    moved = embedding - arrays["center"]
    turned = moved @ arrays["axes"]
    value = (moved @ arrays["coef"]).astype(np.float64) + arrays["intercept"]
    variance = turned**2 @ arrays["spread"] - 2 * (turned @ arrays["lean"]) + arrays["offset"]
    return value, np.maximum(variance, 0.0)


class RidgeOptions(Options):
    """``alpha``: the penalty, above 0; None chooses one for each expert. ``target``: score or gain."""

    alpha: float | None = Field(None, gt=0)
    target: Literal["score", "gain"] = "score"


class RidgeRouter(LinearRouter):
    """Ridge regression of each expert's score on the embedding; its intercept is the expert's mean.

    ``target: gain`` splits a score into what the query gives all experts (the mean over those with a score, each
    less its own mean) and what this expert has beyond that, its gain, and regresses the two apart. With one penalty
    for all and no score missing that is the same router: ridge is linear in the scores, and the parts add up to
    them. It differs in the penalties, chosen for the gains, which routing is about, and for how hard the queries
    are, which it is not about; a noisy difference can be shrunk while a clear difficulty is kept. With two experts
    the gains are plus and minus half their difference. Where scores are missing, an expert that was asked harder
    queries than the others is credited for it: its intercept is no longer its plain mean. The experts then depend
    on each other; one that is added is regressed on its own scores.
    """

    kind = "ridge"
    options_type = RidgeOptions
    options: RidgeOptions

    @property
    def independent(self) -> bool:
        return self.options.target == "score"

    def learn(self, data: Training) -> State:
        if self.options.target == "score":
            return super().learn(data)
        embedding, alpha = data.inputs.embedded(), self.options.alpha
        level = moments(data.score)[0]
        beyond = data.score - level
        known = ~np.isnan(beyond)
        shared = np.where(known, beyond, 0.0).sum(axis=1) / known.sum(axis=1)  # (N,)
        frame = Frame.of(embedding)
        gain = ridge(embedding, beyond - shared[:, None], frame, alpha=alpha)
        linear = gain.plus(ridge(embedding, shared[:, None], frame, alpha=alpha))
        arrays = _arrays(linear, data.score)
        arrays["intercept"] = linear.intercept + level
        return State({**frame.arrays(), **arrays})

    def solve(self, embedding: Embedding, score: Floats, frame: Frame) -> Linear:
        return ridge(embedding, score, frame, alpha=self.options.alpha)

    def link(self, value: Floats, variance: Floats) -> Prediction:
        return Prediction(value, np.sqrt(variance))
