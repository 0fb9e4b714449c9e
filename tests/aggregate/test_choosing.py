"""The default composition: overlaps by hand, and tables that ask for each of the three."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.aggregate.choosing import choose_composition, wilson_upper
from mixmerge.errors import MixmergeError
from mixmerge.outcomes.table import OutcomeTable


def table_of(**wrong: range | set[int]) -> OutcomeTable:
    """100 queries; each expert is wrong on those."""
    score = np.array([[float(q not in one) for one in wrong.values()] for q in range(100)])
    return OutcomeTable(
        tuple(map(str, range(100))), tuple(f"query {q}" for q in range(100)), tuple(wrong), score
    )


def test_experts_that_err_together_are_not_mixed() -> None:
    chosen = choose_composition(table_of(a=range(30), b=range(2, 32), c=range(60)))
    assert (chosen.kind, chosen.experts, dict(chosen.options)) == ("self_consistency", ("a",), {})
    (pair,) = chosen.pairs
    assert (pair.experts, pair.queries, pair.fewer, pair.both) == (("a", "b"), 100, 30, 28)
    assert pair.share == pytest.approx(28 / 30)
    assert chosen.accuracy == {"a": 0.7, "b": 0.7, "c": 0.4}
    assert "no two err apart enough" in chosen.reason
    assert math.isnan(chosen.majority)
    alone = choose_composition(table_of(a=range(10), b=range(20, 60)))
    assert (alone.kind, alone.pairs) == ("self_consistency", ())
    assert "alone in front" in alone.reason


def test_three_that_err_apart_vote() -> None:
    chosen = choose_composition(table_of(d=range(90), b=range(20, 40), a=range(20), c=range(40, 60)))
    assert (chosen.kind, chosen.experts) == ("vote", ("a", "b", "c"))
    assert (chosen.majority, chosen.single) == (1.0, 0.8)
    assert {one.experts for one in chosen.pairs} == {("a", "b"), ("a", "c"), ("b", "c")}


def test_two_that_err_apart_are_aggregated() -> None:
    table = table_of(a=range(20), b=range(16, 40))
    chosen = choose_composition(table)
    assert (chosen.kind, chosen.experts, chosen.options) == ("aggregate", ("a", "b"), {"aggregator": "a"})
    assert "a aggregates, which was not measured" in chosen.reason

    assert choose_composition(table, aggregator="c").options == {"aggregator": "c"}
    assert chosen.pairs[0].upper == pytest.approx(wilson_upper(4, 20, z=1.645))


def test_parameters_move_the_rule() -> None:
    table = table_of(a=range(20), b=range(10, 36))
    assert choose_composition(table, overlap=0.7).kind == "self_consistency", "b is 6 points behind"
    assert choose_composition(table, near=0.06).kind == "self_consistency", "half the errors are shared"
    assert choose_composition(table, near=0.06, overlap=0.7).kind == "aggregate"
    assert choose_composition(table, near=0.06, z=0.0).kind == "aggregate", "the bound is the share itself"
    edge = table_of(a=range(10), b=range(20, 35))
    assert choose_composition(edge, overlap=0.9).kind == "aggregate", "0.90 - 0.85 is within 0.05"
    graded = table_of(a=range(20), b=range(20, 40))
    graded.score[:] *= 0.4
    assert choose_composition(graded).pairs[0].both == 100, "nobody solves anything"
    assert choose_composition(graded, solved=0.4).kind == "aggregate"


def test_few_outcomes_do_not_convince() -> None:
    table = table_of(a={0, 1}, b={2, 3}).rows(range(10))
    chosen = choose_composition(table)
    assert chosen.kind == "self_consistency"
    assert chosen.pairs[0].share == 0.0
    assert chosen.pairs[0].upper > 0.5
    assert choose_composition(table_of(a=set(), b={1})).pairs[0].share == 1.0, "there is nothing to add"


def test_missing_scores_are_left_out() -> None:
    table = table_of(a=range(20), b=range(20, 40), c=range(100), d=range(5))
    table.score[:, 3] = np.nan
    table.score[50:, 1] = np.nan
    chosen = choose_composition(table, near=0.1)
    assert "d" not in chosen.accuracy
    assert chosen.accuracy["b"] == 0.6
    assert chosen.pairs[0].queries == 50
    assert chosen.experts == ("a", "b")
    table.score[:] = np.nan
    with pytest.raises(MixmergeError, match="hold no known score"):
        choose_composition(table)


def test_bad_parameters_are_told_at_once() -> None:
    with pytest.raises(MixmergeError) as caught:
        choose_composition(table_of(a=range(1)), near=-0.1, overlap=1.5, z=math.nan)
    assert [fault.where for fault in caught.value.faults] == ["near", "overlap", "z"]


@given(st.lists(st.lists(st.booleans(), min_size=40, max_size=40), min_size=1, max_size=4))
def test_what_holds_of_any_table(right: list[list[bool]]) -> None:
    names = "abcd"[: len(right)]
    score = np.array(right, np.float64).T
    ids = tuple(map(str, range(40)))
    table = OutcomeTable(ids, ids, tuple(names), score)
    chosen = choose_composition(table, near=0.5, overlap=0.9)
    shuffled = table.only(names[::-1]).rows(list(range(40))[::-1])
    again = choose_composition(shuffled, near=0.5, overlap=0.9)
    assert repr((again.majority, again.single)) == repr((chosen.majority, chosen.single))
    assert replace(again, majority=0.0, single=0.0) == replace(chosen, majority=0.0, single=0.0)
    accuracy = [chosen.accuracy[name] for name in chosen.experts]
    assert accuracy == sorted(accuracy, reverse=True)
    assert (len(chosen.experts) == 1) == (chosen.kind == "self_consistency")
    upper = {one.experts: one.upper for one in chosen.pairs}
    for pair in itertools.combinations(sorted(chosen.experts), 2):
        assert upper[pair] <= 0.9
    if chosen.kind == "vote":
        assert chosen.majority > chosen.single


def test_wilson_by_hand() -> None:
    assert wilson_upper(0, 0, z=1.645) == 1.0
    assert wilson_upper(3, 10, z=0.0) == 0.3
    assert wilson_upper(5, 10, z=1.96) == pytest.approx(
        0.7634, abs=1e-4
    )  # 95 % interval of 5 in 10: 0.2366, 0.7634
    assert wilson_upper(10, 10, z=2.0) == 1.0
