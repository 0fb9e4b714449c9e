"""The input of a job: formats, faults with their lines, reading again by place."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.batch.lines import Input, Line
from mixmerge.batch.lines_index import Index
from mixmerge.batch.records import CHAT, COMPLETION, Item, Settings
from mixmerge.engines.records import Message
from mixmerge.errors import MixmergeError

Make = Callable[..., Input]


def request_line(name: str = "a", *, url: str = CHAT, **body: Any) -> str:
    """A line of OpenAI's batch input that asks the mixture ``mix``."""
    asked = {"messages": [{"role": "user", "content": "How much is 2 + 2?"}]}
    full = {"model": "mix", **(asked if url == CHAT else {"prompt": "2 + 2 ="}), **body}
    return json.dumps({"custom_id": name, "method": "POST", "url": url, "body": full})


def said(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def items(job: Input) -> list[Item]:
    lines = list(job.scan())
    assert [line.faults for line in lines] == [()] * len(lines)
    return [line.item for line in lines if line.item is not None]


def faults(job: Input) -> list[str]:
    return [str(fault) for line in job.scan() for fault in line.faults]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(MixmergeError) as caught:
        call()
    return str(caught.value)


def same_again(job: Input, lines: list[Line]) -> None:
    """Reading by place gives what the scan gave, in any order."""
    order = list(range(len(lines)))[::-1]
    assert job.read(order) == [lines[at] for at in order]
    assert list(job.lines()) == lines


# --- OpenAI's format


def test_a_chat(job: Make) -> None:
    turns = [
        {"role": "developer", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": "three", "refusal": None, "tool_calls": None},
        {"role": "tool", "content": "four"},
    ]
    line = request_line(
        messages=turns,
        max_completion_tokens=9,
        temperature=1,
        top_p=0.5,
        stop="\n",
        seed=3,
        logprobs=True,
        metadata={"task": "sums"},
    )
    (found,) = items(job(line))
    assert found == Item(
        "a",
        (
            Message("system", "Be short."),
            Message("user", "one\ntwo"),
            Message("assistant", "three"),
            Message("tool", "four"),
        ),
        None,
        Settings(9, 1.0, 0.5, ("\n",), 3, True),
        {"task": "sums"},
        CHAT,
    )


def test_a_completion_of_an_expert(job: Make) -> None:
    line = request_line(
        url=COMPLETION, model="code", prompt=["def f"], max_tokens=5, stop=["a", "b"], logprobs=1
    )
    settings = Settings(max_new_tokens=5, stop=("a", "b"), logprobs=True)
    assert items(job(line)) == [Item("a", "def f", "code", settings, {}, COMPLETION)]


def test_what_is_not_given_or_null_is_the_mixtures(job: Make) -> None:
    names = (
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "logprobs",
        "metadata",
        "n",
        "tools",
        "audio",
    )
    lines = [request_line("a"), request_line("b", **dict.fromkeys(names))]
    assert [one.settings for one in items(job("\n".join(lines)))] == [Settings(), Settings()]


def test_values_that_ask_for_nothing(job: Make) -> None:
    neutral = {
        "n": 1,
        "stream": False,
        "store": False,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "top_logprobs": 0,
        "user": "ann",
        "service_tier": "auto",
    }
    completion = request_line("b", url=COMPLETION, best_of=1, echo=False, suffix="", logprobs=0)
    found = items(job(request_line("a", **neutral) + "\n" + completion))
    assert found[0].settings == Settings()
    assert found[1].settings == Settings(logprobs=True)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"n": 2}, "line 1: body.n: is 2: not supported. Only 1."),
        ({"n": True}, "line 1: body.n: is true: not supported. Only 1."),
        ({"stream": True}, "line 1: body.stream: is true: not supported. Only false."),
        ({"tools": [{"type": "function"}]}, "line 1: body.tools: is a list: not supported. Only []."),
        ({"response_format": {"type": "json_object"}}, "line 1: body.response_format: is an object"),
        (
            {"reasoning_effort": "low"},
            "line 1: body.reasoning_effort: is 'low': not supported. Leave it out.",
        ),
        ({"top_logprobs": 3}, "line 1: body.top_logprobs: is 3: not supported. Only 0."),
        ({"logprobs": 1}, "line 1: body.logprobs: is 1. true or false."),
        ({"temprature": 0}, "line 1: body.temprature: is not supported. Did you mean 'temperature'?"),
        ({"prompt": "x"}, "line 1: body.prompt: is not supported."),
        ({"model": "maths"}, "line 1: body.model: is 'maths'. Did you mean 'math'? Known: code, math, mix."),
        ({"model": None}, "line 1: body.model: is nothing. 'mix', which routes, or an expert's name."),
        ({"temperature": -1}, "line 1: body.temperature: is -1.0. 0 or more."),
        ({"temperature": "hot"}, "line 1: body.temperature: is 'hot'. A number."),
        ({"temperature": 10**400}, "line 1: body.temperature: is too large a number. A number."),
        ({"top_p": 0}, "line 1: body.top_p: is 0.0. Above 0, at most 1."),
        ({"max_tokens": 0}, "line 1: body.max_tokens: is 0. 1 or more."),
        ({"max_completion_tokens": 0}, "line 1: body.max_completion_tokens: is 0. 1 or more."),
        ({"max_tokens": 1.5}, "line 1: body.max_tokens: is 1.5. A whole number below 2**63."),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "line 1: body.max_tokens: differs from"),
        ({"stop": ["a", ""]}, "line 1: body.stop: is ['a', '']. Texts of one character or more."),
        ({"stop": [1]}, "line 1: body.stop: is a list. A text, or a list of texts."),
        ({"seed": -1}, "line 1: body.seed: is -1. 0 to 2**63 - 1."),
        ({"seed": 2**63}, "line 1: body.seed: is too large a number."),
        ({"seed": True}, "line 1: body.seed: is true."),
        ({"user": 3}, "line 1: body.user: is a number. A text."),
        ({"metadata": {"task": 1}}, "line 1: body.metadata: is an object. An object of texts."),
        ({"messages": []}, "line 1: body.messages: is empty."),
        ({"messages": "hi"}, "line 1: body.messages: is a text. A list of messages."),
        ({"messages": ["hi"]}, "line 1: body.messages[0]: is a text."),
        (
            {"messages": [{"role": "user", "content": "  "}]},
            "line 1: body.messages: is empty. Text of at least",
        ),
        (
            {"messages": [{"role": "judge", "content": "x"}]},
            "line 1: body.messages[0].role: is 'judge'. system,",
        ),
        ({"messages": [{"role": "user"}]}, "line 1: body.messages[0].content: is nothing."),
        ({"messages": [{"content": "x"}]}, "line 1: body.messages[0].role: is nothing."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "line 1: body.messages[0].content[0]: is of type 'image_url'. Text parts only",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]},
            "line 1: body.messages[0].tool_calls: is not supported.",
        ),
    ],
)
def test_what_a_chat_cannot_ask(job: Make, body: dict[str, Any], said: str) -> None:
    found = faults(job(request_line(**body)))
    assert len(found) == 1
    assert found[0].startswith(said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"prompt": ["a", "b"]}, "line 1: body.prompt: is a list. A text, or a list of one text."),
        ({"prompt": [1, 2]}, "line 1: body.prompt: is a list."),
        ({"prompt": ""}, "line 1: body.prompt: is empty."),
        ({"logprobs": 2}, "line 1: body.logprobs: is 2. 0 or 1."),
        ({"logprobs": True}, "line 1: body.logprobs: is true. 0 or 1."),
        ({"best_of": 2}, "line 1: body.best_of: is 2: not supported. Only 1."),
        ({"echo": True}, "line 1: body.echo: is true: not supported. Only false."),
        ({"max_completion_tokens": 3}, "line 1: body.max_completion_tokens: is not supported. Did you mean"),
    ],
)
def test_what_a_completion_cannot_ask(job: Make, body: dict[str, Any], said: str) -> None:
    (found,) = faults(job(request_line(url=COMPLETION, **body)))
    assert found.startswith(said)


