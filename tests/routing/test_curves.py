"""Curves of two experts (RouteLLM) and of cost (RouterBench), against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.evaluate.costs import Hull, aiq, common_range, hull, settings
from mixmerge.evaluate.curves import exact_share_curve, resampled_apgr, share_curve
from mixmerge.evaluate.intervals import bootstrap

PREFERENCE = np.array([0.1, 0.2, 0.3, 0.4])
WEAK = np.array([1.0, 0.0, 0.0, 0.0])
STRONG = np.array([1.0, 1.0, 0.0, 1.0])


def test_points_at_quantiles() -> None:
    curve = share_curve(PREFERENCE, WEAK, STRONG, bins=2)  # thresholds 0.1, 0.25, 0.4
    assert curve.share.tolist() == [0.0, 0.5, 1.0]
    assert curve.score.tolist() == [0.25, 0.5, 0.75]
    assert (curve.weak, curve.strong) == (0.25, 0.75)
    assert curve.recovered().tolist() == [0.0, 0.5, 1.0]
    assert curve.apgr() == 0.5
    assert [curve.calls(part) for part in (0.2, 0.5, 0.8)] == pytest.approx([0.2, 0.5, 0.8])


def test_every_threshold() -> None:
    curve = exact_share_curve(PREFERENCE, WEAK, STRONG)
    assert curve.share.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert curve.recovered().tolist() == [0.0, 0.5, 0.5, 1.0, 1.0]
    assert curve.apgr() == pytest.approx(0.625)
    assert [curve.calls(part) for part in (0.2, 0.5, 0.8)] == pytest.approx([0.1, 0.25, 0.65])


def test_equal_preferences_go_together() -> None:
    curve = exact_share_curve(np.array([0.0, 1.0, 1.0, 1.0]), WEAK, STRONG)
    assert curve.share.tolist() == [0.0, 0.75, 1.0]
    for drawn in (share_curve, exact_share_curve):
        flat = drawn(np.zeros(4), WEAK, STRONG)
        assert flat.share.tolist() == [0.0, 1.0]
        assert flat.apgr() == 0.5


def test_calls_where_the_curve_falls() -> None:
    """The first crossing counts, not the one that interpolation over unsorted scores happens to find."""
    weak, strong = np.zeros(4), np.array([-1.0, 1.0, 1.0, 1.0])
    weak[1] = 1.0
    curve = exact_share_curve(np.array([1.0, 2.0, 3.0, 4.0]), weak, strong)
    assert curve.recovered().tolist() == pytest.approx([0.0, 1.0, 2.0, 2.0, 1.0])
    assert curve.calls(0.8) == pytest.approx(0.2)
    twice = exact_share_curve(np.arange(4.0), np.array([0, 0, 1.0, 0]), np.array([0, 1.0, 0, 1.0]))
    assert twice.recovered().tolist() == [0.0, 1.0, 0.0, 1.0, 1.0]
    assert twice.calls(0.5) == pytest.approx(0.125)


def test_experts_that_are_equal_or_the_wrong_way_round() -> None:
    equal = share_curve(PREFERENCE, WEAK, WEAK)
    assert np.isnan(equal.apgr())
    assert np.isnan(equal.calls(0.5))
    assert np.isnan(share_curve(PREFERENCE, STRONG, WEAK).calls(0.5))


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    number = draw(st.integers(3, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([2, 5, 1000]))  # few values make many ties
    preference = rng.integers(0, spread, number).astype(np.float64)
    weak, strong = rng.integers(0, 2, (2, number)).astype(np.float64)
    strong[0], weak[0] = 1.0, 0.0
    return preference, weak, strong, draw(st.integers(1, 12))


@given(cases())
def test_points_are_those_of_the_definition(case: tuple[np.ndarray, np.ndarray, np.ndarray, int]) -> None:
    preference, weak, strong, bins = case
    curve = share_curve(preference, weak, strong, bins=bins)
    # Rounded: numpy's quantile of equal numbers can be a hair beside them, and a threshold of its own.
    thresholds = np.unique(np.quantile(preference, np.linspace(0, 1, bins + 1)).round(9))
    wanted = {}
    for i, threshold in enumerate(thresholds):
        last = i == len(thresholds) - 1
        chosen = preference > threshold + 1e-9 if last else preference >= threshold - 1e-9
        wanted[round(float(chosen.mean()), 9)] = float(np.where(chosen, strong, weak).mean())
    wanted[1.0] = float(strong.mean())
    assert dict(zip(curve.share.round(9).tolist(), curve.score, strict=True)) == pytest.approx(wanted)


@given(cases(), st.integers(0, 2**32))
def test_drawing_a_query_twice_is_having_it_twice(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int], seed: int
) -> None:
    preference, weak, strong, bins = case
    drawn = np.random.default_rng(seed).integers(0, 4, len(weak)).astype(np.float64)
    drawn[0] += 1
    times = drawn.astype(np.int64)
    for made in (
        lambda *a, **k: share_curve(*a, bins=bins, **k),
        exact_share_curve,
    ):
        counted = made(preference, weak, strong, drawn=drawn)
        repeated = made(*(np.repeat(part, times) for part in (preference, weak, strong)))
        np.testing.assert_allclose(counted.share, repeated.share, atol=1e-12)
        np.testing.assert_allclose(counted.score, repeated.score, atol=1e-12)


@given(cases(), st.integers(0, 2**32))
def test_the_order_of_queries_and_the_scale_change_nothing(
    case: tuple[np.ndarray, np.ndarray, np.ndarray, int], seed: int
) -> None:
    preference, weak, strong, bins = case
    order = np.random.default_rng(seed).permutation(len(weak))
    one = exact_share_curve(preference, weak, strong)
    other = exact_share_curve(np.exp(preference[order] / 1000), weak[order], strong[order])
    assert one.apgr() == pytest.approx(other.apgr(), nan_ok=True)
    again = share_curve(preference[order], weak[order], strong[order], bins=bins)
    assert share_curve(preference, weak, strong, bins=bins).apgr() == pytest.approx(again.apgr(), nan_ok=True)


def test_chance_recovers_half_and_the_oracle_more_than_all() -> None:
    rng = np.random.default_rng(0)
    weak, strong = (rng.random(2000) < 0.6).astype(float), (rng.random(2000) < 0.8).astype(float)
    by_chance = [share_curve(rng.random(2000), weak, strong).apgr() for _ in range(30)]
    assert np.mean(by_chance) == pytest.approx(0.5, abs=0.02)
    best = exact_share_curve(strong - weak, weak, strong)
    assert best.apgr() > 1
    assert all(best.apgr() >= exact_share_curve(rng.random(2000), weak, strong).apgr() for _ in range(5))


def test_resampled_apgr_is_the_statistic_of_each_resample() -> None:
    rng = np.random.default_rng(1)
    preference, weak, strong = rng.random((80, 2)), *(rng.random((2, 80)) < [[0.4], [0.8]]).astype(float)
    groups = np.arange(80)
    drawn = resampled_apgr(preference, weak, strong, groups, resamples=100, seed=3)
    assert drawn.shape == (100, 2)

    def slow(times: np.ndarray) -> np.ndarray:
        rows = np.repeat(np.arange(80), times.astype(int))
        return np.array([share_curve(preference[rows, r], weak[rows], strong[rows]).apgr() for r in (0, 1)])

    np.testing.assert_allclose(drawn, bootstrap(slow, groups, resamples=100, seed=3), atol=1e-12)


# --- cost


def test_hull_by_hand() -> None:
    points = np.array([(3, 0.5), (1, 0.2), (4, 0.8), (2.5, 0.6), (2, 0.6), (6, 0.7)])
    found = hull(points[:, 0], points[:, 1])
    assert found.cost.tolist() == [1, 2, 4]
    assert found.score.tolist() == [0.2, 0.6, 0.8]
    assert found.at(3) == pytest.approx(0.7)
    assert found.at(9) == 0.8
    assert np.isnan(found.at(0.5))
    assert found.least_cost(0.7) == pytest.approx(3)
    assert found.least_cost(0.1) == 1
    assert found.least_cost(0.81) is None


def test_aiq_is_the_mean_height_over_the_common_range() -> None:
    found = Hull(np.array([1.0, 2.0, 4.0]), np.array([0.2, 0.6, 0.8]))
    assert aiq(found, 1, 5) == pytest.approx((0.4 + 1.4 + 0.8) / 4)  # not / 5, as in RouterBench's code
    assert aiq(found, 2, 3) == pytest.approx(0.65)
    assert aiq(found, 4, 8) == pytest.approx(0.8)
    assert np.isnan(aiq(found, 4, 4))
    assert common_range([found, Hull(np.array([1.5, 3.0]), np.array([0.1, 0.9]))]) == (1.5, 4.0)


def test_hull_of_what_only_falls_and_of_one_point() -> None:
    assert hull(np.array([1.0, 2.0, 3.0]), np.array([0.5, 0.4, 0.5])).cost.tolist() == [1.0]
    same = hull(np.array([1.0, 1.0]), np.array([0.5, 0.7]))
    assert (same.cost.tolist(), same.score.tolist()) == ([1.0], [0.7])


_POINTS = st.lists(st.tuples(st.integers(0, 30), st.integers(-10, 10)), min_size=1, max_size=25)


@given(_POINTS, st.tuples(st.integers(0, 30), st.integers(-10, 10)))
def test_hull_is_the_least_concave_rising_cover(
    points: list[tuple[int, int]], extra: tuple[int, int]
) -> None:
    cost, score = np.array(points, np.float64).T
    found = hull(cost, score)
    assert (np.diff(found.cost) > 0).all()
    assert (np.diff(found.score) > 0).all()
    slopes = np.diff(found.score) / np.diff(found.cost)
    assert (np.diff(slopes) < 0).all()
    assert all(found.at(c) >= s - 1e-9 for c, s in points)
    assert set(zip(found.cost, found.score, strict=True)) <= {(float(c), float(s)) for c, s in points}
    value = aiq(found, 0, 31)
    assert score.min() - 1e-9 <= value <= score.max() + 1e-9
    more = hull(np.append(cost, extra[0]), np.append(score, extra[1]))
    low = max(found.cost[0], more.cost[0])
    assert aiq(more, low, 31) >= aiq(found, low, 31) - 1e-9


def test_settings_go_from_quality_to_cost() -> None:
    mean = np.array([[0.2, 0.8], [0.5, 0.6], [0.7, 0.7]])
    cost = np.array([[1.0, 3.0], [1.0, 3.0], [1.0, 3.0]])
    found = [choice.tolist() for choice in settings(mean, cost, ("cheap", "dear"), number=2)]
    # Query 0 leaves the cheap one below 0.3 a dollar, query 1 below 0.05; query 2 is a tie, and the cheaper wins.
    assert found == [[1, 1, 0], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert [c.tolist() for c in settings(mean, cost, ("cheap", "dear"), number=0)] == [[1, 1, 0], [0, 0, 0]]
    swapped = settings(mean[:, ::-1], cost[:, ::-1], ("dear", "cheap"), number=2)
    assert [[1 - e for e in choice] for choice in swapped] == found
