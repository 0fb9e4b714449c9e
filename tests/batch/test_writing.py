"""Answers of a job as files: whole and in order, or as they come."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.batch.lines import Input, Line
from mixmerge.batch.records import CHAT, COMPLETION, Answer
from mixmerge.batch.writing import Form
from mixmerge.batch.writing_files import Unordered, write_ordered
from mixmerge.errors import Fault, OutputError

Make = Callable[..., Input]
BODY = {
    CHAT: {"model": "mix", "messages": [{"role": "user", "content": "hi"}]},
    COMPLETION: {"model": "math", "prompt": "hi"},
}
OPENAI = "\n".join(
    json.dumps({"custom_id": name, "method": "POST", "url": url, "body": {**BODY[url], **more}})
    for name, url, more in [("a", CHAT, {}), ("b", COMPLETION, {}), ("c", CHAT, {"n": 2}), ("a", CHAT, {})]
)
ANSWER = Answer("", "4", "math", "stop", 7, 2, 1, 0.5, None, {"primary": "math"}, {"votes": 3})


def scanned(job: Input) -> list[Line]:
    return list(job.scan())


def answers(lines: list[Line], answer: Answer = ANSWER) -> Iterator[tuple[Line, Answer]]:
    return ((line, line.answer() if line.faults else answer) for line in lines)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- formats


def test_openai_answers(job: Make, tmp_path: Path) -> None:
    made = job(OPENAI)
    lines = scanned(made)
    form = Form(made, created=1_700_000_000)
    assert write_ordered(tmp_path / "out.jsonl", answers(lines), form=form) == 4
    chat, completion, wrong, twice = records(tmp_path / "out.jsonl")
    key = chat["id"].removeprefix("batch_req_")
    assert chat == {
        "id": f"batch_req_{key}",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": f"req_{key}",
            "body": {
                "id": f"chatcmpl-{key}",
                "object": "chat.completion",
                "created": 1_700_000_000,
                "model": "math",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "4", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
                "system_fingerprint": None,
            },
        },
        "error": None,
    }
    body = completion["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"] == [{"index": 0, "text": "4", "logprobs": None, "finish_reason": "stop"}]
    assert wrong["custom_id"] == "c"
    message = "line 3: body.n: is 2: not supported. Only 1."
    assert wrong["error"] == {"code": "invalid_request", "message": message}
    assert wrong["response"]["status_code"] == 400
    assert wrong["response"]["body"] == {
        "error": {
            "message": message,
            "type": "invalid_request_error",
            "param": "body.n",
            "code": "invalid_request",
        }
    }
    assert (twice["custom_id"], twice["response"]["status_code"]) == ("a", 400)
    assert len({one["id"] for one in (chat, completion, wrong, twice)}) == 4


def test_what_an_expert_failed_at_is_500(job: Make) -> None:
    made = job(OPENAI)
    line = scanned(made)[0]
    record = json.loads(
        Form(made, created=0).record(line, Answer("a", fault=Fault("math", "is out of memory")))
    )
    assert record["response"]["status_code"] == 500
    assert record["error"] == {"code": "server_error", "message": "math: is out of memory."}
    assert record["response"]["body"]["error"]["param"] is None


def test_explained_answers(job: Make) -> None:
    made = job(OPENAI)
    line = scanned(made)[0]
    record = json.loads(Form(made, created=0, explain=True).record(line, ANSWER))
    assert record["response"]["body"]["mixmerge"] == {
        "expert": "math",
        "cost": 0.5,
        "calls": 1,
        "decision": {"primary": "math"},
        "reason": {"votes": 3},
    }


def test_logprobs_and_numbers_that_json_does_not_have(job: Make) -> None:
    made = job(OPENAI)
    chat, completion, *_ = scanned(made)
    answer = Answer("", "x\udc80", "math", "length", logprobs=(-0.5, -math.inf), cost=math.nan)
    answer = Answer(**{**vars(answer), "decision": {"scores": {"math": math.inf}, "picks": [math.nan]}})
    form = Form(made, created=0, explain=True)
    body = json.loads(form.record(chat, answer), parse_constant=pytest.fail)["response"]["body"]
    choice = body["choices"][0]
    assert [one["logprob"] for one in choice["logprobs"]["content"]] == [-0.5, -9999.0]
    assert choice["message"]["content"] == "x\udc80"
    assert choice["finish_reason"] == "length"
    assert body["mixmerge"]["cost"] is None
    assert body["mixmerge"]["decision"] == {"scores": {"math": None}, "picks": [None]}
    body = json.loads(form.record(completion, answer))["response"]["body"]
    assert body["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -9999.0]


def test_plain_answers(job: Make, tmp_path: Path) -> None:
    made = job('{"id": "q", "text": "one"}\n{"text": 3}\n')
    write_ordered(tmp_path / "out", answers(scanned(made)), form=Form(made, created=0))
    good, bad = records(tmp_path / "out")
    assert good == {
        "id": "q",
        "line": 1,
        "answer": "4",
        "expert": "math",
        "tokens_in": 7,
        "tokens_out": 2,
        "finish": "stop",
        "cost": 0.5,
        "error": None,
    }
    assert (bad["id"], bad["line"], bad["answer"]) == ("line-2", 2, None)
    assert bad["error"].startswith("line 2: text is a int.")
    record = json.loads(Form(made, created=0, explain=True).record(made.read([0])[0], ANSWER))
    assert (record["calls"], record["decision"], record["reason"]) == (1, {"primary": "math"}, {"votes": 3})


def test_csv_answers(job: Make, tmp_path: Path) -> None:
    made = job('id,text,answer\n1,"two\nlines",old\n2,short\n', "job.csv")
    answer = Answer("", 'a "quoted"\r\nanswer, or\rtwo', "math", "stop", 7, 2, reason={"votes": 3})
    form = Form(made, created=0, explain=True)
    assert write_ordered(tmp_path / "out.csv", answers(scanned(made), answer), form=form) == 2
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        good, bad = csv.DictReader(file, strict=True)
    assert good == {
        "id": "1",
        "text": "two\nlines",
        "answer": "old",
        "line": "2",
        "mixmerge_answer": 'a "quoted"\r\nanswer, or\rtwo',
        "expert": "math",
        "tokens_in": "7",
        "tokens_out": "2",
        "finish": "stop",
        "cost": "",
        "error": "",
        "calls": "0",
        "decision": "{}",
        "reason": '{"votes": 3}',
    }
    assert (bad["id"], bad["line"], bad["mixmerge_answer"]) == ("", "4", "")
    assert bad["error"] == "line 4: has 2 cells. The first row has 3 columns."


def test_the_same_answers_are_the_same_bytes(job: Make, tmp_path: Path) -> None:
    for name in ("one", "two"):
        made = job(OPENAI, called=name)
        write_ordered(tmp_path / name, answers(scanned(made)), form=Form(made, created=5))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    other = Form(made, created=5, key="another mixture")
    assert other.record(made.read([0])[0], ANSWER) != (tmp_path / "one").read_bytes().splitlines(True)[0]


# --- whole files


def test_an_output_that_exists_is_kept(job: Make, tmp_path: Path) -> None:
    made = job(OPENAI)
    lines, form, out = scanned(made), Form(made, created=0), tmp_path / "out" / "answers.jsonl"
    out.parent.mkdir()
    out.write_text("a thesis")
    with pytest.raises(OutputError, match="exists already"):
        write_ordered(out, answers(lines), form=form)
    assert out.read_text() == "a thesis"
    assert write_ordered(out, answers(lines), form=form, overwrite=True) == 4
    assert len(records(out)) == 4
    with pytest.raises(OutputError, match="is a folder"):
        write_ordered(out.parent, answers(lines), form=form, overwrite=True)
    assert names(out.parent) == ["answers.jsonl"]


def test_an_output_that_appears_meanwhile_is_kept(job: Make, tmp_path: Path) -> None:
    made = job(OPENAI)
    lines, out = scanned(made), tmp_path / "out" / "answers.jsonl"

    def slow() -> Iterator[tuple[Line, Answer]]:
        yield from answers(lines)
        out.write_text("a thesis")

    with pytest.raises(OutputError, match="exists already"):
        write_ordered(out, slow(), form=Form(made, created=0))
    assert names(out.parent) == ["answers.jsonl"]
    assert out.read_text() == "a thesis"


def test_answers_that_fail_leave_nothing(job: Make, tmp_path: Path) -> None:
    made = job(OPENAI)
    lines = scanned(made)

    def broken() -> Iterator[tuple[Line, Answer]]:
        yield lines[0], ANSWER
        raise OSError("the journal")

    with pytest.raises(OSError, match="the journal"):
        write_ordered(tmp_path / "out" / "answers", broken(), form=Form(made, created=0))
    assert names(tmp_path / "out") == []


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file of this process grows beyond a size; the system refuses the write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_a_full_disk_leaves_nothing(job: Make, tmp_path: Path) -> None:
    made = job("\n".join(f"question {n}" for n in range(500)), "job.txt")
    lines, out = scanned(made), tmp_path / "out" / "answers.jsonl"
    with small_files(20_000), pytest.raises(OutputError, match=r"answers.jsonl: cannot be written"):
        write_ordered(out, answers(lines), form=Form(made, created=0))
    assert names(out.parent) == []
    out.write_text("a thesis")
    with small_files(20_000), pytest.raises(OutputError, match="cannot be written"):
        write_ordered(out, answers(lines), form=Form(made, created=0), overwrite=True)
    assert names(out.parent) == ["answers.jsonl"]
    assert out.read_text() == "a thesis"
    assert write_ordered(out, answers(lines), form=Form(made, created=0), overwrite=True) == 500


# --- as they come


def test_answers_as_they_come(job: Make, tmp_path: Path) -> None:
    made = job(OPENAI)
    lines, form, out = scanned(made), Form(made, created=0), tmp_path / "new" / "out.jsonl"
    with Unordered(out, form) as output:
        assert [output.write(line, ANSWER) for line in (lines[1], lines[0], lines[1])] == [True, True, False]
        assert len(records(out)) == 2, "each is with the system when write returns"
    with pytest.raises(OutputError, match="exists already"):
        Unordered(out, form)
    with Unordered(out, form, resume=True) as output:
        assert [line in output for line in lines] == [True, True, False, False]
        assert [output.write(*pair) for pair in answers(lines)] == [False, False, True, True]
        assert len(output) == 4
    assert [one["custom_id"] for one in records(out)] == ["b", "a", "c", "a"]
    with Unordered(out, form, overwrite=True) as output:
        assert len(output) == 0
    assert out.read_bytes() == b""


SOURCES = {
    "openai.jsonl": OPENAI,
    "plain.jsonl": "\n".join(f'"question {n}"' for n in range(4)),
    "rows.csv": 'text,line\n"one\ntwo",x\nthree,"y, ""z"""\nfour,z\nbroken',
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_place_it_can_be_cut_off(job: Make, tmp_path: Path, name: str) -> None:
    """Resumed after any number of bytes, the file is that of an uninterrupted run."""
    made = job(SOURCES[name], name)
    form, answer = Form(made, created=0), Answer("", 'a "b"\n\n"', "math", "stop")
    pairs, out = list(answers(scanned(made), answer)), tmp_path / "out"
    with Unordered(out, form) as output:
        assert sum(output.write(*pair) for pair in pairs) == len(pairs)
    whole = out.read_bytes()
    assert whole.startswith(form.header)
    for size in range(len(whole)):
        out.write_bytes(whole[:size])
        with Unordered(out, form, resume=True) as output:
            before = len(output)
            assert sum(output.write(*pair) for pair in pairs) == len(pairs) - before
        assert out.read_bytes() == whole, size