def test_all_faults_of_a_line_at_once(job: Make) -> None:
    given = {"custom_id": "x", "method": "GET", "url": "/v1/embeddings", "body": [], "extra": 1}
    many = request_line("y", **{f"field{n}": n for n in range(30)})
    first, second = job(json.dumps(given) + "\n" + many).scan()
    assert [str(fault).split(". ")[0] for fault in first.faults] == [
        "line 1: extra: is not known",
        "line 1: method: is 'GET'",
        "line 1: url: is '/v1/embeddings'",
        "line 1: body: is a list",
    ]
    assert str(first.fault).startswith(
        "line 1: extra: is not known. Known: custom_id, method, url, body. method:"
    )
    assert first.id == "x"
    assert first.item is None
    assert len(second.faults) == 11
    assert str(second.faults[-1]) == "line 2: and 20 more faults."


def test_a_broken_line_does_not_stop_the_rest(job: Make) -> None:
    content = b"\n".join(
        [
            request_line("a").encode(),
            b"{oops",
            b"",
            b'{"custom_id": "caf\xe9"}',
            b"[" * 100_000,
            request_line("b", temperature=float("nan")).encode(),
            request_line("c").replace("0}", "1e999}").replace('"mix"', '"mix", "top_p": 1e999').encode(),
            b'{"custom_id": "a", "custom_id": "b"}',
            request_line("\ud800").encode(),
            b"[1]",
            request_line("big", user="x" * 5000).encode(),
            b"9" * 4400,
            request_line("z").encode(),
        ]
    )
    made = job(content, max_bytes=4500, format="openai")
    lines = list(made.scan())
    said = {line.number: str(line.fault) for line in lines if line.fault}
    assert [(line.number, line.id) for line in lines if line.item] == [(1, "a"), (13, "z")]
    assert said == {
        2: "line 2: is not JSON: Expecting property name enclosed in double quotes at character 2. An object.",
        4: "line 4: is not UTF-8: byte 19 of the line is 0xe9. UTF-8. Convert the file, as iconv does.",
        5: "line 5: has more than 4,500 bytes.",
        6: "line 6: is not JSON: NaN is no number. An object.",
        7: "line 7: is not JSON: 1e999 is too large. An object.",
        8: "line 8: is not JSON: the key 'custom_id' is there twice. An object.",
        9: "line 9: is not JSON: it holds half of a surrogate pair. An object.",
        10: "line 10: is a list. An object with custom_id, method, url, body.",
        11: "line 11: has more than 4,500 bytes.",
        12: said[12],
    }
    assert said[12].startswith("line 12: is not JSON: Exceeds the limit")
    assert lines[1].id == "line-2"
    same_again(made, lines)
    assert "nested too deeply" in faults(job(b"[" * 100_000, format="openai"))[0]


