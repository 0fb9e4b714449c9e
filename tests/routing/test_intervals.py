"""Intervals: against closed forms, coverage, and what must change nothing."""

from __future__ import annotations

import numpy as np
import pytest

from mixmerge.evaluate.intervals import (
    bootstrap,
    bootstrap_means,
    compare,
    estimate,
    groups_of,
    mean_over_repeats,
    paired_bootstrap,
    resampled,
)


def texts(number: int) -> list[str]:
    return [f"query {i}" for i in range(number)]


def test_groups_are_texts() -> None:
    groups = groups_of(["b", "a", "b", " B ", "c"])
    assert groups[0] == groups[2] == groups[3]
    assert len(set(groups.tolist())) == 3
    assert groups.max() == 2


def test_draws_are_as_many_as_there_are_groups() -> None:
    drawn = np.concatenate(list(resampled(np.array([0, 1, 2, 2, 1]), resamples=500, seed=0)))
    assert drawn.shape == (500, 3)
    assert (drawn.sum(axis=1) == 3).all()
    assert drawn.mean(axis=0) == pytest.approx([1, 1, 1], abs=0.15)


def test_the_spread_of_means_is_the_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=(400, 1))
    means = bootstrap_means(values, groups_of(texts(400)), resamples=4000, seed=1)
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.05)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng, inside = np.random.default_rng(0), 0
    for trial in range(300):
        values = (rng.random((60, 1)) < 0.6).astype(float)
        means = bootstrap_means(values, np.arange(60), resamples=300, seed=trial)[:, 0]
        found = estimate(values.mean(), means, level=0.9)
        inside += found.low <= 0.6 <= found.high
    assert 0.85 <= inside / 300 <= 0.95


def test_copies_of_a_query_tell_nothing_new() -> None:
    values = np.random.default_rng(0).normal(size=50)
    once = paired_bootstrap(values, np.zeros(50), texts(50), seed=2)
    twice = paired_bootstrap(np.tile(values, 2), np.zeros(100), texts(50) * 2, seed=2)
    assert twice.difference.low == pytest.approx(once.difference.low)
    assert twice.difference.high == pytest.approx(once.difference.high)
    assert twice.p == once.p


def test_the_order_of_queries_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    first, second, order = rng.normal(size=80), rng.normal(size=80), rng.permutation(80)
    names = texts(80)
    one = paired_bootstrap(first, second, names, seed=5)
    other = paired_bootstrap(first[order], second[order], [names[i] for i in order], seed=5)
    assert other.difference.low == pytest.approx(one.difference.low, abs=1e-12)
    assert other.p == one.p
    assert paired_bootstrap(first, second, names, seed=6).difference.low != one.difference.low


def test_pairs_beat_what_is_not_paired() -> None:
    """A small gain on every query is sure, however much the queries differ."""
    rng = np.random.default_rng(0)
    level = rng.normal(size=200) * 10
    found = paired_bootstrap(level + 0.1 + 0.05 * rng.normal(size=200), level, texts(200))
    assert found.difference.value == pytest.approx(0.1, abs=0.02)
    assert found.difference.low > 0
    assert found.p == pytest.approx(2 / 2001)


def test_no_difference_is_p_of_one() -> None:
    same = np.random.default_rng(0).random(30)
    found = paired_bootstrap(same, same, texts(30))
    assert (found.difference.value, found.difference.low, found.difference.high, found.p) == (0, 0, 0, 1)


def test_p_is_small_as_often_as_it_should_be() -> None:
    rng = np.random.default_rng(0)
    found = [
        paired_bootstrap(rng.normal(size=50), rng.normal(size=50), texts(50), resamples=200).p
        for _ in range(200)
    ]
    assert 0.01 <= np.mean(np.array(found) < 0.05) <= 0.11


def test_missing_values_are_left_out() -> None:
    first, second = np.array([1.0, np.nan, 3.0, 4.0]), np.array([0.0, 5.0, np.nan, 1.0])
    assert paired_bootstrap(first, second, texts(4)).difference.value == 2.0
    nothing = paired_bootstrap(first * np.nan, second, texts(4))
    assert np.isnan(nothing.difference.value)
    assert np.isnan(nothing.p)


def test_any_statistic_sees_the_same_draws() -> None:
    values = np.random.default_rng(0).random((40, 2))
    groups = groups_of([f"{i // 2}" for i in range(40)])
    means = bootstrap_means(values, groups, resamples=150, seed=9)
    slow = bootstrap(lambda times: times @ values / times.sum(), groups, resamples=150, seed=9)
    np.testing.assert_allclose(means, slow, atol=1e-12)


def test_compare_by_hand() -> None:
    found = compare(1.0, np.array([-1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]))
    assert found.p == pytest.approx(2 * 2 / 10)


def test_mean_over_repeats_is_students_interval() -> None:
    found = mean_over_repeats([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert np.isnan(mean_over_repeats([1.0]).low)
