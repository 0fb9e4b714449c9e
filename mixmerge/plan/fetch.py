"""The weights of a plan's inputs: on the hub while it is made, on this machine when it is carried out."""

from __future__ import annotations

import dataclasses

from mixmerge.checkpoint.hub import download
from mixmerge.checkpoint.transfer import Progress
from mixmerge.plan.build import make_plan
from mixmerge.plan.model import Plan
from mixmerge.recipe import Parsed


def fetch(plan: Plan, *, progress: Progress | None = None) -> Plan:
    """Download what a plan's inputs lack, and plan again from the files; a plan that lacks nothing is returned.

    Models of the hub stay at the commits they were planned from.

    Args:
        plan: as ``make_plan`` gives it.
        progress: called with (bytes downloaded, bytes in all), from several threads.

    Raises:
        CheckpointError: the hub cannot be reached or refuses, or the disk is full.
        RecipeError: an input is not what it was when the plan was made.
    """
    if not plan.remote:
        return plan
    download(plan.remote, progress=progress)
    commits = {}
    for model in plan.models:
        if model.snapshot is not None:
            commits[model.ref.path, model.ref.revision] = model.snapshot.commit
        if model.adapter_snapshot is not None and model.ref.adapter is not None:
            commits[model.ref.adapter, model.ref.adapter_revision] = model.adapter_snapshot.commit
    refs = tuple((model.where, model.ref) for model in plan.models)
    parsed = Parsed(plan.recipe, (), (), plan.text, refs)
    # There is a plan, so tokenizers that differ are allowed; and it has said its warnings.
    again = make_plan(parsed, allow_tokenizer_mismatch=True, commits=commits)
    return dataclasses.replace(again, warnings=plan.warnings)
