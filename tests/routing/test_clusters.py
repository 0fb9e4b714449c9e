"""Clusters, pilots and strengths, against numbers worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mixmerge.decision.records import queries_of
from mixmerge.errors import MixmergeError
from mixmerge.routers.base import Inputs, Router, Training
from mixmerge.routers.clusters import ClusterRouter
from mixmerge.routers.contract import check_router, sample
from mixmerge.routers.pilots import PilotRouter
from mixmerge.routers.ranking import RankingRouter, similarity_weights, strengths, wins

NAN = float("nan")
Floats = NDArray[np.float64]


def training(
    degrees: Sequence[float],
    score: Sequence[Sequence[float]],
    *,
    experts: str = "abcd",
    costs: Sequence[float] | None = None,
    tasks: Sequence[str] = (),
) -> Training:
    width, turn = len(score[0]), np.radians(degrees)
    texts = tuple(f"text {i}" for i in range(len(score)))
    inputs = Inputs(texts, {"task": tuple(tasks)} if tasks else {}, at(*degrees))
    assert len(turn) == len(score)
    paid = np.array(costs or [NAN] * width, np.float64)
    return Training(inputs, np.array(score, np.float64), tuple(experts[:width]), paid, {})


def at(*degrees: float) -> NDArray[np.float32]:
    turn = np.radians(degrees)
    return np.asarray(np.stack([np.cos(turn), np.sin(turn)], axis=1), np.float32)


def ask(router: Router, data: Training, *degrees: float) -> tuple[Floats, Floats]:
    router.experts = data.experts
    router.state = router.learn(data)
    found = router.predict(router.state, Inputs(("?",) * len(degrees), {}, at(*degrees)))
    return found.mean, found.std


# Twenty queries at two places, so that k-means of two has one answer.
DEGREES = [0.0] * 10 + [90.0] * 10
SCORES = [[1.0, 0.0, 0.5]] * 8 + [[0.0, 0.0, 0.5]] * 2 + [[0.0, 1.0, 0.5]] * 10
TWO = {"clusters": 2, "worth": 2.0}


# --- clusters


def test_clusters_by_hand() -> None:
    data = training(DEGREES, SCORES)
    mean, std = ask(ClusterRouter({**TWO, "top_k": 1}), data, 5, 85)
    a, b = 0.4, 0.5  # means of all
    assert mean[0].tolist() == pytest.approx([(8 + 2 * a) / 12, (0 + 2 * b) / 12, 0.5])
    assert mean[1].tolist() == pytest.approx([(0 + 2 * a) / 12, (10 + 2 * b) / 12, 0.5])
    variance = np.var([row[0] for row in SCORES], ddof=1)
    assert std[0, 0] ** 2 == pytest.approx(variance / 12 + (2 / 12) ** 2 * variance / 20)


def test_the_nearer_cluster_counts_for_more() -> None:
    router = ClusterRouter({**TWO, "top_k": 3, "beta": 6.0})  # there are two
    near = np.cos(np.radians([30, 60]))
    weight = np.exp(6 * near) / np.exp(6 * near).sum()
    one, _ = ask(ClusterRouter({**TWO, "top_k": 1}), training(DEGREES, SCORES), 0, 90)
    mean, _ = ask(router, training(DEGREES, SCORES), 30)
    assert mean[0].tolist() == pytest.approx((weight @ one).tolist(), abs=2e-3)
    said = router.explain(router.state, Inputs(("?",), {}, at(30)), top=5)[0]["clusters"]  # type: ignore[arg-type]
    assert [part["queries"] for part in said] == [10, 10]
    assert said[0]["weight"] == pytest.approx(weight[0], abs=2e-3)
    assert said[0]["counts"] == {"a": 10.0, "b": 10.0, "c": 10.0}
    assert said[0]["scores"]["a"] == pytest.approx(one[0, 0])
    assert said[0]["typical"].startswith("text ")


def test_ranks_are_fused_as_published() -> None:
    mean, _ = ask(ClusterRouter({**TWO, "top_k": 1, "fuse": "rank"}), training(DEGREES, SCORES), 0, 90)
    first, second, third = 10.0, 1 / 1.1, 1 / 2.1  # the released code counts ranks from 0
    assert mean.tolist() == pytest.approx(np.array([[first, third, second], [third, first, second]]))
    tied, _ = ask(ClusterRouter({**TWO, "fuse": "rank"}), training(DEGREES, [[1.0, 1.0, 0.0]] * 20), 0)
    assert tied[0].tolist() == pytest.approx([first, first, third])


def test_alpha_trades_score_for_cheapness() -> None:
    data = training(DEGREES, SCORES, costs=[1.0, 3.0, 2.0])
    means = [
        ask(ClusterRouter({**TWO, "top_k": 1, "alpha": alpha}), data, 90)[0][0] for alpha in (1.0, 0.5, 0.0)
    ]
    low, high = 2 * 0.4 / 12, 11 / 12
    scaled = np.array([0, 1, (0.5 - low) / (high - low)])
    assert means[0].tolist() == pytest.approx(scaled.tolist())
    assert means[2].tolist() == pytest.approx([1, 0, 0.5])
    assert means[1].tolist() == pytest.approx((0.5 * scaled + 0.5 * np.array([1, 0, 0.5])).tolist())
    with pytest.raises(MixmergeError, match=r"nothing is known of what a, c cost"):
        ask(ClusterRouter({"alpha": 0.5}), training(DEGREES, SCORES, costs=[NAN, 1, NAN]), 0)


@pytest.mark.parametrize(
    ("rows", "options", "clusters"),
    [(20, {}, 2), (5, {}, 1), (200, {"clusters": 7}, 7), (200, {}, 20)],
)
def test_there_are_ten_queries_for_a_cluster(rows: int, options: dict[str, int], clusters: int) -> None:
    rng = np.random.default_rng(0)
    data = training(rng.uniform(0, 360, rows).tolist(), rng.random((rows, 2)).tolist())
    state = ClusterRouter(options).learn(data)
    assert len(state.arrays["centres"]) == clusters
    assert state.arrays["sizes"].sum() == rows


def test_fewer_different_queries_than_clusters() -> None:
    mean, std = ask(ClusterRouter(), training([0.0] * 40, [[1.0, 0.5]] * 40), 0, 180)
    assert np.isfinite(mean).all()
    assert np.isfinite(std).all()


def test_only_plain_means_are_independent() -> None:
    assert ClusterRouter().independent
    assert not ClusterRouter({"fuse": "rank"}).independent
    assert not ClusterRouter({"alpha": 0.5}).independent


@pytest.mark.parametrize(
    "options", [{"fuse": "rank"}, {"alpha": 0.7}, {"clusters": 3, "top_k": 1}, {"worth": 0, "beta": 0}]
)
def test_contract_of_clusters(options: dict[str, float]) -> None:
    check_router(lambda: ClusterRouter(options), learns="beta" not in options)


def test_an_added_expert_makes_no_new_clusters() -> None:
    table, more = sample(missing=0.0), sample(80, seed=3, missing=0.0)
    router = ClusterRouter().fit(table.only(table.experts[:3]))
    assert router.state is not None
    before = router.state.arrays["centres"]
    asked = queries_of(sample(40, seed=1))
    router.add_expert(more.only(table.experts[3:]))
    assert router.state.arrays["centres"] is before
    assert router.state.arrays["count"][:, 3].sum() == 80
    whole = ClusterRouter().fit(table.only(table.experts[:3])).add_expert(table.only(table.experts[3:]))
    assert np.allclose(whole.score(asked).mean, ClusterRouter().fit(table).score(asked).mean, atol=1e-12)


# --- pilots


def test_pilots_by_hand() -> None:
    # x: a is best at 0, tied with b at 30; y: b is best at 90
    data = training([0, 30, 90], [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], tasks=["x", "x", "y"])
    state = PilotRouter().learn(data)
    assert state.values["labels"] == ["x", "x", "y"]
    assert state.arrays["expert"].tolist() == [0, 1, 1]
    assert state.arrays["weight"].tolist() == [1.5, 0.5, 1.0]
    first = at(0)[0] + at(30)[0] / 2
    assert state.arrays["pilot"].astype(float) == pytest.approx(
        np.stack([first / np.linalg.norm(first), *at(30, 90)]), abs=1e-3
    )
    router = PilotRouter()
    mean, _ = ask(router, data, 0, 90)
    assert mean[0, 0] > mean[0, 1]
    assert mean[1, 1] > mean[1, 0]
    said = router.explain(router.state, Inputs(("?",), {}, at(85)), top=1)  # type: ignore[arg-type]
    assert said[0]["pilots"][0]["expert"] == "b"
    assert said[0]["pilots"][0]["label"] == "y"


def test_likeness_is_the_mean_over_pilots() -> None:
    # An expert's score is its likeness: then the line has slope 1 and gives it back.
    data = training(
        [0, 20, 90, 50], [[1.0, 0.0], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4]], tasks=["x", "x", "y", "x"]
    )
    equal = PilotRouter({"weight": "pilots"}).learn(data).arrays
    weighted = PilotRouter().learn(data).arrays
    assert equal["weight"].tolist() == [1.0, 1.0]
    assert weighted["weight"].tolist() == [3.0, 1.0]
    assert np.array_equal(equal["pilot"], weighted["pilot"])


def test_an_expert_that_is_never_best_stays_at_its_mean() -> None:
    mean, std = ask(PilotRouter(), training([0, 90, 45], [[1.0, 0.5], [1.0, 0.25], [1.0, 0.0]]), 0, 90)
    assert mean[:, 1].tolist() == [0.25, 0.25]
    assert np.isfinite(std).all()


def test_pilots_come_and_go(tmp_path: Path) -> None:
    table, asked = sample(), queries_of(sample(40, seed=1))
    router = PilotRouter().fit(table.only(("sums", "code")))
    before = router.score(asked).mean
    router.add_expert(table.only(("verse", "plain")))
    after = router.score(asked).mean
    assert np.array_equal(after[:, :2], before)
    held = np.array([one.metadata["task"] for one in asked])
    assert after[held == "verse", 2].mean() > after[held != "verse", 2].mean() + 0.1
    router.save(tmp_path / "router")
    left = Router.load(tmp_path / "router").remove_expert("code").score(asked)
    assert left.experts == ("sums", "verse", "plain")
    assert np.array_equal(left.mean, after[:, [0, 2, 3]])
    with pytest.raises(MixmergeError, match="queries the router was fitted on, and there are none"):
        PilotRouter().fit(table.only(("sums", "code"))).add_expert(sample(30, seed=9).only(("verse",)))


def test_pilots_without_labels_and_with_a_wrong_one() -> None:
    check_router(lambda: PilotRouter({"weight": "pilots"}), learns=False)
    data = training([0, 90], [[1.0, 0.0], [0.0, 1.0]])
    assert PilotRouter().learn(data).values["labels"] == ["", ""]
    with pytest.raises(MixmergeError, match=r"router pilots: label.*no labels in a column topic"):
        PilotRouter({"label": "topic"}).learn(data)


# --- strengths


def test_strengths_of_two_have_a_closed_form() -> None:
    won = np.array([[[0.0, 30.0], [10.0, 0.0]], [[0.0, 7.0], [7.0, 0.0]]])
    found = strengths(won, prior=1e-6)
    assert found[0, 0] - found[0, 1] == pytest.approx(np.log(3), abs=1e-6)
    assert found.sum(axis=1).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert found[1].tolist() == pytest.approx([0, 0])


def test_strengths_with_a_prior_solve_their_equation() -> None:
    rng = np.random.default_rng(0)
    won = rng.gamma(1.0, 20.0, (5, 6, 6))
    won[3, 0], won[3, :, 0] = 0.0, 50.0  # one always loses
    found = strengths(won, prior=2.0)
    odds = np.exp(found)
    chance = odds[:, :, None] / (odds[:, :, None] + odds[:, None, :])
    met = won + won.transpose(0, 2, 1)
    assert ((won - met * chance).sum(axis=2) - 2 * found) == pytest.approx(np.zeros((5, 6)), abs=1e-6)
    assert found[3].argmin() == 0


@given(st.integers(0, 200), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_strengths_know_no_order(seed: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    won, order = rng.gamma(0.5, 5.0, (3, experts, experts)), rng.permutation(experts)
    found = strengths(won, prior=1.0)
    moved = strengths(won[:, order][:, :, order], prior=1.0)
    assert np.allclose(moved, found[:, order], atol=1e-9)
    assert np.allclose(strengths(won[:1], prior=1.0), found[:1], atol=1e-12)


def test_wins_by_hand() -> None:
    score = np.array([[1.0, 0.0, NAN], [0.5, 0.5, 0.4], [NAN, NAN, 1.0]])
    won = wins(np.array([[2.0, 3.0, 9.0]]), score, margin=0.0)[0]
    np.fill_diagonal(won, 0)
    assert won.tolist() == [[0, 2 + 1.5, 3], [1.5, 0, 3], [0, 0, 0]]
    close = wins(np.array([[0.0, 3.0, 0.0]]), score, margin=0.15)[0]
    assert close[0, 2] == close[2, 0] == 1.5


def test_similarity_weights_by_hand() -> None:
    weight = similarity_weights(np.array([[0.8, 0.4, -0.8, -np.inf]]), 10.0)[0]
    assert (weight / weight[0]).tolist() == pytest.approx([1, 10**-0.5, 10**-2, 0])
    assert weight.mean() == pytest.approx(1)
    assert similarity_weights(np.array([[-0.5, -0.2]]), 10.0)[0].tolist() == pytest.approx([1, 1])


def test_ranking_follows_who_wins_near() -> None:
    rng = np.random.default_rng(0)
    degrees = [*rng.normal(0, 5, 60), *rng.normal(90, 5, 60)]
    data = training(degrees, [[1.0, 0.0]] * 60 + [[0.0, 1.0]] * 60)
    router = RankingRouter()
    mean, std = ask(router, data, 0, 90, 45)
    assert mean[0, 0] > mean[0, 1] + 0.5
    assert mean[1, 1] > mean[1, 0] + 0.5
    assert abs(mean[2, 0] - mean[2, 1]) < 0.2
    assert (std > 0).all()
    said = router.explain(router.state, Inputs(("?",), {}, at(0)), top=3)[0]  # type: ignore[arg-type]
    assert said["strengths"]["a"] > said["strengths"]["b"]
    assert len(said["neighbours"]) == 3


def test_ranking_of_noise_stays_at_the_means() -> None:
    rng = np.random.default_rng(0)
    data = training(rng.uniform(0, 180, 300).tolist(), (rng.random((300, 3)) < 0.5).astype(float).tolist())
    mean, _ = ask(RankingRouter(), data, 0, 60, 120)
    assert abs(mean - data.score.mean(axis=0)).max() < 0.12


def test_one_expert_has_nobody_to_beat() -> None:
    mean, _ = ask(RankingRouter(), training([0, 90], [[1.0], [0.0]]), 0, 90)
    assert mean.tolist() == [[0.5], [0.5]]


def test_blocks_change_nothing() -> None:
    rng = np.random.default_rng(0)
    data = training(rng.uniform(0, 180, 60).tolist(), rng.random((60, 3)).tolist())
    degrees = rng.uniform(0, 180, 700).tolist()
    router = RankingRouter()
    whole, _ = ask(router, data, *degrees)
    part, _ = ask(router, data, *degrees[300:310])
    assert np.allclose(part, whole[300:310], atol=1e-9)
