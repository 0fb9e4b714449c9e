"""Ridge and logistic regression of scores: against the normal equations, brute force and scikit-learn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.decision.records import queries_of
from mixmerge.errors import MixmergeError
from mixmerge.routers.base import Inputs, State, Training
from mixmerge.routers.contract import check_router, sample
from mixmerge.routers.linear import PENALTIES, Frame, Linear, RidgeRouter, evaluate, ridge
from mixmerge.routers.logistic import (
    LogisticRouter,
    choose,
    left_out,
    logistic,
    recalibrate,
    sigmoid,
)

ROOT = Path(__file__).resolve().parents[2]


def made(rows: int, experts: int, *, size: int = 6, seed: int = 0) -> tuple[Any, Any]:
    """Embeddings ``(N, D)`` and noisy linear scores ``(N, E)``."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(rows, size)).astype(np.float32)
    slopes = rng.normal(size=(size, experts)) * np.linspace(0.0, 1.0, experts)
    return embedding, embedding @ slopes + 0.5 + 0.7 * rng.normal(size=(rows, experts))


def training(embedding: Any, score: Any) -> Training:
    experts = tuple(f"e{i}" for i in range(score.shape[1]))
    inputs = Inputs(tuple(f"text {i}" for i in range(len(score))), embedding=embedding)
    return Training(inputs, score, experts, np.full(len(experts), np.nan), {})


def plain(embedding: Any, y: Any, alpha: float) -> Any:
    """Coefficients and, last, the intercept: the normal equations with no penalty on the latter."""
    design = np.column_stack([embedding.astype(np.float64), np.ones(len(y))])
    penalty = alpha * np.eye(design.shape[1])
    penalty[-1, -1] = 0
    return np.linalg.solve(design.T @ design + penalty, design.T @ y)


def left_out_error(embedding: Any, y: Any, alpha: float) -> float:
    """Mean squared error of every row by a fit without it."""
    errors = []
    for i in range(len(y)):
        rest = np.arange(len(y)) != i
        solved = plain(embedding[rest], y[rest], alpha)
        errors.append(y[i] - embedding[i].astype(np.float64) @ solved[:-1] - solved[-1])
    return float(np.mean(np.square(errors)))


def values(linear: Linear, frame: Frame, embedding: Any) -> tuple[Any, Any]:
    """What the linear functions say, in float64."""
    moved = embedding.astype(np.float64) - frame.center
    turned = moved @ frame.axes
    variance = turned**2 @ linear.spread - 2 * turned @ linear.lean + linear.offset
    return moved @ linear.coef + linear.intercept, variance


def test_three_points_by_hand() -> None:
    # x = -1, 0, 1 and y = 0, 1, 5: slope of least squares 5 / 2, with a penalty of 2: 5 / 4; mean 2.
    x = np.array([[-1.0], [0.0], [1.0]], np.float32)
    linear = ridge(x, np.array([[0.0], [1.0], [5.0]]), Frame.of(x), alpha=2.0)
    np.testing.assert_allclose(linear.coef, [[1.25]])
    np.testing.assert_allclose(linear.intercept, [2.0])


def test_ridge_solves_the_normal_equations() -> None:
    x, y = made(40, 3)
    frame = Frame.of(x)
    said, _ = values(ridge(x, y, frame, alpha=3.0), frame, x)
    for e in range(3):
        solved = plain(x, y[:, e], 3.0)
        np.testing.assert_allclose(said[:, e], x.astype(np.float64) @ solved[:-1] + solved[-1], atol=1e-10)


def test_penalty_and_noise_are_those_of_leaving_one_out() -> None:
    x, y = made(14, 4)
    frame = Frame.of(x)
    linear = ridge(x, y, frame)
    asked = np.random.default_rng(5).normal(size=(5, 6)).astype(np.float32)
    _, variance = values(linear, frame, asked)
    centered = x.astype(np.float64) - frame.center
    for e in range(4):
        errors = [left_out_error(x, y[:, e], alpha) for alpha in PENALTIES]
        alpha = PENALTIES[int(np.argmin(errors))]
        assert linear.alpha[e] == alpha
        moved = asked.astype(np.float64) - frame.center
        inverse = np.linalg.inv(centered.T @ centered + alpha * np.eye(6))
        known = min(errors) * (1 / 14 + np.einsum("qd,dk,qk->q", moved, inverse, moved))
        np.testing.assert_allclose(variance[:, e], known, rtol=1e-8)
    assert len(set(linear.alpha)) > 1, "one expert has no slope, one has: their penalties differ"


