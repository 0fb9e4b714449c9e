"""What a composition is given, what it may ask, and how it ends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mixmerge.decision.records import Decision
from mixmerge.engines.records import Message

Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Question:
    """What is to be answered.

    Args:
        id: of the request.
        prompt: as it came: a text to go on with, or the turns of a chat.
        decision: who answers, best first.
    """

    id: str
    prompt: Prompt
    decision: Decision


@dataclass(frozen=True)
class Ask:
    """One generation that is wanted in a stage.

    Args:
        expert: who is asked.
        draw: 0, 1, ... where an expert is asked several times in one stage; each draws with another seed.
        weight: what the answer counts for.
        prompt: other than the question's.
        temperature: other than the request's or the mixture's.
        logprobs: the answer's are needed.
        reads: peers whose latents the expert reads, with their gates, as in ``engines.records.Request``. What peers
            offer in the same stage is there before.
        offers: its latents are wanted, for those of the same question who read them, and no text.
    """

    expert: str
    draw: int = 0
    weight: float = 1.0
    prompt: Prompt | None = None
    temperature: float | None = None
    logprobs: bool = False
    reads: tuple[tuple[str, float], ...] = ()
    offers: bool = False


@dataclass(frozen=True)
class Said:
    """What came of an ``Ask``.

    Args:
        ask: it.
        text: the answer; "" if there is none.
        logprobs: of its tokens, if they were asked for.
        fault: why there is no answer; None if there is one.
    """

    ask: Ask
    text: str
    logprobs: tuple[float, ...] | None = None
    fault: str | None = None


@dataclass(frozen=True)
class Settled:
    """The one answer.

    Args:
        text: of the answer.
        expert: whose words they are.
        source: stage, expert and draw of the ``Ask`` that said it; tokens and finish are read there.
        reason: how it came about, as JSON values.
        fault: why there is no answer; None if there is one.
    """

    text: str
    expert: str | None
    source: tuple[int, str, int] | None
    reason: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None


class Composition(ABC):
    """How answers are made from the picked experts'. Pure: it depends on its arguments and options only."""

    @abstractmethod
    def first(self, question: Question) -> tuple[Ask, ...]:
        """Whom to ask first; at least one. Expert and draw are unique in a stage."""

    @abstractmethod
    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        """What follows from all that was said so far, stage by stage, in the order it was asked."""

    def experts(self) -> frozenset[str]:
        """Experts it may ask beside those picked."""
        return frozenset()
