"""Making a plan: open the inputs, check that they fit, resolve every tensor's parameters, lay out the output."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.adapter import AdapterDelta, read_adapter
from mixmerge.checkpoint.header import FLOATS, TensorHeader
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.checkpoint.locate import Place, look_up, open_model
from mixmerge.checkpoint.reader import Checkpoint
from mixmerge.errors import Fault, MixmergeError, RecipeError
from mixmerge.methods import Method, Value
from mixmerge.methods.roles import role_of
from mixmerge.plan.agree import Agreement, agree, compare_configs, compare_tokenizers, some
from mixmerge.plan.bank import BankPlan, plan_bank
from mixmerge.plan.heads import Owner, head_notes, kept_heads, names_of, outside_of, owner_of, trunks
from mixmerge.plan.layers import depths, layer_of
from mixmerge.plan.layout import Wanted, lay_out
from mixmerge.plan.masks import plan_masks
from mixmerge.plan.model import Model, Plan, Source, Target, Task
from mixmerge.plan.replay import replayed
from mixmerge.plan.shares import in_shares
from mixmerge.recipe import (
    ModelRef,
    Parsed,
    Recipe,
    TensorValues,
    chosen_expert,
    inputs,
    layer_position,
    read,
    resolve_tensor,
)
from mixmerge.recipe.twin import bank_recipe, shared_recipe
from mixmerge.registry import find

_STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_SPOKEN = {stored: spoken for spoken, stored in _STORED.items()}

# (path, revision) as a recipe writes them -> the commit on the hub that is meant.
Commits = Mapping[tuple[str, str | None], str]
Group = tuple[tuple[Source, ...], Source | None]  # one tensor of every expert, and of a base that is required


def make_plan(
    source: str | Path | Mapping[str, Any] | Recipe | Parsed,
    *,
    allow_tokenizer_mismatch: bool = False,
    commits: Commits | None = None,
) -> Plan:
    """Work a recipe out against the headers of its inputs; of models on the hub, no weight is downloaded.

    Args:
        source: path of a recipe, or a recipe.
        allow_tokenizer_mismatch: merge rows by id even where two tokenizers give an id to different tokens.
        commits: what models of the hub were, when they were planned before.

    Raises:
        RecipeError: everything that is wrong with the recipe and with its inputs, at once.
    """
    parsed = source if isinstance(source, Parsed) else read(source)
    faults = list(parsed.faults)
    models = _open_models(parsed.refs, commits or {}, faults)
    warnings = list(parsed.warnings)
    donor = 0  # the base, or where there is none the first model: references come in this order
    split = trunks(models)
    agreement = agree(split.models, donor, faults) if models else None
    if models:
        warnings += [*compare_configs(split.models, donor, faults), *head_notes(split)]
        warnings += compare_tokenizers(models, donor, allow=allow_tokenizer_mismatch, faults=faults)
    if parsed.recipe is None or agreement is None or faults:
        raise RecipeError(faults)
    recipe = shared_recipe(parsed.recipe)
    method: Method = find("method", recipe.merge_method)
    order = {model.ref: number for number, model in enumerate(models)}
    base = order[recipe.base_model] if recipe.base_model is not None else None
    entries = [order[entry.model] for entry in inputs(recipe, method)]
    needs_base = base if method.base == "required" else None
    groups = _gather(split.models, entries, needs_base, agreement, deltas=method.takes == "deltas")
    chosen = chosen_expert(recipe, method)
    owner = owner_of(split, models, None if chosen is None else entries[chosen])
    if owner is not None:
        groups = _owned(groups, owner)
    wanted = [Wanted(name, *_output_form(group, recipe)) for name, group in groups.items()]
    targets, shards = lay_out(wanted, recipe.output.shard_size)
    head = owner.head if owner else ()
    tasks = _tasks(recipe, method, groups, targets, models[donor].config, faults, head=head)
    if recipe.coefficients is None:
        tasks = in_shares(tasks, method, faults)
    tasks = replayed(recipe, method, tasks, faults, warnings)
    _check_scope(tasks, faults)
    bank = _bank(parsed.recipe, names_of(models, entries), tasks, split.own, faults)
    masks = plan_masks(method, names_of(models, entries), tasks, faults)
    warnings += bank.notes() if bank else []
    if faults:
        raise RecipeError(faults)
    config = owner.config if owner else split.models[donor].config
    config = _output_config(config, agreement, targets)
    heads = kept_heads(split, models, entries)
    dropped = (*agreement.dropped, *outside_of(split, heads, owner))
    plan = Plan(
        parsed.recipe, parsed.text, method, models, needs_base, donor, tuple(tasks), dropped, tuple(shards),
        config, tuple(warnings), heads, bank, masks, owner.model if owner else None,
    )  # fmt: skip
    return dataclasses.replace(plan, hash=_hash(plan))


def _open_models(
    refs: Sequence[tuple[str, ModelRef]], commits: Commits, faults: list[Fault]
) -> tuple[Model, ...]:
    models: dict[ModelRef, Model] = {}
    opened: dict[tuple[str, str | None], tuple[Place, Checkpoint]] = {}
    for where, ref in refs:
        if ref in models:
            continue
        try:
            key = (ref.path, ref.revision)
            if key not in opened:
                place = look_up(ref.path, commits.get(key, ref.revision), where=where, adapter=False)
                opened[key] = place, open_model(place, name=ref.path, where=where)
            models[ref] = _with_adapter(ref, *opened[key], commits, where)
        except MixmergeError as error:
            faults.extend(
                fault
                if fault.where.startswith(where)
                else dataclasses.replace(fault, where=f"{where}: {fault.where}")
                for fault in error.faults
            )
    return tuple(models.values())


def _with_adapter(ref: ModelRef, place: Place, checkpoint: Checkpoint, commits: Commits, where: str) -> Model:
    folder, config, files = checkpoint.path, checkpoint.config, checkpoint.files
    if ref.adapter is None:
        return Model(ref, where, folder, None, checkpoint.tensors, files, {}, config, place.snapshot)
    revision = commits.get((ref.adapter, ref.adapter_revision), ref.adapter_revision)
    adapter = look_up(ref.adapter, revision, where=where, adapter=True)
    deltas = read_adapter(adapter.folder, checkpoint.tensors, where=where)
    files += tuple(sorted({header.file for delta in deltas.values() for header in delta.headers}))
    return Model(
        ref, where, folder, adapter.folder, checkpoint.tensors, files, deltas, config,
        place.snapshot, adapter.snapshot,
    )  # fmt: skip


def _gather(
    models: Sequence[Model], entries: Sequence[int], base: int | None, agreement: Agreement, *, deltas: bool
) -> dict[str, Group]:
    groups: dict[str, Group] = {}
    for name in agreement.names:
        root = _source(models, base, name, agreement, None) if base is not None else None
        ground = root if deltas else None
        groups[name] = tuple(_source(models, number, name, agreement, ground) for number in entries), root
    return groups


def _owned(groups: Mapping[str, Group], owner: Owner) -> dict[str, Group]:
    """The trunk's tensors under the names that the owner has them by, and the owner's head."""
    trunk = {owner.prefix + name: group for name, group in groups.items()}
    return trunk | {name: ((source,), None) for name, source in owner.head.items()}


def _source(
    models: Sequence[Model], number: int, name: str, agreement: Agreement, base: Source | None
) -> Source:
    model = models[number]
    header = model.tensors[agreement.stored_as.get((number, name), name)]
    # A tied head has a change of its own, or it goes on to follow the embedding that stands in for it.
    delta: AdapterDelta | None = model.deltas.get(name) or model.deltas.get(header.name)
    # What replaces a tensor is stored whole; its difference to the base has to be taken.
    exact = delta is not None and delta.kind != "replace"
    alone = exact and base is not None and base.adapter is None and _same_bytes(base.tensor, header)
    return Source(number, header, delta, delta_only=alone)


def _same_bytes(one: TensorHeader, other: TensorHeader) -> bool:
    if one.offset != other.offset:
        return False
    # Of files that are still on the hub only the names can be compared.
    both = one.file.exists() and other.file.exists()
    return one.file == other.file or (both and one.file.samefile(other.file))


def _output_form(group: Group, recipe: Recipe) -> tuple[tuple[int, ...], str]:
    sources, base = group
    headers = [source.tensor for source in (*sources, *((base,) if base else ()))]
    dtypes = {header.dtype for header in headers}
    if not dtypes <= set(FLOATS):
        return headers[0].shape, headers[0].dtype
    asked = recipe.out_dtype or recipe.dtype
    return headers[0].shape, _STORED[asked] if asked else _promote(dtypes)


def _promote(dtypes: set[str]) -> str:
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "F64" if "F64" in dtypes else "F32"


def _tasks(
    recipe: Recipe,
    method: Method,
    groups: Mapping[str, Group],
    targets: list[Target],
    config: Mapping[str, Any],
    faults: list[Fault],
    *,
    head: Collection[str],
) -> list[Task]:
    stacks = depths(groups)
    model_type, hidden = str(config.get("model_type", "")), _width(config)
    values = _Values(recipe, method)
    tasks = []
    for target in targets:
        sources, base = groups[target.name]
        copied = target.dtype not in FLOATS or target.name in head
        parameters: dict[str, Value | tuple[Value, ...]] = {}
        if not copied:
            try:
                resolved = values.of(target.name, _position(target.name, stacks))
            except RecipeError as error:
                faults.extend(fault for fault in error.faults if fault not in faults)
                continue
            parameters.update(resolved.merge)
            for parameter in method.parameters:
                if parameter.per != "merge":
                    parameters[parameter.name] = tuple(entry[parameter.name] for entry in resolved.entries)
        inputs_ = sources if not copied or base is None else (*sources, base)
        role = role_of(target.name, target.shape, model_type, hidden=hidden)
        tasks.append(Task(target, inputs_, None if copied else base, copied, parameters, role))
    return tasks


def _bank(
    recipe: Recipe, experts: Sequence[str], tasks: Sequence[Task], own: Collection[str], faults: list[Fault]
) -> BankPlan | None:
    """The bank of a recipe whose method leaves one."""
    if recipe.shared is None:
        return None
    method: Method = find("method", recipe.merge_method)
    stacks, values = depths(task.target.name for task in tasks), _Values(bank_recipe(recipe), method)

    def asked(name: str) -> dict[str, Value]:
        return values.of(name, _position(name, stacks)).merge

    return plan_bank(recipe, method, experts, tasks, asked, faults, own=own)


def _position(name: str, stacks: Mapping[str, int]) -> float:
    layer = layer_of(name)
    return layer_position(layer[1], stacks[layer[0]]) if layer else layer_position(None, 0)


def _width(config: Mapping[str, Any]) -> int:
    """Of the hidden states, or of those of a model's language part."""
    inner = config.get("text_config")
    found = (inner if isinstance(inner, Mapping) else config).get("hidden_size")
    return found if isinstance(found, int) else 0


