"""Composition of Experts: the 0/1 programme against enumeration, the classifier against labels, and the router."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.decision.records import Query, queries_of
from mixmerge.errors import MixmergeError
from mixmerge.outcomes.table import OutcomeTable, Price
from mixmerge.routers.assignment import Assignment, Problem, pareto, solve
from mixmerge.routers.base import Router
from mixmerge.routers.categories import CategoriesRouter
from mixmerge.routers.category_model import (
    CategoryModel,
    cluster,
    fit_categories,
    softmax,
    tuned_threshold,
    uncertainty,
)
from mixmerge.routers.contract import check_router, sample


def problem(
    score: list[list[float]],
    *,
    size: list[float],
    cost: list[float] | None = None,
    frequency: list[float] | None = None,
    required: tuple[str, ...] = (),
) -> Problem:
    """Categories A, B, ... and experts a, b, ..."""
    c, e = len(score), len(size)
    share = np.array(frequency or [1.0] * c)
    return Problem(
        tuple("ABCDEFGH"[:c]),
        tuple("abcdefgh"[:e]),
        np.array(score, np.float64),
        share / share.sum(),
        np.array(size, np.float64),
        np.array(cost if cost is not None else [np.nan] * e, np.float64),
        required,
    )


def every_map(given: Problem) -> list[Assignment]:
    """All of them, by enumeration."""
    c, e = given.score.shape
    found = []
    for chosen in itertools.product(range(e), repeat=c):
        names = [given.experts[i] for i in chosen]
        kept = tuple(sorted({*names, *given.required}))
        found.append(
            Assignment(
                dict(zip(given.categories, names, strict=True)),
                kept,
                sum(
                    f * given.score[k, i]
                    for k, (f, i) in enumerate(zip(given.frequency, chosen, strict=True))
                ),
                sum(given.size[given.experts.index(one)] for one in kept),
                sum(f * given.cost[i] for f, i in zip(given.frequency, chosen, strict=True)),
            )
        )
    return found


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    c, e = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    tenths = st.lists(st.integers(0, 10).map(lambda v: v / 10), min_size=e, max_size=e)
    forced = draw(st.sets(st.sampled_from("abcd"[:e]), max_size=1))
    return problem(
        draw(st.lists(tenths, min_size=c, max_size=c)),
        size=draw(st.lists(st.integers(1, 9).map(float), min_size=e, max_size=e)),
        cost=draw(st.lists(st.integers(0, 5).map(float), min_size=e, max_size=e)),
        frequency=draw(st.lists(st.integers(1, 4).map(float), min_size=c, max_size=c)),
        required=tuple(forced),
    )


@settings(max_examples=60)
@given(problems(), st.one_of(st.none(), st.integers(1, 25)), st.one_of(st.none(), st.integers(0, 5)))
def test_the_programme_against_enumeration(
    given_: Problem, budget: int | None, mean_cost: int | None
) -> None:
    allowed = [
        one
        for one in every_map(given_)
        if (budget is None or one.size <= budget) and (mean_cost is None or one.cost <= mean_cost + 1e-9)
    ]
    if not allowed:
        with pytest.raises(MixmergeError, match=r"The least is|together"):
            solve(given_, budget=budget, mean_cost=mean_cost)
        return
    found = solve(given_, budget=budget, mean_cost=mean_cost)
    best = max(one.score for one in allowed)
    assert found.score == pytest.approx(best, abs=2e-5)
    assert budget is None or found.size <= budget
    assert mean_cost is None or found.cost <= mean_cost + 1e-6
    equal = [one for one in allowed if one.score > best - 1e-9]
    cheapest = min(one.cost for one in equal)
    assert found.cost == pytest.approx(cheapest, abs=1e-4)
    if budget is not None or mean_cost is not None:
        assert found.size == min(one.size for one in equal if one.cost < cheapest + 1e-9)


@settings(max_examples=20)
@given(problems())
def test_the_curve_against_enumeration(given_: Problem) -> None:
    maps = every_map(given_)
    wanted = sorted(
        {
            (one.size, round(one.score, 9))
            for one in maps
            if not any(
                other.size <= one.size
                and other.score >= one.score - 1e-9
                and (other.size < one.size or other.score > one.score + 1e-9)
                for other in maps
            )
        }
    )
    assert [(one.size, round(one.score, 9)) for one in pareto(given_)] == wanted


def test_a_map_by_hand() -> None:
    # A is asked three times as often. a is good at A, b at B, c fair at both.
    three = problem([[0.9, 0.1, 0.7], [0.2, 0.8, 0.7]], size=[7, 7, 9], frequency=[3, 1])
    free = solve(three)
    assert free.serves == {"A": "a", "B": "b"}
    assert free.score == pytest.approx(0.75 * 0.9 + 0.25 * 0.8)
    assert free.size == 14
    assert solve(three, budget=14).kept == ("a", "b")
    assert solve(three, budget=13.9).serves == {"A": "a", "B": "a"}  # 0.725, c would be 0.7
    assert solve(three, budget=9).score == pytest.approx(0.725)
    assert [(one.size, one.kept) for one in pareto(three)] == [(7, ("a",)), (14, ("a", "b"))]
    assert [one.size for one in pareto(three, budgets=[3, 8, 100])] == [7, 14]
    assert len(pareto(three, most=1)) == 1


def test_a_required_expert_is_kept_and_counts() -> None:
    both = problem([[0.9, 0.1]], size=[4, 3], required=("b",))
    assert solve(both, budget=7).serves == {"A": "a"}
    assert solve(both, budget=7).kept == ("a", "b")
    assert solve(both, budget=6).serves == {"A": "b"}
    with pytest.raises(
        MixmergeError, match=r"budget: no map keeps to 2 billion parameters, b required. The least is 3"
    ):
        solve(both, budget=2)


def test_equal_maps_go_to_the_cheaper_then_smaller_then_first_name() -> None:
    same = [[0.5, 0.5, 0.5]]
    assert solve(problem(same, size=[1, 1, 1], cost=[2, 1, 2]), budget=5).kept == ("b",)
    assert solve(problem(same, size=[3, 2, 1], cost=[1, 1, 1]), budget=5).kept == ("c",)
    assert solve(problem(same, size=[1, 1, 1], cost=[1, 1, 1]), budget=5).kept == ("a",)
    assert solve(problem(same, size=[2, 1, 1])).kept == ("b",)
    shuffled = problem(same, size=[1, 1, 1]).only(["c", "b", "a"])
    assert solve(shuffled, budget=5).kept == ("a",)
    assert solve(shuffled).kept == ("a",)


def test_limits_that_nothing_keeps() -> None:
    two = problem([[0.9, 0.1]], size=[7, 3], cost=[0.1, 0.4])
    with pytest.raises(
        MixmergeError, match=r"budget: no map keeps to 2 billion parameters. The least is 3: b 3"
    ):
        solve(two, budget=2)
    with pytest.raises(
        MixmergeError, match=r"mean_cost: no map keeps to 0.05 dollars a query. The least is 0.1: a"
    ):
        solve(two, mean_cost=0.05)
    # b is small, a is cheap: either limit can be kept, not both; each line says what the other allows.
    with pytest.raises(MixmergeError) as caught:
        solve(two, budget=3, mean_cost=0.2)
    assert [str(fault) for fault in caught.value.faults] == [
        "budget: no map keeps to 3 billion parameters. The least is 7: a 7.",
        "mean_cost: no map keeps to 0.2 dollars a query. The least is 0.4: b.",
    ]
    with pytest.raises(MixmergeError, match=r"budget: is nan"):
        solve(two, budget=float("nan"))
    with pytest.raises(MixmergeError, match=r"no size of parameters is known of b"):
        solve(problem([[0.9, 0.1]], size=[7, float("nan")]), budget=9)
    with pytest.raises(MixmergeError, match=r"no cost is known of a, b"):
        solve(problem([[0.9, 0.1]], size=[7, 7]), mean_cost=9)
    with pytest.raises(MixmergeError, match=r"The least is 3"):
        pareto(two, budgets=[1, 2])


# --- the classifier


def blobs(
    rows: int, *, noise: float, seed: int = 0, kinds: int = 3
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Unit vectors around ``kinds`` centres; a share of the labels drawn at random."""
    rng = np.random.default_rng(seed)
    centers = np.eye(40)[:kinds] * 2
    label = rng.integers(0, kinds, rows)
    rows_ = centers[label] + 0.3 * rng.standard_normal((rows, 40))
    wrong = rng.random(rows) < noise
    label = np.where(wrong, rng.integers(0, kinds, rows), label)
    return rows_ / np.linalg.norm(rows_, axis=1, keepdims=True), label, [f"q{seed} {i}" for i in range(rows)]


