"""What a merge by data will look at and take, said before any weight is read: the rows, their faults, the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.anatomy import Anatomy, Need, Shown
from mixmerge.data.rows import Row
from mixmerge.engine.calibrating import gathering, measure_of, statistic_of
from mixmerge.engine.calibration_data import Part, experts_of, read_parts
from mixmerge.engine.maps import is_learned, is_map, singular
from mixmerge.engine.twin import fitted
from mixmerge.engine.twin_outlook import WORK, gate_need, prompt_batches, row_faults, shared_reader
from mixmerge.errors import Fault, MixmergeError, RecipeError, collecting
from mixmerge.experts.loading import Kind, check_tokenizer, kind_of, read_config, read_tokenizer
from mixmerge.methods.footprint import directions
from mixmerge.methods.roles import role_of
from mixmerge.plan import Model, Plan, make_plan
from mixmerge.plan.report import RUNTIME, held_bytes, sizes_of
from mixmerge.recipe import Calibration, ModelRef, Parsed, Recipe, inputs, read
from mixmerge.recipe.calibration import DEFAULT_EXAMPLES

if TYPE_CHECKING:
    from mixmerge.calibrate.gathering import Reader
    from mixmerge.data.batches import Batch

# Characters of one expert's rows that are tokenised to plan: a few seconds' worth.
_MOST = 8_000_000
_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Seen:
    """One expert's data.

    Args:
        expert: as the recipe writes it.
        source: where its rows are from.
        rows: that will be used; None where that is known at merge time only.
        there: that the source has.
        tokens: that the expert will read; None if they were not counted.
    """

    expert: str
    source: str
    rows: int | None = None
    there: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Outlook:
    """What a merge by data will look at and take.

    Args:
        work: ``gathering`` of statistics, ``learning`` of coefficients, or ``training the gate``.
        experts: their data, in the recipe's order.
        need: of the stage that takes most; its memory is beside ``RUNTIME``.
        notes: what a person should know and can ignore.
        parts: the rows that were read, by expert: what ``run`` need not read again.
    """

    work: str
    experts: tuple[Seen, ...]
    need: Need
    notes: tuple[str, ...] = ()
    parts: Mapping[ModelRef, Part] = field(default_factory=dict, repr=False)

    @property
    def peak_memory(self) -> int:
        """Bytes of the whole process while it gathers or learns: an estimate, on the high side.

        Merging comes after: ``mixmerge.plan.peak_memory``.
        """
        return RUNTIME + self.need.total

    def as_json(self) -> dict[str, Any]:
        """Everything it says, as JSON data."""
        return {
            "work": self.work,
            "experts": [vars(seen) for seen in self.experts],
            "memory": dict(self.need.memory),
            "peak_memory": self.peak_memory,
            "disk": self.need.disk,
            "notes": list(self.notes),
        }


def plan_with_data(
    source: str | Path | Mapping[str, Any] | Recipe, *, allow_tokenizer_mismatch: bool = False
) -> tuple[Plan, Outlook | None]:
    """``make_plan``, and what its calibration data are; data sets of the hub are not asked for.

    A bank is held against the layers of the model it is for.

    Args:
        source: path of a recipe, or a recipe.
        allow_tokenizer_mismatch: as in ``make_plan``.

    Returns:
        The plan, and an outlook if its method uses data.

    Raises:
        RecipeError: everything that is wrong with the recipe, its inputs and its data, at once.
    """
    parsed = read(source)
    faults: list[Fault] = []
    plan: Plan | None = None
    try:
        plan = make_plan(parsed, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    except RecipeError as error:
        faults += error.faults
    asked = parsed.calibration
    if plan is not None and plan.bank is not None:
        plan = _fitted(plan, faults)
    if asked is None or (plan is not None and not plan.needs_data):
        if plan is None or faults:
            raise RecipeError(faults)
        return plan, None
    experts = _experts(parsed, asked)
    seed = 0 if parsed.recipe is None else parsed.recipe.seed
    parts = read_parts(asked, experts, seed, faults, hub=False)
    outlook = None if plan is None else _outlook(plan, asked, parts, faults)
    if plan is None or faults:
        raise RecipeError(faults)
    return plan, outlook


def _fitted(plan: Plan, faults: list[Fault]) -> Plan:
    """The plan with the bank its model's layers can take, and notes about what they cannot."""
    donor = plan.models[plan.donor]
    try:
        plan, notes = fitted(plan, donor.path)
    except MixmergeError as error:
        faults += error.faults
        return plan
    return replace(plan, warnings=(*plan.warnings, *notes))


