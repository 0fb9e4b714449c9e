"""Texts that a network is asked with, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mixmerge.data.batches import context_of
from mixmerge.errors import Fault, MixmergeError


def check_texts(given: Mapping[str, Sequence[str]]) -> None:
    """Refuse one text in the place of a list, and lists of different lengths.

    Args:
        given: name of an argument -> what it is.

    Raises:
        MixmergeError: see the message.
    """
    faults = [
        Fault(name, "is one text", "A list of texts")
        for name, texts in given.items()
        if isinstance(texts, str)
    ]
    if not faults and len({len(texts) for texts in given.values()}) > 1:
        sizes = " and ".join(f"{len(texts)} {name}" for name, texts in given.items())
        faults.append(Fault(next(iter(given)), f"there are {sizes}", "As many of both"))
    if faults:
        raise MixmergeError(faults)


def tokens_of(texts: Sequence[str], tokenizer: Any, config: Any) -> list[list[int]]:
    """Tokens of each text.

    Args:
        texts: as they are.
        tokenizer: of the model.
        config: of the model: how many tokens it reads.

    Raises:
        MixmergeError: texts without tokens, or longer than the model reads; all at once.
    """
    most = context_of(config, tokenizer)
    tokens = [list(tokenizer(text, verbose=False)["input_ids"]) for text in texts]
    faults = [
        Fault(f"texts[{at}]", f"has {len(one):,} tokens", f"1 to {most:,}")
        for at, one in enumerate(tokens)
        if not 1 <= len(one) <= most
    ]
    if faults:
        raise MixmergeError(faults)
    return tokens
