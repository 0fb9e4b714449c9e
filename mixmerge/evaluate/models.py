"""Models on tasks: who is asked what, and the report. ``mixmerge eval`` and ``mixmerge.evaluate_models``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixmerge.dynamic.engine import DynamicEngine
from mixmerge.dynamic.task_engine import TaskEngine
from mixmerge.engines.base import Engine
from mixmerge.engines.local import Dtype, TransformersEngine
from mixmerge.errors import MixmergeError
from mixmerge.evaluate.advice import Facts, advise, installed_methods
from mixmerge.evaluate.flops import CONTEXT
from mixmerge.evaluate.harness import Figures, run_lm_eval
from mixmerge.evaluate.heads import HeadSource, score_classes
from mixmerge.evaluate.intervals import LEVEL
from mixmerge.evaluate.mixtures import MixtureEngine
from mixmerge.evaluate.model_entries import Entry, Models
from mixmerge.evaluate.model_measuring import Judged, info, means_of, measure, spreads_of
from mixmerge.evaluate.model_records import ModelReport
from mixmerge.evaluate.options import RESAMPLES
from mixmerge.evaluate.preparing import Asked, Prepared, prepare
from mixmerge.evaluate.sandbox import Limits
from mixmerge.evaluate.scoring_tasks import TaskScores, score_task
from mixmerge.evaluate.task_file import EvalTask
from mixmerge.machine import cores

Progress = Callable[[str, int, int], None]  # (model, tasks done, tasks in all)
_ADAPTER = "adapter"  # what engines call it
_BASE = "{}: lm-evaluation-harness names no expert, so what it scores is the base without masks"
_UNCHECKED = "{}: the rows of lm-evaluation-harness are not held against those its merge has used"


def evaluate_models(
    models: Models,
    *,
    tasks: str | Path | Mapping[str, Any] | Sequence[EvalTask],
    experts: Models = (),
    base: str | Path | None = None,
    transductive: bool = False,
    limit: int | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    dtype: Dtype = "auto",
    device: str = "cpu",
    batch_tokens: int = 8192,
    limits: Limits | None = None,
    recommend: bool = False,
    calibration: str | Path | None = None,
    lm_eval: Sequence[str] = (),
    lm_eval_path: str | Path | None = None,
    task_id: bool = False,
    progress: Progress | None = None,
) -> ModelReport:
    """Ask models the questions of tasks, and compare them with the experts they are made of.

    Answers are greedy, so that a second run gives the same ones. Intervals are bootstraps over the rows of every
    task, drawn for all models together.

    Args:
        models: what is judged: folders, hub ids or ``BASE+ADAPTER``, and YAMLs or fitted folders of mixtures whose
            experts answer as one, which are asked for texts alone; a mapping names them.
        tasks: a tasks file, its content, or tasks that have been read.
        experts: name -> model; names are what a task's ``expert`` and ``head`` say. Of a list, the last parts of
            the paths are the names.
        base: that the experts are fine-tuned from.
        transductive: score rows that a merge has used; the report says so.
        limit: at most so many rows of each task, the first ones; 1 or more.
        seed, resamples, level: of the intervals; 100 resamples or more, a level above 0 and below 1.
        dtype, device, batch_tokens: as ``TransformersEngine`` takes them; classifiers are float32 for ``auto``.
        limits: of programs, for ``pass@1``.
        recommend: say which method to try next; takes experts and the base.
        calibration: data that a next merge could be calibrated on, for ``recommend``.
        lm_eval: tasks of lm-evaluation-harness that are run on the models judged; then ``tasks`` may be empty.
        lm_eval_path: a folder with such tasks.
        task_id: networks with a gate are told which expert a task belongs to, and it alone answers; the report says so.
        progress: called when a model is done with a task.

    Raises:
        MixmergeError: no model or task, an unknown expert, rows that a merge has used: all at once, before a model is
            asked; a model that does not load; the harness failed, and there are no ``tasks`` (else it is a warning).
    """
    found = prepare(
        Asked(
            models, tasks, experts, base, transductive, limit, resamples, level, recommend, calibration,
            lm_eval, lm_eval_path,
        )
    )  # fmt: skip
    loading = _Loading(dtype, device, batch_tokens, task_id)
    judged = _judged(found.entries, found.tasks, found.used, loading, limits, progress)
    report = _report(found.tasks, judged, found.used, resamples=resamples, seed=seed, level=level)
    told = [entry.name for entry in found.entries if task_id and entry.network]
    if told:
        note = f"Told which expert each task belongs to, which then answers alone: {', '.join(told)}."
        report = replace(report, notes=(*report.notes, note))
    report = replace(report, notes=(*report.notes, *_told(found.entries, found.tasks)))
    wholes = [entry.name for entry in found.entries if entry.mixture is not None]
    if wholes:
        note = f"Mixtures, whose experts answer as one in the types their YAML says: {', '.join(wholes)}."
        report = replace(
            report, notes=(*report.notes, f"{note} Their tokens/s has the loading of experts in it.")
        )
    if found.deltas is not None:
        facts = Facts(report, found.deltas, found.may_calibrate, installed_methods())
        report = replace(report, advice=advise(facts))
    if found.harness is None:
        return report
    harness, warnings = _of_harness(found, limit=limit, device=device, dtype=dtype, seed=seed)
    return replace(report, harness=harness, warnings=(*report.warnings, *warnings))


def _told(entries: Sequence[Entry], tasks: Sequence[EvalTask]) -> list[str]:
    """Which models are told what they are asked, by masks that a task's expert picks or by being made for one task."""
    masked = [entry for entry in entries if entry.masks]
    notes = []
    if masked:
        names = ", ".join(entry.name for entry in masked)
        notes.append(f"Told which expert each task belongs to, whose masks then make the model: {names}.")
    for entry in masked:
        without = [task.name for task in tasks if task.spec.expert not in entry.masks]
        if without:
            notes.append(f"{entry.name} has no masks for {', '.join(without)}: its base answers there.")
    for entry in entries:
        expert = entry.made.task
        if expert is not None:
            notes.append(f"{entry.name} is made for the task of {expert}, and so is told which one that is.")
    return notes


