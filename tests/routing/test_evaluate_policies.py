"""Reports under policies, with oracles among the routers, and with next to nothing to evaluate."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mixmerge.decision.policies import Policy
from mixmerge.decision.records import Scores
from mixmerge.errors import MixmergeError
from mixmerge.evaluate.routing import EvaluationOptions, Scored, evaluate_routers, evaluate_scores
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.base import Router
from mixmerge.routers.constants import LengthRouter
from mixmerge.routers.contract import sample
from mixmerge.routers.nearest import NearestRouter
from mixmerge.routers.references import OracleRouter


@pytest.fixture(scope="module")
def fitted() -> Router:
    return NearestRouter(seed=0).fit(sample(150))


def test_oracles_among_the_routers_may_look(fitted: Router) -> None:
    held = sample(40, seed=1)
    routers = {"knn": fitted, "seer": OracleRouter().fit(held), "by length": LengthRouter().fit(sample(150))}
    report = evaluate_routers(routers, held, EvaluationOptions(resamples=200))
    row = report.row("seer")
    assert row.role == "oracle"
    assert row.regret == 0.0
    assert row.score.value == report.row("query oracle").score.value
    assert any("seer: looks at 40 of these 40" in warning for warning in report.all_warnings())
    assert {record["router"] for record in report.records()} == {"knn", "by length"}
    against = report.row("knn").against
    assert list(against) == ["by length"]
    assert against["by length"].difference.value > 0


def test_policies_pick_and_all_picks_are_paid(fitted: Router) -> None:
    held = sample(60, seed=1, missing=0.0)
    best = evaluate_routers({"knn": fitted}, held, EvaluationOptions(resamples=200))
    two = evaluate_routers(
        {"knn": fitted}, held, EvaluationOptions(policy=Policy(kind="top_k", k=2), resamples=200)
    )
    assert (best.policy, two.policy) == ("argmax", "top_k(k=2)")
    assert two.row("knn").score == best.row("knn").score
    assert two.row("knn").detail.picks.shape == (60, 2)
    once, twice = best.row("knn").cost, two.row("knn").cost
    assert once is not None
    assert twice is not None
    assert twice.value > once.value


def test_abstaining_is_counted(fitted: Router) -> None:
    held = sample(60, seed=1, missing=0.0)
    expected = fitted.score(held.queries).mean.max(axis=1)
    policy = Policy(abstain_below=float(np.median(expected)))
    row = evaluate_routers({"knn": fitted}, held, EvaluationOptions(policy=policy, resamples=200)).row("knn")
    assert row.abstained == (expected < np.median(expected)).sum() > 0
    assert row.abstained + row.scored == 60
    assert np.isnan(row.detail.actual).sum() == row.abstained


def test_drawn_picks_do_not_depend_on_the_order(fitted: Router) -> None:
    held, order = sample(60, seed=1), np.random.default_rng(0).permutation(60)
    policy = Policy(kind="sample", draws=3)
    drawn = evaluate_routers({"knn": fitted}, held, EvaluationOptions(policy=policy, resamples=200)).row(
        "knn"
    )
    again = evaluate_routers(
        {"knn": fitted}, held.rows(order), EvaluationOptions(policy=policy, resamples=200)
    ).row("knn")
    np.testing.assert_array_equal(again.detail.picks, drawn.detail.picks[order])


def test_one_expert_and_one_query() -> None:
    table = one_query()
    scores = Scores(("a",), np.array([[0.3]]), np.array([[0.1]]), np.array([[0.004]]))
    report = evaluate_scores([Scored("mine", scores, best=("a",))], table, EvaluationOptions(resamples=100))
    assert report.row("mine").score.value == 1.0
    assert report.row("mine").entropy == 0.0
    assert any("only 1 different queries" in warning for warning in report.warnings)
    assert json.dumps(report.as_dict(), allow_nan=False)


def one_query() -> OutcomeTable:
    return OutcomeTable(("q",), ("why",), ("a",), np.array([[1.0]]), cost=np.array([[0.004]]))


def test_scores_that_do_not_fit_together() -> None:
    scores = Scores(("a",), np.array([[0.3]]), np.array([[0.1]]), None)
    with pytest.raises(MixmergeError) as raised:
        evaluate_scores([Scored("mine", scores, best=("d", "a"), trained=np.zeros(3, np.bool_))], one_query())
    assert [fault.what for fault in raised.value.faults] == [
        "has best of 2 queries",
        "has trained of 3 queries",
        "its best single is no expert of it: d",
    ]
