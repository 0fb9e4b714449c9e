"""Cascades at work: ask an expert, and the next one while the answer is not sure enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mixmerge.aggregate.asking import given, named, samples_of, settle, unanswered
from mixmerge.aggregate.extraction import extractor
from mixmerge.aggregate.options import CascadeOptions
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled
from mixmerge.aggregate.verification import verification_prompt, verified
from mixmerge.aggregate.vote import certainty, tally
from mixmerge.errors import Fault, MixmergeError


@dataclass(frozen=True)
class Asked:
    """An expert that was asked, and how sure its answer is; NaN if that is not known, or there is no answer."""

    expert: str
    confidence: float = math.nan


class NextStep(Protocol):
    """``action``: ``escalate`` to (that is, ask) an expert, or let its ``answer`` stand."""

    @property
    def action(self) -> str: ...

    @property
    def expert(self) -> str: ...


class Escalation(Protocol):
    """Who is asked when; the fitted cascades of ``mixmerge.routers`` are such."""

    @property
    def experts(self) -> tuple[str, ...]:
        """In the order of escalation."""

    def next_step(self, history: Sequence[Any]) -> NextStep:
        """What to do after these ``Asked``."""


@dataclass(frozen=True)
class Step:
    """As of ``NextStep``."""

    action: str
    expert: str


@dataclass(frozen=True)
class Ladder:
    """An escalation of experts and thresholds, as ``CascadeOptions`` gives them."""

    experts: tuple[str, ...]
    thresholds: tuple[float, ...]

    def next_step(self, history: Sequence[Asked]) -> Step:
        """The next expert, until a confidence reaches its threshold; NaN reaches none."""
        stage = len(history) - 1
        if stage < 0 or (
            stage < len(self.thresholds) and not history[-1].confidence >= self.thresholds[stage]
        ):
            return Step("escalate", self.experts[stage + 1])
        return Step("answer", history[-1].expert)


@dataclass(frozen=True)
class _Reached:
    """An expert, the stage it answered in, its answer if there is one, and its confidence."""

    expert: str
    stage: int
    answer: Said | None
    confidence: float


@dataclass(frozen=True)
class ConfidenceCascade(Composition):
    """Asks an escalation's experts one after the other, and stops when it is content with an answer.

    Whom the decision picked does not matter. The last expert is asked once and no confidence is taken. A call that
    fails has no confidence, so the cascade goes on; if the expert whose answer is to stand has none, the latest answer
    stands (``fallback`` in the reason).

    Source: AutoMix (arXiv 2310.12963) for ``verification``. The others are confidence escalation as of vLLM Semantic
    Router's looper (mean log-probability) and the Avengers' agreement of samples (arXiv 2505.19797).

    Args:
        options: how sure an answer is; and the experts and thresholds, unless there is an ``escalation``.
        escalation: fitted; its thresholds are for confidences in 0..1 of the kind of the options.

    Raises:
        MixmergeError: neither experts nor an escalation, or both.
    """

    options: CascadeOptions = field(default_factory=CascadeOptions)
    escalation: Escalation | None = None

    def __post_init__(self) -> None:
        if (self.options.experts is None) == (self.escalation is None):
            what = "are not given" if self.escalation is None else "are given beside a fitted escalation"
            raise MixmergeError(
                Fault("compose.experts", what, "Experts and thresholds, or a fitted escalation: one of them")
            )

    @property
    def ladder(self) -> Escalation:
        """The escalation, or that of the options."""
        return self.escalation or Ladder(self.options.experts or (), self.options.thresholds or ())

    def first(self, question: Question) -> tuple[Ask, ...]:
        return self._asks(self.ladder.next_step([]).expert)

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        reached, waiting = self._walk(question, said)
        if waiting:
            return waiting
        step = self.ladder.next_step([Asked(one.expert, one.confidence) for one in reached])
        if step.action == "escalate":
            if step.expert in [one.expert for one in reached]:
                raise MixmergeError(
                    Fault("cascade", f"escalates to {step.expert}, which has answered already")
                )
            return self._asks(step.expert)
        reason: dict[str, Any] = {
            "kind": "cascade",
            "confidence": self.options.confidence,
            "asked": [
                {"expert": one.expert, "confidence": None if math.isnan(one.confidence) else one.confidence}
                for one in reached
            ],
        }
        answered = [one for one in reached if one.answer is not None]
        chosen = next((one for one in answered if one.expert == step.expert), None)
        if chosen is None and answered:
            chosen, reason["fallback"] = answered[-1], step.expert
        if chosen is None or chosen.answer is None:
            return unanswered(said, reason)
        return settle(chosen.answer, chosen.stage, said, reason)

    def experts(self) -> frozenset[str]:
        return named(*self.ladder.experts)

    def _asks(self, expert: str) -> tuple[Ask, ...]:
        if expert == self.ladder.experts[-1]:
            return (Ask(expert),)
        if self.options.confidence == "agreement":
            return samples_of(expert, self.options.samples, temperature=self.options.temperature)
        return (Ask(expert, logprobs=self.options.confidence == "logprobs"),)

    def _walk(
        self, question: Question, said: Sequence[Sequence[Said]]
    ) -> tuple[list[_Reached], tuple[Ask, ...]]:
        """What each stage came to, and the verdicts that are still to be asked for."""
        reached: list[_Reached] = []
        stage = 0
        while stage < len(said):
            answers = sorted(given(said[stage]), key=lambda one: one.ask.draw)
            expert, at, sure = said[stage][0].ask.expert, stage, math.nan
            answer = answers[0] if answers else None
            stage += 1
            if answer is not None and expert != self.ladder.experts[-1]:
                if self.options.confidence == "logprobs":
                    sure = certainty(answer)
                elif self.options.confidence == "agreement":
                    answer, sure = self._agreed(answers)
                elif stage == len(said):
                    prompt = verification_prompt(question.prompt, answer.text)
                    return reached, samples_of(
                        expert, self.options.samples, temperature=self.options.temperature, prompt=prompt
                    )
                else:
                    sure = verified(said[stage])
                    stage += 1
            reached.append(_Reached(expert, at, answer, sure))
        return reached, ()

    def _agreed(self, answers: Sequence[Said]) -> tuple[Said, float]:
        """The first answer of what most say, and the share that says it; NaN where no answer can be read."""
        sides = tally(answers, extractor(self.options.extract)).sides
        if not sides:
            return answers[0], math.nan
        return sides[0].said[0], len(sides[0].said) / len(answers)