def test_very_many_fields_take_no_longer_than_they_must(job: Make) -> None:
    """Nothing looks for each of them among all others, which would take hours."""
    many = {f"field{n}": n for n in range(30_000)}
    twice = json.dumps(many)[:-1] + ', "field29999": 1}'
    header = ",".join(("text", *many, "field7"))
    assert [one.split(":")[1] for one in faults(job(request_line(**many)))][-1] == " and 29,990 more faults."
    assert "'field29999' is there twice" in faults(job(twice))[0]
    assert "has the column 'field7' twice" in refused(lambda: job(header + "\n", "job.csv"))


def test_faults_quote_no_prompt(job: Make) -> None:
    secret = "the launch is on friday"
    lines = [
        request_line("a", messages=[{"role": "user", "content": secret}], n=2),
        request_line("b", messages=[{"role": "user", "content": [secret]}]),
        request_line("c", url=COMPLETION, prompt=[secret, secret]),
        json.dumps({"custom_id": "d", "messages": secret})[:-1],
        request_line("e", messages=secret),
    ]
    found = faults(job("\n".join(lines)))
    assert len(found) == 5
    assert not [one for one in found if "friday" in one]


def test_an_id_that_is_there_twice(job: Make) -> None:
    made = job("\n".join([request_line("a"), request_line("a"), request_line("b"), request_line("a", n=2)]))
    lines = list(made.scan())
    assert [line.item is None for line in lines] == [False, True, False, True]
    assert str(lines[1].fault) == "line 2: custom_id: is 'a', as that of line 1 is. Each has another."
    assert [str(one)[:24] for one in lines[3].faults] == [
        "line 4: body.n: is 2: no",
        "line 4: custom_id: is 'a",
    ]
    same_again(made, lines)


