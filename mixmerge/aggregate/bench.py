"""Which expert is best at making one answer of several: measured apart from who is best at answering.

Source: Chen et al. (2025), Symbolic Mixture-of-Experts, arXiv 2503.05641, and its released ``bench_aggr.py``.
Deviations: the prompt is ours, that of the compositions that aggregate; draws are keyed by the question; a question
without a right or a wrong answer is left out, where the released code puts empty answers (``missing="empty"``); the
best expert is told, not read off file names.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mixmerge.aggregate.extraction import final_text
from mixmerge.aggregate.prompts import aggregation_prompt
from mixmerge.engines.callables import Generate
from mixmerge.errors import Fault, MixmergeError

Check = Callable[[str, str], float]  # (an answer, the reference) -> above 0.5 if it is right


@dataclass(frozen=True)
class Answered:
    """A question that experts have answered.

    Args:
        id: unique.
        question: its text.
        reference: the right answer, as ``check`` wants it.
        answers: expert -> what it said.
    """

    id: str
    question: str
    reference: str
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Trial:
    """A question with one right and some wrong answers, in an order that gives nothing away."""

    id: str
    question: str
    reference: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class AggregatorBench:
    """How well each expert told the right answer from the wrong ones.

    Args:
        best: the most accurate expert; of several, the first by name.
        accuracy: expert -> share of trials it got right.
        error: expert -> standard error of that share.
        trials: how many there were.
        left_out: questions without a right or a wrong answer.
    """

    best: str
    accuracy: Mapping[str, float]
    error: Mapping[str, float]
    trials: int
    left_out: int


def trials(
    answered: Sequence[Answered],
    check: Check,
    *,
    wrong: int = 2,
    missing: Literal["skip", "empty"] = "skip",
    seed: int = 0,
) -> tuple[Trial, ...]:
    """The synthetic set: of each question one right answer and ``wrong`` wrong ones, drawn from all experts.

    Args:
        answered: questions and answers; their order and that of the experts do not matter.
        check: whether an answer is right.
        wrong: how many, 1 or more.
        missing: leave out a question that has too few of either, or put empty answers in their place.
        seed: of draws and order.
    """
    if wrong < 1:
        raise MixmergeError(Fault("wrong", f"is {wrong}", "1 or more"))
    made = []
    for one in answered:
        digest = hashlib.blake2b(f"{seed}:{one.id}".encode(), digest_size=8).digest()
        rng = random.Random(int.from_bytes(digest, "little"))
        said = sorted({answer for answer in one.answers.values() if answer.strip()})
        good = [answer for answer in said if check(answer, one.reference) > 0.5]
        bad = [answer for answer in said if check(answer, one.reference) <= 0.5]
        if missing == "skip" and (not good or len(bad) < wrong):
            continue
        chosen = rng.sample(good, min(1, len(good))) + rng.sample(bad, min(wrong, len(bad)))
        chosen += [""] * (1 + wrong - len(chosen))
        rng.shuffle(chosen)
        made.append(Trial(one.id, one.question, one.reference, tuple(chosen)))
    return tuple(made)


def best_aggregator(
    experts: Mapping[str, Generate],
    answered: Sequence[Answered],
    check: Check,
    *,
    wrong: int = 2,
    missing: Literal["skip", "empty"] = "skip",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> AggregatorBench:
    """Let every expert make one answer of each trial's answers, and count how many are right.

    Args:
        experts: name -> what it generates; each is called once with all prompts.
        answered, check, wrong, missing: as in ``trials``.
        max_new_tokens, temperature: of the answers.
        seed: of the trials and of the answers.

    Raises:
        MixmergeError: no experts, or no question has both right and wrong answers.
    """
    if not experts:
        raise MixmergeError(Fault("experts", "are none", "One or more"))
    made = trials(answered, check, wrong=wrong, missing=missing, seed=seed)
    check_enough(made, len(answered), wrong)
    told = prompts(made)
    said = {
        name: generate(told, max_new_tokens=max_new_tokens, temperature=temperature, seeds=[seed] * len(told))
        for name, generate in experts.items()
    }
    return judged(made, said, check, left_out=len(answered) - len(made))


def check_enough(made: Sequence[Trial], questions: int, wrong: int) -> None:
    """Refuse a bench without a trial."""
    if not made:
        raise MixmergeError(
            Fault(
                "answers",
                f"of {questions} questions none has 1 right answer and {wrong} wrong ones",
                run="Bring answers of more experts or questions, or pass missing='empty'",
            )
        )


def prompts(made: Sequence[Trial]) -> list[str]:
    """What every expert is asked, one prompt for each trial."""
    return [aggregation_prompt(one.question, one.answers) for one in made]


def judged(
    made: Sequence[Trial], said: Mapping[str, Sequence[str]], check: Check, *, left_out: int = 0
) -> AggregatorBench:
    """Who told right from wrong how often.

    Args:
        made: the trials, at least one.
        said: expert -> its answer to each.
        check: whether an answer is right.
        left_out: questions of which no trial could be made.
    """
    accuracy, error = {}, {}
    for name in sorted(said):
        texts = said[name]
        right = [check(final_text(text), one.reference) > 0.5 for text, one in zip(texts, made, strict=True)]
        share = sum(right) / len(right)
        accuracy[name], error[name] = share, math.sqrt(share * (1 - share) / len(right))
    best = max(sorted(accuracy), key=lambda name: accuracy[name])
    return AggregatorBench(best, accuracy, error, len(made), left_out)