def _of_harness(
    found: Prepared, *, limit: int | None, device: str, dtype: Dtype, seed: int
) -> tuple[dict[str, Figures], list[str]]:
    """Its figures and what to say of them; a harness that fails does not take the answers to other tasks with it."""
    merges = [entry for entry in found.entries if entry.role == "merge"]
    if found.harness is None:
        return {}, []
    try:
        figures = run_lm_eval(merges, found.harness, limit=limit, device=device, dtype=dtype, seed=seed)
    except MixmergeError as error:
        if not found.tasks:
            raise
        return {}, [str(fault) for fault in error.faults]
    return figures, [
        *(_UNCHECKED.format(entry.name) for entry in merges if entry.made.rows),
        *(_BASE.format(entry.name) for entry in merges if entry.masks),
    ]


@dataclass(frozen=True)
class _Loading:
    """How models are loaded, as ``TransformersEngine`` takes it; ``task_id`` as in ``evaluate_models``."""

    dtype: Dtype
    device: str
    batch_tokens: int
    task_id: bool = False

    def alone(self, entry: Entry, task: EvalTask) -> str | None:
        """The expert, adapter or task that answers; None for the model itself, its gate, or the base of masks."""
        if entry.adapter is not None:
            return _ADAPTER
        if entry.masks:
            return task.spec.expert if task.spec.expert in entry.masks else None
        return task.spec.expert if entry.network and self.task_id else None

    def engine(self, entry: Entry) -> Engine:
        if entry.mixture is not None:
            return MixtureEngine(
                entry.mixture, device=self.device, batch_tokens=self.batch_tokens, name=entry.name
            )
        if entry.network or entry.masks:
            kind = DynamicEngine if entry.network else TaskEngine
            return kind(
                str(entry.folder),
                dtype=self.dtype,
                device=self.device,
                batch_tokens=self.batch_tokens,
                name=entry.name,
            )
        return TransformersEngine(
            str(entry.folder),
            adapters={} if entry.adapter is None else {_ADAPTER: str(entry.adapter)},
            dtype=self.dtype,
            device=self.device,
            batch_tokens=self.batch_tokens,
            name=entry.name,
        )