def _experts(parsed: Parsed, asked: Calibration) -> list[ModelRef]:
    """Of a faulty recipe, those that were named: what has no data is a fault of the recipe."""
    if parsed.recipe is not None:
        return [entry.model for entry in inputs(parsed.recipe)]
    return list(dict.fromkeys(ref for _, ref in parsed.refs if asked.source(ref) is not None))


def _outlook(
    plan: Plan, asked: Calibration, parts: Mapping[ModelRef, Part], faults: list[Fault]
) -> Outlook | None:
    models = [plan.models[number] for number in experts_of(plan)]
    gated = plan.bank is not None and plan.bank.gate is not None
    if not plan.method.needs_data:
        return _gate_outlook(plan, asked, models, parts, faults)
    readers = _readers(plan, models, faults)
    seen, shown, notes, places, tokens = [], [], [], 0, []
    for model, reader in zip(models, readers, strict=True):
        if reader is None:
            continue
        source, part = asked.source(model.ref) or "", parts.get(model.ref)
        batches: Sequence[Batch] = ()
        if part is not None and sum(map(_size, part.rows)) <= _MOST:
            try:
                batches = _batches(plan, asked, part.rows, reader)
            except MixmergeError as error:
                named = [replace(fault, where=_where(fault, model, source)) for fault in error.faults]
                faults.extend(fault for fault in named if fault not in faults)
        count = sum(batch.tokens for batch in batches) if batches else None
        tokens.append(count)
        shown.append(_largest(plan, asked, batches, reader))
        places += sum(batch.input_ids.numel() for batch in batches) or shown[-1].length * asked.max_examples
        name = str(model.ref)
        seen.append(Seen(name, source, len(part.rows), part.there, count) if part else Seen(name, source))
        notes += _notes(asked, seen[-1])
    if faults:
        return None
    found = [reader for reader in readers if reader is not None]
    if gated:
        wrong, more = row_faults(plan, parts)
        faults += wrong
        notes += more
        if shared_reader(plan, faults) is None or faults:
            return None
    if plan.method.statistics:
        notes += _singular(plan, tokens, faults)
        anatomies = [_anatomy(model, one) for model, one in zip(models, found, strict=True)]
        stages = gathering(plan, anatomies, shown, places)
        need = max(stages, key=lambda stage: stage.total)
        work = "gathering"
    else:
        work, need = "learning", _learning(plan, found[0], shown, places)
    return Outlook(work, tuple(seen), need, tuple(dict.fromkeys(notes)), dict(parts))


def _gate_outlook(
    plan: Plan,
    asked: Calibration,
    models: Sequence[Model],
    parts: Mapping[ModelRef, Part],
    faults: list[Fault],
) -> Outlook | None:
    """Of rows that nothing but the gate looks at: all are shown to the shared model."""
    reader = shared_reader(plan, faults)
    wrong, notes = row_faults(plan, parts)
    faults += wrong
    seen, shown, rows = [], [], 0
    for model in models:
        source, part = asked.source(model.ref) or "", parts.get(model.ref)
        batches: Sequence[Batch] = ()
        if reader is not None and part is not None and sum(map(_size, part.rows)) <= _MOST:
            try:
                batches = prompt_batches(asked, part.rows, reader)
            except MixmergeError as error:
                faults.extend(replace(fault, where=_where(fault, model, source)) for fault in error.faults)
        rows += asked.max_examples if part is None else len(part.rows)
        if reader is not None:
            shown.append(_largest(plan, asked, batches, reader))
        count = sum(batch.tokens for batch in batches) if batches else None
        name = str(model.ref)
        seen.append(Seen(name, source, len(part.rows), part.there, count) if part else Seen(name, source))
        notes += _notes(asked, seen[-1])
    if faults or reader is None:
        return None
    largest = max(shown, key=lambda one: one.places)
    need = gate_need(plan, _anatomy(plan.models[plan.donor], reader), largest, rows)
    return Outlook(WORK, tuple(seen), need, tuple(dict.fromkeys(notes)), dict(parts))


