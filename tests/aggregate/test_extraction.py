"""What an answer says: numbers, letters, fields; and what is no answer."""

from __future__ import annotations

import json
import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.aggregate.extraction import (
    EXTRACTORS,
    choice,
    exact,
    extractor,
    final_text,
    first_line,
    json_field,
    last_boxed,
    number,
    whole,
)
from mixmerge.aggregate.numbers import last_number, spelled
from mixmerge.errors import MixmergeError
from mixmerge.registry import find


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("so it is 1,200 apples", "1200"),
        ("7-5=2", "2"),
        ("from 7-5", "5"),
        ("x is -5", "-5"),
        ("x = −3", "-3"),
        ("3 - 4", "4"),
        ("3/4", "0.75"),
        ("6/3", "2"),
        ("-1/2", "-0.5"),
        ("1/3 of it", "1/3"),
        ("1 3/4 hours", "1.75"),
        ("-1 3/4", "-1.75"),
        ("1,234,567.50", "1234567.5"),
        ("$12.", "12"),
        ("50%", "50"),
        ("1.5e3", "1500"),
        ("1, 2", "2"),
        ("1,2", "2"),
        (".5", "0.5"),
        ("007", "7"),
        ("-0", "0"),
        ("10:30", "30"),
        ("5km on the 3rd", "5"),
        (r"\boxed{12} or 13", "12"),
        (r"\boxed{1} no, \boxed{\frac{3}{4}}", "0.75"),
        (r"\boxed{1{,}200\text{ km}}", "1200"),
        ("1 + 1\n#### 18\nchecked 5 times", "18"),
        ("<think>it is 3</think> 4", "4"),
        (r"\boxed{x}", None),
        (r"2 is \boxed{x}", None),
        ("<think> 3, or", None),
        ("H2O", None),
        ("v1.2.3", None),
        ("1/0", None),
        ("9" * 101, None),
        ("1e999", None),
        ("none at all", None),
        ("", None),
    ],
)
def test_numbers(text: str, wanted: str | None) -> None:
    assert number(text) == wanted


@given(
    st.fractions(max_denominator=10_000),
    st.sampled_from(["so: {}", "2 or 3? {}.", r"5 \boxed{{{}}} 6", "**{}**"]),
)
def test_any_number_is_found_again(value: Fraction, around: str) -> None:
    text = spelled(value)
    assert Fraction(text) == value
    assert number(around.format(text)) == text
    assert last_number(f"{value.numerator:,}") == str(value.numerator)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Answer: B", "B"),
        ("**Answer:** C", "C"),
        ("Answer: **C**", "C"),
        ("The answer is (C).", "C"),
        ("The answer is: **B) 12**", "B"),
        ("The correct option is D because of x", "D"),
        ("Answer: C. Paris", "C"),
        ("Answer:\nJ", "J"),
        ("answer: b", "B"),
        ("Answer: B. No, wait.\nAnswer: C", "C"),
        ("Option B is correct", "B"),
        ("So, (C) is the right answer", "C"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("I was thinking.\n\n**D.**", "D"),
        ("c", "C"),
        ("C) Paris", "C"),
        ("C. Paris", "C"),
        ("I think (C) fits, as (C) is warm", "C"),
        ("(A) is cold.\nSo (C)", "C"),
        (r"so \boxed{\text{E}}", "E"),
        (r"The answer is $\boxed{B}$", "B"),
        ("<think>Answer: A</think>Answer: B", "B"),
        ("", None),
        ("Answer: A dog", None),
        ("Answer: B vitamins", None),
        ("The answer is a dog", None),
        ("The answer is not C", None),
        ("Answer: I think 5", None),
        ("The answer is A's dog", None),
        ("A man and I went to B.", None),
        ("D. H. Lawrence wrote it", None),
        ("A. one\nB. two\nC. three", None),
        ("(A) is cold, (B) is warm", None),
        ("Vitamin C is good", None),
        ("Plan B", None),
        ("K", None),
        ("Answer: K", None),
        (r"Answer: C, \boxed{12}", None),
        ("<think>Answer: A", None),
    ],
)
def test_letters(text: str, wanted: str | None) -> None:
    assert choice(text) == wanted


WORDS = st.sampled_from(
    [
        "A",
        "I",
        "B",
        "C",
        "Answer",
        "answer",
        "the",
        "is",
        "cat",
        "Bob",
        "Going",
        "and",
        "a",
        "it",
        "HIJ",
        "A1",
        "-A",
    ]
)


