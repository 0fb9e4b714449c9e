"""What to know of a table before a router is fitted on it. Q queries, E experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.similar import SIMILARITY, groups, near, text_key
from mixmerge.outcomes.table import Floats, OutcomeTable


@dataclass(frozen=True)
class ExpertReport:
    """One expert's outcomes.

    Args:
        name: of the expert.
        coverage: share of queries it has a score on.
        mean: of its scores; None if it has none.
        best: queries on which no other expert scores higher, ties counted.
        alone: of these, those on which every other one scores lower.
        cost: mean dollars a query, recorded or from prices and tokens; None if not known.
    """

    name: str
    coverage: float
    mean: float | None
    best: int
    alone: int
    cost: float | None


@dataclass(frozen=True)
class TableReport:
    """What a table is like.

    Args:
        rows: queries.
        experts: each one's outcomes.
        tasks: queries by the column ``task``; empty without it.
        exact: queries whose text, but for case and spacing, came before.
        near: of the others, those that are near to one with a smaller hash (``mixmerge.outcomes.similar``), directly
            or over others; None if that was not looked at.
        groups: ids of queries that are the same or near, two or more in each group, the largest first.
        scored: queries with at least one score.
        ties: of these, queries on which two or more experts share the best score.
        all_zero: of these, queries on which every known score is 0.
        all_equal: of these, queries on which two or more scores are known and all are the same, 0 included.
        missing: share of all scores that are missing.
        cost: lowest and highest cost of one answer in dollars; None if no cost is known.
        oracle: mean over scored queries of the best score; None if there is no score.
    """

    rows: int
    experts: tuple[ExpertReport, ...]
    tasks: dict[str, int]
    exact: int
    near: int | None
    groups: tuple[tuple[str, ...], ...]
    scored: int
    ties: int
    all_zero: int
    all_equal: int
    missing: float
    cost: tuple[float, float] | None
    oracle: float | None

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""

        def of_scored(count: int) -> str:
            return f"{count:,} ({count / max(self.scored, 1):.1%})"

        found = [
            f"{self.rows:,} queries x {len(self.experts)} experts, {self.missing:.1%} of scores missing"
            + (f", {len(self.tasks)} tasks" if self.tasks else ""),
            f"duplicates: {self.exact:,} exact"
            + ("" if self.near is None else f", {self.near:,} near")
            + (f"; the largest group has {len(self.groups[0]):,} queries" if self.groups else ""),
            f"ties for best {of_scored(self.ties)}, all zero {of_scored(self.all_zero)}, "
            f"all equal {of_scored(self.all_equal)}",
        ]
        if self.oracle is not None:
            found.append(f"best expert on each query {self.oracle:.3f}")
        if self.cost is not None:
            found.append(f"cost of an answer from ${self.cost[0]:.3g} to ${self.cost[1]:.3g}")
        width = max((len(one.name) for one in self.experts), default=0)
        for one in sorted(
            self.experts, key=lambda one: (-(one.mean if one.mean is not None else -np.inf), one.name)
        ):
            mean = "  -  " if one.mean is None else f"{one.mean:.3f}"
            cost = "" if one.cost is None else f", ${one.cost:.3g} a query"
            found.append(
                f"{one.name:<{width}}  mean {mean}  best on {one.best:,} (alone {one.alone:,}), "
                f"has {one.coverage:.1%}{cost}"
            )
        return [*found, *self._warnings()]

    def _warnings(self) -> list[str]:
        found = []
        if len(self.experts) == 1:
            found.append("warning: one expert, so there is nothing to route")
        if self.scored < self.rows:
            found.append(f"warning: {self.rows - self.scored:,} queries have no score at all")
        found += [f"warning: {one.name} has no score at all" for one in self.experts if one.mean is None]
        if self.groups and len(self.groups[0]) > max(10, self.rows // 10):
            found.append("warning: more than a tenth of the queries are one group, which no split parts")
        return found


def check(table: OutcomeTable, *, similarity: float | None = SIMILARITY) -> TableReport:
    """Look at a table.

    Args:
        similarity: from which queries are near duplicates, in (0, 1]; None looks at exact ones only, which is faster.
    """
    score = table.score
    known = ~np.isnan(score)
    heard = known.any(axis=1)
    count = known.sum(axis=1)
    best = np.where(known, score, -np.inf).max(axis=1, initial=-np.inf)
    is_best = known & (score == best[:, None])
    sharing = is_best.sum(axis=1)
    costs = table.costs()
    same = len({text_key(text) for text in table.queries})
    labels = groups(table.queries, similarity=similarity)
    distinct = int(labels.max(initial=-1)) + 1
    return TableReport(
        rows=len(table),
        experts=tuple(
            ExpertReport(
                name=name,
                coverage=float(known[:, e].mean()) if len(table) else 0.0,
                mean=_mean(score[:, e]),
                best=int(is_best[:, e].sum()),
                alone=int((is_best[:, e] & (sharing == 1)).sum()),
                cost=None if costs is None else _mean(costs[:, e]),
            )
            for e, name in enumerate(table.experts)
        ),
        tasks=_counts(table.column("task")),
        exact=len(table) - same,
        near=None if similarity is None else same - distinct,
        groups=_members(table.ids, labels),
        scored=int(heard.sum()),
        ties=int((sharing > 1).sum()),
        all_zero=int((heard & (np.where(known, score, 0.0) == 0).all(axis=1)).sum()),
        all_equal=int(((count > 1) & (sharing == count)).sum()),
        missing=float(1.0 - known.mean()) if known.size else 0.0,
        cost=None if costs is None else (float(np.nanmin(costs)), float(np.nanmax(costs))),
        oracle=float(best[heard].mean()) if heard.any() else None,
    )


@dataclass(frozen=True)
class Leaks:
    """Queries of a test table that are in a training table too.

    Args:
        tested: queries of the test table.
        exact: (row of test, row of train) with the same text, but for case and spacing.
        near: (row of test, row of train, cosine) with a near one, the nearest; without those of ``exact``.
        ids: of the test rows of both, in their order.
    """

    tested: int
    exact: tuple[tuple[int, int], ...]
    near: tuple[tuple[int, int, float], ...]
    ids: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{len(self.exact):,} of {self.tested:,} test queries are in the training table, and {len(self.near):,} "
            f"nearly; {self.tested - len(self.ids):,} are clean"
        ]


def leaks(train: OutcomeTable, test: OutcomeTable, *, similarity: float | None = SIMILARITY) -> Leaks:
    """Compare two tables. ``without(test, leaks(train, test).ids)`` is the clean part.

    Args:
        similarity: from which queries are near, in (0, 1]; None looks at exact ones only.
    """
    first: dict[str, int] = {}
    for i, text in enumerate(train.queries):
        first.setdefault(text_key(text), i)
    keys = [text_key(text) for text in test.queries]
    exact = tuple((i, first[key]) for i, key in enumerate(keys) if key in first)
    rest = [i for i, key in enumerate(keys) if key not in first]
    close: tuple[tuple[int, int, float], ...] = ()
    if similarity is not None:
        at, cosine = near([test.queries[i] for i in rest], train.queries, similarity=similarity)
        close = tuple((i, int(at[n]), float(cosine[n])) for n, i in enumerate(rest) if at[n] >= 0)
    leaked = sorted([pair[0] for pair in exact] + [pair[0] for pair in close])
    return Leaks(len(test), exact, close, tuple(test.ids[i] for i in leaked))


def without(table: OutcomeTable, ids: Iterable[str]) -> OutcomeTable:
    """The table without these queries.

    Raises:
        MixmergeError: an id the table does not have.
    """
    gone = set(ids)
    unknown = sorted(gone - set(table.ids))
    if unknown:
        raise MixmergeError(Fault("ids", f"no query is called {', '.join(unknown[:5])}", "Ids of the table"))
    return table.rows(np.array([name not in gone for name in table.ids], np.bool_))


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _counts(column: tuple[str, ...] | None) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in column or ():
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))


def _members(ids: tuple[str, ...], labels: Any) -> tuple[tuple[str, ...], ...]:
    members: dict[int, list[str]] = {}
    for name, label in zip(ids, labels.tolist(), strict=True):
        members.setdefault(label, []).append(name)
    several = [tuple(names) for names in members.values() if len(names) > 1]
    return tuple(sorted(several, key=lambda names: (-len(names), names)))
