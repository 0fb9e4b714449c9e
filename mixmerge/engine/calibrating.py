"""Calibration data and the statistics of a merge: rows are read and checked first, then every expert sees its own.

Statistics are kept in a hidden folder beside the output until that is whole, so a killed merge does not gather twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mixmerge.calibrate.accumulators import Facts, Kind, read_facts, save_statistics, saved_mean
from mixmerge.calibrate.rows import Row, read_rows, sample_rows
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.errors import Fault, MethodError, MixmergeError, RecipeError
from mixmerge.plan import Model, Plan, Task

if TYPE_CHECKING:
    from mixmerge.calibrate.gathering import Measure
    from mixmerge.calibrate.loading import LoadedExpert

# Bytes of Gram matrices gathered in one run over the rows; an expert with more is run several times.
_AT_ONCE = 2_000_000_000
_SHOWN = 3

Found = Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Data:
    """The rows of a merge.

    Args:
        rows: of every expert, by its index in ``Plan.models``.
        sources: where they are from.
        transductive: the result may be evaluated on them.
    """

    rows: Mapping[int, tuple[Row, ...]]
    sources: Mapping[int, str]
    transductive: bool

    @property
    def digests(self) -> dict[int, list[str]]:
        return {number: [row.digest for row in rows] for number, rows in self.rows.items()}


@dataclass
class Calibrated:
    """What the merge is given, and what is said of it afterwards.

    Args:
        statistics: of a task, by name, one tensor (or None) for each expert; None where the method takes none.
        notes: what a person should know.
    """

    statistics: Callable[[Task], Found] | None = None
    notes: list[str] = field(default_factory=list)


def read_data(plan: Plan) -> Data | None:
    """The rows a plan may look at, or None if its method needs none.

    Raises:
        MixmergeError: what is wrong with the data of any expert, all at once.
    """
    asked = plan.recipe.calibration
    if asked is None or not plan.method.needs_data:
        return None
    rows: dict[int, tuple[Row, ...]] = {}
    sources: dict[int, str] = {}
    faults: list[Fault] = []
    read: dict[str, tuple[Row, ...]] = {}
    for number in experts_of(plan):
        ref = plan.models[number].ref
        source = asked.source(ref)
        if source is None:
            faults.append(
                Fault("calibration", f"{ref} has no data", run="Add it to per_expert, or add data: PATH")
            )
            continue
        try:
            if source not in read:
                read[source] = read_rows(source, split=asked.split)
            rows[number] = sample_rows(read[source], asked.max_examples, seed=plan.recipe.seed)
            sources[number] = source
        except MixmergeError as error:
            faults.extend(fault for fault in error.faults if fault not in faults)
    if faults:
        raise RecipeError(faults)
    return Data(rows, sources, asked.transductive)


def experts_of(plan: Plan) -> list[int]:
    """The experts of a plan, in the recipe's order: indices into its models."""
    task = next((task for task in plan.tasks if not task.copied), None)
    return [] if task is None else [source.model for source in task.sources]


