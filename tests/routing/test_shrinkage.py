"""Shrunk means and lines, against numbers worked out by hand and against data made with known spreads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.routers.draws import mix, some, uniform
from mixmerge.routers.shrinkage import STRONGEST, WEAKEST, Line, group_sums, moments, shrink, strength

NAN = float("nan")


def test_moments_by_hand() -> None:
    mean, variance, count = moments(np.array([[1.0, 2.0], [3.0, NAN], [NAN, 2.0]]))
    assert mean.tolist() == [2.0, 2.0]
    assert count.tolist() == [2.0, 2.0]
    assert variance.tolist() == [2.0, 2.0]  # the second's are all alike: it has the first's


def test_shrink_by_hand() -> None:
    mean, std = shrink(
        np.array([3.0, 0.0]), np.array([4.0, 0.0]), np.array([0.5, 0.5]), 2.0, np.array([0.24])
    )
    assert mean.tolist() == pytest.approx([4 / 6, 0.5])
    assert std.tolist() == pytest.approx([0.2, 0.12**0.5])
    _, unsure = shrink(
        np.array([3.0]), np.array([4.0]), np.array([0.5]), 2.0, np.array([0.24]), seen=np.array([10])
    )
    assert unsure[0] ** 2 == pytest.approx(0.04 + (2 / 6) ** 2 * 0.024)


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20),
    st.floats(0, 1),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1),
)
def test_a_shrunk_mean_lies_between(scores: list[float], prior: float, worth: float, variance: float) -> None:
    total, count = np.array([sum(scores)]), np.array([float(len(scores))])
    mean, std = shrink(total, count, np.array([prior]), np.array([worth]), np.array([variance]))
    low, high = sorted((prior, sum(scores) / len(scores)))
    assert low - 1e-9 <= mean[0] <= high + 1e-9
    assert 0 < std[0] <= (variance / worth) ** 0.5 + 1e-12


def test_strength_finds_the_worth_data_were_made_with() -> None:
    rng = np.random.default_rng(0)
    between, within, each = 0.5, 2.0, 30
    centers = rng.normal(0, between**0.5, (3000, 1))
    score = centers + rng.normal(0, within**0.5, (3000, each))
    group_mean, group_count = score.mean(axis=1, keepdims=True), np.full((3000, 1), float(each))
    worth = strength(group_mean, group_count, np.array([score.mean()]), np.array([within]))
    assert worth[0] == pytest.approx(within / between, rel=0.1)


def test_strength_without_and_with_all_the_difference_between_groups() -> None:
    count, mean, variance = np.full((2, 1), 1000.0), np.array([0.5]), np.array([0.25])
    assert strength(np.array([[0.5], [0.5]]), count, mean, variance)[0] == STRONGEST
    assert strength(np.array([[-9.0], [10.0]]), count, mean, variance)[0] == WEAKEST
    assert strength(np.array([[0.5]]), count[:1], mean, variance)[0] == STRONGEST


def test_group_sums_by_hand() -> None:
    score = np.array([[1.0, NAN], [0.5, 2.0], [NAN, 4.0], [2.0, 1.0]])
    total, count = group_sums(score, np.array([0, 1, 0, 0]), 3)
    assert total.tolist() == [[3.0, 5.0], [0.5, 2.0], [0.0, 0.0]]
    assert count.tolist() == [[2.0, 2.0], [1.0, 1.0], [0.0, 0.0]]


def test_a_line_by_hand() -> None:
    number = np.array([[0.0], [1.0], [2.0], [3.0]])
    score = np.array([[0.0, 1.0], [1.0, 1.0], [1.0, NAN], [2.0, 1.0]])
    line = Line.fit(number, score)
    # The first: least squares has slope 0.6, squares left 0.2 over 2 degrees, so F = 0.36 * 5 / 0.1 = 18.
    assert line.slope.tolist() == pytest.approx([0.6 * 18 / 19, 0.0])
    assert line.mean.tolist() == [1.0, 1.0]
    mean, std = line.at(np.array([[1.5], [2.5]]))
    assert mean[:, 0].tolist() == pytest.approx([1.0, 1.0 + 0.6 * 18 / 19])
    # 0.1 is the variance about the plain line; 4 scores, and a squared distance of 1 to a spread of 5.
    assert std[:, 0].tolist() == pytest.approx([(0.1 / 4) ** 0.5, (0.1 * (1 / 4 + 1 / 5)) ** 0.5])
    assert std[1, 1] == std[0, 1]


def test_noise_has_next_to_no_slope_and_a_sure_one_stays() -> None:
    rng = np.random.default_rng(1)
    number = rng.normal(size=(400, 1))
    noise = rng.normal(size=(400, 1))
    least = float(np.polyfit(number[:, 0], noise[:, 0], 1)[0])
    assert abs(Line.fit(number, noise).slope[0]) < abs(least)
    assert np.sign(Line.fit(number, noise).slope[0]) == np.sign(least)
    assert Line.fit(number, 3 * number + 0.01 * noise).slope[0] == pytest.approx(3, abs=1e-3)


def test_a_line_of_one_query_or_one_number_is_flat() -> None:
    for number, score in (([[1.0]], [[0.5]]), ([[2.0], [2.0], [2.0]], [[0.0], [1.0], [0.5]])):
        mean, std = Line.fit(np.array(number), np.array(score)).at(np.array([[-100.0], [100.0]]))
        assert mean.tolist() == [[0.5], [0.5]]
        assert np.isfinite(std).all()


# --- draws


def test_draws_are_even_and_keyed() -> None:
    rows, columns = np.arange(4000, dtype=np.uint64), np.array([7, 8], np.uint64)
    drawn = uniform(rows, columns, seed=3)
    assert ((drawn >= 0) & (drawn < 1)).all()
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert abs(counts - 800).max() < 5 * 800**0.5
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.06
    assert np.array_equal(uniform(rows[::-1], columns[::-1], seed=3), drawn[::-1, ::-1])
    assert not np.array_equal(uniform(rows, columns, seed=4), drawn)
    assert uniform(rows, columns, seed=-1).shape == (4000, 2)


def test_mix_is_splitmix64() -> None:
    # The first outputs of SplitMix64 from the state 0, as published with xoshiro256**.
    assert mix(np.array([0], np.uint64)).tolist() == [0xE220A8397B1DCDAF]


def test_some_keeps_keys_and_not_places() -> None:
    keys = np.arange(50, dtype=np.uint64) * 1_000_003
    chosen = some(keys, at_most=10, seed=0)
    assert len(chosen) == 10
    assert (np.diff(chosen) > 0).all()
    other = some(keys[::-1].copy(), at_most=10, seed=0)
    assert set(keys[chosen].tolist()) == set(keys[::-1][other].tolist())
    assert some(keys, at_most=50, seed=0).tolist() == list(range(50))
