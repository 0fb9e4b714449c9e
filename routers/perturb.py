"""Small changes to a query that keep its meaning: does a router still choose the same expert?

Each is a function of the text and the seed alone. Digits, words of numbers and whatever is glued to a digit stay as
they are. What cannot be changed without risk (no leading clause, no word long enough) is returned as it was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import numpy as np

from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

Perturbation = Callable[[str, np.random.Generator], str]
_NUMBERS = re.compile(
    r"(zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"
    r"|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million"
    r"|billion|trillion|half|halve|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|dozen|once|twice|thrice"
    r"|double|triple|first|second)s?",
    re.IGNORECASE,
)
_POLITE = (
    "Please answer this: ",
    "Could you help me with this? ",
    "I would like to know the answer to this. ",
    "Please think about this: ",
    "Hello! ",
)
_WORD = re.compile(r"\S+")
_LETTERS = re.compile(r"[A-Za-z]{4,}")
# "If x is 3, what is y?": one clause, a comma and a space, the rest of the same sentence. A comma or a dot between
# digits ends neither.
_CLAUSE = re.compile(
    r"(?P<indent>\s*)(?P<clause>(?:If|When|Given|Because|Since|While|After|Before|Although|Assuming|During|"
    r"Unless|Until)\s(?:[^,.?!;:\n]|(?<=\d)[.,](?=\d))+),\s(?P<rest>[A-Za-z](?:[^.?!\n]|(?<=\d)\.(?=\d))*)(?P<mark>[.?!])"
)


def perturb(text: str, *, kind: str, seed: int) -> str:
    """The text, changed in one small way; the same for the same seed.

    Args:
        kind: a name of ``PERTURBATIONS``.
        seed: which of the possible changes.

    Raises:
        MixmergeError: there is no such kind.
    """
    if kind not in PERTURBATIONS:
        raise MixmergeError(
            Fault("perturb", f"there is no kind {kind!r}", choices(kind, list(PERTURBATIONS)))
        )
    key = hashlib.sha256(f"{seed}\0{kind}\0{text}".encode("utf-8", errors="surrogatepass")).digest()
    return PERTURBATIONS[kind](text, np.random.default_rng(int.from_bytes(key[:8], "big")))


def _case(text: str, rng: np.random.Generator) -> str:
    """Lower case, but for names of one letter, abbreviations and what is glued to a digit; or the first letter's."""
    found = re.search(r"\S+", text)
    first = found.group() if found else ""
    if rng.random() < 0.5 and len(first) > 1 and first.isalpha() and first[1:].islower():
        at = text.index(first)
        return text[:at] + first[0].swapcase() + text[at + 1 :]
    return _WORD.sub(lambda match: _lowered(match.group()), text)


def _lowered(word: str) -> str:
    letters = [c for c in word if c.isalpha()]
    safe = len(letters) > 1 and letters[0].isupper() and all(c.islower() for c in letters[1:])
    return word.lower() if safe and not _has_digit(word) and len(word.lower()) == len(word) else word


def _punctuation(text: str, rng: np.random.Generator) -> str:
    """The mark at the end dropped, doubled or, where there is none, set; or a comma after a word left out."""
    body = text.rstrip()
    tail = text[len(body) :]
    # "two, three" without its comma would be another number, and single letters are names.
    commas = [
        match.end("word")
        for match in re.finditer(r"(?P<word>\b[A-Za-z]{2,}),(?= [A-Za-z]{2})", text)
        if not _NUMBERS.fullmatch(match["word"])
    ]
    if commas and rng.random() < 0.5:
        at = commas[int(rng.integers(len(commas)))]
        return text[:at] + text[at + 1 :]
    if len(body) > 1 and body[-1] in ".?!" and body[-2].isalpha():
        return (body[:-1] if rng.random() < 0.5 else body + body[-1]) + tail
    if body and body[-1].isalpha():
        return body + "." + tail
    return text


def _whitespace(text: str, rng: np.random.Generator) -> str:
    """A space between two words doubled, or one at the end."""
    gaps = [match.start() for match in re.finditer(r"(?<=[^\s\d]) (?=[^\s\d])", text)]
    if not gaps or rng.random() < 0.2:
        return text + " "
    at = gaps[int(rng.integers(len(gaps)))]
    return text[:at] + " " + text[at:]


def _typo(text: str, rng: np.random.Generator) -> str:
    """Two letters inside of a word swapped, or one of them left out or written twice."""
    words = []
    for match in _WORD.finditer(text):
        found = _LETTERS.fullmatch(match.group().strip(".,;:?!\"'()"))
        word = found.group() if found else ""
        if word and not word.isupper() and not _NUMBERS.fullmatch(word):
            words.append((match.start() + match.group().index(word), word))
    if not words:
        return text
    start, word = words[int(rng.integers(len(words)))]
    at, how = int(rng.integers(1, len(word) - 2)), int(rng.integers(3))
    if how == 0 and word[at] != word[at + 1]:
        changed = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif how == 1:
        changed = word[:at] + word[at + 1 :]
    else:
        changed = word[: at + 1] + word[at:]
    if _NUMBERS.fullmatch(changed):  # no word may become a number
        return text
    return text[:start] + changed + text[start + len(word) :]


def _politeness(text: str, rng: np.random.Generator) -> str:
    """A polite phrase before it."""
    return _POLITE[int(rng.integers(len(_POLITE)))] + text


def _clause(text: str, rng: np.random.Generator) -> str:
    """A clause that leads its sentence put behind it: "If A, B?" becomes "B, if A?"."""
    found = _CLAUSE.match(text)
    if not found:
        return text
    clause, rest = found["clause"], found["rest"]
    first = _WORD.match(rest)
    if first and len(first.group()) > 1 and first.group().islower() and len(rest[0].upper()) == 1:
        rest = rest[0].upper() + rest[1:]
    return f"{found['indent']}{rest}, {clause[0].lower()}{clause[1:]}{found['mark']}{text[found.end() :]}"


def _has_digit(word: str) -> bool:
    return any(c.isdigit() for c in word)


PERTURBATIONS: dict[str, Perturbation] = {
    "case": _case,
    "punctuation": _punctuation,
    "whitespace": _whitespace,
    "typo": _typo,
    "politeness": _politeness,
    "clause": _clause,
}
