"""The nearest queries: the search is exact and of one query alone, the scores are those worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixmerge.decision.records import Query, queries_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.kernels import loops
from mixmerge.kernels.nearest import (
    NONE,
    keep_largest_reference,
    keys_of,
    parts_of,
    weighted_sums_reference,
)
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.base import Inputs, Router, Training
from mixmerge.routers.contract import check_router, sample
from mixmerge.routers.embedders import GivenFeatures
from mixmerge.routers.grid import STEP, on_grid
from mixmerge.routers.nearest import NearestRouter
from mixmerge.routers.screen import Screen, choose, split
from mixmerge.routers.search import Index, in_parts, lay_out
from mixmerge.routers.shrinkage import STRONGEST
from mixmerge.routers.stores import best_worth, matched, weights

NAN = float("nan")
Floats = NDArray[np.float64]


def cloud(rows: int, dimensions: int, *, seed: int = 0, centers: int = 30) -> NDArray[np.float32]:
    """Points of unit length about some centres."""
    rng = np.random.default_rng(seed)
    about = np.random.default_rng(99).normal(size=(centers, dimensions))
    points = about[rng.integers(0, centers, rows)] + 0.6 * rng.normal(size=(rows, dimensions))
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True), np.float32)


def keys(rows: int) -> NDArray[np.uint64]:
    return np.arange(rows, dtype=np.uint64) * np.uint64(7919)


def training(embedding: NDArray[np.float32], score: Floats) -> Training:
    experts = tuple("abcdefgh"[: score.shape[1]])
    texts = tuple(f"text {i}" for i in range(len(score)))
    return Training(Inputs(texts, {}, embedding), score, experts, np.full(len(experts), NAN), {})


def angles(*degrees: float) -> NDArray[np.float32]:
    turn = np.radians(degrees)
    return np.asarray(np.stack([np.cos(turn), np.sin(turn)], axis=1), np.float32)


def ask(router: NearestRouter, data: Training, embedding: NDArray[np.float32]) -> tuple[Floats, Floats]:
    router.experts = data.experts
    router.state = router.learn(data)
    found = router.predict(router.state, Inputs(("?",) * len(embedding), {}, embedding))
    return found.mean, found.std


# --- the search


@given(st.integers(0, 1000), st.integers(1, 700))
@settings(max_examples=25, deadline=None)
def test_products_on_the_grid_are_exact_in_any_order(seed: int, dimensions: int) -> None:
    rows = on_grid(cloud(6, dimensions, seed=seed))
    assert np.array_equal(rows / STEP, np.round(rows / STEP))
    assert np.array_equal(rows.astype(np.float16).astype(np.float32), rows)
    exact = rows.astype(np.float64) @ rows.astype(np.float64).T
    order = np.random.default_rng(seed).permutation(dimensions)
    running = np.cumsum(rows[:, None, order] * rows[None, :, order], axis=2, dtype=np.float32)[:, :, -1]
    assert np.array_equal(running, exact)
    assert np.array_equal(rows @ rows.T, exact)


@pytest.mark.parametrize("flat_rows", [20_000, 500])
def test_a_query_has_the_same_neighbours_in_any_company(flat_rows: int) -> None:
    stored = cloud(3000, 24)
    stored[1000:1050] = stored[7]  # more that are equally near than are asked for
    queries = np.concatenate([cloud(299, 24, seed=1), stored[7:8]])
    layout = lay_out(stored, keys(3000), k=10, recall=0.9, flat_rows=flat_rows, seed=0)
    index = Index(layout.arrays, layout.probes)
    similarity, rows = index.search(queries, 10)
    alone = [index.search(queries[q : q + 1], 10) for q in (*range(40), 299)]
    assert np.array_equal(np.concatenate([one[1] for one in alone]), rows[[*range(40), 299]])
    assert np.array_equal(np.concatenate([one[0] for one in alone]), similarity[[*range(40), 299]])
    assert (np.diff(similarity) <= 0).all()


def test_the_flat_search_is_exact() -> None:
    stored, queries = cloud(700, 16), cloud(50, 16, seed=1)
    layout = lay_out(stored, keys(700), k=20, recall=0.9, flat_rows=1000, seed=0)
    assert layout.order.tolist() == list(range(700))
    similarity, rows = Index(layout.arrays, 0).search(queries, 20)
    exact = on_grid(queries).astype(np.float64) @ on_grid(stored).astype(np.float64).T
    assert np.array_equal(similarity, -np.sort(-exact, axis=1)[:, :20])
    assert np.array_equal(np.take_along_axis(exact, rows, axis=1), similarity)
    assert Index(layout.arrays, 0).search(queries, 5000)[1].shape == (50, 700)


def test_the_inverted_file_has_the_recall_it_says() -> None:
    stored, queries = cloud(6000, 24), cloud(500, 24, seed=1)
    layout = lay_out(stored, keys(6000), k=20, recall=0.95, flat_rows=500, seed=0)
    assert 1 <= layout.probes < len(layout.arrays["sizes"])
    assert layout.arrays["sizes"].sum() == 6000
    assert sorted(layout.order.tolist()) == list(range(6000))
    assert layout.recall >= 0.95
    index = Index(layout.arrays, layout.probes)
    near, rows = index.search(queries, 20)
    exact = on_grid(queries) @ on_grid(stored).T
    kth = -np.sort(-exact, axis=1)[:, 19:20]
    assert (near >= kth).mean() >= 0.94
    assert np.array_equal(np.take_along_axis(exact, layout.order[rows], axis=1), near)
    fewer = lay_out(stored, keys(6000), k=20, recall=0.5, flat_rows=500, seed=0)
    assert fewer.probes < layout.probes
    assert np.array_equal(index.search(queries, 20, probes=len(layout.arrays["sizes"]))[0][:, -1:], kth)


def test_the_layout_is_the_same_each_time() -> None:
    stored = cloud(2000, 16)
    first, second = (lay_out(stored, keys(2000), k=5, recall=0.9, flat_rows=500, seed=4) for _ in range(2))
    assert first.probes == second.probes
    assert all(np.array_equal(first.arrays[name], second.arrays[name]) for name in first.arrays)


def test_lists_that_hold_too_few_say_so() -> None:
    layout = lay_out(cloud(600, 8), keys(600), k=5, recall=0.1, flat_rows=500, seed=0)
    rows = Index(layout.arrays, 1).search(cloud(20, 8, seed=1), 500)[1]
    assert (rows[:, -1] == -1).all()
    assert (rows[:, 0] >= 0).all()


def test_another_dimension_is_a_fault() -> None:
    layout = lay_out(cloud(10, 8), keys(10), k=5, recall=0.9, flat_rows=500, seed=0)
    with pytest.raises(MixmergeError, match=r"has 9 dimensions.*fitted on 8"):
        Index(layout.arrays, 0).search(cloud(1, 9), 3)


# --- what neighbours tell


def test_knn_by_hand() -> None:
    data = training(angles(0, 10, 80, 90), np.array([[1.0, 0.0], [0.5, NAN], [0.0, 1.0], [0.0, 1.0]]))
    mean, std = ask(NearestRouter({"k": 2, "worth": 2}), data, angles(2, 88))
    first, second = 0.375, 2 / 3  # the experts' means
    assert mean[0].tolist() == pytest.approx([(1.5 + 2 * first) / 4, (0 + 2 * second) / 3])
    assert mean[1].tolist() == pytest.approx([(0 + 2 * first) / 4, (2 + 2 * second) / 4])
    variance = np.array([np.var([1, 0.5, 0, 0], ddof=1), np.var([0, 1, 1], ddof=1)])
    prior = np.array([2 / 4, 2 / 3]) ** 2 * variance / [4, 3]  # of means of four and of three scores
    assert std[0].tolist() == pytest.approx((variance / [4, 3] + prior) ** 0.5)


def test_an_expert_nobody_near_was_asked_stays_at_its_mean() -> None:
    data = training(angles(0, 1, 90), np.array([[1.0, NAN], [1.0, NAN], [0.0, 0.25]]))
    mean, std = ask(NearestRouter({"k": 2, "worth": 0}), data, angles(0))
    assert mean[0].tolist() == pytest.approx([1.0, 0.25])
    assert np.isfinite(std).all()


def test_weights_by_hand() -> None:
    similarity, rows = np.array([[0.9, 0.8, 0.0]], np.float32), np.array([[4, 2, -1]])
    assert weights(similarity, rows, None).tolist() == [[1.0, 1.0, 0.0]]
    given_weights = weights(similarity, rows, 0.1)[0]
    e = np.exp(-1)
    assert given_weights.tolist() == pytest.approx(
        [(1 + e) / (1 + e**2), e * (1 + e) / (1 + e**2), 0], abs=1e-6
    )
    assert given_weights.sum() == pytest.approx((1 + e) ** 2 / (1 + e**2))  # the effective number
    assert weights(similarity, np.full((1, 3), -1), 0.1).tolist() == [[0, 0, 0]]
    assert weights(similarity, rows, 1e-6)[0].tolist() == [1.0, 0.0, 0.0]
    assert weights(similarity, rows, 1e6)[0].tolist() == pytest.approx([1.0, 1.0, 0.0])


def test_a_temperature_prefers_the_nearer() -> None:
    data = training(angles(0, 20, 180, 180), np.array([[1.0], [0.0], [1.0], [0.0]]))
    plain, _ = ask(NearestRouter({"k": 2, "worth": 1}), data, angles(4))
    warm, _ = ask(NearestRouter({"k": 2, "worth": 1, "temperature": 0.05}), data, angles(4))
    assert plain[0, 0] == 0.5
    assert warm[0, 0] > 0.55


def test_best_worth_by_hand() -> None:
    total, count, mean = np.array([[1.0]]), np.array([[2.0]]), np.array([[0.0]])  # neighbours say 1/2
    # (1 + 0) / (2 + w) is the score for w = 2
    assert best_worth(total, count, np.array([[0.25]]), mean, (0.5, 2.0, 8.0)).tolist() == [2.0]
    assert best_worth(total, count, np.array([[NAN]]), mean, (0.5, 2.0, 8.0)).tolist() == [8.0]


def test_the_worth_is_that_of_the_data() -> None:
    embedding = cloud(1500, 8, centers=6)
    rng = np.random.default_rng(0)
    noise = (rng.random(1500) < 0.5).astype(float)
    local = (embedding[:, 0] > 0).astype(float)
    router = NearestRouter()
    state = router.learn(training(embedding, np.stack([noise, local], axis=1)))
    assert state.arrays["worth"][0] >= 100
    assert state.arrays["worth"][1] <= 4
    alike = router.learn(training(embedding, np.ones((1500, 1))))
    assert alike.arrays["worth"].tolist() == [STRONGEST]


def test_the_query_itself_is_no_neighbour_of_its_own() -> None:
    # Scores that nothing near predicts: with themselves among the neighbours, k = 1 would seem perfect.
    embedding, rng = cloud(800, 8), np.random.default_rng(0)
    score = (rng.random((800, 1)) < 0.5).astype(float)
    state = NearestRouter({"k": 1}).learn(training(embedding, score))
    assert state.arrays["worth"][0] > 8


def test_explanations_are_the_neighbours() -> None:
    router = NearestRouter({"k": 3, "excerpt": 6})
    ask(router, training(angles(0, 10, 80), np.array([[1.0, 0.0], [0.5, NAN], [0.0, 1.0]])), angles(2))
    assert router.state is not None
    said = router.explain(router.state, Inputs(("?",), {}, angles(2)), top=2)[0]
    assert said["of"] == 3
    assert [one["query"] for one in said["neighbours"]] == ["text 0", "text 1"]
    assert [one["scores"] for one in said["neighbours"]] == [{"a": 1.0, "b": 0.0}, {"a": 0.5}]
    assert said["neighbours"][0]["similarity"] == pytest.approx(np.cos(np.radians(2)), abs=2e-3)


# --- the router


@pytest.mark.parametrize("options", [{"temperature": 0.1}, {"flat_rows": 100, "recall": 0.99}, {"k": 500}])
def test_contract_with_options(options: dict[str, float]) -> None:
    check_router(lambda: NearestRouter(options), learns=options.get("k") != 500)  # 500 are all there are


def test_added_experts_share_a_store_or_get_one(tmp_path: Path) -> None:
    table, elsewhere = sample(missing=0.0), sample(60, seed=5)
    asked = queries_of(sample(30, seed=1))
    router = NearestRouter().fit(table.only(("sums", "code")))
    before = router.score(asked)
    router.add_expert(table.rows(range(0, 150, 2)).only(("verse",)))  # half of the queries, and no others
    router.add_expert(table.rows(range(40)).only(("plain",)))  # too few to share
    router.add_expert(replace(elsewhere.only(("sums",)), experts=("other",), prices={}))  # other queries
    assert router.state is not None
    assert router.state.arrays["store"].tolist() == [0, 0, 0, 1, 2]
    after = router.score(asked)
    assert np.array_equal(after.mean[:, :2], before.mean)
    assert np.array_equal(after.std[:, :2], before.std)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    assert np.array_equal(loaded.score(asked).mean, after.mean)
    left = loaded.remove_expert("plain").remove_expert("code").score(asked)
    assert left.experts == ("sums", "verse", "other")
    assert np.array_equal(left.mean, after.mean[:, [0, 2, 4]])
    assert loaded.state is not None
    assert set(loaded.state.values["stores"]) == {"0", "2"}
    assert not [name for name in loaded.state.arrays if name.startswith("1.")]
    texts = [one["query"] for one in loaded.reasons(asked[:1], top=200)[0]["neighbours"]]
    assert len(texts) == 80  # 40 of each store that is left
    again = loaded.add_expert(table.only(("plain",))).score(asked)
    assert np.array_equal(again.mean[:, :3], left.mean)


def test_an_added_expert_that_was_asked_all_is_as_if_fitted_with_the_others() -> None:
    table, asked = sample(missing=0.0), queries_of(sample(30, seed=1))
    added = NearestRouter().fit(table.only(table.experts[:3])).add_expert(table.only(table.experts[3:]))
    assert np.array_equal(added.score(asked).mean, NearestRouter().fit(table).score(asked).mean)
    # In another order, and with texts that differ in white space only
    other = table.only(table.experts[3:]).rows(range(149, -1, -1))
    spaced = replace(other, queries=tuple(f" {text}\n" for text in other.queries))
    moved = NearestRouter().fit(table.only(table.experts[:3])).add_expert(spaced)
    assert np.array_equal(moved.score(asked).mean, added.score(asked).mean)


def test_matched_by_hand() -> None:
    stored, score = np.array([5, 6, 7, 8], np.uint64), np.array([[0.1], [0.2], [0.3]])
    found = matched(stored, np.array([8, 5, 8], np.uint64), score)
    assert found is not None
    assert found[:, 0].tolist() == pytest.approx([0.2, NAN, NAN, 0.3], nan_ok=True)
    assert matched(stored, np.array([8, 5, 9], np.uint64), score) is None
    assert matched(stored, np.array([8, 8, 8], np.uint64), score) is None


def test_an_inverted_file_is_saved_and_loaded(tmp_path: Path) -> None:
    rows = 1200
    embedding, rng = cloud(rows, 12), np.random.default_rng(0)
    table = OutcomeTable(
        ids=tuple(map(str, range(rows))),
        queries=tuple(f"text {i}" for i in range(rows)),
        experts=("a", "b"),
        score=rng.random((rows, 2)),
    )
    options = {"flat_rows": 200, "recall": 0.9, "k": 10}
    router = NearestRouter(options, features=GivenFeatures.of(table.ids, embedding)).fit(table)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router")
    asked = [Query(f"new {i}", embedding=one) for i, one in enumerate(cloud(50, 12, seed=1))]
    assert np.array_equal(loaded.score(asked).mean, router.score(asked).mean)
    assert loaded.state is not None
    about = loaded.state.values["stores"]["0"]
    assert about["recall"] >= 0.9
    assert 1 <= about["probes"] < len(loaded.state.arrays["0.sizes"])
    assert loaded.reasons(asked)[0]["neighbours"][0]["query"].startswith("text ")


@pytest.mark.parametrize(
    ("options", "word"),
    [({"k": 0}, "k"), ({"temperature": 0}, "temperature"), ({"recall": 1}, "recall"), ({"K": 3}, "K")],
)
def test_wrong_options(options: dict[str, float], word: str) -> None:
    with pytest.raises(MixmergeError, match=f"router knn: {word}"):
        NearestRouter(options)


# --- a first look by few dimensions


def in_few(rows: int, dimensions: int, *, kept: int, seed: int) -> NDArray[np.float32]:
    """Points of unit length, nearly all of them in the first ``kept`` dimensions."""
    made = np.random.default_rng(seed).standard_normal((rows, dimensions))
    made[:, kept:] *= 0.03
    return on_grid(made / np.linalg.norm(made, axis=1, keepdims=True))


def test_a_screen_is_used_where_it_saves_work() -> None:
    flat = choose(in_few(2_000, 64, kept=64, seed=0), in_few(50, 64, kept=64, seed=1), k=5)
    assert flat.basis.shape == (64, 0)
    steep = choose(in_few(2_000, 64, kept=6, seed=0), in_few(50, 64, kept=6, seed=1), k=5)
    assert 0 < steep.basis.shape[1] <= 16
    assert 0 <= steep.slack <= 1


def test_heads_and_tails_by_hand() -> None:
    rows = on_grid(np.array([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]]))
    heads, tails = split(rows, on_grid(np.eye(3)[:, :1]))
    assert heads[:, 0] == pytest.approx([0.6, 0.0], abs=STEP)
    assert tails == pytest.approx([0.8, 1.0], abs=2 * STEP)


@given(st.integers(0, 1_000), st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_with_the_whole_slack_no_neighbour_is_lost(seed: int, k: int) -> None:
    stored, asked = in_few(400, 16, kept=4, seed=seed), in_few(20, 16, kept=4, seed=seed + 1)
    layout = lay_out(stored, keys(400), k=k, recall=0.9, flat_rows=100, seed=0)
    basis = on_grid(np.eye(16)[:, :3])
    heads, tails = split(stored, basis)
    screen = Screen(basis, heads, tails, 1.0)
    with_it = Index({**layout.arrays, **screen.arrays(layout.order)}, layout.probes)
    without = Index({**layout.arrays, **Screen.none(stored).arrays(layout.order)}, layout.probes)
    for probes in (layout.probes, len(layout.arrays["sizes"])):
        found, wanted = (index.search(asked, k, probes=probes) for index in (with_it, without))
        assert np.array_equal(found[0], wanted[0])
        assert np.array_equal(found[1], wanted[1])


def test_a_screened_search_depends_on_no_batch_mate() -> None:
    stored, asked = in_few(3_000, 64, kept=6, seed=3), in_few(40, 64, kept=6, seed=4)
    layout = lay_out(stored, keys(3_000), k=5, recall=0.9, flat_rows=100, seed=0)
    assert layout.arrays["basis"].size
    index = Index(layout.arrays, layout.probes)
    together = index.search(asked, 5)
    alone = [index.search(one[None], 5) for one in asked]
    assert np.array_equal(together[1], np.concatenate([rows for _, rows in alone]))
    exact = np.argsort(-(asked @ stored.T), axis=1, kind="stable")[:, :5]
    found = layout.order[together[1]]
    assert np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found, exact, strict=True)]) > 0.85


def test_more_queries_of_one_list_than_a_product_takes() -> None:
    stored = cloud(600, 8)
    layout = lay_out(stored, keys(600), k=3, recall=0.9, flat_rows=100, seed=0)
    index = Index(layout.arrays, layout.probes)
    one = stored[:1]
    near, rows = index.search(np.repeat(one, 9_000, axis=0), 3)
    wanted = index.search(one, 3)
    assert (near == wanted[0]).all()
    assert (rows == wanted[1]).all()


# --- the loops


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 150))
@settings(max_examples=40, deadline=None)
def test_the_largest_are_kept_whatever_the_order(seed: int, k: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    similar = on_grid(rng.integers(-3, 4, (3, 4 * m)) / 4)  # many are equal
    wanted = np.full((3, 3 * k), NONE)
    keys, counts, least = wanted.copy(), np.zeros(3, np.int64), np.full(3, NONE)
    for part in rng.permutation(4):
        first = int(part) * m
        near = np.ascontiguousarray(similar[:, first : first + m])
        loops.keep_largest(near, first, np.arange(3), keys, counts, least, k)
        wanted = keep_largest_reference(near, first, wanted, k)
    assert np.array_equal(np.sort(keys, axis=1)[:, : -k - 1 : -1], wanted)
    near, rows = parts_of(wanted)
    exact = np.argsort(-similar, axis=1, kind="stable")[:, :k]
    width = exact.shape[1]
    assert np.array_equal(rows[:, :width], exact)
    assert np.array_equal(near[:, :width], np.take_along_axis(similar, exact, axis=1))
    assert (rows[:, width:] == -1).all()


def test_keys_of_the_ends() -> None:
    similar, rows = np.array([-1.0, -(STEP**2), 0.0, 1.0], np.float32), np.array([0, 1, 2**31, 5])
    found = parts_of(keys_of(similar, rows))
    assert np.array_equal(found[0], similar)
    assert np.array_equal(found[1], rows)
    assert (np.diff(keys_of(similar, rows)) > 0).all()


def test_weighted_sums_agree_with_their_reference() -> None:
    rng = np.random.default_rng(0)
    for queries, k, rows, experts in ((1, 1, 1, 1), (7, 5, 20, 3), (3, 40, 50, 100)):
        values = rng.random((rows, experts), np.float32)
        places, weight = rng.integers(0, rows, (queries, k)), rng.random((queries, k), np.float32)
        sums = np.full((queries, experts), NAN, np.float32)
        loops.weighted_sums(places, weight, values, sums)
        assert sums == pytest.approx(weighted_sums_reference(places, weight, values), rel=1e-5)
    weight[0], places[0] = 0, -1
    loops.weighted_sums(places, weight, values, sums)
    assert (sums[0] == 0).all()


def test_parts_are_done_once_and_their_faults_are_told() -> None:
    for parallel in (False, True):
        done = np.zeros(10_000, np.int64)

        def work(part: slice, done: NDArray[np.int64] = done) -> None:
            done[part] += 1

        in_parts(work, len(done), parallel=parallel)
        assert (done == 1).all()

        def fail(part: slice) -> None:
            if part.stop == 10_000:
                raise MixmergeError(Fault("part", "is wrong"))

        with pytest.raises(MixmergeError, match="part: is wrong"):
            in_parts(fail, 10_000, parallel=parallel)
