"""Tasks that models are evaluated on: a YAML of data and metrics, read whole before any model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mixmerge.aggregate.extraction import extractor
from mixmerge.data.rows import Row, read_rows
from mixmerge.data.sources import looked_up
from mixmerge.document import Kind, Node, Report, from_data, load, read_file, read_mapping, show, unknown_keys
from mixmerge.document.sections import Strict, read_section
from mixmerge.errors import Fault, MixmergeError
from mixmerge.evaluate.metrics import METRICS, MetricRow
from mixmerge.registry import choices

TASKS = Kind("tasks file", needs="It needs tasks: a list of {name, data, metric}")
_FAULTS = 20


class TaskSpec(Strict):
    """One task of a tasks file.

    Args:
        name: of the task, unique.
        data: rows, as ``mixmerge.data.rows.read_rows`` takes them; a relative path is looked for beside the
            tasks file, then where the command runs.
        metric: a key of ``METRICS``.
        expert: which expert is its own: what a model retains is a share of that one's score.
        head: of ``accuracy``: whose head classifies.
        held_out: no expert was trained on it.
        max_new_tokens: of an answer; by default the metric's.
        stop: texts that end an answer.
        normalise: of ``choice``: what a choice's log-likelihood is divided by.
        extract: a name of ``mixmerge.aggregate.extraction``, such as ``number``: compare what both texts say.
        program: of ``pass@1``: the answer holds a whole program, or continues the prompt.
        split: of the data.
        limit: at most so many rows, the first ones.
        fields: column of a row -> what it is called in the data.
    """

    name: str = Field(min_length=1)
    data: str = Field(min_length=1)
    metric: str
    expert: str | None = None
    head: str | None = None
    held_out: bool = False
    max_new_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[str, ...] = Field(default=(), strict=False)
    normalise: Literal["tokens", "characters", "none"] = "tokens"
    extract: str | None = None
    program: Literal["answer", "continue"] = "answer"
    split: str | None = None
    limit: int | None = Field(default=None, ge=1)
    fields: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class EvalTask:
    """A task with its rows, Q of them."""

    spec: TaskSpec
    rows: tuple[Row, ...]

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def metric(self) -> MetricRow:
        return METRICS[self.spec.metric]

    @property
    def tokens(self) -> int:
        return self.spec.max_new_tokens or self.metric.tokens


def read_tasks(
    source: str | Path | Mapping[str, Any], *, limit: int | None = None, names: tuple[str, ...] = ()
) -> tuple[EvalTask, ...]:
    """Read a tasks file and all its data.

    Args:
        source: a YAML file, or a mapping of the same shape: ``tasks``, a list of mappings with the keys of
            ``TaskSpec``.
        limit: at most so many rows of each task, the first ones.
        names: of the tasks to read; by default all.

    Raises:
        MixmergeError: everything that is wrong with the file, or with the rows, at once.
    """
    specs = _specs(source)
    unknown = [name for name in names if name not in [spec.name for spec in specs]]
    if unknown:
        known = [spec.name for spec in specs]
        raise MixmergeError(
            [Fault("--only", f"no task is called {name!r}", choices(name, known)) for name in unknown]
        )
    folder = None if isinstance(source, Mapping) else Path(source).expanduser().parent
    found: list[EvalTask] = []
    faults: list[Fault] = []
    for spec in specs:
        if names and spec.name not in names:
            continue
        try:
            found.append(_task(spec, folder, limit))
        except MixmergeError as error:
            faults += error.faults
    if faults:
        raise MixmergeError(faults)
    return tuple(found)


def one_task(
    data: str, metric: str, *, expert: str | None = None, head: str | None = None
) -> dict[str, object]:
    """What a tasks file would say of one task, named as its data."""
    name = Path(data).stem or data
    given = {"name": name, "data": data, "metric": metric, "expert": expert, "head": head}
    return {"tasks": [{key: value for key, value in given.items() if value is not None}]}


def _specs(source: str | Path | Mapping[str, Any]) -> list[TaskSpec]:
    report = Report(TASKS)
    name = "tasks" if isinstance(source, Mapping) else str(source)
    if isinstance(source, Mapping):
        root = from_data(source, name=name, report=report)
    else:
        text = read_file(Path(source).expanduser(), name=name, report=report)
        root = None if text is None else load(text, name=name, report=report)
    specs = [] if root is None else _read(root, report)
    faults = report.faults(name)
    if faults:
        raise MixmergeError(faults)
    return specs


def _read(root: Node, report: Report) -> list[TaskSpec]:
    entries = read_mapping(root, report, "tasks")
    if not isinstance(root.value, dict):
        return []
    unknown_keys(entries, ["tasks"], report)
    listed = entries.get("tasks")
    if listed is None or not isinstance(listed.value, tuple) or not listed.value:
        got = "nothing" if listed is None else show(listed.value)
        report.fault(listed or root, f"expected a list of tasks under tasks, got {got}", TASKS.needs)
        return []
    found: dict[str, TaskSpec] = {}
    for node in listed.value:
        spec = read_section(node, TaskSpec, report, what="a task: name, data and metric")
        if spec is None:
            continue
        if spec.name in found:
            report.fault(node, f"a second task is called {spec.name!r}", "Each name once")
        _check(spec, node, report)
        found[spec.name] = spec
    return list(found.values())


def _check(spec: TaskSpec, node: Node, report: Report) -> None:
    """What one key says of another."""
    metric = METRICS.get(spec.metric)
    if metric is None:
        report.fault(node, f"no metric is called {spec.metric!r}", choices(spec.metric, list(METRICS)))
        return
    if metric.asked == "class" and spec.head is None:
        report.fault(node, "accuracy takes a head", "head: the name of the expert whose head classifies")
    if metric.asked != "class" and spec.head is not None:
        report.fault(node, f"{spec.metric} takes no head", "accuracy takes one")
    if spec.held_out and spec.expert is not None:
        report.fault(node, "is held out and has an expert", "One of them: no expert learned a held-out task")
    for column in spec.fields:
        if column not in ROW_COLUMNS:
            report.fault(node, f"fields has no column {column!r}", choices(column, list(ROW_COLUMNS)))
    if spec.extract is not None:
        if spec.metric != "exact":
            report.fault(node, "extract goes with the metric exact")
        try:
            extractor(spec.extract)
        except MixmergeError as error:
            report.take(error, node)


ROW_COLUMNS = ("text", "text_pair", "prompt", "messages", "answer", "choices", "label", "id")


def _task(spec: TaskSpec, folder: Path | None, limit: int | None) -> EvalTask:
    source = spec.data
    least = min((one for one in (spec.limit, limit) if one is not None), default=None)
    try:
        if folder is not None and not Path(source).is_absolute() and looked_up(folder / source)[1]:
            source = str(folder / source)
        task = EvalTask(spec, read_rows(source, split=spec.split, limit=least, fields=spec.fields))
    except MixmergeError as error:
        faults = [
            Fault(f"task {spec.name}: {one.where}", one.what, one.allowed, one.run) for one in error.faults
        ]
        raise MixmergeError(faults) from error
    faults = [fault for at, row in enumerate(task.rows, 1) if (fault := _lacks(task, row, at)) is not None]
    if faults:
        more = [Fault(f"task {spec.name}", f"{len(faults) - _FAULTS:,} more rows are like these")]
        raise MixmergeError([*faults[:_FAULTS], *(more if len(faults) > _FAULTS else [])])
    return task


def _lacks(task: EvalTask, row: Row, at: int) -> Fault | None:
    """What keeps a row from being scored by the task's metric."""
    metric, where = task.metric, f"task {task.name}: row {row.id or at}"
    if metric.asked == "class":
        if not row.text:
            return Fault(where, "has no text", 'accuracy takes rows {"text": ..., "label": ...}')
    elif row.text:
        return Fault(
            where, "has no prompt", f'{metric.name} takes rows {{"prompt": ..., ...}} or with messages'
        )
    if metric.asked == "choices":
        if not row.choices:
            return Fault(where, "has no choices", "choice takes rows with choices and label")
        if row.messages:
            return Fault(where, "is a chat", "choice takes the prompt as one text")
    if metric.asked == "program" and task.spec.program == "continue" and row.messages:
        return Fault(where, "is a chat", "program: continue takes the prompt as one text")
    if metric.needs == "label" and row.label is None:
        return Fault(where, "has no label", "The index of the right one")
    if metric.needs == "answer" and row.answer is None:
        return Fault(where, "has no answer", "For pass@1 the tests, else the text that is expected")
    if metric.asked == "program" and not (row.answer or "").strip():
        return Fault(where, "has no tests", "Without them every program passes")
    if task.spec.metric == "exact" and task.spec.extract is None and "\n" in (row.answer or "").strip():
        what = "its answer has several lines, and exact looks at the first of what is given"
        return Fault(where, what, "One line", "Or say extract: whole, which compares all of it")
    if task.spec.extract is not None and extractor(task.spec.extract)(row.answer or "") is None:
        return Fault(where, f"its answer holds no {task.spec.extract}", "Else no answer to it can be right")
    return None
