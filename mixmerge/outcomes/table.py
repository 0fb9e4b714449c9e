"""The table itself: queries x experts, any entry of which may be missing.

Q queries, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError

Floats = NDArray[np.float64]
MEASURES = ("score", "cost", "tokens_in", "tokens_out", "latency")


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens.

    Args:
        input, output: 0 or more, finite.
        size: parameters of the expert in billions, where known; what a budget of parameters counts.
    """

    input: float
    output: float
    size: float | None = None


@dataclass(frozen=True, eq=False)
class OutcomeTable:
    """What every expert scored on every query, and what that took.

    Args:
        ids: unique names of the queries, Q.
        queries: their texts, Q.
        experts: unique names, E.
        score: ``(Q, E)``, finite, higher is better; NaN where it is not known.
        cost: ``(Q, E)`` dollars, or None if nothing is known. NaN where it is not known; as the next three.
        tokens_in, tokens_out: ``(Q, E)`` tokens of prompt and answer.
        latency: ``(Q, E)`` seconds.
        metadata: further columns of text by name (``task``, ``category``, ...), Q each; "" where missing.
        prices: of some of the experts.

    Raises:
        MixmergeError: shapes that do not fit, a name twice, infinite scores, negative costs: all at once.
    """

    ids: tuple[str, ...]
    queries: tuple[str, ...]
    experts: tuple[str, ...]
    score: Floats
    cost: Floats | None = None
    tokens_in: Floats | None = None
    tokens_out: Floats | None = None
    latency: Floats | None = None
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prices: Mapping[str, Price] = field(default_factory=dict)

    def __post_init__(self) -> None:
        faults = [*self._wrong_names(), *self._wrong_measures()]
        if faults:
            raise MixmergeError(faults)

    def _wrong_names(self) -> list[Fault]:
        faults = [
            Fault(f"outcomes.{what}", f"{twice!r} is there twice", "Names are unique")
            for what, names in (("ids", self.ids), ("experts", self.experts))
            if (twice := _twice(names)) is not None
        ]
        columns = {"queries": self.queries, **{f"metadata.{k}": v for k, v in self.metadata.items()}}
        faults += [
            Fault(f"outcomes.{name}", f"has {len(column)} rows", f"There are {len(self.ids)} ids")
            for name, column in columns.items()
            if len(column) != len(self.ids)
        ]
        unknown = sorted(set(self.prices) - set(self.experts))
        if unknown:
            faults.append(
                Fault("outcomes.prices", f"no expert is called {', '.join(unknown)}", ", ".join(self.experts))
            )
        return faults

    def _wrong_measures(self) -> list[Fault]:
        faults, shape = [], (len(self.ids), len(self.experts))
        for name in MEASURES:
            values = getattr(self, name)
            if values is None and name != "score":
                continue
            where = f"outcomes.{name}"
            if values.shape != shape:
                faults.append(Fault(where, f"has shape {values.shape}", f"{shape}: queries x experts"))
            elif np.isinf(values).any():
                faults.append(Fault(where, "holds infinite values", "Finite, or missing"))
            elif name != "score" and (values < 0).any():
                faults.append(Fault(where, "holds negative values", "0 or more, or missing"))
        return faults

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def read(
        cls,
        path: str | Path,
        *,
        kind: str | None = None,
        prices: str | Path | None = None,
        queries: str | Path | None = None,
        leave_out: str | Path | None = None,
    ) -> OutcomeTable:
        """Read outcomes from a file or folder; ``mixmerge.outcomes.reading.read`` says which and how."""
        from mixmerge.outcomes.reading import read

        def given(name: str | Path | None) -> Path | None:
            return None if name is None else Path(name)

        return read(
            Path(path), kind=kind, prices=given(prices), queries=given(queries), leave_out=given(leave_out)
        )

    def write(self, path: str | Path) -> None:
        """Write the table to a ``.parquet`` or ``.jsonl`` file, whole or not at all."""
        from mixmerge.outcomes.writing import write

        write(self, Path(path))

    def rows(self, chosen: Sequence[int] | NDArray[np.int64] | NDArray[np.bool_]) -> OutcomeTable:
        """The chosen queries, in the order given: indices, or one flag per query."""
        index = np.asarray(chosen)
        index = np.flatnonzero(index) if index.dtype == np.bool_ else index.astype(np.int64)
        return replace(
            self,
            ids=tuple(self.ids[i] for i in index),
            queries=tuple(self.queries[i] for i in index),
            metadata={name: tuple(column[i] for i in index) for name, column in self.metadata.items()},
            score=self.score[index],
            cost=None if self.cost is None else self.cost[index],
            tokens_in=None if self.tokens_in is None else self.tokens_in[index],
            tokens_out=None if self.tokens_out is None else self.tokens_out[index],
            latency=None if self.latency is None else self.latency[index],
        )

    def only(self, experts: Sequence[str]) -> OutcomeTable:
        """The same queries with these experts, in this order.

        Raises:
            MixmergeError: an expert the table does not have.
        """
        unknown = [name for name in experts if name not in self.experts]
        if unknown:
            raise MixmergeError(
                Fault("experts", f"no outcomes of {', '.join(unknown)}", f"Known: {', '.join(self.experts)}")
            )
        at = [self.experts.index(name) for name in experts]
        return replace(
            self,
            experts=tuple(experts),
            prices={name: self.prices[name] for name in experts if name in self.prices},
            score=self.score[:, at],
            cost=None if self.cost is None else self.cost[:, at],
            tokens_in=None if self.tokens_in is None else self.tokens_in[:, at],
            tokens_out=None if self.tokens_out is None else self.tokens_out[:, at],
            latency=None if self.latency is None else self.latency[:, at],
        )

    def priced(self, prices: Mapping[str, Price]) -> OutcomeTable:
        """The same table with these prices; those it has already are replaced."""
        return replace(self, prices={**self.prices, **prices})

    def column(self, name: str) -> tuple[str, ...] | None:
        """A column of metadata, or None if the table does not have it."""
        return self.metadata.get(name)

    def costs(self) -> Floats | None:
        """``(Q, E)`` dollars: as recorded, else from prices and tokens; None if neither is known at all."""
        known = np.full(self.score.shape, np.nan) if self.cost is None else self.cost.copy()
        if self.tokens_in is not None and self.tokens_out is not None:
            for e, name in enumerate(self.experts):
                if name in self.prices:
                    price, gap = self.prices[name], np.isnan(known[:, e])
                    spent = price.input * self.tokens_in[:, e] + price.output * self.tokens_out[:, e]
                    known[gap, e] = spent[gap] / 1e6
        return None if np.isnan(known).all() else known


def column_means(values: Floats) -> Floats:
    """Means of the known values of each column, NaN without any."""
    there = ~np.isnan(values)
    count = there.sum(axis=0)
    return np.where(count > 0, np.where(there, values, 0.0).sum(axis=0) / np.maximum(count, 1), np.nan)


def _twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
