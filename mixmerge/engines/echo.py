"""An engine without a model, for tests and demonstrations: it says what it was asked. Its tokens are words."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

from mixmerge.engines.base import Capability, Engine
from mixmerge.engines.records import (
    Chunk,
    Generation,
    Likelihood,
    Request,
    Scoring,
    cut_at_stop,
)
from mixmerge.errors import Fault, MixmergeError

_TOKENS = re.compile(r"\s*\S+|\s+")
_HEARD, _NEW = math.log(0.5), math.log(0.01)  # of a word that the prompt has, and of any other


class EchoEngine(Engine):
    """Repeats the prompt, or the last turn of a chat, up to ``max_new_tokens`` words.

    Args:
        name: what errors call it.
        reply: what to say to a request instead; a pure function, so that answers stay the same.
        delay: seconds that a batch takes, 0 or more, to see what a slow expert does.

    Raises:
        MixmergeError: the delay is below 0.
    """

    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {"generate", "stream", "loglikelihood", "logprobs"}
    )

    def __init__(
        self, name: str = "echo", *, reply: Callable[[Request], str] | None = None, delay: float = 0.0
    ) -> None:
        super().__init__(name)
        if not 0 <= delay < math.inf:
            raise MixmergeError(Fault(f"engine {name}: delay", f"is {delay}", "Seconds, 0 or more"))
        self.reply, self.delay = reply, delay
        self._loaded = False

    @property
    def loaded(self) -> bool:
        return self._loaded

    def load(self) -> None:
        self._loaded = True

    def unload(self) -> None:
        self._loaded = False

    def memory(self) -> int | None:
        return 0

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        self._refuse(requests)
        self.load()
        start = time.perf_counter()
        if self.delay and requests:
            time.sleep(self.delay)
        return [self._answer(request, start) for request in requests]

    def stream(self, request: Request) -> Iterator[Chunk]:
        generation = self.generate([request])[0]
        for word in _TOKENS.findall(generation.text):
            yield Chunk(word)
        yield Chunk("", generation)

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        """Each word of the prompt has probability 1/2, any other 1/100."""
        self._refuse_adapters(scorings)
        self.load()
        found = []
        for one in scorings:
            words = _words(one.continuation)
            logprobs = _logprobs(words, one.prompt)
            found.append(Likelihood(one.id, logprobs, all(value == _HEARD for value in logprobs)))
        return found

    def _answer(self, request: Request, start: float) -> Generation:
        heard = request.prompt if isinstance(request.prompt, str) else request.prompt[-1].content
        said = heard if self.reply is None else self.reply(request)
        words = _TOKENS.findall(said)
        text, stopped = cut_at_stop("".join(words[: request.max_new_tokens]), request.stop)
        out = _TOKENS.findall(text)
        return Generation(
            id=request.id,
            text=text,
            tokens_in=len(_words(_whole(request))),
            tokens_out=len(out),
            finish="stop" if stopped or len(words) <= request.max_new_tokens else "length",
            seconds=time.perf_counter() - start,
            logprobs=_logprobs(out, _whole(request)) if request.logprobs else None,
        )


def _whole(request: Request) -> str:
    if isinstance(request.prompt, str):
        return request.prompt
    return "\n".join(message.content for message in request.prompt)


def _words(text: str) -> list[str]:
    return text.split() or [text]


def _logprobs(words: Sequence[str], prompt: str) -> tuple[float, ...]:
    heard = set(prompt.split())
    return tuple(_HEARD if word.strip() in heard else _NEW for word in words)
