"""Rows of data that a folder says it was made with, in its manifest: what is made of it has seen them too."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "mixmerge_manifest.json"
# Sections of a manifest that name the rows they used, and whether the recipe said that this is meant.
_OWN, _BEFORE = "calibration", "inherited"


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


def inherited(folders: Iterable[Path]) -> dict[str, Any]:
    """What the manifest of something made of these folders says of the rows that they have seen; {} if none has."""
    known = {str(folder): read_used(manifest_of(folder / MANIFEST)) for folder in folders}
    before = {name: rows for name, (rows, _) in known.items() if rows}
    if not before:
        return {}
    return {
        _BEFORE: {
            "of": sorted(before),
            "transductive": all(known[name][1] for name in before),
            "rows": sorted(set().union(*before.values())),
        }
    }


def manifest_of(path: Path) -> dict[str, Any]:
    """A file's mapping; of a damaged, foreign or absent file nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _mapping(found)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _texts(value: Any) -> list[str]:
    """All texts in a value: a list of digests, or one of each expert."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for one in inner for text in _texts(one)]
