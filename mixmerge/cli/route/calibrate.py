"""``mixmerge route calibrate``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.route.options import (
    AbstainBelow,
    AllowTrained,
    Data,
    Fallback,
    Json,
    Kind,
    PolicyText,
    Prices,
    Quiet,
    RouterDir,
    Seed,
    Unseen,
)
from mixmerge.cli.route.parsing import policy_from, unseen_rows
from mixmerge.cli.show import emit_json, table, warn

if TYPE_CHECKING:
    from mixmerge.decision.calibration import Calibrated
    from mixmerge.decision.records import Scores
    from mixmerge.outcomes.table import OutcomeTable


def calibrate(
    router: RouterDir,
    data: Data,
    budget: Annotated[
        float | None, typer.Option(help="Keep the mean dollars a query within this.", show_default=False)
    ] = None,
    strong_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of queries for the stronger expert.", show_default=False),
    ] = None,
    recovered: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the gap to the stronger one to win.", show_default=False),
    ] = None,
    min_score: Annotated[
        float | None,
        typer.Option(help="Abstain so that what is answered scores this on average.", show_default=False),
    ] = None,
    strong: Annotated[
        str | None, typer.Option(help="Of two experts; by default the best.", show_default=False)
    ] = None,
    weak: Annotated[
        str | None, typer.Option(help="The other; by default the cheapest.", show_default=False)
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of bounds and intervals.")] = 0.95,
    bound: Annotated[str, typer.Option(help="Of a budget: normal or bernstein.")] = "normal",
    policy: PolicyText = None,
    fallback: Fallback = None,
    abstain_below: AbstainBelow = None,
    unseen: Unseen = False,
    allow_trained: AllowTrained = False,
    prices: Prices = None,
    kind: Kind = None,
    seed: Seed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the numbers of a policy on outcomes, for ask to use.

    One goal: --budget, --strong-share, --recovered or --min-score. Writes
    policy.json into the router's folder; one that is there is replaced.
    """
    from mixmerge.decision.files import write_policy
    from mixmerge.decision.records import queries_of
    from mixmerge.outcomes.table import OutcomeTable
    from mixmerge.routers.base import Router

    goal = _Goal(
        budget=budget,
        strong_share=strong_share,
        recovered=recovered,
        min_score=min_score,
        strong=strong,
        weak=weak,
        policy=policy,
        fallback=fallback,
        abstain_below=abstain_below,
        confidence=confidence,
        bound=bound,
        seed=seed,
    )
    goal.check()
    loaded = Router.load(router)
    read = OutcomeTable.read(data, kind=kind, prices=prices).only(loaded.experts)
    rows = unseen_rows(read, {"router": loaded}, unseen=unseen, allow_trained=allow_trained)
    if not quiet and allow_trained:
        warn(["queries that were fitted on are used: scores look surer on them than on others"])
    found = goal.reached(loaded.score(queries_of(rows)), rows)
    path = write_policy(found, router, router=loaded.version)
    if json:
        emit_json({"path": str(path), **found.model_dump(mode="json", exclude_none=True)})
    else:
        print(path)
        _print(found)


