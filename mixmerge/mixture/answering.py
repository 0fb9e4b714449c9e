"""From a mixture to what answers a job."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mixmerge.aggregate.auto import AUTO, AutoOptions, auto
from mixmerge.aggregate.cascade import Escalation
from mixmerge.aggregate.records import Composition
from mixmerge.aggregate.table import composition
from mixmerge.bank.mask_files import has_masks
from mixmerge.batch.setup import Defaults, Setup
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.decision.records import Decision, Query
from mixmerge.dynamic.folders import is_dynamic
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.experts import Expert, ExpertSet
from mixmerge.experts.identity import identities
from mixmerge.mixture.fitting import outcomes_of
from mixmerge.mixture.schema import LATER, ExpertSpec, MixtureSpec
from mixmerge.mixture.wholes import whole_of
from mixmerge.routers.base import UNSAVED, Router
from mixmerge.routers.cascade_router import CascadeRouter

if TYPE_CHECKING:
    from mixmerge.mixture.wiring import Mixture


def expert_set(spec: MixtureSpec) -> ExpertSet:
    """The experts of a mixture, as engines need them."""
    made = []
    for name, one in spec.experts.items():
        price = None if one.price is None else one.price.of_tokens()
        made.append(
            Expert(
                name,
                str(one.base if one.adapter is not None else one.model),
                adapter=one.adapter,
                endpoint=one.endpoint,
                api_key_env=one.api_key_env,
                engine=one.engine or _engine_of(one),
                options=one.options,
                price=price,
                pinned=one.pinned,
            )
        )
    return ExpertSet(tuple(made))


def _engine_of(one: ExpertSpec) -> str:
    """Who runs an expert that names no engine: a folder with a bank is a network, of masks adapters are tasks."""
    if one.endpoint is not None:
        return "openai"
    if one.adapter is not None and has_masks(str(one.base)):
        return "tasks"
    return "dynamic" if one.adapter is None and is_dynamic(str(one.model)) else "transformers"


def defaults_of(spec: MixtureSpec, *, explain: bool = False) -> Defaults:
    """How its experts generate."""
    told = spec.generate
    return Defaults(told.max_new_tokens, told.temperature, told.top_p, told.stop, told.seed, explain)


def setup_of(mixture: Mixture, *, explain: bool = False) -> Setup:
    """What answers, by the mixture's router, policy and composition, or all experts as one whole.

    Args:
        mixture: it.
        explain: answers of a whole say its weights too.

    Raises:
        MixmergeError: a composition that is not available; experts whose folders are not there; all at once.
    """
    spec, policy = mixture.spec, mixture.policy
    whole = whole_of(spec.compose.kind)
    if whole is not None:
        return whole.setup(mixture, defaults_of(spec, explain=explain))
    router = mixture.routing
    experts, faults = expert_set(spec), list[Fault]()
    made: Composition | None = None
    identity: dict[str, str] = {}
    with collecting(faults):
        made = _composition(mixture)
    with collecting(faults):
        identity = identities(experts)
    if made is None or faults:
        raise MixmergeError(faults)

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        return policy.decide(router.score(queries), queries, version=router.version)

    return Setup(
        experts,
        made,
        route,
        whole=policy.whole,
        defaults=defaults_of(spec, explain=explain),
        identity=canonical_hash(
            {
                "experts": identity,
                "router": router.version if router.version != UNSAVED else fingerprint_of(router),
                "policy": policy.model_dump(mode="json"),
                "compose": spec.compose.model_dump(mode="json"),
                "generate": spec.generate.model_dump(mode="json"),
            }
        ),
    )


def fingerprint_of(router: Router) -> str:
    """Hash of what a router knows that no folder holds."""
    digest = hashlib.sha256(f"{router.kind} {router.options!r} {router.experts} {router.seed}".encode())
    features = router.features
    held = [router.state.arrays if router.state else {}, features.arrays() if features else {}]
    for arrays in held:
        for name in sorted(arrays):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _composition(mixture: Mixture) -> Composition:
    told = mixture.spec.compose
    if told.kind in LATER:
        raise MixmergeError(
            Fault(
                "compose.kind",
                f"{told.kind} is not available in this version",
                "answer, vote, aggregate, latent, ...",
                "Merge it, and name its folder as an expert: mixmerge merge RECIPE.yaml OUT",
            )
        )
    if told.kind == AUTO:
        if mixture.spec.routed.outcomes is None:
            what = "auto looks at the outcomes, and the router comes from a folder"
            raise MixmergeError(
                Fault("compose.kind", what, "router: {kind: ..., outcomes: FILE}", "Name a kind")
            )
        return auto(outcomes_of(mixture.spec), AutoOptions.model_validate(told.options))[0]
    escalation: Escalation | None = None
    if told.kind == "cascade" and "experts" not in told.options and isinstance(mixture.router, CascadeRouter):
        escalation = mixture.router.cascade()
    return composition(told.kind, told.options, escalation=escalation)
