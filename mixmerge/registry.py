"""Names to objects, loaded when asked for: built-in ``module:attr`` tables plus entry points of plug-ins."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from typing import Any

from mixmerge.errors import Fault, MixmergeError

# kind -> where its table lives: a mapping from name to either the object or a "module:attr" string.
TABLES = {
    "method": "mixmerge.methods:METHODS",
    "kernel": "mixmerge.engine.kernels:KERNELS",
    "zoo-task": "mixmerge.zoo:TASKS",
    "router": "mixmerge.routers:ROUTERS",
    "features": "mixmerge.routers.features:FEATURES",
    "outcomes": "mixmerge.outcomes.importers:IMPORTERS",
    "engine": "mixmerge.engines:ENGINES",
    "composition": "mixmerge.aggregate.table:COMPOSITIONS",
    "extraction": "mixmerge.aggregate.extraction:EXTRACTORS",
    "gate": "mixmerge.bank.gates:GATES",
    "whole": "mixmerge.mixture.wholes:WHOLES",
}


def load(target: str) -> Any:
    """Import ``module:attr``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def table(kind: str) -> dict[str, Any]:
    """Every name of a kind, built-in first, then plug-ins (entry-point group ``mixmerge.<kind>``).

    Raises:
        MixmergeError: a plug-in takes a name that is already there.
    """
    names = dict(load(TABLES[kind])) if kind in TABLES else {}
    for entry in importlib.metadata.entry_points(group=f"mixmerge.{kind}"):
        if entry.name in names:
            raise MixmergeError(
                Fault(
                    f"entry point {entry.value}",
                    f"{kind} {entry.name!r} is already registered",
                    run=f"rename it, or uninstall {entry.dist.name if entry.dist else 'the plug-in'}",
                )
            )
        names[entry.name] = entry.value
    return names


def nearest(name: str, known: list[str]) -> str | None:
    """The known name that ``name`` was probably meant to be."""
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.6)
    return close[0] if close else None


def choices(name: str, known: list[str]) -> str:
    """``Did you mean 'x'? Known: a, b, c`` for an error message."""
    guess = nearest(name, known)
    return (f"Did you mean {guess!r}? " if guess else "") + f"Known: {', '.join(sorted(known))}"


def find(kind: str, name: str) -> Any:
    """The object registered under ``name``.

    Raises:
        MixmergeError: no such name; the message has the nearest one and all of them.
    """
    names = table(kind)
    if name not in names:
        raise MixmergeError(Fault(kind, f"no {kind} is called {name!r}", choices(name, list(names))))
    found = names[name]
    return load(found) if isinstance(found, str) else found
