"""Everything that is read and held against each other before a model is asked: all that is wrong is said at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixmerge.data.rows import digests_of, read_rows
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.evaluate.advice import Deltas, deltas_of
from mixmerge.evaluate.harness import Harness, find_harness
from mixmerge.evaluate.heads import HeadSource, head_faults
from mixmerge.evaluate.leaks import leak_faults, used_rows
from mixmerge.evaluate.metrics import text_metric
from mixmerge.evaluate.mixtures import TEXTS
from mixmerge.evaluate.model_entries import Entry, Models, entries_of, named
from mixmerge.evaluate.task_file import EvalTask, read_tasks
from mixmerge.registry import choices

Tasks = str | Path | Mapping[str, Any] | Sequence[EvalTask]


@dataclass(frozen=True)
class Asked:
    """What an evaluation is asked for; arguments as those of ``evaluate_models``."""

    models: Models
    tasks: Tasks
    experts: Models = ()
    base: str | Path | None = None
    transductive: bool = False
    limit: int | None = None
    resamples: int = 0
    level: float = 0.0
    recommend: bool = False
    calibration: str | Path | None = None
    lm_eval: Sequence[str] = ()
    lm_eval_path: str | Path | None = None


@dataclass(frozen=True)
class Prepared:
    """What can be asked, and of whom.

    Args:
        entries: the models judged, the experts, the base.
        tasks: with their rows.
        used: model -> task -> how many of its rows the model's merge has used.
        may_calibrate: there are data that a next merge could be calibrated on.
        deltas: how the experts differ, if advice is asked for.
        harness: of lm-evaluation-harness, if it is asked for.
    """

    entries: tuple[Entry, ...]
    tasks: tuple[EvalTask, ...]
    used: Mapping[str, Mapping[str, int]]
    may_calibrate: bool = False
    deltas: Deltas | None = None
    harness: Harness | None = None


def prepare(asked: Asked) -> Prepared:
    """Read tasks and manifests, find models, and measure the experts for advice.

    Raises:
        MixmergeError: everything that forbids the evaluation; what cannot be said without the rest is left out.
    """
    faults: list[Fault] = []
    harness: Harness | None = None
    tasks: tuple[EvalTask, ...] = ()
    may_calibrate = False
    with collecting(faults):
        harness = find_harness(asked.lm_eval, asked.lm_eval_path)
    with collecting(faults):
        tasks = _tasks(asked)
    entries = entries_of(asked.models, asked.experts, asked.base, faults)
    with collecting(faults):
        may_calibrate = _may_calibrate(asked, tasks)
    used = _check(asked, entries, tasks, faults)
    if faults:
        raise MixmergeError(faults)
    deltas = None
    if asked.recommend:
        refs = [entry.ref for entry in entries if entry.role == "expert"]
        deltas = deltas_of(refs, next(entry.ref for entry in entries if entry.role == "base"))
    return Prepared(tuple(entries), tasks, used, may_calibrate, deltas, harness)


def _tasks(asked: Asked) -> tuple[EvalTask, ...]:
    tasks, limit = asked.tasks, asked.limit
    if limit is not None and limit < 1:
        raise MixmergeError(Fault("limit", f"is {limit}", "1 or more"))
    if isinstance(tasks, str | Path | Mapping):
        return read_tasks(tasks, limit=limit)
    read = tuple(replace(task, rows=task.rows[:limit]) for task in tasks)
    if not read and not asked.lm_eval:
        raise MixmergeError(Fault("tasks", "none is given", "A tasks file, or one task with its metric"))
    return read


def _may_calibrate(asked: Asked, tasks: Sequence[EvalTask]) -> bool:
    """Whether there is data to calibrate on that is not what is scored.

    Raises:
        MixmergeError: advice is asked for without experts, base or tasks, or the data are the tasks' own rows.
    """
    if not asked.recommend:
        if asked.calibration is not None:
            raise MixmergeError(Fault("--calibration", "goes with --recommend"))
        return False
    if not asked.experts or asked.base is None or not asked.tasks:
        what = "needs the experts, their base and tasks: what is retained is a share of the experts' scores"
        raise MixmergeError(Fault("--recommend", what, run="Name them by --experts, --base and --tasks"))
    if asked.calibration is None:
        return False
    rows = set(digests_of(read_rows(asked.calibration)))
    faults = [
        Fault("--calibration", f"{count:,} of its rows are rows of task {task.name}", run="Keep them apart")
        for task in tasks
        if (count := sum(not rows.isdisjoint(row.known_by) for row in task.rows))
    ]
    if faults:
        raise MixmergeError(faults)
    return True


def _check(
    asked: Asked, entries: Sequence[Entry], tasks: Sequence[EvalTask], faults: list[Fault]
) -> dict[str, dict[str, int]]:
    """What settings, tasks and models say of each other; gives model -> task -> rows that its merge has used."""
    if asked.resamples < 100:
        faults.append(Fault("resamples", f"is {asked.resamples}", "100 or more"))
    if not 0 < asked.level < 1:
        faults.append(Fault("level", f"is {asked.level}", "Above 0 and below 1"))
    experts: list[str] = []
    with collecting(faults):
        experts = list(named(asked.experts, where="experts"))
    heads = {entry.name: HeadSource(entry.name, entry.folder) for entry in entries if entry.role == "expert"}
    for task in tasks:
        if task.spec.expert is not None and experts and task.spec.expert not in experts:
            what = f"its expert {task.spec.expert!r} is not among the experts"
            faults.append(Fault(f"task {task.name}", what, choices(task.spec.expert, experts)))
        if task.metric.asked == "text":
            with collecting(faults):
                text_metric(task.metric.name)
        if task.metric.asked == "class" and set(experts) <= set(heads):
            faults += _heads([entry for entry in entries if entry.mixture is None], task, heads)
        if task.metric.asked in ("choices", "class"):
            faults += [_no_text(entry.name, task) for entry in entries if entry.mixture is not None]
    faults += [
        Fault(f"model {entry.name}", "is a mixture, which lm-evaluation-harness cannot run")
        for entry in entries
        if asked.lm_eval and entry.mixture is not None
    ]
    faults += [
        Fault(f"model {entry.name}", "has a bank and a gate, which lm-evaluation-harness cannot run")
        for entry in entries
        if asked.lm_eval and entry.role == "merge" and entry.network
    ]
    used = {entry.name: used_rows(entry.made, tasks) for entry in entries}
    for entry in entries:
        if not (asked.transductive or entry.made.transductive):
            faults += leak_faults(entry.name, used[entry.name], tasks)
    return used


def _no_text(model: str, task: EvalTask) -> Fault:
    """A task that a mixture cannot be asked."""
    wanted = "how likely each choice is" if task.metric.asked == "choices" else "for a class of one head"
    what = f"{model} is a mixture, which generates; {task.metric.name} asks {wanted}"
    return Fault(f"task {task.name}", what, TEXTS, "Leave the task or the mixture out")


def _heads(entries: Sequence[Entry], task: EvalTask, heads: Mapping[str, HeadSource]) -> list[Fault]:
    """What keeps models from answering a task with its head; the same of several is said once."""
    found: list[Fault] = []
    for entry in entries:
        if entry.adapter is not None:
            what = f"{entry.name} is an adapter, and accuracy takes whole models"
            found.append(Fault(f"task {task.name}", what, run="Merge it into its base: mixmerge merge"))
        else:
            found += [
                fault
                for fault in head_faults(entry.folder, task, heads, name=entry.name)
                if fault not in found
            ]
    return found
