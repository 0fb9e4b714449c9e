"""What compositions have in common: who was picked, which answers there are, and how to settle on one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mixmerge.aggregate.extraction import final_text
from mixmerge.aggregate.records import Ask, Prompt, Question, Said, Settled
from mixmerge.decision.records import Decision, Pick
from mixmerge.errors import Fault, MixmergeError


def picks_of(question: Question) -> tuple[Pick, ...]:
    """The picks, best first.

    Raises:
        MixmergeError: nobody is picked: the policy abstains.
    """
    if question.decision.abstains:
        raise MixmergeError(
            Fault(
                f"question {question.id}",
                "nobody is picked to answer it",
                run="Give the policy a fallback, or leave the question out",
            )
        )
    return question.decision.picks


def ranked(question: Question) -> tuple[str, ...]:
    """The picked experts, each once: the primary, then the others as they were picked."""
    picks_of(question)
    return order_of(question.decision)


def order_of(decision: Decision) -> tuple[str, ...]:
    """The same of a decision that picks somebody."""
    first = decision.primary or decision.picks[0].expert
    return tuple(dict.fromkeys([first, *(one.expert for one in decision.picks)]))


def named(*experts: str | None) -> frozenset[str]:
    """Those of the names that are given."""
    return frozenset(one for one in experts if one is not None)


def by_rank(question: Question, said: Iterable[Said]) -> list[Said]:
    """What was said, the best-ranked first: in the order of the picks, then of names and draws."""
    order = {(one.expert, one.draw): at for at, one in enumerate(question.decision.picks)}
    return sorted(
        said,
        key=lambda one: (order.get((one.ask.expert, one.ask.draw), len(order)), one.ask.expert, one.ask.draw),
    )


def samples_of(
    expert: str, samples: int, *, temperature: float, prompt: Prompt | None = None, logprobs: bool = False
) -> tuple[Ask, ...]:
    """The same expert so many times, a draw each."""
    return tuple(
        Ask(expert, draw, prompt=prompt, temperature=temperature, logprobs=logprobs)
        for draw in range(samples)
    )


def given(said: Iterable[Said]) -> list[Said]:
    """The answers that there are."""
    return [one for one in said if one.fault is None]


def telling(said: Iterable[Said]) -> list[Said]:
    """The answers that say something once thoughts are taken off."""
    return [one for one in said if one.fault is None and final_text(one.text)]


def failures(said: Sequence[Sequence[Said]]) -> list[dict[str, Any]]:
    """Every call that failed, as JSON values."""
    return [
        {"stage": stage, "expert": one.ask.expert, "draw": one.ask.draw, "fault": one.fault}
        for stage, all_of_it in enumerate(said)
        for one in sorted(all_of_it, key=lambda one: (one.ask.expert, one.ask.draw))
        if one.fault is not None
    ]


def settle(
    one: Said,
    stage: int,
    said: Sequence[Sequence[Said]],
    reason: Mapping[str, Any],
    *,
    text: str | None = None,
) -> Settled:
    """This answer stands; ``failed`` in the reason has the calls that failed, if any did.

    Args:
        one: the answer.
        stage: it was said in.
        said: everything.
        reason: why it stands.
        text: instead of all it says.
    """
    failed = failures(said)
    told = {**reason, **({"failed": failed} if failed else {})}
    return Settled(
        text=one.text if text is None else text,
        expert=one.ask.expert,
        source=(stage, one.ask.expert, one.ask.draw),
        reason=told,
    )


def unanswered(said: Sequence[Sequence[Said]], reason: Mapping[str, Any]) -> Settled:
    """No answer, with the faults of all calls that failed, and those that said nothing named too."""
    failed = failures(said)
    words = [f"{_called(one['expert'], one['draw'])}: {one['fault']}" for one in failed]
    words += [
        f"{_called(one.ask.expert, one.ask.draw)}: said nothing"
        for all_of_it in said
        for one in sorted(all_of_it, key=lambda one: (one.ask.expert, one.ask.draw))
        if one.fault is None and not final_text(one.text)
    ]
    return Settled(
        text="",
        expert=None,
        source=None,
        reason={**reason, "failed": failed},
        fault="; ".join(words) or "no answers",
    )


def _called(expert: str, draw: int) -> str:
    return f"{expert} (draw {draw})" if draw else expert
