"""From YAML (or a mapping) to a ``Recipe``: everything is read, everything that is wrong is said at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.document import (
    Kind,
    Node,
    Report,
    from_data,
    given,
    load,
    read_file,
    read_mapping,
    read_text,
    show,
    to_data,
    unknown_keys,
)
from mixmerge.methods import METHODS, Method
from mixmerge.recipe.calibration import Calibration, read_calibration
from mixmerge.recipe.checks import Draft, DraftEntry, check, check_models
from mixmerge.recipe.choosing import DEAD, Settings, known_parameters, read_method
from mixmerge.recipe.references import ModelRef, read_ref
from mixmerge.recipe.replay import read_replay
from mixmerge.recipe.schema import (
    DTYPES,
    MAX_SEED,
    ModelEntry,
    Output,
    Parsed,
    Recipe,
    Setting,
    canonical,
    size_in_bytes,
    to_yaml,
)
from mixmerge.recipe.twin import KEYS as BANK_KEYS
from mixmerge.recipe.twin import Blocks, check_blocks, check_rows, read_blocks
from mixmerge.registry import choices, nearest, table

RECIPE = Kind(
    "recipe",
    needs="It needs merge_method and models",
    several="files with several YAML documents (mergekit-multi) are not supported yet",
    instead="Merge one after the other, by their output folders",
)
_KEYS = [
    *("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "seed", "output"),
    *("calibration", "coefficients", "tuned_on"),
]
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHARED_TOKENIZER = "Remove it, and merge experts that share one tokenizer"
_NOT_YET = {
    "slices": ("merging ranges of layers", "List whole models under models"),
    "modules": ("merging the parts of a model separately", "List whole models under models"),
    "tokenizer": ("building a merged tokenizer", _SHARED_TOKENIZER),
    "tokenizer_source": ("building a merged tokenizer", _SHARED_TOKENIZER),
    "chat_template": ("setting a chat template", "Remove it; the output keeps the template of its tokenizer"),
}
_ALSO_DEAD_AT_TOP = {
    "name": "Only files with several documents need it",
    "normalize": "Write it under parameters",
    "int8_mask": "Remove it",
}
_DTYPE_ALIASES = {
    **{"fp16": "float16", "half": "float16", "f16": "float16", "bf16": "bfloat16"},
    **{"fp32": "float32", "f32": "float32", "float": "float32", "single": "float32"},
    **{"fp64": "float64", "f64": "float64", "double": "float64"},
}


def parse(text: str, *, where: str = "recipe") -> Parsed:
    """Read the text of a recipe. Never raises for what a user can get wrong.

    Args:
        text: YAML.
        where: what to call the document in faults that concern all of it, such as its file name.
    """
    report = Report(RECIPE)
    return _parsed(load(text, name=where, report=report), text, where, report)


def read(source: str | Path | Mapping[str, Any] | Recipe) -> Parsed:
    """Read a recipe file, or a mapping of the same shape made by Python code. Never raises for a fault.

    Args:
        source: path of a YAML file (UTF-8); a mapping; or a recipe, which is checked like a mapping.
    """
    report = Report(RECIPE)
    if isinstance(source, Recipe):
        source = canonical(source)
    if isinstance(source, Mapping):
        root = from_data(source, name="recipe", report=report, spelled=_spelled)
        return _parsed(root, "" if root is None else to_yaml(to_data(root)), "recipe", report)
    name = str(source) if len(str(source)) <= 300 and "\n" not in str(source) else "recipe"
    text = read_file(Path(source), name=name, report=report)
    return Parsed(None, report.faults(name), (), "", ()) if text is None else parse(text, where=name)


def _spelled(value: Any) -> Any:
    return value.canonical() if isinstance(value, ModelRef) else value


def _parsed(root: Node | None, text: str, where: str, report: Report) -> Parsed:
    refs: list[tuple[str, ModelRef]] = []
    blocks: list[Calibration] = []
    recipe: Recipe | None = None
    if root is not None and isinstance(root.value, dict):
        recipe = _recipe(root.value, report, refs, blocks)
    elif root is not None:
        report.fault(root, f"a recipe is a mapping, got {show(root.value)}", RECIPE.needs)
    return Parsed(
        recipe, report.faults(where), report.warnings(), text, tuple(refs), next(iter(blocks), None)
    )


def _recipe(
    top: dict[str, Node], report: Report, refs: list[tuple[str, ModelRef]], found: list[Calibration]
) -> Recipe | None:
    asked = top.get("merge_method")
    built_in = asked is not None and isinstance(asked.value, str) and asked.value in METHODS
    rows = METHODS if built_in else table("method")  # looking for plug-ins takes 10 ms
    name, method = _method(top, rows, report)
    known = known_parameters(method, rows)
    _top_keys(top, [*_KEYS, *(BANK_KEYS if method and method.bank else ())], list(known), report)
    base_node = given(top, "base_model")
    base = read_ref(base_node, report) if base_node else None
    if base_node and base:
        refs.append((base_node.path, base))
    reader = Settings(method, known, rows, report)
    blocks = read_blocks(top, method, report)
    entries = _entries(top, base, blocks.reader if blocks else reader, report)
    refs.extend((f"{entry.node.path}.model", entry.ref) for entry in entries if entry.ref)
    settings = reader.read(top.get("parameters"), "merge")
    check_models(entries, base, base_node or Node("base_model", None, None), report)
    draft = Draft(method, base, entries, settings, top) if method else None
    if draft:
        check(draft, report)
    if draft and blocks:
        check_blocks(blocks, draft, report)
    coefficients = read_replay(top, method, report)
    calibration = None
    if coefficients is None:
        experts = draft.experts() if draft else None
        calibration = read_calibration(top, method, experts, report, needed=_needs_data(method, blocks))
        found += [calibration] if calibration is not None else []
        if calibration and experts and blocks and blocks.gate:
            check_rows(calibration, experts, top["calibration"], report)
    dtype, out_dtype = _dtype(top, "dtype", report), _dtype(top, "out_dtype", report)
    seed, output = _seed(top, report), _output(top, report)
    tuned_on = _tuned_on(top, report)
    if report.faulty:
        return None
    models = (
        ModelEntry(model=entry.ref, parameters=_set(entry.settings))
        for entry in entries
        if entry.ref is not None
    )
    return Recipe(
        merge_method=name,
        models=tuple(models),
        base_model=base,
        parameters=_set(settings),
        dtype=dtype,
        out_dtype=out_dtype,
        seed=seed,
        output=output,
        calibration=calibration,
        coefficients=coefficients,
        tuned_on=tuned_on,
        shared=blocks.shared() if blocks else None,
        gate=blocks.gate if blocks else None,
    )


def _needs_data(method: Method | None, blocks: Blocks | None) -> bool | None:
    """Whether there must be data; None if the method is not known."""
    return blocks.needs_data if blocks else None if method is None else method.needs_data


def _set(settings: dict[str, Setting | None]) -> dict[str, Setting]:
    return {name: setting for name, setting in settings.items() if setting is not None}


def _method(top: dict[str, Node], rows: Mapping[str, Any], report: Report) -> tuple[str, Method | None]:
    node = given(top, "merge_method")
    if node is None:
        report.fault("merge_method", "the recipe names no merge method", f"Known: {', '.join(sorted(rows))}")
        return "", None
    return read_method(node, rows, report)


def _top_keys(top: dict[str, Node], keys: list[str], parameters: list[str], report: Report) -> None:
    for name, node in top.items():
        if name in _NOT_YET and node.value not in (None, "", (), {}):
            what, instead = _NOT_YET[name]
            report.fault(node, f"{name} is not supported yet ({what})", run=instead)
        elif name in DEAD:
            report.warn(node, "has no effect, here as in mergekit", run="Remove it")
        elif name in _ALSO_DEAD_AT_TOP:
            report.warn(
                node, "has no effect at the top level, here as in mergekit", run=_ALSO_DEAD_AT_TOP[name]
            )
        elif name in BANK_KEYS and name not in keys:
            having = ", ".join(row.name for row in METHODS.values() if row.bank)
            report.fault(node, f"{name} is for methods that leave a bank", f"These do: {having}", "Remove it")
        elif name not in keys and name not in _NOT_YET:
            _unknown_key(name, node, keys, parameters, report)
        if report.full:
            return


def _unknown_key(name: str, node: Node, keys: list[str], parameters: list[str], report: Report) -> None:
    """A key that nothing knows here; a parameter outside ``parameters:`` is told where it belongs."""
    meant = None if nearest(name, keys) else nearest(name, parameters)
    hint = f"Did you mean {meant!r} under parameters? Known: {', '.join(sorted(keys))}"
    report.fault(node, f"unknown key {show(name)}", hint if meant else choices(name, keys))


def _entries(
    top: dict[str, Node], base: ModelRef | None, reader: Settings, report: Report
) -> tuple[DraftEntry, ...]:
    node = given(top, "models")
    if node is None or node.value in ((), {}, ""):
        if not given(top, "slices") and not given(top, "modules"):
            report.fault(
                "models", "the recipe lists no models", run="Add models:, with a - model: PATH for each"
            )
        return ()
    if not isinstance(node.value, tuple):
        report.fault(node, f"expected a list of models, got {show(node.value)}", run="Write - model: PATH")
        return ()
    return tuple(_entry(item, base, reader, report) for item in node.value)


def _entry(node: Node, base: ModelRef | None, reader: Settings, report: Report) -> DraftEntry:
    if not isinstance(node.value, dict):
        what = f"expected a mapping with model and parameters, got {show(node.value)}"
        report.fault(node, what, run="Write - model: PATH")
        return DraftEntry(node, None, {})
    entries = node.value
    for name, child in entries.items():
        if name == "layer_range":
            report.warn(child, "has no effect under models: whole models are merged", run="Remove it")
        elif name in DEAD:
            report.warn(child, "has no effect, here as in mergekit", run="Remove it")
        elif name not in ("model", "parameters"):
            _unknown_key(name, child, ["model", "parameters"], list(reader.known), report)
        if report.full:
            break
    model = given(entries, "model")
    if model is None:
        report.fault(node, "the key model is missing", run="Write - model: PATH")
    ref = read_ref(model, report) if model else None
    idle = ref is not None and ref == base and reader.method is not None and reader.method.base == "required"
    return DraftEntry(node, ref, reader.read(entries.get("parameters"), "base" if idle else "model"))


def _dtype(top: dict[str, Node], key: str, report: Report) -> str | None:
    node = given(top, key)
    name = read_text(node, report, "the name of a dtype") if node else None
    if node is None or name is None:
        return None
    plain = name.removeprefix("torch.")
    if plain in DTYPES:
        return plain
    meant = _DTYPE_ALIASES.get(plain.lower())
    known = f"Did you mean {meant!r}? Known: {', '.join(DTYPES)}" if meant else choices(plain, list(DTYPES))
    report.fault(node, f"no dtype is called {show(name)}", known)
    return None


def _seed(top: dict[str, Node], report: Report) -> int:
    node = given(top, "seed")
    if node is None:
        return 0
    value = node.value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEED:
        return value
    report.fault(node, f"expected a whole number, got {show(value)}", f"From 0 to 2^64 - 1 ({MAX_SEED})")
    return 0


def _tuned_on(top: dict[str, Node], report: Report) -> tuple[str, ...]:
    node = given(top, "tuned_on")
    if node is None:
        return ()
    values = [item.value for item in node.value] if isinstance(node.value, tuple) else [None]
    digests = [value for value in values if isinstance(value, str) and _DIGEST.fullmatch(value)]
    if len(digests) < len(values):
        report.fault(
            node, "is no list of digests of rows", "As `mixmerge search` writes it", "Leave it as it is"
        )
    return tuple(sorted(set(digests)))


def _output(top: dict[str, Node], report: Report) -> Output:
    entries = read_mapping(top["output"], report, "output settings") if "output" in top else {}
    unknown_keys(entries, ["shard_size"], report)
    node = given(entries, "shard_size")
    if node is None:
        return Output()
    value = node.value
    size = size_in_bytes(value) if isinstance(value, str) else value
    if isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**63:
        return Output(shard_size=size)
    report.fault(node, f"{show(value)} is no size", "Bytes as a whole number, or text such as 5GB or 500MB")
    return Output()
