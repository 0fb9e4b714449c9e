"""Two experts: is the weak one good enough? N training queries, Q queries, M members of an ensemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.errors import Fault, MixmergeError
from mixmerge.routers.base import Inputs, Prediction, Router, State, Training
from mixmerge.routers.logistic import sigmoid
from mixmerge.routers.neural import MlpOptions, fit_networks, outputs
from mixmerge.routers.shrinkage import moments
from mixmerge.routers.strengths import CALIBRATION, calibrated, expected
from mixmerge.routers.training import arranged, subset

Floats = NDArray[np.float64]


class GapOptions(MlpOptions):
    """Of the networks, and:

    Args:
        weak, strong: experts by name. With two experts the weak one is by default the cheaper, or where costs are
            not known or alike, the one with the lower mean score.
        mode: of the labels; see ``labels``.
        tau: of the probabilistic labels, in units of score, above 0.
    """

    weak: str | None = None
    strong: str | None = None
    mode: Literal["deterministic", "probabilistic", "transformed"] = "probabilistic"
    tau: float = Field(0.1, gt=0)


def labels(lead: Floats, *, mode: str, tau: float) -> tuple[Floats, float]:
    """How far the weak expert is good enough, 0 to 1, and the slack that was allowed.

    deterministic: 1 where it scored no less than the strong one. probabilistic: the logistic function of its lead
    over ``tau``. transformed: 1 where it scored no less than the strong one less a slack t, with the least t >= 0
    for which the labels differ most over pairs of queries, that is 2 p (1 - p) for a share p of ones.

    Args:
        lead: ``(N,)`` score of the weak expert less that of the strong one.
    """
    if mode == "probabilistic":
        return sigmoid(lead / tau), 0.0
    if mode == "deterministic":
        return (lead >= 0).astype(np.float64), 0.0
    slacks = np.unique(np.append(np.maximum(-lead, 0.0), 0.0))
    share = 1 - np.searchsorted(np.sort(lead), -slacks, side="left") / len(lead)
    slack = float(slacks[np.argmax(2 * share * (1 - share))])
    return (lead >= -slack).astype(np.float64), slack


class GapRouter(Router):
    """The chance that a weak expert is good enough, by small networks; the gap in score that follows from it.

    The networks learn ``labels`` of the queries on which both have a score. A line on held-out texts (``strengths``)
    makes the expected gap of it; half of how it differs from the mean gap is added to the strong expert's mean and
    half taken from the weak one's. Further experts keep their means.

    Source: Ding et al. (2024), Hybrid LLM: Cost-Efficient and Quality-Aware Query Routing, arXiv 2404.14618, its three
    routers.
    Deviations: networks on embeddings (published: a fine-tuned encoder); one outcome of each expert stands for
    the distribution of its answers' quality, with ``tau`` for the spread (0.1, as in LLMRouter); scores, not a
    threshold on the chance: the policies set that.
    """

    kind = "hybrid"
    options_type = GapOptions
    options: GapOptions

    def learn(self, data: Training) -> State:
        ordered = arranged(data)
        weak, strong = _pair(ordered.data, self.options)
        lead = ordered.data.score[:, weak] - ordered.data.score[:, strong]
        both = ~np.isnan(lead)
        names = ordered.data.experts[weak], ordered.data.experts[strong]
        if not both.any():
            raise MixmergeError(
                Fault("outcomes", f"no query has scores of both {names[0]} and {names[1]}", "At least one")
            )
        seen, lead = subset(ordered.data, both).inputs, lead[both]
        label, slack = labels(lead, mode=self.options.mode, tau=self.options.tau)
        share = np.clip(label.mean(), 0.5 / (len(label) + 1), 1 - 0.5 / (len(label) + 1))
        networks = fit_networks(
            seen.embedded(),
            label[:, None],
            seen.texts,
            options=self.options,
            seed=self.seed,
            start=np.log(share / (1 - share))[None],
            bounded=True,
        )
        need = [1 - sigmoid(raw) for raw in outputs(networks.arrays, seen.embedded())]
        gap = calibrated(need, networks.held, -lead[:, None])
        mean, variance, count = moments(data.score)
        means = {"mean": mean, "variance": variance / np.maximum(count, 1)}
        return State(
            {**networks.arrays, **gap, **means}, {"weak": names[0], "strong": names[1], "slack": slack}
        )

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        gap = expected(self._need(state, inputs), {name: state.arrays[name] for name in CALIBRATION})
        away = 0.5 * (gap.mean - state.arrays["average"])[:, 0]
        unsure = 0.25 * (gap.std**2 - state.arrays["error"])[:, 0]
        shape = (len(inputs), len(self.experts))
        mean = np.broadcast_to(state.arrays["mean"], shape).copy()
        variance = np.broadcast_to(state.arrays["variance"], shape).copy()
        for name, sign in (("strong", 1.0), ("weak", -1.0)):
            e = self.experts.index(state.values[name])
            mean[:, e] += sign * away
            variance[:, e] += unsure
        return Prediction(mean, np.sqrt(np.maximum(variance, 0.0)))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        chance = 1 - self._need(state, inputs).mean(axis=0)[:, 0]
        pair = {"weak": state.values["weak"], "strong": state.values["strong"]}
        return [{**pair, "weak_is_enough": round(float(one), 4)} for one in chance]

    def _need(self, state: State, inputs: Inputs) -> Floats:
        """``(M, Q, 1)`` chance that the strong expert is needed."""
        return np.asarray(1 - sigmoid(outputs(state.arrays, inputs.embedded())), np.float64)


def _pair(data: Training, options: GapOptions) -> tuple[int, int]:
    """Places of the weak and the strong expert.

    Raises:
        MixmergeError: an expert that does not exist, the same twice, or not two to choose from.
    """
    experts, given = data.experts, {"weak": options.weak, "strong": options.strong}
    faults = [
        Fault(f"router hybrid: {which}", f"no expert is called {name!r}", f"Known: {', '.join(experts)}")
        for which, name in given.items()
        if name is not None and name not in experts
    ]
    if options.weak is not None and options.weak == options.strong:
        faults.append(Fault("router hybrid", f"{options.weak!r} is both weak and strong", "Two experts"))
    if not faults and len(experts) != 2 and None in given.values():
        faults.append(
            Fault(
                "router hybrid",
                f"chooses between two experts, and there are {len(experts)}: {', '.join(experts)}",
                run="Set the options weak and strong" if len(experts) > 2 else "Use another router",
            )
        )
    if faults:
        raise MixmergeError(faults)
    named = [None if name is None else experts.index(name) for name in given.values()]
    if named[0] is not None and named[1] is not None:
        return named[0], named[1]
    if named[0] is not None:
        return named[0], 1 - named[0]
    if named[1] is not None:
        return 1 - named[1], named[1]
    first, second = _by_rank(data.costs, moments(data.score)[0])
    return first, second


def _by_rank(costs: Floats, means: Floats) -> Sequence[int]:
    """The two by cost, or by mean score where costs are not known or alike."""
    known = not np.isnan(costs).any() and costs[0] != costs[1]
    order = np.argsort(costs if known else means, kind="stable")
    return [int(e) for e in order]
