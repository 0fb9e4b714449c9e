"""Real text that is on every machine: lines of the Python standard library, and a task learned from them."""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mixmerge.evaluate import Question

# Parts that are not ordinary code, not installed everywhere, or not of the standard library at all.
_LEFT_OUT = re.compile(
    r"(^|/)(site-packages|dist-packages|test|tests|idlelib|lib2to3|turtledemo|ensurepip|encodings)/"
)
_HELD_OUT_SHARE = 0.1
_PAIRS = {"(": ")", "[": "]", "{": "}"}
_ENDING = re.compile(r"^(.*[^)\]}:(\[{ ])([)\]}]+:?)$")


def lines(seed: int) -> Iterator[tuple[str, bool]]:
    """Stripped lines of 8 to 44 ASCII characters, with whether their module is held out from training."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _LEFT_OUT.search(name):
            continue
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        held_out = digest[0] < 256 * _HELD_OUT_SHARE
        for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
            line = line.strip()
            if 8 <= len(line) <= 44 and line.isascii() and line[0] != "#" and "->" not in line:
                yield line, held_out


def text(seed: int, count: int) -> list[str]:
    """Lines of the training modules, shuffled: the base's generic text."""
    found = sorted({line for line, held_out in lines(seed) if not held_out})
    random.Random(seed).shuffle(found)
    return found[:count]


def close(seed: int, train: int, held_out: int) -> tuple[list[Question], list[Question]]:
    """Lines without their closing brackets (and colon); the answer is what is missing.

    Held-out lines come from modules no training line comes from. Common endings are capped: in training, so
    that rare ones are seen; held out, so that always giving the commonest is right only once in five.
    """
    pools: dict[bool, dict[str, Question]] = {False: {}, True: {}}
    for line, apart in lines(seed):
        match = _ENDING.match(line)
        if match and _is_balanced(line):
            pools[apart][line] = Question(f"close {match[1]} -> ", match[2])
    known = {question.prompt for question in pools[False].values()}
    fresh = [question for question in pools[True].values() if question.prompt not in known]
    rng = random.Random(seed)
    known_lines = list(pools[False].values())
    return _capped(known_lines, train, train // 12, rng), _capped(fresh, held_out, held_out // 5, rng)


def _is_balanced(line: str) -> bool:
    """Every bracket is opened and closed within the line, and no string is left open."""
    stack = []
    for character in line:
        if character in _PAIRS:
            stack.append(_PAIRS[character])
        elif character in _PAIRS.values() and (not stack or stack.pop() != character):
            return False
    return not stack and line.count("'") % 2 == 0 and line.count('"') % 2 == 0


def _capped(questions: list[Question], count: int, most: int, rng: random.Random) -> list[Question]:
    """At most ``count`` questions, and ``most`` with the same answer."""
    rng.shuffle(questions)
    seen = Counter[str]()
    kept: list[Question] = []
    for question in {question.prompt: question for question in questions}.values():
        if seen[question.answer] < most and len(kept) < count:
            seen[question.answer] += 1
            kept.append(question)
    rng.shuffle(kept)  # rare endings came late: the first questions must be like the rest
    return kept
