"""Coefficients learned for a plan, and put into it: the merge itself is then one of fixed weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.files import Files
from mixmerge.engine.output import Output
from mixmerge.engine.streams import FileDeltas, Thresholds, tensor_cuts
from mixmerge.engine.worker import Adapters, Worker, chunk_length
from mixmerge.errors import CheckpointError, DependencyError, Fault, MethodError
from mixmerge.methods.coefficients import FILE, Coefficients, read_coefficients
from mixmerge.plan import Plan, Task
from mixmerge.plan.replay import weighted
from mixmerge.plan.report import CHUNK
from mixmerge.recipe import inputs

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.calibrate.rows import Row

HEAT_MAP = "mixmerge_coefficients.png"
LearningProgress = Callable[[int, int, float], None]


def needs_learning(plan: Plan) -> bool:
    """Whether coefficients have to be learned: the method learns, and the recipe names none."""
    return bool(plan.method.learner) and plan.recipe.coefficients is None


def data_stamps(plan: Plan) -> list[tuple[str, int, int]]:
    """Path, size and time of the files of rows: of other rows, other coefficients are learned."""
    calibration = plan.recipe.calibration
    found = [calibration.data, *calibration.per_expert.values()] if calibration else []
    files = [path for source in found if source and (path := Path(source)).is_file()]
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def with_learned(
    plan: Plan,
    output: Output,
    files: Files,
    *,
    device: str,
    threads: int,
    fingerprints: Mapping[str, Any],
    progress: LearningProgress | None = None,
) -> tuple[Plan, Coefficients]:
    """The plan with learned coefficients as its weights; those of a killed run of the same merge are used again.

    Raises:
        MixmergeError: the data, the model or the experts are not fit to learn from.
    """
    kept = output.kept(FILE)
    if kept is not None:
        learned = read_coefficients(kept.decode(), where=str(output.partial / FILE))
    else:
        learned = learn_coefficients(plan, files, device=device, threads=threads, progress=progress)
        inputs_ = {name: found["fingerprint"] for name, found in fingerprints.items()}
        learned = dataclasses.replace(learned, hashes={"inputs": inputs_, **learned.hashes})
        output.keep(FILE, learned.to_json().encode())
    tasks = tuple(weighted(plan.tasks, learned, plan.method))
    return dataclasses.replace(plan, tasks=tasks), learned


def draw(output: Output, learned: Coefficients) -> None:
    """Add the heat map to the output, if matplotlib is there."""
    from mixmerge.calibrate.coefficients import heat_map

    try:
        picture = heat_map(learned)
    except DependencyError:
        return
    output.add(HEAT_MAP, picture)


def learn_coefficients(
    plan: Plan,
    files: Files,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: LearningProgress | None = None,
) -> Coefficients:
    """Learn the coefficients of a plan.

    Args:
        plan: of a method with a learner, and a recipe with calibration data.
        files: open files of the inputs.
        device: where the model is.
        threads: for what is read of the whole model before.
        progress: called after each step with (steps done, steps in all, loss).

    Raises:
        MixmergeError: the data, the model or the experts are not fit to learn from.
    """
    from mixmerge.calibrate.learners import LEARNERS, Lesson

    calibration = plan.recipe.calibration
    if calibration is None:
        raise MethodError(Fault("calibration", f"{plan.method.name} learns from data, and there is none"))
    adapters = Adapters()
    tasks = [task for task in plan.tasks if not task.copied]
    if not tasks:
        raise MethodError(Fault("models", "no tensor is merged, so there is nothing to learn"))
    experts = [entry.model for entry in inputs(plan.recipe, plan.method)]
    rows = [_rows(plan, calibration.source(expert), str(expert)) for expert in experts]
    model, tokenizer = _load(plan, device)
    deltas = FileDeltas(tasks, adapters, cuts=_cuts(plan, tasks, files, adapters, threads))
    parameters, same = _parameters(model, tasks)
    first = {name for name in parameters if name not in same}
    lesson = Lesson(
        model=model,
        tokenizer=tokenizer,
        parameters={name: parameters[name] for name in parameters if name in first},
        deltas=FileDeltas([task for task in tasks if task.target.name in first], adapters, cuts=deltas.cuts),
        rows=rows,
        labels=[str(expert) for expert in experts],
        start={task.target.name: _weights(task) for task in tasks if task.target.name in first},
        frozen=frozenset(task.target.name for task in tasks if not _is_learned(task)),
        heads=_heads(plan, tasks, model, device),
        options=tasks[0].parameters,
        max_tokens=calibration.max_tokens,
        batch_size=calibration.batch_size,
        layout=calibration.layout,
        seed=plan.recipe.seed,
        gathers=deltas.gathers,
    )
    learned = LEARNERS[plan.method.learner](lesson, progress=progress)
    weights = learned.weights | {name: learned.weights[other] for name, other in same.items()}
    starts = [_weights(task) for task in tasks if _is_learned(task)]
    return Coefficients(
        method=plan.method.name,
        experts=tuple(str(expert) for expert in experts),
        weights={task.target.name: weights[task.target.name] for task in tasks},
        start=tuple(sum(column) / len(starts) for column in zip(*starts, strict=True)),
        frozen=tuple(sorted(name for name, other in _origin(weights, same) if other in learned.layout.fixed)),
        seed=plan.recipe.seed,
        steps=learned.steps,
        kept=learned.kept,
        losses=learned.losses,
        skipped=learned.skipped,
        stopped=learned.stopped,
        warnings=learned.warnings,
        hashes={"rows": {str(e): _digest(found) for e, found in zip(experts, rows, strict=True)}},
    )


def _origin(weights: Mapping[str, Any], same: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(name, same.get(name, name)) for name in weights]


def _weights(task: Task) -> tuple[float, ...]:
    values = task.parameters["weight"]
    return tuple(float(value or 0.0) for value in values) if isinstance(values, tuple) else ()


def _is_learned(task: Task) -> bool:
    asked = task.parameters.get("learn", "all")
    return asked == "all" or (asked == "linear" and task.role in ("linear", "transposed"))


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([row.digest for row in rows]).encode()).hexdigest()


def _rows(plan: Plan, source: str | None, expert: str) -> tuple[Row, ...]:
    """The rows of one expert, in an order drawn by the seed: files are often sorted by class."""
    from mixmerge.calibrate.rows import read_rows, sample_rows

    calibration = plan.recipe.calibration
    if calibration is None or source is None:
        raise MethodError(Fault("calibration", f"{expert} has no data"))
    rows = sample_rows(
        read_rows(source, split=calibration.split), calibration.max_examples, seed=plan.recipe.seed
    )
    keys = {row: hashlib.sha256(f"order:{plan.recipe.seed}:{row.digest}".encode()).digest() for row in rows}
    return tuple(sorted(rows, key=keys.__getitem__))


def _load(plan: Plan, device: str) -> tuple[Any, Any]:
    """The model of the plan's config, with any weights, and the tokenizer."""
    import torch
    import transformers

    donor = plan.models[plan.donor]
    names = plan.config.get("architectures") or [""]
    found = getattr(transformers, str(names[0]), None)
    if found is None:
        what = f"its config names no architecture of transformers: {names[0]!r}"
        raise MethodError(Fault(str(donor.ref), what))
    precision = next(task.parameters["precision"] for task in plan.tasks if not task.copied)
    config = transformers.AutoConfig.from_pretrained(donor.path)
    config.tie_word_embeddings = plan.config.get("tie_word_embeddings", config.tie_word_embeddings)
    try:
        # Every weight is overwritten, so none is read here; buffers are made anew.
        model = found.from_pretrained(donor.path, config=config, dtype=getattr(torch, str(precision)))
        tokenizer = transformers.AutoTokenizer.from_pretrained(donor.path)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            Fault(str(donor.ref), f"transformers cannot load it: {str(error).splitlines()[0]}")
        ) from error
    return model.to(device).eval(), tokenizer


