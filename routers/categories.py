"""Composition of Experts: a query's category, then the category's expert. Q queries, C categories, E experts.

The classifier is learned once. The map from categories to experts is solved exactly (``assignment.py``), and again
whenever a limit or the experts change, without touching the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices
from mixmerge.routers.assignment import Assignment, Problem, assigned, pareto, solve
from mixmerge.routers.base import UNSAVED, Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.category_model import (
    CategoryModel,
    cluster,
    fit_categories,
    label_column,
    per_category,
    tuned_threshold,
    uncertainty,
)

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]
PER_EXPERT = ("mean", "std", "count", "size", "cost")


class CategoriesOptions(Options):
    """Options of ``categories``.

    Args:
        labels: column of metadata with the categories; ``auto``: the first of ``category``, ``task`` and ``subject``
            that has two values or more and repeats them, else clusters; ``none``: clusters.
        clusters: k-means clusters of the embeddings that serve as categories where there are no labels.
        strength: inverse of the classifier's L2 penalty.
        worth: how many observations an expert's mean counts for beside those of a category; by default as many as
            the spread between categories says.
        budget: billions of parameters of the distinct experts kept (``Price.size``).
        mean_cost: dollars a query.
        lookup: only the mapped expert of the likeliest category keeps its score, as in the paper.
        fallback: expert that gets the queries whose category is unsure; it is kept in any case. Where only ``unsure``
            is given: of the experts kept, the one of the highest mean score.
        unsure: uncertainty above which a category is unsure; where only ``fallback`` is given, tuned on the outcomes.
        unsure_by: ``entropy`` of the categories' probabilities over the highest possible, or 1 minus the ``top`` one.
    """

    labels: str = Field("auto", min_length=1)
    clusters: int = Field(16, ge=1)
    strength: float = Field(10.0, gt=0)
    worth: float | None = Field(None, gt=0)
    budget: float | None = Field(None, gt=0)
    mean_cost: float | None = Field(None, ge=0)
    lookup: bool = False
    fallback: str | None = None
    unsure: float | None = Field(None, ge=0, le=1)
    unsure_by: Literal["entropy", "top"] = "entropy"


class CategoriesRouter(Router):
    """Expected score over a query's categories, of the experts that a budget keeps.

    ``mean(q, e) = sum_c p(c | q) mean(c, e)`` with calibrated probabilities and every expert's mean of a category
    shrunk to its mean of all; ``std`` is that of the same mixture. An expert that may not answer, because the solved
    map does not keep it, because ``lookup`` serves the category by another, or because the query is unsure and is the
    fallback's, gets a score just below the worst that was seen and the row's largest uncertainty, so that no policy
    prefers it for its score. A policy that trades score for cost may still: ``prune`` forgets such experts for good.
    Without a limit every expert is kept.

    Source: Jain et al. (2024), Composition of Experts, arXiv 2412.01868: category router and category -> expert map
    under a budget of parameters, and a fallback under uncertainty, as also in Samba-CoE v0.3. Deviations: the rule for
    when a query is unsure (the published one was not at hand), expected scores of all experts instead of one name
    (``lookup`` gives the paper's choice), shrunk means, clusters where there are no labels, a limit of mean cost.
    """

    kind = "categories"
    options_type = CategoriesOptions
    per_expert = PER_EXPERT
    options: CategoriesOptions

    @property
    def independent(self) -> bool:
        given = self.options
        limits = (given.budget, given.mean_cost, given.fallback, given.unsure)
        return not given.lookup and all(one is None for one in limits)

    def learn(self, data: Training) -> State:
        options = self.options
        if options.fallback is not None and options.fallback not in data.experts:
            raise MixmergeError(
                Fault(
                    "router categories: fallback",
                    f"no expert is called {options.fallback!r}",
                    choices(options.fallback, list(data.experts)),
                )
            )
        column = label_column(options.labels, data.inputs)
        categories, label = self._labels(data.inputs, column)
        known = label >= 0
        embedding, texts = data.inputs.embedded(), data.inputs.texts
        model, left_out = fit_categories(
            embedding[known],
            label[known],
            [text for text, there in zip(texts, known, strict=True) if there],
            categories=len(categories),
            strength=options.strength,
            seed=self.seed,
        )
        label = np.where(known, label, model.probabilities(embedding).argmax(axis=1))
        means = per_category(data, label, len(categories), options.worth)
        rows = np.bincount(label, minlength=len(categories)).astype(np.float64)
        state = State(
            {**model.arrays(), **means, "rows": rows},
            {
                "categories": list(categories),
                "column": column,
                "experts": list(data.experts),
                "floor": _floor(data.score),
                "unsure": options.unsure,
            },
        )
        state = _solved(state, budget=options.budget, mean_cost=options.mean_cost, pool=None, options=options)
        if options.fallback is not None and options.unsure is None:
            unsure = self._tuned(state, left_out, data.score[known], label[known])
            state = replace(state, values={**state.values, "unsure": unsure})
        return state

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        return self._expected(state, self._probabilities(state, inputs))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        """``categories`` likeliest first, each with its ``expert``; ``uncertainty``; ``kept`` and ``left_out``."""
        probability, values = self._probabilities(state, inputs), state.values
        unsure = uncertainty(probability, by=self.options.unsure_by)
        experts, kept = values["experts"], values["kept"]
        shared = {
            "kept": list(kept),
            "left_out": [name for name in experts if name not in kept],
            **{name: values[name] for name in ("budget", "mean_cost") if values[name] is not None},
        }
        reasons: list[dict[str, Any]] = []
        for row, doubt in zip(probability, unsure, strict=True):
            reason: dict[str, Any] = {
                "categories": [
                    {
                        "category": values["categories"][c],
                        "probability": float(row[c]),
                        "queries": int(state.arrays["rows"][c]),
                        "expert": values["serves"][c],
                    }
                    for c in np.argsort(-row, kind="stable")[:top]
                ],
                "uncertainty": float(doubt),
                **shared,
            }
            if values["unsure"] is not None:
                reason |= {"unsure_above": values["unsure"], "unsure": bool(doubt > values["unsure"])}
                reason["fallback"] = values["fallback"]
            reasons.append(reason)
        return reasons

    def extend(self, state: State, data: Training) -> State:
        """The new experts' means over the known categories, and the map solved again under the limits it has.

        Rows of no known label get the category that the classifier says.
        """
        column, names = state.values["column"], state.values["categories"]
        given = data.inputs.metadata.get(column, ()) if column is not None else ()
        said = self._probabilities(state, data.inputs).argmax(axis=1)
        label = np.array(
            [names.index(one) if one in names else says for one, says in zip(given, said, strict=True)]
            if given
            else said,
            np.int64,
        )
        more = per_category(data, label, len(names), self.options.worth)
        joined = {name: np.concatenate([state.arrays[name], more[name]], axis=-1) for name in PER_EXPERT}
        pool = state.values["pool"]
        values = {
            "experts": [*state.values["experts"], *data.experts],
            "floor": min(state.values["floor"], _floor(data.score)),
        }
        state = State({**state.arrays, **joined}, {**state.values, **values})
        return self._again(state, pool=None if pool is None else [*pool, *data.experts])

    def without(self, state: State, at: int) -> State:
        """Without that expert, and the map solved again under the limits it has.

        Raises:
            MixmergeError: it is the fallback of the options, or no map keeps the limits without it.
        """
        name, pool = state.values["experts"][at], state.values["pool"]
        if name == self.options.fallback:
            raise MixmergeError(
                Fault(
                    "experts", f"{name!r} is the fallback", run="Fit the router with another fallback first"
                )
            )
        cut = {one: np.delete(state.arrays[one], at, axis=-1) for one in PER_EXPERT}
        left = [one for one in state.values["experts"] if one != name]
        state = State({**state.arrays, **cut}, {**state.values, "experts": left})
        return self._again(state, pool=None if pool is None else [one for one in pool if one != name] or None)

    # --- what users of this kind call besides

    def resolve(
        self,
        *,
        budget: float | None = None,
        mean_cost: float | None = None,
        experts: Sequence[str] | None = None,
    ) -> Self:
        """Solve the map again, for other limits or some of the experts; the classifier stays as it is.

        Args:
            budget: billions of parameters of the distinct experts kept; None: no limit.
            mean_cost: dollars a query; None: no limit.
            experts: that may be in the map; the others are left out. The fallback is among them in any case.

        Raises:
            MixmergeError: the router is not fitted, has no such expert, or no map keeps the limits.
        """
        state = self._fitted()
        unknown = [name for name in experts or () if name not in self.experts]
        if unknown or (experts is not None and not experts):
            what = f"the router has no expert {', '.join(map(repr, unknown))}" if unknown else "are none"
            raise MixmergeError(Fault("experts", what, f"Known: {', '.join(self.experts)}"))
        self.state = _solved(
            state,
            budget=budget,
            mean_cost=mean_cost,
            pool=None if experts is None else list(experts),
            options=self.options,
        )
        self.version = UNSAVED
        return self

    def prune(self) -> Self:
        """Forget the experts that the map leaves out."""
        for name in [name for name in self.experts if name not in self._fitted().values["kept"]]:
            self.remove_expert(name)
        return self

    def solution(self) -> Assignment:
        """The map in use, with what it keeps, scores and costs."""
        state = self._fitted()
        problem = _problem(state, state.values["experts"], self.options)
        chosen = np.array([problem.experts.index(name) for name in state.values["serves"]], np.int64)
        return assigned(problem, chosen)

    def pareto(
        self,
        *,
        budgets: Sequence[float] | None = None,
        mean_cost: float | None = None,
        most: int = 100,
    ) -> tuple[Assignment, ...]:
        """Expected score against billions of parameters kept, from small to large; the router stays as it is.

        Args:
            budgets: to solve for; by default those of every map that no other beats in both.
            mean_cost: dollars a query.
            most: maps, at most.

        Raises:
            MixmergeError: the size of an expert is not known, or no budget holds a map.
        """
        state = self._fitted()
        problem = _problem(state, state.values["pool"] or state.values["experts"], self.options)
        return pareto(problem, budgets=budgets, mean_cost=mean_cost, most=most)

    # --- parts

    def _labels(self, inputs: Inputs, column: str | None) -> tuple[tuple[str, ...], Indices]:
        """Names of the categories, and ``(Q,)`` which; -1 where a label is missing."""
        if column is not None:
            given = inputs.metadata[column]
            names = tuple(sorted({one for one in given if one}))
            place = {name: c for c, name in enumerate(names)}
            return names, np.array([place.get(one, -1) for one in given], np.int64)
        label = cluster(inputs.embedded(), inputs.texts, clusters=self.options.clusters, seed=self.seed)
        return tuple(f"cluster {c}" for c in range(int(label.max()) + 1)), label

    def _probabilities(self, state: State, inputs: Inputs) -> Floats:
        return CategoryModel.restored(state.arrays).probabilities(inputs.embedded())

    def _again(self, state: State, *, pool: list[str] | None) -> State:
        values = state.values
        return _solved(
            state,
            budget=values["budget"],
            mean_cost=values["mean_cost"],
            pool=pool,
            options=self.options,
        )

    def _expected(self, state: State, probability: Floats) -> Prediction:
        mean, std = state.arrays["mean"], state.arrays["std"]
        center = mean.mean(axis=0)
        off = mean - center  # squares of small numbers: scores may be far from 0
        expected = probability @ off
        square = probability @ (std**2 + off**2) - expected**2
        score, doubt = expected + center, np.sqrt(np.maximum(square, 0.0))
        may = self._may_answer(state, probability)
        widest = doubt.max(axis=1, keepdims=True)
        return Prediction(np.where(may, score, state.values["floor"]), np.where(may, doubt, widest))

    def _may_answer(self, state: State, probability: Floats) -> Flags:
        """``(Q, E)`` which experts keep their score."""
        values, names = state.values, state.values["experts"]
        may = np.tile(np.array([name in values["kept"] for name in names]), (len(probability), 1))
        if self.options.lookup:
            serves = np.array([names.index(name) for name in values["serves"]], np.int64)
            may = np.arange(len(names)) == serves[probability.argmax(axis=1)][:, None]
        if values["unsure"] is not None:
            unsure = uncertainty(probability, by=self.options.unsure_by) > values["unsure"]
            may = np.where(unsure[:, None], np.arange(len(names)) == names.index(values["fallback"]), may)
        return may

    def _tuned(self, state: State, left_out: Floats, score: Floats, label: Indices) -> float:
        filled = np.where(np.isnan(score), state.arrays["mean"][label], score)
        picked = self._expected(state, left_out).mean.argmax(axis=1)
        fallback = state.values["experts"].index(state.values["fallback"])
        return tuned_threshold(
            uncertainty(left_out, by=self.options.unsure_by),
            filled[np.arange(len(filled)), picked],
            filled[:, fallback],
        )


def _floor(score: Floats) -> float:
    """Just below the worst score seen: a tie with an expert of only such scores would leave it to chance."""
    low, high = float(np.nanmin(score)), float(np.nanmax(score))
    return low - 1e-6 * max(high - low, 1.0)


def _problem(state: State, experts: Sequence[str], options: CategoriesOptions) -> Problem:
    arrays, rows = state.arrays, state.arrays["rows"]
    everyone = Problem(
        tuple(state.values["categories"]),
        tuple(state.values["experts"]),
        arrays["mean"],
        rows / rows.sum(),
        arrays["size"],
        arrays["cost"],
        () if options.fallback is None else (options.fallback,),
    )
    return everyone.only([*experts, *(name for name in everyone.required if name not in experts)])


def _solved(
    state: State,
    *,
    budget: float | None,
    mean_cost: float | None,
    pool: list[str] | None,
    options: CategoriesOptions,
) -> State:
    """With the map for these limits: ``serves``, ``kept`` and ``fallback``."""
    problem = _problem(state, pool or state.values["experts"], options)
    found = solve(problem, budget=budget, mean_cost=mean_cost)
    limited = budget is not None or mean_cost is not None
    kept = found.kept if limited else tuple(problem.experts)
    at = [state.values["experts"].index(name) for name in kept]
    overall = problem.frequency @ state.arrays["mean"][:, at]
    best = min(range(len(kept)), key=lambda e: (-overall[e], kept[e]))
    values = {
        "serves": [found.serves[name] for name in problem.categories],
        "kept": list(kept),
        "fallback": options.fallback or kept[best],
        "budget": budget,
        "mean_cost": mean_cost,
        "pool": pool,
    }
    return replace(state, values={**state.values, **values})
