"""Routers evaluated on outcomes, beside constants, chance and oracles.

Q queries, E experts, K picks. What is not known stays unknown: a query on which nobody has a score is left out; a
choice whose score is missing is left out of that row's means and counted in ``unknown``; differences use the queries
where both are known. The policy gives picks; the first pick's score is the row's score, all picks' dollars its cost.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mixmerge import registry
from mixmerge.decision.records import Query, Scores, queries_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.evaluate.assembling import assembled
from mixmerge.evaluate.baselines import best_single_of
from mixmerge.evaluate.choices import stays
from mixmerge.evaluate.options import EvaluationOptions
from mixmerge.evaluate.records import RoutingReport
from mixmerge.evaluate.scored import Chooser, Scored, cross_validated, remembered_best
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.base import Progress, Router
from mixmerge.routers.costs import estimate_costs

__all__ = [
    "Chooser",
    "EvaluationOptions",
    "Scored",
    "cross_validated",
    "evaluate_routers",
    "evaluate_scores",
    "unseen",
]

Perturbation = Callable[[str], str]


def evaluate_routers(
    routers: Mapping[str, Router],
    table: OutcomeTable,
    options: EvaluationOptions | None = None,
    *,
    train: OutcomeTable | None = None,
    perturbations: Mapping[str, Perturbation] | None = None,
    progress: Progress | None = None,
) -> RoutingReport:
    """Compare fitted routers on outcomes that they were not fitted on.

    Constants and oracles are always in the report: a random choice, the best single expert of the routers' training
    data (what a user without a router would take), the cheapest, the best single in hindsight, the oracle of each
    task and of each query.

    Args:
        routers: name -> fitted router. Their experts are among the table's.
        table: outcomes to evaluate on.
        options: policy, intervals, draws and the like.
        train: outcomes on which the best single expert is chosen, instead of what each router remembers.
        perturbations: name -> rewording of a text; how many choices stay is reported for each.
        progress: told of every router and rewording that is scored, and of the measuring behind it.

    Raises:
        MixmergeError: a router is not fitted, has an expert the table lacks, or was fitted on evaluated queries;
            no scores; a number out of range.
    """
    options = options or EvaluationOptions()
    faults = [
        Fault(f"router {name}", "is not fitted", run="Fit it first: mixmerge route fit")
        for name, router in routers.items()
        if router.state is None
    ]
    if train is not None and not options.allow_trained:
        faults += _shared(table, train)
    if faults:
        raise MixmergeError(faults)
    changes = perturbations or {}
    steps = _Steps("scoring", len(routers) * (1 + len(changes)), progress)
    scored = [
        _scored(name, router, table, options.policy, train=train, perturbations=changes, steps=steps)
        for name, router in routers.items()
    ]
    by_length = [name for name, router in routers.items() if router.kind == "length"]
    against = tuple(dict.fromkeys([*options.against, *by_length]))
    return evaluate_scores(scored, table, replace(options, against=against), progress=progress)


def evaluate_scores(
    scored: Sequence[Scored],
    table: OutcomeTable,
    options: EvaluationOptions | None = None,
    *,
    progress: Progress | None = None,
) -> RoutingReport:
    """The same for scores that were made before, such as those of ``cross_validated``. Arguments as there."""
    options = options or EvaluationOptions()
    faults = [*options.faults(), *_misfits(scored, table, options.strong)]
    if not options.allow_trained:
        faults += [fault for one in scored if (fault := _leak(one, table)) is not None]
    if faults:
        raise MixmergeError(faults)
    known = [
        name for name in table.experts if not scored or any(name in one.scores.experts for one in scored)
    ]
    heard = np.asarray(~np.isnan(table.only(known).score).all(axis=1), np.bool_)
    if not heard.any():
        raise MixmergeError(Fault("outcomes", "no query has a score", "At least one row with a score"))
    kept = [_rows(one, heard) for one in scored]
    measured = table.rows(heard).only(known)
    estimate = estimate_costs(measured, output_tokens=options.output_tokens)
    steps = _Steps("measuring", 1, progress)
    report = assembled(
        kept,
        replace(measured, cost=estimate.cost) if estimate.experts else measured,
        options,
        estimate=estimate,
        notes=_left_out(table, heard, known),
    )
    steps.done()
    return report


class _Steps:
    """Counts what is done of one part, for a progress that may be None."""

    def __init__(self, part: str, number: int, progress: Progress | None) -> None:
        self.part, self.number, self.progress, self.count = part, number, progress, -1
        self.done()

    def done(self) -> None:
        self.count += 1
        if self.progress is not None and self.number:
            self.progress(self.part, self.count, self.number)


def unseen(table: OutcomeTable, routers: Mapping[str, Router]) -> OutcomeTable:
    """The queries that none of the routers was fitted on."""
    seen = np.zeros(len(table), np.bool_)
    for router in routers.values():
        if router.trained_on is not None:
            seen |= router.trained_on.saw(table.queries)
    return table.rows(~seen)


def _scored(
    name: str,
    router: Router,
    table: OutcomeTable,
    policy: Chooser,
    *,
    train: OutcomeTable | None,
    perturbations: Mapping[str, Perturbation],
    steps: _Steps,
) -> Scored:
    queries = queries_of(table)
    began = time.perf_counter()
    scores = router.score(queries)
    seconds = time.perf_counter() - began
    steps.done()
    first = policy.choose(scores, queries)[:, 0] if perturbations and len(queries) else None
    kept = {}
    for change, reworded in perturbations.items():
        if first is not None:
            other = [Query(reworded(one.text), id=one.id, metadata=one.metadata) for one in queries]
            kept[change] = stays(first, policy.choose(router.score(other), other)[:, 0])
            steps.done()
    best = remembered_best(router) if train is None else _best_of(train, router)
    return Scored(
        name,
        scores,
        best=None if best is None else (best,) * len(queries),
        trained=None if router.trained_on is None else router.trained_on.saw(table.queries),
        role="oracle" if _may_look(router) else "router",
        stays=kept,
        seconds=seconds,
    )


def _best_of(train: OutcomeTable, router: Router) -> str | None:
    shared = train.only([name for name in train.experts if name in router.experts])
    return shared.experts[best_single_of(shared)] if shared.experts else None


def _may_look(router: Router) -> bool:
    """It is a reference by its row in the table of routers: an oracle, fitted on what it is evaluated on."""
    return router.kind in registry.table("router") and bool(registry.find("router", router.kind).reference)


def _misfits(scored: Sequence[Scored], table: OutcomeTable, strong: str | None) -> list[Fault]:
    names = [one.name for one in scored]
    faults = [
        Fault(f"router {name}", "is there twice", "Names are unique")
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if strong is not None and strong not in table.experts:
        faults.append(Fault("strong", f"no expert is called {strong!r}", ", ".join(table.experts)))
    for one in scored:
        where = f"router {one.name}"
        unknown = [name for name in one.scores.experts if name not in table.experts]
        if unknown:
            allowed = f"The table has {', '.join(table.experts)}"
            faults.append(Fault(where, f"the table has no outcomes of {', '.join(unknown)}", allowed))
        lengths = {"scores": len(one.scores)}
        lengths |= {} if one.best is None else {"best": len(one.best)}
        lengths |= {} if one.trained is None else {"trained": len(one.trained)}
        faults += [
            Fault(where, f"has {what} of {length} queries", f"The table has {len(table)}")
            for what, length in lengths.items()
            if length != len(table)
        ]
        strangers = sorted(set(one.best or ()) - set(one.scores.experts))
        if strangers:
            allowed = f"Known: {', '.join(one.scores.experts)}"
            faults.append(
                Fault(where, f"its best single is no expert of it: {', '.join(strangers)}", allowed)
            )
    return faults


def _leak(one: Scored, table: OutcomeTable) -> Fault | None:
    if one.trained is None or one.role == "oracle" or not one.trained.any():
        return None
    number, first = int(one.trained.sum()), table.ids[int(np.argmax(one.trained))]
    return Fault(
        f"router {one.name}",
        f"was fitted on {number:,} of the {len(table):,} queries it would be evaluated on, such as {first}",
        "Queries it has not seen",
        "Leave them out, or allow it (EvaluationOptions.allow_trained): the report then says so",
    )


def _shared(table: OutcomeTable, train: OutcomeTable) -> list[Fault]:
    twice = set(table.queries) & set(train.queries)
    if not twice:
        return []
    return [
        Fault(
            "train",
            f"has {len(twice):,} of the queries that are evaluated on",
            "Other queries",
            "Leave them out, or allow it (EvaluationOptions.allow_trained)",
        )
    ]


def _rows(one: Scored, kept: NDArray[np.bool_]) -> Scored:
    scores = one.scores
    cost = None if scores.cost is None else scores.cost[kept]
    return replace(
        one,
        scores=Scores(scores.experts, scores.mean[kept], scores.std[kept], cost),
        best=None if one.best is None else tuple(np.asarray(one.best, object)[kept].tolist()),
        trained=None if one.trained is None else one.trained[kept],
    )


def _left_out(table: OutcomeTable, heard: NDArray[np.bool_], known: Sequence[str]) -> list[str]:
    notes = []
    silent = int((~heard).sum())
    if silent:
        notes.append(f"{silent:,} queries on which no expert has a score are left out.")
    dropped = [name for name in table.experts if name not in known]
    if dropped:
        notes.append(f"Experts that no router knows are left out: {', '.join(dropped)}.")
    return notes
