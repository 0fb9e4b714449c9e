"""Everything in the output folder that is not a tensor, and the check that the folder holds what was planned."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmerge import __version__
from mixmerge.checkpoint.companions import companions
from mixmerge.checkpoint.header import read_header
from mixmerge.checkpoint.identity import content, digest, fingerprint
from mixmerge.checkpoint.reader import read_json
from mixmerge.engine.calibration_data import Data, card_section, manifest_entry
from mixmerge.engine.heads import FOLDER as HEADS
from mixmerge.engine.heads import WEIGHTS
from mixmerge.engine.lineage import inherited, inherited_card
from mixmerge.engine.output import Output
from mixmerge.engine.target import BANK, BANK_CARD, MASKS, MASKS_CARD
from mixmerge.engine.twin import Banked
from mixmerge.errors import Fault, OutputError
from mixmerge.plan import Plan
from mixmerge.plan.layout import index_json
from mixmerge.recipe import canonical

RECIPE, MANIFEST, CARD = "mixmerge_recipe.yaml", "mixmerge_manifest.json", "README.md"

_VERSIONED = ("numpy", "numba", "safetensors")


def add_config(output: Output, plan: Plan) -> None:
    """Config, tokenizer, generation config and index: what a model is loaded by, beside its weights."""
    donor = plan.models[plan.donor].path
    output.add("config.json", json.dumps(plan.config, indent=2) + "\n")
    for name in companions(donor, plan.config):
        output.add(name, content(donor / name))
    if len(plan.shards) > 1:
        targets = [task.target for task in plan.tasks]
        output.add("model.safetensors.index.json", index_json(targets, list(plan.shards)))


def add_record(
    output: Output,
    plan: Plan,
    fingerprints: Mapping[str, Any],
    *,
    data: Data | None = None,
    notes: Sequence[str] = (),
    bank: Banked | None = None,
) -> None:
    """Recipe, manifest and model card: what the output was made of."""
    output.add(RECIPE, plan.text)
    facts = manifest(plan, fingerprints)
    if data is not None:
        facts["calibration"] = manifest_entry(plan, data, notes)
    if bank is not None:
        facts["bank"] = {"shared": plan.method.name, **bank.as_json()}
    if plan.masks is not None:
        facts["masks"] = {"method": plan.method.name, "tasks": list(plan.masks.tasks)}
    before = inherited(plan, MANIFEST)
    if before is not None:
        facts["inherited"] = before
    output.add(MANIFEST, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    output.add(CARD, card(plan, data, bank) + inherited_card(before))


def manifest(plan: Plan, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """What the output was made of: the same for every run of the same recipe on the same inputs."""
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {
        "mixmerge": __version__,
        "versions": {"python": platform.python_version(), **versions},
        "plan": plan.hash,
        "method": plan.made_by.name,
        "seed": plan.recipe.seed,
        "recipe": canonical(plan.recipe),
        "inputs": [
            {"model": str(model.ref), **model.commits(), **fingerprints[str(model.ref)]}
            for model in plan.models
        ],
        "dropped": [
            {"model": str(plan.models[drop.model].ref), "tensor": drop.name, "reason": drop.reason}
            for drop in plan.dropped
        ],
        **({"heads": [head.expert for head in plan.heads]} if plan.heads else {}),
        "warnings": list(plan.warnings),
    }


def card(plan: Plan, data: Data | None = None, bank: Banked | None = None) -> str:
    """A model card: where the model is from, in the hub's front matter and in words."""
    bases = "\n".join(f"- {json.dumps(str(model.ref))}" for model in plan.models)
    listed = "\n".join(f"- `{model.ref}`" for model in plan.models)
    recipe = plan.text if plan.text.endswith("\n") else plan.text + "\n"
    heads = "".join(f"- `{HEADS}/{head.expert}`: of `{plan.models[head.model].ref}`\n" for head in plan.heads)
    if heads:
        heads = f"\n## Heads\n\nEach expert's own, not merged; a request says which one it is for.\n\n{heads}"
    shown = "" if data is None else card_section(plan, data)
    beside = _masks_section(plan) if bank is None else _bank_section(plan, bank)
    return f"""---
base_model:
{bases}
library_name: transformers
tags:
- mixmerge
- merge
---
# Merged model

Made by mixmerge {__version__} with **{plan.made_by.name}**:
{plan.made_by.summary} ({plan.made_by.paper}).

## Inputs

{listed}

{_donors(plan)} Fingerprints of the inputs are in
`{MANIFEST}`.
{heads}{beside}{shown}
## Recipe

```yaml
{recipe}```
"""


