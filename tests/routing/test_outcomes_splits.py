"""Splits keep duplicates together, tasks alike, and do not depend on the order of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.errors import MixmergeError
from mixmerge.outcomes import OutcomeTable
from mixmerge.outcomes.checks import leaks
from mixmerge.outcomes.similar import groups
from mixmerge.outcomes.splits import folds, split

WORDS = ("river", "stone", "light", "number", "answer", "between", "question")
WORDS += ("why", "train", "seven", "blue", "harvest", "engine", "letter")


def table(queries: Sequence[str], tasks: Sequence[str] | None = None) -> OutcomeTable:
    return OutcomeTable(
        ids=tuple(f"q{i}" for i in range(len(queries))),
        queries=tuple(queries),
        experts=("a",),
        score=np.ones((len(queries), 1)),
        metadata={} if tasks is None else {"task": tuple(tasks)},
    )


def sample(count: int = 400) -> OutcomeTable:
    """Four tasks of 40, 30, 20 and 10 %; every fourth query comes again with a question mark, in capitals."""
    rng = np.random.default_rng(0)
    queries, tasks = [], []
    while len(queries) < count:
        text, task = (
            " ".join(rng.choice(WORDS, 25)) + f" {len(queries)}",
            rng.choice(list("wxyz"), p=[0.4, 0.3, 0.2, 0.1]),
        )
        queries += [text, text.upper() + "?"] if len(queries) % 4 == 0 else [text]
        tasks += [task] * (len(queries) - len(tasks))
    return table(queries[:count], tasks[:count])


def whole(parts: Sequence[Any], rows: int) -> None:
    assert sorted(np.concatenate(parts).tolist()) == list(range(rows))
    assert all((np.diff(part) > 0).all() for part in parts)


def test_shares_and_tasks() -> None:
    one = sample()
    parts = split(one, shares=(6, 2, 2))
    whole(parts, len(one))
    assert [abs(len(part) - size) <= 4 for part, size in zip(parts, (240, 80, 80), strict=True)] == [True] * 3
    tasks = Counter(one.metadata["task"])
    for part, share in zip(parts, (0.6, 0.2, 0.2), strict=True):
        found = Counter(one.metadata["task"][i] for i in part)
        assert all(abs(found[task] - share * tasks[task]) <= 2 for task in tasks)


def test_nothing_leaks() -> None:
    one = sample()
    for seed in range(3):
        train, test = split(one, test=0.25, seed=seed)
        assert leaks(one.rows(train), one.rows(test)).ids == ()
    labels = groups(one.queries)
    assert len(set(labels.tolist())) < len(one) - 50
    for fold in folds(one, 4):
        rest = np.setdiff1d(np.arange(len(one)), fold)
        assert not set(labels[fold].tolist()) & set(labels[rest].tolist())


def test_without_similarity_only_the_same_texts_stay_together() -> None:
    one = table(
        [f"{word} and so on, at some length, for ever, number {i % 2}" for word in WORDS for i in range(4)]
    )
    train, test = split(one, test=0.5, similarity=None)
    assert len(train) == len(test) == 28
    for word in range(len(WORDS)):
        for pair in ((4 * word, 4 * word + 2), (4 * word + 1, 4 * word + 3)):
            assert np.isin(pair, train).sum() in (0, 2)


def test_the_order_of_rows_changes_nothing() -> None:
    one = sample()
    order = np.random.default_rng(5).permutation(len(one))
    for seed in range(2):
        plain = [{one.ids[i] for i in fold} for fold in folds(one, 5, seed=seed)]
        mixed = one.rows(order)
        assert [{mixed.ids[i] for i in fold} for fold in folds(mixed, 5, seed=seed)] == plain


def test_seeds() -> None:
    one = sample()
    first, again, other = (split(one, test=0.3, seed=seed)[1].tolist() for seed in (0, 0, 1))
    assert first == again
    both = len(set(first) & set(other))
    assert 15 < both < 60, "two draws of 30 % share 9 % of the rows"


def test_labels_that_are_known() -> None:
    one = sample()
    known = groups(one.queries)
    assert [p.tolist() for p in split(one, test=0.2, labels=known)] == [
        p.tolist() for p in split(one, test=0.2)
    ]
    with pytest.raises(MixmergeError, match="labels: has 3 entries"):
        split(one, test=0.2, labels=known[:3])


def test_tasks_of_one_query_are_shared_out() -> None:
    one = table(
        [f"{word} {word[::-1]} {i}" for i in range(10) for word in WORDS], [f"t{i}" for i in range(140)]
    )
    _, test = split(one, test=0.2)
    assert len(test) == 28
    assert [len(fold) for fold in folds(one, 5)] == [28] * 5


def test_a_group_too_large_goes_to_the_larger_part() -> None:
    one = table(["again"] * 60 + [" ".join(np.random.default_rng(i).choice(WORDS, 20)) for i in range(40)])
    _, test = split(one, test=0.2)
    assert len(test) == 20
    assert not (test < 60).any()


def test_a_group_goes_where_it_does_not_overflow() -> None:
    singles = [" ".join(np.random.default_rng(i).choice(WORDS, 20)) for i in range(5)]
    train, test = split(table(["again"] * 50 + ["something else"] * 45 + singles), test=0.2)
    assert (len(train), len(test)) == (95, 5)


def test_no_part_is_empty() -> None:
    one = table(["again"] * 50 + ["something else"] * 50)
    assert sorted(len(part) for part in split(one, shares=(0.9, 0.1))) == [50, 50]
    one = table(["again"] * 97 + ["one", "two", "three words here"])
    assert sorted(len(part) for part in folds(one, 4)) == [1, 1, 1, 97]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "exactly one is needed"),
        ({"test": 0.2, "shares": (1, 1)}, "exactly one is needed"),
        ({"test": 0.0}, "test: is 0.0"),
        ({"test": 1.0}, "test: is 1.0"),
        ({"test": float("nan")}, "test: is nan"),
        ({"shares": (1,)}, "Two or more"),
        ({"shares": (1, 0)}, "each more than 0"),
        ({"shares": (1, float("inf"))}, "each more than 0"),
        ({"shares": (1, 1, 1)}, "makes 3 parts. The table has 2 groups"),
        ({"test": 0.5, "similarity": 2.0}, "similarity: is 2.0"),
    ],
)
def test_splits_that_cannot_be(options: dict[str, Any], word: str) -> None:
    with pytest.raises(MixmergeError, match=word):
        split(table(["a", "b", "A "]), **options)


def test_folds_that_cannot_be() -> None:
    with pytest.raises(MixmergeError, match="k: is 1"):
        folds(table(["a", "b"]), 1)
    with pytest.raises(MixmergeError, match="makes 3 parts"):
        folds(table(["a", "b"]), 3)


@given(
    st.lists(
        st.tuples(st.text("abc ", min_size=1, max_size=6), st.sampled_from("xyz")), min_size=2, max_size=30
    ),
    st.integers(2, 4),
    st.integers(0, 3),
)
@settings(max_examples=60)
def test_any_table(rows: list[tuple[str, str]], k: int, seed: int) -> None:
    one = table([f"{text}." for text, _ in rows], [task for _, task in rows])
    labels = groups(one.queries)
    if len(set(labels.tolist())) < k:
        with pytest.raises(MixmergeError):
            folds(one, k, seed=seed)
        return
    parts = folds(one, k, seed=seed)
    whole(parts, len(one))
    assert all(len(part) for part in parts)
    for label in set(labels.tolist()):
        assert sum(label in labels[part] for part in parts) == 1
    back = one.rows(np.arange(len(one))[::-1])
    again = [{back.ids[i] for i in part} for part in folds(back, k, seed=seed)]
    assert again == [{one.ids[i] for i in part} for part in parts]