def _check_scope(tasks: Sequence[Task], faults: list[Fault]) -> None:
    """A threshold of the whole model is found by histograms of float32 magnitudes."""
    wide = [
        task.target.name
        for task in tasks
        if task.parameters.get("scope") == "model"
        and "F64" in {task.target.dtype, *(source.tensor.dtype for source in _inputs_of(task))}
    ]
    if wide:
        faults.append(
            Fault(
                "parameters.scope",
                f"scope: model is not there for float64, in or out: {some(wide)}",
                "Thresholds of the whole model are taken in float32",
                "Use scope: tensor, or float32 inputs and out_dtype",
            )
        )


def _inputs_of(task: Task) -> tuple[Source, ...]:
    return (*task.sources, *((task.base,) if task.base else ()))


class _Values:
    """Parameters by tensor, worked out once for all tensors that the recipe cannot tell apart."""

    def __init__(self, recipe: Recipe, method: Method) -> None:
        self._recipe, self._method = recipe, method
        levels = [recipe.parameters, *(entry.parameters for entry in recipe.models)]
        settings = [setting for level in levels for setting in level.values()]
        self._filters = sorted({one.filter for setting in settings for one in setting if one.filter})
        self._known: dict[tuple[float, tuple[bool, ...]], TensorValues] = {}

    def of(self, name: str, position: float) -> TensorValues:
        key = position, tuple(part in name for part in self._filters)
        if key not in self._known:
            self._known[key] = resolve_tensor(self._recipe, self._method, name=name, position=position)
        return self._known[key]


