"""The engine of experts behind an OpenAI-compatible server: OpenAI's own, vLLM, llama.cpp, Ollama and others."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import replace
from queue import SimpleQueue
from typing import ClassVar
from urllib.parse import urlsplit

from mixmerge.engines.base import Capability, Engine
from mixmerge.engines.openai_link import Link, posted, read
from mixmerge.engines.openai_waiting import backoff
from mixmerge.engines.openai_wire import (
    LIMITS,
    OMITTABLE,
    AttemptError,
    Gathering,
    Limit,
    body,
    events,
    path_of,
)
from mixmerge.engines.records import Chunk, Generation, Request, cut_at_stop, held_back
from mixmerge.errors import Fault, MixmergeError

Hear = Callable[[str], None]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_USUAL_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_SHORTEST_KEY = 4  # characters; a shorter one would blacken ordinary words
_LONGEST = 400  # characters of what a server says
_BASE = 0.5  # seconds, the first bound of a wait


class OpenAIEngine(Engine):
    """An expert that a server runs; a chat goes to ``chat/completions``, a text to ``completions``.

    Whether seeds fix the draws, how log-probabilities are scaled and what counts as a token is up to the server;
    with log-probabilities, ``tokens_out`` is how many of them it gave. A server that reports no usage has a token
    counted for every four bytes.

    Connection errors, timeouts, answers that cannot be read or break off, and statuses 408, 409, 429 and 5xx are
    tried again after a random wait whose bound doubles (``openai_waiting.backoff``), or after the time the server
    asks for, for all requests then. Any other refusal is final. What would meet every request, such as a refused
    key, an unknown model or a server that cannot be reached, is not tried again for those that wait.

    Certificates are always verified; ``SSL_CERT_FILE`` names other authorities. Redirects are not followed. The
    key is read from the environment for each request, and is in no record, error or log; nor are prompts in logs.
    Proxies of the environment are used. To an ``http`` address the key travels as plain text.

    Args:
        endpoint: such as ``https://api.openai.com/v1``.
        model: the expert's name there.
        api_key_env: name of the environment variable that holds the key; None sends no key.
        concurrency: requests under way at once, of all calls together; 1 or more.
        timeout: seconds without a byte until an attempt is given up, above 0.
        retries: attempts after the first, 0 or more.
        max_wait: seconds of one wait at most, above 0, whatever the server asks.
        max_tokens_field: what the server calls the largest number of tokens of a chat.
        omit: fields that it does not take and that are not sent, of ``seed``, ``stop``, ``stream_options``,
            ``temperature``, ``top_p``. Stop texts are all sent, and OpenAI refuses more than four; they are cut
            here too, so that they may be left out.
        name: what errors call it; by default the model.
        sleep, clock, uniform: of waits: what waits so many seconds, the seconds now, and the next uniform number in
            [0, 1).

    Raises:
        MixmergeError: everything above that does not hold, at once.
    """

    capabilities: ClassVar[frozenset[Capability]] = frozenset({"generate", "stream", "logprobs"})

    def __init__(
        self,
        endpoint: str,
        *,
        model: str,
        api_key_env: str | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 5,
        max_wait: float = 60.0,
        max_tokens_field: Limit = "max_tokens",
        omit: Collection[str] = (),
        name: str | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(name or model)
        wrong = [
            (not model, "model", "is empty", "A name that the server knows"),
            (concurrency < 1, "concurrency", f"is {concurrency}", "1 or more"),
            (not 0 < timeout < float("inf"), "timeout", f"is {timeout}", "Above 0"),
            (retries < 0, "retries", f"is {retries}", "0 or more"),
            (not 0 < max_wait < float("inf"), "max_wait", f"is {max_wait}", "Above 0"),
            (
                max_tokens_field not in LIMITS,
                "max_tokens_field",
                f"is {max_tokens_field!r}",
                ", ".join(LIMITS),
            ),
            (
                not set(omit) <= set(OMITTABLE),
                "omit",
                f"is {sorted(omit)}",
                f"Some of {', '.join(OMITTABLE)}",
            ),
            (
                api_key_env is not None and not _VARIABLE.fullmatch(api_key_env),
                "api_key_env",
                "is no name of a variable",  # not quoted: it may be the key itself
                "The name of an environment variable, such as OPENAI_API_KEY",
            ),
        ]
        faults = [
            Fault(f"engine {self.name}: {at}", what, allowed) for bad, at, what, allowed in wrong if bad
        ]
        faults += [Fault(f"engine {self.name}: endpoint", *fault) for fault in _endpoint_faults(endpoint)]
        if faults:
            raise MixmergeError(faults)
        self.endpoint, self.model, self.api_key_env = endpoint.rstrip("/"), model, api_key_env
        self.concurrency, self.timeout, self.retries, self.max_wait = concurrency, timeout, retries, max_wait
        self._limit: Limit = max_tokens_field
        self._omit = frozenset(omit)
        self._sleep, self._clock = sleep, clock
        self._uniform = random.Random().random if uniform is None else uniform
        self._link: Link | None = None
        self._lock = threading.Lock()

    @property
    def loaded(self) -> bool:
        return self._link is not None

    def load(self) -> None:
        """Look for the key; nothing is sent.

        Raises:
            MixmergeError: the variable of the key is not set or holds no key, or the proxy or certificates that the
                environment names cannot be used.
        """
        self._linked()

    def unload(self) -> None:
        """Cancel what is under way, and close the connections."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def cancel(self) -> None:
        """End what other threads wait for: answers that are there are given, the rest are faults."""
        link = self._link
        if link is not None:
            link.cancel()

    def memory(self) -> int | None:
        """0: the weights are elsewhere."""
        return 0

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        self._refuse(requests)
        given = self.generate_each(requests)
        faults = [one for one in given if isinstance(one, Fault)]
        if faults:
            raise MixmergeError(dict.fromkeys(faults))  # many may share one
        return [one for one in given if isinstance(one, Generation)]

    def generate_each(self, requests: Sequence[Request]) -> list[Generation | Fault]:
        refused, link = self.check(requests), self._linked()
        able = [request for request, fault in zip(requests, refused, strict=True) if fault is None]
        given = iter(link.run(self._each(link, able)))
        return [next(given) if fault is None else fault for fault in refused]

    def stream(self, request: Request) -> Iterator[Chunk]:
        """The text of one request as it comes. Who stops reading ends the request.

        A stream that breaks off is asked for again; it goes on where it was if the server says the same text again.
        """
        self._refuse([request])
        link = self._linked()
        pieces: SimpleQueue[str | None] = SimpleQueue()
        future = link.start(self._each(link, [request], pieces.put))
        future.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield Chunk(piece)
            (given,) = future.result()
        finally:
            future.cancel()
        if isinstance(given, Fault):
            raise MixmergeError(given)
        yield Chunk("", given)

    # --- on the loop

    async def _each(
        self, link: Link, requests: Sequence[Request], put: Hear | None = None
    ) -> list[Generation | Fault]:
        found: dict[int, Generation | Fault] = {}
        known: dict[str, Fault] = {}
        waiting = iter(enumerate(requests))

        async def work() -> None:
            for at, request in waiting:
                found[at] = await self._answer(link, request, known, put)

        await link.together(work, min(self.concurrency, len(requests)))
        return [
            found.get(at) or Fault(f"request {one.id}", "was cancelled before it was answered")
            for at, one in enumerate(requests)
        ]

    async def _answer(
        self, link: Link, request: Request, known: dict[str, Fault], put: Hear | None
    ) -> Generation | Fault:
        """All attempts at one request.

        Args:
            known: by path, what every request to it would meet.
            put: takes pieces of text as they come.
        """
        path = path_of(request)
        start = time.perf_counter()
        shown = None if put is None else _Shown(request, put)
        for attempt in range(self.retries + 1):
            if path in known:
                break
            await self._pause(link)
            try:
                answer = await self._attempt(link, path, request, shown)
                whole = replace(answer, seconds=time.perf_counter() - start)
                if shown is not None:
                    shown.end(whole.text)
                return whole
            except AttemptError as trouble:
                if not trouble.again or attempt == self.retries:
                    return self._fault(path, request, trouble, attempt + 1, known)
                await self._wait(link, attempt, trouble)
        return known[path]

    async def _attempt(self, link: Link, path: str, request: Request, shown: _Shown | None) -> Generation:
        asked = body(request, model=self.model, limit=self._limit, omit=self._omit, stream=shown is not None)
        content = json.dumps(asked, ensure_ascii=True).encode()
        gathering = Gathering()
        async with posted(link.client, f"{self.endpoint}/{path}", content, self._headers()) as response:
            kind = response.headers.get("content-type", "").lower()
            if shown is None or not kind.startswith("text/event-stream"):
                gathering.add(await read(response))
            else:
                async for event in events(response.aiter_bytes()):
                    gathering.add(event)
                    shown.hear(gathering.text)
        return gathering.generation(request, 0.0)

    async def _pause(self, link: Link) -> None:
        left = link.resume_at - self._clock()
        if left > 0:
            await self._sleep(left)

    async def _wait(self, link: Link, attempt: int, trouble: AttemptError) -> None:
        if trouble.wait is None:
            wait = backoff(attempt, base=_BASE, most=self.max_wait, uniform=self._uniform())
        else:  # a little is added, or all that wait would ask at once
            wait = min(self.max_wait, trouble.wait + _BASE * self._uniform())
            link.resume_at = max(link.resume_at, self._clock() + min(self.max_wait, trouble.wait))
        await self._sleep(wait)

    def _fault(
        self, path: str, request: Request, trouble: AttemptError, attempts: int, known: dict[str, Fault]
    ) -> Fault:
        what = self._hushed(trouble.what)[:_LONGEST]  # in this order: half a key is one too many
        if attempts > 1:
            what = f"no answer in {attempts} attempts; at last: {what}"
        if not trouble.shared:
            return Fault(f"request {request.id}", f"{self.name}: {what}", trouble.allowed, trouble.run)
        known[path] = Fault(f"engine {self.name}", what, trouble.allowed, trouble.run)
        return known[path]

    # --- the key

    def _linked(self) -> Link:
        with self._lock:
            if self._link is None:
                try:
                    self._key()
                    self._link = Link(connections=self.concurrency, timeout=self.timeout)
                except AttemptError as trouble:
                    fault = Fault(f"engine {self.name}", trouble.what, trouble.allowed, trouble.run)
                    raise MixmergeError(fault) from None
            return self._link

    def _headers(self) -> dict[str, str]:
        key = self._key()
        headers = {"content-type": "application/json"}
        return headers if key is None else {**headers, "authorization": f"Bearer {key}"}

    def _key(self) -> str | None:
        if self.api_key_env is None:
            return None
        key = os.environ.get(self.api_key_env, "").strip()
        if key and key.isascii() and key.isprintable() and " " not in key:
            return key
        # A variable in small letters may be a key that was written where its name belongs.
        usual = _USUAL_VARIABLE.fullmatch(self.api_key_env)
        which = (
            f"the environment variable {self.api_key_env}" if usual else "the variable that api_key_env names"
        )
        what = f"{which} {'holds no key that can be sent' if key else 'is not set'}"
        raise AttemptError(what, allowed="The key of the endpoint", run="Set it", shared=True)

    def _hushed(self, text: str) -> str:
        """The text without the key, if the server repeats it."""
        key = os.environ.get(self.api_key_env, "").strip() if self.api_key_env else ""
        return text.replace(key, "[key]") if len(key) >= _SHORTEST_KEY else text


