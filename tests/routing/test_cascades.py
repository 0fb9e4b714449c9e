"""Cascades: thresholds against enumeration and against really walking them, AutoMix, confidences, the router."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.decision.records import queries_of
from mixmerge.errors import MixmergeError
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.automix import METHODS, AutomixCosts, Rule, Verified, beliefs, fit_automix, nearest_bin
from mixmerge.routers.base import Router
from mixmerge.routers.cascade import (
    Asked,
    Cascade,
    Escalation,
    Step,
    fit_cascade,
    order_of_escalation,
)
from mixmerge.routers.cascade_router import CascadeRouter
from mixmerge.routers.confidence import confidence, entropy, margin, mean_logprob
from mixmerge.routers.contract import check_router, sample

INF = math.inf


def walk(cascade: Escalation, sure: dict[str, float]) -> list[str]:
    """Who is asked, last of all the one whose answer stands: as a runner would."""
    history: list[Asked] = []
    while (step := cascade.next_step(history)).action == "escalate":
        history.append(Asked(step.expert, sure.get(step.expert, math.nan)))
    assert step.expert == history[-1].expert
    return [one.expert for one in history]


# --- the cascade


def test_steps_by_hand() -> None:
    cascade = Cascade(("s", "m", "l"), (0.8, 0.5))
    assert cascade.next_step([]) == Step("escalate", "s")
    assert cascade.next_step([Asked("s", 0.8)]) == Step("answer", "s")
    assert cascade.next_step([Asked("s", 0.79)]) == Step("escalate", "m")
    assert cascade.next_step([Asked("s", 0.1), Asked("m", 0.5)]) == Step("answer", "m")
    assert cascade.next_step([Asked("s", 0.1), Asked("m", 0.4), Asked("l", 0.0)]) == Step("answer", "l")
    assert cascade.next_step([Asked("s")]) == Step("escalate", "m")  # not known is not sure
    assert walk(Cascade(("s", "l"), (-INF,)), {"s": 0.0}) == ["s"]
    assert walk(Cascade(("s", "l"), (INF,)), {"s": 1.0}) == ["s", "l"]
    assert walk(Cascade(("s",), ()), {}) == ["s"]


def test_faults_of_a_cascade() -> None:
    with pytest.raises(MixmergeError, match=r"One or more, each once"):
        Cascade(("a", "a"), (0.5,))
    with pytest.raises(MixmergeError, match=r"each once"):
        Cascade((), ())
    with pytest.raises(MixmergeError, match=r"A number for each of the 2 experts but the last"):
        Cascade(("a", "b"), (0.5, 0.5))
    with pytest.raises(MixmergeError, match=r"A number"):
        Cascade(("a", "b"), (math.nan,))
    with pytest.raises(MixmergeError, match=r"has answers of b. In order: a, b"):
        Cascade(("a", "b"), (0.5,)).next_step([Asked("b", 0.5)])
    with pytest.raises(MixmergeError, match=r"In order"):
        Cascade(("a",), ()).next_step([Asked("a"), Asked("a")])


# right and sure, right and unsure, wrong and half sure, wrong and unsure; the large one is right but once
SCORE = np.array([[1, 1], [1, 1], [0, 1], [0, 0]], np.float64)
SURE = np.array([[0.9], [0.3], [0.5], [0.2]])


def test_thresholds_by_hand() -> None:
    best = fit_cascade(("s", "l"), SCORE, SURE, np.array([1.0, 10.0]))
    # escalating 0.5 and below gives 3/4 for 1 + 3/4 * 10; 0.9 stands
    assert best.cascade.thresholds == (pytest.approx(0.7),)
    assert (best.score, best.cost) == (0.75, pytest.approx(8.5))
    assert best.share == (0.25, 0.75)
    assert (best.queries, best.exact) == (4, True)
    cheap = fit_cascade(("s", "l"), SCORE, SURE, np.array([1.0, 10.0]), max_cost=6.0)
    assert (cheap.score, cheap.cost) == (0.5, 1.0)  # two escalations gain nothing here: none is cheaper
    assert cheap.cascade.thresholds == (-INF,)
    reach = fit_cascade(("s", "l"), SCORE, SURE, np.array([1.0, 10.0]), min_score=0.6, check_cost=0.5)
    assert (reach.score, reach.cost) == (0.75, pytest.approx(9.0))
    alone = fit_cascade(("s",), SCORE[:, :1], np.empty((4, 0)), np.array([1.0]), max_cost=1.0)
    assert (alone.score, alone.cost, alone.share) == (0.5, 1.0, (1.0,))


@settings(max_examples=60)
@given(st.data())
def test_thresholds_against_walking_every_cascade(data: st.DataObject) -> None:
    experts = ("s", "m", "l")
    q = data.draw(st.integers(1, 6))

    def table(low: int, high: int, columns: int) -> np.ndarray:
        row = st.lists(st.integers(low, high), min_size=columns, max_size=columns)
        return np.array(data.draw(st.lists(row, min_size=q, max_size=q)), np.float64)

    score, sure, cost = table(0, 2, 3), table(0, 3, 2), table(0, 4, 3)
    steps = [-INF, 0.5, 1.5, 2.5, INF]
    walked = []
    for thresholds in itertools.product(steps, steps):
        total = paid = 0.0
        for i in range(q):
            asked = walk(Cascade(experts, thresholds), {"s": sure[i, 0], "m": sure[i, 1]})
            total += score[i, len(asked) - 1]
            paid += cost[i, : len(asked)].sum()
        walked.append((total / q, paid / q))
    limit = data.draw(st.sampled_from([None, *sorted({one[1] for one in walked})]))
    found = fit_cascade(experts, score, sure, cost, max_cost=limit)
    allowed = [one for one in walked if limit is None or one[1] <= limit + 1e-9]
    best = max(one[0] for one in allowed)
    assert found.exact
    assert found.score == pytest.approx(best)
    assert found.cost == pytest.approx(min(one[1] for one in allowed if one[0] > best - 1e-9))
    ends = [len(walk(found.cascade, {"s": a, "m": b})) - 1 for a, b in sure]
    assert found.share == pytest.approx([ends.count(e) / q for e in range(3)])
    assert found.score == pytest.approx(np.mean([score[i, e] for i, e in enumerate(ends)]))
    reach = fit_cascade(experts, score, sure, cost, min_score=best)
    assert reach.cost == pytest.approx(min(one[1] for one in walked if one[0] > best - 1e-9))


def test_many_confidences_are_tried_at_quantiles() -> None:
    rng = np.random.default_rng(0)
    sure = rng.random((400, 2))
    score = np.stack([sure[:, 0] > 0.5, sure[:, 1] > 0.4, np.ones(400)], axis=1).astype(np.float64)
    cost = np.array([1.0, 5.0, 20.0])
    fine = fit_cascade("sml", score, sure, cost, min_score=1.0)
    coarse = fit_cascade("sml", score, sure, cost, min_score=1.0, cells=400)
    assert fine.exact
    assert not coarse.exact
    assert fine.cascade.thresholds == pytest.approx((0.5, 0.4), abs=0.01)
    assert fine.cost <= coarse.cost < fine.cost * 1.15


def test_rows_that_are_not_whole_are_left_out_and_faults() -> None:
    score = SCORE.copy()
    score[0, 1] = np.nan
    cost = np.array([1.0, 10.0])
    assert fit_cascade(("s", "l"), score, SURE, cost).queries == 3
    with pytest.raises(MixmergeError, match=r"no query has all"):
        fit_cascade(("s", "l"), score * np.nan, SURE, cost)
    with pytest.raises(MixmergeError, match=r"costs as little as 0.5. At least 1"):
        fit_cascade(("s", "l"), SCORE, SURE, cost, max_cost=0.5)
    with pytest.raises(MixmergeError, match=r"scores 0.9. At most 0.75"):
        fit_cascade(("s", "l"), SCORE, SURE, cost, min_score=0.9)
    with pytest.raises(MixmergeError, match=r"both given"):
        fit_cascade(("s", "l"), SCORE, SURE, cost, min_score=0.9, max_cost=1)
    for wrong in ((SCORE[:, :1], SURE, cost), (SCORE, SURE[:2], cost), (SCORE, SURE, cost[:1])):
        with pytest.raises(MixmergeError, match=r"has the shape"):
            fit_cascade(("s", "l"), *wrong)


def test_the_order_leaves_out_who_costs_more_for_nothing() -> None:
    names = ("big", "small", "vain", "free")
    score, cost = np.array([0.9, 0.5, 0.5, 0.2]), np.array([9.0, 1.0, 5.0, 0.0])
    assert order_of_escalation(names, score, cost) == ("free", "small", "big")
    assert order_of_escalation(names, score, np.array([9.0, 1.0, 5.0, np.nan])) == ("small", "big")


# --- confidences


def test_confidences_by_hand() -> None:
    chosen = np.log([0.5, 0.25])
    assert mean_logprob(chosen) == pytest.approx(math.log(0.125) / 2)
    assert confidence("mean_logprob", chosen) == pytest.approx(math.sqrt(0.125))
    top = np.log([[0.2, 0.8], [0.5, 0.5]])
    assert margin(top) == pytest.approx(math.log(4) / 2)
    assert confidence("margin", top) == pytest.approx(0.5)
    parts = -(0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert entropy(top) == pytest.approx((parts + math.log(2)) / 2)
    assert confidence("entropy", top) == pytest.approx(1 - (parts / math.log(2) + 1) / 2)
    assert entropy(np.log([[0.1, 0.1]])) == pytest.approx(math.log(2))  # scaled to sum to 1
    assert confidence("entropy", np.array([[0.0, -INF]])) == 1.0
    assert confidence("margin", np.array([[0.0, -INF]])) == 1.0


@given(st.lists(st.lists(st.floats(-50, 0), min_size=3, max_size=3), min_size=1, max_size=5))
def test_confidences_are_in_range(rows: list[list[float]]) -> None:
    values = np.array(rows)
    for kind, given_ in (("mean_logprob", values[:, 0]), ("margin", values), ("entropy", values)):
        assert -1e-12 <= confidence(kind, given_) <= 1 + 1e-12  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [[], [0.5], [math.nan], [-INF], [[-0.1]], [[-INF, -INF]], [[-0.1, 0.3]]], ids=str
)
def test_what_is_no_logprob(values: list[object]) -> None:
    array = np.array(values, np.float64)
    with pytest.raises(MixmergeError, match=r"logprobs: (hold|have)"):
        (mean_logprob if array.ndim == 1 else entropy)(array)


# --- AutoMix


def test_incremental_benefit_by_hand() -> None:
    small, large = np.array([1.0, 0, 0, 0]), np.array([1.0, 1, 1, 0])
    verified = np.array([1.0, 0.5, 0.25, 0.0])
    found = fit_automix(("s", "l"), small, large, verified, method="self_consistency")
    # three of four escalate: score 0.75 for 1 + 1 + 37.5; the large one gains 0.5 for 49 more
    assert (found.score, found.cost, found.share) == (0.75, 39.5, 0.75)
    assert found.lift == pytest.approx((0.5 / 38.5) / (0.5 / 49) - 1)
    # leaving the hopeless one is better: 0.75 for 1 + 1 + 25
    double = fit_automix(("s", "l"), small, large, verified, method="double_threshold")
    assert double.rule.intervals == ((0.125, 0.5),)
    assert (double.score, double.cost) == (0.75, 27.0)
    assert double.lift == pytest.approx((0.5 / 26) / (0.5 / 49) - 1)
    pomdp = fit_automix(("s", "l"), small, large, verified)
    assert pomdp.method == "belief"  # the first of the union that does as well
    assert pomdp.lift == pytest.approx(double.lift)
    assert [pomdp.escalate(v) for v in (1.0, 0.5, 0.25, 0.0, math.nan)] == [False, True, True, False, True]
    assert walk(pomdp, {"s": 0.5}) == ["s", "l"]
    assert walk(pomdp, {"s": 0.0}) == ["s"]


def test_rules_of_every_method() -> None:
    rng = np.random.default_rng(0)
    verified = rng.integers(0, 9, 400) / 8
    small = (rng.random(400) < verified).astype(np.float64)
    large = np.maximum(small, (verified > 0.2) & (rng.random(400) < 0.8)).astype(np.float64)
    lifts = {}
    for method, rules in (
        ("threshold", [Rule(((0.0, i / 8),)) for i in range(9)]),
        ("double_threshold", [Rule(((i / 8, j / 8),)) for i in range(8) for j in range(i + 1, 8)]),
        (
            "triple_threshold",
            [
                Rule(((0.0, i / 8), (j / 8, k / 8)))
                for i in range(8)
                for j in range(i + 1, 8)
                for k in range(j + 1, 8)
            ],
        ),
    ):
        found = fit_automix(("s", "l"), small, large, verified, method=method)  # type: ignore[arg-type]
        lifts[method] = found.lift
        assert found.lift == pytest.approx(max(_lift(rule, small, large, verified) for rule in rules))
        assert found.rule in rules
    belief = fit_automix(("s", "l"), small, large, verified, method="belief")
    greedy = fit_automix(("s", "l"), small, large, verified, method="greedy")
    pomdp = fit_automix(("s", "l"), small, large, verified, method="pomdp")
    assert pomdp.lift == max(belief.lift, greedy.lift, lifts["threshold"], lifts["double_threshold"])
    assert lifts["double_threshold"] > lifts["threshold"]  # what verifies worst is hopeless here
    assert len(belief.rule.flags) == len(greedy.rule.flags) == 9


def test_greedy_adds_bins_by_their_smoothed_gain() -> None:
    # All the gain is in the bin of 0.5, and it is spread over its neighbours: they come next, the far ends last.
    verified = np.repeat(np.arange(9) / 8, 10)
    small = np.zeros(90)
    large = np.where(verified == 0.5, 1.0, 0.0)
    rules = [rule.flags for rule in METHODS["greedy"](Verified(small, large, verified, 8, 0.5, 0.0))]
    assert [[b for b in range(9) if flags[b]] for flags in rules[:3]] == [[4], [3, 4], [3, 4, 5]]
    assert [sum(flags) for flags in rules] == list(range(1, 10))
    # A bin of no gain between two good ones is taken before the lone good one at the far end.
    large = np.isin(verified, [0.0, 0.25, 1.0]).astype(np.float64)
    rules = [rule.flags for rule in METHODS["greedy"](Verified(small, large, verified, 8, 0.5, 0.0))]
    assert rules[2] == (True, True, True, *(False,) * 6)


def _lift(rule: Rule, small: np.ndarray, large: np.ndarray, verified: np.ndarray) -> float:
    up = rule.escalates(verified)
    score, cost = np.where(up, large, small).mean(), 1 + 1 + 50 * up.mean()
    return float((score - small.mean()) / (cost - 1) * 49 / (large.mean() - small.mean()) - 1)


def test_beliefs_and_the_rewards_of_the_released_code() -> None:
    rng = np.random.default_rng(1)
    verified, small = rng.random(300), (rng.random(300) < 0.5).astype(np.float64)
    large = (rng.random(300) < 0.7).astype(np.float64)
    belief = beliefs(small, large, verified)
    at = nearest_bin(verified, 8)
    for b in range(9):
        inside = at == b
        assert belief[b, 0] == pytest.approx(((small == 0) & (large == 1))[inside].mean())
        assert belief[b, 1] == pytest.approx((small == 1)[inside].mean())
    assert belief.sum(axis=1) == pytest.approx(1)
    # keep: -reward for the needy, one more for the hopeless; escalate: -100, and -reward for the hopeless
    released = set()
    for reward in range(5000):
        keep = belief @ [-reward, 0, -reward - 1]
        escalate = belief @ [-100, -100, -reward - 100]
        released.add(tuple(bool(x) for x in escalate > keep))
    limits = np.unique(belief[:, 0])[::-1]
    ours = {(False,) * 9} | {tuple(bool(x) for x in belief[:, 0] >= limit) for limit in limits}
    assert released == ours
    assert nearest_bin(np.array([0.0, 0.0624, 0.0625, 0.94, 1.0]), 8).tolist() == [0, 0, 1, 8, 8]


def test_a_prior_fills_bins_without_queries() -> None:
    small, large, verified = np.array([0.0, 1.0]), np.ones(2), np.array([0.0, 1.0])
    assert beliefs(small, large, verified)[4].tolist() == [0, 0, 0]
    assert beliefs(small, large, verified, prior=2.0)[4].tolist() == [0.5, 0.5, 0]
    assert beliefs(small, large, verified, prior=2.0)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_faults_of_automix() -> None:
    ones, half = np.ones(3), np.full(3, 0.5)
    with pytest.raises(MixmergeError, match=r"l scores 0.5, no more than s with 1"):
        fit_automix(("s", "l"), ones, half, half)
    with pytest.raises(MixmergeError, match=r"holds 2 to 2. 0 to 1"):
        fit_automix(("s", "l"), half, ones, ones * 2)
    with pytest.raises(MixmergeError, match=r"there is no 'treshold'. Did you mean 'threshold'"):
        fit_automix(("s", "l"), half, ones, half, method="treshold")  # type: ignore[arg-type]
    with pytest.raises(MixmergeError, match=r"columns have the shapes"):
        fit_automix(("s", "l"), half, ones[:2], half)
    with pytest.raises(MixmergeError, match=r"no query has both"):
        fit_automix(("s", "l"), half * np.nan, ones, half)
    with pytest.raises(MixmergeError, match=r"automix.bins"):
        fit_automix(("s", "l"), half, ones, half, bins=1)
    with pytest.raises(MixmergeError, match=r"the large expert costs more"):
        AutomixCosts(small=5, large=2)
    with pytest.raises(MixmergeError, match=r"0 to 1"):
        fit_automix(("s", "l"), half, ones, half).escalate(1.5)


# --- the router


@pytest.mark.parametrize(
    "options",
    [{"router": "categories"}, {"order": ["plain", "verse"], "thresholds": [0.3]}],
    ids=str,
)
def test_contract(options: dict[str, object]) -> None:
    check_router(lambda: CascadeRouter(options))


def cheap() -> OutcomeTable:
    """The sample, where "plain" is the dearest and always right."""
    table = sample(missing=0.0)
    score = table.score.copy()
    score[:, 3] = 1.0
    return OutcomeTable(
        table.ids,
        table.queries,
        table.experts,
        score,
        tokens_in=table.tokens_in,
        tokens_out=table.tokens_out,
        metadata=table.metadata,
        prices=table.prices,
    )


HELD = queries_of(sample(5, seed=1))


def test_the_router_says_the_order_of_escalation() -> None:
    router = CascadeRouter({"thresholds": 0.7}).fit(cheap())
    mean = dict(zip(cheap().experts, cheap().score.mean(axis=0), strict=True))
    order = router.cascade().experts
    assert order[0] == "sums"
    assert order[-1] == "plain"
    assert [mean[name] for name in order] == sorted(mean[name] for name in order)
    scores, reasons = router.score(HELD), router.reasons(HELD)
    assert scores.cost is not None
    for q, reason in enumerate(reasons):
        steps = reason["cascade"]
        assert [one["expert"] for one in steps] == list(order)
        assert [one["threshold"] for one in steps] == [0.7] * (len(order) - 1) + [None]
        at = [router.experts.index(name) for name in order]
        assert [one["score"] for one in steps] == scores.mean[q, at].tolist()
        assert [one["cost_so_far"] for one in steps] == pytest.approx(np.cumsum(scores.cost[q, at]))
        assert "neighbours" in reason
    json.dumps(reasons, allow_nan=False)


def test_calibrated_thresholds_are_kept(tmp_path: Path) -> None:
    table = cheap()
    router = CascadeRouter({"order": ["sums", "plain"]}).fit(table)
    sure = {"sums": np.where(table.score[:, 0] == 1, 0.8, 0.2)}
    fitted = router.calibrate(table, sure, min_score=1.0)
    assert fitted.score == 1.0
    assert router.cascade().thresholds == (pytest.approx(0.5),)
    assert fitted.share[1] == pytest.approx(1 - table.score[:, 0].mean())
    costs = table.costs()
    assert costs is not None
    wrong = table.score[:, 0] == 0
    assert fitted.cost == pytest.approx(costs[:, 0].mean() + (costs[:, 3] * wrong).mean())
    router.calibrate(table, sure, max_cost=fitted.cost / 2)
    never = router.calibrate(table, {"sums": np.zeros(150)}, max_cost=float(costs[:, 0].mean()))
    assert never.cascade.thresholds == (-INF,)
    assert router.reasons(HELD)[0]["cascade"][0]["threshold"] == "never"
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert isinstance(loaded, CascadeRouter)
    assert loaded.cascade() == router.cascade()


def test_experts_come_and_go() -> None:
    table = cheap()
    router = CascadeRouter().fit(table.only(table.experts[:3]))
    first = router.cascade().experts
    router.calibrate(table, dict.fromkeys(first, np.linspace(0, 1, 150)), min_score=0.5)
    kept = dict(zip(first, router.cascade().thresholds, strict=False))
    router.add_expert(table.only(["plain"]))
    assert router.cascade().experts == (*first, "plain")
    assert dict(zip(first, router.cascade().thresholds, strict=False)).items() >= kept.items()
    router.remove_expert("plain")
    assert router.cascade().experts == first
    fixed = CascadeRouter({"order": ["sums", "plain"]}).fit(table).remove_expert("plain")
    assert fixed.cascade() == Cascade(("sums",), ())
    with pytest.raises(MixmergeError, match=r"has no expert left"):
        fixed.remove_expert("sums")


def test_faults_of_the_router() -> None:
    table = cheap()
    with pytest.raises(MixmergeError, match=r"no expert is called 'sum'. Did you mean 'sums'"):
        CascadeRouter({"order": ["sum", "plain"]}).fit(table)
    with pytest.raises(MixmergeError, match=r"several thresholds need the order"):
        CascadeRouter({"thresholds": [0.5]})
    with pytest.raises(MixmergeError, match=r"one threshold for each expert of the order but the last"):
        CascadeRouter({"order": ["a", "b"], "thresholds": [0.5, 0.5]})
    with pytest.raises(MixmergeError, match=r"cannot take its scores from a cascade"):
        CascadeRouter({"router": "cascade"})
    with pytest.raises(MixmergeError, match=r"no router is called 'knnn'"):
        CascadeRouter({"router": "knnn"})
    router = CascadeRouter({"order": ["sums", "plain"]}).fit(table)
    with pytest.raises(MixmergeError, match=r"none is given of 'sums'"):
        router.calibrate(table, {})
    with pytest.raises(MixmergeError, match=r"of 'sums' has 3 values. 150 queries"):
        router.calibrate(table, {"sums": [0.1, 0.2, 0.3]})
    bare = OutcomeTable(table.ids, table.queries, table.experts, table.score)
    with pytest.raises(MixmergeError, match=r"no cost is known of sums, plain"):
        CascadeRouter({"order": ["sums", "plain"]}).fit(bare).calibrate(bare, {"sums": np.zeros(150)})
