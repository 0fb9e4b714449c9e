"""Choosing experts from K shots, against enumeration and by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.errors import MixmergeError
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.routers.pool import (
    Pool,
    PoolWeights,
    Shot,
    error_overlap,
    rationale_likelihood,
    select_pool,
)

ONLY_ACCURACY = PoolWeights(likelihood=0, overlap=0, similarity=0)


def table(score: list[list[float]] | np.ndarray) -> OutcomeTable:
    """Shots x experts, the experts called a, b, ..."""
    values = np.array(score, np.float64)
    k = tuple(str(i) for i in range(len(values)))
    return OutcomeTable(k, tuple(f"shot {i}" for i in k), tuple("abcdefghij"[: values.shape[1]]), values)


def value(pool: tuple[int, ...], acc: np.ndarray, lik: np.ndarray, pair: np.ndarray) -> float:
    """The formula of the docstring, term by term."""
    pairs = list(itertools.combinations(pool, 2))
    shared = sum(pair[i, j] for i, j in pairs) / len(pairs) if pairs else 0.0
    return float(np.mean([acc[e] + 2 * lik[e] for e in pool]) - shared)


@settings(max_examples=60)
@given(st.data())
def test_exact_and_by_exchange_against_enumeration(data: st.DataObject) -> None:
    e, k = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    size = data.draw(st.integers(1, e))
    cells = st.lists(st.integers(0, 2).map(lambda v: v / 2), min_size=e, max_size=e)
    score = np.array(data.draw(st.lists(cells, min_size=k, max_size=k)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    likelihood, similar = -rng.random((k, e)), rng.random((e, e))
    similar += similar.T
    weights = PoolWeights(accuracy=1, likelihood=2, overlap=0.5, similarity=0.25)
    pair = 0.5 * error_overlap(score) + 0.25 * similar
    lik = np.exp(likelihood.mean(axis=0))
    best = max(value(pool, score.mean(axis=0), lik, pair) for pool in itertools.combinations(range(e), size))
    exact = select_pool(table(score), size, likelihood=likelihood, similarity=similar, weights=weights)
    near = select_pool(
        table(score), size, likelihood=likelihood, similarity=similar, weights=weights, exact_up_to=0
    )
    assert exact.exact
    assert exact.value == pytest.approx(best)
    assert not near.exact
    assert near.greedy == exact.greedy
    assert near.greedy - 1e-12 <= near.value <= best + 1e-12
    for pool in (exact, near):
        places = tuple("abcdef".index(name) for name in pool.kept)
        assert value(places, score.mean(axis=0), lik, pair) == pytest.approx(pool.value)
        assert len(set(pool.kept)) == size
        assert {one.expert for one in pool.standings if one.kept} == set(pool.kept)
    # no exchange of one expert is better than what was found without enumerating
    inside = {"abcdef".index(name) for name in near.kept}
    for out, new in itertools.product(inside, set(range(e)) - inside):
        other = tuple(inside - {out} | {new})
        assert value(other, score.mean(axis=0), lik, pair) <= near.value + 1e-9


def test_numbers_by_hand() -> None:
    # a and b make the same error, c another one
    found = select_pool(table([[1, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 1]]), 2)
    assert found.kept == ("a", "c")
    assert found.value == pytest.approx(0.75)
    assert [(one.expert, one.kept, one.accuracy, one.overlap) for one in found.standings] == [
        ("a", True, 0.75, 0.0),
        ("b", False, 0.75, 0.5),
        ("c", True, 0.75, 0.0),
    ]
    assert {one.likelihood for one in found.standings} == {None}
    assert {one.shots for one in found.standings} == {4}
    alone = select_pool(table([[1, 1, 0]]), 1)
    assert alone.kept == ("a",)  # the first name of equals
    assert alone.standings[0].overlap is None


def test_overlap_by_hand() -> None:
    score = np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 1.0], [0.0, np.nan, 1.0]])
    overlap = error_overlap(score)
    # a errs 1, 0, 1 and b 0.5, 0.5: on the shots of both min 0.5 + 0, max 1 + 0.5
    assert overlap[0, 1] == overlap[1, 0] == pytest.approx(0.5 / 1.5)
    assert overlap[0, 0] == 1
    assert overlap[2].tolist() == [0, 0, 0]
    assert math.isnan(error_overlap(np.array([[1.0, np.nan], [np.nan, 1.0]]))[0, 1])


def test_a_lucky_guesser_goes_by_its_likelihood() -> None:
    score, likelihood = [[1, 1], [1, 1]], np.log([[0.1, 0.5], [0.4, 0.5]])
    assert select_pool(table(score), 1).kept == ("a",)
    found = select_pool(table(score), 1, likelihood=likelihood)
    assert found.kept == ("b",)
    assert [one.likelihood for one in found.standings] == pytest.approx([0.2, 0.5])
    assert select_pool(table(score), 1, likelihood=likelihood, weights=ONLY_ACCURACY).kept == ("a",)


def test_twins_by_weight_are_not_both_kept() -> None:
    similar = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.1], [0.1, 0.1, 1.0]])
    found = select_pool(table([[1, 1, 0.9]]), 2, similarity=similar)
    assert found.kept == ("a", "c")
    assert found.standings[1].similarity == pytest.approx((0.9 + 0.1) / 2)
    assert select_pool(table([[1, 1, 0.9]]), 2, similarity=similar, weights=ONLY_ACCURACY).kept == ("a", "b")


def test_greedy_is_checked() -> None:
    # a is best alone, b and c are best together: greedy keeps a
    similar = np.array([[0, 1.0, 1.0], [1.0, 0, 0.0], [1.0, 0.0, 0]])
    weights = PoolWeights(accuracy=1, likelihood=0, overlap=0, similarity=1)
    found = select_pool(table([[1, 0.9, 0.9]]), 2, similarity=similar, weights=weights)
    assert set(found.kept) == {"b", "c"}
    assert found.value > found.greedy
    grown = select_pool(table([[1, 0.9, 0.9]]), 2, similarity=similar, weights=weights, exact_up_to=0)
    assert set(grown.kept) == {"b", "c"}


def test_the_order_of_experts_does_not_matter() -> None:
    rng = np.random.default_rng(3)
    shots = table(rng.integers(0, 2, (6, 5)).astype(np.float64))

    def kept(names: list[str]) -> Pool:
        return select_pool(shots.only(names), 3)

    assert kept(list("abcde")).kept == kept(list("edcba")).kept == kept(list("cabed")).kept


def test_likelihoods_from_callables() -> None:
    shots = [Shot("1 + 1?", "one and one is two"), Shot("2 + 2?", "four")]
    asked: list[str] = []

    def model(name: str, per_word: float) -> Callable[[str, str], float]:
        def say(question: str, rationale: str) -> float:
            asked.append(name)
            return per_word * len(rationale.split())

        return say

    found = rationale_likelihood(shots, ["a", "b"], {"a": model("a", -1), "b": model("b", -2)})
    assert found.tolist() == [[-5, -10], [-1, -2]]
    assert asked == ["a", "a", "b", "b"]  # each model at one go
    with pytest.raises(MixmergeError, match=r"none is given for c"):
        rationale_likelihood(shots, ["a", "c"], {"a": model("a", -1)})


def test_faults_come_all_at_once() -> None:
    shots = table([[1, 0, np.nan], [0, 1, np.nan]])
    with pytest.raises(MixmergeError) as caught:
        select_pool(shots, 4, likelihood=np.ones((2, 3)), similarity=np.eye(2), best_score=0.5)
    text = str(caught.value)
    for part in (
        "size: is 4. 1 to 3",
        "no shot has a score of c",
        "best_score: is 0.5. At least the highest score, 1",
        "likelihood: of shape (2, 3)",
        "similarity: of shape (2, 2)",
    ):
        assert part in text
    with pytest.raises(MixmergeError, match=r"no shot has scores of both a and b"):
        select_pool(table([[1, np.nan], [np.nan, 1]]), 1)
    with pytest.raises(MixmergeError, match=r"weights.overlap: is -1"):
        PoolWeights(overlap=-1)