@given(st.lists(WORDS, min_size=2, max_size=12).map(" ".join))
def test_words_of_capitals_are_no_choice(text: str) -> None:
    """No form of an answer is in them, unless it is stated as one or stands in the end of a stated one."""
    plain = text.replace("nswer", "nything")
    assert choice(f"{plain} then.") is None


@given(st.sampled_from(string.ascii_uppercase[:10]), st.text(string.ascii_lowercase + " .\n", max_size=60))
def test_a_stated_letter_is_found_behind_any_words(letter: str, words: str) -> None:
    for form in ("Answer: {}", "the answer is ({}).", "Final answer: **{}**", r"\boxed{{{}}}"):
        assert choice(f"{words}\n{form.format(letter)}") == letter


def test_texts() -> None:
    assert exact("  The\n Cat ") == exact("the cat") == "the cat"
    assert whole(" a\n b ") == "a\n b"
    assert first_line("\n  a b \nc") == "a b"
    assert [one("  \n ") for one in (exact, whole, first_line)] == [None] * 3
    assert [one("<think>x</think> \n y") for one in (exact, whole, first_line)] == ["y"] * 3
    assert final_text("<think> a </think> b </think> c ") == "c"
    assert final_text(" <think> never") == ""
    assert final_text("a <think> b") == "a <think> b"


def test_boxes() -> None:
    assert last_boxed(r"\boxed{a{b}c} \boxed{d") == "a{b}c"
    assert last_boxed(r"\boxed{a \boxed{b}}") == "b"
    assert last_boxed(r"\boxed{a") is None


def test_json_fields() -> None:
    text = 'first {"answer": 1} then ```json\n{"answer": {"b": 2.0, "a": [1.5, true]}, "n": null}\n``` { bad'
    assert json_field(text) == '{"a": [1.5, true], "b": 2}'
    assert json_field(text, path="answer.a.0") == "1.5"
    assert json_field(text, path="n") is None
    assert json_field(text, path="answer.a.7") is None
    assert json_field(text, path="answer.a.x") is None
    assert json_field('{"answer": " x  y "}') == "x y"
    assert json_field('{"answer": ""}') is None
    assert json_field('{"answer": 3.0}') == json_field('{"answer": 3}') == "3"
    assert json_field('{"answer": "\\ud800"}') == "?"
    assert json_field("[1]") is None
    assert json_field('{"a":' * 100_000) is None


@given(st.recursive(st.integers() | st.booleans() | st.text(), lambda inner: st.lists(inner), max_leaves=5))
def test_json_of_any_value(value: object) -> None:
    found = json_field(f"it is {json.dumps({'answer': value})} I think")
    assert found == json_field(json.dumps({"answer": value}))
    if not isinstance(value, str):
        assert found is not None
        assert json.loads(found) == value


@given(
    st.sampled_from(sorted(EXTRACTORS)),
    st.text() | st.text("\\boxed{}<think>/answer: ABC(*)\n1,./", max_size=80),
)
def test_any_text_can_be_read(name: str, text: str) -> None:
    found = EXTRACTORS[name](text)
    assert found is None or found.strip() == found != ""
    found is None or found.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("name", sorted(EXTRACTORS))
def test_no_text_takes_forever(name: str) -> None:
    """Each of these took minutes where a pattern tries runs of any length: a test that ends is a test that passes."""
    runs = [
        "9",
        "1,",
        "1,111",
        r"\boxed{",
        "answer is ",
        "*",
        "(",
        " ",
        "- ",
        '{"a":"',
        "A",
        r"\frac{",
        "A is ",
        "_ ",
    ]
    for one in runs:
        for text in (one * (40_000 // len(one)), "answer" + one * (40_000 // len(one)) + "x"):
            EXTRACTORS[name](text)


def test_extractors_by_name() -> None:
    assert extractor("number") is find("extraction", "number") is number
    assert extractor("json:a.b")('{"a": {"b": 7}}') == "7"
    for name, words in [
        ("nmber", "Did you mean 'number'"),
        ("number:x", "is 'number:x'"),
        ("json:", "is 'json:'"),
        ("json:a..b", "is 'json:a..b'"),
    ]:
        with pytest.raises(MixmergeError, match=words):
            extractor(name)
