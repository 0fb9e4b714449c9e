"""From a mixture to what answers a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mixmerge.aggregate.cascade import Escalation
from mixmerge.aggregate.records import Composition
from mixmerge.aggregate.table import composition
from mixmerge.batch.setup import Defaults, Setup
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.decision.records import Decision, Query
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts import Expert, ExpertSet, identity
from mixmerge.mixture.schema import LATER, MixtureSpec
from mixmerge.outcomes.table import Price
from mixmerge.routers.cascade_router import CascadeRouter

if TYPE_CHECKING:
    from mixmerge.mixture.wiring import Mixture


def expert_set(spec: MixtureSpec) -> ExpertSet:
    """The experts of a mixture, as engines need them."""
    made = []
    for name, one in spec.experts.items():
        price = None if one.price is None else Price(one.price.input, one.price.output, one.price.size)
        made.append(
            Expert(
                name,
                str(one.base if one.adapter is not None else one.model),
                adapter=one.adapter,
                endpoint=one.endpoint,
                api_key_env=one.api_key_env,
                engine=one.engine or ("openai" if one.endpoint is not None else "transformers"),
                options=one.options,
                price=price,
                pinned=one.pinned,
            )
        )
    return ExpertSet(tuple(made))


def defaults_of(spec: MixtureSpec) -> Defaults:
    """How its experts generate."""
    told = spec.generate
    return Defaults(told.max_new_tokens, told.temperature, told.top_p, told.stop, told.seed)


def setup_of(mixture: Mixture) -> Setup:
    """What answers, by the mixture's router, policy and composition.

    Raises:
        MixmergeError: a composition that is not available; an expert whose folder is not there.
    """
    spec, router, policy = mixture.spec, mixture.router, mixture.policy
    experts = expert_set(spec)

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        return policy.decide(router.score(queries), queries, version=router.version)

    return Setup(
        experts,
        _composition(mixture),
        route,
        whole=bool(policy.trim),
        defaults=defaults_of(spec),
        identity=canonical_hash(
            {
                "experts": {one.name: identity(one) for one in experts},
                "router": router.version,
                "policy": policy.model_dump(mode="json"),
                "compose": spec.compose.model_dump(mode="json"),
                "generate": spec.generate.model_dump(mode="json"),
            }
        ),
    )


def _composition(mixture: Mixture) -> Composition:
    told = mixture.spec.compose
    if told.kind in LATER:
        raise MixmergeError(
            Fault(
                "compose.kind",
                f"{told.kind} is not available in this version",
                "answer, vote, aggregate, ...",
            )
        )
    escalation: Escalation | None = None
    if told.kind == "cascade" and "experts" not in told.options and isinstance(mixture.router, CascadeRouter):
        escalation = mixture.router.cascade
    return composition(told.kind, told.options, escalation=escalation)
