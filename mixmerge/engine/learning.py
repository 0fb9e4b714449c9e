"""Coefficients learned for a plan, and put into it: the merge itself is then one of fixed weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.files import Files
from mixmerge.data.rows import Row, digests_of
from mixmerge.engine.calibration_data import Data, experts_of
from mixmerge.engine.maps import is_learned
from mixmerge.engine.output import Output
from mixmerge.engine.reading import read_tensor
from mixmerge.engine.sketching import group_of
from mixmerge.engine.streams import FileDeltas, Thresholds, tensor_cuts
from mixmerge.engine.worker import Adapters, Worker, chunk_length
from mixmerge.errors import CheckpointError, DependencyError, Fault, MethodError
from mixmerge.methods.coefficients import FILE, Coefficients, read_coefficients
from mixmerge.plan import Plan, Task
from mixmerge.plan.replay import weighted
from mixmerge.plan.report import CHUNK
from mixmerge.recipe import ModelRef

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.calibrate.learning import Learned
    from mixmerge.calibrate.losses import Answers

HEAT_MAP = "mixmerge_coefficients.png"
LearningProgress = Callable[[int, int, float], None]


def with_learned(
    plan: Plan,
    data: Data,
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
        learned = learn_coefficients(plan, data, files, device=device, threads=threads, progress=progress)
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
    data: Data,
    files: Files,
    *,
    device: str = "cpu",
    threads: int = 1,
    progress: LearningProgress | None = None,
) -> Coefficients:
    """Learn the coefficients of a plan.

    Args:
        plan: of a method with a learner.
        data: rows of every expert.
        files: open files of the inputs.
        device: where the model is.
        threads: for what is read of the whole model before.
        progress: called after each step with (steps done, steps in all, loss).

    Raises:
        MixmergeError: the data, the model or the experts are not fit to learn from.
    """
    from mixmerge.calibrate.learners import LEARNERS
    from mixmerge.calibrate.lessons import Lesson
    from mixmerge.data.batches import context_of

    calibration = plan.recipe.calibration
    if calibration is None:
        raise MethodError(Fault("calibration", f"{plan.method.name} learns from data, and there is none"))
    adapters = Adapters()
    tasks = [task for task in plan.tasks if not task.copied]
    if not tasks:
        raise MethodError(Fault("models", "no tensor is merged, so there is nothing to learn"))
    experts = [plan.models[number].ref for number in experts_of(plan)]
    rows = [_ordered(data.rows[number], plan.recipe.seed) for number in experts_of(plan)]
    model, tokenizer = _load(plan, device)
    cuts = _cuts(plan, tasks, files, adapters, threads)
    parameters, same = _parameters(model, tasks)
    first = {name for name in parameters if name not in same}
    heads = _heads(plan, tasks, model, parameters, files)
    by_name = {task.target.name: task for task in tasks}
    own = {id(value) for name, value in model.named_parameters() if any(name in head for head in heads)}
    deltas = FileDeltas([task for task in tasks if task.target.name in first], adapters, cuts=cuts)
    lesson = Lesson(
        model=model,
        tokenizer=tokenizer,
        parameters={name: parameters[name] for name in parameters if name in first},
        deltas=deltas,
        rows=rows,
        labels=[str(expert) for expert in experts],
        start={task.target.name: start_of(task) for task in tasks if task.target.name in first},
        frozen=frozenset(
            task.target.name
            for task in tasks
            if not is_learned(task, plan.method) or id(parameters[task.target.name]) in own
        ),
        heads=heads,
        options=tasks[0].parameters,
        group=lambda name: group_of(plan, by_name[name], files=files, adapters=adapters, device=device),
        max_tokens=min(calibration.max_tokens, context_of(model.config, tokenizer)),
        batch_size=calibration.batch_size,
        layout=calibration.layout,
        seed=plan.recipe.seed,
        gathers=deltas.gathers,
        answers=answers(plan),
        chunks={task.target.name: int(count) for task in tasks if (count := task.parameters.get("chunks"))},  # type: ignore[arg-type]
    )
    learned = LEARNERS[plan.method.learner](lesson, progress=progress)
    made = _record(plan, learned, tasks, same)
    return dataclasses.replace(made, hashes=_hashes(experts, rows, data))


def answers(plan: Plan) -> tuple[Answers, ...]:
    """What the outputs of each expert say: by the config of its own head, or else by that of the model learned on."""
    from mixmerge.calibrate.losses import answers_of
    from mixmerge.experts.loading import kind_of

    donor, kept = plan.models[plan.donor].config, {head.model: head.config for head in plan.heads}
    configs = [kept.get(number, donor) for number in experts_of(plan)]
    names = [str((config.get("architectures") or [""])[0]) for config in configs]
    return tuple(
        answers_of(config) if kind_of(name) == "classifier" else "one"
        for config, name in zip(configs, names, strict=True)
    )


def _record(plan: Plan, learned: Learned, tasks: Sequence[Task], same: Mapping[str, str]) -> Coefficients:
    """What was learned, by the names of all tasks; ``same`` as from ``_parameters``."""
    layout = learned.layout
    origin = {task.target.name: same.get(task.target.name, task.target.name) for task in tasks}
    starts = [start_of(task) for task in tasks if is_learned(task, plan.method)]
    if layout.nuclear:
        starts = list(layout.start[:1])
    return Coefficients(
        method=plan.method.name,
        experts=tuple(str(plan.models[number].ref) for number in experts_of(plan)),
        weights={name: learned.weights[other] for name, other in origin.items()},
        nuclear={name: layout.nuclear[other] for name, other in origin.items() if other in layout.nuclear},
        start=tuple(sum(column) / len(starts) for column in zip(*starts, strict=True)),
        frozen=tuple(sorted(name for name, other in origin.items() if other in layout.fixed)),
        seed=plan.recipe.seed,
        steps=learned.steps,
        kept=learned.kept,
        losses=learned.losses,
        skipped=learned.skipped,
        stopped=learned.stopped,
        warnings=learned.warnings,
    )


def start_of(task: Task) -> tuple[float, ...]:
    """The coefficient of each expert before the first step."""
    values = task.parameters["weight"]
    return tuple(float(value or 0.0) for value in values) if isinstance(values, tuple) else ()


def _digest(rows: Sequence[Row]) -> str:
    return hashlib.sha256(json.dumps([row.digest for row in rows]).encode()).hexdigest()


def _hashes(experts: Sequence[ModelRef], rows: Sequence[Sequence[Row]], data: Data) -> dict[str, Any]:
    return {
        "order": {str(expert): _digest(found) for expert, found in zip(experts, rows, strict=True)},
        "rows": digests_of(row for found in rows for row in found),
        "transductive": data.transductive,
    }


def _ordered(rows: Sequence[Row], seed: int) -> tuple[Row, ...]:
    """Rows in an order drawn by the seed: files are often sorted by class."""
    keys = {row: hashlib.sha256(f"order:{seed}:{row.digest}".encode()).digest() for row in rows}
    return tuple(sorted(rows, key=keys.__getitem__))


def _load(plan: Plan, device: str) -> tuple[Any, Any]:
    """A model whose trunk is that of the plan, with any weights, and the tokenizer.

    Where experts have heads of their own it is of the class of the first one's; else it is the base.
    """
    import torch
    import transformers

    from mixmerge.experts.loading import check_tokenizer, know_padding, load_expert

    precision = next(task.parameters["precision"] for task in plan.tasks if not task.copied)
    donor = plan.models[plan.donor]
    if not plan.heads:
        loaded = load_expert(donor.path, device=device, dtype=precision)  # type: ignore[arg-type]
        tied = getattr(loaded.model.config, "tie_word_embeddings", None)
        if tied and plan.config.get("tie_word_embeddings") is False:
            what = "its head is its embedding, and an expert has a head of its own"
            raise MethodError(Fault(str(donor.ref), what, "Coefficients are learned where all tie, or none"))
        check_tokenizer(loaded.tokenizer, str(donor.ref))
        return loaded.model, loaded.tokenizer
    config = plan.heads[0].config
    name = str(config["architectures"][0])
    kind = getattr(transformers, name, None)
    if kind is None:
        raise MethodError(Fault(str(donor.ref), f"transformers has no class {name}"))
    model = kind(kind.config_class.from_dict(config)).to(device, getattr(torch, str(precision)))
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(donor.path)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise CheckpointError(Fault(str(donor.ref), f"its tokenizer cannot be loaded: {reason}")) from error
    know_padding(model, tokenizer)
    return model.eval().requires_grad_(False), tokenizer


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


def _heads(
    plan: Plan, tasks: Sequence[Task], model: Any, parameters: Mapping[str, Tensor], files: Files
) -> list[dict[str, Tensor]]:
    """Of each expert, the tensors of its own head; nothing where the model's outputs are its own.

    Raises:
        MethodError: only some experts have a head, heads of several classes, or a tensor of the model is neither merged
            nor a head's.
    """
    import torch

    experts = [source.model for source in tasks[0].sources]
    kept = {head.model: head for head in plan.heads}
    if not kept:
        return [{} for _ in experts]
    known, adapters = dict(model.named_parameters()), Adapters()
    like = next(iter(known.values()))
    found, faults = [], []
    merged = {id(value) for value in parameters.values()}
    for expert in experts:
        head: dict[str, Tensor] = {}
        classes = kept[expert].config.get("architectures") if expert in kept else None
        if classes and classes[0] != type(model).__name__:
            what = f"has the head of a {classes[0]}, and the first expert that of a {type(model).__name__}"
            faults.append(Fault(str(plan.models[expert].ref), what, "Heads of one class"))
            continue
        for source in kept[expert].tensors if expert in kept else ():
            value = read_tensor(source, files, adapters, torch.float32, "cpu")
            head[source.tensor.name] = value.to(like.device, like.dtype)
        lacking = [name for name, value in known.items() if name not in head and id(value) not in merged]
        if lacking:
            what = f"has no {lacking[0]}, which is not merged: every expert needs a head of its own"
            faults.append(Fault(str(plan.models[expert].ref), what))
        found.append(head)
    if faults:
        raise MethodError(faults)
    return found


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