@pytest.mark.parametrize("kinds", [2, 3])
def test_numpy_says_what_scikit_learn_says(kinds: int) -> None:
    from sklearn.linear_model import LogisticRegression

    rows, label, texts = blobs(200, noise=0.2, kinds=kinds)
    model, _ = fit_categories(rows, label, texts, categories=kinds, strength=1.0, seed=0)
    theirs = LogisticRegression(C=1.0, max_iter=1000).fit(rows, label)
    plain = CategoryModel(model.weight, model.bias, 1.0)
    np.testing.assert_allclose(plain.probabilities(rows), theirs.predict_proba(rows), atol=1e-9)
    logits = rows @ model.weight + model.bias
    np.testing.assert_allclose(model.probabilities(rows), softmax(logits / model.temperature), atol=1e-12)


def test_probabilities_are_as_sure_as_they_are_right() -> None:
    # A third of the labels is wrong and the penalty is nearly off: the bare classifier is far too sure.
    rows, label, texts = blobs(400, noise=0.45)
    new, truth, _ = blobs(2000, noise=0.45, seed=1)
    model, left_out = fit_categories(rows, label, texts, categories=3, strength=1e3, seed=0)
    said, bare = (one.probabilities(new) for one in (model, CategoryModel(model.weight, model.bias, 1.0)))
    right = float((said.argmax(axis=1) == truth).mean())
    assert bare.max(axis=1).mean() > right + 0.1
    assert said.max(axis=1).mean() == pytest.approx(right, abs=0.07)
    at = np.arange(2000), truth
    assert -np.log(said[at]).mean() < -np.log(bare[at]).mean() - 0.05
    assert left_out.shape == (400, 3)
    # nothing to get wrong: surer than the penalty alone would have it, but not more than the number of rows allows
    clear, label, texts = blobs(60, noise=0.0)
    model, left_out = fit_categories(clear, label, texts, categories=3, strength=0.1, seed=0)
    assert model.temperature < 1
    assert 0.9 < left_out.max(axis=1).mean() < 0.97  # 21 of 22 at the most


