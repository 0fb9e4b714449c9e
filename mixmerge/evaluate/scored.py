"""Scores that are ready to be evaluated, and the choices they lead to. Q queries, E experts, K picks."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query, Scores, queries_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.evaluate.baselines import best_single
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.base import Router


class Chooser(Protocol):
    """What a policy has to be able to do here; those of ``mixmerge.decision.policies`` are."""

    def choose(self, scores: Scores, queries: Sequence[Query]) -> NDArray[np.int64]:
        """``(Q, K)`` places in ``scores.experts``, best first, -1 for none."""


@dataclass(frozen=True, eq=False)
class Scored:
    """What a router expects on the queries of a table; for scores that come from elsewhere, make it yourself.

    Args:
        name: of its row.
        scores: on all Q queries of the table, in their order; its experts are among the table's.
        best: ``(Q,)`` names: for each query the best single expert of the outcomes that the scores are fitted on.
            None if that is not known.
        trained: ``(Q,)`` flags: fitted on this very query. None if it is not known that any was.
        role: ``router``, or ``oracle`` for one that may look at the outcomes it is evaluated on.
        stays: perturbation -> part of the queries whose choice it leaves.
        seconds: taken to score.
    """

    name: str
    scores: Scores
    best: tuple[str, ...] | None = None
    trained: NDArray[np.bool_] | None = None
    role: str = "router"
    stays: Mapping[str, float] = field(default_factory=dict)
    seconds: float | None = None


def cross_validated(
    name: str,
    make: Callable[[], Router],
    table: OutcomeTable,
    folds: Sequence[NDArray[np.int64]],
) -> Scored:
    """Scores of every query by a router that was fitted on the other folds.

    The best single expert is that of each fold's training part.

    Args:
        name: of the row.
        make: an unfitted router, once for each fold.
        table: outcomes of all queries.
        folds: places of the queries that each fold holds out; every query in exactly one. Queries with the same text
            belong in one fold: ``mixmerge.outcomes`` splits like that, and an evaluation refuses others.

    Raises:
        MixmergeError: the folds do not part the queries.
    """
    number = len(table)
    places = np.concatenate([np.asarray(fold, np.int64) for fold in folds]) if len(folds) else np.empty(0)
    if len(folds) < 2 or not np.array_equal(np.sort(places), np.arange(number)):
        raise MixmergeError(
            Fault(
                "folds",
                "do not part the queries",
                f"Two or more, each of the {number} queries in one of them",
            )
        )
    queries = queries_of(table)
    mean, std = np.empty(table.score.shape), np.empty(table.score.shape)
    cost = np.full(table.score.shape, np.nan)
    best, trained = np.empty(number, object), np.zeros(number, np.bool_)
    seconds = 0.0
    for fold in folds:
        router = make().fit(table.rows(np.setdiff1d(np.arange(number), fold)))
        held = [queries[i] for i in fold]
        began = time.perf_counter()
        scores = router.score(held)
        seconds += time.perf_counter() - began
        mean[fold], std[fold] = scores.mean, scores.std
        if scores.cost is not None:
            cost[fold] = scores.cost
        if router.trained_on is not None:
            trained[fold] = router.trained_on.saw([query.text for query in held])
        best[fold] = remembered_best(router)
    every = None if np.isnan(cost).all() else cost
    return Scored(
        name,
        Scores(table.experts, mean, std, every),
        best=None if any(one is None for one in best) else tuple(best.tolist()),
        trained=trained,
        seconds=seconds,
    )


def remembered_best(router: Router) -> str | None:
    """The best single expert of what a router was fitted on; None if it does not remember."""
    known = router.trained_on
    return None if known is None else router.experts[best_single(known.mean, known.cost, router.experts)]