@dataclass(frozen=True)
class _Goal:
    """What is to be reached, as the options of these names say."""

    budget: float | None
    strong_share: float | None
    recovered: float | None
    min_score: float | None
    strong: str | None
    weak: str | None
    policy: str | None
    fallback: str | None
    abstain_below: float | None
    confidence: float
    bound: str
    seed: int

    def check(self) -> None:
        """One goal, and no option that it would pass over."""
        from mixmerge.errors import Fault, MixmergeError

        goals = {
            "--budget": self.budget,
            "--strong-share": self.strong_share,
            "--recovered": self.recovered,
            "--min-score": self.min_score,
        }
        given = [name for name, value in goals.items() if value is not None]
        if len(given) != 1:
            where, what = " and ".join(given) or "calibrate", f"{len(given) or 'no'} goals are given"
            raise MixmergeError(Fault(where, what, f"One of {', '.join(goals)}"))
        (goal,) = given
        used = {
            "--policy": (self.policy, ("--min-score",)),
            "--strong": (self.strong, ("--strong-share", "--recovered")),
            "--weak": (self.weak, ("--strong-share", "--recovered")),
            "--abstain-below": (self.abstain_below, ("--budget",)),
            "--fallback": (self.fallback, ("--budget", "--min-score")),
        }
        idle = [name for name, (value, by) in used.items() if value is not None and goal not in by]
        if idle:
            raise MixmergeError(Fault(name, f"{goal} does not use it", run="Leave it out") for name in idle)

    def reached(self, scores: Scores, rows: OutcomeTable) -> Calibrated:
        """The policy that reaches it on these outcomes."""
        from mixmerge.decision.calibration import calibrate_abstain, calibrate_threshold

        if self.budget is not None:
            return self._within_budget(scores, rows, self.budget)
        if self.min_score is not None:
            base = policy_from(self.policy, fallback=self.fallback)
            return calibrate_abstain(
                scores, rows, target=self.min_score, policy=base, confidence=self.confidence
            )
        strong, weak = _pair(rows, self.strong, self.weak)
        return calibrate_threshold(
            scores,
            strong,
            weak,
            share=self.strong_share,
            recovered=self.recovered,
            table=rows,
            confidence=self.confidence,
        )

    def _within_budget(self, scores: Scores, rows: OutcomeTable, budget: float) -> Calibrated:
        from mixmerge.decision.budgets import BOUNDS, calibrate_budget
        from mixmerge.errors import Fault, MixmergeError
        from mixmerge.registry import choices

        bound = next((name for name in BOUNDS if name == self.bound), None)
        if bound is None:
            raise MixmergeError(Fault("--bound", f"is {self.bound!r}", choices(self.bound, list(BOUNDS))))
        return calibrate_budget(
            scores,
            rows,
            budget=budget,
            confidence=self.confidence,
            bound=bound,
            fallback=self.fallback,
            abstain_below=self.abstain_below,
            seed=self.seed,
        )


def _pair(rows: OutcomeTable, strong: str | None, weak: str | None) -> tuple[str, str]:
    """The two experts of a threshold: the best on average, and the other one or the cheapest."""
    import numpy as np

    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.evaluate.baselines import best_single_of
    from mixmerge.outcomes.table import column_means

    if strong is None:
        others = [name for name in rows.experts if name != weak]
        if not others:
            raise MixmergeError(Fault("--strong", "a threshold needs two experts", "One more"))
        strong = others[best_single_of(rows.only(others))]
    if weak is None:
        others = [name for name in rows.experts if name != strong]
        if not others:
            raise MixmergeError(Fault("--weak", "a threshold needs two experts", "One more"))
        if len(others) == 1:
            return strong, others[0]
        costs = rows.only(others).costs()
        mean = np.array([np.nan]) if costs is None else column_means(costs)
        if np.isnan(mean).any():
            what = f"which of {', '.join(others)} is the cheapest is not known"
            raise MixmergeError(Fault("--weak", what, "A name", "Or give --prices"))
        weak = others[int(mean.argmin())]
    return strong, weak


def _print(found: Calibrated) -> None:
    rows = [("goal", found.goal), ("policy", found.policy.describe()), ("rows", f"{found.rows:,}")]
    if found.score is not None:
        interval = (
            ""
            if found.score_low is None
            else f" [{found.score_low:.4g}, {found.score_high:.4g}] of {found.scored:,}"
        )
        rows.append(("mean score", f"{found.score:.4g}{interval}"))
    if found.cost is not None:
        rows.append(("mean cost", f"${found.cost:.4g}"))
    if found.cost_bound is not None:
        rows.append(("mean cost at most", f"${found.cost_bound:.4g}: {found.bound}"))
    rows.append(("answered", f"{found.answered:.1%}"))
    rows += [(f"first pick {name}", f"{share:.1%}") for name, share in found.shares.items() if share]
    table("calibrated", ("what", "value"), rows, text=(0, 1))
