"""Mixtures whose experts read each other, at work: who answers a prompt, who is read, and what is loaded for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mixmerge.aggregate.latent import LatentAnswer
from mixmerge.batch.decided import Route
from mixmerge.batch.setup import Defaults, Setup
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts import Expert, ExpertSet
from mixmerge.mixture.latent import LatentOptions
from mixmerge.mixture.schema import MixtureSpec

if TYPE_CHECKING:
    from mixmerge.latent.files import LatentCard
    from mixmerge.latent.router import Routed, Routing
    from mixmerge.mixture.wiring import Mixture


def setup_of_latent(mixture: Mixture, defaults: Defaults) -> Setup:
    """What answers: experts with the glue between them; the expert that a request names answers alone.

    Who is active and who of them answers is said by the router that was fitted with the glue, or by the mixture's own
    router and policy, whose picks' weights are gates then.

    Raises:
        MixmergeError: the folder holds no glue, or one of other experts.
    """
    from mixmerge.latent.files import load_latent

    spec = mixture.spec
    told = LatentOptions.model_validate(spec.compose.options)
    card = load_latent(str(told.folder))
    route, decides = _glues(told, card) if spec.router is None else _mixtures(mixture)
    about = {
        "glue": card.hash,
        "decides": decides,
        "compose": spec.compose.model_dump(mode="json"),
        "generate": spec.generate.model_dump(mode="json"),
    }
    return Setup(
        latent_experts(spec, card),
        LatentAnswer(together=card.mode != "prompt"),
        route,
        whole=spec.router is not None and mixture.policy.whole,
        defaults=defaults,
        identity=canonical_hash(about),
    )


def latent_experts(spec: MixtureSpec, card: LatentCard) -> ExpertSet:
    """The experts as engines need them: each a unit of its own in ``prompt`` mode, else all one unit."""
    told = LatentOptions.model_validate(spec.compose.options)
    places = {name: _place(spec, name) for name in spec.experts}
    made = []
    for name, one in spec.experts.items():
        alone = {"expert": name} if card.mode == "prompt" else {}
        made.append(
            Expert(
                name,
                str(told.folder),
                adapter=None if alone else name,
                engine="latent",
                options={**alone, "experts": places, "dtype": told.dtype},
                price=None if one.price is None else one.price.of_tokens(),
                pinned=one.pinned,
            )
        )
    return ExpertSet(tuple(made))


def _place(spec: MixtureSpec, name: str) -> dict[str, Any]:
    one = spec.experts[name]
    if one.adapter is None:
        return {"model": str(one.model)}
    return {"model": str(one.base), "adapter": one.adapter}


def _glues(told: LatentOptions, card: LatentCard) -> tuple[Route, dict[str, Any]]:
    """Decisions of the router that was fitted with the glue, which is loaded when it is asked; as ``_mixtures``."""
    held: list[Routing] = []

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        from mixmerge.latent.files import load_routing

        if not held:
            found = load_routing(str(told.folder), card, encoder=told.encoder)
            if found is None:  # of a mixture that was not looked at before
                what = "the glue was fitted with a router of the mixture's own, and there is none"
                raise MixmergeError(Fault("router", what, run="Add router"))
            held.append(found)
        routed = held[0]([query.text for query in queries])
        return [_decided(query, one, card) for query, one in zip(queries, routed, strict=True)]

    return route, {}


def _decided(query: Query, routed: Routed, card: LatentCard) -> Decision:
    order = sorted(routed.gates, key=lambda name: (name != routed.primary, -routed.gates[name], name))
    picks = tuple(Pick(name, weight=routed.gates[name]) for name in order)
    peers = ", ".join(f"{one.expert} {one.weight:.2f}" for one in picks[1:])
    rule = f"{routed.primary} {picks[0].weight:.2f} answers" + (f" and reads {peers}" if peers else "")
    return Decision(
        query.id, picks, routed.primary, dict(routed.scores), "latent", {"rule": rule}, card.hash[:12]
    )


def _mixtures(mixture: Mixture) -> tuple[Route, dict[str, Any]]:
    """Decisions of the mixture's own router and policy, and what tells them from others."""
    from mixmerge.mixture.answering import fingerprint_of
    from mixmerge.routers.base import UNSAVED

    policy, router = mixture.policy, mixture.routing

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        return policy.decide(router.score(queries), queries, version=router.version)

    version = router.version if router.version != UNSAVED else fingerprint_of(router)
    return route, {"router": version, "policy": policy.model_dump(mode="json")}
