"""What can go wrong with a job from outside: memory, disks, lines, servers, folders, journals, people."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixmerge.batch.job import Job
from mixmerge.batch.lines import Input
from mixmerge.batch.records import Answer
from mixmerge.batch.setup import Conditions
from mixmerge.cli import app
from mixmerge.errors import MixmergeError, StoppedError
from mixmerge.mixture import Mixture
from mixmerge.mixture.answering import setup_of

Make = Callable[..., Any]


def echo(delay: float = 0.0, name: str = "echo") -> dict[str, Any]:
    return {"model": name, "engine": "echo", "options": {"delay": delay}}


def openai(name: str, text: str, *, model: str = "mixmerge", **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages, **body}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def plain(count: int) -> list[dict[str, str]]:
    return [{"id": f"r{i}", "text": f"say {i} " + "on " * (i % 5)} for i in range(count)]


def run(*arguments: object, code: int = 0) -> Any:
    """A command in this process; its exit code is checked."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def batch(made: Any, *options: object, out: str = "out.jsonl", code: int = 0) -> Any:
    return run("batch", made.mixture, "-i", made.requests, "-o", made.folder / out, *options, code=code)


def records(path: Path) -> dict[str, dict[str, Any]]:
    """By the name of the request."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    names = [one.get("custom_id", one.get("id")) for one in found]
    assert len(set(names)) == len(names)
    return dict(zip(names, found, strict=True))


def job_of(made: Any, work: Path, conditions: Conditions) -> Job:
    mixture = Mixture.load(made.mixture)
    source = Input.open(made.requests, experts=tuple(mixture.experts), mixture_name="mixmerge")
    return Job(source, setup_of(mixture), work, conditions)


# --- memory


@pytest.fixture
def standins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plug-in of ``standins`` is installed, here and in processes that are started."""
    folder = Path(__file__).parent / "standins"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{Path(__file__).parents[2]}")


@pytest.mark.slow
def test_batches_that_are_too_large_are_halved(
    commands: Any, case: Make, standins: None, tmp_path: Path
) -> None:
    """A process that really has no more memory: 4 requests fit, and 30 are given at once."""
    expert = {"model": "m", "engine": "hungry", "options": {"rows": 4}}
    made = case({"a": expert}, plain(30), generate={"max_new_tokens": 8})
    arguments = ["batch", made.mixture, "-i", made.requests, "--apart", "--json"]
    small = commands(*arguments, "-o", tmp_path / "small.jsonl", "--batch-tokens", 40)
    large = commands(*arguments, "-o", tmp_path / "large.jsonl")
    assert json.loads(small.out)["splits"] == 0
    assert json.loads(large.out)["splits"] >= 7
    assert (tmp_path / "large.jsonl").read_bytes() == (tmp_path / "small.jsonl").read_bytes()
    assert (tmp_path / "large.jsonl").read_text().count('"error": null') == 30

    conditions, seen = Conditions(apart=True), list[str]()
    with job_of(made, tmp_path / "work", conditions) as job:

        def settled(answer: Answer) -> None:
            seen.append(answer.id)
            job.stop.set()

        with pytest.raises(StoppedError):
            job.run(settled=settled)
        known = set(job.journal.splits)
    assert known
    assert 0 < len(seen) < 30
    with job_of(made, tmp_path / "work", conditions) as job:
        assert job.journal.splits == known
        job.run()
        splits = [event["split"] for event in job.journal.events if "split" in event]
        assert len(splits) == len(set(splits)) >= 7, "what is known to be too large is not tried again"
        assert [one.text for one in job.answers()] == [
            one["answer"] for one in records(tmp_path / "small.jsonl").values()
        ]


# --- disks


@pytest.mark.parametrize("options", [[], ["--unordered"], ["--explain"]])
def test_a_full_disk(commands: Any, case: Make, options: list[str]) -> None:
    made = case({"a": echo(), "b": echo()}, plain(60))
    arguments = ["batch", made.mixture, "-i", made.requests, "--batch-tokens", 300, *options]
    commands(*arguments, "-o", made.folder / "whole.jsonl")
    wanted = sorted((made.folder / "whole.jsonl").read_text().splitlines())
    out = made.folder / "out.jsonl"
    full = commands(*arguments, "-o", out, code=2, largest=6_000)  # bytes that the disk has
    assert full.err.count("\n") == 1
    assert "Traceback" not in full.err
    assert "the disk is full" in full.err or "File too large" in full.err
    assert not out.exists() or "--unordered" in options
    commands(*arguments, "-o", out)
    assert sorted(out.read_text().splitlines()) == wanted


