"""What training a gate will look at and take, said before any weight is read."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.anatomy import Anatomy, Need, Shown
from mixmerge.data.rows import Row
from mixmerge.engine.calibration_data import Part, experts_of
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import check_tokenizer, kind_of, read_config, read_tokenizer
from mixmerge.plan import Plan
from mixmerge.recipe import Calibration, ModelRef
from mixmerge.recipe.gate import TaskBlock

if TYPE_CHECKING:
    from mixmerge.calibrate.gathering import Reader
    from mixmerge.data.batches import Batch

WORK = "training the gate"
_LEAST = 10  # rows of an expert below which a gate learns little


def shared_reader(plan: Plan, faults: list[Fault]) -> Reader | None:
    """How the shared model reads rows: as the base, whose config and tokenizer it has."""
    from mixmerge.calibrate.gathering import Reader

    donor = plan.models[plan.donor]
    name = str(donor.ref)
    try:
        config = read_config(donor.path, name)
        tokenizer = read_tokenizer(donor.path, name)
        check_tokenizer(tokenizer, name)
    except MixmergeError as error:
        faults.extend(fault for fault in error.faults if fault not in faults)
        return None
    architecture = str((plan.config.get("architectures") or ["AutoModel"])[0])
    return Reader(name, architecture, kind_of(architecture), config, tokenizer)


def prompt_batches(asked: Calibration, rows: Sequence[Row], reader: Reader) -> tuple[Batch, ...]:
    """The prompts of rows as the shared model will read them.

    Raises:
        MixmergeError: as ``make_batches``.
    """
    from mixmerge.bank.features import prompts
    from mixmerge.data.batches import make_batches

    return make_batches(
        prompts(rows), reader.tokenizer, task=reader.task, max_tokens=min(asked.max_tokens, reader.context),
        batch_size=asked.batch_size, order="length",
    )  # fmt: skip


def gate_need(plan: Plan, anatomy: Anatomy, shown: Shown, rows: int) -> Need:
    """Memory while features are gathered and the gate is trained; of a text encoder only what is known of the gate."""
    block = None if plan.bank is None else plan.bank.gate
    if block is None:
        return Need()
    inputs = anatomy.hidden * (anatomy.layers + 1 if block.features == "layers" else 1)
    wide = max(1, round(block.width * inputs))
    layers = [inputs, *[wide] * block.hidden, len(experts_of(plan))]
    network = sum(one * other for one, other in itertools.pairwise(layers))
    first = Need(
        {
            "the shared model": anatomy.loading,
            "a batch": anatomy.forward(shown),
            "features": 8 * rows * inputs,
            # Weights, gradients, two moments, and the best epoch's weights.
            "the gate": 4 * (5 * network + 3 * block.batch * sum(layers)),
        }
    )
    second = Need() if block.task is None else _task_need(plan, block.task, anatomy, shown, network)
    return max(first, second, key=lambda need: need.total)


def _task_need(plan: Plan, task: TaskBlock, anatomy: Anatomy, shown: Shown, network: int) -> Need:
    """Of a training by the task's loss: the way back through the shared model and the bank beside it."""
    sites, experts = () if plan.bank is None else plan.bank.sites, len(experts_of(plan))
    width = 4 if task.dtype == "float32" else 2
    once = Shown(task.batch, shown.length)
    ranks = experts * sum(site.most for site in sites)
    factors = experts * sum(site.most * sum(site.shape) for site in sites)
    return Need(
        {
            "the shared model": anatomy.loading,
            "the bank": width * factors
            + 4 * experts * sum(() if plan.bank is None else plan.bank.vectors.values()),
            # What is between the factors, before and after it is weighed.
            "activations": anatomy.backward(once, width=width) + 2 * width * once.places * ranks,
            "logits": 3 * 4 * once.places * anatomy.vocabulary,
            # Weights, gradients, two moments, and the best epoch's.
            "the gate": 4 * (network + 5 * (ranks + task.hidden * experts * (anatomy.layers + 3))),
        }
    )


def row_faults(plan: Plan, parts: Mapping[ModelRef, Part]) -> tuple[list[Fault], list[str]]:
    """Rows a gate cannot learn from, and what a person should know of them.

    Returns:
        A fault if no expert has a row of its own; notes about rows of several experts, and about few.
    """
    seen: dict[str, set[str]] = {}
    for ref, part in parts.items():
        for row in part.rows:
            seen.setdefault(row.digest, set()).add(str(ref))
    faults, notes = _label_faults(plan, parts), []
    for ref, part in parts.items():
        own = sum(len(seen[row.digest]) == 1 for row in part.rows)
        if part.rows and not own:
            what = f"all of its {len(part.rows)} rows are another expert's too"
            notes.append(f"{part.source} for {ref}: {what}: by a text the gate cannot tell them apart")
        elif own < len(part.rows):
            notes.append(f"{part.source}: {len(part.rows) - own} rows are another expert's too")
        if 0 < len(part.rows) < _LEAST:
            notes.append(f"{part.source}: has {len(part.rows)} rows, of which a gate learns little")
    if parts and all(len(experts) > 1 for experts in seen.values()):
        what = "every row is of several experts, and the gate learns whose rows are whose"
        run = "Give each expert rows of its own task, or write gate: none"
        faults.append(Fault("calibration", what, run=run))
    return faults, notes


def _label_faults(plan: Plan, parts: Mapping[ModelRef, Part]) -> list[Fault]:
    """Experts and rows that a training by the task's loss cannot learn from."""
    block = None if plan.bank is None else plan.bank.gate
    if block is None or block.task is None:
        return []
    from mixmerge.bank.gates.router_task import label_faults

    configs: dict[int, Mapping[str, Any]] = {head.model: head.config for head in plan.heads}
    faults = []
    for number in experts_of(plan):
        ref = plan.models[number].ref
        config = configs.get(number, {} if configs else plan.config)
        kind = kind_of(str((config.get("architectures") or [""])[0]))
        if kind == "other":
            what = "says no classes and no tokens, and gate.task learns from what is right"
            allowed = "Language models, or classifiers of texts with their heads"
            faults.append(Fault(str(ref), what, allowed, "Leave gate.task out"))
        elif kind == "classifier" and ref in parts:
            classes = len(config.get("id2label") or ()) or config.get("num_labels")
            faults += label_faults(parts[ref].rows, f"{parts[ref].source} for {ref}", classes=classes)
    return faults
