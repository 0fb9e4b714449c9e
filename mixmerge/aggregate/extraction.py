"""What an answer says, in a form in which answers can be compared: what votes are counted by."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

from mixmerge import registry
from mixmerge.aggregate.letters import chosen_letter
from mixmerge.aggregate.numbers import last_number
from mixmerge.errors import Fault, MixmergeError

Extract = Callable[[str], str | None]  # None: the answer says nothing of the kind, which is no vote
STARTS = 1000  # places of a text where a JSON object may begin that are looked at
_THINKS, _THOUGHT, _BOXED, _MARK = "<think>", "</think>", "\\boxed{", "####"


def final_text(text: str) -> str:
    """What an expert said after it thought aloud, if it did; "" if it was cut while it thought."""
    _, thought, said = text.rpartition(_THOUGHT)
    return "" if not thought and said.lstrip().startswith(_THINKS) else said.strip()


def number(text: str) -> str | None:
    """The number that an answer gives: in its last ``\\boxed{}``, else behind its last ``####``, else its last one.

    Spelled as ``numbers.last_number`` says. A last box without a number is an answer that is no number: None.
    """
    said = final_text(text)
    boxed = last_boxed(said)
    if boxed is not None:
        return last_number(boxed)
    _, marked, rest = said.rpartition(_MARK)
    return (last_number(rest.strip().partition("\n")[0]) if marked else None) or last_number(said)


def choice(text: str) -> str | None:
    """The letter A to J that an answer chooses: in its last ``\\boxed{}``, else as ``letters.chosen_letter`` says."""
    said = final_text(text)
    boxed = last_boxed(said)
    if boxed is not None:
        inner = boxed.replace("\\text", "").replace("\\textbf", "").strip(" {}().$*")
        return inner if len(inner) == 1 and "A" <= inner <= "J" else None
    return chosen_letter(said)


def exact(text: str) -> str | None:
    """All of an answer, in lower case and with single spaces."""
    return " ".join(final_text(text).casefold().split()) or None


def whole(text: str) -> str | None:
    """All of an answer as it is, but for spaces around it."""
    return final_text(text) or None


def first_line(text: str) -> str | None:
    """The first line of an answer that is not empty, spaces around it aside."""
    return next((line.strip() for line in final_text(text).splitlines() if line.strip()), None)


def json_field(text: str, *, path: str = "answer") -> str | None:
    """A field of the last JSON object in an answer that has it; in a code block or not.

    Args:
        text: of the answer.
        path: keys and places in lists, with dots between: ``result.items.0``.

    Returns:
        Texts with single spaces, other values as JSON with sorted keys, whole numbers without decimals. null: None.
    """
    found = None
    for one in _objects(final_text(text)):
        value = _at(one, path.split("."))
        found = found if value is None else value
    if found is None:
        return None
    if isinstance(found, str):
        spoken = found.encode("utf-8", "replace").decode("utf-8")  # "\ud800" in JSON is no text
        return " ".join(spoken.split()) or None
    return json.dumps(_whole_numbers(found), sort_keys=True)


def last_boxed(text: str) -> str | None:
    """What is in the last ``\\boxed{}`` that is closed; None without any."""
    end = len(text)
    while (start := text.rfind(_BOXED, 0, end)) >= 0:
        depth = 0
        for at in range(start + len(_BOXED) - 1, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if not depth:
                return text[start + len(_BOXED) : at]
        end = start
        if text.count("}", start) == 0:
            # Nothing can close the ones before either, unless it stands before this one.
            text = text[:start]
    return None


def _objects(text: str) -> Iterator[Any]:
    decoder, at = json.JSONDecoder(), text.find("{")
    for _ in range(STARTS):
        if at < 0:
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)


def _at(value: Any, path: list[str]) -> Any:
    for key in path:
        if isinstance(value, dict):
            value = value.get(key)
        elif isinstance(value, list) and key.isascii() and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    return value


def _whole_numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


EXTRACTORS: dict[str, Extract] = {
    "number": number,
    "choice": choice,
    "exact": exact,
    "json": json_field,
    "whole": whole,
    "first_line": first_line,
}


def extractor(name: str) -> Extract:
    """The function of a name: one of ``EXTRACTORS`` or of a plug-in (entry-point group ``mixmerge.extraction``).

    Args:
        name: ``json:PATH`` says which field; ``json`` alone is ``json:answer``.

    Raises:
        MixmergeError: no such name, or a path for one that takes none.
    """
    kind, colon, path = name.partition(":")
    found: Extract = registry.find("extraction", kind)
    if not colon:
        return found
    if kind != "json" or not all(path.split(".")):
        raise MixmergeError(
            Fault("extract", f"is {name!r}", "json:PATH with keys between dots, or a name alone")
        )
    return functools.partial(json_field, path=path)