def test_a_disk_with_no_room_for_the_output_alone(commands: Any, case: Make) -> None:
    """Decisions of 60 requests that are explained are more than all that was said."""
    made = case({name: echo() for name in "abcdefgh"}, plain(60))
    arguments = ["batch", made.mixture, "-i", made.requests, "--explain"]
    commands(*arguments, "-o", made.folder / "whole.jsonl")
    size = (made.folder / "whole.jsonl").stat().st_size
    out = made.folder / "out.jsonl"
    full = commands(*arguments, "-o", out, code=2, largest=size - 1)
    assert f"{out}: cannot be written: File too large" in full.err
    assert {path.name for path in made.folder.iterdir() if "out.jsonl" in path.name} == {".out.jsonl.job"}
    planned = json.loads(
        run("batch", made.mixture, "-i", made.requests, "-o", out, "--plan", "--json").stdout
    )
    assert (planned["calls"], planned["answered"]) == (60, 60)
    commands(*arguments, "-o", out)
    assert out.read_bytes() == (made.folder / "whole.jsonl").read_bytes()


def test_places_that_cannot_be_written(case: Make, tmp_path: Path) -> None:
    made = case({"a": echo()}, plain(3))
    (tmp_path / "file").write_text("")
    error = batch(made, out=str(tmp_path / "file" / "out.jsonl"), code=2).stderr
    assert "cannot be written" in error
    (made.folder / "out.jsonl").write_text("mine")
    assert "exists already" in batch(made, code=2).stderr
    assert "exists already" in batch(made, "--unordered", code=2).stderr
    assert (made.folder / "out.jsonl").read_text() == "mine"
    assert not (made.folder / ".out.jsonl.job").exists()
    batch(made, "--overwrite")
    assert len(records(made.folder / "out.jsonl")) == 3


# --- lines


def test_lines_that_are_no_requests(case: Make) -> None:
    """Each has a record with its line and what is wrong; the others are answered."""
    asked: list[Any] = [
        openai("good", "hello"),
        "{ no JSON",
        "",
        openai("strange", "hello", tools=[{"type": "function"}]),
        openai("nobody", "hello", model="gpt-9"),
        openai("named", "hello", model="b"),
        openai("good", "again"),
        "\udcff\udcfe",
        openai("warm", "hello", temperature=-1),
    ]
    made = case({"a": echo(), "b": echo()}, asked)
    result = batch(made)
    assert "6 requests have an error record" in result.stderr
    found = [json.loads(line) for line in (made.folder / "out.jsonl").read_text().splitlines()]
    assert [one["custom_id"] for one in found] == [
        *("good", "line-2", "strange", "nobody", "named", "good", "line-8", "warm")
    ]
    wrong = {1: "line 2", 2: "line 4: body.tools", 3: "line 5: body.model", 5: "line 7: custom_id"}
    wrong |= {6: "line 8", 7: "line 9: body.temperature"}
    for at, one in enumerate(found):
        if at not in wrong:
            assert one["error"] is None
            assert one["response"]["body"]["choices"][0]["message"]["content"] == "hello"
            continue
        assert one["error"]["message"].startswith(wrong[at])
        assert one["response"]["status_code"] == 400
        assert one["response"]["body"]["error"]["type"] == "invalid_request_error"
    assert "Known: a, b" in found[3]["error"]["message"] or "mixmerge" in found[3]["error"]["message"]
    assert [found[at]["response"]["body"]["model"] for at in (0, 4)] == ["a", "b"]


