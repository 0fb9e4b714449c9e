"""An expert and a set of them: frozen, nothing is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.table import Price
from mixmerge.registry import choices


@dataclass(frozen=True)
class Expert:
    """Something that answers: a model, an adapter on a base, or a model behind an endpoint.

    Args:
        name: unique in a set.
        model: folder or hub id of the model, or of the base of ``adapter``; behind an endpoint, its name there.
        adapter: folder or hub id of a PEFT adapter.
        endpoint: http(s) address of an OpenAI-compatible server.
        api_key_env: environment variable that holds the endpoint's key; the key itself is nowhere here.
        engine: name of the engine that runs it.
        options: of the engine, as JSON values.
        price: of its tokens.
        pinned: once loaded it stays, as long as the job runs.
    """

    name: str
    model: str
    adapter: str | None = None
    endpoint: str | None = None
    api_key_env: str | None = None
    engine: str = "transformers"
    options: Mapping[str, Any] = field(default_factory=dict)
    price: Price | None = None
    pinned: bool = False

    @property
    def remote(self) -> bool:
        return self.endpoint is not None

    @property
    def unit(self) -> str:
        """What is loaded for it: experts of one unit share that. Adapters share their base."""
        options = json.dumps(dict(self.options), sort_keys=True) if self.options else ""
        return " ".join(filter(None, (self.engine, self.endpoint, self.model, options)))


@dataclass(frozen=True)
class ExpertSet:
    """Experts by name, in their order.

    Raises:
        MixmergeError: two have one name.
    """

    experts: tuple[Expert, ...]

    def __post_init__(self) -> None:
        names = [one.name for one in self.experts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise MixmergeError(Fault("experts", f"{', '.join(twice)} is there twice", "One name for each"))

    def __iter__(self) -> Iterator[Expert]:
        return iter(self.experts)

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, name: str) -> Expert:
        for one in self.experts:
            if one.name == name:
                return one
        raise MixmergeError(Fault("expert", f"no expert is called {name!r}", choices(name, list(self.names))))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.experts)

    def units(self) -> dict[str, tuple[Expert, ...]]:
        """Experts by what is loaded for them, in the order of the first of each."""
        found: dict[str, tuple[Expert, ...]] = {}
        for one in self.experts:
            found[one.unit] = (*found.get(one.unit, ()), one)
        return found
