"""The search: merge a candidate, score it on the development half, keep the best, and say what that is worth."""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.engine.calibration_data import identity as shown
from mixmerge.engine.calibration_data import read_data
from mixmerge.engine.finish import input_fingerprints
from mixmerge.engine.merge import merge
from mixmerge.errors import Fault, MixmergeError, OutputError, RecipeError
from mixmerge.evaluate.intervals import Comparison, bootstrap_means, compare
from mixmerge.plan import Plan, fetch, make_plan
from mixmerge.plan.layers import depths
from mixmerge.recipe import Recipe, canonical, read, resolve_tensor
from mixmerge.recipe.schema import to_yaml
from mixmerge.searching.optimizing import Asker
from mixmerge.searching.space import Slot, Space, Value, slots, with_values
from mixmerge.searching.trials import Journal, Trial

Part = Literal["dev", "test"]
Objective = Literal["average", "worst"]
Progress = Callable[[Trial, int], None]  # (what was tried, how many there will be)
RowScores = Mapping[str, NDArray[np.float64]]  # task -> score of every row
BEST, TRIALS = "best.yaml", "trials.jsonl"
RESAMPLES = 2000
_FAILED = -1.0  # below every score
_ASKS = 20  # candidates in a row that were tried before: then one counts as a trial again


class Scorer(Protocol):
    """What a model folder is worth."""

    @property
    def identity(self) -> str:
        """Hash of the tasks, their rows and how they are divided."""
        ...

    def rows(self, folder: Path, part: Part) -> RowScores:
        """Scores in [0, 1] on the rows that candidates are chosen by, or on those they are not."""
        ...

    @property
    def chosen_by(self) -> Sequence[str]:
        """Digests of the rows that candidates are chosen by; the best recipe names them."""
        ...


@dataclass(frozen=True)
class Found:
    """What a search found.

    Args:
        recipe: the best candidate as a recipe, as plain data.
        trials: all, in order.
        best: the trial of the recipe.
        test: task -> mean score on rows that no candidate was chosen by, of the recipe as it was and of the best.
        gain: mean over the tasks of the best's lead there.
    """

    recipe: Mapping[str, Any]
    trials: tuple[Trial, ...]
    best: Trial
    test: Mapping[str, tuple[float, float]]
    gain: Comparison