def test_names_whose_hashes_are_the_same_are_compared() -> None:
    index = Index()
    names = [f"name {n}" for n in range(1000)]
    for at, name in enumerate(names):
        assert index.add(at, at, 0, name, lambda other: False) is None
    assert index.add(1000, 1000, 0, "name 7", lambda other: names[other] == "name 7") == 7
    assert index.add(1001, 1001, 0, "name 7", lambda other: False) is None
    assert index.add(1002, 1002, 0, "", lambda other: True) is None
    assert index.earlier == {1000: 7}


# --- other formats


def test_json_lines(job: Make) -> None:
    lines = [
        '{"id": 7, "question": "one", "task": "sums", "level": 3, "tags": ["x"], "metadata": {"lang": "en"}}',
        "",
        '"two"',
        '{"messages": [{"role": "user", "content": "three"}], "custom_id": "c"}',
        '{"text": 4}',
        '{"note": "x"}',
        "3",
        '{"text": " ", "id": "blank"}',
    ]
    found = list(job("\n".join(lines)).scan())
    assert [line.item for line in found if line.item] == [
        Item("7", said("one"), metadata={"task": "sums", "level": "3", "lang": "en"}),
        Item("3", said("two")),
        Item("c", (Message("user", "three"),)),
    ]
    assert [str(line.fault) for line in found if line.fault] == [
        "line 5: text is a int. A string. Usual names: text, query, prompt, question.",
        "line 6: has no text. Fields here: note. Usual names: text, query, prompt, question.",
        "line 7: is JSON, but a number. An object or a string.",
        "line 8: text: is empty. Text of at least one character that is not a space.",
    ]
    assert [line.id for line in found] == ["7", "3", "c", "line-5", "line-6", "line-7", "blank"]


def test_a_named_field(job: Make) -> None:
    (found,) = items(job('{"q": "one", "text": "x"}', field="q"))
    assert found == Item("1", said("one"), metadata={"text": "x"})
    (chat,) = items(job('{"messages": [{"role": "user", "content": "a"}], "text": "x"}', field="messages"))
    assert chat.prompt == (Message("user", "a"),)


def test_csv_rows_span_lines(job: Make) -> None:
    content = (
        '\ufeffid,question,task\r\n1,"two\r\nlines, ""quoted""",sums\r\n\r\n,no id,x\r\n3,5" pipe,y\r\n4,short\r\n'
        '5,"open,z\r\n6,fine,w\r\n1,again,w\r\n'
    )
    made = job(content, "job.csv")
    lines = list(made.scan())
    assert [(line.number, line.id, line.item.text if line.item else None) for line in lines] == [
        (2, "1", 'two\r\nlines, "quoted"'),
        (5, "5", "no id"),
        (6, "3", '5" pipe'),
        (7, "4", None),
        (8, "line-8", None),
        (9, "6", "fine"),
        (10, "1", None),
    ]
    assert lines[0].item is not None
    assert lines[0].item.metadata == {"task": "sums"}
    assert lines[0].cells == ("1", 'two\r\nlines, "quoted"', "sums")
    assert [str(line.fault) for line in lines if line.fault] == [
        "line 7: has 2 cells. The first row has 3 columns.",
        "line 8: is no row of CSV: unexpected end of data.",
        "line 10: id: is '1', as that of line 2 is. Each has another.",
    ]
    same_again(made, lines)
    assert made.sha256 == hashlib.sha256(content.encode()).hexdigest()


def test_csv_bytes_that_are_no_utf8_keep_their_row(job: Make) -> None:
    made = job(b'text\n"caf\xe9\nmore"\nfine\n', "job.csv")
    lines = list(made.scan())
    assert [(line.number, line.item is not None, line.cells) for line in lines] == [
        (2, False, None),
        (4, True, ("fine",)),
    ]
    assert "is not UTF-8" in str(lines[0].fault)
    same_again(made, lines)


def test_a_quote_that_is_not_closed_costs_one_row(job: Make) -> None:
    content = 'text\n"open\n' + "".join(f"row {n}\n" for n in range(2000))
    made = job(content, "job.csv", max_bytes=5000)
    lines = list(made.scan())
    assert len(lines) == 2001
    assert [str(line.fault) for line in lines if line.fault] == [
        "line 2: has more than 5,000 bytes, or a quote that is not closed."
    ]
    same_again(made, lines)


