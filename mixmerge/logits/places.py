"""Where the models of a fusion are, as an engine's arguments say it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Said = str | Mapping[str, str]  # a folder or hub id, or {"model": ..., "adapter": ...}


@dataclass(frozen=True)
class Place:
    """A model, or an adapter over one: folders or hub ids."""

    model: str
    adapter: str | None = None

    @classmethod
    def of(cls, said: Said) -> Place:
        if isinstance(said, str):
            return cls(said)
        return cls(said["model"], said.get("adapter"))

    def as_dict(self) -> dict[str, str]:
        return {"model": self.model, **({"adapter": self.adapter} if self.adapter else {})}


def places_of(model: str, options: Mapping[str, Any]) -> tuple[Place, ...]:
    """Of base, reference and experts, in this order.

    Args:
        model: the base's.
        options: ``base_adapter``, ``reference`` and ``experts`` as of ``FusionEngine``.
    """
    base = Place(model, options.get("base_adapter"))
    others = (options["reference"], *options["experts"].values())
    return (base, *(Place.of(one) for one in others))


def folders_of(model: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Every folder or hub id that is loaded, once."""
    places = places_of(model, options)
    named = [one.model for one in places] + [one.adapter for one in places if one.adapter is not None]
    return tuple(dict.fromkeys(named))
