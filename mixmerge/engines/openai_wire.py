"""OpenAI's wire format of completions: what is sent, and what comes back, whole or as a stream of events."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Collection
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixmerge.engines.records import Finish, Generation, Message, Request, cut_at_stop

Limit = Literal["max_tokens", "max_completion_tokens"]
LIMITS = ("max_tokens", "max_completion_tokens")
OMITTABLE = ("seed", "stop", "stream_options", "temperature", "top_p")
CHAT, COMPLETIONS = "chat/completions", "completions"

_FINISHES: dict[str, Finish] = {
    "stop": "stop",
    "eos": "stop",
    "eos_token": "stop",
    "stop_sequence": "stop",
    "length": "length",
}
_BYTES_A_TOKEN = 4
_LARGEST_EVENT = 16 * 2**20


class AttemptError(Exception):
    """Why one attempt gave no answer.

    Args:
        what, allowed, run: of the fault that it becomes.
        again: another attempt may succeed.
        wait: seconds that the server asks to wait before it.
        shared: other requests to the same path would meet it too.
    """

    def __init__(
        self,
        what: str,
        *,
        allowed: str = "",
        run: str = "",
        again: bool = False,
        wait: float | None = None,
        shared: bool = False,
    ) -> None:
        super().__init__(what)
        self.what, self.allowed, self.run = what, allowed, run
        self.again, self.wait, self.shared = again, wait, shared


class _Wire(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class _Token(_Wire):
    logprob: float


class _Logprobs(_Wire):
    content: list[_Token] | None = None  # of a chat
    token_logprobs: list[float] | None = None  # of a text


class _Said(_Wire):
    content: str | None = None


class _Choice(_Wire):
    index: int = 0
    message: _Said | None = None
    delta: _Said | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Usage(_Wire):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class _Payload(_Wire):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    message: Any = None
    detail: Any = None


def path_of(request: Request) -> str:
    """Where below the endpoint a request goes: a chat and a text have paths of their own."""
    return COMPLETIONS if isinstance(request.prompt, str) else CHAT


def body(
    request: Request, *, model: str, limit: Limit, omit: Collection[str], stream: bool
) -> dict[str, Any]:
    """The JSON that asks for one request.

    Args:
        request: what is asked.
        model: the expert's name at the server.
        limit: what a chat calls the largest number of tokens.
        omit: fields that are not sent, of ``OMITTABLE``.
        stream: ask for events.
    """
    asked: dict[str, Any] = {"model": model}
    if isinstance(request.prompt, str):
        asked |= {"prompt": request.prompt, "max_tokens": request.max_new_tokens}
        if request.logprobs:
            asked["logprobs"] = 1  # 0 means none to some servers
    else:
        asked |= {"messages": [_turn(one) for one in request.prompt], limit: request.max_new_tokens}
        if request.logprobs:
            asked["logprobs"] = True
    asked |= {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
    if request.stop:
        asked["stop"] = list(request.stop)
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return {name: value for name, value in asked.items() if name not in omit}


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


class Gathering:
    """One answer while it comes: ``add`` every payload, then ask for the ``generation``."""

    def __init__(self) -> None:
        self.text = ""
        self._finish: str | None = None
        self._usage: _Usage | None = None
        self._logprobs: list[float] | None = None

    @property
    def finished(self) -> bool:
        """The server has said how the answer ended."""
        return self._finish is not None

    def add(self, payload: bytes) -> None:
        """Read a whole answer, or one event of it.

        Raises:
            AttemptError: it is not what OpenAI's format says, or the server reports an error in it.
        """
        try:
            read = _Payload.model_validate_json(payload)
        except ValidationError:  # its message would quote what was said
            raise AttemptError("the server's answer cannot be read", again=True) from None
        if read.error:
            raise AttemptError(
                f"the server broke off: {complaint(payload) or 'it does not say why'}", again=True
            )
        self._usage = read.usage or self._usage
        for choice in read.choices:
            if choice.index == 0:
                self._hear(choice)

    def _hear(self, choice: _Choice) -> None:
        said = choice.message or choice.delta
        self.text += (choice.text if said is None else said.content) or ""
        self._finish = choice.finish_reason or self._finish
        if choice.logprobs is not None:
            given = choice.logprobs
            values = [one.logprob for one in given.content or []] + (given.token_logprobs or [])
            self._logprobs = [*(self._logprobs or []), *(min(0.0, value) for value in values)]

    def generation(self, request: Request, seconds: float) -> Generation:
        """The answer to ``request``.

        Raises:
            AttemptError: it ended early or in a way that is no answer, or lacks what was asked.
        """
        if self._finish is None:
            raise AttemptError("the server's answer ended early", again=True)
        if self._finish not in _FINISHES:
            raise AttemptError(f"the server ended the answer by {self._finish!r}", allowed="stop, length")
        text, stopped = cut_at_stop(self.text, request.stop)
        logprobs = tuple(self._logprobs or ()) if request.logprobs else None
        tokens_in, tokens_out = self._tokens(request)
        if logprobs is not None:
            if not logprobs and tokens_out:
                raise AttemptError("the server gives no log-probabilities", allowed="Ask without logprobs")
            tokens_out = len(logprobs)
        finish = "stop" if stopped else _FINISHES[self._finish]
        return Generation(request.id, text, tokens_in, tokens_out, finish, seconds, logprobs)

    def _tokens(self, request: Request) -> tuple[int, int]:
        if self._usage is not None:
            return self._usage.prompt_tokens, self._usage.completion_tokens
        prompt = request.prompt
        asked = prompt if isinstance(prompt, str) else "".join(turn.content for turn in prompt)
        return max(1, _estimate(asked)), min(_estimate(self.text), request.max_new_tokens)


def _estimate(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / _BYTES_A_TOKEN)


def complaint(payload: bytes) -> str:
    """What a server says is wrong, on one line; "" if it says nothing that can be read."""
    try:
        read = _Payload.model_validate_json(payload)
    except ValidationError:
        return ""
    inner = read.error.get("message") if isinstance(read.error, dict) else read.error
    said = next((one for one in (inner, read.message, read.detail) if isinstance(one, str)), "")
    return " ".join("".join(one if one.isprintable() else " " for one in said).split())


def code_of(payload: bytes) -> str:
    """The code, or else the type, of the error that a server reports; "" if there is none."""
    try:
        error = _Payload.model_validate_json(payload).error
    except ValidationError:
        return ""
    found = (error.get("code") or error.get("type")) if isinstance(error, dict) else None
    return found if isinstance(found, str) else ""


async def events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each server-sent event, up to ``[DONE]`` or the end.

    Lines end at LF or CRLF alone: JSON may hold other characters that Python takes for line ends.

    Raises:
        AttemptError: an event is larger than 16 MiB.
    """
    rest = b""
    data: list[bytes] = []
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) + sum(map(len, data)) > _LARGEST_EVENT:
            raise AttemptError("the server sends an event without end")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif not line and data:
                event, data = b"\n".join(data), []
                if event == b"[DONE]":
                    return
                yield event
    if data:  # a server that leaves out the last empty line
        yield b"\n".join(data)