def test_text(job: Make) -> None:
    made = job("\ufeffone\n\n  \ntwo\r\n{three\n", "job.txt")
    assert [(one.id, one.text) for one in items(made)] == [("1", "one"), ("4", "two"), ("5", "{three")]
    same_again(made, list(made.scan()))


@pytest.mark.parametrize(
    ("name", "content", "options", "wanted"),
    [
        ("a.jsonl", request_line(), {}, "openai"),
        ("a.jsonl", "{broken\n" + request_line(), {}, "openai"),
        ("a.jsonl", '{"text": "x", "custom_id": "a"}', {}, "jsonl"),
        ("a.jsonl", "plain", {}, "jsonl"),
        ("stdin", "\n\n" + request_line(), {}, "openai"),
        ("stdin", "What is this?\n{", {}, "text"),
        ("stdin", '"a text"', {}, "jsonl"),
        ("a.CSV", "text\nx", {}, "csv"),
        ("a.txt", request_line(), {}, "text"),
        ("a.txt", request_line(), {"format": "openai"}, "openai"),
        ("a.tsv", "text\nx", {"format": "csv"}, "csv"),
    ],
)
def test_formats(job: Make, name: str, content: str, options: dict[str, Any], wanted: str) -> None:
    assert job(content, name, **options).format == wanted


@pytest.mark.parametrize(
    ("name", "content", "options", "said"),
    [
        ("a.jsonl", "", {}, "a.jsonl: holds no request. At least one line that is not empty."),
        ("a.jsonl", "\n \n", {}, "a.jsonl: holds no request."),
        ("a.csv", "", {}, "a.csv: holds no request. A row of column names"),
        ("a.csv", "text\n", {}, "a.csv: holds no request."),
        ("a.csv", "x,y\n1,2", {}, "a.csv, line 1: has no column of texts. Columns here: x, y."),
        ("a.csv", "text,x,x\n1,2,3", {}, "a.csv, line 1: has the column 'x' twice."),
        ("a.csv", "x,y\n1,2", {"field": "z"}, "a.csv, line 1: has no column 'z'."),
        ("a.csv", b"caf\xe9\n1", {}, "a.csv, line 1: is not UTF-8"),
        ("a.csv", '"x', {}, "a.csv, line 1: is no row of CSV"),
        ("a.parquet", "x", {}, "a.parquet: jobs are not read from .parquet files. OpenAI batch JSONL,"),
        ("a.txt", "x", {"field": "q"}, "field: is 'q', and text has no fields"),
        ("a.txt", "x", {"format": "cvs"}, "format: no format is called 'cvs'. Did you mean 'csv'?"),
    ],
)
def test_what_is_no_job(job: Make, name: str, content: Any, options: dict[str, Any], said: str) -> None:
    assert said in refused(lambda: list(job(content, name, called=name, **options).scan()))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def open_job(path: Path | str) -> Input:
        return Input.open(path, experts=(), mixture_name="mix", name="the input")

    assert (
        refused(lambda: open_job(tmp_path / "none"))
        == "the input: cannot be read: No such file or directory."
    )
    assert refused(lambda: open_job(tmp_path)) == "the input: is no file. A file that can be read again."
    assert refused(lambda: open_job("a\0b")).startswith("the input: cannot be read: ")
    os.mkfifo(tmp_path / "pipe")
    assert "is no file" in refused(lambda: open_job(tmp_path / "pipe"))


# --- changes and places


def test_the_hash_is_of_all_bytes(job: Make) -> None:
    content = b"one\r\n\n" + b"x" * 300 + b"\nlast"
    made = job(content, "a.txt", max_bytes=100)
    with pytest.raises(ValueError, match="not scanned"):
        _ = made.sha256
    assert [line.fault is None for line in made.scan()] == [True, False, True]
    assert made.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("change", ["append", "replace", "touch"])
def test_a_change_while_it_is_read(job: Make, change: str) -> None:
    made = job("one\ntwo\n", "a.txt")
    lines = made.scan()
    next(lines)
    if change == "append":
        with made.path.open("a") as file:
            file.write("three\n")
    elif change == "replace":
        other = made.path.with_name("other")
        other.write_text("one\ntwo\n")
        other.replace(made.path)
    else:
        os.utime(made.path, (1, 1))
    assert "a.txt: changed while it was read. Leave" in refused(lambda: list(lines))


