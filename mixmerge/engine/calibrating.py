"""The statistics of a merge: every expert is run over its own rows, unless an earlier, killed run has done so.

Statistics are kept in a hidden folder beside the output until that is whole, so a killed merge does not gather twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.accumulators import Facts, read_facts, save_statistics, saved_mean
from mixmerge.calibrate.anatomy import Anatomy, Need, Shown
from mixmerge.calibrate.kinds import SEQUENTIAL, StatisticKind, kind_for
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.data.rows import Row
from mixmerge.engine.calibration_data import Data, experts_of, identity
from mixmerge.engine.maps import is_map, singular, width
from mixmerge.engine.plain import listed
from mixmerge.errors import Fault, MixmergeError, RecipeError
from mixmerge.plan import Model, Plan, Task
from mixmerge.plan.layers import layer_of

if TYPE_CHECKING:
    from mixmerge.calibrate.gathering import Measure, Told
    from mixmerge.calibrate.sequential import Combine
    from mixmerge.experts.loading import LoadedExpert

# Bytes of Gram matrices gathered in one run over the rows; an expert with more is run several times.
_AT_ONCE = 2_000_000_000
_SHOWN = 3

Found = Mapping[str, Sequence[Any]]
# Whose turn it is, steps done, steps in all: rows of every expert, or blocks where all experts go together.
GatheringProgress = Callable[[str, int, int], None]


@dataclass
class Calibrated:
    """What the merge is given, and what is said of it afterwards.

    Args:
        statistics: of a task, by name, one tensor (or None) for each expert; None where the method takes none.
        notes: what a person should know.
    """

    statistics: Callable[[Task], Found] | None = None
    notes: list[str] = field(default_factory=list)


def cache_folder(out: Path) -> Path:
    """Where statistics are kept until the output is whole."""
    real = out.parent.resolve() / out.name
    return real.parent / f".{real.name}.mixmerge-statistics"


def forget(out: Path) -> None:
    """Remove the statistics of a merge that is done."""
    shutil.rmtree(cache_folder(out), ignore_errors=True)


def calibrated(
    plan: Plan,
    data: Data,
    cache: Path,
    *,
    fingerprints: Mapping[str, Any],
    device: str,
    progress: GatheringProgress | None = None,
) -> Calibrated:
    """Gather the statistics a plan's method takes.

    Args:
        plan: of a method with ``statistics``.
        data: its rows.
        cache: folder for finished statistics; those in it that fit are not gathered again.
        fingerprints: of the inputs, by reference.
        device: a torch device.
        progress: called with (expert, rows done, rows in all) after every batch; of a method that goes through the
            model block by block, with ("all experts", blocks done, blocks in all).

    Raises:
        MixmergeError: an expert cannot be run, or its rows say too little.
    """
    gathered = [_Expert(plan, number, data.rows[number]) for number in experts_of(plan)]
    if plan.method.statistics == SEQUENTIAL:
        _in_order(plan, gathered, cache, fingerprints, device, progress)
    else:
        passes = len(_parts(plan, statistic_of(plan)))
        total, before = passes * sum(len(expert.rows) for expert in gathered), 0
        for expert in gathered:
            expert.gather(cache, fingerprints, device, _counted(progress, expert, before, total))
            before += passes * len(expert.rows)
    notes = _check(plan, gathered)
    kind = statistic_of(plan)
    norms = [expert.norm() for expert in gathered] if kind.gradients else []

    def statistics(task: Task) -> Found:
        found: dict[str, Sequence[Any]] = {kind.key: [expert.mean(task) for expert in gathered]}
        return {**found, "norm": norms} if norms else found

    return Calibrated(statistics, notes)


def _counted(progress: GatheringProgress | None, expert: _Expert, before: int, total: int) -> Told:
    def tell(done: int, _: int) -> None:
        if progress is not None:
            progress(str(expert.model.ref), before + done, total)

    return tell


def statistic_of(plan: Plan) -> StatisticKind:
    """The statistics a plan's method takes."""
    return kind_for(plan.method, next((task.parameters for task in plan.tasks if not task.copied), {}))


