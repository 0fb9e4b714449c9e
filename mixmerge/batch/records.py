"""Requests of a job, and their answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixmerge.engines.records import Finish, Message, said_by_users
from mixmerge.errors import Fault

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True)
class Settings:
    """What a request says of how to generate; None where it leaves that to the mixture."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] | None = None
    seed: int | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class Item:
    """One request of a job.

    Args:
        id: ``custom_id``; unique in the job.
        prompt: a text to go on with, or the turns of a chat.
        expert: who is to answer; None if the router decides.
        settings: of the generation.
        metadata: labels that the router may use, such as ``task``.
        url: which of OpenAI's endpoints it is written for.
    """

    id: str
    prompt: str | tuple[Message, ...]
    expert: str | None = None
    settings: Settings = Settings()
    metadata: Mapping[str, str] = field(default_factory=dict)
    url: str = CHAT

    @property
    def text(self) -> str:
        """What a router reads: the text, or what users said in the chat, with empty lines between."""
        if isinstance(self.prompt, str):
            return self.prompt
        return said_by_users(self.prompt)


@dataclass(frozen=True)
class Answer:
    """What a request got.

    Args:
        id: of the request.
        text: the answer; "" if there is none.
        expert: whose words they are; None if there are none.
        finish: how the generation that said it ended.
        tokens_in, tokens_out: of all generations that were made for the request.
        calls: how many those were.
        cost: dollars of them; None if a price is not known.
        logprobs: of the answer's tokens, if the request asked.
        decision: who was picked and why, as JSON values; empty if the request named its expert.
        reason: how the answer was composed, as JSON values.
        fault: why there is no answer; None if there is one.
        row: place of the request in the job.
    """

    id: str
    text: str = ""
    expert: str | None = None
    finish: Finish | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    calls: int = 0
    cost: float | None = None
    logprobs: tuple[float, ...] | None = None
    decision: Mapping[str, Any] = field(default_factory=dict)
    reason: Mapping[str, Any] = field(default_factory=dict)
    fault: Fault | None = None
    row: int = 0
