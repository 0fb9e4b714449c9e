"""Perturbations change the words and keep the numbers."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.errors import MixmergeError
from mixmerge.routers.perturb import PERTURBATIONS, perturb

QUESTION = (
    "If Natalia sold 48 clips in April, and 3.5 times as many in May for $1,200, "
    "how many did twenty-five friends buy?"
)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
SPELT = re.compile(r"\b(one|two|three|twenty|half|hundred)\b", re.IGNORECASE)


def numbers(text: str) -> list[str]:
    return sorted([*NUMBER.findall(text), *map(str.lower, SPELT.findall(text))])


PIECES = st.one_of(
    st.sampled_from(
        [
            "If",
            "when",
            "Natalia",
            "sold",
            "clips",
            "what",
            "USA",
            "x",
            "two",
            "Twenty",
            "half",
            "Hundred",
            "-",
            "(",
        ]
    ),
    st.from_regex(r"[a-zA-Z]{1,9}", fullmatch=True),
    st.integers(-9999, 9999).map(str),
    st.sampled_from(["1,200", "3.5", "50%", "1e5", "0xFF", "3rd", "$7", "2/3", "x2", "5!", "1 000"]),
)
TEXTS = st.lists(st.tuples(PIECES, st.sampled_from([" ", ", ", ". ", "? ", "\n", " "])), min_size=1).map(
    lambda parts: "".join(piece + gap for piece, gap in parts)
)


@given(TEXTS, st.sampled_from(sorted(PERTURBATIONS)), st.integers(0, 3))
def test_numbers_stay_and_the_seed_decides(text: str, kind: str, seed: int) -> None:
    changed = perturb(text, kind=kind, seed=seed)
    assert numbers(changed) == numbers(text)
    assert changed.strip()
    assert perturb(text, kind=kind, seed=seed) == changed


@given(st.text(min_size=1), st.sampled_from(sorted(PERTURBATIONS)))
def test_any_text_is_taken(text: str, kind: str) -> None:
    perturb(text, kind=kind, seed=0)


@pytest.mark.parametrize("kind", PERTURBATIONS)
def test_every_kind_changes_a_question(kind: str) -> None:
    changed = {perturb(QUESTION, kind=kind, seed=seed) for seed in range(20)}
    assert changed - {QUESTION}
    assert all(numbers(one) == numbers(QUESTION) for one in changed)
    if kind != "clause":
        assert len(changed) > 1  # seeds differ


def test_what_each_kind_does() -> None:
    assert perturb("If a has 3, what is b?", kind="clause", seed=0) == "What is b, if a has 3?"
    assert perturb("If x is 3.5, y is 2. And z?", kind="clause", seed=0) == "y is 2, if x is 3.5. And z?"
    assert perturb("If a has 1, 2 or 3, what?", kind="clause", seed=0) == "If a has 1, 2 or 3, what?"
    assert perturb("Name it.", kind="clause", seed=0) == "Name it."
    cases = {perturb("Ask the USA about B12 in March", kind="case", seed=seed) for seed in range(20)}
    assert cases == {"ask the USA about B12 in March", "ask the USA about B12 in march"}
    ends = {perturb("Is it?", kind="punctuation", seed=seed) for seed in range(20)}
    assert ends == {"Is it", "Is it??"}
    assert perturb("What is 5!", kind="punctuation", seed=0) == "What is 5!"
    commas = {perturb("red, two, blue", kind="punctuation", seed=seed) for seed in range(30)}
    assert commas == {"red two, blue", "red, two, blue."}
    gaps = {perturb("a b 3", kind="whitespace", seed=seed) for seed in range(30)}
    assert gaps == {"a  b 3", "a b 3 "}
    for seed in range(30):
        changed = perturb("three PLANETS word 4you", kind="typo", seed=seed)
        assert changed != "three PLANETS word 4you"
        assert changed.startswith("three PLANETS w")
        assert changed.endswith("d 4you")
        assert perturb("Hi", kind="politeness", seed=seed).endswith("Hi")


def test_an_unknown_kind() -> None:
    with pytest.raises(MixmergeError, match=r"there is no kind 'typos'. Did you mean 'typo'"):
        perturb("Hi", kind="typos", seed=0)