def _judged(
    entries: Sequence[Entry],
    tasks: Sequence[EvalTask],
    used: Mapping[str, Mapping[str, int]],
    loading: _Loading,
    limits: Limits | None,
    progress: Progress | None,
) -> list[Judged]:
    """Every model on every task; one model is in memory at a time."""
    heads = {one.name: HeadSource(one.name, one.folder) for one in entries if one.role == "expert"}
    judged = []
    # What classifies and what writes are loaded apart.
    order = sorted(tasks, key=lambda task: task.metric.asked == "class")
    for entry in entries:
        answers: dict[str, TaskScores] = {}
        engine = loading.engine(entry)
        try:
            for task in order:
                alone = loading.alone(entry, task)
                if task.metric.asked == "class":
                    engine.unload()
                    found = score_classes(
                        entry.folder, task, heads,
                        name=entry.name, device=loading.device, dtype=loading.dtype, alone=alone,
                    )  # fmt: skip
                else:
                    found = score_task(engine, task, adapter=alone, limits=limits, workers=cores())
                answers[task.name] = found
                if progress is not None:
                    progress(entry.name, len(answers), len(tasks))
        finally:
            engine.unload()
        ordered = {task.name: answers[task.name] for task in tasks}
        judged.append(
            Judged(
                entry.name,
                entry.role,
                ordered,
                entry.made,
                entry.storage,
                tuple(used[entry.name]),
                entry.flops,
            )
        )
    return judged


def _report(
    tasks: Sequence[EvalTask],
    judged: Sequence[Judged],
    used: Mapping[str, Mapping[str, int]],
    *,
    resamples: int,
    seed: int,
    level: float,
) -> ModelReport:
    if not tasks:
        return ModelReport((), (), None, (), (), (), seed, resamples, level)
    means = means_of(tasks, judged, resamples=resamples, seed=seed)
    rows, best = measure(tasks, judged, means, level=level)
    return ModelReport(
        tasks=tuple(map(info, tasks)),
        rows=rows,
        best_single=best,
        spreads=spreads_of(rows, {one.name: one.made for one in judged}),
        notes=_notes(tasks, judged, best),
        warnings=_warnings(used, tasks),
        seed=seed,
        resamples=resamples,
        level=level,
    )


def _notes(tasks: Sequence[EvalTask], judged: Sequence[Judged], best: str | None) -> tuple[str, ...]:
    found = [note for model in judged for one in model.answers.values() for note in one.notes]
    notes = [
        "Answers are greedy: a second run gives the same. Tokens in a second are those generated, or of the choices "
        "scored, on this machine.",
        "FLOPs per token: 2 x the parameters a token is multiplied with (of MoE layers the experts it is sent to), and "
        f"the attention to {CONTEXT:,} tokens before it.",
        *dict.fromkeys(found),
    ]
    if best is not None:
        notes.append(f"Best single expert: {best}, chosen on the rows shown, which favours it.")
    without = [task.name for task in tasks if task.spec.expert is None and not task.spec.held_out]
    if best is not None and without:
        notes.append(f"No share is retained of {', '.join(without)}: no expert is named for it.")
    own = {model.name: model for model in judged if model.role == "expert"}
    nothing = [
        task.name
        for task in tasks
        if task.spec.expert in own and not own[task.spec.expert].answers[task.name].scores.any()
    ]
    if nothing:
        notes.append(f"No share is retained of {', '.join(nothing)}: its own expert scores nothing.")
    told = [task.name for task in tasks if task.metric.asked == "class"]
    if told:
        notes.append(f"Every model is told which task it answers, by the head, in {', '.join(told)}.")
    return tuple(notes)


def _warnings(used: Mapping[str, Mapping[str, int]], tasks: Sequence[EvalTask]) -> tuple[str, ...]:
    sizes = {task.name: len(task.rows) for task in tasks}
    found = [
        f"{model}: transductive: its merge has used {count:,} of the {sizes[name]:,} rows of {name}"
        for model, counts in used.items()
        for name, count in counts.items()
    ]
    few = [task.name for task in tasks if len(task.rows) < 30]
    if few:
        found.append(f"fewer than 30 rows: {', '.join(few)}; intervals of so few are too narrow")
    return tuple(found)
