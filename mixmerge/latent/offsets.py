"""Texts as experts read them, with the bytes of the message that each token stands for.

Tokenizers say of each token which characters it stands for. They trim spaces, compose accents, and give each byte of a
character the whole of it; so of a token as a latent everything up to the next one's start counts, and of a token as a
reader only what no later token is still part of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, Literal

from mixmerge.engines.decoding import strange
from mixmerge.engines.records import Message
from mixmerge.errors import Fault, MixmergeError
from mixmerge.latent.closing import Cutter, Growth, Saying
from mixmerge.latent.locating import bytes_at, rendered
from mixmerge.latent.records import Reading

TooLong = Literal["refuse", "left"]
Prompt = str | tuple[Message, ...]


class Reader:
    """Reads for one expert.

    Args:
        tokenizer: of transformers; a fast one.
        name: of the expert, for messages.
        context: tokens it takes; None without bound.
        embedded: tokens that its model has embeddings of; None for all.

    Raises:
        MixmergeError: the tokenizer gives no offsets.
    """

    def __init__(
        self, tokenizer: Any, *, name: str, context: int | None, embedded: int | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            what = "its tokenizer does not say which characters its tokens stand for"
            allowed = "A fast tokenizer, with a tokenizer.json"
            raise MixmergeError(Fault(f"expert {name}", what, allowed))
        self.tokenizer, self.name, self.context, self._embedded = tokenizer, name, context, embedded
        self._cutter: Cutter | None = None

    def prompt(self, prompt: Prompt, *, too_long: TooLong = "refuse") -> Reading:
        """A prompt, in the tokens that ``TransformersEngine`` gives it.

        Args:
            too_long: of a prompt that leaves no room in the context: ``refuse`` it, or read its end (``left`` is cut;
                a token that begins texts stays).

        Raises:
            MixmergeError: no token, too long, turns that the template refuses or alters.
        """
        return self._prompt(prompt, too_long)[0]

    def with_answer(
        self,
        prompt: Prompt,
        answer: str,
        *,
        role: Literal["primary", "peer"],
        too_long: TooLong = "refuse",
        end: bool = True,
    ) -> Reading:
        """A prompt and its answer.

        Args:
            prompt: as in ``prompt``.
            answer: as ``peer``: what the primary said, ``said`` of its tokens.
            role: ``primary``: the tokens it shall say. They are no latents, ``ends`` is ``seen``. ``peer``: the tokens
                that are closed when ``answer`` was said, as far as the context has room for them.
            too_long: of the prompt.
            end: a primary says its end token behind it, if it has one.

        Raises:
            MixmergeError: as ``prompt``; or a primary's answer does not fit into its context.
        """
        read, text, special = self._prompt(prompt, too_long)
        size = read.prompt_bytes
        if role == "peer":
            ids, ends = self.growth().add(answer)
            self._check(ids)
            room = len(ids) if self.context is None else max(0, self.context - len(read.ids))
            ends = [size + end for end in ends[:room]]
            return self._joined(read, ids[:room], ends, [size, *ends][: len(ends)])
        ids = self._continuation(text, answer, special)
        self._check(ids)
        if end and self.tokenizer.eos_token_id is not None:
            ids = [*ids, int(self.tokenizer.eos_token_id)]
        if self.context is not None and len(read.ids) + len(ids) > self.context:
            what = f"has {len(read.ids) + len(ids):,} tokens with its answer"
            raise self._fault(what, f"{self.name} reads {self.context:,}")
        saying = Saying(self.tokenizer)
        seen = [size + _bytes_with(saying, token) for token in ids]
        return self._joined(read, ids, seen, seen)

    def said(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, without half a character at its end: what peers are shown of it."""
        return Saying(self.tokenizer).adds(tokens)

    def saying(self) -> Saying:
        """The same, token by token."""
        return Saying(self.tokenizer)

    def growth(self) -> Growth:
        """Of a new answer."""
        if self._cutter is None:
            self._cutter = Cutter(self.tokenizer.backend_tokenizer)
        return Growth(self._cutter)

    def _prompt(self, prompt: Prompt, too_long: TooLong) -> tuple[Reading, str, bool]:
        """With the text that is tokenised, and whether the tokenizer adds its own tokens to it."""
        if isinstance(prompt, str):
            text, special, at = prompt, True, _bytes_of(prompt)
        else:
            text = rendered(self.tokenizer, prompt, name=self.name)
            special = self.tokenizer.chat_template is None
            at = bytes_at(self.tokenizer, prompt, text, name=self.name)
        found = self._read(text, special)
        if not found["input_ids"]:
            raise self._fault("has no token", "")
        self._check(found["input_ids"])
        reading = _reading(found, at)
        if self.context is None or len(reading.ids) < self.context:
            return reading, text, special
        if too_long == "refuse":
            what = f"has {len(reading.ids):,} tokens"
            raise self._fault(what, f"{self.name} reads less than {self.context:,}")
        return _cut(reading, self.context - 1, keep=found["special_tokens_mask"][0]), text, special

    def _continuation(self, text: str, answer: str, special: bool) -> list[int]:
        """Tokens of the answer: those behind the prompt's where they stay the same, else its own."""
        before = self._read(text, special)["input_ids"]
        whole = self._read(text + answer, special)
        ids, added = whole["input_ids"], whole["special_tokens_mask"]
        while ids and added[len(ids) - 1] and len(ids) > len(before):
            ids = ids[:-1]
        if ids[: len(before)] == before:
            return list(ids[len(before) :])
        return list(self._read(answer, False)["input_ids"])

    def _read(self, text: str, special: bool) -> Any:
        return self.tokenizer(
            text,
            add_special_tokens=special,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )

    def _check(self, ids: Sequence[int]) -> None:
        if self._embedded is not None and (fault := strange(ids, self.tokenizer, self._embedded, where="")):
            raise self._fault(fault.what, fault.allowed)

    def _joined(self, read: Reading, ids: Sequence[int], ends: Sequence[int], seen: Sequence[int]) -> Reading:
        return Reading(
            (*read.ids, *ids), (*read.ends, *ends), (*read.seen, *seen), len(read.ids), read.prompt_bytes
        )

    def _fault(self, what: str, allowed: str) -> MixmergeError:
        return MixmergeError(Fault(f"expert {self.name}: prompt", what, allowed))