def _parameters(model: Any, tasks: Sequence[Task]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensor of every task, and of tensors that the model ties, under which name the first is.

    Raises:
        MethodError: a tensor of the checkpoint is none of the model.
    """
    known = {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }
    prefix = f"{model.base_model_prefix}."
    found: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    lacking = []
    for task in tasks:
        name = task.target.name
        spelled = [one for one in (name, prefix + name, name.removeprefix(prefix)) if one in known]
        if not spelled or tuple(known[spelled[0]].shape) != task.target.shape:
            lacking.append(name)
            continue
        found[name] = known[spelled[0]]
        other = next((other for other in found if other != name and found[other] is found[name]), None)
        if other is not None:
            same[name] = other
    if lacking:
        what = f"{type(model).__name__} holds {len(lacking)} tensors otherwise than the files: {lacking[0]}"
        allowed = "Coefficients are learned where a model's tensors are those of its files"
        raise MethodError(Fault("base_model", what, allowed, "Use a method without data"))
    return found, same


def _heads(plan: Plan, tasks: Sequence[Task], model: Any, device: str) -> list[dict[str, Tensor]]:
    """Of each expert, the tensors of its classifier's head: those outside the trunk, as its own files have them."""
    from mixmerge.calibrate.learners import kind_of
    from mixmerge.engine.streams import whole_tensor

    experts = [source.model for source in tasks[0].sources]
    if kind_of(type(model).__name__) != "classifier":
        return [{} for _ in experts]
    prefix = f"{model.base_model_prefix}."
    outside = [name for name, _ in model.named_parameters() if not name.startswith(prefix)]
    dtype = next(model.parameters()).dtype
    heads = []
    for expert in experts:
        stored = plan.models[expert].tensors
        heads.append(
            {name: whole_tensor(stored[name]).to(device, dtype) for name in outside if name in stored}
        )
    return heads


def _cuts(
    plan: Plan, tasks: Sequence[Task], files: Files, adapters: Adapters, threads: int
) -> Thresholds | None:
    """Thresholds of deltas that are trimmed before they are mixed; None for methods that do not."""
    if plan.method.parameter("density") is None:
        return None
    if tasks[0].parameters.get("scope") == "tensor":
        shares = {task.target.name: task.parameters["density"] for task in tasks}
        return tensor_cuts(FileDeltas(tasks, adapters), shares)  # type: ignore[arg-type]
    from mixmerge.engine.model_scope import model_cuts
    from mixmerge.engine.plain import thresholds

    length = max([CHUNK, *(chunk_length(task, rows_whole=False) for task in tasks)])
    workers = [Worker(plan, files, adapters, length) for _ in range(threads)]
    return {name: thresholds(cuts) for name, cuts in model_cuts(tasks, workers).items()}
