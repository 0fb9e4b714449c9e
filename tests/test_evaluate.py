"""Scores: exact match, the table's numbers by hand, and answers that do not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mixmerge.errors import MixmergeError
from mixmerge.evaluate import Question, ScoreTable, answers, exact_match, grade, load


@pytest.mark.parametrize(
    ("given", "expected", "score"),
    [
        ("42", "42", 1.0),
        (" 42 \nand then some", "42", 1.0),
        ("\n42", "42", 1.0),
        ("042", "42", 0.0),
        ("4 2", "42", 0.0),
        ("", "42", 0.0),
        ("", "", 1.0),
    ],
)
def test_exact_match(given: str, expected: str, score: float) -> None:
    assert exact_match(given, expected) == score


TABLE = ScoreTable(
    tasks=("sums", "verse", "prose"),
    scores={
        "base": {"sums": 0.1, "verse": 0.2, "prose": 0.3},
        "merge": {"sums": 0.4, "verse": 1.0, "prose": 0.1},
    },
    own={"sums": 0.8, "verse": 0.5, "prose": 0.0},
    questions={"sums": 10, "verse": 10, "prose": 20},
)


def test_table() -> None:
    assert TABLE.average("base") == pytest.approx(0.2)
    assert TABLE.shares("merge") == {"sums": 0.5, "verse": 2.0}, "an expert that scores nothing has no share"
    assert TABLE.retained("merge") == pytest.approx(1.25)
    assert TABLE.as_dict()["models"]["merge"] == {
        "scores": {"sums": 0.4, "verse": 1.0, "prose": 0.1},
        "average": 0.5,
        "retained": {"sums": 0.5, "verse": 2.0},
        "retained_average": 1.25,
    }


def test_table_for_people() -> None:
    from rich.console import Console

    console = Console(width=100)
    with console.capture() as capture:
        console.print(TABLE.render("scores"))
    text = capture.get()
    row = next(line for line in text.splitlines() if "merge" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        *("merge", "40.0 (50%)", "100.0 (200%)", "10.0", "50.0", "125%"),
    ]
    alone = ScoreTable(("sums",), {"base": {"sums": 0.5}}, {}, {"sums": 2})
    assert alone.retained("base") is None
    with console.capture() as capture:
        console.print(alone.render("scores"))
    assert "-" in capture.get()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_do_not_depend_on_the_batch(name: str, family: Callable[..., Any]) -> None:
    answerer = load(str(family(name, dtype="float32").base))
    prompts = ["a", "the quick brown fox", "1 + 2 =", "the lazy dog", "jumps over"]
    together = answers(answerer, prompts, max_new_tokens=6)
    assert together == answers(answerer, prompts, max_new_tokens=6, batch_size=2)
    assert together == [answers(answerer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert len(set(together)) > 1
    questions = [Question(prompt, text) for prompt, text in zip(prompts, together, strict=True)]
    assert len(grade(answerer, questions)) == 5
    lengths = [2.0 * len(question.answer) for question in questions]
    assert grade(answerer, questions, metric=lambda given, expected: 2.0 * len(expected)) == lengths
    assert answers(answerer, [], max_new_tokens=3) == []


def test_what_is_no_model(tmp_path: Any) -> None:
    with pytest.raises(MixmergeError, match="cannot load it"):
        load(str(tmp_path))
