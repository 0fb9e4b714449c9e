"""The engine of fitted interactions: an expert that reads what peers have left of a prompt, or all of them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mixmerge.engines.base import Capability, Engine
from mixmerge.engines.loading import Dtype
from mixmerge.engines.local import FULL, TransformersEngine
from mixmerge.engines.records import Chunk, Generation, Likelihood, Request, Scoring
from mixmerge.errors import Fault, MixmergeError, OutOfMemoryError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.latent.companions import Offers, Wanted
    from mixmerge.latent.files import LatentCard
    from mixmerge.latent.glue import Glue
    from mixmerge.latent.primary import PrimaryEngine

R = TypeVar("R", Request, Scoring)
T = TypeVar("T")
_AGAIN = 3  # latents that others have pushed out of the store are made again so often


@dataclass(frozen=True, eq=False)
class _Parts:
    """What the engine is made of, before an expert is loaded."""

    card: LatentCard
    glue: Glue
    offers: Offers
    experts: Mapping[str, PrimaryEngine]


class LatentEngine(Engine):
    """Experts with the glue between them. What holds for ``TransformersEngine`` holds for it.

    In ``prompt`` mode it is one expert. A request that ``offers`` makes it keep its latents of the prompt in the store;
    one that ``reads`` takes there what its peers have kept. What is lacking is made first, by loading the peers one
    after the other while the expert itself is not in memory: so that is never more than the largest of them.

    In the other modes all experts are in memory, and a request's ``adapter`` says which of them answers; without one it
    is who always does, or the first. Peers read the answer along, as far as their contexts reach.

    A request that reads nobody is answered by the expert alone.

    Args:
        model: a fitted mixture's folder.
        experts: name -> ``model`` (folder or hub id), and ``adapter`` and ``revision`` where there are; those the glue
            was fitted with.
        expert: who answers, in ``prompt`` mode.
        adapters: names that a request's ``adapter`` may have, in the other modes; each stands for itself.
        store: folder of latents, which several engines may share; None, or one whose parent is not on this machine: a
            temporary one.
        store_bytes: it is to have at most; by default half of what its disk has room for. What the peers of one request
            leave is kept all the same.
        dtype, device, batch_tokens, name: as of ``TransformersEngine``.

    Raises:
        MixmergeError: ``expert`` is none of the experts, or an option is out of range.
    """

    capabilities: ClassVar[frozenset[Capability]] = TransformersEngine.capabilities | {"latents"}

    def __init__(
        self,
        model: str,
        *,
        experts: Mapping[str, Mapping[str, Any]],
        expert: str | None = None,
        adapters: Mapping[str, str] | None = None,
        store: str | None = None,
        store_bytes: int | None = None,
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
        name: str | None = None,
    ) -> None:
        super().__init__(name or expert or model)
        where, faults = f"engine {self.name}", list[Fault]()
        if expert is not None and expert not in experts:
            faults.append(Fault(f"{where}: expert", f"is {expert!r}", choices(expert, list(experts))))
        if dtype != "auto" and dtype not in FULL:
            faults.append(Fault(f"{where}: dtype", f"is {dtype!r}", f"auto, {', '.join(FULL)}"))
        if batch_tokens < 1:
            faults.append(Fault(f"{where}: batch_tokens", f"is {batch_tokens}", "1 or more"))
        if store_bytes is not None and store_bytes < 1:
            faults.append(Fault(f"{where}: store_bytes", f"is {store_bytes}", "1 or more"))
        if faults:
            raise MixmergeError(faults)
        self.model, self.experts, self.expert = model, dict(experts), expert
        self.store, self.store_bytes = store, store_bytes
        self.dtype, self.device, self.batch_tokens = dtype, device, batch_tokens
        self._adapters = tuple(adapters or (() if expert is not None else experts))
        self._made: _Parts | None = None

    @property
    def loaded(self) -> bool:
        return self._made is not None and any(one.loaded for one in self._made.experts.values())

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters

    def load(self) -> None:
        for one in self._here():
            one.load()

    def unload(self) -> None:
        if self._made is None:
            return
        for one in self._made.experts.values():
            one.unload()

    def memory(self) -> int | None:
        """Bytes of the weights of the experts that are in memory at once."""
        sizes = [one.memory() for one in self._here()]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def prepare(self, requests: Sequence[Request]) -> None:
        """Make the latents that are lacking; what cannot be made is told by ``check``.

        Raises:
            OutOfMemoryError: those of so many requests fit neither into memory nor into the store.
            OutputError: the disk refuses.
        """
        self._prepare(requests)

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        """As ``Engine.check``; raises what ``prepare`` does."""
        lost = self._prepare(requests)
        refused = [self._unable(one) or self._unreadable(one, lost) for one in requests]
        able = [one for one, fault in zip(requests, refused, strict=True) if fault is None]
        told = iter(self._each(able, lambda one, some: one.check(some), split=False))
        return [next(told) if fault is None else fault for fault in refused]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """As ``TransformersEngine.generate``; what offers gets the name that its latents are kept under.

        Raises:
            MixmergeError: what ``check`` says, of all requests at once.
            OutOfMemoryError: a batch did not fit, or what its peers leave.
        """
        self._refuse(requests)
        return self._with_latents(requests, partial(self._each, requests, _generated))

    def stream(self, request: Request) -> Iterator[Chunk]:
        self._refuse([request])
        if request.offers:
            yield Chunk("", self.generate([request])[0])
            return
        (one,), (asked,) = self._split([request])
        yield from one.stream(asked)

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        self._refuse_adapters(scorings)
        lost = self._prepare(scorings)
        faults = [fault for one in scorings if (fault := self._unreadable(one, lost)) is not None]
        if faults:
            raise MixmergeError(faults)
        return self._with_latents(scorings, partial(self._each, scorings, _scored))

    # --- who answers

    def _each(
        self,
        asked: Sequence[R],
        work: Callable[[PrimaryEngine, Sequence[R]], Sequence[T]],
        *,
        split: bool = True,
    ) -> list[T]:
        """What experts give to those of the requests that are theirs, in the order of all.

        Args:
            asked: requests or scorings.
            work: of one expert, on requests of one kind.
            split: those that read, offer and do neither apart.
        """
        engines, plain = self._split(asked)
        groups: dict[tuple[str, int], list[int]] = {}
        for at, (engine, one) in enumerate(zip(engines, plain, strict=True)):
            kind = (2 if getattr(one, "offers", False) else int(bool(one.reads))) if split else 0
            groups.setdefault((engine.name, kind), []).append(at)
        found: dict[int, T] = {}
        for places in groups.values():
            given = work(engines[places[0]], [plain[at] for at in places])
            found.update(zip(places, given, strict=True))
        return [found[at] for at in range(len(asked))]

    def _split(self, asked: Sequence[R]) -> tuple[list[PrimaryEngine], list[R]]:
        """Who answers each, and what it is asked."""
        return [self._who(one.adapter) for one in asked], [replace(one, adapter=None) for one in asked]

    def _who(self, adapter: str | None) -> PrimaryEngine:
        parts = self._parts()
        return parts.experts[adapter or self.expert or parts.card.primary or parts.card.names[0]]

    def _here(self) -> list[PrimaryEngine]:
        """The experts that are in memory when it is loaded."""
        parts = self._parts()
        return list(parts.experts.values()) if self.expert is None else [parts.experts[self.expert]]

    # --- peers

    def _prepare(self, asked: Sequence[Request] | Sequence[Scoring]) -> dict[Wanted, Fault]:
        """Make the latents that are lacking; of what cannot be made, why."""
        parts = self._parts()
        if parts.card.mode != "prompt":
            return {}
        # The largest expert is all that there is room for.
        return parts.offers.prepare(_wanted(asked), before=self.unload)

    def _with_latents(self, asked: Sequence[Request] | Sequence[Scoring], work: Callable[[], T]) -> T:
        """What ``work`` gives; again, if engines that share the store needed the room of what it was to read."""
        prompts = self._parts().card.mode == "prompt"
        for _ in range(_AGAIN - 1):
            try:
                return work()
            except OutOfMemoryError:
                if not prompts or not self._parts().offers.lacking(_wanted(asked))[0]:
                    raise
            self._prepare(asked)
        return work()

    def _unreadable(self, one: Request | Scoring, lost: Mapping[Wanted, Fault]) -> Fault | None:
        """What keeps a request from reading its peers; ``lost``: latents that could not be made."""
        kind = "request" if isinstance(one, Request) else "scoring"
        parts, where = self._parts(), f"{kind} {one.id}: reads"
        engine = self._who(one.adapter)
        for peer, _gate in one.reads:
            if peer == engine.name:
                return Fault(where, f"{peer} does not read itself", "Other experts")
            if peer not in parts.experts:
                return Fault(where, f"no expert is called {peer!r}", choices(peer, list(parts.experts)))
            fault = self._left_nothing(peer, one, lost)
            if fault is not None:
                return Fault(f"{where}: {fault.where}", fault.what, fault.allowed, fault.run)
        primary = parts.card.primary
        if one.reads and primary not in (None, engine.name):
            return Fault(where, f"the glue lets {primary} alone read", f"{primary}, or no peers")
        return None

    def _left_nothing(self, peer: str, one: Request | Scoring, lost: Mapping[Wanted, Fault]) -> Fault | None:
        parts = self._parts()
        if parts.card.mode == "prompt":
            return lost.get((peer, one.prompt))
        try:
            parts.offers.companion(peer).reading(one.prompt)
        except MixmergeError as error:
            return error.faults[0]
        return None

    def _parts(self) -> _Parts:
        """Card, glue and experts, none of which is loaded.

        Raises:
            MixmergeError: the folder holds no glue, or one of other experts.
        """
        if self._made is None:
            self._made = self._read()
        return self._made

    def _read(self) -> _Parts:
        from mixmerge.latent.companions import Offers, companions_of
        from mixmerge.latent.files import load_glue, load_latent
        from mixmerge.latent.primary import PrimaryEngine

        card = load_latent(self.model)
        lacking = [name for name in card.names if name not in self.experts]
        if lacking:
            what = f"has no place of {', '.join(lacking)}, which its glue is of"
            raise MixmergeError(Fault(f"engine {self.name}: experts", what, "A model for each expert"))
        glue = load_glue(self.model, card, device=self.device)
        companions = companions_of(
            {name: self.experts[name] for name in card.names},
            {one.name: one.hash for one in card.experts},
            {name: glue.peer_depths(name) if name != card.primary else () for name in card.names},
            dtype=self.dtype,
            device=self.device,
            too_long="left" if card.too_long == "left" else "refuse",
        )
        offers = Offers(companions, self.store, limit=self.store_bytes, batch_tokens=self.batch_tokens)
        experts: dict[str, PrimaryEngine] = {}
        for name, one in companions.items():
            experts[name] = PrimaryEngine(
                one,
                glue,
                offers,
                mode=card.mode,
                chunk=card.chunk,
                peers=experts,
                batch_tokens=self.batch_tokens,
            )
        return _Parts(card, glue, offers, experts)


def _wanted(asked: Sequence[Request] | Sequence[Scoring]) -> list[Wanted]:
    return [(peer, one.prompt) for one in asked for peer, _ in one.reads]


def _generated(engine: PrimaryEngine, some: Sequence[Request]) -> Sequence[Generation]:
    return engine.offer(some) if some[0].offers else engine.generate(some)


def _scored(engine: PrimaryEngine, some: Sequence[Scoring]) -> Sequence[Likelihood]:
    return engine.likelihood_reading(some) if some[0].reads else engine.loglikelihood(some)
