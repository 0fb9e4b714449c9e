"""The contract of a router: fit on outcomes, score queries, save, load, add and remove experts.

Q queries, E experts, D dimensions of an embedding. A router is three pure functions of arrays, ``learn``, ``predict``
and, where it can, ``extend``; everything else is here: texts to embeddings, checks, costs, files.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from mixmerge.decision.records import Query, Scores, as_queries, queries_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable, Price, column_means
from mixmerge.routers.costs import CostModel
from mixmerge.routers.features import Features, TfidfFeatures
from mixmerge.routers.trained import TrainedOn

Floats = NDArray[np.float64]
Embedding = NDArray[np.float32]
BLOCK = 32_768  # queries scored at a time: what a prediction needs stays bounded
Progress = Callable[[str, int, int], None]  # part, steps done, steps in all
UNSAVED = "unsaved"  # version of a router that is not what a folder holds


class Options(BaseModel):
    """Options of a router: subclass it with one field per option, each with a default and bounds."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a router sees of queries.

    Args:
        texts: Q.
        metadata: columns of text, Q each; "" where missing.
        embedding: ``(Q, D)`` float32 of unit length; None for a router that does not embed.
    """

    texts: tuple[str, ...]
    metadata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    embedding: Embedding | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def embedded(self) -> Embedding:
        """The embedding, which must be there."""
        if self.embedding is None:
            raise ValueError("this router declared embeds = False")
        return self.embedding


@dataclass(frozen=True, eq=False)
class Training:
    """What a router learns from.

    Args:
        inputs: of the queries, Q.
        score: ``(Q, E)``, NaN where missing; every expert and every query has at least one.
        experts: names, E.
        costs: ``(E,)`` mean dollars a query, NaN where not known.
        prices: of the experts that have one.
    """

    inputs: Inputs
    score: Floats
    experts: tuple[str, ...]
    costs: Floats
    prices: Mapping[str, Price]


@dataclass(frozen=True, eq=False)
class State:
    """What a fitted router knows. Arrays are saved as safetensors, values as JSON."""

    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prediction:
    """``(Q, E)`` expected score, and the standard deviation of that expectation."""

    mean: Floats
    std: Floats


class Router(ABC):
    """A router of one kind.

    Args:
        options: of its ``Options`` class, or a mapping of them.
        features: what turns texts into embeddings; TF-IDF and SVD by default.
        seed: of everything random in fitting and scoring.

    Raises:
        MixmergeError: an option that does not exist or has a wrong value.
    """

    kind: ClassVar[str]
    options_type: ClassVar[type[Options]] = Options
    # It needs embeddings of the queries.
    embeds: ClassVar[bool] = True
    # Arrays of the state whose last axis is the experts: what removing one takes from.
    per_expert: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        options: Options | Mapping[str, Any] | None = None,
        *,
        features: Features | None = None,
        seed: int = 0,
    ) -> None:
        self.options = _options(self.kind, self.options_type, options)
        self.features: Features | None = (features or TfidfFeatures()) if self.embeds else None
        self.seed = seed
        self.experts: tuple[str, ...] = ()
        self.costs: CostModel | None = None
        self.state: State | None = None
        self.trained_on: TrainedOn | None = None
        self.version = UNSAVED  # or the first digits of its fingerprint

    @property
    def independent(self) -> bool:
        """Whether an expert's scores depend on no other expert's outcomes."""
        return False

    @abstractmethod
    def learn(self, data: Training) -> State:
        """What to know, from outcomes. Pure: ``self`` gives options and seed only."""

    @abstractmethod
    def predict(self, state: State, inputs: Inputs) -> Prediction:
        """Expected scores. Row by row: what a query gets depends on no other query of the batch. Finite."""

    def extend(self, state: State, data: Training) -> State:
        """``state`` with the experts of ``data`` behind those it has, the others' scores unchanged.

        Raises:
            MixmergeError: this kind of router cannot; it has to be fitted again.
        """
        raise MixmergeError(
            Fault(
                f"router {self.kind}",
                "cannot add an expert without the others' outcomes",
                run="Fit it again on a table that has all experts",
            )
        )

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        """Why, for each query: JSON values, such as the ``top`` nearest ``neighbours``."""
        return [{} for _ in range(len(inputs))]

    # --- what users call

    def fit(self, table: OutcomeTable, *, progress: Progress | None = None) -> Self:
        """Fit on outcomes.

        Args:
            table: the outcomes.
            progress: told when the features are fitted, the queries embedded, and the scores learned.

        Raises:
            MixmergeError: no query or no expert has a score.
        """

        def tell(done: int) -> None:
            if progress is not None:
                progress("fitting", done, 3)

        table = _scored(table)
        tell(0)
        if self.features is not None:
            self.features = self.features.fit(table.queries)
        tell(1)
        self.experts = table.experts
        self.costs = CostModel.fit(table)
        training = self._training(table)
        tell(2)
        self.state = self.learn(training)
        tell(3)
        self.trained_on = TrainedOn.of(table)
        self.version = UNSAVED
        return self

    def score(self, queries: Iterable[str | Query]) -> Scores:
        """Expected score, uncertainty and cost of every expert on every query."""
        parts = [scores for _, scores in self.score_blocks(queries)]
        empty = np.empty((0, len(self.experts)))
        mean = np.concatenate([empty, *(part.mean for part in parts)])
        std = np.concatenate([empty, *(part.std for part in parts)])
        costs = [empty, *(part.cost for part in parts if part.cost is not None)]
        return Scores(self.experts, mean, std, None if self.costs is None else np.concatenate(costs))

    def score_blocks(
        self, queries: Iterable[str | Query], *, block: int = BLOCK
    ) -> Iterator[tuple[tuple[Query, ...], Scores]]:
        """The queries and their scores a block at a time, as they come: no more than a block is held.

        Args:
            queries: any number, such as a generator.
            block: queries of each but the last, 1 or more. What a query gets does not depend on it.
        """
        if block < 1:
            raise MixmergeError(Fault("block", f"is {block}", "1 or more"))
        return self._score_blocks(self._fitted(), iter(queries), block)

    def _score_blocks(
        self, state: State, queries: Iterator[str | Query], block: int
    ) -> Iterator[tuple[tuple[Query, ...], Scores]]:
        while some := as_queries(islice(queries, block)):
            found = self.predict(state, self._inputs(some))
            cost = None if self.costs is None else self.costs.expect([query.text for query in some])
            yield some, Scores(self.experts, found.mean, found.std, cost)

    def reasons(self, queries: Iterable[str | Query], *, top: int = 5) -> list[dict[str, Any]]:
        """What the scores of each query rest on."""
        return self.explain(self._fitted(), self._inputs(as_queries(queries)), top=top)

    def add_expert(self, table: OutcomeTable) -> Self:
        """Add the experts of a table, without fitting the others again.

        Raises:
            MixmergeError: the router has one of that name, or cannot add without fitting.
        """
        state, table = self._fitted(), _scored(table)
        there = [name for name in table.experts if name in self.experts]
        if there:
            raise MixmergeError(
                Fault("experts", f"the router has {', '.join(there)} already", run="Remove it first")
            )
        self.state = self.extend(state, self._training(table))
        self.experts = (*self.experts, *table.experts)
        if self.costs is not None:
            self.costs = self.costs.extended(CostModel.fit(table), experts=len(table.experts))
        if self.trained_on is not None:
            self.trained_on = self.trained_on.extended(TrainedOn.of(table))
        self.version = UNSAVED
        return self

    def remove_expert(self, name: str) -> Self:
        """Forget an expert.

        Raises:
            MixmergeError: there is no such expert, it is the last one, or its kind has to be fitted again.
        """
        state = self._fitted()
        if name not in self.experts:
            raise MixmergeError(
                Fault("experts", f"the router has no expert {name!r}", f"Known: {', '.join(self.experts)}")
            )
        if len(self.experts) == 1:
            raise MixmergeError(Fault("experts", f"{name!r} is the router's only expert"))
        at = self.experts.index(name)
        self.state = self.without(state, at)
        self.experts = (*self.experts[:at], *self.experts[at + 1 :])
        if self.costs is not None:
            self.costs = self.costs.without(at)
        if self.trained_on is not None:
            self.trained_on = self.trained_on.without(at)
        self.version = UNSAVED
        return self

    def without(self, state: State, at: int) -> State:
        """``state`` without the expert at that place: by default, out of the arrays named in ``per_expert``."""
        if not self.per_expert:
            raise MixmergeError(
                Fault(f"router {self.kind}", "cannot remove an expert", run="Fit it again without the expert")
            )
        cut = {name: np.delete(state.arrays[name], at, axis=-1) for name in self.per_expert}
        return replace(state, arrays={**state.arrays, **cut})

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the router as a folder of safetensors and JSON, whole or not at all."""
        from mixmerge.routers.storage import save

        save(self, Path(folder), overwrite=overwrite)

    @staticmethod
    def load(folder: str | Path) -> Router:
        """Read a router that ``save`` wrote, of whatever kind."""
        from mixmerge.routers.storage import load

        return load(Path(folder))

    # --- shared by them

    def _fitted(self) -> State:
        if self.state is None:
            raise MixmergeError(
                Fault(f"router {self.kind}", "is not fitted", run="Call fit with outcomes first")
            )
        return self.state

    def _training(self, table: OutcomeTable) -> Training:
        costs = table.costs()
        mean = np.full(len(table.experts), np.nan) if costs is None else column_means(costs)
        return Training(self._inputs(queries_of(table)), table.score, table.experts, mean, table.prices)

    def _inputs(self, queries: Sequence[Query]) -> Inputs:
        names = sorted({name for query in queries for name in query.metadata})
        metadata = {name: tuple(query.metadata.get(name, "") for query in queries) for name in names}
        embedding = None if self.features is None else self.features.embed(queries)
        return Inputs(tuple(query.text for query in queries), metadata, embedding)


def _scored(table: OutcomeTable) -> OutcomeTable:
    """The table without queries that nobody has a score on."""
    known = np.asarray(~np.isnan(table.score), np.bool_)
    if not known.any():
        raise MixmergeError(Fault("outcomes", "no query has a score", "At least one row with a score"))
    silent = [name for e, name in enumerate(table.experts) if not known[:, e].any()]
    if silent:
        raise MixmergeError(
            Fault("outcomes", f"no query has a score of {', '.join(silent)}", run="Leave these experts out")
        )
    heard = np.flatnonzero(known.any(axis=1))
    return table if len(heard) == len(table) else table.rows(heard)


def _options(kind: str, kind_options: type[Options], given: Options | Mapping[str, Any] | None) -> Options:
    if isinstance(given, kind_options):
        return given
    try:
        return kind_options.model_validate(dict(given or {}))
    except ValidationError as error:
        known = ", ".join(kind_options.model_fields) or "none"
        raise MixmergeError(
            Fault(
                f"router {kind}: {'.'.join(map(str, one['loc'])) or 'options'}",
                one["msg"].replace("Extra inputs are not permitted", "no such option"),
                f"Options: {known}",
            )
            for one in error.errors()
        ) from error
