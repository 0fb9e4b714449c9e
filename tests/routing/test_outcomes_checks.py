"""What is reported of a table, which queries are near, and what leaks from train to test."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from mixmerge.errors import MixmergeError
from mixmerge.outcomes import OutcomeTable, Price
from mixmerge.outcomes.checks import check, leaks, without
from mixmerge.outcomes.similar import RUN, Vectors, groups, near, normalised

NAN = float("nan")
LONG = "A train leaves the station at {} and travels 60 miles per hour towards the sea. When does it arrive?"
# 0, 1: the same but for case and spacing; 2: near to both; 3: far
QUERIES = (
    LONG.format("noon"),
    f"  {LONG.format('NOON').upper()} ",
    LONG.format("noon!"),
    "Name a river in Asia.",
)


def table(
    score: Any, *, queries: Sequence[str] | None = None, prefix: str = "q", **more: Any
) -> OutcomeTable:
    score = np.array(score, np.float64)
    names = [f"{prefix}{i}" for i in range(len(score))]
    return OutcomeTable(
        ids=tuple(names),
        queries=tuple(queries or names),
        experts=tuple("abcdef"[: score.shape[1]]),
        score=score,
        **more,
    )


def test_a_report_worked_out_by_hand() -> None:
    one = table(
        [[1, 1, 0], [0, 0, NAN], [0.5, NAN, NAN], [NAN, NAN, NAN]],
        queries=QUERIES,
        cost=np.array([[NAN, 0.2, 0.4], [NAN, NAN, NAN], [0.1, NAN, NAN], [NAN] * 3]),
        metadata={"task": ("x", "y", "x", "x")},
    )
    report = check(one)
    assert (report.rows, report.scored, report.missing) == (4, 3, 6 / 12)
    assert (report.exact, report.near, report.groups) == (1, 1, (("q0", "q1", "q2"),))
    assert (report.ties, report.all_zero, report.all_equal) == (2, 1, 1)
    assert report.oracle == 0.5
    assert report.cost == (0.1, 0.4)
    assert report.tasks == {"x": 3, "y": 1}
    a, b, c = report.experts
    assert (a.coverage, a.mean, a.best, a.alone, a.cost) == (0.75, 0.5, 3, 1, 0.1)
    assert (b.coverage, b.mean, b.best, b.alone, b.cost) == (0.5, 0.5, 2, 0, 0.2)
    assert (c.coverage, c.mean, c.best, c.alone, c.cost) == (0.25, 0.0, 0, 0, 0.4)
    assert check(one, similarity=None).near is None
    assert check(one, similarity=None).groups == (("q0", "q1"),)
    assert json.loads(json.dumps(report.as_dict()))["experts"][0]["best"] == 3
    lines = report.lines()
    assert lines[0] == "4 queries x 3 experts, 50.0% of scores missing, 2 tasks"
    assert lines[1] == "duplicates: 1 exact, 1 near; the largest group has 3 queries"
    assert lines[2] == "ties for best 2 (66.7%), all zero 1 (33.3%), all equal 1 (33.3%)"
    assert "warning: 1 queries have no score at all" in lines


def test_what_a_report_warns_of() -> None:
    lines = check(table([[1], [0]])).lines()
    assert "warning: one expert, so there is nothing to route" in lines
    assert "warning: b has no score at all" in check(table([[1, NAN], [0, NAN]])).lines()
    same = table(np.ones((20, 2)), queries=["Again?"] * 20)
    assert any("more than a tenth of the queries are one group" in line for line in check(same).lines())


def test_costs_from_prices() -> None:
    tokens = np.array([[1e6, 1e6], [2e6, 1e6]])
    one = table([[1, 0], [0, 1]], tokens_in=tokens, tokens_out=tokens, prices={"a": Price(1.0, 2.0)})
    report = check(one)
    assert report.cost == (3.0, 6.0)
    assert [expert.cost for expert in report.experts] == [4.5, None]


def test_reports_of_nothing() -> None:
    report = check(table(np.ones((1, 2))).rows([]))
    assert (report.rows, report.missing, report.oracle, report.exact, report.near) == (0, 0.0, None, 0, 0)
    assert report.lines()
    silent = check(table([[NAN, NAN]]))
    assert (silent.scored, silent.oracle, silent.all_equal, silent.all_zero, silent.ties) == (
        0,
        None,
        0,
        0,
        0,
    )


def test_negative_scores_are_not_missing() -> None:
    report = check(table([[-1.0, -2.0], [-3.0, -3.0]]))
    assert (report.oracle, report.ties, report.all_equal, report.all_zero) == (-2.0, 1, 1, 0)


# --- similar texts


def test_the_cosine_is_that_of_scikit_learn() -> None:
    texts = [normalised(text) for text in (*QUERIES, "ab", "abc", "x" * 30, "große Häuser 漢字かな交じり文")]
    vectors = Vectors.of(texts)
    pairs = np.indices((len(texts), len(texts))).reshape(2, -1)
    ours = vectors.cosines(pairs[0], pairs[1]).reshape(len(texts), len(texts))
    features = TfidfVectorizer(
        analyzer=lambda text: [text[i : i + RUN] for i in range(max(1, len(text) - RUN + 1))],
        sublinear_tf=True,
    ).fit_transform([f" {text} " for text in texts])
    np.testing.assert_allclose(ours, (features @ features.T).toarray(), atol=1e-6)


WORDS = ("river", "stone", "light", "number", "answer", "between", "question")
WORDS += ("why", "train", "seven", "blue", "harvest", "engine", "letter")


def planted(seed: int, *, count: int = 300) -> list[str]:
    """Texts of random words, a third of them others with a few words changed."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 30)) + f" {rng.integers(10**6)}" for _ in range(2 * count // 3)]
    for source in rng.integers(0, len(texts), count - len(texts)):
        words = texts[source].split()
        for at in rng.integers(0, len(words), rng.integers(1, 6)):
            words[at] = str(rng.choice(WORDS))
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("similarity", [0.75, 0.9])
def test_near_pairs_are_those_of_brute_force(similarity: float) -> None:
    texts = planted(0)
    unique = sorted(set(texts))
    vectors = Vectors.of(unique)
    cosine = (vectors.exact @ vectors.exact.T).toarray()
    close = cosine >= similarity
    labels = np.arange(len(unique))
    for _ in unique:
        labels = np.array([labels[row].min() for row in close])
    wanted = {text: int(label) for text, label in zip(unique, labels, strict=True)}
    found = groups(texts, similarity=similarity)
    assert len(set(found.tolist())) == len(set(labels.tolist())) < len(texts) - 20
    of = {(wanted[text], int(label)) for text, label in zip(texts, found, strict=True)}
    assert len(of) == len(set(found.tolist())), "each of their groups is one of ours"