def _where(fault: Fault, model: Model, source: str) -> str:
    """A fault of the rows is told with their source, one of the model with its name."""
    return f"{source} for {model.ref}" if fault.where == "calibration" else fault.where


def _notes(asked: Calibration, seen: Seen) -> list[str]:
    if seen.rows is None:
        return [f"{seen.source}: is no file here, so it is read from the hub at merge time"]
    if seen.rows < asked.max_examples != DEFAULT_EXAMPLES:
        return [
            f"{seen.source}: has {seen.rows} different rows, and max_examples asks for {asked.max_examples}"
        ]
    return []


def _size(row: Row) -> int:
    texts = (row.text, row.text_pair or "", row.prompt, *(content for _, content in row.messages))
    return sum(map(len, texts)) * max(1, len(row.choices))


def _readers(plan: Plan, models: Sequence[Model], faults: list[Fault]) -> list[Reader | None]:
    """How each expert reads rows; a learner shows all of them to one model, with the base's tokenizer."""
    from mixmerge.calibrate.aligning import check_losses
    from mixmerge.calibrate.gathering import Reader
    from mixmerge.calibrate.lessons import ALIGNING, check_answers, check_outputs
    from mixmerge.engine.learning import answers

    if plan.method.learner:
        _check_start(plan, faults)
        with collecting(faults):
            check_answers(plan.method.learner, answers(plan), [str(model.ref) for model in models])
    readers: list[Reader | None] = []
    for model in models:
        name = str(model.ref)
        reading = plan.models[plan.donor] if plan.method.learner else model
        try:
            config = read_config(reading.path, name)
            own = plan.heads[0].config if plan.method.learner and plan.heads else reading.config
            architecture = str((own.get("architectures") or ["AutoModel"])[0])
            tokenizer = read_tokenizer(reading.path, name)
            kind = kind_of(architecture)
            if plan.method.learner:
                check_outputs(plan.method.learner, kind, architecture)
                check_tokenizer(tokenizer, str(reading.ref))
            if plan.method.learner in ALIGNING:
                check_losses(next(task.parameters for task in plan.tasks if not task.copied))
            readers.append(Reader(name, architecture, kind, config, tokenizer))
        except MixmergeError as error:
            faults.extend(fault for fault in error.faults if fault not in faults)
            readers.append(None)
    return readers


def _check_start(plan: Plan, faults: list[Fault]) -> None:
    """Weights that coefficients cannot start from."""
    from mixmerge.calibrate.learners import space_of
    from mixmerge.engine.learning import start_of

    if plan.method.learns_directions:
        return
    tasks = {task.target.name: task for task in plan.tasks if not task.copied}
    learned = [name for name, task in tasks.items() if is_learned(task, plan.method)]
    if learned:
        start = {name: start_of(tasks[name]) for name in learned}
        space = space_of(plan.method.learner, tasks[learned[0]].parameters, start, frozenset())
        with collecting(faults):
            space.layout({name: tasks[name].target.shape for name in learned}, len(start[learned[0]]))


def _batches(plan: Plan, asked: Calibration, rows: Sequence[Row], reader: Reader) -> Sequence[Batch]:
    """As the merge will make them; a list of rows that is refused then is refused now."""
    from mixmerge.calibrate.lessons import batches_of, step_sizes

    if plan.method.statistics:
        return reader.batches(rows, statistic_of(plan).name, measure_of(plan))
    size, _ = step_sizes(_option(plan, "rows"), asked.batch_size)
    return batches_of(
        plan.method.learner, reader.kind, rows, reader.tokenizer,
        max_tokens=min(asked.max_tokens, reader.context), batch_size=size, layout=asked.layout,
    )  # fmt: skip


