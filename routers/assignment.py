"""Which expert serves which category, solved exactly as a 0/1 programme. C categories, E experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
# Scores, costs and sizes that differ by less than this share of their range count as equal: ten times the solver's
# own precision, below which it calls what it has just found infeasible.
EQUAL = 1e-5


@dataclass(frozen=True, eq=False)
class Problem:
    """What the map is chosen for.

    Args:
        categories: unique names, C.
        experts: unique names, E.
        score: ``(C, E)`` expected score, finite, higher is better.
        frequency: ``(C,)`` share of the queries, 0 or more.
        size: ``(E,)`` billions of parameters, above 0; NaN where not known.
        cost: ``(E,)`` mean dollars a query, 0 or more; NaN where not known.
        required: experts that are kept in any case, and count for the budget.
    """

    categories: tuple[str, ...]
    experts: tuple[str, ...]
    score: Floats
    frequency: Floats
    size: Floats
    cost: Floats
    required: tuple[str, ...] = ()

    def only(self, experts: Sequence[str]) -> Problem:
        """The same problem with some of the experts."""
        at = [self.experts.index(name) for name in experts]
        return replace(
            self, experts=tuple(experts), score=self.score[:, at], size=self.size[at], cost=self.cost[at]
        )


@dataclass(frozen=True)
class Assignment:
    """A solved map.

    Args:
        serves: category -> expert.
        kept: the distinct experts of the map and those required, by name.
        score: expected, of a query of a known category.
        size: billions of parameters of the kept experts together; NaN if one is not known.
        cost: expected dollars a query; NaN if one is not known.
    """

    serves: Mapping[str, str]
    kept: tuple[str, ...]
    score: float
    size: float
    cost: float


def solve(
    problem: Problem, *, budget: float | None = None, mean_cost: float | None = None, seconds: float = 60.0
) -> Assignment:
    """The map of highest expected score under a budget of parameters, and under a limit of cost.

    Maximise ``sum_c frequency_c sum_e score_ce x_ce`` over binary ``x_ce`` (expert e serves category c) and ``y_e``
    (e is kept), where ``sum_e x_ce = 1``, ``x_ce <= y_e``, ``sum_e size_e y_e <= budget`` and
    ``sum_c frequency_c sum_e cost_e x_ce <= mean_cost``. Of equal maps the cheaper, then the smaller, then the one
    whose experts' names come first. Without limits every category simply gets its best expert. With them 64 categories
    and 30 experts take about a second, and 100 experts ten.

    Source: Jain et al. (2024), Composition of Experts, arXiv 2412.01868, the second of its two steps; the limit of cost
    is ours.

    Args:
        budget: billions of parameters of the distinct experts kept, 0 or more.
        mean_cost: dollars a query, 0 or more.
        seconds: after which the solver gives up, above 0.

    Raises:
        MixmergeError: a limit that no map keeps (with the least that one needs), a limit on what is not known of some
            expert, or no proven optimum in time.
    """
    _check(problem, budget, mean_cost)
    if budget is None and mean_cost is None:
        return assigned(problem, _best(problem, range(len(problem.experts))))
    found = _search(problem, ("score", "cost", "size", "name"), budget, mean_cost, seconds)
    if found is None:
        raise MixmergeError(_infeasible(problem, budget, mean_cost, seconds))
    return found


def pareto(
    problem: Problem,
    *,
    budgets: Sequence[float] | None = None,
    mean_cost: float | None = None,
    most: int = 100,
    seconds: float = 60.0,
) -> tuple[Assignment, ...]:
    """Expected score against parameters: the maps of a sweep of budgets, from small to large.

    Args:
        budgets: billions of parameters; those that hold no map are left out, and a map comes once. By default every
            map that no other beats in both score and size: the budget is lowered below each solution's size in turn,
            which finds all of them.
        mean_cost: as in ``solve``.
        most: maps, at most, the largest first; 1 or more.

    Raises:
        MixmergeError: as ``solve``; no budget is feasible.
    """
    _check(problem, 1.0, mean_cost)
    order = ("score", "size", "cost", "name")
    found: dict[tuple[str, ...], Assignment] = {}
    if budgets is not None:
        for budget in sorted(budgets):
            _check(problem, budget, mean_cost)
            one = _search(problem, order, budget, mean_cost, seconds)
            if one is not None:
                found.setdefault(tuple(one.serves.values()), one)
    else:
        step, budget = 4 * EQUAL * float(problem.size.max()), float(problem.size.sum())
        while len(found) < most and budget > 0:
            one = _search(problem, order, budget, mean_cost, seconds)
            if one is None:
                break
            found[tuple(one.serves.values())] = one
            budget = one.size - step
    if not found:
        largest = max(budgets) if budgets else None
        raise MixmergeError(_infeasible(problem, largest, mean_cost, seconds))
    return tuple(sorted(found.values(), key=lambda one: (one.size, one.score)))


def _best(problem: Problem, among: Sequence[int]) -> Indices:
    """``(C,)`` the best of these experts for every category by itself."""
    cheap = np.where(np.isnan(problem.cost), np.inf, problem.cost)
    small = np.where(np.isnan(problem.size), np.inf, problem.size)
    order = sorted(among, key=lambda e: (cheap[e], small[e], problem.experts[e]))
    score = problem.score[:, order]
    close = score >= score.max(axis=1, keepdims=True) - 1e-12 * max(1.0, float(np.abs(score).max()))
    best: Indices = np.array(order, np.int64)[close.argmax(axis=1)]
    return best


def assigned(problem: Problem, chosen: Indices) -> Assignment:
    """What a map costs and scores: ``(C,)`` the place of the expert of every category."""
    rows = np.arange(len(problem.categories))
    names = [problem.experts[e] for e in chosen]
    kept = sorted({*names, *problem.required})
    at = [problem.experts.index(name) for name in kept]
    return Assignment(
        dict(zip(problem.categories, names, strict=True)),
        tuple(kept),
        float(problem.frequency @ problem.score[rows, chosen]),
        float(problem.size[at].sum()),
        float(problem.frequency @ problem.cost[chosen]),
    )


@dataclass(frozen=True, eq=False)
class _Programme:
    """The programme in the solver's terms: one vector of ``y`` (E) and then ``x`` (C x E, category by category).

    Coefficients are scaled to about 1, so that the solver's tolerances mean the same for all of them.
    """

    goals: Mapping[str, Floats]
    constraints: tuple[Any, ...]
    lower: Floats

    @classmethod
    def of(cls, problem: Problem, budget: float | None, mean_cost: float | None) -> _Programme:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_array

        c, e = problem.score.shape
        y, x = np.arange(e), e + np.arange(c * e)
        spread = float(np.ptp(problem.score)) or 1.0
        gain = problem.frequency[:, None] * (problem.score - problem.score.min()) / spread
        names = np.argsort(np.argsort(problem.experts)) / e
        goals = {
            "score": np.concatenate([np.zeros(e), -gain.ravel()]),
            "name": np.concatenate([names, np.tile(names, c) / c]),
        }
        if not np.isnan(problem.size).any():
            goals["size"] = np.concatenate([problem.size / problem.size.max(), np.zeros(c * e)])
        if not np.isnan(problem.cost).any():
            paid = np.outer(problem.frequency, problem.cost / (problem.cost.max() or 1.0))
            goals["cost"] = np.concatenate([np.zeros(e), paid.ravel()])
        one = (np.ones(c * e), (np.repeat(np.arange(c), e), x))
        rows = np.arange(c * e)
        kept = (
            np.concatenate([np.ones(c * e), -np.ones(c * e)]),
            (np.concatenate([rows, rows]), np.concatenate([x, np.tile(y, c)])),
        )
        size = e + c * e
        constraints = [
            LinearConstraint(coo_array(one, shape=(c, size)).tocsr(), 1, 1),
            LinearConstraint(coo_array(kept, shape=(c * e, size)).tocsr(), -np.inf, 0),
        ]
        if budget is not None:
            constraints.append(
                LinearConstraint(goals["size"][None], -np.inf, budget / float(problem.size.max()))
            )
        if mean_cost is not None:
            limit = mean_cost / (float(problem.cost.max()) or 1.0)
            constraints.append(LinearConstraint(goals["cost"][None], -np.inf, limit))
        lower = np.zeros(size)
        lower[[problem.experts.index(name) for name in problem.required]] = 1.0
        return cls(goals, tuple(constraints), lower)

    def minimise(self, goals: Sequence[str], seconds: float) -> Floats | None:
        """The best for the first goal, of those the best for the second, ...; None if nothing keeps the limits."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        constraints, found = list(self.constraints), None
        for name in goals:
            if name not in self.goals:
                continue
            goal = self.goals[name]
            result = milp(
                goal,
                constraints=constraints,
                integrality=np.ones(len(goal)),
                bounds=Bounds(self.lower, np.ones(len(goal))),
                options={"mip_rel_gap": 0.0, "time_limit": seconds},
            )
            if result.status == 2 and found is None:
                return None
            if result.status in (2, 4) and found is not None:
                break  # numerically lost in a tie: what was found is the best, if not the first of equals
            if result.status != 0:
                raise MixmergeError(
                    Fault(
                        "categories",
                        f"the map was not solved to the optimum: {result.message}",
                        run="Allow more seconds, or use fewer categories or experts",
                    )
                )
            found = np.asarray(result.x, np.float64)
            constraints.append(LinearConstraint(goal[None], -np.inf, float(goal @ found) + EQUAL))
        return found