def test_a_change_before_it_is_read_again(job: Make) -> None:
    made = job("one\ntwo\nthree\n", "a.txt")
    lines = list(made.scan())
    made.path.write_text("one\nTWO\nthree\n")
    assert made.read([0, 2]) == [lines[0], lines[2]]
    assert "a.txt, line 2: has changed since the job was read." in refused(lambda: made.read([1]))
    made.path.write_text("one\n")
    assert "line 3: has changed" in refused(lambda: made.read([2]))
    assert "line 2: has changed" in refused(lambda: list(made.lines()))
    made.path.unlink()
    assert "cannot be read" in refused(lambda: made.read([0]))


CONTENT = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from(
            [
                b'"',
                b'""',
                b'"a',
                b'a"',
                b"x,y",
                b'x,"y',
                b"",
                b"\r",
                b"\xef\xbb\xbf",
                b'"x"',
                b"{",
                b"[[",
                b'"""b',
            ]
        ),
        st.dictionaries(
            st.sampled_from(["text", "id", "messages", "custom_id", "method", "url", "body"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(
                        st.sampled_from(["role", "content", "n", "type", "text"]), inner, max_size=3
                    )
                ),
                max_leaves=6,
            ),
            max_size=5,
        ).map(lambda value: json.dumps(value).encode()),
        st.dictionaries(
            st.sampled_from(
                [
                    "temperature",
                    "seed",
                    "stop",
                    "max_tokens",
                    "messages",
                    "prompt",
                    "logprobs",
                    "model",
                    "tools",
                ]
            ),
            st.one_of(
                st.none(),
                st.booleans(),
                st.integers(),
                st.floats(),
                st.just(10**400),
                st.text(max_size=5),
                st.lists(st.text(max_size=3) | st.none(), max_size=2),
                st.lists(
                    st.dictionaries(
                        st.sampled_from(["role", "content"]), st.sampled_from(["user", [], None, {}])
                    ),
                    max_size=2,
                ),
            ),
            max_size=4,
        ).map(lambda body: request_line(**body).encode()),
    ),
    max_size=8,
)


@settings(max_examples=120, deadline=None)
@given(
    parts=CONTENT,
    end=st.sampled_from([b"\n", b"\r\n"]),
    kind=st.sampled_from(["openai", "jsonl", "csv", "text"]),
)
def test_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], end: bytes, kind: str
) -> None:
    content = (b"id,text" + end if kind == "csv" else b"") + end.join(parts)
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(content)
    job = Input.open(path, format=kind, experts=("math",), mixture_name="mix", max_bytes=200)
    lines: list[Line] = []
    try:
        lines.extend(job.scan())
    except MixmergeError as error:
        assert "holds no request" in str(error)  # noqa: PT017
        assert not lines
        return
    assert [line.index for line in lines] == list(range(len(lines)))
    starts = [0, *(at + 1 for at, byte in enumerate(content) if byte == ord("\n"))]
    for line in lines:
        assert starts[line.number - 1] == line.offset
        assert (line.item is None) == bool(line.faults)
        assert all(str(fault).startswith(f"line {line.number}:") for fault in line.faults)
        str(line.fault).encode("utf-8")
    assert [line.number for line in lines] == sorted({line.number for line in lines})
    good = [line.id for line in lines if line.item is not None]
    assert len(good) == len(set(good))
    assert job.sha256 == hashlib.sha256(content).hexdigest()
    same_again(job, lines)


SCAN = """
import resource, sys
from mixmerge.batch.lines import Input

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

before = peak()
job = Input.open(sys.argv[1], experts=("math",), mixture_name="mix")
count = sum(line.item is not None for line in job.scan())
some = job.read(range(0, count, count // 100))
assert [line.number for line in some] == list(range(1, count + 1, count // 100))
print(count, peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_texts(tmp_path: Path) -> None:
    """200,000 requests of 1 kB: 200 MB that are never in memory."""
    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for n in range(200_000):
            file.write(f'{{"id": "request-{n}", "text": "{str(n) * 140}"}}\n')
    size = path.stat().st_size
    assert size > 150_000_000
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCAN, path], capture_output=True, text=True, check=True
    )
    count, grown = map(int, done.stdout.split())
    assert count == 200_000
    assert grown < 25, f"{grown} MB for a file of {size / 1e6:.0f} MB"