def _shape(batch: Batch) -> Shown:
    lines, length = batch.input_ids.shape
    return Shown(int(lines), int(length), max(batch.tokens, 1), int(batch.loss_mask.sum()))


def _largest(plan: Plan, asked: Calibration, batches: Sequence[Batch], reader: Reader) -> Shown:
    """The batch that takes most; of rows that were not read, the largest there can be."""
    if batches:
        shapes = [_shape(batch) for batch in batches]
        return max(shapes, key=lambda one: one.places)
    lines = measure_of(plan).lines(statistic_of(plan).name) if plan.method.statistics else asked.batch_size
    return Shown(lines, min(asked.max_tokens, reader.context))


def _option(plan: Plan, name: str) -> int:
    task = next(task for task in plan.tasks if not task.copied)
    return int(task.parameters[name])  # type: ignore[arg-type]


def _anatomy(model: Model, reader: Reader) -> Anatomy:
    config, kind = reader.config.get_text_config(), str(model.config.get("model_type", ""))
    roles = {name: role_of(name, header.shape, kind) for name, header in model.tensors.items()}
    shapes = {name: header.shape for name, header in model.tensors.items()}
    maps = {
        name: (shape[1], shape[0]) if roles[name] == "linear" else (shape[0], shape[1])
        for name, shape in shapes.items()
        if roles[name] in ("linear", "transposed") and len(shape) == 2
    }
    return Anatomy(
        shapes,
        maps,
        layers=int(getattr(config, "num_hidden_layers", 1)),
        hidden=int(getattr(config, "hidden_size", 0)),
        heads=int(getattr(config, "num_attention_heads", 1)),
        vocabulary=int(config.vocab_size) if reader.kind == "causal" else 0,
    )


def _singular(plan: Plan, tokens: Sequence[int | None], faults: list[Fault]) -> list[str]:
    """Gram matrices of too few tokens, where the tokens of all experts are known."""
    counted = [count for count in tokens if count is not None]
    if statistic_of(plan).power != 2 or len(counted) < len(tokens):
        return []
    try:
        return singular([(task, min(counted)) for task in plan.tasks if is_map(task)])
    except MixmergeError as error:
        faults += error.faults
        return []


def _learning(plan: Plan, reader: Reader, shown: Sequence[Shown], places: int) -> Need:
    from mixmerge.calibrate.aligning import layers_of
    from mixmerge.calibrate.learners import learning_need
    from mixmerge.calibrate.lessons import ALIGNING
    from mixmerge.calibrate.teachers import Teachers

    donor: Kind = reader.kind
    anatomy = _anatomy(plan.models[plan.donor], reader)
    task = next(task for task in plan.tasks if not task.copied)
    aligned = plan.method.learner in ALIGNING
    layers = len(layers_of(str(task.parameters["hidden_layers"]), anatomy.layers)) if aligned else 0
    asked = plan.recipe.calibration
    need = learning_need(
        plan.method.learner, anatomy, shown,
        kind=donor, rows=_option(plan, "rows"), batch_size=asked.batch_size if asked else 1,
        layers=layers, width=_WIDTHS[str(task.parameters["precision"])],
    )  # fmt: skip
    memory = {**need.memory, **_spectra(plan)}
    return Need(memory, Teachers.bytes_of(places, anatomy.hidden, layers) if aligned else 0)


def _spectra(plan: Plan) -> dict[str, int]:
    """Of a method that learns directions: those of all matrices, and the decomposition that takes most."""
    if not plan.method.learns_directions:
        return {}
    tasks = [task for task in plan.tasks if not task.copied]
    learned = [task for task in tasks if is_learned(task, plan.method)]
    width = _WIDTHS[str(tasks[0].parameters["precision"])]
    return {
        "directions": width * sum(directions(sizes_of(plan, task)) for task in learned),
        "a decomposition": max(held_bytes(plan, task) for task in tasks),
    }
