"""The protocol of an engine: load an expert, generate, score texts, unload."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import ClassVar, Literal, Self

from mixmerge.engines.records import Chunk, Generation, Likelihood, Request, Scoring
from mixmerge.errors import Fault, MixmergeError

Capability = Literal["generate", "stream", "loglikelihood", "logprobs", "latents"]


class Engine(ABC):
    """One expert, and how it answers. Making one loads nothing; what needs the expert loads it.

    ``name`` is what errors call it. ``capabilities``: ``logprobs`` are those of generated tokens, ``loglikelihood``
    those of given texts, ``latents`` that experts read each other's. A method that is not among them raises
    MixmergeError.

    ``batch_exact``: what a request gets depends on no other of its batch, to the last bit. Where it is False, an
    engine's arithmetic depends on what shares a batch, so that another batch may give another text at a near tie;
    the same batch gives the same texts all the same.
    """

    capabilities: ClassVar[frozenset[Capability]] = frozenset({"generate"})
    batch_exact: ClassVar[bool] = True

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    @abstractmethod
    def loaded(self) -> bool:
        """Whether the expert is in memory."""

    @abstractmethod
    def load(self) -> None:
        """Bring the expert into memory; nothing if it is there.

        Raises:
            MixmergeError: there is no such expert, or it cannot be read.
            DependencyError: a package it needs is not installed.
        """

    @abstractmethod
    def unload(self) -> None:
        """Give its memory back; nothing if it is not loaded."""

    def memory(self) -> int | None:
        """Bytes that the expert's weights take when it is loaded; None if that cannot be told."""
        return None

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names that a request's ``adapter`` may have."""
        return ()

    def prepare(self, requests: Sequence[Request]) -> None:  # noqa: B027  most engines have nothing to prepare
        """Make what requests need beside the expert, while it is not in memory; nothing for most engines.

        What cannot be made is told by ``check``.
        """

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        """What keeps the engine from answering each request; None where nothing does."""
        return [self._unable(request) for request in requests]

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """A text for each request, in their order. What a request gets depends on no other of them (``batch_exact``).

        Raises:
            MixmergeError: what ``check`` says, of all requests at once.
        """

    def generate_each(self, requests: Sequence[Request]) -> list[Generation | Fault]:
        """Like ``generate``, but a request that cannot be answered gets its fault, and the others their texts.

        Raises:
            MixmergeError: what is no single request's fault, such as an expert that cannot be loaded.
        """
        refused = self.check(requests)
        able = [request for request, fault in zip(requests, refused, strict=True) if fault is None]
        given = iter(self.generate(able))
        return [next(given) if fault is None else fault for fault in refused]

    def stream(self, request: Request) -> Iterator[Chunk]:
        """The text of one request as it comes; the pieces joined are ``generate``'s text.

        Raises:
            MixmergeError: it cannot stream, or what ``check`` says.
        """
        raise self._cannot("stream")

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        """How likely each continuation is after its prompt, in their order.

        Raises:
            MixmergeError: it cannot tell, or a text does not fit into the expert's context.
        """
        raise self._cannot("loglikelihood")

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.unload()

    def _unable(self, request: Request) -> Fault | None:
        if request.logprobs and "logprobs" not in self.capabilities:
            return Fault(f"request {request.id}: logprobs", f"{self.name} cannot give them")
        if (request.reads or request.offers) and "latents" not in self.capabilities:
            what = f"{self.name} neither reads the latents of other experts nor offers its own"
            return Fault(f"request {request.id}: {'offers' if request.offers else 'reads'}", what)
        return self._without(request.adapter, f"request {request.id}")

    def _without(self, adapter: str | None, where: str) -> Fault | None:
        if adapter is None or adapter in self.adapters:
            return None
        known = ", ".join(self.adapters) or "none"
        return Fault(f"{where}: adapter", f"{self.name} has no adapter {adapter!r}", f"Known: {known}")

    def _refuse(self, requests: Sequence[Request]) -> None:
        faults = [fault for fault in self.check(requests) if fault is not None]
        if faults:
            raise MixmergeError(faults)

    def _refuse_adapters(self, scorings: Sequence[Scoring]) -> None:
        found = [self._without(one.adapter, f"scoring {one.id}") for one in scorings]
        faults = [fault for fault in found if fault is not None]
        if "latents" not in self.capabilities:
            what = f"{self.name} does not read the latents of other experts"
            faults += [Fault(f"scoring {one.id}: reads", what) for one in scorings if one.reads]
        if faults:
            raise MixmergeError(faults)

    def _cannot(self, what: Capability) -> MixmergeError:
        able = ", ".join(sorted(self.capabilities))
        return MixmergeError(Fault(f"engine {self.name}", f"has no {what}", f"It has: {able}"))