def _output_config(config: dict[str, Any], agreement: Agreement, targets: list[Target]) -> dict[str, Any]:
    result = dict(config)
    sizes: dict[str, int] = {}
    for target in targets:
        if target.dtype in FLOATS:
            sizes[target.dtype] = sizes.get(target.dtype, 0) + target.nbytes
    if sizes:
        spoken = _SPOKEN[max(sizes, key=lambda dtype: sizes[dtype])]
        result["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = spoken
    if agreement.untied:
        result["tie_word_embeddings"] = False
    return result


def _header_facts(header: TensorHeader) -> list[Any]:
    return [header.name, header.dtype, header.shape]


def _hash(plan: Plan) -> str:
    tasks = [
        {
            "target": [task.target.name, task.target.shape, task.target.dtype, task.target.shard, task.target.offset],
            "sources": [
                [source.model, *_header_facts(source.tensor), source.delta_only]
                + ([source.adapter.facts()] if source.adapter else [])
                for source in _inputs_of(task)
            ],
            "parameters": task.parameters,
            **({"chunks": task.chunks} if task.chunks else {}),
            **({"factors": [task.factors, task.nuclear]} if task.factors else {}),
        }
        for task in plan.tasks
    ]  # fmt: skip
    recipe: dict[str, Any] = {"method": plan.method.name, "seed": plan.recipe.seed}
    if plan.recipe.calibration is not None:
        recipe["calibration"] = plan.recipe.calibration.canonical()
    heads = {
        head.expert: [head.config, *(_header_facts(source.tensor) for source in head.tensors)]
        for head in plan.heads
    }
    kept: dict[str, Any] = {"heads": heads} if heads else {}
    if plan.bank is not None:
        kept["bank"] = plan.bank.facts()
    if plan.masks is not None:
        kept["masks"] = plan.masks.facts()
    return canonical_hash({"recipe": recipe, "config": plan.config, "tasks": tasks, **kept})
