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
from mixmerge.errors import Fault, OutputError
from mixmerge.plan import Plan
from mixmerge.plan.layout import index_json
from mixmerge.recipe import canonical

RECIPE, MANIFEST, CARD = "mixmerge_recipe.yaml", "mixmerge_manifest.json", "README.md"

_VERSIONED = ("numpy", "numba", "safetensors")


def add_files(
    output: Output,
    plan: Plan,
    fingerprints: Mapping[str, Any],
    *,
    data: Data | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Config, tokenizer, generation config, index, recipe, manifest and model card."""
    donor = plan.models[plan.donor].path
    output.add("config.json", json.dumps(plan.config, indent=2) + "\n")
    for name in companions(donor, plan.config):
        output.add(name, content(donor / name))
    if len(plan.shards) > 1:
        targets = [task.target for task in plan.tasks]
        output.add("model.safetensors.index.json", index_json(targets, list(plan.shards)))
    output.add(RECIPE, plan.text)
    facts = manifest(plan, fingerprints)
    if data is not None:
        facts["calibration"] = manifest_entry(plan, data, notes)
    before = inherited(plan, MANIFEST)
    if before is not None:
        facts["inherited"] = before
    output.add(MANIFEST, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    output.add(CARD, card(plan, data) + inherited_card(before))


def manifest(plan: Plan, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """What the output was made of: the same for every run of the same recipe on the same inputs."""
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {
        "mixmerge": __version__,
        "versions": {"python": platform.python_version(), **versions},
        "plan": plan.hash,
        "method": plan.method.name,
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


def card(plan: Plan, data: Data | None = None) -> str:
    """A model card: where the model is from, in the hub's front matter and in words."""
    bases = "\n".join(f"- {json.dumps(str(model.ref))}" for model in plan.models)
    listed = "\n".join(f"- `{model.ref}`" for model in plan.models)
    recipe = plan.text if plan.text.endswith("\n") else plan.text + "\n"
    heads = "".join(f"- `{HEADS}/{head.expert}`: of `{plan.models[head.model].ref}`\n" for head in plan.heads)
    if heads:
        heads = f"\n## Heads\n\nEach expert's own, not merged; a request says which one it is for.\n\n{heads}"
    shown = "" if data is None else card_section(plan, data)
    return f"""---
base_model:
{bases}
library_name: transformers
tags:
- mixmerge
- merge
---
# Merged model

Made by mixmerge {__version__} with **{plan.method.name}**:
{plan.method.summary} ({plan.method.paper}).

## Inputs

{listed}

Config and tokenizer are those of `{plan.models[plan.donor].ref}`. Fingerprints of the inputs are in
`{MANIFEST}`.
{heads}{shown}
## Recipe

```yaml
{recipe}```
"""


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
    config = read_json(folder / "config.json")
    if config != json.loads(json.dumps(plan.config)):
        wrong.append("config.json")
    if wrong:
        raise OutputError(
            Fault(
                str(folder), f"not what was planned: {', '.join(wrong[:5])}", run="Run the same command again"
            )
        )
