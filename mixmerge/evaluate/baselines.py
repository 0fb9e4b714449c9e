"""What every router stands beside: constants, chance and oracles. Q queries, E experts, D draws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mixmerge.evaluate.choices import Choice, argmax_choice
from mixmerge.outcomes.table import OutcomeTable, column_means
from mixmerge.routers.draws import uniform
from mixmerge.routers.trained import text_hashes

Floats = NDArray[np.float64]


def random_choices(
    texts: Sequence[str], experts: Sequence[str], *, draws: int, seed: int
) -> NDArray[np.int64]:
    """``(D, Q)`` experts, each as likely as the others; a query's draws depend on the seed and its text alone."""
    by_name = np.argsort(np.asarray(experts))
    drawn = uniform(text_hashes(texts), np.arange(draws, dtype=np.uint64), seed=seed).T
    return np.asarray(by_name[np.floor(drawn * len(experts)).astype(np.int64)], np.int64)


def best_single(mean: Floats, cost: Floats | None, experts: Sequence[str]) -> int:
    """The expert with the best of ``(E,)`` mean scores; ties to the lower mean cost, then to the first name."""
    return int(argmax_choice(mean[None], None if cost is None else cost[None], experts)[0])


def best_single_of(table: OutcomeTable) -> int:
    """The best single expert of a table; in hindsight, if it is the table that is evaluated on."""
    costs = table.costs()
    return best_single(
        column_means(table.score), None if costs is None else column_means(costs), table.experts
    )


def constant(expert: int, queries: int) -> Choice:
    """The same expert for every query."""
    return np.full(queries, expert, np.int64)
