"""Metrics against values worked out by hand."""

from __future__ import annotations

import pytest

from mixmerge.evaluate.metrics import likeliest, program_of, rouge, text_metric, token_f1


@pytest.mark.parametrize(
    ("given", "expected", "score"),
    [
        ("The cat sat.", "a cat sat", 1.0),  # articles, case and punctuation do not count
        ("cat", "cat sat mat", 0.5),  # precision 1, recall 1/3
        ("cat dog", "cat sat", 0.5),  # 1/2 and 1/2
        ("cat cat", "cat", 2 / 3),  # a word counts as often as both have it: 1/2 and 1
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 1.0),  # both are without words
        ("cat", "", 0.0),
    ],
)
def test_f1(given: str, expected: str, score: float) -> None:
    assert token_f1(given, expected) == pytest.approx(score)
    assert text_metric("f1")(given, expected) == pytest.approx(score)


@pytest.mark.parametrize(
    ("kind", "score"),
    [
        # given: the cat the mat; expected: the cat sat on the mat
        ("rouge1", 2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6)),  # the, cat, the, mat
        ("rouge2", 2 * (2 / 3) * (2 / 5) / (2 / 3 + 2 / 5)),  # the cat, the mat
        ("rougeL", 2 * (4 / 4) * (4 / 6) / (4 / 4 + 4 / 6)),  # the cat ... the mat, in this order
    ],
)
def test_rouge(kind: str, score: float) -> None:
    pytest.importorskip("rouge_score")
    assert rouge(kind)("the cat the mat", "the cat sat on the mat") == pytest.approx(score)
    assert rouge(kind)("", "the cat") == 0.0
    assert rouge(kind)("the cat sat", "the cat sat") == pytest.approx(1.0)


def test_rouge_l_minds_the_order() -> None:
    pytest.importorskip("rouge_score")
    assert rouge("rouge1")("mat cat", "cat mat") == pytest.approx(1.0)
    assert rouge("rougeL")("mat cat", "cat mat") == pytest.approx(0.5)


def test_likeliest() -> None:
    logprobs = [[-1.0], [-0.6, -0.6, -0.6], [-2.0]]
    choices = ["ab", "abcdefgh", "x"]
    assert likeliest(logprobs, choices, "none") == 0  # -1, -1.8, -2
    assert likeliest(logprobs, choices, "tokens") == 1  # -1, -0.6, -2
    assert likeliest(logprobs, choices, "characters") == 1  # -0.5, -0.225, -2
    assert likeliest([[-1.0], [-1.0]], ["a", "b"], "none") == 0, "the first of equal ones"
    assert likeliest([[float("nan")], [-1.0]], ["a", "b"], "none") == -1, (
        "a broken model does not choose the first"
    )


@pytest.mark.parametrize(
    ("given", "program"),
    [
        ("x = 1", "x = 1"),
        ("Sure:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1", "x = 1"),  # cut before its end
        ("```python3\nx = 1\n```\nThat is x.", "x = 1\n"),
        ("Here:```{.python title=x}\nx = 1\n```", "x = 1\n"),
        ("```bash\npip install y\n```\nThen:\n```python\nx = 1\n```\n", "x = 1\n"),
        ("```\n1 2 3\n```\ncomes from\n```Python\nx = 1\n```", "x = 1\n"),
        ("Not ```y```, but\n```\nx = 1\n```", "x = 1\n"),
    ],
)
def test_program_of(given: str, program: str) -> None:
    assert program_of(given) == program