def test_fitting_does_not_depend_on_the_order_of_rows() -> None:
    rows, label, texts = blobs(120, noise=0.2)
    back = np.arange(120)[::-1]
    turned = [texts[i] for i in back]
    model, left_out = fit_categories(rows, label, texts, categories=3, strength=1.0, seed=0)
    other, other_out = fit_categories(rows[back], label[back], turned, categories=3, strength=1.0, seed=0)
    np.testing.assert_allclose(model.probabilities(rows), other.probabilities(rows), atol=1e-3)
    np.testing.assert_allclose(left_out[back], other_out, atol=1e-3)
    found = cluster(rows, texts, clusters=3, seed=0)
    np.testing.assert_array_equal(cluster(rows[back], turned, clusters=3, seed=0), found[back])
    assert np.bincount(found).tolist() == sorted(np.bincount(found), reverse=True)
    clear, truth, names = blobs(90, noise=0.0)
    pairs = set(zip(truth.tolist(), cluster(clear, names, clusters=3, seed=0).tolist(), strict=True))
    assert len(pairs) == 3
    assert cluster(np.ones((5, 2)), list("abcde"), clusters=3, seed=0).tolist() == [0] * 5


def test_a_category_of_one_row_and_a_single_category() -> None:
    rows, label, texts = blobs(30, noise=0.0)
    label[label == 2] = 1
    label[0] = 2
    model, left_out = fit_categories(rows, label, texts, categories=3, strength=1.0, seed=0)
    assert np.isfinite(model.probabilities(rows)).all()
    assert np.isfinite(left_out).all()
    alone, _ = fit_categories(rows, np.zeros(30, np.int64), texts, categories=1, strength=1.0, seed=0)
    assert alone.probabilities(rows).tolist() == [[1.0]] * 30


