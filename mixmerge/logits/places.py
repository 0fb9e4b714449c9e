"""Where the models of a fusion are, as an engine's arguments say it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmerge.errors import Fault, MixmergeError

Said = str | Mapping[str, str]  # a folder or hub id, or {"model": ..., "adapter": ...}


@dataclass(frozen=True)
class Place:
    """A model, or an adapter over one: folders or hub ids."""

    model: str
    adapter: str | None = None

    @classmethod
    def of(cls, said: Said, *, where: str = "place") -> Place:
        """What is said, read.

        Raises:
            MixmergeError: it is neither a text nor ``model`` and ``adapter``.
        """
        if isinstance(said, str):
            return cls(said)
        keys = dict(said) if isinstance(said, Mapping) else {"": said}
        if not {"model"} <= keys.keys() <= {"model", "adapter"} or not all(
            isinstance(one, str) for one in keys.values()
        ):
            raise MixmergeError(
                Fault(where, f"is {said!r}", "A folder or hub id, or {model: ..., adapter: ...}")
            )
        return cls(**keys)

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
