"""A job in which every expert answers every query, and nothing is made of the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixmerge.aggregate import Ask, Composition, Question, Said, Settled
from mixmerge.batch.setup import Setup
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.experts import ExpertSet
from mixmerge.experts.identity import identities
from mixmerge.mixture.answering import defaults_of
from mixmerge.mixture.schema import MixtureSpec


@dataclass(frozen=True)
class Everyone(Composition):
    """Every expert is asked, and nothing is made of it.

    Args:
        names: of the experts.
        draws: answers of each, 1 or more; with more than 1 they need a temperature above 0.
        temperature: of the answers; None: the mixture's.
    """

    names: tuple[str, ...]
    draws: int = 1
    temperature: float | None = None

    def first(self, question: Question) -> tuple[Ask, ...]:
        return tuple(
            Ask(name, draw, temperature=self.temperature) for name in self.names for draw in range(self.draws)
        )

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        return Settled("", None, None)


def everyone(
    spec: MixtureSpec, experts: ExpertSet, *, draws: int = 1, temperature: float | None = None
) -> Setup:
    """What answers a job in which all experts are asked everything."""
    composition = Everyone(experts.names, draws, temperature)

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        picks = tuple(Pick(name) for name in experts.names)
        return [Decision(one.id, picks, picks[0].expert, {}, "everyone", {}, "") for one in queries]

    about = {
        "experts": identities(experts),
        "generate": spec.generate.model_dump(mode="json"),
        "draws": composition.draws,
        "temperature": composition.temperature,
    }
    return Setup(experts, composition, route, False, defaults_of(spec), canonical_hash(about))
