"""What goes in and comes out of routing. Q queries, E experts, D dimensions of an embedding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import OutcomeTable

Floats = NDArray[np.float64]
MAX_CHARACTERS = 10_000_000  # a query longer than this is a mistake, not a prompt


@dataclass(frozen=True, eq=False)
class Query:
    """One thing that is asked.

    Args:
        text: what is asked; not blank, at most ``MAX_CHARACTERS``.
        id: its name in decisions and answers; by default 16 hex digits of the text's hash.
        metadata: labels that a router may use, such as ``task``.
        embedding: ``(D,)``, for routers fitted on precomputed embeddings.
    """

    text: str
    id: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    embedding: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        where = f"query {self.id}" if self.id else "query"
        if not self.text.strip():
            raise MixmergeError(
                Fault(where, "is empty", "Text of at least one character that is not a space")
            )
        if len(self.text) > MAX_CHARACTERS:
            raise MixmergeError(
                Fault(where, f"has {len(self.text):,} characters", f"At most {MAX_CHARACTERS:,}")
            )
        try:
            encoded = self.text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise MixmergeError(Fault(where, "is not valid Unicode text", "UTF-8")) from error
        if not self.id:
            object.__setattr__(self, "id", hashlib.sha256(encoded).hexdigest()[:16])


def as_queries(given: Iterable[str | Query]) -> tuple[Query, ...]:
    """Texts and queries as queries."""
    return tuple(one if isinstance(one, Query) else Query(one) for one in given)


def queries_of(table: OutcomeTable) -> list[Query]:
    """The table's queries with their ids and metadata."""
    names = list(table.metadata)
    columns = zip(*table.metadata.values(), strict=True) if names else iter([()] * len(table))
    rows = zip(table.ids, table.queries, columns, strict=True)
    return [Query(text, id=name, metadata=dict(zip(names, of, strict=True))) for name, text, of in rows]


@dataclass(frozen=True, eq=False)
class Scores:
    """What a router expects of every expert on every query.

    Args:
        experts: names, E.
        mean: ``(Q, E)`` expected score.
        std: ``(Q, E)`` standard deviation of that expectation, 0 or more: how little it is known, not how much
            single answers differ.
        cost: ``(Q, E)`` expected dollars; None if prices are not known. NaN for experts without one.
    """

    experts: tuple[str, ...]
    mean: Floats
    std: Floats
    cost: Floats | None = None

    def __len__(self) -> int:
        return len(self.mean)


@dataclass(frozen=True)
class Pick:
    """An expert that is to answer.

    Args:
        expert: its name.
        draw: 0, 1, ... where one expert answers several times.
        weight: what its answer counts for in a vote.
    """

    expert: str
    draw: int = 0
    weight: float = 1.0


@dataclass(frozen=True, eq=False)
class Decision:
    """Who answers a query, and why.

    Args:
        query_id: ``Query.id``.
        picks: who answers, best first; empty if the policy abstains.
        primary: the expert whose answer stands if only one can; None if the policy abstains.
        scores: expected score of every expert.
        policy: the policy's description, such as ``top_k(k=3)``.
        reason: what decided: ``rule`` in a sentence, ``std``, ``cost`` and ``margin``; and with ``--explain`` what
            the router says (``neighbours``, ``clusters``, ``skills``, ...). JSON values only.
        version: of the router: the first 12 hex digits of its fingerprint.
    """

    query_id: str
    picks: tuple[Pick, ...]
    primary: str | None
    scores: Mapping[str, float]
    policy: str
    reason: Mapping[str, Any]
    version: str

    @property
    def abstains(self) -> bool:
        return not self.picks

    def as_dict(self) -> dict[str, Any]:
        """The same record as JSON values."""
        return {
            "query_id": self.query_id,
            "picks": [{"expert": p.expert, "draw": p.draw, "weight": p.weight} for p in self.picks],
            "primary": self.primary,
            "scores": dict(self.scores),
            "policy": self.policy,
            "reason": dict(self.reason),
            "version": self.version,
        }
