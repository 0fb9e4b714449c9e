"""Strengths of experts from who did better where, at queries like this one. Q queries, N stored ones, E experts."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.routers.base import Embedding, Floats, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.draws import some
from mixmerge.routers.grid import on_grid
from mixmerge.routers.search import Rows
from mixmerge.routers.shrinkage import Line, moments
from mixmerge.routers.trained import text_hashes

_STEPS = 12  # of Newton's method; each row takes all, so that it is a function of its query alone
_LONGEST_STEP = 1.5  # of a strength, against overshooting
_SCALED_ON = 512  # stored queries that the scale of scores is fitted on
_QUERIES = 256  # scored at a time, at most
_NUMBERS = 4_000_000  # held at a time for pairs of experts, about
_SIMILARITIES = 16_000_000  # held at a time, about
_EXCERPT = 120  # characters of each stored query kept for explanations
_CUT = 1e-6  # what smaller divisors count as


class RankingOptions(Options):
    """What counts for how much.

    Args:
        base: how many times more the most similar query counts than one of similarity 0, above 1.
        margin: scores that differ by no more are a tie, 0 or more.
        prior: precision of a strength's normal prior, above 0; a row of outcomes adds up to a quarter for each other
            expert.
    """

    base: float = Field(10.0, gt=1)
    margin: float = Field(0.0, ge=0)
    prior: float = Field(1.0, gt=0)


class RankingRouter(Router):
    """Bradley-Terry strengths, fitted for each query to all pairs of scores, weighted by similarity.

    A stored query counts for ``base ** (1 + s / s_max)``, where s is its cosine with the query and s_max the largest
    of these. Of two experts that were both asked it, the one of the higher score won; a tie is half a win for both.
    Strengths maximise the weighted likelihood times a normal prior, by Newton's method. An expert's score is expected
    to be its mean, plus a slope times how much stronger it is here than on average; the slope is fitted on stored
    queries left out one by one, and shrunk.

    Source: Ong et al. (2024), RouteLLM, arXiv 2406.18665, section 4.2 (``sw_ranking``, there for the two sides of a
    pair); the largest cosine is the query's, as in the released code (the paper: each stored query's with the others).
    Deviations: experts are not gathered in tiers; scores stand for votes; the prior; expected scores are given
    instead of the chance to win. A query takes time in proportion to N E²: this is for tables of thousands of rows.
    """

    kind = "sw_ranking"
    options_type = RankingOptions
    options: RankingOptions

    def learn(self, data: Training) -> State:
        places = some(text_hashes(data.inputs.texts), at_most=_SCALED_ON, seed=self.seed)
        stored = on_grid(data.inputs.embedded())
        strength, _ = self._strengths(stored, data.score, stored[places], itself=places)
        mean, variance, _ = moments(data.score)
        center = strength.mean(axis=0)
        line = Line.fit((strength - center).reshape(-1, 1), (data.score[places] - mean).reshape(-1, 1))
        arrays: dict[str, NDArray[Any]] = {
            "embedding": stored.astype(np.float16),
            "score": data.score,
            "mean": mean,
            "variance": variance,
        }
        texts = [text[:_EXCERPT] for text in data.inputs.texts]
        return State({**arrays, "center": center, "slope": line.slope}, {"excerpts": texts})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        known = state.arrays
        stored = known["embedding"].astype(np.float32)
        strength, count = self._strengths(stored, known["score"], on_grid(inputs.embedded()))
        mean = known["mean"] + known["slope"] * (strength - known["center"])
        return Prediction(mean, np.sqrt(known["variance"] / np.maximum(count, 1)))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        stored, asked = state.arrays["embedding"].astype(np.float32), on_grid(inputs.embedded())
        strength, _ = self._strengths(stored, state.arrays["score"], asked)
        said = []
        for query, strengths in zip(asked, strength.tolist(), strict=True):
            similar = stored @ query
            nearest = np.argsort(-similar, kind="stable")[:top]
            neighbours = [
                {"query": state.values["excerpts"][row], "similarity": float(similar[row])} for row in nearest
            ]
            named = dict(zip(self.experts, strengths, strict=True))
            said.append({"strengths": named, "neighbours": neighbours})
        return said

    def _strengths(
        self, stored: Embedding, score: Floats, queries: Embedding, *, itself: Rows | None = None
    ) -> tuple[Floats, Floats]:
        """Strengths, and the number of equal weights that would tell as much: ``(Q, E)`` each.

        Args:
            stored: ``(N, D)``.
            score: ``(N, E)``, NaN where missing.
            queries: ``(Q, D)``.
            itself: ``(Q,)`` place of each query among the stored, if it is one: it is left out.
        """
        experts = score.shape[1]
        step = max(1, min(_QUERIES, _NUMBERS // experts**2, _SIMILARITIES // len(stored)))
        strength, count = np.empty((2, len(queries), experts))
        for start in range(0, len(queries), step):
            part = slice(start, start + step)
            similar = (queries[part] @ stored.T).astype(np.float64)  # (q, N)
            if itself is not None:
                similar[np.arange(len(similar)), itself[part]] = -np.inf
            weight = similarity_weights(similar, self.options.base)
            strength[part] = strengths(
                wins(weight, score, margin=self.options.margin), prior=self.options.prior
            )
            known = (~np.isnan(score)).astype(np.float64)
            count[part] = (weight @ known) ** 2 / np.maximum(weight**2 @ known, _CUT)
        return strength, count


def similarity_weights(similar: Floats, base: float) -> Floats:
    """``(Q, N)`` ``base ** (1 + s / s_max)`` of cosines, scaled to a mean of 1; 0 for a cosine of minus infinity."""
    largest = np.maximum(similar.max(axis=1, keepdims=True), _CUT)
    relative = np.where(np.isinf(similar), similar, np.clip(similar / largest, -1, 1))
    weight = base ** (1 + relative)
    scaled: Floats = weight / np.maximum(weight.mean(axis=1, keepdims=True), _CUT)
    return scaled


def wins(weight: Floats, score: Floats, *, margin: float) -> Floats:
    """``(Q, E, E)``: summed weights of the stored queries on which the first expert beats the second; half of ties.

    Args:
        weight: ``(Q, N)``.
        score: ``(N, E)``, NaN where missing: that is no comparison.
        margin: scores that differ by no more are a tie.
    """
    experts = score.shape[1]
    total = np.zeros((len(weight), experts * experts))
    step = max(1, _NUMBERS // experts**2)
    for start in range(0, len(score), step):
        part = score[start : start + step]
        ahead = part[:, :, None] - part[:, None, :]  # NaN compares as neither
        won = (ahead > margin) + 0.5 * (np.abs(ahead) <= margin)
        total += weight[:, start : start + step] @ won.reshape(len(part), -1)
    return total.reshape(len(weight), experts, experts)


def strengths(won: Floats, *, prior: float) -> Floats:
    """``(Q, E)`` log strengths of a Bradley-Terry model: a beats b with the odds ``exp(strength a - strength b)``.

    The most likely with a normal prior of mean 0 and precision ``prior``, so their sum is 0. Newton's method.

    Args:
        won: ``(Q, E, E)`` weighted wins of the first over the second.
        prior: above 0.
    """
    met = won + won.transpose(0, 2, 1)
    strength, same = np.zeros(won.shape[:2]), np.arange(won.shape[1])
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(strength[:, None, :] - strength[:, :, None]))
        slope = (won - met * chance).sum(axis=2) - prior * strength
        curve = met * chance * (1 - chance)
        matrix = -curve
        matrix[:, same, same] += curve.sum(axis=2) + prior
        move = np.linalg.solve(matrix, slope[:, :, None])[:, :, 0]
        longest = np.abs(move).max(axis=1, keepdims=True)
        strength += move * np.minimum(1, _LONGEST_STEP / np.maximum(longest, _CUT))
    return strength
