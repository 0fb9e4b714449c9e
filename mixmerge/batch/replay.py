"""A request of a job as far as it has come: its stages are replayed from what experts have said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from mixmerge.aggregate import Ask, Question, Said, Settled
from mixmerge.batch.journal import Journal, key_of
from mixmerge.batch.plan import Stage
from mixmerge.batch.records import Answer, Item
from mixmerge.batch.setup import Setup
from mixmerge.decision.records import Decision
from mixmerge.engines.records import Request
from mixmerge.errors import Fault, MixmergeError

ABSTAINS = "nobody is picked: the policy abstains"


class Replay:
    """One request, read once, for as long as it is looked at.

    Args:
        row: its place in the job.
        item: it.
        decide: its decision; None if it has none.
        setup: of the job.
        stages: of the job so far.
        journal: what was said.
    """

    def __init__(
        self,
        row: int,
        item: Item,
        decide: Callable[[], Decision | None],
        setup: Setup,
        stages: Sequence[Stage],
        journal: Journal,
    ) -> None:
        self.row, self.item = row, item
        self._decide, self._setup, self._stages, self._journal = decide, setup, stages, journal
        self._heard: dict[tuple[int, int], dict[str, Any]] = {}

    @cached_property
    def decision(self) -> Decision | None:
        return self._decide()

    @cached_property
    def question(self) -> Question | None:
        """What it asks, and of whom; None if nobody answers."""
        decision = self.decision
        if decision is None or decision.abstains:
            return None
        return Question(self.item.id, self.item.prompt, decision)

    def outcome(self, stage: int) -> tuple[Ask, ...] | Settled | None:
        """What it asks in a stage, or how it settled before; None if nobody answers."""
        if self.question is None:
            return None
        asks = self._setup.composition.first(self.question)
        said: list[tuple[Said, ...]] = []
        for number in range(stage):
            calls = self._stages[number].calls_of(self.row)
            said.append(tuple(self._said(number, call, ask) for call, ask in zip(calls, asks, strict=True)))
            following = self._setup.composition.then(self.question, said)
            if isinstance(following, Settled):
                return following
            asks = following
        return asks

    def request(self, ask: Ask) -> Request:
        """What an engine is asked."""
        asked, defaults = self.item.settings, self._setup.defaults
        temperature = ask.temperature
        if temperature is None:
            temperature = defaults.temperature if asked.temperature is None else asked.temperature
        expert = self._setup.experts[ask.expert]
        return Request(
            id=self.item.id,
            prompt=self.item.prompt if ask.prompt is None else ask.prompt,
            max_new_tokens=asked.max_new_tokens or defaults.max_new_tokens,
            temperature=temperature,
            top_p=defaults.top_p if asked.top_p is None else asked.top_p,
            stop=defaults.stop if asked.stop is None else asked.stop,
            seed=_seed(defaults.seed if asked.seed is None else asked.seed, ask.draw),
            logprobs=asked.logprobs or ask.logprobs,
            adapter=expert.name if expert.adapter is not None else None,
            explain=defaults.explain,
            reads=ask.reads,
            offers=ask.offers,
        )

    def asked(self, stage: Stage, call: int) -> Request:
        """The request of one of its calls."""
        asks = self.outcome(stage.number)
        if not isinstance(asks, tuple):
            raise MixmergeError(
                Fault(f"request {self.item.id}", "has settled before; the journal has changed")
            )
        return self.request(asks[int(stage.places[call])])

    def answer(self, stage: int) -> Answer | None:
        """Its answer, if it has settled before that stage."""
        where = f"request {self.item.id}"
        decision = self.decision
        if decision is None:
            return None
        if decision.abstains:
            fault = Fault(where, ABSTAINS, run="Lower abstain_below, or name a fallback")
            return Answer(self.item.id, decision=decision.as_dict(), fault=fault, row=self.row)
        settled = self.outcome(stage)
        if not isinstance(settled, Settled):
            return None
        there = [one for one in self.heard() if one is not None]
        source = self._source(settled)
        logprobs = source["logprobs"] if source and self.item.settings.logprobs else None
        return Answer(
            id=self.item.id,
            text=settled.text,
            expert=settled.expert,
            finish=None if source is None else source["finish"],
            tokens_in=sum(one["tokens_in"] for one in there),
            tokens_out=sum(one["tokens_out"] for one in there),
            calls=len(there),
            cost=self._cost(there),
            logprobs=None if logprobs is None else tuple(logprobs),
            decision={} if self.item.expert is not None else decision.as_dict(),
            reason={**settled.reason, **_weights(source)},
            fault=None if settled.fault is None else Fault(where, settled.fault),
            row=self.row,
        )

    def heard(self) -> list[dict[str, Any] | None]:
        """What was said in all its calls, in the order they were asked; None where there is no answer."""
        return [self._answer(one.number, call) for one in self._stages for call in one.calls_of(self.row)]

    def _said(self, number: int, call: int, ask: Ask) -> Said:
        answer = self._answer(number, call)
        if answer is None:
            return Said(ask, "", None, self._stages[number].faults.get(call, "was not asked"))
        logprobs = answer.get("logprobs")
        return Said(ask, answer["text"], None if logprobs is None else tuple(logprobs))

    def _answer(self, number: int, call: int) -> dict[str, Any] | None:
        """What was said in a call."""
        offset = int(self._stages[number].offsets[call])
        if offset < 0:
            return None
        if (number, call) not in self._heard:
            self._heard[number, call] = self._journal.answer(offset)
        return self._heard[number, call]

    def _source(self, settled: Settled) -> dict[str, Any] | None:
        """The generation whose words the answer has."""
        if settled.source is None:
            return None
        number, expert, draw = settled.source
        asks = self.outcome(number)
        if not isinstance(asks, tuple):
            return None
        for call, ask in zip(self._stages[number].calls_of(self.row), asks, strict=True):
            if (ask.expert, ask.draw) == (expert, draw):
                return self._answer(number, call)
        return None

    def _cost(self, answers: Sequence[dict[str, Any]]) -> float | None:
        total = 0.0
        for one in answers:
            price = self._setup.experts[one["expert"]].price
            if price is None:
                return None
            total += (one["tokens_in"] * price.input + one["tokens_out"] * price.output) / 1e6
        return total


def key(request: Request, stage: int, ask: Ask) -> int:
    """The name of an answer: whose, in which stage, and all that was asked."""
    prompt = request.prompt
    words = prompt if isinstance(prompt, str) else json.dumps([[turn.role, turn.content] for turn in prompt])
    asked = replace(request, id="", prompt="asked", explain=False)  # it changes no answer
    return key_of(request.id, stage, ask.expert, ask.draw, words, repr(asked))


def _weights(said: Mapping[str, Any] | None) -> dict[str, Any]:
    return {} if said is None or "weights" not in said else {"weights": said["weights"]}


def _seed(seed: int, draw: int) -> int:
    """Another seed for every further draw."""
    if draw == 0:
        return seed % 2**63
    digest = hashlib.blake2b(f"{seed} {draw}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
