"""What an engine is asked, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mixmerge.errors import Fault, MixmergeError

ROLES = ("system", "user", "assistant", "tool")
Finish = Literal["stop", "length"]
_ROUNDED = 1e-6  # by which shares may add up to more than 1


@dataclass(frozen=True)
class Message:
    """One turn of a chat: ``role`` is one of ``ROLES``."""

    role: str
    content: str


@dataclass(frozen=True)
class Request:
    """One text to generate.

    Args:
        id: its name in answers and faults.
        prompt: a text that is continued as it is, or the turns of a chat.
        max_new_tokens: 1 or more; fewer are generated where the expert's context ends before.
        temperature: 0 for the likeliest token each time, else what logits are divided by; 0 or more.
        top_p: draw from the likeliest tokens that have this much probability together; above 0, at most 1.
        stop: texts that end the answer before them; none is empty.
        seed: of the draws, 0 to 2**63 - 1. They depend on it and on the prompt, on nothing else in the batch.
        logprobs: give the log-probability of every token that was generated.
        adapter: which of the engine's adapters answers; None for the model itself.
        explain: say too how much the answer got of each expert, where an engine mixes them (``Generation.weights``).
        reads: peers whose latents of the same prompt the expert reads while it answers, each once, with its gate: a
            share of 1, of which the expert itself has what is left. Empty: it answers alone.
        offers: no text is wanted, but that the expert reads the prompt and its latents are kept for others to read.
            The generation's ``text`` is the name they are kept under.

    Raises:
        MixmergeError: everything above that does not hold, at once.
    """

    id: str
    prompt: str | tuple[Message, ...]
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    logprobs: bool = False
    adapter: str | None = None
    explain: bool = False
    reads: tuple[tuple[str, float], ...] = ()
    offers: bool = False

    def __post_init__(self) -> None:
        wrong = [
            (self.max_new_tokens < 1, "max_new_tokens", self.max_new_tokens, "1 or more"),
            (
                not (math.isfinite(self.temperature) and self.temperature >= 0),
                "temperature",
                self.temperature,
                "0 or more",
            ),
            (not 0 < self.top_p <= 1, "top_p", self.top_p, "Above 0, at most 1"),
            (not all(self.stop), "stop", list(self.stop), "Texts of one character or more"),
            (not 0 <= self.seed < 2**63, "seed", self.seed, "0 to 2**63 - 1"),
            (
                self.offers and bool(self.reads),
                "offers",
                True,
                "Reads no peers: what offers is a peer itself",
            ),
        ]
        faults = [
            Fault(f"request {self.id}: {name}", f"is {value!r}", allowed)
            for bad, name, value, allowed in wrong
            if bad
        ]
        faults += _unreadable(self.reads, f"request {self.id}: reads")
        if not self.prompt:
            faults.append(Fault(f"request {self.id}: prompt", "is empty", "A text, or turns of a chat"))
        elif not isinstance(self.prompt, str):
            faults += [
                Fault(f"request {self.id}: prompt[{at}].role", f"is {message.role!r}", ", ".join(ROLES))
                for at, message in enumerate(self.prompt)
                if message.role not in ROLES
            ]
        if faults:
            raise MixmergeError(faults)

    @property
    def text(self) -> str:
        """What a gate reads: the text, or what users said in the chat, with empty lines between."""
        if isinstance(self.prompt, str):
            return self.prompt
        return said_by_users(self.prompt)


def _unreadable(reads: Sequence[tuple[str, float]], where: str) -> list[Fault]:
    """What is wrong with the peers and gates of a request."""
    names, gates = [name for name, _ in reads], [gate for _, gate in reads]
    if len(set(names)) < len(names):
        return [Fault(where, f"names a peer twice: {', '.join(names)}", "Each once")]
    if not all(math.isfinite(gate) and gate >= 0 for gate in gates) or math.fsum(gates) > 1 + _ROUNDED:
        return [Fault(where, f"has the gates {gates}", "Shares of 1, 0 or more")]
    return []


def said_by_users(turns: Sequence[Message]) -> str:
    """What users said in a chat, with empty lines between; if they said nothing, what all did."""
    said = [turn.content for turn in turns if turn.role == "user"]
    return "\n\n".join(said or [turn.content for turn in turns])


@dataclass(frozen=True)
class Generation:
    """What was generated for a request.

    Args:
        id: of the request.
        text: without the text that stopped it.
        tokens_in: of the prompt, as the expert read it.
        tokens_out: that were generated, those of a stop text included and the end-of-text token not.
        finish: ``stop``: the expert ended it, or a stop text did; ``length``: it was cut.
        seconds: from the start of its batch to its last token.
        logprobs: natural logarithms of the probabilities of the ``tokens_out`` tokens under the expert, before
            temperature and top_p; None where they were not asked for.
        weights: how much of each expert it got, as JSON values: ``dynamic.explaining.Explanation.as_dict``; None where
            nobody asked, or nothing is mixed.
    """

    id: str
    text: str
    tokens_in: int
    tokens_out: int
    finish: Finish
    seconds: float
    logprobs: tuple[float, ...] | None = None
    weights: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Chunk:
    """A piece of a text that is streamed; the last one, which may be empty, brings the whole ``generation``."""

    text: str
    generation: Generation | None = None


@dataclass(frozen=True)
class Scoring:
    """A text whose likelihood is asked.

    Args:
        id: its name in answers and faults.
        prompt: what comes before; with "" the whole text is scored, its first token too where the expert has a
            token that begins texts.
        continuation: what is scored; not empty.
        adapter: which of the engine's adapters scores; None for the model itself.
        reads: as in ``Request``.

    Raises:
        MixmergeError: the continuation is empty, or ``reads`` is wrong.
    """

    id: str
    prompt: str
    continuation: str
    adapter: str | None = None
    reads: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        faults = _unreadable(self.reads, f"scoring {self.id}: reads")
        if not self.continuation:
            faults.append(Fault(f"scoring {self.id}: continuation", "is empty", "A text"))
        if faults:
            raise MixmergeError(faults)


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is.

    Args:
        id: of the scoring.
        logprobs: natural logarithms of the probabilities of its tokens, each after all before it.
        greedy: every token of it is the likeliest one.
    """

    id: str
    logprobs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        return math.fsum(self.logprobs)


def cut_at_stop(text: str, stop: Iterable[str]) -> tuple[str, bool]:
    """The text before the first stop text in it, and whether there is one."""
    at = min((place for one in stop if (place := text.find(one)) >= 0), default=-1)
    return (text, False) if at < 0 else (text[:at], True)


def held_back(text: str, stop: Iterable[str]) -> int:
    """How many characters at the end of the text may be the beginning of a stop text."""
    return max(
        (n for one in stop for n in range(1, min(len(one), len(text) + 1)) if text.endswith(one[:n])),
        default=0,
    )
