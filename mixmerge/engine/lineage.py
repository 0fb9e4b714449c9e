"""Rows of data that the inputs of a merge were made with: what is merged of them has seen these rows too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mixmerge.plan import Plan

# Sections of a manifest that name the rows they used, and whether the recipe said that this is meant.
_OWN, _BEFORE = "calibration", "inherited"


def inherited(plan: Plan, manifest: str) -> dict[str, Any] | None:
    """What the manifest says of rows used before this merge; None where there are none.

    They are those of inputs that a merge has made, and of coefficients that are used again.

    Args:
        plan: of the merge.
        manifest: the name of the file in the inputs' folders.
    """
    found = {str(model.ref): read_used(_json(model.path / manifest)) for model in plan.models}
    if plan.recipe.coefficients is not None:
        learned = _json(Path(plan.recipe.coefficients))
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


def read_used(manifest: Mapping[str, Any]) -> tuple[frozenset[str], bool]:
    """The digests a manifest names, and whether a recipe said that it uses rows the result is evaluated on."""
    own, recipe = (_mapping(manifest.get(name)) for name in (_OWN, "recipe"))
    rows = {
        *_texts(own.get("rows")),
        *_texts(recipe.get("tuned_on")),
    }  # a search chose the recipe's values by these
    meant = own.get("transductive") is True
    before = manifest.get(_BEFORE)
    if not isinstance(before, dict):
        return frozenset(rows), meant
    # What is meant of an input's rows says nothing of the rows this merge used itself.
    meant = meant if rows else before.get("transductive") is True
    return frozenset(rows | set(_texts(before.get("rows")))), meant


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
    return f"\n## Data used before\n\n{len(found['rows'])} rows of data went into {names}.{meant}\n"


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    """All texts in a value: a list of digests, or one of each expert."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]


def _json(path: Path) -> dict[str, Any]:
    """A file's mapping; of a damaged, foreign or absent file nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _mapping(found)