def test_zeros_of_a_loss_of_power_are_dropped(job: Make, tmp_path: Path) -> None:
    made, out = job(OPENAI), tmp_path / "out"
    line, *_ = scanned(made)
    form = Form(made, created=0)
    for torn in (form.record(line, ANSWER)[:50] + b"\0" * 100, b"\0" * 100):
        out.write_bytes(torn)
        with Unordered(out, form, resume=True) as output:
            assert output.write(line, ANSWER)
        assert out.read_bytes() == form.record(line, ANSWER)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    "content", [b"a thesis\n", b"{}\n", b"[1]\n", b'{"id": 3}\n', b"\xff\n", b'"x"\n', b"x" * 999]
)
def test_a_file_of_something_else_is_kept(job: Make, tmp_path: Path, name: str, content: bytes) -> None:
    made = job(SOURCES[name], name)
    scanned(made)
    out = tmp_path / "out"
    out.write_bytes(content)
    with pytest.raises(OutputError, match="is no answer of this job"):
        Unordered(out, Form(made, created=0), resume=True)
    assert out.read_bytes() == content


def test_answers_of_another_job_are_kept(job: Make, tmp_path: Path) -> None:
    made, out = job(OPENAI), tmp_path / "out"
    lines = scanned(made)
    with Unordered(out, Form(made, created=0)) as output:
        output.write(lines[0], ANSWER)
    with pytest.raises(OutputError, match="record 1 is no answer of this job"):
        Unordered(out, Form(made, created=0, key="another"), resume=True)
    out.write_bytes(out.read_bytes() * 2)
    with pytest.raises(OutputError, match="record 2 is no answer of this job that is there once"):
        Unordered(out, Form(made, created=0), resume=True)


