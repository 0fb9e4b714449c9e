"""A cascade as a router: what its experts are expected to score, and who would be asked after whom.

Q queries, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.registry import choices, find, load
from mixmerge.routers.base import UNSAVED, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.cascade import Cascade, Fitted, fit_cascade, order_of_escalation
from mixmerge.routers.costs import mean_costs
from mixmerge.routers.features import Features
from mixmerge.routers.shrinkage import moments

Floats = NDArray[np.float64]
_PER_EXPERT = ("cascade_score", "cascade_cost", "cascade_threshold")


class CascadeOptions(Options):
    """Options of ``cascade``.

    Args:
        router: kind of the router whose scores these are.
        router_options: of that router.
        order: the experts of the cascade, first to last; by default all that score more than every cheaper one.
        thresholds: confidence that lets an answer stand: one for all, or with ``order`` one for each expert but the
            last. ``calibrate`` replaces them.
    """

    router: str = "knn"
    router_options: dict[str, Any] = Field(default_factory=dict)
    order: tuple[str, ...] | None = Field(None, min_length=1)
    thresholds: float | tuple[float, ...] = 0.5

    @model_validator(mode="after")
    def _fits(self) -> CascadeOptions:
        if self.router == "cascade":
            raise ValueError("a cascade cannot take its scores from a cascade")
        if not isinstance(self.thresholds, float):
            if self.order is None:
                raise ValueError("several thresholds need the order that they are for")
            if len(self.thresholds) != len(self.order) - 1:
                raise ValueError("there is one threshold for each expert of the order but the last")
        return self


class CascadeRouter(Router):
    """Scores as another router's, with the order in which a cascade would ask.

    Before anything ran no answer has a confidence, so the scores are those of the experts, not of the cascade;
    ``cascade()`` is what a runner asks after every answer, and ``calibrate`` fits its thresholds on confidences.

    Source: confidence escalation as in FrugalGPT (Chen, Zaharia and Zou, 2023, arXiv 2305.05176, its strategy 3, LLM
    cascade) and vLLM Semantic Router's looper; taking the order from cost and leaving out dominated experts is ours.
    """

    kind = "cascade"
    options_type = CascadeOptions
    per_expert = _PER_EXPERT
    options: CascadeOptions
    _opened: tuple[State, Router, State] | None = (
        None  # the inner router, and its state within the last one asked
    )

    def __init__(
        self,
        options: Options | Mapping[str, Any] | None = None,
        *,
        features: Features | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(options, features=features, seed=seed)
        self._inner()  # wrong options of the router inside show before there are outcomes

    @property
    def independent(self) -> bool:
        # An order names experts, which then have to be there.
        return self.options.order is None and self._inner().independent

    def learn(self, data: Training) -> State:
        unknown = [name for name in self.options.order or () if name not in data.experts]
        if unknown:
            raise MixmergeError(
                Fault(
                    "router cascade: order",
                    f"no expert is called {name!r}",
                    choices(name, list(data.experts)),
                )
                for name in unknown
            )
        inner = self._inner().learn(data)
        values = {"inner": dict(inner.values), "experts": list(data.experts)}
        return self._ordered(State({**inner.arrays, **self._known(data)}, values))

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        inner, known = self._open(state)
        return inner.predict(known, inputs)

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        """What the inner router says, and the ``cascade``, first to last.

        Each with its ``expert``, ``score`` and, where costs are known, ``cost`` and ``cost_so_far`` if it is reached;
        ``threshold``: a number, ``always`` or ``never`` (it escalates), and None for the last.
        """
        (inner, known), expected = self._open(state), self.predict(state, inputs)
        reasons = inner.explain(known, inputs, top=top)
        cost = None if self.costs is None else self.costs.expect(inputs.texts)
        names, order = state.values["experts"], state.values["order"]
        for q, reason in enumerate(reasons):
            steps: list[dict[str, Any]] = []
            spent = 0.0
            for stage, name in enumerate(order):
                e = names.index(name)
                threshold = float(state.arrays["cascade_threshold"][e])
                step: dict[str, Any] = {"expert": name, "score": float(expected.mean[q, e])}
                step["threshold"] = None if stage == len(order) - 1 else _as_json(threshold)
                if cost is not None and np.isfinite(spent + cost[q, e]):
                    spent += float(cost[q, e])
                    step |= {"cost": float(cost[q, e]), "cost_so_far": spent}
                else:
                    spent = np.nan  # from here on nobody knows
                steps.append(step)
            reason["cascade"] = steps
        return reasons

    def extend(self, state: State, data: Training) -> State:
        """The inner router with the new experts; the cascade's order is found again if the options do not give it."""
        inner = self._inner().extend(_inner_state(state), data)
        known = self._known(data)
        joined = {name: np.append(state.arrays[name], known[name]) for name in _PER_EXPERT}
        values = {"inner": dict(inner.values), "experts": [*state.values["experts"], *data.experts]}
        return self._ordered(State({**inner.arrays, **joined}, values))

    def without(self, state: State, at: int) -> State:
        """Without that expert, in the inner router and in the cascade; the others keep their thresholds."""
        inner = self._inner().without(_inner_state(state), at)
        cut = {name: np.delete(state.arrays[name], at) for name in _PER_EXPERT}
        names = state.values["experts"]
        values = {"inner": dict(inner.values), "experts": [*names[:at], *names[at + 1 :]]}
        return self._ordered(State({**inner.arrays, **cut}, values))

    # --- what users of this kind call besides

    def cascade(self) -> Cascade:
        """Who is asked after whom, and when."""
        state = self._fitted()
        names, order = state.values["experts"], state.values["order"]
        at = [names.index(name) for name in order[:-1]]
        return Cascade(tuple(order), tuple(float(state.arrays["cascade_threshold"][e]) for e in at))

    def calibrate(
        self,
        table: OutcomeTable,
        confidence: Mapping[str, Sequence[float] | Floats],
        *,
        max_cost: float | None = None,
        min_score: float | None = None,
        check_cost: float = 0.0,
    ) -> Fitted:
        """Fit the thresholds on outcomes with the confidence of the answers, and keep them.

        Args:
            table: outcomes of the cascade's experts.
            confidence: of the answers to the table's queries, by expert; of every expert of the cascade but the last.
            max_cost, min_score, check_cost: of ``cascade.fit_cascade``, in dollars.

        Raises:
            MixmergeError: an expert without outcomes, confidences or costs, or as ``fit_cascade``.
        """
        state = self._fitted()
        order: list[str] = state.values["order"]
        table = table.only(order)
        silent = [name for name in order[:-1] if name not in confidence]
        wrong = [name for name in order[:-1] if name not in silent and len(confidence[name]) != len(table)]
        if silent or wrong:
            raise MixmergeError(
                [Fault("confidence", f"none is given of {name!r}") for name in silent]
                + [
                    Fault(
                        "confidence",
                        f"of {name!r} has {len(confidence[name])} values",
                        f"{len(table)} queries",
                    )
                    for name in wrong
                ]
            )
        sure = np.array([np.asarray(confidence[name], np.float64) for name in order[:-1]], np.float64)
        fitted = fit_cascade(
            order,
            table.score,
            sure.reshape(len(order) - 1, len(table)).T,
            self._spent(table, order),
            max_cost=max_cost,
            min_score=min_score,
            check_cost=check_cost,
        )
        threshold = state.arrays["cascade_threshold"].copy()
        for name, value in zip(order[:-1], fitted.cascade.thresholds, strict=True):
            threshold[state.values["experts"].index(name)] = value
        self.state = replace(state, arrays={**state.arrays, "cascade_threshold": threshold})
        self.version = UNSAVED
        return fitted

    # --- parts

    def _spent(self, table: OutcomeTable, order: Sequence[str]) -> Floats:
        """``(Q, E)`` dollars: recorded, else expected from prices."""
        spent = table.costs()
        if self.costs is not None:
            at = [self.experts.index(name) for name in order]
            expected = self.costs.expect(table.queries)[:, at]
            spent = expected if spent is None else np.where(np.isnan(spent), expected, spent)
        unknown = [name for e, name in enumerate(order) if spent is None or np.isnan(spent[:, e]).all()]
        if spent is None or unknown:
            raise MixmergeError(
                Fault(
                    "outcomes.cost", f"no cost is known of {', '.join(unknown)}", run="Give costs or prices"
                )
            )
        return spent

    def _inner(self) -> Router:
        made: Router = load(find("router", self.options.router).target)(
            self.options.router_options, features=self.features, seed=self.seed
        )
        made.experts, made.costs = self.experts, self.costs
        return made

    def _open(self, state: State) -> tuple[Router, State]:
        """The same objects for the same state: a router may keep an index beside the state it was asked last."""
        if self._opened is None or self._opened[0] is not state:
            self._opened = (state, self._inner(), _inner_state(state))
        return self._opened[1:]

    def _known(self, data: Training) -> dict[str, Floats]:
        mean, _, _ = moments(data.score)
        cost = mean_costs(data.costs, data.experts, data.prices, data.inputs.texts)
        given = self.options.thresholds
        if isinstance(given, float):
            threshold = np.full(len(mean), given)
        else:
            of = dict(zip((self.options.order or ())[:-1], given, strict=True))
            threshold = np.array([of.get(name, np.inf) for name in data.experts])
        return {"cascade_score": mean, "cascade_cost": cost, "cascade_threshold": threshold}

    def _ordered(self, state: State) -> State:
        names: list[str] = state.values["experts"]
        if self.options.order is not None:
            order = [name for name in self.options.order if name in names]
        else:
            arrays = state.arrays
            order = list(order_of_escalation(names, arrays["cascade_score"], arrays["cascade_cost"]))
        if not order:
            raise MixmergeError(
                Fault("router cascade", "has no expert left", run="Fit it again with another order")
            )
        return replace(state, values={**state.values, "order": order})


def _inner_state(state: State) -> State:
    arrays = {name: array for name, array in state.arrays.items() if name not in _PER_EXPERT}
    return State(arrays, state.values["inner"])


def _as_json(threshold: float) -> float | str:
    if np.isfinite(threshold):
        return threshold
    return "always" if threshold > 0 else "never"
