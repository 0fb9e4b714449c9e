"""One answer, votes, self-consistency and best-of: by hand, and what holds for any answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.aggregate.answer import PrimaryAnswer
from mixmerge.aggregate.asking import samples_of
from mixmerge.aggregate.best import BestOf
from mixmerge.aggregate.extraction import number, whole
from mixmerge.aggregate.options import BestOptions, SelfConsistencyOptions, VoteOptions
from mixmerge.aggregate.records import Ask, Question, Said
from mixmerge.aggregate.self_consistency import SelfConsistency
from mixmerge.aggregate.vote import Vote, certainty, tally
from mixmerge.decision.records import Decision, Pick
from mixmerge.errors import MixmergeError

Asks, Runs = Callable[..., Question], Callable[..., Any]


def said(*texts: str | None) -> list[Said]:
    """One answer of each expert a, b, c, ..."""
    return [
        Said(Ask("abcdefgh"[at]), text or "", fault=None if text is not None else "gone")
        for at, text in enumerate(texts)
    ]


# --- one answer


def test_the_primary_answers(ask: Asks, run: Runs) -> None:
    done = run(PrimaryAnswer(), ask("a", "b", "a"), {"a": "yes", "b": "no"})
    assert (done.settled.text, done.settled.expert, done.settled.source) == ("yes", "a", (0, "a", 0))
    assert done.settled.reason == {"kind": "answer"}
    assert done.asked == [[("a", 0)]]


def test_the_next_pick_answers_in_its_place(ask: Asks, run: Runs) -> None:
    done = run(PrimaryAnswer(), ask("a", "b", "c"), {"a": None, "b": None, "c": "yes"})
    assert done.asked == [[("a", 0)], [("b", 0)], [("c", 0)]]
    assert done.settled.text == "yes"
    assert done.settled.reason["fallback"] == "a"
    assert done.settled.reason["failed"] == [
        {"stage": 0, "expert": "a", "draw": 0, "fault": "went away"},
        {"stage": 1, "expert": "b", "draw": 0, "fault": "went away"},
    ]
    lost = run(PrimaryAnswer(), ask("a", "b"), {"a": None, "b": None}).settled
    assert lost.fault == "a: went away; b: went away"


def test_a_primary_that_is_not_the_first_pick(run: Runs) -> None:
    picks = (Pick("a"), Pick("b", draw=2, weight=0.3))
    question = Question("q", "?", Decision("q", picks, "b", {}, "sample", {}, ""))
    done = run(PrimaryAnswer(), question, {"a": "x", "b": None})
    assert done.asked == [[("b", 2)], [("a", 0)]]
    assert done.said[0][0].ask.weight == 0.3


def test_nobody_is_picked(ask: Asks) -> None:
    for composition in (PrimaryAnswer(), Vote(), BestOf(), SelfConsistency()):
        with pytest.raises(MixmergeError, match="question q: nobody is picked"):
            composition.first(ask())


# --- votes


def test_a_majority_by_hand(ask: Asks, run: Runs) -> None:
    answers = {"a": "it is 4", "b": "5", "c": "so 5.0", "d": "no idea", "e": None}
    done = run(Vote(VoteOptions(extract="number")), ask("a", "b", "c", "d", "e"), answers)
    assert (done.settled.text, done.settled.expert) == ("5", "b")
    assert done.settled.reason == {
        "kind": "vote",
        "extract": "number",
        "agreement": pytest.approx(2 / 3),
        "votes": [
            {"answer": "5", "count": 2, "weight": 2.0, "experts": ["b", "c"]},
            {"answer": "4", "count": 1, "weight": 1.0, "experts": ["a"]},
        ],
        "abstained": ["d"],
        "failed": [{"stage": 0, "expert": "e", "draw": 0, "fault": "went away"}],
    }


def test_weights_decide_unless_all_are_equal(ask: Asks, run: Runs) -> None:
    question, answers = ask(("a", 3.0), ("b", 1.0), ("c", 1.5)), {"a": "x", "b": "y", "c": "y"}
    assert run(Vote(), question, answers).settled.text == "x"
    equal = run(Vote(VoteOptions(weights="equal")), question, answers).settled
    assert (equal.expert, equal.reason["agreement"]) == ("b", pytest.approx(2 / 3))


@pytest.mark.parametrize("weights", [(0.3, 0.1, 0.2), (0.0, 0.0, 0.0), (1.0, 0.5, 0.5)])
def test_ties_go_to_the_best_ranked(ask: Asks, run: Runs, weights: tuple[float, ...]) -> None:
    """0.1 + 0.2 is more than 0.3 in floating point, and must not win by that."""
    question = ask(*zip("abc", weights, strict=True))
    assert run(Vote(), question, {"a": "x", "b": "y", "c": "y"}).settled.text == "x"
    assert run(Vote(), question, {"a": "x", "b": "y", "c": "z"}).settled.text == "x"


def test_nobody_says_anything_that_counts(ask: Asks, run: Runs) -> None:
    vote = Vote(VoteOptions(extract="choice"))
    settled = run(vote, ask("a", "b", "c"), {"a": None, "b": "hm", "c": "well"}).settled
    assert (settled.text, settled.reason["agreement"]) == ("hm", 0.0)
    assert settled.reason["fallback"] == "no answer could be read"
    assert run(vote, ask("a", "b"), {"a": None, "b": None}).settled.fault == "a: went away; b: went away"


def test_draws_of_one_expert_vote_each(run: Runs) -> None:
    picks = (Pick("a", 0, 0.4), Pick("b", 0, 0.3), Pick("b", 1, 0.3))
    question = Question("q", "?", Decision("q", picks, "a", {}, "sample", {}, ""))
    done = run(Vote(), question, {"a": "x", "b": "y"})
    assert done.settled.source == (0, "b", 0)
    assert done.settled.reason["agreement"] == pytest.approx(0.6)


def test_confidence_multiplies_the_weight(ask: Asks, run: Runs) -> None:
    sure = {"a": (math.log(0.2),) * 2, "b": (math.log(0.9), math.log(0.4)), "c": None}

    def reply(asked: Ask) -> Said:
        assert asked.logprobs
        return Said(asked, asked.expert, sure[asked.expert])

    settled = run(Vote(VoteOptions(confidence=True)), ask("a", ("b", 0.5), "c"), reply).settled
    assert settled.text == "b"
    assert [one["weight"] for one in settled.reason["votes"]] == pytest.approx([0.3, 0.2, 0.0])
    assert certainty(Said(Ask("a"), "", (-1.0, -3.0))) == pytest.approx(math.exp(-2))
    assert math.isnan(certainty(Said(Ask("a"), "")))
    assert math.isnan(certainty(Said(Ask("a"), "", ())))


TEXTS = st.lists(st.sampled_from(["1", "2", "2.0", "3", "hm", None]), min_size=1, max_size=8)


@given(TEXTS, st.lists(st.integers(0, 4), min_size=8, max_size=8))
def test_what_holds_of_any_vote(texts: list[str | None], weights: list[int]) -> None:
    cast = said(*texts)
    counted = tally(cast, number, weights[: len(cast)])
    totals = [side.weight for side in counted.sides]
    assert totals == sorted(totals, reverse=True)
    assert sum(totals) == sum(w for w, text in zip(weights, texts, strict=False) if text not in (None, "hm"))
    assert sum(len(side.said) for side in counted.sides) + len(counted.abstained) + texts.count(None) == len(
        texts
    )
    assert 0 <= counted.agreement <= 1
    if counted.sides:
        tied = [side for side in counted.sides if side.weight == totals[0]]
        assert counted.sides[0].said[0] == min((side.said[0] for side in tied), key=cast.index)
        stronger = tally(
            [*cast, Said(Ask("z"), counted.sides[0].answer)], number, [*weights[: len(cast)], 1.0]
        )
        assert stronger.sides[0].answer == counted.sides[0].answer, "one more vote for the winner"
        assert stronger.sides[0].weight == totals[0] + 1


def test_duplicates_add_up_as_if_they_were_one() -> None:
    many = tally(said("x", "y", "y", "y"), whole)
    one = tally(said("x", "y"), whole, [1.0, 3.0])
    assert [(s.answer, s.weight) for s in many.sides] == [(s.answer, s.weight) for s in one.sides]
    assert tally([], whole).agreement == 0.0


# --- self-consistency


def test_samples_of_the_primary_vote(ask: Asks, run: Runs) -> None:
    texts = ["4", "it is 5", "5", "no", None]
    composition = SelfConsistency(SelfConsistencyOptions(samples=5, extract="number", temperature=0.4))
    done = run(composition, ask("a", "b"), lambda asked: texts[asked.draw])
    assert done.asked == [[("a", draw) for draw in range(5)]]
    assert {(one.ask.temperature, one.ask.prompt) for one in done.said[0]} == {(0.4, None)}
    assert (done.settled.text, done.settled.source) == ("it is 5", (0, "a", 1))
    assert done.settled.reason["agreement"] == pytest.approx(2 / 3)
    assert len(run(SelfConsistency(), ask("a"), {"a": "x"}).said[0]) == 10
    assert samples_of("a", 2, temperature=1.0) == (Ask("a", 0, temperature=1.0), Ask("a", 1, temperature=1.0))


def test_when_all_samples_fail_the_next_pick_is_asked(ask: Asks, run: Runs) -> None:
    composition = SelfConsistency(SelfConsistencyOptions(samples=2))
    done = run(composition, ask("a", "b"), {"a": None, "b": "x"})
    assert [stage[0][0] for stage in done.asked] == ["a", "b"]
    assert done.settled.reason["fallback"] == "a"
    lost = run(composition, ask("a", "b"), {"a": None, "b": None}).settled.fault
    assert lost == "a: went away; a (draw 1): went away; b: went away; b (draw 1): went away"
    named = SelfConsistency(SelfConsistencyOptions(samples=2, expert="c"))
    assert run(named, ask("a"), {"c": "x", "a": "y"}).settled.expert == "c"
    assert named.experts() == {"c"}


# --- best of several


def test_the_likeliest_answer_stands(ask: Asks, run: Runs) -> None:
    logprobs = {"a": (-1.0, -3.0), "b": (-1.5,) * 4, "c": None, "d": ()}
    question = ask("c", "a", "d", "b")

    def reply(asked: Ask) -> Said:
        assert asked.logprobs
        return Said(asked, asked.expert, logprobs[asked.expert])

    mean = run(BestOf(), question, reply).settled
    assert mean.expert == "b"
    assert [(one["expert"], one["score"]) for one in mean.reason["scores"]] == [
        ("c", None),
        ("a", -2.0),
        ("d", None),
        ("b", -1.5),
    ]
    assert run(BestOf(BestOptions(score="sum")), question, reply).settled.expert == "a"
    unknown = run(BestOf(), ask("d", "c"), reply).settled
    assert unknown.expert == "d", "nothing is known: the best-ranked"
    assert run(BestOf(), ask("a", "b"), {"a": None, "b": None}).settled.fault == "a: went away; b: went away"