def test_the_nearest_is_that_of_brute_force() -> None:
    texts = planted(3)
    left, right = [*texts[-80:], *(f"{number} " * 9 for number in range(20))], texts[:-80]
    unique = sorted({normalised(text) for text in (*left, *right)})
    vectors = Vectors.of(unique)
    cosine = (vectors.exact @ vectors.exact.T).toarray()
    cosine = cosine[[unique.index(normalised(text)) for text in left]]
    cosine = cosine[:, [unique.index(normalised(text)) for text in right]]
    at, found = near(left, right, similarity=0.6)
    close = cosine.max(axis=1) >= 0.6
    assert 60 < close.sum() <= 80
    assert ((at >= 0) == close).all()
    np.testing.assert_allclose(found[close], cosine.max(axis=1)[close], atol=1e-6)
    np.testing.assert_allclose(cosine[np.flatnonzero(close), at[close]], found[close], atol=1e-6)


def test_groups_do_not_depend_on_the_order() -> None:
    texts = planted(1)
    shuffled = np.random.default_rng(0).permutation(len(texts))
    assert groups(texts)[shuffled].tolist() == groups([texts[i] for i in shuffled]).tolist()


def test_a_block_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = planted(2)
    whole, nearest = groups(texts), near(texts[:100], texts[100:])
    for name, size in (("_BLOCK", 7), ("_PAIRS", 900), ("_ENTRIES", 300)):
        monkeypatch.setattr(f"mixmerge.outcomes.similar.{name}", size)
    assert groups(texts).tolist() == whole.tolist()
    assert near(texts[:100], texts[100:])[0].tolist() == nearest[0].tolist()


