"""Mixtures whose experts are one network, at work: one unit for the batch runner, and a decision that is always it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixmerge.aggregate.answer import PrimaryAnswer
from mixmerge.batch.setup import Defaults, Setup
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.dynamic.folders import is_dynamic
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts import Expert, ExpertSet, identity
from mixmerge.mixture.gated import AdaptersOptions
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.mixture.wholes import NAME

if TYPE_CHECKING:
    from mixmerge.mixture.wiring import Mixture


def check_fitted(spec: MixtureSpec, answers: bool) -> None:
    """Look for the network that ``mixmerge fit`` made; it lies in one folder, whether it is to answer or not.

    Raises:
        MixmergeError: it is not fitted, or its folder is gone, or of other experts.
    """
    folder = AdaptersOptions.model_validate(spec.compose.options).folder
    if folder is None:
        what = "the network of its experts is not fitted yet"
        raise MixmergeError(
            Fault("compose", what, "A folder that mixmerge fit made", "mixmerge fit MIXTURE.yaml OUT")
        )
    if not is_dynamic(folder):
        raise MixmergeError(Fault("compose.folder", f"{folder} has no bank", run="Fit the mixture again"))
    from mixmerge.bank.cards import read_card

    known = tuple(read_card(Path(folder)).experts)
    if known != tuple(spec.experts):
        what = f"the bank in {folder} is of {', '.join(known)}, and the mixture of {', '.join(spec.experts)}"
        raise MixmergeError(Fault("experts", what, "The experts it was fitted with", "Fit the mixture again"))


def network_of(spec: MixtureSpec) -> ExpertSet:
    """The network as an expert, and each of its experts alone; all are one unit, which is loaded once."""
    told = AdaptersOptions.model_validate(spec.compose.options)
    options = {
        key: value for key, value in (("base", told.base), ("encoder", told.encoder)) if value is not None
    }
    if told.dtype != "auto":
        options["dtype"] = told.dtype
    whole = Expert(NAME, str(told.folder), engine="dynamic", options=options)
    alone = []
    for name, one in spec.experts.items():
        price = None if one.price is None else one.price.of_tokens()
        alone.append(
            Expert(name, str(told.folder), adapter=name, engine="dynamic", options=options, price=price)
        )
    return ExpertSet((whole, *alone))


def setup_of_network(mixture: Mixture, defaults: Defaults) -> Setup:
    """What answers: the network, or the expert that a request names.

    Raises:
        MixmergeError: its folder cannot be read.
    """
    spec = mixture.spec
    experts = network_of(spec)
    version = identity(experts[NAME])

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        reason = {"rule": "the gate weighs the experts, token by token or prompt by prompt"}
        return [Decision(one.id, (Pick(NAME),), NAME, {}, "gate", reason, version) for one in queries]

    about = {"network": version, "generate": spec.generate.model_dump(mode="json")}
    return Setup(experts, PrimaryAnswer(), route, False, defaults, canonical_hash(about))
