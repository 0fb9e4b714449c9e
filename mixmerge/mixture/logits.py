"""The row of ``compose: {kind: logits}``: small experts shift a large base's logits, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixmerge.aggregate.answer import PrimaryAnswer
from mixmerge.batch.setup import Defaults, Setup
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.identity import check_folders, identities
from mixmerge.mixture.answering import expert_set
from mixmerge.mixture.fusion import LogitsOptions, check_fusion, engine_options, experts_of, options_of
from mixmerge.mixture.fusion_fitting import CARD, fit_fusion, read_card
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.mixture.wholes import NAME, Whole

if TYPE_CHECKING:
    from mixmerge.mixture.wiring import Mixture


def check_models(spec: MixtureSpec, answers: bool) -> None:
    """Look for the models, where they are to answer, and for what was fitted.

    Raises:
        MixmergeError: a folder that is not there; data of which no alpha was picked yet; an expert that has changed
            since it was fitted.
    """
    told = options_of(spec)
    folder = told.folder
    if folder is None and told.data is not None:
        what = f"the alpha that is best on {told.data} is not picked yet"
        run = "Run mixmerge fit MIXTURE.yaml OUT, or say alpha in place of data"
        raise MixmergeError(Fault("compose", what, "A folder that mixmerge fit made", run))
    experts = expert_set(spec)
    if answers:
        check_folders(experts)
    if folder is None:
        return
    known = read_card(folder)["experts"]
    if set(known) != set(spec.experts):
        what = f"{folder} was fitted with {', '.join(known)}, and the mixture has {', '.join(spec.experts)}"
        raise MixmergeError(Fault("experts", what, "The experts it was fitted with", "Fit the mixture again"))
    changed = [name for name, found in identities(experts).items() if known[name] != found] if answers else []
    if changed:
        what = "has changed since the mixture was fitted"
        raise MixmergeError([Fault(f"experts.{name}", what, run="Fit the mixture again") for name in changed])


def setup_of_fusion(mixture: Mixture, defaults: Defaults) -> Setup:
    """What answers: all models together, or the one that a request names.

    Raises:
        MixmergeError: a model's folder cannot be read.
    """
    spec = mixture.spec
    about = {"experts": identities(expert_set(spec)), "options": engine_options(spec)}
    version = canonical_hash(about)

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        reason = {"rule": "experts shift the logits of the base, token by token"}
        return [Decision(one.id, (Pick(NAME),), NAME, {}, "logits", reason, version) for one in queries]

    whole = {"fusion": version, "generate": spec.generate.model_dump(mode="json")}
    return Setup(experts_of(spec), PrimaryAnswer(), route, False, defaults, canonical_hash(whole))


LOGITS = Whole(
    options=LogitsOptions,
    instead="the experts shift the logits of one base",
    mark=CARD,
    folders=("folder",),
    files=("data",),
    check=check_fusion,
    ready=check_models,
    setup=setup_of_fusion,
    fit=fit_fusion,
)