def _search(
    problem: Problem,
    goals: Sequence[str],
    budget: float | None,
    mean_cost: float | None,
    seconds: float,
) -> Assignment | None:
    """None if no map keeps the limits."""
    order = sorted(range(len(problem.experts)), key=lambda e: problem.experts[e])
    ordered = problem.only([problem.experts[e] for e in order])  # the order of the table decides no tie
    found = _Programme.of(ordered, budget, mean_cost).minimise(goals, seconds)
    if found is None:
        return None
    c, e = ordered.score.shape
    if mean_cost is not None or goals[0] == "cost":
        return assigned(ordered, found[e:].reshape(c, e).argmax(axis=1))
    return assigned(ordered, _best(ordered, [int(one) for one in np.flatnonzero(found[:e] > 0.5)]))


def _check(problem: Problem, budget: float | None, mean_cost: float | None) -> None:
    faults = []
    for name, limit, known, unit in (
        ("budget", budget, problem.size, "size of parameters"),
        ("mean_cost", mean_cost, problem.cost, "cost"),
    ):
        if limit is None:
            continue
        unknown = [problem.experts[e] for e in np.flatnonzero(np.isnan(known))]
        if unknown:
            faults.append(
                Fault(
                    name,
                    f"no {unit} is known of {', '.join(unknown)}",
                    run="Give it with the prices, or leave these experts out",
                )
            )
        if not limit >= 0 or not np.isfinite(limit):
            faults.append(Fault(name, f"is {limit}", "A number that is not negative"))
    if faults:
        raise MixmergeError(faults)


def _infeasible(
    problem: Problem, budget: float | None, mean_cost: float | None, seconds: float
) -> list[Fault]:
    """What the limits would have to be for a map to exist: each by itself, and with the other."""
    faults = []
    for name, limit, goal, unit in (
        ("budget", budget, "size", "billion parameters"),
        ("mean_cost", mean_cost, "cost", "dollars a query"),
    ):
        if limit is None:
            continue
        others = (None, mean_cost) if goal == "size" else (budget, None)
        least = _search(problem, (goal, "score", "name"), others[0], others[1], seconds)
        if least is None:  # the other limit alone is too tight already, and has its own line
            continue
        needs = least.size if goal == "size" else least.cost
        if needs <= limit:
            continue
        forced = f", {', '.join(problem.required)} required" if problem.required else ""
        kept = " + ".join(f"{one} {problem.size[problem.experts.index(one)]:g}" for one in least.kept)
        which = kept if goal == "size" else ", ".join(sorted(set(least.serves.values())))
        faults.append(
            Fault(
                name,
                f"no map keeps to {limit:g} {unit}{forced}",
                f"The least is {needs:g}: {which}",
            )
        )
    return faults or [Fault("budget", "no map keeps to the limits together", "Raise either of them")]
