"""What an evaluation of routers may be told, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from mixmerge.decision.policies import Policy
from mixmerge.errors import Fault
from mixmerge.evaluate.intervals import LEVEL
from mixmerge.evaluate.scored import Chooser

RESAMPLES = 2000
DRAWS = 20


@dataclass(frozen=True)
class EvaluationOptions:
    """How routers are compared on outcomes.

    Args:
        policy: turns scores into picks; the best expected score by default, ties to the cheaper.
        against: names of rows that all routers are compared with, beside best single and random. Routers by the
            prompt's length (kind ``length``) always are among them.
        task: column of the metadata with the tasks, for their oracle.
        strong: with two experts, the one whose calls are counted; by default the best single.
        seed: of resamples and random choices.
        resamples: 100 or more.
        level: of the intervals, above 0 and below 1.
        draws: of the random choice, 2 or more.
        output_tokens: of an answer, 0 or more, for experts that have a price and no known costs: theirs are estimated,
            and the report says so. ``mixmerge.routers.costs.ANSWER_TOKENS`` by default.
        allow_trained: evaluate on queries that were fitted on too, with a loud warning in the report.
    """

    policy: Chooser = field(default_factory=Policy)
    against: tuple[str, ...] = ()
    task: str = "task"
    strong: str | None = None
    seed: int = 0
    resamples: int = RESAMPLES
    level: float = LEVEL
    draws: int = DRAWS
    output_tokens: float | None = None
    allow_trained: bool = False

    def faults(self) -> list[Fault]:
        """Numbers that are out of range."""
        answer = 0.0 if self.output_tokens is None else self.output_tokens
        wrong = [
            ("resamples", self.resamples, self.resamples >= 100, "100 or more"),
            ("level", self.level, 0 < self.level < 1, "Above 0 and below 1"),
            ("draws", self.draws, self.draws >= 2, "2 or more"),
            ("output_tokens", answer, 0 <= answer < float("inf"), "0 or more"),
        ]
        return [Fault(name, f"is {value}", allowed) for name, value, right, allowed in wrong if not right]
