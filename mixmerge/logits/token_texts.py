"""The bytes that tokens stand for, whichever way a tokenizer writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space
Text = tuple[bool, bytes]  # whether it is a special token, and its bytes


def texts_of(tokenizer: Any) -> dict[int, Text]:
    """Of each token of a tokenizer of transformers: byte-level pieces, SentencePiece's, or plain text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*tokenizer.all_special_ids, *(at for at, one in added.items() if one.special)}
    table = _byte_table() if _is_byte_level(tokenizer) else None
    return {
        # Of what was added, such as runs of spaces, the text is written as it is.
        at: (at in special, text.encode("utf-8", "replace"))
        if at in special or at in added
        else (False, _bytes_of(text, table))
        for text, at in tokenizer.get_vocab().items()
    }


def fallbacks(tokenizer: Any) -> frozenset[int]:
    """Tokens by which SentencePiece's models spell, byte by byte, what has no token; an A of theirs is none of them."""
    if _is_byte_level(tokenizer):
        return frozenset()
    return frozenset(at for text, at in tokenizer.get_vocab().items() if _BYTE.fullmatch(text))


def spelled_by(tokenizer: Any, text: Text, known: Mapping[Text, int], texts: Mapping[int, Text]) -> list[int]:
    """A token of another vocabulary in those of this tokenizer; none where it cannot be written.

    As the tokenizer cuts it, if that has the same bytes: one that puts a space before every text says another word.
    Else by the longest pieces from the left that do have them, and as it cuts it after all if there are none.

    Args:
        tokenizer: that spells.
        text: of the token.
        known: this tokenizer's tokens by their texts.
        texts: of this tokenizer's tokens.
    """
    special, written = text
    if special or not written:
        return []
    try:
        words = written.decode("utf-8")
    except UnicodeDecodeError:  # part of a character
        return _pieces(written, known)
    cut = list(tokenizer(words, add_special_tokens=False)["input_ids"])
    if b"".join(texts[one][1] for one in cut if one in texts) == written:
        return cut
    return _pieces(written, known) or cut


def _pieces(written: bytes, known: Mapping[Text, int]) -> list[int]:
    """Bytes by the longest tokens from the left; none where some of them are of no token."""
    found: list[int] = []
    at = 0
    while at < len(written):
        ends = range(len(written), at, -1)
        end = next((one for one in ends if (False, written[at:one]) in known), None)
        if end is None:
            return []
        found.append(known[False, written[at:end]])
        at = end
    return found


def _bytes_of(text: str, table: Mapping[str, int] | None) -> bytes:
    if table is not None:
        if all(letter in table for letter in text):
            return bytes(table[letter] for letter in text)
        return text.encode("utf-8", "replace")
    found = _BYTE.fullmatch(text)
    return bytes([int(found[1], 16)]) if found else text.replace(_SPACE, " ").encode("utf-8", "replace")


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return hasattr(tokenizer, "byte_decoder")
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    kinds = {decoder.get("type"), *(one.get("type") for one in decoder.get("decoders", ()))}
    return "ByteLevel" in kinds


def _byte_table() -> dict[str, int]:
    """Letters that byte-level BPE writes bytes with: those that can be printed are themselves.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners (2019), section 2.2.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [one for one in range(256) if one not in set(printed)]
    return {
        **{chr(one): one for one in printed},
        **{chr(256 + at): one for at, one in enumerate(others)},
    }
