"""Reports on routers: every figure by hand on a small table, real routers on made outcomes, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console

from mixmerge.decision.records import Query, Scores
from mixmerge.errors import MixmergeError, OutputError
from mixmerge.evaluate.records import RoutingReport
from mixmerge.evaluate.routing import (
    EvaluationOptions,
    Scored,
    cross_validated,
    evaluate_routers,
    evaluate_scores,
    unseen,
)
from mixmerge.outcomes.table import OutcomeTable, Price
from mixmerge.routers.base import Router
from mixmerge.routers.contract import sample
from mixmerge.routers.nearest import NearestRouter
from mixmerge.routers.trained import TrainedOn, text_hash

NAN = float("nan")


def small() -> OutcomeTable:
    """Five queries of two tasks; ``a`` is best on sums and ``b`` on verse, ``c`` is cheap and weak."""
    return OutcomeTable(
        ids=("q1", "q2", "q3", "q4", "q5"),
        queries=("one", "two", "three", "four", "five"),
        experts=("a", "b", "c"),
        score=np.array([[1, 0, 0], [1, 0, 0.5], [1, 1, 1], [0, 1, 0], [0, 1, NAN]], np.float64),
        cost=np.array([[4, 2, 1]] * 5, np.float64) / 1000,
        metadata={"task": ("sums", "sums", "sums", "verse", "verse")},
    )


def scored(choice: Sequence[int], *, name: str = "mine", best: str | None = "a", std: float = 0.0) -> Scored:
    mean = np.full((5, 3), 0.25)
    mean[np.arange(5), list(choice)] = 0.75
    cost = np.array([[4, 2, 1]] * 5, np.float64) / 1000
    scores = Scores(("a", "b", "c"), mean, np.full((5, 3), std), cost)
    return Scored(name, scores, best=None if best is None else (best,) * 5)


def test_every_figure_by_hand() -> None:
    report = evaluate_scores([scored([0, 0, 2, 1, 2])], small(), EvaluationOptions(resamples=200))
    row = report.row("mine")
    assert (row.scored, row.unknown, row.abstained) == (4, 1, 0)
    assert row.score.value == 1.0
    assert row.cost is not None
    assert row.cost.value == pytest.approx((4 + 4 + 1 + 2 + 1) / 5000)
    assert row.over_best is not None
    assert row.over_best.difference.value == pytest.approx(1 / 4)  # a: 1, 1, 1, 0 on the same four
    assert row.over_random.difference.value == pytest.approx(1 - (1 / 3 + 0.5 + 1 + 1 / 3) / 4)
    assert row.below_task == 0.0
    assert row.regret == 0.0
    assert row.shares == pytest.approx({"a": 0.4, "b": 0.2, "c": 0.4})
    assert row.optimality.selection == 1.0
    assert row.calibration is not None
    assert row.calibration.pooled.count.sum() == 14
    assert row.detail.expected.tolist() == [0.75] * 5


def test_what_always_stands_beside() -> None:
    report = evaluate_scores(
        [scored([1, 1, 1, 1, 1], best="b")], small(), EvaluationOptions(resamples=200, draws=400)
    )
    rows = {row.name: row for row in report.rows}
    assert list(rows) == [
        "mine",
        "random choice",
        "best single: b",
        "cheapest: c",
        "best single in hindsight: b",
        "task oracle",
        "query oracle",
    ]
    assert [row.role for row in report.rows] == ["router", *["constant"] * 3, *["oracle"] * 3]
    assert rows["best single: b"].over_best is None
    assert rows["best single: b"].score.value == 0.6
    assert rows["cheapest: c"].score.value == pytest.approx(1.5 / 4)
    assert rows["cheapest: c"].unknown == 1
    assert rows["task oracle"].score.value == rows["query oracle"].score.value == 1.0
    assert rows["query oracle"].cost is not None
    assert rows["query oracle"].cost.value == pytest.approx((4 + 4 + 1 + 2 + 2) / 5000)
    assert rows["random choice"].score.value == pytest.approx(small_chance(), abs=0.03)
    assert rows["mine"].over_best is not None
    assert rows["mine"].over_best.p == 1.0
    assert rows["query oracle"].regret == 0.0


def small_chance() -> float:
    return float(np.nanmean(small().score, axis=1).mean())


def test_best_single_is_of_training_data_not_of_hindsight() -> None:
    table = replace(small(), score=np.array([[1, 0, 0]] * 4 + [[1, 1, 1.0]]))
    report = evaluate_scores([scored([0] * 5, best="c")], table, EvaluationOptions(resamples=200))
    row = report.row("mine")
    assert row.over_best is not None
    assert row.over_best.difference.value == pytest.approx(0.8)
    assert report.row("best single: c").score.value == 0.2
    assert report.row("best single in hindsight: a").score.value == 1.0
    unknown = evaluate_scores([scored([0] * 5, best=None)], table, EvaluationOptions(resamples=200))
    assert unknown.row("mine").over_best is not None
    assert any("in hindsight" in note for note in unknown.notes)
    assert not any(row.name.startswith("best single:") for row in unknown.rows)


def test_two_routers_with_their_own_best_single() -> None:
    report = evaluate_scores(
        [scored([0] * 5, best="c"), scored([0] * 5, name="other", best="b")],
        small(),
        EvaluationOptions(resamples=200),
    )
    assert {"best single: c", "best single: b"} <= {row.name for row in report.rows}
    gains = [report.row(name).over_best for name in ("mine", "other")]
    assert [gain and round(gain.difference.value, 9) for gain in gains] == [0.375, 0.0]


def test_costs_of_all_picks_and_abstention() -> None:
    class Two:
        def choose(self, scores: Scores, queries: Sequence[Query]) -> NDArray[np.int64]:
            return np.array([[0, 1], [2, 2], [1, -1], [-1, -1], [-1, -1]])

    row = evaluate_scores([scored([0] * 5)], small(), EvaluationOptions(policy=Two(), resamples=200)).row(
        "mine"
    )
    assert (row.scored, row.abstained) == (3, 2)
    assert row.score.value == pytest.approx((1 + 0.5 + 1) / 3)
    np.testing.assert_allclose(row.detail.cost, [0.006, 0.002, 0.002, NAN, NAN])


def test_curve_of_cost_by_hand() -> None:
    table = OutcomeTable(
        ids=("1", "2"),
        queries=("x", "y"),
        experts=("dear", "cheap"),
        score=np.array([[1.0, 0.0], [1.0, 1.0]]),
        cost=np.array([[4.0, 1.0], [4.0, 1.0]]),
    )
    sure = Scores(table.experts, table.score.copy(), np.zeros((2, 2)), table.costs())
    report = evaluate_scores(
        [Scored("mine", sure, best=("dear", "dear"))], table, EvaluationOptions(resamples=200)
    )
    curve = report.row("mine").curve
    assert curve is not None
    assert curve.hull.cost.tolist() == [1.0, 2.5]  # only the query that needs it goes to the dear one
    assert curve.hull.score.tolist() == [0.5, 1.0]
    assert report.cost_range == (1.0, 4.0)
    assert curve.aiq.value == pytest.approx((1.5 * 0.75 + 1.5 * 1.0) / 3)
    assert curve.over_zero.difference.value == pytest.approx(curve.aiq.value - 0.75)
    assert curve.saved == pytest.approx(1 - 2.5 / 4)
    assert curve.gained == 0.0
    assert report.singles == {"dear": (4.0, 1.0), "cheap": (1.0, 0.5)}
    assert report.pair is not None
    assert (report.pair.strong, report.pair.weak) == ("dear", "cheap")
    assert set(report.pair.rows) >= {"mine", "prompt length", "random choice", "oracle (gain)"}


def test_json_and_lines(tmp_path: Path) -> None:
    report = evaluate_scores([scored([0, 0, 2, 1, 2])], small(), EvaluationOptions(resamples=200))
    given = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert given["queries"] == 5
    assert given["rows"][0]["name"] == "mine"
    assert "detail" not in given["rows"][0]
    report.write_jsonl(tmp_path / "lines.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines[2] == {
        "query": "q3",
        "router": "mine",
        "choice": ["c"],
        "expected": 0.75,
        "actual": 1.0,
        "cost": 0.001,
        "best": ["a", "b", "c"],
        "regret": 0.0,
    }
    assert lines[4]["actual"] is None
    assert len(lines) == 5
    with pytest.raises(OutputError, match="exists already"):
        report.write_jsonl(tmp_path / "lines.jsonl")


def test_table_for_the_terminal() -> None:
    report = evaluate_scores(
        [scored([0, 0, 2, 1, 2], name="[red]mine")], small(), EvaluationOptions(resamples=200)
    )
    text = _text(report)
    assert "[red]mine" in text
    assert "1.000 [1.000, 1.000]" in text
    assert "query oracle" in text


def _text(report: RoutingReport) -> str:
    console = Console(width=220)
    with console.capture() as shown:
        console.print(report.render("All"))
    return shown.get()


@pytest.fixture(scope="module")
def fitted() -> Router:
    return NearestRouter(seed=0).fit(sample(150))


def test_a_real_router(fitted: Router) -> None:
    held = sample(80, seed=1)
    report = evaluate_routers(
        {"knn": fitted}, held, EvaluationOptions(resamples=500, against=("random choice",))
    )
    row = report.row("knn")
    assert row.over_best is not None
    assert row.over_best.difference.low > 0
    assert row.over_best.p < 0.01
    assert row.against["random choice"].difference.value > 0.2
    assert row.curve is not None
    assert row.seconds is not None
    assert row.warnings == ()
    turned = np.random.default_rng(0).permutation(80)
    again = evaluate_routers({"knn": fitted}, held.rows(turned), EvaluationOptions(resamples=500)).row("knn")
    assert again.score.low == pytest.approx(row.score.low)
    assert again.curve is not None
    assert again.curve.aiq.value == pytest.approx(row.curve.aiq.value)
    other = evaluate_routers({"knn": fitted}, held.only(held.experts[::-1]), EvaluationOptions(resamples=500))
    assert other.row("knn").score.low == pytest.approx(row.score.low)
    chance = report.row("random choice").score
    assert other.row("random choice").score.value == pytest.approx(chance.value)


def test_fitted_on_what_it_is_asked(fitted: Router) -> None:
    both = _joined(sample(80, seed=1), sample(150).rows(range(7)))
    with pytest.raises(MixmergeError, match=r"router knn: was fitted on 7 of the 87 queries .* such as q0-0"):
        evaluate_routers({"knn": fitted}, both, EvaluationOptions(resamples=200))
    loud = evaluate_routers({"knn": fitted}, both, EvaluationOptions(resamples=200, allow_trained=True))
    assert loud.warnings == ()
    assert any("knn: WAS FITTED ON 7" in warning for warning in loud.all_warnings())
    assert len(unseen(both, {"knn": fitted})) == 80
    assert (
        evaluate_routers(
            {"knn": fitted}, unseen(both, {"knn": fitted}), EvaluationOptions(resamples=200)
        ).warnings
        == ()
    )
    with pytest.raises(MixmergeError, match="train: has 80 of the queries"):
        evaluate_routers({"knn": fitted}, sample(80, seed=1), train=sample(80, seed=1))


def test_spaces_and_capitals_do_not_hide_a_query(fitted: Router) -> None:
    table = sample(150).rows(range(5))
    hidden = replace(table, queries=tuple(f"  {text.upper()}\n" for text in table.queries))
    with pytest.raises(MixmergeError, match="was fitted on 5 of the 5"):
        evaluate_routers({"knn": fitted}, hidden)


def _joined(one: OutcomeTable, other: OutcomeTable) -> OutcomeTable:
    return replace(
        one,
        ids=one.ids + other.ids,
        queries=one.queries + other.queries,
        score=np.concatenate([one.score, other.score]),
        tokens_in=None,
        tokens_out=None,
        metadata={},
    )


def test_a_router_remembers_what_it_was_fitted_on(fitted: Router, tmp_path: Path) -> None:
    fitted.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert loaded.trained_on is not None
    assert loaded.trained_on.saw(sample(150).queries).all()
    assert not loaded.trained_on.saw(sample(80, seed=1).queries).any()
    assert loaded.trained_on.mean == pytest.approx(np.nanmean(sample(150).score, axis=0))
    assert not (tmp_path / "router" / "trained_on.safetensors").read_bytes().count(b"number")
    (tmp_path / "router" / "trained_on.safetensors").unlink()
    with pytest.raises(MixmergeError, match="was changed"):
        Router.load(tmp_path / "router")


def test_adding_and_removing_experts_is_remembered() -> None:
    table, more = sample(60), sample(40, seed=3)
    router = NearestRouter().fit(table.only(("sums", "code")))
    router.add_expert(table.only(("verse",)))
    known = router.trained_on
    assert known is not None
    assert known.mean == pytest.approx(np.nanmean(table.score[:, :3], axis=0))
    router.remove_expert("sums")
    assert router.trained_on is not None
    assert len(router.trained_on.mean) == 2
    assert router.trained_on.saw(table.queries).all()
    both = known.extended(TrainedOn.of(more))
    assert both.saw(more.queries).all()
    assert (np.diff(both.hashes.astype(object)) > 0).all()


def test_text_hashes_are_stable() -> None:
    assert text_hash("Hello  World") == text_hash("hello world\n") != text_hash("hello, world")
    assert text_hash("hello world") == int("b94d27b9934d3e08", 16)  # the first 16 digits of its SHA-256


def test_cross_validation() -> None:
    table = sample(120)
    folds = np.array_split(np.random.default_rng(0).permutation(120), 4)
    one = cross_validated("knn", NearestRouter, table, folds)
    again = NearestRouter().fit(table.rows(np.setdiff1d(np.arange(120), folds[2])))
    asked = [table.queries[i] for i in folds[2]]
    np.testing.assert_array_equal(one.scores.mean[folds[2]], again.score(asked).mean)
    report = evaluate_scores([one], table, EvaluationOptions(resamples=300))
    gain = report.row("knn").over_best
    assert gain is not None
    assert gain.difference.low > 0
    assert report.warnings == ()
    with pytest.raises(MixmergeError, match="do not part the queries"):
        cross_validated("knn", NearestRouter, table, folds[:3])
    leaky = replace(table, queries=(table.queries[int(folds[0][0])], *table.queries[1:]))
    if folds[0][0] != 0:
        with pytest.raises(MixmergeError, match="was fitted on"):
            evaluate_scores([cross_validated("knn", NearestRouter, leaky, folds)], leaky)


def test_perturbations(fitted: Router) -> None:
    held = sample(40, seed=1)
    row = evaluate_routers(
        {"knn": fitted},
        held,
        EvaluationOptions(resamples=200),
        perturbations={"nothing": str, "other words": lambda text: "poem rhyme moon river song"},
    ).row("knn")
    assert row.stays["nothing"] == 1.0
    assert row.stays["other words"] < 0.8


def test_fewer_experts_and_silent_queries(fitted: Router) -> None:
    held = sample(40, seed=1)
    score = held.score.copy()
    score[:3] = NAN
    table = replace(held, score=score)
    fewer = NearestRouter().fit(sample(100).only(("sums", "code")))
    report = evaluate_routers({"two": fewer}, table, EvaluationOptions(resamples=200))
    assert report.experts == ("sums", "code")
    assert len(report.ids) <= 37
    assert any("left out: verse, plain" in note for note in report.notes)
    both = evaluate_routers({"two": fewer, "all": fitted}, table, EvaluationOptions(resamples=200))
    assert both.row("two").shares["plain"] == 0.0
    assert len(both.experts) == 4


def test_no_routers_gives_the_constants() -> None:
    report = evaluate_routers({}, small(), EvaluationOptions(resamples=200))
    assert report.row("best single in hindsight: b").over_best is None
    gain = report.row("query oracle").over_best
    assert gain is not None
    assert gain.difference.value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"resamples": 10}, "resamples: is 10. 100 or more"),
        ({"level": 1.5}, "level: is 1.5"),
        ({"draws": 1}, "draws: is 1"),
        ({"strong": "z"}, "no expert is called 'z'"),
        ({"against": ("knn",)}, "against: the report has no row 'knn'"),
    ],
)
def test_bad_options(change: dict[str, object], word: str) -> None:
    with pytest.raises(MixmergeError, match=word):
        evaluate_scores([scored([0] * 5)], small(), EvaluationOptions(**change))  # type: ignore[arg-type]


def test_all_faults_at_once() -> None:
    with pytest.raises(MixmergeError) as raised:
        evaluate_scores(
            [scored([0] * 5), scored([1] * 5)], small().only(("a", "b")), EvaluationOptions(draws=0)
        )
    assert [fault.where for fault in raised.value.faults] == [
        "draws",
        "router mine",
        "router mine",
        "router mine",
    ]


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(MixmergeError, match="router knn: is not fitted"):
        evaluate_routers({"knn": NearestRouter()}, small())
    with pytest.raises(MixmergeError, match="no query has a score"):
        evaluate_scores([scored([0] * 5)], replace(small(), score=np.full((5, 3), NAN)))
    with pytest.raises(MixmergeError, match="has scores of 5 queries"):
        evaluate_scores([scored([0] * 5)], small().rows([0, 1]))
    with pytest.raises(MixmergeError, match="has the name of a constant"):
        evaluate_scores([scored([0] * 5, name="query oracle")], small(), EvaluationOptions(resamples=200))
    report = evaluate_scores([scored([0] * 5)], small(), EvaluationOptions(resamples=200))
    with pytest.raises(MixmergeError, match="has no row 'yours'"):
        report.row("yours")


def test_without_costs_and_tasks() -> None:
    plain = replace(small(), cost=None, metadata={})
    report = evaluate_scores([scored([0, 0, 0, 1, 1])], plain, EvaluationOptions(resamples=200))
    assert report.row("mine").curve is None
    assert report.row("mine").cost is None
    assert not any(row.name.startswith(("cheapest", "task oracle")) for row in report.rows)
    assert any("no column 'task'" in note for note in report.notes)
    assert "AIQ" not in _text(report)
    priced = replace(plain, prices={"a": Price(1.0, 1.0)})
    report = evaluate_scores([scored([1] * 5)], priced, EvaluationOptions(resamples=200))
    assert report.row("mine").cost is None  # b has no price, so its costs cannot even be estimated
    assert report.estimated == ("a",)
