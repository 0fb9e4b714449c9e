"""The zoo's tasks: questions with one right answer each, split so that training never sees a held-out one.

The prompts are short forms of reasoning-gym's questions (its generators and their answers, seeded): payloads
are capital letters or digits, which the zoo's tokenizers keep apart one by one. Scoring is by exact match:
each answer is unique, and reasoning-gym's own verifiers are laxer where it matters (sorted numbers may be off
by one, a nearly reversed word earns a part).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.errors import DependencyError, Fault
from mixmerge.evaluate import Question
from mixmerge.zoo import code

Split = tuple[list[Question], list[Question]]  # training, held out


@dataclass(frozen=True)
class Task:
    """One thing an expert is good at.

    Args:
        name: of the task, and of its expert.
        summary: one line.
        split: ``(seed, train, held_out)`` -> at most so many questions of each; no prompt in both.
        careless: the answer of somebody who does not think: what the base learns to give most of the time.
        share: of the base's training, beside the other tasks.
        patience: training steps of its expert, as a multiple of the zoo's.
    """

    name: str
    summary: str
    split: Callable[[int, int, int], Split]
    careless: Callable[[Question], str]
    share: float
    patience: float = 1.0


def payload(question: Question) -> str:
    """The last word before the arrow: an answer that only repeats what was asked."""
    return question.prompt.split()[-2]


def _generated(name: str, seed: int, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Entries of a reasoning-gym generator, 200,000 at most."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise DependencyError(
            Fault("zoo", "its tasks need reasoning-gym", run="Run: pip install 'mixmerge[zoo]'")
        ) from error
    count = 200_000
    # A generator seeds entry i with seed + i: seeds must be far apart or two zoos share their questions.
    start = (seed * 1_000_003 + zlib.crc32(name.encode())) % 2**31
    data = reasoning_gym.create_dataset(name, size=count, seed=start, **settings)
    return (data[index] for index in range(count))


def _split(questions: Iterable[Question], train: int, held_out: int, seed: int) -> Split:
    """Distinct questions as they come, until there are enough or new ones have become rare; then shuffled."""
    distinct: dict[str, Question] = {}
    stale = 0
    for question in questions:
        stale = stale + 1 if question.prompt in distinct else 0
        distinct.setdefault(question.prompt, question)
        if len(distinct) == train + held_out or stale == 2000:
            break
    shuffled = list(distinct.values())
    random.Random(seed).shuffle(shuffled)
    held_out = min(held_out, len(shuffled) // 2)
    return shuffled[held_out:], shuffled[:held_out]


def _joined(numbers: Sequence[str]) -> str:
    """One-digit numbers as one string of digits."""
    return "".join(str(int(float(number))) for number in numbers)


def reverse(seed: int, train: int, held_out: int) -> Split:
    entries = _generated("spell_backward", seed, {"min_word_len": 3, "max_word_len": 6})
    words = (entry["metadata"]["word"].upper() for entry in entries)
    questions = (Question(f"reverse {word} -> ", word[::-1]) for word in words if word.isascii())
    return _split((question for question in questions if payload(question).isalpha()), train, held_out, seed)


def decrypt(seed: int, train: int, held_out: int) -> Split:
    settings = {"min_words": 1, "max_words": 60, "min_rotation": 3, "max_rotation": 3}
    texts = (entry["metadata"] for entry in _generated("caesar_cipher", seed, settings))
    pairs = (
        pair
        for text in texts
        for pair in zip(text["cipher_text"].split(), text["clear_text"].split(), strict=True)
    )
    questions = (Question(f"decrypt {cipher} -> ", clear) for cipher, clear in pairs if 3 <= len(clear) <= 7)
    return _split(questions, train, held_out, seed)


def sort(seed: int, train: int, held_out: int) -> Split:
    settings = {"min_numbers": 3, "max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 9}
    texts = (entry["metadata"] for entry in _generated("number_sorting", seed, settings))
    questions = (
        Question(
            f"sort {'up' if text['direction'] == 'ascending' else 'down'} "
            f"{_joined(text['original_numbers'])} -> ",
            _joined(text["sorted_numbers"]),
        )
        for text in texts
    )
    return _split(questions, train, held_out, seed)


def keep(seed: int, train: int, held_out: int) -> Split:
    settings = {"min_numbers": 3, "max_numbers": 6, "max_decimals": 0, "min_value": 0, "max_value": 9}
    texts = (entry["metadata"] for entry in _generated("number_filtering", seed, settings))
    kept = (text for text in texts if text["operation"].startswith("keep") and text["result"])
    questions = (
        Question(
            f"keep {'over' if text['operation'] == 'keep_larger' else 'under'} "
            f"{_joined([text['filter_value']])} in {_joined(text['original_numbers'])} -> ",
            _joined(text["result"]),
        )
        for text in kept
    )
    return _split(questions, train, held_out, seed)


_ROWS = (
    Task("reverse", "spell a word backward", reverse, payload, 0.2),
    Task("decrypt", "undo a Caesar cipher that moved each letter by three", decrypt, payload, 0.15),
    Task("sort", "sort digits, up or down", sort, payload, 0.21),
    Task("keep", "keep the digits over or under a limit", keep, payload, 0.27, 2.0),
    Task("close", "close the brackets of a line of Python", code.close, lambda question: ")", 0.17, 1.5),
)

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