def test_a_full_disk_keeps_the_answers_before(job: Make, tmp_path: Path) -> None:
    made = job("\n".join(f"question {n}" for n in range(500)), "job.txt")
    lines, form, out = scanned(made), Form(made, created=0), tmp_path / "out"
    with Unordered(out, form) as output:
        with small_files(20_000), pytest.raises(OutputError, match="out: cannot be written"):
            sum(output.write(line, ANSWER) for line in lines)
        kept = records(out)
        assert len(kept) == len(output) > 100
        assert out.read_bytes().endswith(b"\n")
        assert sum(output.write(line, ANSWER) for line in lines) == 500 - len(kept)
    assert [one["line"] for one in records(out)] == list(range(1, 501))


KILLED = """
import sys
from mixmerge.batch.lines import Input
from mixmerge.batch.records import Answer
from mixmerge.batch.writing import Form
from mixmerge.batch.writing_files import Unordered

job = Input.open(sys.argv[1], experts=(), mixture_name="mix")
lines = list(job.scan())
with Unordered(sys.argv[2], Form(job, created=0), resume=True) as output:
    print("ready", flush=True)
    for line in lines:
        output.write(line, Answer(line.id, "x" * 2000, "math", "stop"))
"""


@pytest.mark.slow
def test_killed_while_it_writes(tmp_path: Path) -> None:
    path, out, wanted = tmp_path / "job.txt", tmp_path / "out", tmp_path / "wanted"
    path.write_text("\n".join(f"question {n}" for n in range(3000)))
    command = [sys.executable, "-P", "-c", KILLED, path]
    subprocess.run([*command, wanted], check=True, capture_output=True)
    for size in (1, 2_000_000):
        with subprocess.Popen([*command, out], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while process.poll() is None and (not out.exists() or out.stat().st_size < size):
                time.sleep(0.001)
            process.kill()
    subprocess.run([*command, out], check=True, capture_output=True)
    assert out.read_bytes() == wanted.read_bytes()


def test_no_folder_can_be_made(job: Make, tmp_path: Path) -> None:
    made = job(OPENAI)
    lines = scanned(made)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        Unordered(tmp_path / "file" / "out", Form(made, created=0))
    with pytest.raises(OutputError, match="cannot be written"):
        write_ordered(tmp_path / "file" / "out", answers(lines), form=Form(made, created=0))


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(max_size=20), min_size=1, max_size=4),
    cells=st.lists(st.text(max_size=8), min_size=1, max_size=4),
)
def test_any_answer_in_csv(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cells: list[str]
) -> None:
    """What is written is read again as it was, by us and by the csv module."""
    folder = tmp_path_factory.getbasetemp()
    path, out = folder / "job.csv", folder / "any.csv"
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([("text", "note"), *(("x", cell) for cell in cells)])
    job = Input.open(path, experts=(), mixture_name="mix")
    form = Form(job, created=0)
    lines = scanned(job)
    said = [Answer("", texts[at % len(texts)], "math", "stop") for at in range(len(lines))]
    write_ordered(out, zip(lines, said, strict=True), form=form, overwrite=True)
    with out.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, strict=True))
    assert [row["answer"] for row in rows] == [one.text.encode("utf-8", "replace").decode() for one in said]
    with Unordered(out, form, resume=True) as output:
        assert all(line in output for line in lines)