class _Expert:
    """One expert's statistics, in one or more parts on the disk."""

    def __init__(self, plan: Plan, number: int, rows: Sequence[Row]) -> None:
        self.plan, self.number, self.rows = plan, number, rows
        self.place = experts_of(plan).index(number)
        self.model: Model = plan.models[number]
        # A parameter's name, whole or without its first part -> where its statistic is.
        self._found: dict[str, tuple[Path, Facts, str]] = {}

    def gather(self, cache: Path, fingerprints: Mapping[str, Any], device: str, tell: Told) -> None:
        """Gather, or find, all parts; ``tell`` is called with (rows done in all parts, rows in all)."""
        from mixmerge.calibrate.gathering import gather
        from mixmerge.experts.loading import load_expert

        kind, measure = statistic_of(self.plan), measure_of(self.plan)
        fingerprint = canonical_hash(fingerprints[str(self.model.ref)])
        loaded: LoadedExpert | None = None
        parts = _parts(self.plan, kind)
        total = len(parts) * len(self.rows)
        for number, tasks in enumerate(parts):
            before = number * len(self.rows)
            stored = [task.sources[self.place].tensor.name for task in tasks]
            settings = measure.settings(kind.name)
            key = canonical_hash([kind.name, fingerprint, settings, identity(self.rows), stored])
            folder = cache / key[:24]
            facts = _kept(folder)
            if facts is None:
                loaded = loaded or load_expert(self.model.path, adapter=self.model.adapter, device=device)
                wanted = set(_parameters(loaded, stored).values())

                def told(done: int, _: int, before: int = before) -> None:
                    tell(before + done, total)

                found = gather(
                    loaded, self.rows, kind.name,
                    fingerprint=fingerprint, measure=measure, wanted=wanted, progress=told,
                )  # fmt: skip
                save_statistics(found, folder)
                facts = read_facts(folder)
            self.take(folder, facts)
            tell(before + len(self.rows), total)

    def take(self, folder: Path, facts: Facts) -> None:
        """Use what is in a folder."""
        for name in (*facts.counts, *facts.same):
            if facts.sum_of(name) is not None:
                self._found[name] = folder, facts, name
                self._found.setdefault(_tail(name), (folder, facts, name))

    def found(self, task: Task) -> tuple[Path, Facts, str] | None:
        """Where the statistic of a task is, if there is one."""
        stored = task.sources[self.place].tensor.name
        spelled = (stored, task.target.name, _tail(stored))
        return next((self._found[name] for name in spelled if name in self._found), None)

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


def _in_order(
    plan: Plan,
    gathered: Sequence[_Expert],
    cache: Path,
    fingerprints: Mapping[str, Any],
    device: str,
    progress: GatheringProgress | None,
) -> None:
    """Gather block by block, on the model merged so far; needs every expert and the merged model in memory."""
    from mixmerge.calibrate.sequential import gather_sequential
    from mixmerge.experts.loading import load_expert

    measure = measure_of(plan)
    models = [canonical_hash(fingerprints[str(expert.model.ref)]) for expert in gathered]
    shown = [identity(expert.rows) for expert in gathered]
    parameters = [task.parameters for task in plan.tasks]
    key = canonical_hash([SEQUENTIAL, models, measure.settings("gram"), shown, parameters])[:24]
    done = cache / f"{key}-done"
    steps = len(list(cache.glob(f"{key}-*-0"))) if done.exists() else 0
    if not steps:
        experts = [
            load_expert(each.model.path, adapter=each.model.adapter, device=device) for each in gathered
        ]
        rows = [expert.rows for expert in gathered]

        def tell(blocks: int, total: int) -> None:
            if progress is not None:
                progress("all experts", blocks, total)

        found = gather_sequential(
            experts, rows, _combine(plan), fingerprint=key, measure=measure, progress=tell
        )
        for steps, made in enumerate(found, 1):
            for place, statistics in enumerate(made):
                save_statistics(statistics, cache / f"{key}-{steps - 1}-{place}")
        done.touch()
    for step in range(steps):
        for place, expert in enumerate(gathered):
            folder = cache / f"{key}-{step}-{place}"
            expert.take(folder, read_facts(folder))


