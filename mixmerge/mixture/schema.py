"""What a mixture's YAML says, once it is read: strict frozen models, and nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from mixmerge.decision.policies import Policy
from mixmerge.document.sections import Strict
from mixmerge.errors import Fault, MixmergeError
from mixmerge.mixture.wholes import whole_of
from mixmerge.outcomes.table import Price

# Compositions that a mixture may name before they can be used. The others are in ``mixmerge.aggregate``, and those of
# which no answers are composed in ``mixture.wholes``.
LATER = ("twin",)


class PriceSpec(Strict):
    """Dollars per million tokens of prompt and of answer; ``size`` in billions of parameters, if it counts."""

    input: float = Field(ge=0)
    output: float = Field(ge=0)
    size: float | None = Field(default=None, gt=0)

    def of_tokens(self) -> Price:
        """What outcomes and experts take."""
        return Price(self.input, self.output, self.size)


class ExpertSpec(Strict):
    """An expert, in one of three forms: ``model``; ``adapter`` and ``base``; ``endpoint`` and ``model``.

    Paths are relative to where the command runs, as in recipes.

    Args:
        model: folder or hub id; with an endpoint, the name it has there.
        engine: how it answers, such as ``transformers`` or ``vllm``.
        adapter, base: folders or hub ids; experts with one base share it.
        endpoint: http(s) address of an OpenAI-compatible server.
        api_key_env: environment variable that holds the endpoint's key.
        options: of the engine, such as ``dtype`` or ``revision``.
        pinned: once loaded for a job, it stays in memory.
        price: of its tokens. A router fitted from outcomes expects costs by it; one from a folder keeps the
            prices it was fitted with.
    """

    model: str | None = Field(default=None, min_length=1)
    engine: str | None = Field(default=None, min_length=1)
    adapter: str | None = Field(default=None, min_length=1)
    base: str | None = Field(default=None, min_length=1)
    endpoint: str | None = Field(default=None, pattern="^https?://[^\\s]+$")
    api_key_env: str | None = Field(default=None, pattern="^[A-Za-z_][A-Za-z0-9_]*$")
    options: dict[str, Any] = Field(default_factory=dict)
    pinned: bool = False
    price: PriceSpec | None = None


class RouterSpec(Strict):
    """A router: ``folder`` of a fitted one, or a ``kind`` and the ``outcomes`` to fit it on.

    Args:
        folder: that ``mixmerge route fit`` wrote.
        kind: a name of ``mixmerge route ls``.
        outcomes: file of an outcome table.
        options: of that kind of router.
        features: ``kind`` and options of what embeds the queries; TF-IDF by default.
        seed: of fitting, 0 to 2^32 - 1.
    """

    folder: str | None = Field(default=None, min_length=1)
    kind: str | None = Field(default=None, min_length=1)
    outcomes: str | None = Field(default=None, min_length=1)
    options: dict[str, Any] = Field(default_factory=dict)
    features: dict[str, Any] | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)


class ComposeSpec(Strict):
    """How answers are made from the picked experts': a kind, and its options, which are keys beside it."""

    kind: str = "answer"
    options: dict[str, Any] = Field(default_factory=dict)


class GenerateSpec(Strict):
    """How an expert generates, where a request does not say.

    Args:
        max_new_tokens: at most so many.
        temperature: 0 is the most likely token each time.
        top_p: the likeliest tokens that have this much probability together are drawn from.
        stop: texts that end an answer.
        seed: of sampling.
    """

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    stop: tuple[str, ...] = Field(default=(), strict=False)
    seed: int = Field(default=0, ge=0, lt=2**63)


class MixtureSpec(Strict):
    """A mixture.

    Args:
        experts: by name, in the order of the YAML.
        router: scores them; None where they answer as one whole (``mixture.wholes``) that needs none.
        policy: decides; None if the YAML names none: then the one in the router's folder, or ``argmax``.
        compose, generate: of the answers.
    """

    experts: dict[str, ExpertSpec] = Field(min_length=1)
    router: RouterSpec | None = None
    policy: Policy | None = None
    compose: ComposeSpec = ComposeSpec()
    generate: GenerateSpec = GenerateSpec()

    @property
    def routed(self) -> RouterSpec:
        """What it says of its router.

        Raises:
            MixmergeError: it has none.
        """
        if self.router is None:
            raise MixmergeError(no_router(self.compose.kind))
        return self.router


def no_router(kind: str) -> Fault:
    """A mixture whose experts answer as one whole of this kind is asked for its router."""
    whole = whole_of(kind)
    instead = "" if whole is None else whole.instead
    what = f"the mixture has none: {instead or 'its experts answer as one'}"
    return Fault("router", what, "A mixture with a router")


@dataclass(frozen=True)
class Parsed:
    """What reading a mixture gave.

    Args:
        mixture: None if there is any fault.
        faults: everything that is wrong.
        text: the source, verbatim; "" if it was a mapping.
    """

    mixture: MixtureSpec | None
    faults: tuple[Fault, ...]
    text: str

    def require(self) -> MixtureSpec:
        """The mixture.

        Raises:
            MixmergeError: with every fault, if there are any.
        """
        if self.mixture is None:
            raise MixmergeError(self.faults)
        return self.mixture
