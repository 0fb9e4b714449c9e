"""The letter that an answer chooses. A capital letter that only happens to stand in a text is not a choice."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Runs are short: spaces are made single before, and a pattern that may try runs of any length takes forever on some.
_GAP, _OPEN, _CLOSE = r"[\s*_`]{0,6}", r"[\s*_`\"'([{$]{0,8}", r"[*_`\"')\]}$]{0,8}"
_ENDS = rf"{_CLOSE}(?=\s?(?:[.,;:!*)\]}}]|$)|\s(?:because|since|as|which|due to)\b)"
# Answer: B / the correct option is (C) / final choice - **D**
_STATED = re.compile(
    rf"\b(?:answer|option|choice)\b{_GAP}(?:is|are|was|would be|should be|must be|:|=|-){_GAP}:?{_GAP}"
    rf"(?:(?:option|choice|letter)\b)?{_OPEN}(?-i:(?P<letter>[A-J]))(?![\w'’]){_ENDS}",
    re.IGNORECASE | re.MULTILINE,
)
_STATED_SMALL = re.compile(
    rf"\banswer\b{_GAP}(?:is|:){_GAP}\(?(?P<letter>[b-hj])\)?\.?{_GAP}$", re.IGNORECASE | re.MULTILINE
)
# Option B is correct / Therefore, (C) is the right answer
_CALLED_RIGHT = re.compile(
    r"(?:^|[.!?:]\s|\b(?:option|choice|answer|so|thus|hence|therefore),?\s)"
    rf"{_OPEN}(?-i:(?P<letter>[A-J])){_CLOSE}\sis\s(?:the\s)?(?:correct|right|best)\b",
    re.IGNORECASE | re.MULTILINE,
)
_ALONE = re.compile(rf"{_OPEN}(?P<letter>[A-J]){_CLOSE}\s?[.):]?\s?{_CLOSE}")
_ALONE_SMALL = re.compile(r"\(?(?P<letter>[a-j])[).]?")
# C) Paris / **C.** Paris; D. H. Lawrence is no choice.
_LED = re.compile(rf"{_OPEN}(?P<letter>[A-J])(?:[):]|\.(?!\s*[A-Z]\.)){_CLOSE}\s\S")
_MARKED = re.compile(r"\((?P<round>[A-J])\)|(?<!\*)\*\*\(?(?P<bold>[A-J])\)?[.):]?\*\*(?!\*)")


def chosen_letter(text: str) -> str | None:
    """The choice A to J that a text makes; None if it makes none, or several.

    In this order: the last that is stated (``Answer: B``, ``the correct option is (C)``), the last that is called
    right (``option B is correct``), a last line that is a letter (``D``, ``(D)``, ``**D**.``), the only line that
    begins with one (``C) Paris``) if it is the first or the last and no other letter is marked, and letters in
    brackets or bold (``(C)``, ``**D**``) if all are the same, or those of the last line are.
    """
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    text = "\n".join(lines)
    for pattern in (_STATED, _STATED_SMALL, _CALLED_RIGHT):
        stated = [match["letter"] for match in pattern.finditer(text)]
        if stated:
            return stated[-1].upper()
    alone = _ALONE.fullmatch(lines[-1]) or (_ALONE_SMALL.fullmatch(lines[0]) if len(lines) == 1 else None)
    if alone:
        return alone["letter"].upper()
    led = [(at, match["letter"]) for at, line in enumerate(lines) if (match := _LED.match(line))]
    marked, at_end = set(_marked(text)), set(_marked(lines[-1]))
    if len(led) == 1 and led[0][0] in (0, len(lines) - 1) and marked <= {led[0][1]}:
        return led[0][1]
    only = marked if len(marked) == 1 else at_end
    return only.pop() if len(only) == 1 else None


def _marked(text: str) -> Iterator[str]:
    return (match["round"] or match["bold"] for match in _MARKED.finditer(text))
