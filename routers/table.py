"""What kinds of routers there are: for ``mixmerge route ls``, and the table in docs/routing.md."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmerge import registry
from mixmerge.routers import ROUTERS, RouterRow
from mixmerge.routers.base import Router

_HEAD = ("kind", "what it does", "experts", "options = default", "source")


@dataclass(frozen=True)
class Kind:
    """One kind of router.

    Args:
        name: in the table, and of ``--router``.
        row: of ``ROUTERS``, or of a plug-in.
        options: with their defaults, as JSON values.
        adds, removes: experts, without fitting the others again.
    """

    name: str
    row: RouterRow
    options: Mapping[str, Any]
    adds: bool
    removes: bool

    def summary(self) -> str:
        """What it does, in a line."""
        return f"{self.row.summary} (for evaluation only)" if self.row.reference else self.row.summary

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "summary": self.row.summary,
            "paper": self.row.paper,
            "reference": self.row.reference,
            "options": dict(self.options),
            "adds": self.adds,
            "removes": self.removes,
        }

    def shown_options(self) -> str:
        """``k = 40, worth = 10``."""
        return ", ".join(
            name if value is None else f"{name} = {_shown(value)}" for name, value in self.options.items()
        )


def kind(name: str) -> Kind:
    """One kind by its name; loads its module.

    Raises:
        MixmergeError: no router is called that.
    """
    row: RouterRow = registry.find("router", name)
    router = registry.load(row.target)
    fields = router.options_type.model_fields
    given = {option: None for option, field in fields.items() if field.is_required()}  # no default to show
    defaults = router.options_type.model_construct().model_dump(mode="json")
    return Kind(
        name,
        row,
        {**given, **defaults},
        adds=router.extend is not Router.extend,
        removes=bool(router.per_expert) or router.without is not Router.without,
    )


def kinds() -> list[Kind]:
    """Every kind, plug-ins last."""
    return [kind(name) for name in registry.table("router")]


def markdown() -> str:
    """A Markdown table of the kinds that come with mixmerge, in the order of ``ROUTERS``; no final line break."""
    rows = [_HEAD, tuple("---" for _ in _HEAD), *(_row(kind(name)) for name in ROUTERS)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _row(one: Kind) -> tuple[str, ...]:
    options = ", ".join(
        f"`{name}`" if value is None else f"`{name}` = {_shown(value)}" for name, value in one.options.items()
    )
    verbs = [verb for verb, able in (("add", one.adds), ("remove", one.removes)) if able]
    return (f"`{one.name}`", one.summary(), ", ".join(verbs) or "fixed", options, one.row.paper)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w.-]+", value) else json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