def test_what_a_mixture_lacks_is_told_at_once(case: Make) -> None:
    """Outcomes, two experts' folders, requests and a free place for the answers: none of it is there."""
    experts = {"a": {"model": "./gone"}, "b": {"adapter": "./lost", "base": "./gone"}, "e": echo()}
    made = case(experts, plain(2))
    taken = made.folder / "out.jsonl"
    taken.write_text("mine")
    outcomes = made.folder / "outcomes.jsonl"
    kept = outcomes.read_bytes()
    outcomes.unlink()
    made.requests.unlink()

    def said(*command: object) -> list[str]:
        result = run(*command, code=2)
        assert "Traceback" not in result.stderr
        return [line.removeprefix("error: ") for line in result.stderr.splitlines()]

    folders = ["expert a: ./gone: no such", "expert b: ./gone: no such", "expert b: ./lost: no such"]
    asked = ("batch", made.mixture, "-i", made.requests, "-o", taken)
    wanted = [f"{outcomes}: ", *folders, f"{made.requests}: ", f"{taken}: exists already"]
    for found, start in zip(said(*asked), wanted, strict=True):
        assert found.startswith(start), found
    assert len(said(*asked[:4], "--plan")) == len(wanted) - 1  # no answers are written
    assert len(said(*asked, "--device", "tpu")) == len(wanted) + 1
    assert len(said("ask", made.mixture, "hello")) == len(wanted) - 2
    outcomes.write_bytes(kept)
    for found, start in zip(said(*asked), wanted[1:], strict=True):
        assert found.startswith(start), found
    assert taken.read_text() == "mine"
    assert not list(made.folder.glob(".*.job"))
    # Who only routes needs no expert's folder.
    loaded = Mixture.load(made.mixture)
    assert loaded.route(["hello"])[0].primary == "a"
    with pytest.raises(MixmergeError) as caught:
        loaded.batch(made.requests, made.folder / "other.jsonl")
    assert len(caught.value.faults) == 3  # of each expert the first folder, and the requests


def test_an_input_that_changes_between_runs(case: Make) -> None:
    made = case({"a": echo(delay=0.02)}, plain(20))
    batch(made, "--deadline", 1e-6, code=3)
    before = made.requests.read_text()
    made.requests.write_text(before + json.dumps({"id": "more", "text": "more"}) + "\n")
    error = batch(made, code=2).stderr
    assert "belongs to a job with another input" in error
    assert "Give back what has changed" in error
    assert "--overwrite" in error
    made.requests.write_text(before)
    batch(made)
    assert len(records(made.folder / "out.jsonl")) == 20


# --- servers


class Unreliable(BaseHTTPRequestHandler):
    """Does what the prompt says, the first time or always; else it answers."""

    protocol_version = "HTTP/1.1"
    seen: dict[str, int]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = asked["messages"][-1]["content"]
        count = self.seen[text] = self.seen.get(text, 0) + 1
        what, _, when = text.partition(" ")
        if when == "always" or (when == "once" and count == 1):
            getattr(self, f"do_{what}")()
            return
        message = {"role": "assistant", "content": f"said {text}"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 2, "completion_tokens": 3}})

    def reply(self, status: int, payload: Any, *, more: int = 0) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) + more))
        self.end_headers()
        self.wfile.write(content)

    def do_silent(self) -> None:
        time.sleep(1.0)
        self.close_connection = True

    def do_busy(self) -> None:
        self.reply(429, {"error": {"message": "slow down"}})

    def do_broken(self) -> None:
        self.reply(500, {"error": {"message": "oops"}})

    def do_garbled(self) -> None:
        self.reply(200, b'{"choices": [{"message')

    def do_dropped(self) -> None:
        self.reply(200, b'{"choices": [', more=100)
        self.close_connection = True