def manifest_entry(plan: Plan, data: Data, notes: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of the data: ``rows`` are the digests that an evaluation must not meet again."""
    every = sorted({digest for digests in data.digests.values() for digest in digests})
    return {
        "transductive": data.transductive,
        "experts": {
            str(plan.models[number].ref): {"source": data.sources[number], "rows": len(rows)}
            for number, rows in data.rows.items()
        },
        "notes": list(notes),
        "rows": every,
    }


def card_section(plan: Plan, data: Data) -> str:
    """What the model card says of the data."""
    lines = [
        f"- `{plan.models[number].ref}`: {len(rows)} rows of `{data.sources[number]}`"
        for number, rows in data.rows.items()
    ]
    said = "\n".join(lines)
    warning = (
        "\n**Transductive**: the data above may be what this model is evaluated on, so scores on it are no estimate"
        "\nfor new data.\n"
        if data.transductive
        else ""
    )
    return f"\n## Calibration data\n\n{said}\n{warning}"


def cache_folder(out: Path) -> Path:
    """Where statistics are kept until the output is whole."""
    real = out.parent.resolve() / out.name
    return real.parent / f".{real.name}.mixmerge-statistics"


def forget(out: Path) -> None:
    """Remove the statistics of a merge that is done."""
    shutil.rmtree(cache_folder(out), ignore_errors=True)


def calibrated(
    plan: Plan, data: Data, cache: Path, *, fingerprints: Mapping[str, Any], device: str
) -> Calibrated:
    """Gather the statistics a plan's method takes.

    Args:
        plan: of a method with ``statistics``.
        data: its rows.
        cache: folder for finished statistics; those in it that fit are not gathered again.
        fingerprints: of the inputs, by reference.
        device: a torch device.

    Raises:
        MixmergeError: an expert cannot be run, or its rows say too little.
    """
    gathered = [_Expert(plan, number, data.rows[number]) for number in experts_of(plan)]
    for expert in gathered:
        expert.gather(cache, fingerprints, device)
    notes = _check(plan, gathered)
    norms = [expert.norm() for expert in gathered] if plan.method.statistics == "fisher" else []

    def statistics(task: Task) -> Found:
        found: dict[str, Sequence[Any]] = {_name(plan): [expert.mean(task) for expert in gathered]}
        return {**found, "norm": norms} if norms else found

    return Calibrated(statistics, notes)


def _name(plan: Plan) -> Kind:
    """The statistic a method takes, by the name its definition knows."""
    return cast(Kind, plan.method.statistics)


class _Expert:
    """One expert's statistics, in one or more parts on the disk."""

    def __init__(self, plan: Plan, number: int, rows: Sequence[Row]) -> None:
        self.plan, self.number, self.rows = plan, number, rows
        self.place = experts_of(plan).index(number)
        self.model: Model = plan.models[number]
        self.parts: list[tuple[Path, Facts]] = []
        self._named: list[
            dict[str, str]
        ] = []  # of each part: a parameter's name, whole or without its first part
        self._part_of: dict[str, int] = {}

    def gather(self, cache: Path, fingerprints: Mapping[str, Any], device: str) -> None:
        from mixmerge.calibrate.gathering import gather
        from mixmerge.calibrate.loading import load_expert

        kind, measure = _name(self.plan), _measure(self.plan)
        fingerprint = canonical_hash(fingerprints[str(self.model.ref)])
        loaded: LoadedExpert | None = None
        for number, tasks in enumerate(_parts(self.plan, kind)):
            stored = [task.sources[self.place].tensor.name for task in tasks]
            key = canonical_hash(
                [kind, fingerprint, measure.settings(kind), [row.digest for row in self.rows], stored]
            )
            folder = cache / key[:24]
            facts = _kept(folder)
            if facts is None:
                loaded = loaded or load_expert(self.model.path, adapter=self.model.adapter, device=device)
                wanted = set(_parameters(loaded, stored).values())
                found = gather(
                    loaded, self.rows, kind, fingerprint=fingerprint, measure=measure, wanted=wanted
                )
                save_statistics(found, folder)
                facts = read_facts(folder)
            self.parts.append((folder, facts))
            names = [*facts.counts, *facts.same]
            self._named.append({_tail(name): name for name in names} | {name: name for name in names})
            self._part_of.update((task.target.name, number) for task in tasks)

    def found(self, task: Task) -> tuple[Path, Facts, str] | None:
        """Where the statistic of a task is, if there is one."""
        part = self._part_of.get(task.target.name)
        if part is None:
            return None
        folder, facts = self.parts[part]
        stored = task.sources[self.place].tensor.name
        named = self._named[part]
        name = next(
            (named[each] for each in (stored, task.target.name, _tail(stored)) if each in named), None
        )
        return None if name is None or facts.sum_of(name) is None else (folder, facts, name)

    def mean(self, task: Task) -> Any:
        found = self.found(task)
        return None if found is None else saved_mean(*found)

    def tokens(self, task: Task) -> int:
        """What the mean of a task is over; 0 where there is none."""
        found = self.found(task)
        return 0 if found is None else found[1].counts[found[1].same.get(found[2], found[2])]

    def norm(self) -> Any:
        """Of all means of the tensors that are merged: the root of the sum of their squares."""
        import torch

        total = 0.0
        for task in self.plan.tasks:
            mean = self.mean(task)
            total += 0.0 if mean is None else float(mean.double().square().sum())
        return torch.tensor(total, dtype=torch.float64).sqrt()


def _kept(folder: Path) -> Facts | None:
    """The facts of statistics an earlier run finished, unless they are damaged."""
    try:
        return read_facts(folder) if folder.is_dir() else None
    except MixmergeError:
        return None  # gathered anew


def _measure(plan: Plan) -> Measure:
    from mixmerge.calibrate.gathering import Measure

    asked = plan.recipe.calibration
    if asked is None:
        raise RecipeError(Fault("calibration", "the recipe has none"))
    return Measure(asked.max_tokens, asked.batch_size, asked.layout, plan.recipe.seed)


def _of_maps(task: Task) -> bool:
    return not task.copied and task.role in ("linear", "transposed")


def width(task: Task) -> int:
    """Inputs of a linear map."""
    return task.target.shape[1] if task.role == "linear" else task.target.shape[0]


def _parts(plan: Plan, kind: Kind) -> list[list[Task]]:
    """The tasks there are statistics for, in groups that fit in memory."""
    if kind == "fisher":
        return [[task for task in plan.tasks if not task.copied]]
    tasks = [task for task in plan.tasks if _of_maps(task)]
    if kind != "gram":
        return [tasks]
    parts: list[list[Task]] = [[]]
    room = _AT_ONCE
    for task in tasks:
        size = 8 * width(task) ** 2
        if size > room and parts[-1]:
            parts.append([])
            room = _AT_ONCE
        parts[-1].append(task)
        room -= size
    return parts


def _parameters(loaded: LoadedExpert, stored: Sequence[str]) -> dict[str, str]:
    """The parameters of a model by the names its files store them under: with or without the trunk's prefix."""
    own = {name for name, _ in loaded.model.named_parameters(remove_duplicate=False)}
    prefix = loaded.prefix
    found = {}
    for name in stored:
        spelled = (name, f"{prefix}{name}", name.removeprefix(prefix))
        match = next((spelling for spelling in spelled if spelling in own), None)
        if match is not None:
            found[name] = match
    return found


def _tail(name: str) -> str:
    """A name without its first part, which may be the prefix of a trunk."""
    return name.split(".", 1)[-1]


def _check(plan: Plan, gathered: Sequence[_Expert]) -> list[str]:
    """What there is too little of: a fault where the method cannot do without, else a note."""
    kind, notes = plan.method.statistics, []
    lacking = [
        task.target.name
        for task in plan.tasks
        if (_of_maps(task) or (kind == "fisher" and not task.copied))
        and any(expert.found(task) is None for expert in gathered)
    ]
    if lacking:
        some = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
        notes.append(f"{len(lacking)} tensors had no statistics and are merged without them: {some}")
    if kind != "gram":
        return notes
    short = [
        (task, min(expert.tokens(task) for expert in gathered))
        for task in plan.tasks
        if _of_maps(task) and task.target.name not in lacking
    ]
    short = [(task, tokens) for task, tokens in short if tokens < width(task)]
    if not short:
        return notes
    task, tokens = max(short, key=lambda each: width(each[0]))
    what = f"{tokens} tokens for the {width(task)} inputs of {task.target.name}: its Gram matrix is singular"
    if any(task.parameters["alpha"] == 1 and task.parameters["ridge"] == 0 for task, _ in short):
        raise MethodError(
            Fault(
                "calibration",
                what,
                "alpha below 1 or ridge above 0 can do with fewer",
                "Give more or longer rows",
            )
        )
    return [
        *notes,
        f"{what} without alpha and ridge, for {len(short)} tensors; more or longer rows are better",
    ]
