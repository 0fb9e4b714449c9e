"""``compose: {kind: auto}``: the composition that the outcomes speak for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from pydantic import Field

from mixmerge.aggregate.choosing import Chosen, choose_composition
from mixmerge.aggregate.options import SAMPLING, Voting
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled
from mixmerge.aggregate.table import composition
from mixmerge.decision.records import Pick
from mixmerge.outcomes.table import OutcomeTable

AUTO = "auto"


class AutoOptions(Voting):
    """Options of ``auto``.

    Args:
        extract: what answers are compared by, as of every vote.
        samples: of self-consistency, 2 to 1000.
        temperature: of those, above 0.
        aggregator: who makes one answer of several if it comes to that, as ``mixmerge profile --aggregators``
            measures; None: the best expert.
    """

    samples: int = Field(default=10, ge=2, le=1000)
    temperature: float = Field(default=SAMPLING, gt=0)
    aggregator: str | None = Field(default=None, min_length=1)


@dataclass(frozen=True)
class Fixed(Composition):
    """Another composition, over the same experts for every query, whomever the policy picked.

    Args:
        picked: best first.
        inner: what is made of their answers.
    """

    picked: tuple[str, ...]
    inner: Composition

    def first(self, question: Question) -> tuple[Ask, ...]:
        return self.inner.first(self._fixed(question))

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        return self.inner.then(self._fixed(question), said)

    def experts(self) -> frozenset[str]:
        return self.inner.experts() | frozenset(self.picked)

    def _fixed(self, question: Question) -> Question:
        picks = tuple(map(Pick, self.picked))
        decision = replace(question.decision, picks=picks, primary=self.picked[0])
        return replace(question, decision=decision)


def auto(table: OutcomeTable, options: AutoOptions) -> tuple[Composition, Chosen]:
    """The composition for experts with these outcomes, and why.

    Self-consistency samples the primary of each query; a vote or an aggregator hears the experts that complement each
    other.
    """
    chosen = choose_composition(table, aggregator=options.aggregator)
    if chosen.kind == "self_consistency":
        about = {"extract": options.extract, "samples": options.samples, "temperature": options.temperature}
        return composition(chosen.kind, about), chosen
    about = {"extract": options.extract} if chosen.kind == "vote" else dict(chosen.options)
    return Fixed(chosen.experts, composition(chosen.kind, about)), chosen
