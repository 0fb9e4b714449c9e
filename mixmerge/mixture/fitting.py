"""The router of a mixture before it is fitted, and the outcomes it is fitted on."""

from __future__ import annotations

from typing import Any

from mixmerge import registry
from mixmerge.errors import Fault, MixmergeError
from mixmerge.mixture.saving import anchored
from mixmerge.mixture.schema import MixtureSpec, RouterSpec
from mixmerge.outcomes.table import OutcomeTable, Price
from mixmerge.routers.base import Router

_PATHS = ("model", "path")  # options of features that may be local paths


def unfitted(spec: MixtureSpec) -> Router:
    """The router of a kind that a mixture wants, before it is fitted on ``outcomes_of`` the mixture."""
    wanted = spec.routed
    kind = registry.load(registry.find("router", str(wanted.kind)).target)
    router: Router = kind(wanted.options, features=_features(wanted), seed=wanted.seed)
    return router


def outcomes_of(spec: MixtureSpec) -> OutcomeTable:
    """The outcomes that a mixture names, of its experts in its order and with its prices.

    Raises:
        MixmergeError: they cannot be read, or know other experts than the mixture.
    """
    source = str(spec.routed.outcomes)
    table = OutcomeTable.read(source)
    names = tuple(spec.experts)
    same_experts(names, table.experts, source)
    prices = {
        name: Price(expert.price.input, expert.price.output, expert.price.size)
        for name, expert in spec.experts.items()
        if expert.price is not None
    }
    return table.only(names).priced(prices)


def _features(wanted: RouterSpec) -> Any:
    if wanted.features is None:
        return None
    options = {
        name: anchored(value) if name in _PATHS and isinstance(value, str) else value
        for name, value in wanted.features.items()
        if name != "kind"
    }
    return registry.find("features", str(wanted.features["kind"]))(**options)


def same_experts(mixture: tuple[str, ...], other: tuple[str, ...], where: str) -> None:
    """Refuse a router or a table that knows other experts than the mixture has."""
    lacks = [name for name in mixture if name not in other]
    more = [name for name in other if name not in mixture]
    faults = []
    if lacks:
        faults.append(
            Fault("experts", f"{where} does not know {', '.join(lacks)}", f"It knows {', '.join(other)}")
        )
    if more:
        faults.append(
            Fault("experts", f"the mixture lacks {', '.join(more)}, which {where} knows", run="Add them")
        )
    if faults:
        raise MixmergeError(faults)