def test_uncertainty_by_hand() -> None:
    given_ = np.array([[1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    assert uncertainty(given_, by="entropy").tolist() == pytest.approx([0.0, 1.0, 0.5])
    assert uncertainty(given_, by="top").tolist() == pytest.approx([0.0, 0.75, 0.5])
    assert uncertainty(np.ones((2, 1)), by="entropy").tolist() == [0.0, 0.0]


def test_the_tuned_threshold_by_hand() -> None:
    unsure = np.array([0.9, 0.1, 0.5, 0.7])
    served, fallen = np.array([0.0, 1.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 1.0])
    assert tuned_threshold(unsure, served, fallen) == pytest.approx(0.6)  # 0.9 and 0.7 gain, 0.5 would lose
    assert tuned_threshold(unsure, served, served) == pytest.approx(
        0.95
    )  # nothing to gain: nobody falls back
    assert tuned_threshold(unsure, served * 0, fallen * 0 + 1) < 0  # always worth it
    same = np.full(4, 0.5)  # equals fall together or not at all
    assert tuned_threshold(same, served, fallen) >= 0.5


# --- the router


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "none", "clusters": 6},
        {"budget": 6.0},
        {"mean_cost": 1.2e-4},
        {"lookup": True},
        {"fallback": "plain"},
        {"unsure": 0.5, "unsure_by": "top", "worth": 5.0},
    ],
    ids=str,
)
def test_contract(options: dict[str, object]) -> None:
    check_router(lambda: CategoriesRouter(options))


def fitted(options: dict[str, object] | None = None, *, rows: int = 150) -> CategoriesRouter:
    return CategoriesRouter(options).fit(sample(rows))


HELD = queries_of(sample(60, seed=1))


def test_the_classifier_finds_the_task_of_new_queries() -> None:
    router = fitted()
    assert router.state is not None
    assert router.state.values["categories"] == ["code", "sums", "verse"]
    for query, reason in zip(HELD, router.reasons(HELD), strict=True):
        first = reason["categories"][0]
        assert first["category"] == query.metadata["task"]
        assert (
            first["expert"] == query.metadata["task"]
        )  # the sample's experts are named for what they can do
        assert sum(one["probability"] for one in reason["categories"]) == pytest.approx(1.0)
        assert reason["left_out"] == []


def test_scores_are_the_mixture_of_the_categories() -> None:
    router = fitted()
    assert router.state is not None
    scores, arrays = router.score(HELD), router.state.arrays
    for q, reason in enumerate(router.reasons(HELD, top=3)):
        share = {one["category"]: one["probability"] for one in reason["categories"]}
        p = np.array([share[name] for name in router.state.values["categories"]])
        mean = p @ arrays["mean"]
        np.testing.assert_allclose(scores.mean[q], mean, atol=1e-12)
        spread = p @ (arrays["std"] ** 2 + (arrays["mean"] - mean) ** 2)
        np.testing.assert_allclose(scores.std[q], np.sqrt(spread), atol=1e-9)


def test_means_of_a_category_are_shrunk_to_the_experts_own() -> None:
    table = OutcomeTable(
        ids=tuple("abcdef"),
        queries=tuple(f"query {word}" for word in ("red", "red red", "red x", "blue", "blue blue", "blue x")),
        experts=("e", "f"),
        score=np.array([[1, 0], [1, 1], [1, 0], [0, 1], [0, 0], [np.nan, 1]], np.float64),
        metadata={"task": ("r", "r", "r", "b", "b", "b")},
    )
    state = CategoriesRouter({"worth": 2.0}).fit(table).state
    assert state is not None
    # e: overall 3/5; b: (0 + 2 * 0.6) / (2 + 2), r: (3 + 1.2) / (3 + 2). f: overall 3/6.
    np.testing.assert_allclose(state.arrays["mean"], [[0.3, (2 + 1) / 5], [0.84, (1 + 1) / 5]])
    assert state.arrays["count"].tolist() == [[2, 3], [3, 3]]
    assert state.arrays["rows"].tolist() == [3, 3]