class _Shown:
    """What a reader has seen of a streamed answer, across attempts."""

    def __init__(self, request: Request, put: Hear) -> None:
        self._stop, self._put = request.stop, put
        self._text = ""

    def hear(self, text: str) -> None:
        """All text of this attempt so far: what cannot become a stop text is shown.

        Raises:
            AttemptError: an attempt before has shown another text.
        """
        cut, stopped = cut_at_stop(text, self._stop)
        self._show(cut if stopped else text[: len(text) - held_back(text, self._stop)])

    def end(self, text: str) -> None:
        """The whole text.

        Raises:
            AttemptError: as ``hear``.
        """
        self._show(text)
        if text != self._text:
            raise _said_otherwise()

    def _show(self, text: str) -> None:
        if not text.startswith(self._text[: len(text)]):
            raise _said_otherwise()
        if len(text) > len(self._text):
            self._put(text[len(self._text) :])
            self._text = text


def _said_otherwise() -> AttemptError:
    return AttemptError("the stream broke off, and the server said something else when it was asked again")


def _endpoint_faults(endpoint: str) -> Iterator[tuple[str, str]]:
    """What is wrong, and what is allowed. The address is not quoted: it may hold a password."""
    allowed = "An address such as https://api.openai.com/v1"
    try:
        parts = urlsplit(endpoint)
        host, _ = parts.hostname, parts.port
    except ValueError:
        yield "cannot be read", allowed
        return
    if parts.scheme not in ("http", "https") or not host or not endpoint.isprintable() or " " in endpoint:
        yield "is no http(s) address", allowed
    if parts.username is not None or parts.password is not None:
        yield "holds a user or password", "Name the variable of a key with api_key_env"
    if parts.query or parts.fragment:
        yield "has a query or fragment", allowed
    if parts.path.rstrip("/").endswith("/completions"):
        yield "is the address of one method", "What comes before /chat/completions or /completions"
