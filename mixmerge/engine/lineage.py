"""Rows of data that the inputs of a merge were made with: what is merged of them has seen these rows too."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.used_rows import inherited as seen
from mixmerge.checkpoint.used_rows import manifest_of, read_used
from mixmerge.plan import Model, Plan


def inherited(plan: Plan, manifest: str) -> dict[str, Any] | None:
    """What the manifest says of rows used before this merge; None where there are none.

    They are those of inputs that a merge has made, and of coefficients that are used again.

    Args:
        plan: of the merge.
        manifest: the name of the file in the inputs' folders.
    """
    found = {str(model.ref): read_used(_whole(model, manifest)) for model in plan.models}
    if plan.recipe.coefficients is not None:
        learned = manifest_of(Path(plan.recipe.coefficients))
        hashes = learned.get("hashes")
        found[plan.recipe.coefficients] = read_used({"calibration": hashes})
    found = {name: used for name, used in found.items() if used[0]}
    if not found:
        return None
    return {
        "of": sorted(found),
        "transductive": all(meant for _, meant in found.values()),
        "rows": sorted(set().union(*(rows for rows, _ in found.values()))),
    }


def _whole(model: Model, manifest: str) -> dict[str, Any]:
    """What the manifests of a model's folder and of its adapter's say of rows that were used."""
    if model.adapter is None:
        return manifest_of(model.path / manifest)
    return seen([model.path, model.adapter])


def inherited_card(found: Mapping[str, Any] | None) -> str:
    """What the model card says of it."""
    if found is None:
        return ""
    names = ", ".join(f"`{name}`" for name in found["of"])
    meant = (
        " **Transductive**: scores on these rows are no estimate for new data."
        if found["transductive"]
        else ""
    )
    return (
        f"\n## Data used before\n\nRows of data with {len(found['rows'])} digests went into {names}.{meant}\n"
    )