@pytest.fixture
def endpoint() -> Iterator[str]:
    handler = type("Handler", (Unreliable,), {"seen": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


TROUBLES = ("silent", "busy", "broken", "garbled", "dropped")


def test_an_endpoint_that_cannot_be_relied_on(case: Make, endpoint: str) -> None:
    """What passes is tried again; what does not costs its request alone."""
    asked = [openai(f"{what} {when}", f"{what} {when}") for what in TROUBLES for when in ("once", "always")]
    asked += [openai(f"fine {i}", f"fine {i}") for i in range(10)]
    asked += [openai("local", "fine here", model="b")]
    options = {"retries": 1, "timeout": 0.5, "max_wait": 0.05}
    made = case({"a": {"endpoint": endpoint, "model": "far", "options": options}, "b": echo()}, asked)
    result = batch(made)
    assert "5 requests have an error record" in result.stderr
    found = records(made.folder / "out.jsonl")
    assert len(found) == len(asked)
    said = {
        "silent": "sent nothing within the timeout",
        "busy": "429: slow down",
        "broken": "500: oops",
        "garbled": "",
        "dropped": "broke in the middle of its answer",
    }
    for name, one in found.items():
        if not name.endswith("always"):
            text = one["response"]["body"]["choices"][0]["message"]["content"]
            assert text == ("fine here" if name == "local" else f"said {name}")
            continue
        assert one["response"]["status_code"] == 500
        assert one["error"]["code"] == "server_error"
        assert "no answer in 2 attempts" in one["error"]["message"]
        assert said[name.split()[0]] in one["error"]["message"]


@pytest.mark.parametrize("options", [[], ["--unordered"]])
def test_what_failed_is_tried_again_by_a_run_that_goes_on(
    case: Make, endpoint: str, options: list[str]
) -> None:
    """The server answers the second time; the first run has no time left for the local expert."""
    asked = [openai(f"r{i}", "hello " * 20, model="b") for i in range(20)]
    asked.insert(3, openai("far", "broken once"))
    far = {"endpoint": endpoint, "model": "far", "options": {"retries": 0}}
    made = case({"a": far, "b": echo(delay=0.1)}, asked)
    command = [*options, "--batch-tokens", 300]
    batch(made, *command, "--deadline", 0.5, code=3)
    if options:
        assert "far" not in records(made.folder / "out.jsonl")
    result = batch(made, *command)
    assert result.stderr == ""
    found = records(made.folder / "out.jsonl")
    assert len(found) == 21
    assert found["far"]["response"]["body"]["choices"][0]["message"]["content"] == "said broken once"


def test_a_key_that_is_not_there_stops_the_job(
    case: Make, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would meet every request: nothing is written, and with the key the same command goes on."""
    monkeypatch.delenv("SOME_KEY", raising=False)
    expert = {"endpoint": endpoint, "model": "far", "api_key_env": "SOME_KEY"}
    made = case({"a": expert}, plain(3))
    assert "SOME_KEY is not set" in batch(made, code=2).stderr
    assert not (made.folder / "out.jsonl").exists()
    monkeypatch.setenv("SOME_KEY", "sk-1234567890")
    batch(made)
    assert [one["error"] for one in records(made.folder / "out.jsonl").values()] == [None] * 3


# --- folders


def test_an_expert_that_disappears_after_it_was_planned(case: Make, family: Any, clone: Any) -> None:
    folder = clone(family("llama", dtype="float32").experts[0])
    made = case(
        {"a": {"model": str(folder)}, "b": echo()}, [openai("x", "hello"), openai("y", "hi", model="b")]
    )
    with job_of(made, made.folder / "work", Conditions()) as job:
        job.decide()
        stage = job.next_stage()
        assert stage is not None
        assert {one.unit for place in job.placements(stage) for one in place.groups} >= {
            f"transformers {folder}"
        }
        job.stages.clear()
        shutil.rmtree(folder)
        job.run()
        gone, there = job.answers()
    assert str(folder) in str(gone.fault)
    assert (there.text, there.fault) == ("hi", None)
    assert f"{folder}: no such folder" in batch(made, code=2).stderr


# --- journals


@pytest.fixture
def kept(case: Make, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A job whose journal is whole, and whose output is not written."""
    made = case(
        {name: echo(name=name) for name in "abc"},
        plain(40),
        policy={"kind": "top_k", "k": 2},
        compose={"kind": "aggregate", "aggregator": "c"},
    )
    batch(made, "--batch-tokens", 2000, out="whole.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Job, "remove", Job.close)
        batch(made, "--batch-tokens", 2000)
    (made.folder / "out.jsonl").unlink()
    return made


def again(made: Any, code: int = 0) -> Any:
    result = batch(made, "--batch-tokens", 2000, code=code)
    if not code:
        assert (made.folder / "out.jsonl").read_bytes() == (made.folder / "whole.jsonl").read_bytes()
    return result


def test_a_journal_that_is_damaged_or_cut_anywhere(kept: Any) -> None:
    """It is refused, or the output is as it would have been."""
    work, rng, codes = kept.folder / ".out.jsonl.job", random.Random(5), list[int]()
    files = {path.name: path.read_bytes() for path in work.iterdir()}
    assert files.keys() == {"journal.jsonl", "decisions.jsonl"}
    for at in range(24):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name, content in files.items():
            (work / name).write_bytes(content)
        path = work / ("journal.jsonl" if at % 3 else "decisions.jsonl")
        damaged = bytearray(files[path.name])
        place = rng.randrange(len(damaged))
        if at % 2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        (kept.folder / "out.jsonl").unlink(missing_ok=True)
        codes.append(CliRunner().invoke(app, [
            *("batch", str(kept.mixture), "-i", str(kept.requests)),
            *("-o", str(kept.folder / "out.jsonl"), "--batch-tokens", "2000"),
        ]).exit_code)  # fmt: skip
        if not codes[-1]:
            again_is = (kept.folder / "out.jsonl").read_bytes()
            assert again_is == (kept.folder / "whole.jsonl").read_bytes(), (at, place)
            assert not work.exists()
    assert set(codes) <= {0, 2}
    assert codes.count(0) > 16


def test_a_journal_whose_first_line_is_damaged(kept: Any) -> None:
    path = kept.folder / ".out.jsonl.job" / "journal.jsonl"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert "its first line is damaged" in again(kept, code=2).stderr
    batch(kept, "--overwrite", "--batch-tokens", 2000)
    assert (kept.folder / "out.jsonl").read_bytes() == (kept.folder / "whole.jsonl").read_bytes()


def test_the_journal_of_another_mixture(kept: Any) -> None:
    before = kept.mixture.read_text()
    kept.mixture.write_text(before + "generate: {max_new_tokens: 3}\n")
    assert "belongs to a job with another mixture" in again(kept, code=2).stderr
    assert "another batch_tokens" in batch(kept, "--batch-tokens", 1, code=2).stderr
    kept.mixture.write_text(before)
    again(kept)


# --- people


def test_two_runs_of_one_job(commands: Any, case: Make) -> None:
    made = case({"a": echo(delay=0.1)}, plain(30))
    arguments = [
        "batch",
        made.mixture,
        "-i",
        made.requests,
        "-o",
        made.folder / "out.jsonl",
        "--batch-tokens",
        1,
    ]
    commands.begin(*arguments)
    journal = made.folder / ".out.jsonl.job" / "journal.jsonl"
    while not journal.exists() or not journal.stat().st_size:
        time.sleep(0.01)
    for more in ([], ["--overwrite"], ["--unordered"]):
        assert "another process is at work on this job" in run(*arguments, *more, code=2).stderr
    ended = commands.end()
    assert ended.code == 0, ended
    assert len(records(made.folder / "out.jsonl")) == 30


@pytest.mark.parametrize("options", [[], ["--unordered"]])
def test_interrupted_and_out_of_time(commands: Any, case: Make, options: list[str]) -> None:
    """What was answered is kept: Ctrl-C exits with 130, a deadline with 3, and the same command goes on."""
    made = case({"a": echo(delay=0.1)}, plain(24))
    arguments = ["batch", made.mixture, "-i", made.requests, "--batch-tokens", 600, *options]
    commands(*arguments, "-o", made.folder / "whole.jsonl")
    out, work = made.folder / "out.jsonl", made.folder / ".out.jsonl.job"
    pid = commands.begin(*arguments, "-o", out)
    journal = work / "journal.jsonl"
    while not journal.exists() or b'"end"' not in journal.read_bytes():
        time.sleep(0.01)
    over = journal.read_bytes().count(b'"end"')
    os.kill(pid, signal.SIGINT)
    ended = commands.end()
    assert ended.code == 130, ended
    assert journal.read_bytes().count(b'"end"') <= over + 2, "it waits for the batch at work alone"
    assert "Traceback" not in ended.err
    answered = journal.read_bytes().count(b'"key"')
    assert 0 < answered < 24
    late = commands(*arguments, "-o", out, "--deadline", 0.15, code=3)
    assert "Run the same command: it goes on" in late.err
    assert journal.read_bytes().count(b'"key"') >= answered
    commands(*arguments, "-o", out)
    assert sorted(out.read_bytes().splitlines()) == sorted(
        (made.folder / "whole.jsonl").read_bytes().splitlines()
    )
