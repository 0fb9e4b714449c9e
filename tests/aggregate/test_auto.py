"""``compose: {kind: auto}``."""

from __future__ import annotations

import numpy as np

from mixmerge.aggregate import Ask, Question
from mixmerge.aggregate.auto import AutoOptions, auto
from mixmerge.decision.records import Decision, Pick
from mixmerge.outcomes.table import OutcomeTable


def table(*columns: list[int]) -> OutcomeTable:
    score = np.array(columns, np.float64).T
    ids = tuple(f"q{at}" for at in range(len(score)))
    return OutcomeTable(ids=ids, queries=ids, experts=tuple("abcd"[: len(columns)]), score=score)


def asks(made: OutcomeTable) -> tuple[Ask, ...]:
    composition, _ = auto(made, AutoOptions(samples=3))
    decision = Decision("q", (Pick("d"),), "d", {}, "", {}, "")
    return composition.first(Question("q", "what?", decision))


def test_the_best_alone_is_sampled_for_each_query() -> None:
    strong, weak = [1] * 90 + [0] * 10, [1] * 30 + [0] * 70
    found = asks(table(strong, weak))
    assert [(one.expert, one.draw) for one in found] == [("d", 0), ("d", 1), ("d", 2)], "the query's primary"
    assert all(one.temperature == 0.7 for one in found)


def test_experts_that_err_apart_vote_whomever_the_policy_picked() -> None:
    columns = [[0 if part * 20 <= at < (part + 1) * 20 else 1 for at in range(100)] for part in range(3)]
    found = asks(table(*columns))
    assert {one.expert for one in found} == {"a", "b", "c"}
    composition, chosen = auto(table(*columns), AutoOptions())
    assert chosen.kind == "vote"
    assert composition.experts() == {"a", "b", "c"}