def search(
    recipe: Recipe,
    space: Space,
    scorer: Scorer,
    out: Path,
    *,
    objective: Objective = "average",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Found:
    """Search a recipe's parameters; a search that was killed goes on with the same call.

    The recipe as it is comes first and wins ties; where it is no point of the space (experts of other weights where one
    is searched for all, values out of bounds), the nearest point comes second. A candidate whose merge is refused
    (weights that sum to 0, say) is noted and counts as worth nothing; one that equals an earlier one is neither merged
    nor scored again; what the scorer refuses ends the search, for it would refuse every candidate.

    The best recipe names the rows it was chosen by (``tuned_on``, with those of the recipe as it was), and a merge of
    it keeps them in its manifest: ``mixmerge eval`` refuses them.

    Source: with ``per: expert, anchors: layers`` and CMA-ES, the layer-wise search that Unconstrained Model Merging
    (arXiv:2410.13699) describes for models of one architecture; its code and settings are not public. With ``pcb``,
    ``ngopt`` and weights of 0.8 to 1.3, the search of PCB-Merging's released code, which scores on the test split;
    here candidates never see it.

    Args:
        recipe: where the search starts.
        space: what may change.
        scorer: what is maximised.
        out: the folder of trials and of the best recipe; made if it is not there.
        objective: the mean of the tasks' scores, or the lowest of them.
        threads: of the merges.
        progress: told of every trial.

    Raises:
        MixmergeError: a recipe that does not plan, no optimiser, a disk that refuses; every candidate failed.
    """
    plan = fetch(make_plan(recipe))
    if plan.bank is not None:
        what = f"{plan.made_by.name} leaves a bank, and a search scores what is merged alone"
        run = f"Search a recipe of {plan.method.name}, and take the best one's parameters for shared"
        raise RecipeError([Fault("merge_method", what, run=run)])
    if plan.masks is not None:
        what = "all leaves the base and a mask for each expert, and a search scores one model"
        raise RecipeError([Fault("parameters.task", what, "The position of an expert: task: 0, 1, ...")])
    stacks = depths(task.target.name for task in plan.tasks)
    found = slots(space, recipe, layers=max([1, *stacks.values()]))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(Fault(str(out), f"cannot be made: {error.strerror}")) from error
    journal = Journal(out / TRIALS, _identity(plan, [space.as_dict(), scorer.identity, objective]))
    start = start_of(plan, found)
    asker = Asker(found, space.settings, start)
    untuned = recipe.model_copy(update={"tuned_on": ()})  # candidates may be chosen by the same rows again
    outside = not _is_point(plan, with_values(untuned, found, start))
    for number in range(space.settings.budget):
        beyond = outside and number == 0  # the optimiser is not told of what it cannot ask for
        values, known = ({}, None) if beyond else _new(asker, journal.trials[:number])
        if number < len(journal.trials):
            trial = journal.trials[number]
            if not _alike(values, trial.values):
                what = f"trial {number} was made by another version of the optimiser"
                raise OutputError(
                    Fault(str(journal.path), what, run="Name a new folder, or pass --overwrite")
                )
        elif known is not None:
            trial = replace(known, number=number, seconds=0.0)
            journal.add(trial)
        else:
            trial = _try(number, values, untuned, found, scorer, out, objective, threads)
            journal.add(trial)
        if not beyond:
            asker.tell(trial.worth)
        if progress is not None:
            progress(trial, space.settings.budget)
    best, test, gain = _chosen(untuned, found, journal, scorer, out, threads)
    return Found(_written(recipe, found, best, scorer, out), tuple(journal.trials), best, test, gain)


def _new(asker: Asker, trials: Sequence[Trial]) -> tuple[dict[str, Value], Trial | None]:
    """The next values that no trial has; after so many that one has, those and that trial.

    Optimisers that do not see that the start was tried propose it again, and choices and bounds give equals.
    """
    for asked in range(_ASKS):
        values = asker.ask()
        known = next((one for one in trials if _alike(values, one.values)), None)
        if known is None or asked == _ASKS - 1:
            break
        asker.tell(known.worth)
    return values, known


def _identity(plan: Plan, rest: Sequence[Any]) -> str:
    """Hash of all that scores depend on: the recipe, the weights and rows it is merged from, and the rest."""
    data = read_data(plan)
    rows = {} if data is None else {number: shown(found) for number, found in data.rows.items()}
    inputs = input_fingerprints(plan, every_byte=False)
    return canonical_hash([canonical(plan.recipe), plan.hash, inputs, rows, *rest])


def _is_point(plan: Plan, candidate: Mapping[str, Any]) -> bool:
    """Whether a candidate merges as the recipe of the plan does, every tensor by the same values."""
    try:
        other = make_plan(read(candidate).require())
    except RecipeError:
        return False
    pairs = zip(plan.tasks, other.tasks, strict=True)
    return all(one.parameters == same.parameters for one, same in pairs)


def start_of(plan: Plan, found: Sequence[Slot]) -> dict[str, Value]:
    """The point of the space that is nearest to the recipe: its values at the slots, within bounds and choices.

    The middle of the bounds, or the first choice, where it has none that can be searched.
    """
    start: dict[str, Value] = {}
    depth = {(slot.parameter, slot.entry): slot.anchor for slot in found}  # the last anchor of each
    for slot in found:
        position = slot.anchor / max(1, depth[slot.parameter, slot.entry])
        values = resolve_tensor(plan.recipe, plan.method, name="", position=position)
        value = values.merge.get(slot.parameter, values.entries[slot.entry or 0].get(slot.parameter))
        if value is None:
            one = slot.dimension
            value = one.choices[0] if one.choices else ((one.low or 0.0) + (one.high or 0.0)) / 2
        start[slot.name] = _nearest(slot, value)
    return start


def _nearest(slot: Slot, value: Value) -> Value:
    one = slot.dimension
    if one.choices is not None:
        return value if value in one.choices else one.choices[0]
    return min(max(float(value), float(one.low or 0.0)), float(one.high or 0.0))


def _candidate(recipe: Recipe, found: Sequence[Slot], values: Mapping[str, Value]) -> dict[str, Any]:
    """The recipe of a trial."""
    return with_values(recipe, found, values) if values else dict(canonical(recipe))


def _alike(one: Mapping[str, Value], other: Mapping[str, Value]) -> bool:
    if one.keys() != other.keys():
        return False
    for name, value in one.items():
        known = other[name]
        numbers = isinstance(value, float) and isinstance(known, float)
        if not (math.isclose(value, known, rel_tol=1e-9, abs_tol=1e-12) if numbers else value == known):  # type: ignore[arg-type]
            return False
    return True


def _try(
    number: int,
    values: dict[str, Value],
    recipe: Recipe,
    found: Sequence[Slot],
    scorer: Scorer,
    out: Path,
    objective: Objective,
    threads: int | None,
) -> Trial:
    began = time.perf_counter()
    folder = out / ".candidate"
    try:
        merge(_candidate(recipe, found, values), folder, overwrite=True, threads=threads)
    except OutputError:
        raise  # the disk, not the candidate
    except MixmergeError as error:
        return Trial(number, values, {}, _FAILED, time.perf_counter() - began, str(error))
    try:
        rows = scorer.rows(folder, "dev")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    scores = {task: float(np.mean(each)) for task, each in rows.items()}
    worth = min(scores.values()) if objective == "worst" else statistics.fmean(scores.values())
    return Trial(number, values, scores, worth, time.perf_counter() - began)


def _scored(
    recipe: Mapping[str, Any], scorer: Scorer, folder: Path, part: Part, threads: int | None
) -> RowScores:
    try:
        merge(recipe, folder, overwrite=True, threads=threads)
        return scorer.rows(folder, part)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _chosen(
    recipe: Recipe, found: Sequence[Slot], journal: Journal, scorer: Scorer, out: Path, threads: int | None
) -> tuple[Trial, dict[str, tuple[float, float]], Comparison]:
    best = max(journal.trials, key=lambda trial: (trial.worth, -trial.number))
    if best.fault:
        faults = Fault(
            "search", f"all {len(journal.trials)} merges failed; the first: {journal.trials[0].fault}"
        )
        raise MixmergeError(faults)
    chosen = _candidate(recipe, found, best.values)
    start = _scored(canonical(recipe), scorer, out / ".candidate", "test", threads)
    end = start if best.number == 0 else _scored(chosen, scorer, out / ".candidate", "test", threads)
    test = {task: (float(np.mean(start[task])), float(np.mean(end[task]))) for task in start}
    return best, test, _gain(start, end)


def _written(recipe: Recipe, found: Sequence[Slot], best: Trial, scorer: Scorer, out: Path) -> dict[str, Any]:
    """The best recipe, also on the disk, with the rows that it was chosen by."""
    chosen = _candidate(recipe, found, best.values)
    tuned_on = sorted({*recipe.tuned_on, *scorer.chosen_by})
    if tuned_on:
        chosen["tuned_on"] = tuned_on
    try:
        (out / BEST).write_text(to_yaml(chosen), encoding="utf-8")
    except OSError as error:
        raise OutputError(Fault(str(out / BEST), f"cannot be written: {error.strerror}")) from error
    return chosen


def _gain(start: RowScores, end: RowScores) -> Comparison:
    """The mean lead over the tasks; rows are drawn anew within each task, in pairs."""
    leads = [end[task] - start[task] for task in start]
    drawn = [
        bootstrap_means(lead[:, None], np.arange(len(lead)), resamples=RESAMPLES, seed=seed)[:, 0]
        for seed, lead in enumerate(leads)
    ]  # (B,) each
    return compare(statistics.fmean(float(lead.mean()) for lead in leads), np.mean(drawn, axis=0))