def _donors(plan: Plan) -> str:
    donor = plan.models[plan.donor].ref
    if plan.owner is None:
        return f"Config and tokenizer are those of `{donor}`."
    return f"Config and head are those of `{plan.models[plan.owner].ref}`, the tokenizer that of `{donor}`."


def _masks_section(plan: Plan) -> str:
    """What the tasks' models are made of, if they stand beside the base."""
    if plan.masks is None:
        return ""
    names = ", ".join(f"`{name}`" for name in plan.masks.tasks)
    return f"""
## Masks

The weights here are the base's. `{MASKS}/` makes them the model of one task, exactly as the method does for that task
alone: {names}. `mixmerge.TaskModel.load` and the engine `tasks` do it.
"""


def _bank_section(plan: Plan, bank: Banked) -> str:
    """What stands beside the weights, and how much it takes."""
    experts = "" if plan.bank is None else ", ".join(f"`{name}`" for name in plan.bank.experts)
    share = 100 * bank.nbytes / max(1, bank.bytes_of_experts)
    least, most = bank.ranks
    ranks = str(most) if least == most else f"{least} to {most}"
    text = f"""
## Bank

The weights here are the shared part, merged by **{plan.method.name}**: loaded by transformers, this is an ordinary
model. `{BANK}/` holds what {experts} have besides, at ranks of {ranks}: {bank.nbytes / 1e6:.1f} MB, {share:.1f} % of
what the experts take. `mixmerge.dynamic.DynamicModel.load` adds to the weights, for every input, as much of each
expert as its gate says.
"""
    gate = bank.gate
    if gate is None:
        return text + "\nIt has no gate: weights are given with the input.\n"
    if gate["accuracy"] is None:
        return text
    text += (
        f"\nIts gate sends {100 * gate['accuracy']:.1f} % of {gate['held_out']} calibration rows to their own expert."
        "\nIt was not trained on them; they chose its epoch and its temperature.\n"
    )
    if gate.get("task") and gate["task"]["losses"]:
        losses = gate["task"]["losses"]
        text += (
            "\nIt was trained a second time, by the loss of the experts' own tasks: on the same rows that was "
            f"{losses[0]:.3f} before and {losses[gate['task']['epoch']]:.3f} after.\n"
        )
    return text


def input_fingerprints(plan: Plan, *, every_byte: bool) -> dict[str, dict[str, str]]:
    """Fingerprints of all inputs by reference; with ``every_byte``, also a hash of everything."""
    found: dict[str, dict[str, str]] = {}
    for model in plan.models:
        entry = {"fingerprint": fingerprint(model.path, model.tensors.values())}
        if model.adapter is not None:
            headers = {header.name: header for delta in model.deltas.values() for header in delta.headers}
            entry["adapter_fingerprint"] = fingerprint(
                model.adapter, headers.values(), config="adapter_config.json"
            )
        if every_byte:
            entry["sha256"] = digest(model.files)
        found[str(model.ref)] = entry
    return found


def verify(folder: Path, plan: Plan) -> None:
    """Check a written folder against its plan: files, names, shapes, dtypes, config.

    Raises:
        OutputError: something is not as planned; the folder is not given its name.
    """
    wanted = {task.target.name: task.target for task in plan.tasks}
    written = {}
    for shard in plan.shards:
        written.update(read_header(folder / shard.file))
    wrong = sorted(wanted.keys() ^ written.keys()) + [
        name
        for name, target in wanted.items()
        if name in written
        and (written[name].shape, written[name].dtype, written[name].offset)
        != (target.shape, target.dtype, target.offset)
    ]
    for head in plan.heads:
        kept = read_header(folder / HEADS / head.expert / WEIGHTS)
        expected = {source.tensor.name: source.tensor for source in head.tensors}
        facts = {name: (header.shape, header.dtype) for name, header in kept.items()}
        if facts != {name: (header.shape, header.dtype) for name, header in expected.items()}:
            wrong.append(f"{HEADS}/{head.expert}")
    if plan.bank is not None and not (folder / BANK_CARD).is_file():
        wrong.append(BANK)
    if plan.masks is not None and not (folder / MASKS_CARD).is_file():
        wrong.append(MASKS)
    config = read_json(folder / "config.json")
    if config != json.loads(json.dumps(plan.config)):
        wrong.append("config.json")
    if wrong:
        raise OutputError(
            Fault(
                str(folder), f"not what was planned: {', '.join(wrong[:5])}", run="Run the same command again"
            )
        )
