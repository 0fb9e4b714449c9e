"""Texts as experts read them, with the bytes of the message that each token stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mixmerge.engines.records import Message
from mixmerge.latent.records import Reading

TooLong = Literal["refuse", "left"]


class Growth:
    """The tokens of an answer that grows, for one peer: what is given once never changes, whatever follows."""

    def add(self, text: str) -> tuple[list[int], list[int]]:
        """Newly closed tokens once the answer is ``text`` (all of it so far), and ``ends`` of each in bytes of it."""
        raise NotImplementedError


class Reader:
    """Reads for one expert.

    Args:
        tokenizer: of transformers; a fast one.
        name: of the expert, for messages.
        context: tokens it takes; None without bound.

    Raises:
        MixmergeError: the tokenizer gives no offsets.
    """

    def __init__(self, tokenizer: Any, *, name: str, context: int | None) -> None:
        self.tokenizer, self.name, self.context = tokenizer, name, context

    def prompt(self, prompt: str | tuple[Message, ...], *, too_long: TooLong = "refuse") -> Reading:
        """A prompt, in the tokens that ``TransformersEngine`` gives it.

        Args:
            too_long: of a prompt that leaves no room in the context: ``refuse`` it, or read its end (``left`` is cut).

        Raises:
            MixmergeError: no token, too long, turns that the template refuses or alters.
        """
        raise NotImplementedError

    def with_answer(
        self,
        prompt: str | tuple[Message, ...],
        answer: str,
        *,
        role: Literal["primary", "peer"],
        too_long: TooLong = "refuse",
        end: bool = True,
    ) -> Reading:
        """A prompt and its answer: as ``primary`` the tokens it shall say, with an ``end`` token where it has one; as
        ``peer`` those that are closed when ``answer`` was said (give ``said`` of the primary's tokens).
        """
        raise NotImplementedError

    def said(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, without half a character at its end: what peers are shown of it."""
        raise NotImplementedError

    def growth(self) -> Growth:
        """Of a new answer."""
        raise NotImplementedError

    def more(self, text_so_far: str, done: int) -> tuple[list[int], list[int]]:
        """Tokens of an answer beyond the first ``done`` ones, and their ends in bytes of the answer. ``growth`` does
        the same without starting over each time.
        """
        raise NotImplementedError
