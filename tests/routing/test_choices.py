"""What choices are worth, and whether expected scores come true: by hand."""

from __future__ import annotations

import numpy as np
import pytest

from mixmerge.evaluate.baselines import best_single, random_choices
from mixmerge.evaluate.calibration import calibration, reliability
from mixmerge.evaluate.choices import (
    argmax_choice,
    best_choice,
    cheapest_choice,
    degeneracy,
    entropy,
    group_choice,
    of_choice,
    optimality,
    regret,
    row_means,
    shares,
    stays,
)

NAN = np.nan
EXPERTS = ("b", "a", "c")
SCORE = np.array([[1, 0, 0.5], [1, 1, 0], [0, 0, 0], [NAN, 1, NAN], [NAN, NAN, NAN]], np.float64)
COST = np.array([[3, 1, 2], [3, 1, 2], [3, 1, 2], [3, 1, 2], [3, 1, 2]], np.float64)


def test_values_of_choices() -> None:
    assert of_choice(SCORE, np.array([2, 0, -1, 1, 0])).tolist()[:2] == [0.5, 1.0]
    np.testing.assert_equal(of_choice(SCORE, np.array([2, 0, -1, 1, 0])), [0.5, 1.0, NAN, 1.0, NAN])


def test_ties_go_to_the_cheaper_then_to_the_first_name() -> None:
    assert best_choice(SCORE, COST, EXPERTS).tolist() == [0, 1, 1, 1, -1]
    assert best_choice(SCORE, None, EXPERTS).tolist() == [0, 1, 1, 1, -1]
    assert best_choice(SCORE, np.ones((5, 3)), EXPERTS).tolist() == [0, 1, 1, 1, -1]
    dear = COST.copy()
    dear[:, 1] = NAN  # a cost that is not known counts as the highest
    assert best_choice(SCORE, dear, EXPERTS).tolist() == [0, 0, 2, 1, -1]
    assert argmax_choice(np.array([[0.5, 0.5, 0.5]]), None, EXPERTS).tolist() == [1]


def test_constants_and_oracles_of_groups() -> None:
    assert cheapest_choice(COST, EXPERTS).tolist() == [1] * 5
    assert cheapest_choice(np.full((2, 3), NAN), EXPERTS).tolist() == [-1, -1]
    assert group_choice(SCORE, COST, EXPERTS, ["x", "y", "x", "y", "z"]).tolist() == [0, 1, 0, 1, -1]
    assert best_single(np.array([0.5, 0.7, 0.7]), np.array([1.0, 3.0, 2.0]), EXPERTS) == 2
    assert best_single(np.array([0.5, 0.7, NAN]), None, EXPERTS) == 1


def test_regret_and_chance() -> None:
    np.testing.assert_allclose(regret(SCORE, np.array([0.5, 1.0, 0.0, NAN, NAN])), [0.5, 0, 0, NAN, NAN])
    np.testing.assert_allclose(row_means(SCORE), [0.5, 2 / 3, 0, 1, NAN])


def test_shares_and_entropy() -> None:
    share = shares(np.array([0, 0, 1, -1]), 3)
    assert share.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert entropy(share) == pytest.approx((np.log(3) - 2 / 3 * np.log(2)) / np.log(3))
    assert entropy(np.array([1.0, 0.0])) == 0.0
    assert entropy(np.array([0.25] * 4)) == pytest.approx(1)
    assert entropy(np.array([1.0])) == 0.0
    assert shares(np.array([-1, -1]), 2).tolist() == [0, 0]


def test_optimality_by_hand() -> None:
    # Query 0: right at 3 dollars, the only one. Query 1: right at 3, where 1 would do. Query 2: nobody is right.
    found = optimality(SCORE, COST, np.array([0, 0, 0, 1, 1]))
    assert found.selection == pytest.approx(2 / 3)
    assert found.cost_ratio == pytest.approx((3 + 1 + 1) / (3 + 3 + 1))
    assert found.score_ratio == pytest.approx(1.0)
    wrong = optimality(SCORE, COST, np.array([2, 2, 2, 1, 1]))
    assert wrong.selection == pytest.approx(1 / 3)
    assert wrong.score_ratio == pytest.approx((0.5 + 0 + 1) / 3)
    assert np.isnan(optimality(SCORE, None, np.array([0, 0, 0, 1, 1])).cost_ratio)
    assert optimality(SCORE, None, np.array([0, 0, 0, 1, 1])).selection == 1.0
    assert np.isnan(optimality(SCORE, COST, np.full(5, -1)).selection)