def _bytes_with(saying: Saying, token: int) -> int:
    saying.add(token)
    return saying.bytes


def _bytes_of(text: str) -> list[int]:
    """Of each place between characters, the bytes before it."""
    sizes = (len(character.encode("utf-8", "surrogatepass")) for character in text)
    return list(accumulate(sizes, initial=0))


def _reading(found: Any, at: Sequence[int]) -> Reading:
    """Of a tokenised prompt; ``at`` as ``bytes_at``."""
    ends: list[int] = []
    seen: list[int] = []
    behind = len(at) - 1  # where the next token of the text starts
    told = list(zip(found["offset_mapping"], found["special_tokens_mask"], strict=True))
    for (start, stop), added in reversed(told):
        if added:
            ends.append(0)
            seen.append(0)
            continue
        ends.append(at[max(stop, behind)])
        seen.append(at[min(stop, behind)])
        behind = min(behind, start)
    ends, seen = _rising(reversed(ends)), _rising(reversed(seen))
    ends[-1] = seen[-1] = at[-1]
    ids = tuple(found["input_ids"])
    return Reading(ids, tuple(ends), tuple(seen), len(ids), at[-1])


def _rising(values: Iterable[int]) -> list[int]:
    return list(accumulate(values, max))


def _cut(reading: Reading, count: int, *, keep: int) -> Reading:
    """The last ``count`` tokens of a prompt; with ``keep`` the first one before them."""
    first = 1 if keep and count > 1 else 0
    places = [*range(first), *range(len(reading.ids) - count + first, len(reading.ids))]
    ids, ends, seen = (tuple(one[at] for at in places) for one in (reading.ids, reading.ends, reading.seen))
    return Reading(ids, ends, seen, count, reading.prompt_bytes)


def reader_of(tokenizer: Any, config: Any, *, name: str) -> Reader:
    """How an expert reads texts; its weights are not needed for that.

    Args:
        tokenizer: of the expert.
        config: of its model, of transformers: it says how long a text may be, and how many tokens there are.
        name: for messages.

    Raises:
        MixmergeError: the tokenizer gives no offsets.
    """
    told = config.get_text_config()
    context = getattr(told, "max_position_embeddings", None)
    return Reader(tokenizer, name=name, context=context, embedded=getattr(told, "vocab_size", None))