def test_an_expert_is_fitted_on_its_own_rows() -> None:
    x, y = made(30, 3)
    y[:10, 1] = np.nan
    y[5:12, 2] = np.nan
    frame = Frame.of(x)
    linear = ridge(x, y, frame)
    said, variance = values(linear, frame, x)
    for e, rows in ((0, slice(None)), (1, slice(10, None)), (2, np.r_[0:5, 12:30])):
        solved = plain(x[rows], y[rows, e], linear.alpha[e])
        np.testing.assert_allclose(said[:, e], x.astype(np.float64) @ solved[:-1] + solved[-1], atol=1e-10)
        own = x[rows].astype(np.float64)
        noise = left_out_error(x[rows], y[rows, e], linear.alpha[e])
        inverse = np.linalg.inv((own - own.mean(0)).T @ (own - own.mean(0)) + linear.alpha[e] * np.eye(6))
        moved = x.astype(np.float64) - own.mean(0)
        exact = noise * (1 / len(own) + np.einsum("qd,dk,qk->q", moved, inverse, moved))
        np.testing.assert_allclose(variance[:, e], exact, rtol=1e-8 if e == 0 else 0.5)


def test_scores_that_are_all_alike_stay() -> None:
    x, y = made(25, 2)
    y[:, 0] = 0.3
    router = RidgeRouter()
    state = router.learn(training(x, y))
    told = router.predict(state, Inputs(("a",), embedding=x[:1]))
    assert told.mean[0, 0] == pytest.approx(0.3)
    assert np.isfinite(told.std).all()
    assert told.std[0, 0] > 0, "25 equal scores are no certainty"


@pytest.mark.parametrize("kind", [RidgeRouter, LogisticRouter])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_rows(kind: type[RidgeRouter] | type[LogisticRouter], rows: int) -> None:
    x, _ = made(rows, 1)
    y = np.array([[1.0], [0.0], [1.0]])[:rows]
    router = kind()
    told = router.predict(router.learn(training(x, y)), Inputs(("a", "b"), embedding=made(2, 1, seed=9)[0]))
    assert np.isfinite(told.mean).all()
    assert np.isfinite(told.std).all()
    assert (told.mean > -0.2).all()
    assert (told.mean < 1.2).all()


def test_uncertainty_is_less_with_more_rows_and_more_far_away() -> None:
    x, y = made(400, 1)
    few, many = (ridge(x[:n], y[:n], Frame.of(x[:n]), alpha=1.0) for n in (40, 400))
    near, far = (values(few, Frame.of(x[:40]), scale * x[:5])[1] for scale in (1, 10))
    assert (values(many, Frame.of(x), x[:5])[1] < near).all()
    assert (far > near).all()


def predicted(options: dict[str, Any], x: Any, y: Any) -> Any:
    router = RidgeRouter(options)
    return router.predict(router.learn(training(x, y)), Inputs(("",) * len(x), embedding=x)).mean


def test_gain_and_score_are_one_with_one_penalty() -> None:
    x, y = made(60, 3)
    both = [predicted({"target": target, "alpha": 5.0}, x, y) for target in ("score", "gain")]
    np.testing.assert_allclose(*both, atol=1e-5)
    free = [predicted({"target": target}, x, y) for target in ("score", "gain")]
    assert np.abs(free[0] - free[1]).max() > 1e-3, "the penalties of gains are others"


def test_gain_finds_a_small_difference_under_a_large_difficulty() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=(120, 40)).astype(np.float32)
    hard = 3 * x @ rng.normal(size=40)
    difference = x @ rng.normal(size=40) * 0.05
    y = np.stack([hard + difference, hard - difference], axis=1) + 0.5 * rng.normal(size=(120, 2))
    fresh = rng.normal(size=(400, 40)).astype(np.float32)
    errors = {}
    for target in ("score", "gain"):
        router = RidgeRouter({"target": target})
        told = router.predict(router.learn(training(x, y)), Inputs(("",) * 400, embedding=fresh)).mean
        errors[target] = float(np.std(told[:, 0] - told[:, 1]))
    assert errors["gain"] < errors["score"], "a noisy difference is shrunk, whatever the queries' difficulty"


def test_gain_allows_for_hard_queries() -> None:
    # Two like experts, the first of them asked the hard half only: its mean is 2 lower than the other's.
    x, hard = made(200, 1)[0], np.arange(200) < 100
    y = np.stack([np.where(hard, 0.0, 4.0)] * 2, axis=1)
    y[~hard, 0] = np.nan
    told = [predicted({"target": target, "alpha": 1e9}, x, y)[0] for target in ("score", "gain")]
    np.testing.assert_allclose(told[0], [0, 2], atol=1e-4)
    np.testing.assert_allclose(told[1], [1.5, 2], atol=1e-4)