def test_solving_again_leaves_the_classifier_and_can_be_undone() -> None:
    router = fitted()
    free, before = router.score(HELD), router.state
    assert before is not None
    router.resolve(budget=4.0)  # sizes 1, 2, 3 and 4
    assert router.state is not None
    assert router.state.arrays["category_weight"] is before.arrays["category_weight"]
    kept = router.solution().kept
    assert router.solution().size <= 4
    tight = router.score(HELD)
    picked = {router.experts[e] for e in tight.mean.argmax(axis=1)}
    assert picked <= set(kept)
    out = [e for e, name in enumerate(router.experts) if name not in kept]
    assert out
    assert (tight.mean[:, out] < 0).all()  # below the worst score, 0
    assert (tight.std[:, out] >= tight.std.max(axis=1, keepdims=True) - 1e-12).all()
    inside = [router.experts.index(name) for name in kept]
    np.testing.assert_array_equal(tight.mean[:, inside], free.mean[:, inside])
    reason = router.reasons(HELD[:1])[0]
    assert reason["budget"] == 4.0
    assert set(reason["left_out"]) == {router.experts[e] for e in out}
    router.resolve()
    np.testing.assert_array_equal(router.score(HELD).mean, free.mean)
    router.resolve(experts=["plain", "sums"])
    assert set(router.solution().kept) <= {"plain", "sums"}
    for experts in (["nobody"], []):
        with pytest.raises(MixmergeError, match=r"Known: sums, code, verse, plain"):
            router.resolve(experts=experts)


def test_the_curve_of_a_router_rises() -> None:
    router = fitted()
    curve = router.pareto()
    assert curve[0].size == 1  # the smallest expert alone
    assert curve[-1].score == pytest.approx(router.solution().score)
    assert [one.size for one in curve] == sorted({one.size for one in curve})
    assert [one.score for one in curve] == sorted(one.score for one in curve)
    for one in curve:
        assert router.resolve(budget=one.size).solution().score == pytest.approx(one.score, abs=1e-5)


def test_pruning_forgets_what_the_map_leaves_out(tmp_path: Path) -> None:
    router = fitted({"budget": 3.0}).prune()
    assert set(router.experts) == set(router.solution().kept)
    assert router.score(HELD).mean.shape == (60, len(router.experts))
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert isinstance(loaded, CategoriesRouter)
    assert loaded.solution() == router.solution()
    assert len(loaded.version) == 12
    assert loaded.resolve().version == "unsaved"  # no folder holds this map


def test_a_changed_router_is_not_the_one_of_its_folder(tmp_path: Path) -> None:
    fitted().save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert loaded.version != "unsaved"
    assert loaded.remove_expert("plain").version == "unsaved"
    loaded = Router.load(tmp_path / "router")
    late = OutcomeTable(("1", "2"), ("add number", "moon song"), ("late",), np.array([[1.0], [0.0]]))
    assert loaded.add_expert(late).version == "unsaved"
    loaded = Router.load(tmp_path / "router")
    assert loaded.fit(sample()).version == "unsaved"


def test_experts_come_and_go_without_the_classifier() -> None:
    table = sample()
    whole = CategoriesRouter().fit(table)
    grown = CategoriesRouter().fit(table.only(table.experts[:3])).add_expert(table.only(table.experts[3:]))
    np.testing.assert_allclose(grown.score(HELD).mean, whole.score(HELD).mean, atol=1e-9)
    # an expert that is told nothing of the tasks is placed by what the classifier says
    bare = OutcomeTable(table.ids, table.queries, ("late",), table.score[:, 1:2])
    late = whole.add_expert(bare).score(HELD)
    np.testing.assert_allclose(late.mean[:, -1], late.mean[:, 1], atol=0.1)
    tight = CategoriesRouter({"budget": 6.0}).fit(table)
    assert tight.solution().kept == ("code", "sums", "verse")
    tight.remove_expert("verse")
    assert "verse" not in tight.solution().kept
    assert tight.solution().size <= 6
    with pytest.raises(MixmergeError, match=r"'plain' is the fallback"):
        fitted({"fallback": "plain"}).remove_expert("plain")


