"""Tasks as what a search maximises: their rows in two halves, one to choose by and one that no candidate sees."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.data.rows import digests_of
from mixmerge.engine.calibration_data import identity as shown
from mixmerge.engines.local import Dtype
from mixmerge.errors import Fault, MixmergeError
from mixmerge.evaluate.leaks import Made, leak_faults, read_made, used_rows
from mixmerge.evaluate.models import evaluate_models
from mixmerge.evaluate.task_file import EvalTask
from mixmerge.searching.search import Part

_LEAST = 2  # rows of a part


class TaskScorer:
    """Scores of model folders on tasks.

    A row belongs to the test part by the hash of what the model is shown, so equal questions are in one part and new
    rows move none.

    Args:
        tasks: with their rows.
        held_out: share of the rows that only the start and the best candidate are scored on, above 0, below 1.
        experts: name -> model, whose heads tasks of ``accuracy`` name.
        transductive: score rows that a merge has used.
        tuned_on: digests of rows that the recipe was chosen by before: not for the test part.
        dtype, device, batch_tokens: of the models.

    Raises:
        MixmergeError: a share out of range, a task with fewer than two rows in a part, or one with test rows that
            the recipe was chosen by.
    """

    def __init__(
        self,
        tasks: Sequence[EvalTask],
        *,
        held_out: float = 0.5,
        experts: Mapping[str, str] | None = None,
        transductive: bool = False,
        tuned_on: Sequence[str] = (),
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
    ) -> None:
        if not 0 < held_out < 1:
            raise MixmergeError(Fault("held_out", f"is {held_out:g}", "Above 0, below 1"))
        self.parts: dict[Part, tuple[EvalTask, ...]] = {
            "dev": tuple(_part(task, held_out, test=False) for task in tasks),
            "test": tuple(_part(task, held_out, test=True) for task in tasks),
        }
        faults = [
            Fault(f"task {task.name}", f"has {len(task.rows)} rows for {part}", f"{_LEAST} or more")
            for part, chosen in self.parts.items()
            for task in chosen
            if len(task.rows) < _LEAST
        ]
        if not transductive:
            before = Made(rows=frozenset(tuned_on))
            faults += leak_faults("recipe", used_rows(before, self.parts["test"]), self.parts["test"])
        if faults:
            raise MixmergeError(faults)
        self._experts, self._transductive = dict(experts or {}), transductive
        self._dtype, self._device, self._batch_tokens = dtype, device, batch_tokens

    @property
    def identity(self) -> str:
        told = [
            [task.spec.model_dump(mode="json"), shown(task.rows)]
            for tasks in self.parts.values()
            for task in tasks
        ]
        return canonical_hash([told, self._dtype, self._device, self._batch_tokens])

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """What the rows of the development part are known by."""
        return tuple(digests_of(row for task in self.parts["dev"] for row in task.rows))

    def rows(self, folder: Path, part: Part) -> Mapping[str, NDArray[np.float64]]:
        """Scores of every row of a part, by task.

        Raises:
            MixmergeError: the merge has used rows of either part: that of the test part is known before the first
                candidate is scored.
        """
        made = read_made(folder)
        if not (self._transductive or made.transductive):
            faults = [
                fault
                for tasks in self.parts.values()
                for fault in leak_faults("recipe", used_rows(made, tasks), tasks)
            ]
            if faults:
                raise MixmergeError(faults)
        report = evaluate_models(
            {"candidate": str(folder)},
            tasks=self.parts[part],
            transductive=self._transductive,
            resamples=100,
            dtype=self._dtype,
            device=self._device,
            batch_tokens=self._batch_tokens,
        )
        answers = report.row("candidate").answers
        return {name: np.asarray(scores.scores, np.float64) for name, scores in answers.items()}


def _part(task: EvalTask, held_out: float, *, test: bool) -> EvalTask:
    rows = tuple(row for row in task.rows if (_share(row.digest) < held_out) == test)
    return dataclasses.replace(task, rows=rows)


def _share(digest: str) -> float:
    """A number in [0, 1) that the hash gives; another than samplers take from it."""
    return int.from_bytes(hashlib.blake2b(digest.encode(), digest_size=8, person=b"search").digest()) / 2**64