def test_options_decide_whether_experts_are_independent() -> None:
    assert RidgeRouter().independent
    assert not RidgeRouter({"target": "gain"}).independent
    for options in ({"target": "best"}, {"alpha": 0}, {"alpha": -1}, {"penalty": 1}):
        with pytest.raises(MixmergeError, match="router ridge"):
            RidgeRouter(options)


@pytest.mark.parametrize(
    "options", [{"target": "gain"}, {"target": "gain", "alpha": 1.0}, {"alpha": 3.0}], ids=str
)
def test_contract_with_options(options: dict[str, Any]) -> None:
    check_router(lambda: RidgeRouter(options))


@pytest.mark.parametrize("kind", [RidgeRouter, LogisticRouter])
def test_an_expert_without_scores_is_refused(kind: type[RidgeRouter] | type[LogisticRouter]) -> None:
    table = sample(20)
    table.score[:, 2] = np.nan
    with pytest.raises(MixmergeError, match="no query has a score of verse"):
        kind().fit(table)


@pytest.mark.parametrize("kind", [RidgeRouter, LogisticRouter])
def test_an_added_expert_is_as_if_it_had_been_there(kind: type[RidgeRouter] | type[LogisticRouter]) -> None:
    table, held = sample(missing=0.0), queries_of(sample(30, seed=1))
    whole = kind().fit(table).score(held)
    added = kind().fit(table.only(table.experts[:2])).add_expert(table.only(table.experts[2:])).score(held)
    assert added.experts == whole.experts
    np.testing.assert_allclose(added.mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(added.std, whole.std, atol=1e-4)


def test_an_explanation_names_the_expert_that_moves_most() -> None:
    table = sample(missing=0.0)
    router = RidgeRouter().fit(table)
    moves = router.reasons([table.queries[0]], top=2)[0]["moves"]
    assert len(moves) == 2
    assert abs(moves[0]["here"] - moves[0]["mean"]) >= abs(moves[1]["here"] - moves[1]["mean"])
    means = dict(zip(table.experts, table.score.mean(axis=0), strict=True))
    assert moves[0]["mean"] == pytest.approx(means[moves[0]["expert"]], abs=1e-3)


def test_products_in_float32_are_near_those_in_float64() -> None:
    x, y = made(200, 5, size=30)
    router = RidgeRouter()
    state: State = router.learn(training(x, y))
    frame = Frame.of(x)
    wanted = values(ridge(x, y, frame), frame, x)
    given = evaluate(state.arrays, x)
    np.testing.assert_allclose(given[0], wanted[0], atol=2e-5)
    np.testing.assert_allclose(given[1], wanted[1], rtol=1e-4)


SCORE_WITHOUT_TORCH = """
import sys
from mixmerge.routers.base import Router
from mixmerge.routers.contract import sample
router = Router.load(sys.argv[1])
assert router.score(["add two numbers"]).mean.shape == (1, 4)
print(*[name for name in ("torch", "transformers", "sklearn", "scipy") if name in sys.modules])
"""


@pytest.mark.parametrize("kind", ["RidgeRouter", "LogisticRouter"])
def test_scoring_loads_no_torch(tmp_path: Path, kind: str) -> None:
    {"RidgeRouter": RidgeRouter, "LogisticRouter": LogisticRouter}[kind]().fit(sample()).save(tmp_path / "r")
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCORE_WITHOUT_TORCH, str(tmp_path / "r")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


# --- logistic


def soft(rows: int = 80, *, seed: int = 0) -> tuple[Any, Any]:
    """A design with ones last, and labels in 0..1, some of them fractions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    chance = sigmoid(x @ [1.0, -2.0, 0.5, 0.0] + 0.3)
    label = rng.binomial(4, chance) / 4.0
    return np.column_stack([x, np.ones(rows)]), label


def test_logistic_is_that_of_scikit_learn_on_weighted_duplicates() -> None:
    from sklearn.linear_model import LogisticRegression

    design, label = soft()
    x, rows = design[:, :-1], len(label)
    for alpha in (0.5, 20.0):
        # every row twice, as a win and as a loss, and one observation of each half at the origin for the prior
        doubled = np.concatenate([x, x, np.zeros((2, 4))])
        weights = np.concatenate([label, 1 - label, [0.5, 0.5]])
        target = np.concatenate([np.ones(rows), np.zeros(rows), [1, 0]])
        theirs = LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=10_000).fit(doubled, target, weights)
        ours = logistic(design, label, alpha=alpha).weights
        np.testing.assert_allclose(ours[:-1], theirs.coef_[0], atol=1e-5)
        np.testing.assert_allclose(ours[-1], theirs.intercept_[0], atol=1e-5)


def test_logistic_of_one_number_by_hand() -> None:
    # No slope to learn: the intercept is the log-odds of (wins + 1/2) / (rows + 1).
    fitted = logistic(np.column_stack([np.zeros(3), np.ones(3)]), np.array([1.0, 1.0, 0.0]), alpha=1.0)
    np.testing.assert_allclose(fitted.weights, [0.0, np.log(2.5 / 1.5)], atol=1e-9)
    alike = logistic(np.column_stack([np.zeros(9), np.ones(9)]), np.ones(9), alpha=1.0)
    np.testing.assert_allclose(sigmoid(alike.weights[1]), 0.95, atol=1e-9)


def test_log_odds_left_out_are_near_brute_force() -> None:
    design, label = soft(60)
    fitted = logistic(design, label, alpha=2.0)
    given = left_out(design, label, fitted)
    wanted = [
        design[i] @ logistic(np.delete(design, i, axis=0), np.delete(label, i), alpha=2.0).weights
        for i in range(60)
    ]
    np.testing.assert_allclose(given, wanted, atol=0.03)
    assert np.abs(given - design @ fitted.weights).max() > 0.2, "leaving out matters here"


def test_noise_gets_a_strong_penalty_and_signal_a_weak_one() -> None:
    design, label = soft(300)
    noise = np.random.default_rng(8).random(300)
    assert choose(design, noise, alpha=None)[0] >= 100 > choose(design, label, alpha=None)[0]


def test_recalibration() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(size=4000) * 2
    label = (rng.random(4000) < sigmoid(2 * odds - 1)).astype(np.float64)
    slope, shift = recalibrate(odds, label)
    assert slope == pytest.approx(2, abs=0.15)
    assert shift == pytest.approx(-1, abs=0.15)
    assert recalibrate(odds[:50], np.r_[np.ones(4), np.zeros(46)]) == (1.0, 0.0), "too few wins"
    flat, level = recalibrate(odds, 1 - label)
    assert flat == 0, "odds that point the wrong way are not turned round"
    assert sigmoid(level) == pytest.approx(1 - label.mean())


def test_chances_are_calibrated() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(3000, 12)).astype(np.float32)
    chance = sigmoid(x @ rng.normal(size=12) * 0.8)[:, None]
    score = (rng.random((3000, 1)) < chance).astype(np.float64)
    router = LogisticRouter()
    state = router.learn(training(x[:1000], score[:1000]))
    told = router.predict(state, Inputs(("",) * 2000, embedding=x[1000:]))
    bins = np.digitize(told.mean[:, 0], np.quantile(told.mean[:, 0], [0.2, 0.4, 0.6, 0.8]))
    for b in range(5):
        inside = bins == b
        assert told.mean[inside].mean() == pytest.approx(chance[1000:][inside].mean(), abs=0.05)
    away = np.abs(told.mean - chance[1000:]) / told.std
    assert 0.4 < np.median(away) < 1.1, "two thirds lie within one standard deviation"


def test_laplace_is_near_its_full_covariance() -> None:
    x, _ = made(200, 1)
    label = (np.random.default_rng(1).random((200, 1)) < sigmoid(x[:, :1].astype(np.float64))).astype(float)
    router = LogisticRouter({"alpha": 1.0})
    told = router.predict(router.learn(training(x, label)), Inputs(("",) * 200, embedding=x))
    design = np.column_stack([x - x.mean(0), np.ones(200)]).astype(np.float64)
    fitted = logistic(design, label[:, 0], alpha=1.0)
    slope, _ = recalibrate(left_out(design, label[:, 0], fitted), label[:, 0])
    wide = np.einsum("nd,dk,nk->n", design, np.linalg.inv(fitted.hessian), design) * slope**2
    exact = told.mean[:, 0] * (1 - told.mean[:, 0]) * np.sqrt(wide)
    np.testing.assert_allclose(told.std[:, 0], exact, rtol=0.15)


def test_one_class_only() -> None:
    x, _ = made(30, 2)
    score = np.stack([np.ones(30), np.zeros(30)], axis=1)
    router = LogisticRouter()
    told = router.predict(router.learn(training(x, score)), Inputs(("",) * 30, embedding=x))
    np.testing.assert_allclose(told.mean[:, 0], 30.5 / 31, atol=0.01)
    np.testing.assert_allclose(told.mean[:, 1], 0.5 / 31, atol=0.01)
    assert (told.std > 0).all()


def test_logistic_refuses_scores_that_are_no_chances() -> None:
    x, y = made(20, 3)
    y[:, [0, 2]] = 0.5
    with pytest.raises(MixmergeError, match=r"scores of e1 are not between 0 and 1.*ridge"):
        LogisticRouter().learn(training(x, y))
