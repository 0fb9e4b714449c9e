"""Requests as OpenAI's batch API takes them: ``custom_id``, ``method``, ``url`` and ``body``.

A field of the body is honoured, or without effect on the answer by its definition, or has the value that asks for
nothing; every other one is a fault. So nothing that a request asks for is passed over.

Honoured: ``model`` (the mixture's name: the router decides; an expert's: it answers), ``messages`` or ``prompt``,
``max_tokens``, ``max_completion_tokens``, ``temperature``, ``top_p``, ``stop``, ``seed``, ``logprobs`` and
``metadata``, which routers may use. What is not given, or null, is the mixture's, whatever OpenAI's default is.
Without effect: ``user``, ``safety_identifier``, ``prompt_cache_key``, ``service_tier`` (auto or default),
``parallel_tool_calls`` and ``tool_choice`` (auto or none) where there are no tools. ``stream_options`` may be null.
``logprobs`` are of the tokens that were generated: ``top_logprobs`` of a chat is 0, and ``logprobs`` of a completion 0
or 1, of which likelier tokens than those generated are not given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixmerge.batch.formats import Parsed, checked, kind, messages, same
from mixmerge.batch.records import CHAT, COMPLETION, Item, Settings
from mixmerge.decision.parsing import parse_json
from mixmerge.engines.records import Message
from mixmerge.errors import Fault
from mixmerge.registry import choices

_FIELDS = ("custom_id", "method", "url", "body")
_BOTH = ("model", "max_tokens", "temperature", "top_p", "stop", "seed", "logprobs", "metadata")
_HONOURED = {CHAT: (*_BOTH, "messages", "max_completion_tokens"), COMPLETION: (*_BOTH, "prompt")}
_TEXTS = ("user", "safety_identifier", "prompt_cache_key")
# values that ask for nothing; null does too
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "stream": (False,),
    "stream_options": (),
    "store": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "top_k": (0, -1),
    "logit_bias": ({},),
    "service_tier": ("auto", "default"),
}
_NEUTRAL_CHAT: dict[str, tuple[object, ...]] = {
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
_NEUTRAL_COMPLETION: dict[str, tuple[object, ...]] = {"best_of": (1,), "echo": (False,), "suffix": ("",)}
_MAX_INTEGER = 2**63
_NEAREST = 10  # faults of a line that say what was meant


@dataclass(frozen=True)
class Names:
    """What ``body.model`` may be: the name of the mixture, which routes, or of one of its experts."""

    mixture: str
    experts: tuple[str, ...]


def parse_request(text: str, names: Names) -> Parsed:
    """The request in a line."""
    try:
        given = parse_json(text)
    except ValueError as error:
        return Parsed.wrong(f"is not JSON: {error}", "An object")
    if not isinstance(given, dict):
        return Parsed.wrong(f"is {kind(given)}", f"An object with {', '.join(_FIELDS)}")
    unknown = [name[:40] for name in given if name not in _FIELDS]
    faults = [Fault(name, "is not known", f"Known: {', '.join(_FIELDS)}") for name in unknown]
    name = given.get("custom_id")
    if not isinstance(name, str) or not name:
        faults.append(Fault("custom_id", f"is {kind(name)}" if name != "" else "is empty", "A text"))
        name = ""
    if given.get("method") != "POST":
        faults.append(Fault("method", _shown(given.get("method")), "POST"))
    url, body = given.get("url"), given.get("body")
    if url not in (CHAT, COMPLETION):
        faults.append(Fault("url", _shown(url), f"{CHAT} or {COMPLETION}"))
    if not isinstance(body, dict):
        faults.append(Fault("body", f"is {kind(body)}", "An object"))
    if not isinstance(url, str) or url not in (CHAT, COMPLETION) or not isinstance(body, dict):
        return Parsed(name, None, tuple(faults))
    found = _Body(body, url, faults).item(name, names)
    return Parsed(name, None if faults else found.item, (*faults, *found.faults))


class _Body:
    """Reads a body; what is wrong goes to ``faults``."""

    def __init__(self, given: Mapping[str, Any], url: str, faults: list[Fault]) -> None:
        self.given, self.url, self.faults = given, url, faults

    def item(self, name: str, names: Names) -> Parsed:
        self.unsupported()
        prompt = self.prompt()
        length, settings = self.settings()
        expert = self.expert(names)
        metadata = self.metadata()
        if prompt is None:
            return Parsed(name, None)
        where = {field: f"body.{field}" for field in ("temperature", "top_p", "stop", "seed")}
        where["max_new_tokens"] = f"body.{length}"
        where["prompt"] = "body.messages" if self.url == CHAT else "body.prompt"
        item = Item(name, prompt, expert, settings, metadata, self.url)
        return checked(item, where=where, named=name)

    def fault(self, name: str, what: str, allowed: str = "") -> None:
        self.faults.append(Fault(f"body.{name}", what, allowed))

    def unsupported(self) -> None:
        honoured = _HONOURED[self.url]
        neutral = _NEUTRAL | (_NEUTRAL_CHAT if self.url == CHAT else _NEUTRAL_COMPLETION)
        for name, value in self.given.items():
            if name in honoured:
                continue
            if name in _TEXTS:
                if not isinstance(value, str | None):
                    self.fault(name, f"is {kind(value)}", "A text")
            elif name not in neutral:
                # finding the nearest name takes a while, and there may be a million
                known = choices(name[:40], [*honoured, *_TEXTS]) if len(self.faults) < _NEAREST else ""
                self.fault(name[:40], "is not supported", known)
            elif value is not None and not any(same(value, fine) for fine in neutral[name]):
                fine = " or ".join(_shown(one).removeprefix("is ") for one in neutral[name])
                self.fault(
                    name, f"{_shown(value)}: not supported", f"Only {fine}" if fine else "Leave it out"
                )

    def expert(self, names: Names) -> str | None:
        name = self.given.get("model")
        if not isinstance(name, str):
            self.fault("model", f"is {kind(name)}", f"{names.mixture!r}, which routes, or an expert's name")
        elif name != names.mixture:
            if name in names.experts:
                return name
            self.fault("model", _shown(name), choices(name[:100], [names.mixture, *names.experts]))
        return None

    def prompt(self) -> str | tuple[Message, ...] | None:
        if self.url == CHAT:
            turns, faults = messages(self.given.get("messages"), where="body.messages")
            self.faults += faults
            return None if faults else turns
        given = self.given.get("prompt")
        if isinstance(given, list) and len(given) == 1:
            given = given[0]
        if isinstance(given, str):
            return given
        self.fault("prompt", f"is {kind(given)}", "A text, or a list of one text")
        return None

    def settings(self) -> tuple[str, Settings]:
        """The settings, and the field that says how long the answer may be."""
        lengths: dict[str, int] = {
            name: value
            for name in ("max_completion_tokens", "max_tokens")
            if name in _HONOURED[self.url] and (value := self.integer(name)) is not None
        }
        if len(set(lengths.values())) > 1:
            self.fault("max_tokens", "differs from max_completion_tokens", "One of them")
        length = next(iter(lengths), "max_tokens")
        settings = Settings(
            max_new_tokens=lengths.get(length),
            temperature=self.number("temperature"),
            top_p=self.number("top_p"),
            stop=self.stop(),
            seed=self.integer("seed"),
            logprobs=self.logprobs(),
        )
        return length, settings

    def integer(self, name: str) -> int | None:
        value = self.given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not -_MAX_INTEGER <= value < _MAX_INTEGER:
            self.fault(name, _shown(value), "A whole number below 2**63")
            return None
        return value

    def number(self, name: str) -> float | None:
        value = self.given.get(name)
        if value is None:
            return None
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not isinstance(value, float) and not (whole and abs(value) < _MAX_INTEGER):
            self.fault(name, _shown(value), "A number")
            return None
        return float(value)

    def stop(self) -> tuple[str, ...] | None:
        value = self.given.get("stop")
        if value is None:
            return None
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
            self.fault("stop", f"is {kind(value)}", "A text, or a list of texts")
            return None
        return tuple(texts)

    def logprobs(self) -> bool:
        value = self.given.get("logprobs")
        if self.url == CHAT:
            if not isinstance(value, bool | None):
                self.fault("logprobs", _shown(value), "true or false")
            return value is True
        if value is not None and not any(same(value, fine) for fine in (0, 1)):
            self.fault("logprobs", _shown(value), "0 or 1")
        return value is not None

    def metadata(self) -> dict[str, str]:
        value = self.given.get("metadata")
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
            self.fault("metadata", f"is {kind(value)}", "An object of texts")
            return {}
        return value


def _shown(value: object) -> str:
    """A setting in a message, never a page of it."""
    if value is None:
        return "is not given"
    if isinstance(value, bool):
        return f"is {str(value).lower()}"
    if isinstance(value, int) and abs(value) >= _MAX_INTEGER:
        return "is too large a number"
    if isinstance(value, str):
        return f"is {value[:60]!r}"
    if isinstance(value, dict | list) and value not in ({}, [], ["text"], {"type": "text"}):
        return f"is {kind(value)}"
    return f"is {value!r:.60}"
