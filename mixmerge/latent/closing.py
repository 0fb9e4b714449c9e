"""Which tokens of an answer that still grows a peer may read: those that no further text can change.

A peer reads the answer apart from its prompt and *segment by segment*: what is open grows by one character at a time,
and as soon as the character after a pre-token shows that it has ended, its tokens are closed and never looked at again.
Each step depends on the characters so far and on nothing else, so the tokens do not depend on how the text was handed
over, and training, which has the whole answer, gets exactly what decoding gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

LONGEST = (
    64  # characters that may stay open: a text without spaces is read in such parts, and a step stays cheap
)
_ANCHOR = "\n"
_LOWER, _UPPER = "abcdefgh", "ABCDEFGH"


class Cutter:
    """How one tokenizer cuts a text that grows.

    Where it splits texts into pre-tokens, those are the segments; a run of letters that it keeps together is looked at
    when it ends (``'re`` is no ``'`` before an ``r``), spaces when something else follows. Where it does not split, as
    with SentencePiece's models, a segment ends before a space that follows something else.

    Args:
        backend: of a fast tokenizer, ``tokenizers.Tokenizer``.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self.unbounded()
        self._splits = self._words("ab cd, ef. 12") > 1
        joined = [run for run in (_LOWER, _UPPER) if self._words(run) < 2]
        self._waits = (
            str.islower if _LOWER in joined else _never,
            str.isupper if _UPPER in joined else _never,
        )
        start, rest = self._ids(_ANCHOR), self._ids("ab")
        # A tokenizer that puts a space before every text would put one before every segment.
        self._anchor: list[int] | None = None if self._ids(f"{_ANCHOR}ab") == start + rest else start

    def unbounded(self) -> None:
        """See to it that no text is padded or cut, as a tokenizer's file or its last caller may have asked for."""
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()

    def close(self, text: str) -> tuple[list[int], int]:
        """Tokens of what is closed at the start of an open text, and its characters; none where nothing is.

        Args:
            text: what is open, its last character new; one or more.
        """
        if len(text) > LONGEST:
            return self._alone(text[:-1])[0], len(text) - 1
        if len(text) < 2:
            return [], 0
        last = text[-1]
        if not self._splits:
            ended = last.isspace() and not text[-2].isspace()
            return (self._alone(text[:-1])[0], len(text) - 1) if ended else ([], 0)
        if last.isascii() and any(waits(last) for waits in self._waits):
            return [], 0
        return self._closed(text)

    def _closed(self, text: str) -> tuple[list[int], int]:
        ids, words, spans = self._alone(text)
        found, border = 0, 0
        for at in range(1, len(ids)):
            if words[at] == words[at - 1]:
                continue
            between = text[spans[at - 1][1] : spans[at][0]]
            # What is in no token belongs to the one before, but for spaces that were trimmed off the one behind.
            here = max(border, spans[at][0] - (len(between) - len(between.rstrip())))
            if text[border:here].isspace() and text[here:].isspace():
                break
            if here > border:
                found, border = at, here
        return (ids[:found], border) if border else ([], 0)

    def _alone(self, text: str) -> tuple[list[int], list[int | None], list[tuple[int, int]]]:
        """Tokens of a segment, the pre-token of each, and its characters."""
        if self._anchor is not None:
            found = self._backend.encode(_ANCHOR + text, add_special_tokens=False)
            first, shift = len(self._anchor), len(_ANCHOR)
            if found.ids[:first] == self._anchor:
                spans = [(max(0, a - shift), max(0, b - shift)) for a, b in found.offsets[first:]]
                return found.ids[first:], found.word_ids[first:], spans
        found = self._backend.encode(text, add_special_tokens=False)
        return found.ids, found.word_ids, found.offsets

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def _words(self, text: str) -> int:
        return len(set(self._backend.encode(text, add_special_tokens=False).word_ids))


def _never(character: str) -> bool:
    return False


class Growth:
    """The tokens of an answer that grows, for one peer: what is given once never changes, whatever follows."""

    def __init__(self, cutter: Cutter) -> None:
        self._cutter = cutter
        self._open, self._read, self._bytes = "", 0, 0

    def add(self, text: str) -> tuple[list[int], list[int]]:
        """Newly closed tokens once the answer is ``text`` (all of it so far), and ``ends`` of each in bytes of it."""
        self._cutter.unbounded()
        ids: list[int] = []
        ends: list[int] = []
        for character in text[self._read :]:
            self._open += character
            self._bytes += len(character.encode("utf-8", "surrogatepass"))
            tokens, closed = self._cutter.close(self._open)
            if closed:
                self._open = self._open[closed:]
                ids += tokens
                ends += [self._bytes] * len(tokens)
        self._read = max(self._read, len(text))
        return ids, ends


class Saying:
    """The text of tokens that come one by one, without half a character at its end.

    Training and decoding both read a primary's answer through this, so its bytes are the same in both.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Tokens whose text is out, as far as the next ones' text may depend on them, by what came out together: a
        # tokenizer that falls back to bytes shows none of a run of them that begins within a character.
        self._before: list[list[int]] = []
        self._waiting: list[int] = []
        self.text = ""
        self.bytes = 0

    def add(self, token: int) -> None:
        """One more token."""
        from mixmerge.engines.decoding import plain_text

        self._waiting.append(token)
        before = list(chain.from_iterable(self._before))
        shown = plain_text(self._tokenizer, before)
        whole = plain_text(self._tokenizer, [*before, *self._waiting])
        if whole.endswith("\ufffd") and len(self._waiting) < _A_CHARACTER:
            return
        new = whole[len(shown) :]
        self.text += new
        self.bytes += len(new.encode("utf-8", "surrogatepass"))
        self._before.append(self._waiting)
        self._waiting = []
        while sum(map(len, self._before[1:])) >= _LOOKED_BACK:
            del self._before[0]

    def adds(self, tokens: Sequence[int]) -> str:
        """More tokens; the text so far."""
        for token in tokens:
            self.add(token)
        return self.text


_A_CHARACTER = 8  # tokens that may wait for the rest of a character; a broken one is shown as it is then
_LOOKED_BACK = 6  # tokens, at least
