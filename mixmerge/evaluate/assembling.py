"""From scores to the whole report. Q queries, E experts, K picks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import queries_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.evaluate.baselines import best_single_of, constant
from mixmerge.evaluate.calibration import calibration
from mixmerge.evaluate.choices import Choice, degeneracy, of_choice, regret
from mixmerge.evaluate.measuring import RANDOM, Chosen, Extra, Ground, constants, measured
from mixmerge.evaluate.options import EvaluationOptions
from mixmerge.evaluate.pairs import pair_report
from mixmerge.evaluate.records import CostFigures, PairReport, RoutingReport
from mixmerge.evaluate.scored import Chooser, Scored
from mixmerge.evaluate.tradeoffs import Tradeoffs, tradeoffs
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.costs import CostEstimate

Floats = NDArray[np.float64]
FEW = 30  # queries; below, percentile intervals are clearly too narrow


def assembled(
    scored: Sequence[Scored],
    table: OutcomeTable,
    options: EvaluationOptions,
    *,
    estimate: CostEstimate,
    notes: Sequence[str],
) -> RoutingReport:
    """Measure scores that fit the table, every query of which has a known score."""
    seed, resamples, level = options.seed, options.resamples, options.level
    ground = Ground.of(
        table, tuple(queries_of(table)), estimate.expected, seed=seed, resamples=resamples, level=level
    )
    tasks = table.column(options.task)
    singles, best = _singles(scored, table)
    traded = tradeoffs(ground, {one.name: one.scores for one in scored}, best)
    chosen = [
        _chosen(one, ground, options.policy, best[one.name], traded.figures.get(one.name), options.against)
        for one in scored
    ]
    chosen += constants(ground, singles, tasks=tasks, draws=options.draws)
    chosen = _distinct(chosen, options.against)
    rows = measured(ground, chosen)
    return RoutingReport(
        ids=table.ids,
        experts=table.experts,
        policy=str(options.policy),
        rows=tuple(rows),
        best=_best_experts(table.score),
        singles=traded.singles,
        zero=traded.zero,
        cost_range=traded.cost_range,
        estimated=estimate.experts,
        pair=_pair(scored, ground, options.strong, singles, options.draws),
        notes=(
            *notes,
            *_cost_notes(scored, ground, traded, estimate),
            *_notes(scored, ground, options.task if tasks is None else None, options.draws),
        ),
        warnings=_few(table),
        seed=seed,
        resamples=resamples,
        level=level,
    )


def _singles(scored: Sequence[Scored], table: OutcomeTable) -> tuple[dict[str, Choice], dict[str, Choice]]:
    """The different best single experts of training data by the name of their row, and the one of every router."""
    place = {name: e for e, name in enumerate(table.experts)}
    hindsight = constant(best_single_of(table), len(table))
    rows: dict[str, Choice] = {}
    of: dict[str, Choice] = {}
    for one in scored:
        if one.best is None:
            of[one.name] = hindsight
            continue
        choice = np.array([place[name] for name in one.best], np.int64)
        same = next((name for name, other in rows.items() if np.array_equal(other, choice)), None)
        if same is None:
            names = sorted(set(one.best))
            same = f"best single: {names[0]}" if len(names) == 1 else f"best single of each fold ({one.name})"
            rows[same] = choice
        of[one.name] = rows[same]
    return rows, of


def _chosen(
    one: Scored,
    ground: Ground,
    policy: Chooser,
    best: Choice,
    curve: CostFigures | None,
    against: tuple[str, ...],
) -> Chosen:
    table, scores = ground.table, one.scores
    own = np.asarray(policy.choose(scores, ground.queries), np.int64).reshape(len(table), -1)
    place = np.array([table.experts.index(name) for name in scores.experts])
    outcomes = table.score[:, place]
    warnings = degeneracy(scores.mean, scores.std, outcomes, own[:, 0]).warnings() if own.size else []
    if one.trained is not None and one.trained.any():
        number = int(one.trained.sum())
        what = "looks at" if one.role == "oracle" else "WAS FITTED ON"
        why = "no router can" if one.role == "oracle" else "its figures are better than it is"
        warnings.insert(0, f"{what} {number:,} of these {len(table):,} queries: {why}")
    return Chosen(
        one.name,
        one.role,
        np.where(own >= 0, place[np.maximum(own, 0)], -1),
        best,
        expected=of_choice(scores.mean, own[:, 0]),
        against=tuple(name for name in against if name != one.name),
        extra=Extra(
            tuple(warnings), calibration(scores.mean, outcomes, scores.experts), curve, one.stays, one.seconds
        ),
    )


def _distinct(chosen: list[Chosen], against: tuple[str, ...]) -> list[Chosen]:
    """Rows with names of their own, all that others are compared with among them."""
    names = [one.name for one in chosen]
    faults = [
        Fault(f"router {name}", "has the name of a constant", run="Call it something else")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    faults += [
        Fault("against", f"the report has no row {name!r}", ", ".join(names))
        for name in against
        if name not in names
    ]
    if faults:
        raise MixmergeError(faults)
    return chosen


def _few(table: OutcomeTable) -> tuple[str, ...]:
    """Intervals of few queries say less than they seem to."""
    texts = len(set(table.queries))
    return (
        ()
        if texts >= FEW
        else (f"only {texts} different queries: intervals are rough, and small gains chance",)
    )


def _best_experts(score: Floats) -> NDArray[np.bool_]:
    """``(Q, E)``: who has the best known score of each query."""
    best = regret(score, np.zeros(len(score)))
    return np.asarray(score == best[:, None], np.bool_)


def _pair(
    scored: Sequence[Scored], ground: Ground, strong: str | None, singles: Mapping[str, Choice], draws: int
) -> PairReport | None:
    experts = ground.table.experts
    if len(experts) != 2:
        return None
    if strong is None:
        constant_ones = [choice for choice in singles.values() if len(choice) and (choice == choice[0]).all()]
        strong = experts[constant_ones[0][0] if constant_ones else best_single_of(ground.table)]
    both = {one.name: one.scores for one in scored if len(one.scores.experts) == 2}
    return pair_report(ground, both, strong=strong, draws=draws)


def _cost_notes(
    scored: Sequence[Scored], ground: Ground, traded: Tradeoffs, estimate: CostEstimate
) -> list[str]:
    if ground.cost is None:
        return ["No costs are known: no curves of cost. Prices of the experts are enough for estimates."]
    notes = []
    if estimate.experts:
        notes.append(f"Costs of {', '.join(estimate.experts)} are estimated, {estimate.rule}.")
    without = [one.name for one in scored if one.name not in traded.figures]
    if without:
        notes.append(f"No curve of cost for {', '.join(without)}: no costs are expected of its experts.")
    return notes


def _notes(scored: Sequence[Scored], ground: Ground, no_tasks: str | None, draws: int) -> list[str]:
    notes = [f"{RANDOM!r} is the mean of {draws} draws; intervals are over queries."]
    unknown = [one.name for one in scored if one.best is None]
    if unknown:
        notes.append(
            f"What {', '.join(unknown)} was fitted on is not known: compared with the best single in hindsight."
        )
    if no_tasks is not None:
        notes.append(f"No oracle of tasks: the outcomes have no column {no_tasks!r}.")
    missing = int(np.isnan(ground.table.score).sum())
    if missing:
        share = missing / ground.table.score.size
        notes.append(
            f"{missing:,} scores ({share:.1%}) are not known: choices without one are left out of means and counted."
        )
    repeated = len(ground.groups) - len(np.unique(ground.groups))
    if repeated:
        notes.append(
            f"{repeated:,} queries repeat the text of another; they are drawn together in resamples."
        )
    return notes