def test_groups_join_what_is_near_over_others() -> None:
    chain = [
        "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    ]
    for word in ("fifteen", "eleven", "seven", "two"):
        chain.append(chain[-1].replace(word, word[::-1]))
    vectors = Vectors.of([normalised(text) for text in chain])
    step = min(float(vectors.cosines(np.array([i]), np.array([i + 1]))[0]) for i in range(4))
    ends = float(vectors.cosines(np.array([0]), np.array([4]))[0])
    assert ends < step - 0.1
    assert groups(chain, similarity=step).tolist() == [0] * 5
    assert len(set(groups(chain, similarity=1.0).tolist())) == 5


def test_the_same_text_is_one_group_without_similarity() -> None:
    found = groups(QUERIES, similarity=None)
    assert found[0] == found[1]
    assert len(set(found.tolist())) == 3
    assert groups(["ﬁne １", "FINE 1"], similarity=None).tolist() == [0, 0]
    assert groups([]).tolist() == []


@given(st.lists(st.text(st.characters(), max_size=12), max_size=8))
@settings(max_examples=50)
def test_any_texts_have_groups(texts: list[str]) -> None:
    found = groups(texts)
    for one, left in zip(texts, found, strict=True):
        for other, right in zip(texts, found, strict=True):
            if normalised(one) == normalised(other):
                assert left == right


def test_long_texts_are_compared_by_their_ends() -> None:
    rng = np.random.default_rng(0)
    start, end, another = (" ".join(map(str, rng.integers(0, 10**6, 2000))) for _ in range(3))
    one, other = f"{start} {'x' * 50_000} {end}", f"{start} {'y' * 60_000} {end}"
    assert near([one, one], [f"{start} {another}", other])[0].tolist() == [1, 1]
    assert near([one], [f"{start} {another}"])[0].tolist() == [-1]


@pytest.mark.parametrize("similarity", [0.0, -1.0, 1.5, NAN])
def test_a_similarity_that_is_none(similarity: float) -> None:
    with pytest.raises(MixmergeError, match="similarity: is"):
        groups(QUERIES, similarity=similarity)
    with pytest.raises(MixmergeError, match="similarity: is"):
        near(QUERIES, QUERIES, similarity=similarity)


# --- leaks


def test_leaks_are_found_and_taken_out() -> None:
    train = table(np.ones((4, 2)), queries=["Something else entirely", *QUERIES[1:]], prefix="r")
    test = table(np.ones((4, 2)), queries=[QUERIES[0], LONG.format("noon?"), "Name a lake.", QUERIES[3]])
    found = leaks(train, test)
    assert found.exact == ((0, 1), (3, 3))
    assert [pair[:2] for pair in found.near] == [(1, 2)] or [pair[:2] for pair in found.near] == [(1, 1)]
    assert 0.9 <= found.near[0][2] < 1.0
    assert found.ids == ("q0", "q1", "q3")
    assert without(test, found.ids).queries == ("Name a lake.",)
    assert found.lines() == ["2 of 4 test queries are in the training table, and 1 nearly; 1 are clean"]
    assert json.loads(json.dumps(found.as_dict()))["tested"] == 4
    assert leaks(train, test, similarity=None).ids == ("q0", "q3")
    assert leaks(train, test.rows([2])).ids == ()


def test_the_nearest_of_several() -> None:
    base = LONG.format("noon")
    at, cosine = near([base, "far from all of these"], [base + " Or not?", base + "!", "other words", base])
    assert at.tolist() == [3, -1]
    assert cosine.tolist() == [1.0, 0.0]
    at, _ = near([base], [base + " Or not at all?", base + "!"], similarity=0.5)
    assert at.tolist() == [1]
    assert near([], ["a"])[0].tolist() == []
    assert near(["a"], [])[0].tolist() == [-1]


def test_an_id_that_is_not_there() -> None:
    one = table(np.ones((2, 2)))
    assert without(one, []).ids == one.ids
    with pytest.raises(MixmergeError, match="no query is called x"):
        without(one, ["q0", "x"])