def test_robustness() -> None:
    assert stays(np.array([0, 1, 2, 0]), np.array([0, 1, 1, 0])) == 0.75


def outcomes(rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    chance = np.where(rng.random((rows, 1)) < 0.5, [[0.8, 0.3]], [[0.3, 0.8]])
    return chance, (rng.random((rows, 2)) < chance).astype(np.float64)


def test_a_router_that_routes_gets_no_warning() -> None:
    chance, score = outcomes()
    found = degeneracy(chance, np.full(chance.shape, 0.1), score, chance.argmax(axis=1))
    assert found.warnings() == []
    assert found.within_std == 0.0
    assert found.moves > 0.5


def test_an_almost_constant_choice_is_named() -> None:
    chance, score = outcomes()
    choice = np.zeros(400, np.int64)
    choice[:4] = 1
    warnings = degeneracy(chance, np.full(chance.shape, 0.1), score, choice).warnings()
    assert len(warnings) == 1
    assert "99.0%" in warnings[0]


def test_choices_at_the_level_of_noise_are_named() -> None:
    """As RouteLLM's mf in LLMRouterBench's run: all win rates 0.50, standard deviation 0.0014."""
    _, score = outcomes()
    noise = 0.5 + 0.0014 * np.random.default_rng(1).normal(size=(400, 2))
    sure = degeneracy(noise, np.zeros(noise.shape), score, noise.argmax(axis=1)).warnings()
    assert len(sure) == 1
    assert "hardly depend on the query" in sure[0]
    unsure = degeneracy(noise, np.full(noise.shape, 0.05), score, noise.argmax(axis=1)).warnings()
    assert len(unsure) == 2
    assert "below their own standard deviation" in unsure[0]


def test_calibration_by_hand() -> None:
    predicted = np.array([0.1, 0.1, 0.4, 0.4, 0.9, NAN])
    actual = np.array([0.0, 0.0, 1.0, 0.0, 0.6, 1.0])
    found = reliability(predicted, actual, bins=3)
    assert found.count.tolist() == [2, 2, 1]
    assert found.predicted.tolist() == pytest.approx([0.1, 0.4, 0.9])
    assert found.actual.tolist() == pytest.approx([0.0, 0.5, 0.6])
    assert found.error() == pytest.approx((2 * 0.1 + 2 * 0.1 + 0.3) / 5)
    assert np.isnan(reliability(predicted * NAN, actual).error())
    assert reliability(np.full(4, 0.5), np.array([0, 1, 0, 1.0])).count.tolist() == [4]


def test_bins_hold_equal_masses() -> None:
    predicted = np.random.default_rng(0).random(1000) ** 3
    found = reliability(predicted, predicted)
    assert found.count.tolist() == [100] * 10
    assert found.error() == pytest.approx(0)


def test_calibration_of_experts() -> None:
    found = calibration(np.full((5, 3), 0.5), SCORE, EXPERTS)
    assert found.experts["b"].error() == pytest.approx(abs(2 / 3 - 0.5))
    assert found.pooled.count.sum() == 10
    silent = calibration(np.full((1, 2), 0.5), np.array([[1.0, NAN]]), ("a", "b"))
    assert list(silent.experts) == ["a"]


def test_random_choices_are_keyed_by_text_and_name() -> None:
    names, texts = ("x", "y", "z"), [f"text {i}" for i in range(3000)]
    drawn = random_choices(texts, names, draws=4, seed=1)
    assert np.bincount(drawn.ravel(), minlength=3) / drawn.size == pytest.approx([1 / 3] * 3, abs=0.02)
    assert (drawn[0] == drawn[1]).mean() == pytest.approx(1 / 3, abs=0.04)
    order = np.random.default_rng(0).permutation(3000)
    np.testing.assert_array_equal(
        random_choices([texts[i] for i in order], names, draws=4, seed=1), drawn[:, order]
    )
    turned = random_choices(texts, names[::-1], draws=4, seed=1)
    np.testing.assert_array_equal(2 - turned, drawn)
    assert (random_choices(texts, names, draws=4, seed=2) != drawn).mean() > 0.5
