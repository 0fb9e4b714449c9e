"""Where the contents of a chat's turns stand in the text that a chat template makes of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from mixmerge.engines.records import Message
from mixmerge.errors import Fault, MixmergeError

_MARK = "\ue0f0{}\ue0f1"  # private use: in no text that people write
_MARKED = re.compile("\ue0f0(\\d+)\ue0f1")
_CUTS: tuple[Callable[[str], str], ...] = (str, str.strip, str.lstrip, str.rstrip)


def rendered(tokenizer: Any, turns: Sequence[Message], *, name: str) -> str:
    """What the chat template makes of turns; without one, their contents joined by empty lines.

    Raises:
        MixmergeError: the template refuses them.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return "\n\n".join(turn.content for turn in turns)
    said = [{"role": turn.role, "content": turn.content} for turn in turns]
    try:
        text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise MixmergeError(Fault(f"expert {name}: prompt", f"refuses these turns: {error}")) from error
    return text


def bytes_at(tokenizer: Any, turns: Sequence[Message], text: str, *, name: str) -> list[int]:
    """Of each place between the characters of a rendered chat, how many bytes of the message stand before it.

    The message is the contents, one after the other; what the template adds takes what stands before it, and so does
    space that the template strips off a content.

    Raises:
        MixmergeError: the template alters the contents in another way.
    """
    places = _marked(tokenizer, turns, text, name) or _searched(turns, text, name)
    found = [0] * (len(text) + 1)
    total, at = 0, 0
    for turn, (start, stop) in zip(turns, places, strict=True):
        found[at : start + 1] = [total] * (start + 1 - at)
        content = turn.content
        inside = total + _size(content[: content.find(text[start:stop])])
        for place in range(start, stop - 1):
            inside += _size(text[place])
            found[place + 1] = inside
        total += _size(content)
        found[stop] = total
        at = stop + 1
    found[at:] = [total] * (len(found) - at)
    return found


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _marked(tokenizer: Any, turns: Sequence[Message], text: str, name: str) -> list[tuple[int, int]] | None:
    """By rendering marks in place of the contents; None where the template looks into contents."""
    if "\ue0f0" in text:
        return None
    marks = [Message(turn.role, _MARK.format(at)) for at, turn in enumerate(turns)]
    try:
        pieces = _MARKED.split(rendered(tokenizer, marks, name=name))
    except MixmergeError:
        return None
    order = [int(one) for one in pieces[1::2]]
    if order != list(range(len(turns))):
        return None
    for cut in _CUTS:
        contents = [cut(turn.content) for turn in turns]
        places, at = [], 0
        for glue, content in zip(pieces[::2], contents, strict=False):
            places.append((at + len(glue), at + len(glue) + len(content)))
            at = places[-1][1]
        joined = "".join(a + b for a, b in zip(pieces[::2], [*contents, ""], strict=True))
        if joined == text:
            return places
    return None


def _searched(turns: Sequence[Message], text: str, name: str) -> list[tuple[int, int]]:
    """One after the other, whole or stripped."""
    places, at = [], 0
    for number, turn in enumerate(turns):
        for content in (turn.content, turn.content.strip()):
            start = text.find(content, at)
            if start >= 0:
                break
        else:
            what = f"its chat template alters turn {number + 1} of the prompt: {turn.content[:40]!r} is not in it"
            allowed = "A template that shows contents as they are, or stripped"
            raise MixmergeError(Fault(f"expert {name}: prompt", what, allowed))
        at = start + len(content)
        places.append((start, at))
    return places