def _combine(plan: Plan) -> Combine:
    """A plan's method on one tensor by its name in the first expert; what the plan does not merge is averaged."""
    tasks: dict[str, Task] = {}
    for task in (task for task in plan.tasks if not task.copied):
        stored = task.sources[0].tensor.name
        for name in (stored, task.target.name, _tail(stored)):
            tasks.setdefault(name, task)

    def combine(name: str, tensors: Sequence[Any], grams: Sequence[Any]) -> Any:
        from mixmerge.methods.average import linear
        from mixmerge.methods.memory import apply

        task = tasks.get(name) or tasks.get(_tail(name))
        if task is None:
            return linear(list(tensors), weight=[1.0] * len(tensors))
        found = {"gram": list(grams)}
        given = listed(task)
        return apply(
            plan.method, list(tensors), base=None, parameters=given, role=task.role, statistics=found
        )

    return combine


def gathering(plan: Plan, anatomies: Sequence[Anatomy], shown: Sequence[Shown], places: int) -> list[Need]:
    """What ``calibrated`` takes, one stage after the other: each expert on its rows.

    Args:
        plan: of a method with ``statistics``.
        anatomies: of the experts.
        shown: of each expert, its largest batch.
        places: tokens of all batches of all experts, padding included.
    """
    from mixmerge.calibrate.gathering import gathering_need
    from mixmerge.calibrate.sequential import sequential_need

    kind = statistic_of(plan)
    parts = [[width(task) for task in tasks if is_map(task)] for tasks in _parts(plan, kind)]
    flat = [each for part in parts for each in part]
    if plan.method.statistics == SEQUENTIAL:
        blocks: dict[tuple[str, int] | None, list[int]] = {}
        for task in (task for task in plan.tasks if is_map(task)):
            blocks.setdefault(layer_of(task.target.name), []).append(width(task))
        largest = max(shown, key=lambda one: one.places)
        stages = [
            sequential_need(
                anatomies[0], list(blocks.values()), largest, experts=len(anatomies), places=places
            )
        ]
    else:
        stages = [
            gathering_need(anatomy, kind, part, one)
            for anatomy, one in zip(anatomies, shown, strict=True)
            for part in parts
        ]
    kept = 4 * anatomies[0].elements if kind.gradients else sum(map(kind.size, flat))
    disk = len(anatomies) * kept
    return [Need(stage.memory, disk) for stage in stages]


def _kept(folder: Path) -> Facts | None:
    """The facts of statistics an earlier run finished, unless they are damaged."""
    try:
        return read_facts(folder) if folder.is_dir() else None
    except MixmergeError:
        return None  # gathered anew


def measure_of(plan: Plan) -> Measure:
    from mixmerge.calibrate.gathering import Measure

    asked = plan.recipe.calibration
    if asked is None:
        raise RecipeError(Fault("calibration", "the recipe has none"))
    return Measure(asked.max_tokens, asked.batch_size, asked.layout, plan.recipe.seed)


def _parts(plan: Plan, kind: StatisticKind) -> list[list[Task]]:
    """The tasks there are statistics for, in groups that fit in memory."""
    if kind.gradients:
        return [[task for task in plan.tasks if not task.copied]]
    parts: list[list[Task]] = [[]]
    room = _AT_ONCE
    for task in (task for task in plan.tasks if is_map(task)):
        size = kind.size(width(task))
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
    kind, notes = statistic_of(plan), []
    lacking = [
        task.target.name
        for task in plan.tasks
        if (is_map(task) or (kind.gradients and not task.copied))
        and any(expert.found(task) is None for expert in gathered)
    ]
    if lacking:
        some = ", ".join(lacking[:_SHOWN]) + (", ..." if len(lacking) > _SHOWN else "")
        notes.append(f"{len(lacking)} tensors had no statistics and are merged without them: {some}")
    if kind.power != 2:
        return notes
    short = [
        (task, min(expert.tokens(task) for expert in gathered))
        for task in plan.tasks
        if is_map(task) and task.target.name not in lacking
    ]
    return [*notes, *singular(short)]
