"""One expert answers while it reads the latents of the others that were picked, its peers.

Source: Mixture of Thoughts (arXiv 2509.21164), section on inference as summarised there: peers first, then the primary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mixmerge.aggregate.asking import order_of, picks_of, settle, unanswered
from mixmerge.aggregate.records import Ask, Composition, Question, Said, Settled
from mixmerge.decision.records import Decision


@dataclass(frozen=True)
class LatentAnswer(Composition):
    """The primary answers, and reads what its peers think of the same prompt. Who is picked alone answers alone.

    Gates are the picks' weights as shares of 1; picks that weigh nothing together have equal shares. Where a peer
    gives no latents there is no answer: that of another set of experts would be another mixture's.

    Args:
        together: the experts are in memory together, and peers read along by themselves: they offer nothing before.
    """

    together: bool = False

    def first(self, question: Question) -> tuple[Ask, ...]:
        gates = _gates(question)
        primary, *peers = gates
        offers = () if self.together else tuple(Ask(peer, offers=True) for peer in peers)
        return (*offers, Ask(primary, reads=tuple((peer, gates[peer]) for peer in peers)))

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        answer = said[0][-1]
        gates = _gates(question)
        reason = {"kind": "latent", "primary": answer.ask.expert, "gates": gates}
        if answer.fault is not None:
            return unanswered(said, reason)
        return settle(answer, 0, [[answer]], reason)


def _gates(question: Question) -> dict[str, float]:
    """The same of a question, which somebody is picked for."""
    picks_of(question)
    return gates_of(question.decision)


def gates_of(decision: Decision) -> dict[str, float]:
    """Expert -> its gate, the primary first, then the others as they were picked; they add up to 1.

    Args:
        decision: one that picks somebody.
    """
    names = order_of(decision)
    weights = dict.fromkeys(names, 0.0)
    for pick in decision.picks:
        weights[pick.expert] += max(0.0, pick.weight)
    whole = math.fsum(weights.values())
    return {name: weight / whole if whole > 0 else 1 / len(names) for name, weight in weights.items()}
