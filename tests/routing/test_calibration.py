"""Calibration: budgets, thresholds and abstaining against numbers worked out by hand, and on outcomes never seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.decision import (
    Calibrated,
    Policy,
    Scores,
    calibrate_abstain,
    calibrate_budget,
    calibrate_threshold,
    read_calibration,
    read_policy,
    write_policy,
)
from mixmerge.decision.budgets import GRID, _mix, _path, _upper
from mixmerge.decision.records import queries_of
from mixmerge.errors import MixmergeError, OutputError
from mixmerge.outcomes.table import OutcomeTable, Price

NAMES = ("cheap", "dear")


def scored(mean: Sequence[Sequence[float]], cost: Sequence[Sequence[float]] | None = None) -> Scores:
    means = np.array(mean, np.float64)
    return Scores(NAMES, means, np.zeros_like(means), None if cost is None else np.array(cost, np.float64))


def outcomes(score: Sequence[Sequence[float]], cost: Sequence[Sequence[float]] | None = None) -> OutcomeTable:
    ids = tuple(f"q{i}" for i in range(len(score)))
    costs = None if cost is None else np.array(cost, np.float64)
    return OutcomeTable(ids, ids, NAMES, np.array(score, np.float64), costs)


def world(rows: int, seed: int) -> tuple[Scores, OutcomeTable]:
    """Three experts, the better the dearer; scores that know their means, costs that vary around what is expected."""
    rng = np.random.default_rng(seed)
    mean = rng.random((rows, 3)) * [0.5, 0.8, 1.0]
    cost = np.array([0.001, 0.01, 0.05]) * rng.lognormal(0, 0.3, (rows, 1))
    names, ids = ("a", "b", "c"), tuple(f"{seed}-{i}" for i in range(rows))
    table = OutcomeTable(
        ids, ids, names, (rng.random((rows, 3)) < mean) * 1.0, cost * rng.lognormal(0, 0.4, (rows, 3))
    )
    return Scores(names, mean, mean * 0 + 0.1, cost), table


def faults(call: object, *arguments: object, **named: object) -> list[str]:
    with pytest.raises(MixmergeError) as error:
        call(*arguments, **named)  # type: ignore[operator]
    return [str(fault) for fault in error.value.faults]


# --- budgets


def test_the_path_by_hand() -> None:
    # Gains 0.5 and 0.25 for 1 and 3 dollars more: the first query moves at trade 2, the second at 12.
    mean, cost = np.array([[0.25, 0.75], [0.5, 0.75]]), np.array([[1.0, 2.0], [1.0, 4.0]])
    path = _path(mean, cost, cost * 10)
    at = {trade: (path.mean[i], path.square[i]) for i, trade in enumerate(GRID)}
    assert at[1.0] == (10, 100)
    assert at[2.0] == (10, 100)  # at the very trade the cheaper stays
    assert at[4.0] == (15, 250)
    assert at[8.0] == (15, 250)
    assert at[16.0] == (30, 1000)
    assert _mix(path, int(np.flatnonzero(GRID == 2.0)[0]), 0.0) == (10, 100)


def test_the_path_goes_past_experts_on_the_envelope_only() -> None:
    # The middle one is under the line from the first to the last: never picked.
    mean, cost = np.array([[0.0, 0.1, 1.0]]), np.array([[1.0, 2.0, 3.0]])
    path = _path(mean, cost, np.array([[1.0, 100.0, 3.0]]))
    assert set(path.mean.tolist()) == {1.0, 3.0}
    # of equally cheap ones, the better; ahead of all others, the best of those that overtake together
    path = _path(np.array([[0.0, 0.5, 1.0]]), np.array([[1.0, 1.0, 1.0]]), np.array([[1.0, 2.0, 3.0]]))
    assert set(path.mean.tolist()) == {3.0}
    path = _path(np.array([[0.0, 0.5, 1.0]]), np.array([[0.0, 1.0, 2.0]]), np.array([[0.0, 50.0, 2.0]]))
    assert set(path.mean.tolist()) == {0.0, 2.0}


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), place=st.integers(0, len(GRID) - 1))
def test_the_path_is_what_the_policy_does(seed: int, place: int) -> None:
    rng = np.random.default_rng(seed)
    mean, cost, spent = rng.random((20, 4)), rng.random((20, 4)), rng.random((20, 4))
    policy = Policy(kind="willingness_to_pay", willingness_to_pay=float(GRID[place]))
    picks = policy.choose(Scores(("a", "b", "c", "d"), mean, mean, cost))[:, 0]
    path = _path(mean, cost, spent)
    assert path.mean[place] == pytest.approx(spent[np.arange(20), picks].mean())
    assert path.square[place] == pytest.approx((spent[np.arange(20), picks] ** 2).mean())


def test_bounds_by_hand() -> None:
    mean, square = np.array(2.0), np.array(4.0 + 9 * 0.99)  # sample variance 9 of 100 rows
    assert _upper(mean, square, 100, 0.95, "normal", 0.0) == pytest.approx(2 + 1.6448536 * 0.3)
    likely = np.log(40)
    wanted = 2 + np.sqrt(2 * 9 * likely / 100) + 7 * 10 * likely / (3 * 99)
    assert _upper(mean, square, 100, 0.95, "bernstein", 10.0) == pytest.approx(wanted)


def test_a_budget_between_two_settings_is_mixed() -> None:
    # All queries alike: either all go to the dear one or none; half the way between is half of them.
    rows = 2000
    given = scored([[0.0, 1.0]] * rows, [[1.0, 3.0]] * rows)
    table = outcomes([[0.0, 1.0]] * rows, [[1.0, 3.0]] * rows)
    found = calibrate_budget(given, table, budget=2.0)
    assert found.policy.trade == 2.0  # dollars for one point of score: the neighbours of 2
    assert found.policy.above == pytest.approx(2 * 2 ** (1 / 8))
    assert found.policy.share == 15 / 32  # 16/32 would cost 2.0 on average and more by the bound
    assert found.cost == pytest.approx(1 + 2 * 15 / 32)
    assert found.cost_bound is not None
    assert found.cost < found.cost_bound <= 2.0
    assert found.shares["dear"] == pytest.approx(15 / 32, abs=0.05)
    assert found.score == pytest.approx(found.shares["dear"])
    rich = calibrate_budget(given, table, budget=100.0)
    assert (rich.cost, rich.policy.share) == (3.0, None)
    assert rich.shares == {"cheap": 0.0, "dear": 1.0}
    poor = calibrate_budget(given, table, budget=1.001)
    assert (poor.cost, poor.shares) == (1.0, {"cheap": 1.0, "dear": 0.0})


def test_the_bound_holds_on_queries_never_seen() -> None:
    held, truth = world(60_000, 99)
    assert truth.cost is not None
    true = _path(held.mean, np.asarray(held.cost), truth.cost)
    over, spent, trials = 0, [], 200
    for seed in range(trials):
        found = calibrate_budget(*world(400, seed), budget=0.02).policy
        place = int(np.flatnonzero(found.trade == GRID)[0])
        cost = float(_mix(true, place, found.share or 0.0)[0])
        over, spent = over + (cost > 0.02), [*spent, cost]
    assert over / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5
    assert np.mean(spent) > 0.016  # and most of the budget is used


def test_bernstein_is_wider_and_needs_the_most_a_query_costs() -> None:
    scores, table = world(5000, 1)
    normal = calibrate_budget(scores, table, budget=0.02)
    bernstein = calibrate_budget(scores, table, budget=0.02, bound="bernstein", most=0.3)
    assert normal.cost is not None
    assert bernstein.cost is not None
    assert bernstein.cost < normal.cost
    assert (
        bernstein.bound == "one-sided bernstein bound at 0.95 on 5000 rows, no query costing more than $0.3"
    )
    assert normal.bound == "one-sided normal bound at 0.95 on 5000 rows"
    surer = calibrate_budget(scores, table, budget=0.02, confidence=0.999)
    assert surer.cost is not None
    assert surer.cost < normal.cost


def test_what_abstaining_saves_can_be_spent() -> None:
    scores, table = world(3000, 2)
    plain = calibrate_budget(scores, table, budget=0.01)
    silent = calibrate_budget(scores, table, budget=0.01, abstain_below=0.3)
    assert silent.policy.abstain_below == 0.3
    assert silent.answered < 1
    assert _spends(silent) > _spends(plain)
    picks = silent.policy.choose(scores, queries_of(table))[:, 0]
    assert table.cost is not None
    spent = np.where(picks < 0, 0.0, table.cost[np.arange(3000), np.maximum(picks, 0)]).mean()
    assert silent.cost == pytest.approx(spent, rel=0.03)
    other = calibrate_budget(scores, table, budget=0.01, abstain_below=0.3, fallback="a")
    assert other.answered == 1.0
    assert _spends(other) < _spends(silent)


def _spends(found: Calibrated) -> tuple[float, float]:
    """What orders settings: the trade, then the share above it."""
    return found.policy.trade or 0.0, found.policy.share or 0.0


def test_costs_that_are_not_recorded_are_as_expected() -> None:
    scores, table = world(500, 3)
    assert table.cost is not None
    assert scores.cost is not None
    gaps = table.cost.copy()
    gaps[::2] = np.nan
    filled = np.where(np.isnan(gaps), scores.cost, gaps)
    found = calibrate_budget(
        scores, OutcomeTable(table.ids, table.queries, table.experts, table.score, gaps), budget=0.02
    )
    same = calibrate_budget(
        scores, OutcomeTable(table.ids, table.queries, table.experts, table.score, filled), budget=0.02
    )
    assert found == same
    none = replace(table, cost=None)
    assert calibrate_budget(scores, none, budget=0.02).cost == pytest.approx(0.019, abs=0.001)


def test_budgets_that_cannot_be() -> None:
    given, table = (
        scored([[0.0, 1.0]] * 50, [[1.0, 3.0]] * 50),
        outcomes([[0.0, 1.0]] * 50, [[1.0, 3.0]] * 50),
    )
    assert faults(calibrate_budget, given, table, budget=0.5) == [
        "budget: $0.5 is less than the cheapest experts cost, $1 a query. More than $1."
    ]
    rng = np.random.default_rng(0)
    uneven = outcomes([[0.0, 1.0]] * 50, (rng.random((50, 2)) + 0.5).tolist())
    mean = float(np.asarray(uneven.cost)[:, 0].mean())
    (said,) = faults(calibrate_budget, given, uneven, budget=mean + 0.001)
    assert said.startswith(
        "budget: 50 rows do not show with 0.95 confidence that the cheapest experts keep $"
    )
    assert "Or calibrate on more rows" in said
    assert [
        f.split(":")[0]
        for f in faults(calibrate_budget, given, table, budget=-1.0, confidence=1.0, bound="x")
    ] == [
        "budget",
        "confidence",
        "bound",
    ]
    assert faults(calibrate_budget, scored([[0, 1]], [[1, 3]]), table.rows([0]), budget=2.0) == [
        "outcomes: have 1 rows. 2 or more."
    ]
    assert "needs costs" in faults(calibrate_budget, scored([[0, 1]] * 50), table, budget=2.0)[0]
    assert "has 49 rows" in faults(calibrate_budget, given, table.rows(range(49)), budget=2.0)[0]
    unsure = scored([[np.nan, 1.0]] * 50, [[1.0, 3.0]] * 50)
    assert faults(calibrate_budget, unsure, table, budget=2.0) == ["scores: are not all finite."]
    assert "no expert is called 'x'" in faults(calibrate_budget, given, table, budget=2.0, fallback="x")[0]


def test_prices_and_tokens_are_costs() -> None:
    rows = 100
    tokens = np.full((rows, 2), 1e6)
    ids = tuple(f"q{i}" for i in range(rows))
    table = OutcomeTable(
        ids, ids, ("dear", "cheap"), np.ones((rows, 2)), tokens_in=tokens, tokens_out=tokens,
        prices={"cheap": Price(0.25, 0.75), "dear": Price(1.0, 2.0)},
    )  # fmt: skip
    found = calibrate_budget(scored([[0.0, 1.0]] * rows, [[1.0, 3.0]] * rows), table, budget=5.0)
    assert found.cost == 3.0  # the experts of the table stand in another order


# --- thresholds


GAINS = [[0.0, 0.5], [0.0, 0.4], [0.0, 0.4], [0.0, -0.1]]


@pytest.mark.parametrize(
    ("share", "threshold", "dear"),
    [
        (1.0, -0.1, 1.0),
        (0.75, 0.4, 0.75),
        (0.74, 0.5, 0.25),
        (0.25, 0.5, 0.25),
        (0.2, None, 0.0),
        (0.0, None, 0.0),
    ],
)
def test_a_share_of_the_strong_expert(share: float, threshold: float | None, dear: float) -> None:
    found = calibrate_threshold(scored(GAINS), "dear", "cheap", share=share)
    assert found.shares == {"cheap": 1 - dear, "dear": dear}
    if threshold is None:
        assert found.policy.threshold == np.nextafter(0.5, 1)
    else:
        assert found.policy.threshold == threshold
    assert (found.score, found.cost, found.rows) == (None, None, 4)


def test_a_share_of_the_gap() -> None:
    # the dear one wins 1, 0, 1, -1 more: of a gap of 1, by the order of gains 1, {0 + 1} -> 2, -1 -> 1
    table = outcomes([[0, 1], [0, 0], [0, 1], [1, 0]], [[1, 3]] * 4)
    first = calibrate_threshold(scored(GAINS), "dear", "cheap", recovered=1.0, table=table)
    assert (first.policy.threshold, first.shares["dear"]) == (0.5, 0.25)
    assert (first.score, first.cost) == (0.5, 1.5)
    none = calibrate_threshold(scored(GAINS), "dear", "cheap", recovered=0.0, table=table)
    assert none.shares["dear"] == 0.0
    # the gap of 3 wants the tied pair
    wide = outcomes([[0, 1], [0, 1], [0, 1], [0, 0]])
    assert (
        calibrate_threshold(scored(GAINS), "dear", "cheap", recovered=0.5, table=wide).shares["dear"] == 0.75
    )
    # rows where one is not known count for nothing
    gaps = outcomes([[0, np.nan], [0, 1], [0, 1], [0, 0]])
    assert (
        calibrate_threshold(scored(GAINS), "dear", "cheap", recovered=0.1, table=gaps).shares["dear"] == 0.75
    )


def test_thresholds_that_cannot_be() -> None:
    call, given = calibrate_threshold, scored(GAINS)
    assert faults(call, given, "dear", "cheap") == ["share, recovered: both or none are given. One of them."]
    assert faults(call, given, "dear", "cheap", share=1.1) == ["share: is 1.1. From 0 to 1."]
    assert faults(call, given, "dear", "cheap", recovered=0.5) == ["recovered: needs outcomes. Pass table."]
    assert "no expert is called 'deer'" in faults(call, given, "deer", "cheap", share=0.5)[0]
    assert "is cheap, as strong is" in faults(call, given, "cheap", "cheap", share=0.5)[0]
    weak = outcomes([[1, 0]] * 4)
    assert "no more than the weak one" in faults(call, given, "dear", "cheap", recovered=0.5, table=weak)[0]
    nobody = Scores(NAMES, np.zeros((0, 2)), np.zeros((0, 2)))
    assert faults(call, nobody, "dear", "cheap", share=0.5) == ["scores: are of no query. One or more."]
    assert "not all finite" in faults(call, scored([[0, np.nan]]), "dear", "cheap", share=0.5)[0]


# --- abstaining


def test_the_lowest_bound_that_reaches_a_target() -> None:
    # by falling expected score, what is answered scores 1, 1/2, 2/3, 3/4, 3/5
    mean = [[0.9, 0], [0.8, 0], [0.7, 0], [0.6, 0], [0.5, 0]]
    table = outcomes([[1, 0], [0, 0], [1, 0], [1, 0], [0, 0]], [[1, 9]] * 5)
    found = calibrate_abstain(scored(mean), table, target=0.7)
    assert found.policy == Policy(abstain_below=0.6)
    assert (found.score, found.answered, found.cost, found.scored) == (0.75, 0.8, 0.8, 4)
    assert found.score_low == pytest.approx(0.75 - 1.959964 * 0.25)
    assert calibrate_abstain(scored(mean), table, target=0.6).policy.abstain_below == 0.5
    assert calibrate_abstain(scored(mean), table, target=0.8).policy.abstain_below == 0.9
    assert faults(calibrate_abstain, scored(mean), table, target=1.1) == [
        "target: no bound reaches a mean score of 1.1. At most 1, of 20.0% of the queries."
    ]
    # tied queries are answered all or none
    tied = calibrate_abstain(scored([[0.9, 0]] * 2 + [[0.5, 0]] * 3), table, target=0.6)
    assert tied.policy.abstain_below == 0.5
    # rows that are not known count for nothing; the fallback answers, and is not what is measured
    gaps = outcomes([[1, 0], [np.nan, 0], [1, 0], [1, 0], [0, 0]])
    kept = calibrate_abstain(scored(mean), gaps, target=1.0, policy=Policy(fallback="dear"))
    assert kept.policy == Policy(abstain_below=0.6, fallback="dear")
    assert (kept.score, kept.scored, kept.answered) == (1.0, 3, 1.0)
    nothing = outcomes([[np.nan, 0]] * 5)
    assert "no query has a score" in faults(calibrate_abstain, scored(mean), nothing, target=0.5)[0]


def test_abstaining_by_the_lower_bound() -> None:
    mean = np.array([[0.9, 0.0], [0.8, 0.0]])
    unsure = Scores(NAMES, mean, np.array([[0.5, 0.0], [0.1, 0.0]]))
    table = outcomes([[0, 0], [1, 0]])
    found = calibrate_abstain(unsure, table, target=1.0, policy=Policy(kind="lower_bound"))
    assert found.policy.abstain_below == pytest.approx(0.7)
    assert found.policy.choose(unsure).tolist() == [[-1], [0]]


# --- files


@pytest.fixture(scope="module")
def calibrated() -> Calibrated:
    return calibrate_budget(*world(200, 4), budget=0.02)


def test_a_policy_lies_beside_its_router(tmp_path: Path, calibrated: Calibrated) -> None:
    path = write_policy(calibrated, tmp_path, router="abc")
    assert path == tmp_path / "policy.json"
    assert read_policy(tmp_path, router="abc") == calibrated.policy
    assert read_calibration(tmp_path) == calibrated
    write_policy(Policy(kind="top_k", k=2), tmp_path)
    assert read_policy(tmp_path, router="any") == Policy(kind="top_k", k=2)
    assert read_calibration(tmp_path) is None
    assert [one.name for one in tmp_path.iterdir()] == ["policy.json"]


def test_a_calibration_is_json(calibrated: Calibrated) -> None:
    assert Calibrated.model_validate(json.loads(calibrated.model_dump_json())) == calibrated


def test_policy_files_that_are_refused(tmp_path: Path, calibrated: Calibrated) -> None:
    path = write_policy(calibrated, tmp_path, router="abc")
    good = json.loads(path.read_text())

    def said(text: str, **named: str) -> str:
        path.write_text(text)
        return "\n".join(faults(read_policy, tmp_path, **named))

    assert "is of router 'abc', and this is 'xyz'" in said(json.dumps(good), router="xyz")
    assert "unknown key 'polcy'. Did you mean 'policy'?" in said(json.dumps({**good, "polcy": 1}))
    assert "policy.k: budget does not use it" in said(
        json.dumps({**good, "policy": {**good["policy"], "k": 1}})
    )
    assert "the key 'kind' is there twice" in said('{"kind": 1, "kind": 2}')
    assert "NaN is no number" in said('{"format": NaN}')
    assert "is no policy" in said("[]")
    assert "is of version 2" in said(json.dumps({**good, "version": 2}))
    assert "cannot be read" in said("{")
    assert "cannot be read" in said("[" * 100_000)
    wrong = {**good, "calibration": {**good["calibration"], "rows": "many"}}
    assert "rows" in said(json.dumps(wrong))
    assert "calibration: is 3" in said(json.dumps({**good, "calibration": 3}))
    path.unlink()
    assert "is not there" in "\n".join(faults(read_policy, tmp_path))
    with pytest.raises(OutputError):
        write_policy(calibrated, tmp_path / "nowhere")
