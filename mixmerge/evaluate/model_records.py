"""What an evaluation of models finds. M models, T tasks, Q rows of a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.evaluate.files import Written, row_of
from mixmerge.evaluate.intervals import Comparison, Estimate
from mixmerge.evaluate.records import plain

if TYPE_CHECKING:
    from rich.table import Table

    from mixmerge.evaluate.scoring_tasks import TaskScores

Role = Literal["merge", "expert", "base"]


@dataclass(frozen=True)
class TaskInfo:
    """A task of the report.

    Args:
        name: unique.
        metric: its name.
        rows: how many, Q.
        expert: whose task it is; None if it is nobody's.
        held_out: no expert learned it.
    """

    name: str
    metric: str
    rows: int
    expert: str | None
    held_out: bool


@dataclass(frozen=True, eq=False)
class ModelRow:
    """A model of the report.

    Args:
        name: unique.
        role: ``merge``: what is judged; ``expert``; ``base``.
        scores: task -> mean score.
        retained: task -> score as a share of its own expert's; tasks whose expert is not there or scores nothing
            are left out.
        average: over the tasks that are not held out, or over all where all are.
        retained_average: mean of ``retained``; None without experts.
        worst: the task with the lowest ``retained``, and that; None without experts.
        held_out: mean over the held-out tasks; None without any.
        over_best: ``average`` minus that of the best single expert, on the same rows; None without experts and for
            that expert itself.
        storage: bytes of weights that serving it takes, its base's included where it is an adapter.
        speed: tokens that were generated or scored in a second.
        flops: floating-point operations of a token behind 1,024 others (``mixmerge.evaluate.flops``); NaN if they are
            not known.
        method: that merged it, as its manifest says; None for other models.
        seed: of that merge.
        transductive: tasks with rows that its merge has used.
        answers: task -> row by row.
    """

    name: str
    role: Role
    scores: Mapping[str, Estimate]
    retained: Mapping[str, Estimate]
    average: Estimate
    retained_average: Estimate | None
    worst: tuple[str, Estimate] | None
    held_out: Estimate | None
    over_best: Comparison | None
    storage: int
    speed: float
    flops: float
    method: str | None
    seed: int | None
    transductive: tuple[str, ...]
    answers: Mapping[str, TaskScores]


@dataclass(frozen=True)
class Seeds:
    """Merges of one recipe that differ in its seed alone.

    Args:
        models: their names.
        seeds: of each.
        mean, deviation: of their averages; the deviation is that of a sample.
        low, high: the extremes.
    """

    models: tuple[str, ...]
    seeds: tuple[int, ...]
    mean: float
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class Advice:
    """What to try next.

    Args:
        text: in words.
        why: the figures it follows from.
        source: who says so.
    """

    text: str
    why: str
    source: str


@dataclass(frozen=True, eq=False)
class ModelReport(Written):
    """Models on tasks, and what they stand beside.

    Args:
        tasks: T, in order.
        rows: the models judged, then the experts, then the base.
        best_single: the expert with the highest average; None without experts.
        spreads: of merges that differ in their seed alone.
        advice: what to try next, if it was asked for.
        harness: model -> task -> figures of lm-evaluation-harness, as it names them.
        notes: what was left out or chosen; for every reader.
        warnings: what makes figures doubtful.
        seed, resamples, level: of the intervals.
    """

    tasks: tuple[TaskInfo, ...]
    rows: tuple[ModelRow, ...]
    best_single: str | None
    spreads: tuple[Seeds, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    seed: int
    resamples: int
    level: float
    advice: tuple[Advice, ...] = ()
    harness: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    def row(self, name: str) -> ModelRow:
        """The row of that name.

        Raises:
            MixmergeError: there is none.
        """
        return row_of(self.rows, name)

    def as_dict(self) -> dict[str, Any]:
        """JSON values, without the single rows; null stands for what is not known."""
        rows = [{key: one for key, one in vars(row).items() if key != "answers"} for row in self.rows]
        found: dict[str, Any] = plain({**vars(self), "rows": rows})
        return found

    def render(self, title: str = "models") -> Table:
        """For people: a table for the terminal."""
        from mixmerge.evaluate.model_tables import render

        return render(self, title)

    def records(self) -> Iterator[dict[str, Any]]:
        """One for every model, task and row: the score, and what was given."""
        for row in self.rows:
            for task, answers in row.answers.items():
                for at, (score, given) in enumerate(zip(answers.scores, answers.given, strict=True)):
                    yield {"model": row.name, "task": task, "row": at, "score": float(score), "given": given}

    def page(self, *, title: str | None = None) -> str:
        """The report with its plots as HTML that needs no other file.

        Raises:
            DependencyError: matplotlib is not installed.
        """
        from mixmerge.evaluate.model_report import to_html

        return to_html(self, title=title or "Models")