def test_lookup_is_the_choice_of_the_paper() -> None:
    router = fitted({"lookup": True})
    scores = router.score(HELD)
    for q, reason in enumerate(router.reasons(HELD)):
        assert router.experts[int(scores.mean[q].argmax())] == reason["categories"][0]["expert"]
        assert (scores.mean[q] >= 0).sum() == 1


def test_unsure_queries_go_to_the_fallback() -> None:
    router = fitted({"fallback": "plain", "unsure": 0.6, "budget": 7.0})
    assert "plain" in router.solution().kept
    odd = [Query("zebra umbrella teapot"), Query("python function loop class bug list import")]
    first, second = router.reasons(odd)
    assert first["unsure"], first
    assert not second["unsure"], second
    picked = router.score(odd).mean.argmax(axis=1)
    assert router.experts[picked[0]] == "plain"
    assert router.experts[picked[1]] == "code"
    strongest = fitted({"unsure": 0.0}).reasons(odd)[0]["fallback"]
    mean = dict(zip(sample().experts, np.nanmean(sample().score, axis=0), strict=True))
    assert mean[strongest] > mean["plain"]


def test_a_threshold_is_tuned_where_the_fallback_pays() -> None:
    # The generalist answers everything; with it nobody else is worth asking. With a useless one nobody falls back.
    table = sample(200)
    score = table.score.copy()
    score[:, 3] = 1.0
    strong = CategoriesRouter({"fallback": "plain"}).fit(_with_score(table, score))
    assert (strong.score(HELD).mean.argmax(axis=1) == 3).all()
    score[:, 3] = 0.0
    weak = CategoriesRouter({"fallback": "plain"}).fit(_with_score(table, score))
    assert (weak.score(HELD).mean.argmax(axis=1) != 3).all()


def _with_score(table: OutcomeTable, score: np.ndarray) -> OutcomeTable:
    return OutcomeTable(
        table.ids, table.queries, table.experts, score, metadata=table.metadata, prices=table.prices
    )


def test_missing_labels_are_filled_by_the_classifier() -> None:
    table = sample()
    some = tuple("" if i % 3 == 0 else task for i, task in enumerate(table.metadata["task"]))
    router = CategoriesRouter({"labels": "task"}).fit(
        OutcomeTable(table.ids, table.queries, table.experts, table.score, metadata={"task": some})
    )
    assert router.state is not None
    assert router.state.arrays["rows"].sum() == 150
    whole = fitted().state
    assert whole is not None
    np.testing.assert_allclose(router.state.arrays["rows"], whole.arrays["rows"], atol=3)


def test_columns_that_are_no_categories_are_not_taken() -> None:
    table = sample(40)
    ids = OutcomeTable(
        table.ids, table.queries, table.experts, table.score, metadata={"task": tuple(map(str, range(40)))}
    )
    state = CategoriesRouter({"clusters": 4}).fit(ids).state
    assert state is not None
    assert state.values["categories"] == [f"cluster {c}" for c in range(4)]


def test_faults_of_use() -> None:
    with pytest.raises(MixmergeError, match=r"no column 'topic' with a label. Columns: task"):
        fitted({"labels": "topic"})
    with pytest.raises(MixmergeError, match=r"no expert is called 'plan'. Did you mean 'plain'"):
        fitted({"fallback": "plan"})
    with pytest.raises(
        MixmergeError, match=r"no map keeps to 0.5 billion parameters. The least is 1: sums 1"
    ):
        fitted({"budget": 0.5})
    with pytest.raises(MixmergeError, match=r"router categories: unsure"):
        CategoriesRouter({"unsure": 2.0})
    with pytest.raises(MixmergeError, match=r"is not fitted"):
        CategoriesRouter().resolve(budget=1.0)
    table = sample()
    unpriced = OutcomeTable(table.ids, table.queries, table.experts, table.score)
    with pytest.raises(MixmergeError, match=r"no size of parameters is known of sums, code, verse, plain"):
        CategoriesRouter({"budget": 5.0}).fit(unpriced)
    priced = unpriced.priced({name: Price(1.0, 1.0) for name in table.experts})
    assert CategoriesRouter({"mean_cost": 1.0}).fit(priced).solution().cost == pytest.approx(0.00027, rel=0.1)
