"""``mixmerge batch``, ``ask`` and ``profile`` by what they print and write, over small real experts."""

from __future__ import annotations

import json
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mixmerge.cli import app
from mixmerge.mixture import Mixture
from mixmerge.outcomes.table import OutcomeTable

Make = Callable[..., Any]
SECRET = "zebra-of-the-patient"


@pytest.fixture(scope="module")
def experts(built: Any) -> Any:
    """A zoo of two experts that have learned next to nothing."""
    from mixmerge.zoo import Spec

    return built(Spec(tasks=("reverse", "sort"), effort=0.01))


@pytest.fixture
def made(case: Make, experts: Any) -> Any:
    """Ten questions of the zoo, asked of its experts, one of them by name."""
    texts = [one.prompt for one in experts.questions("sort")[:9]]
    asked = [openai(f"q{i}", text, "mixmerge") for i, text in enumerate(texts)]
    return case(
        {
            "sort": {"model": str(experts.expert("sort"))},
            "reverse": {"model": str(experts.expert("reverse"))},
        },
        [*asked, openai("named", texts[0], "reverse")],
        policy={"kind": "top_k", "k": 2},
        generate={"max_new_tokens": 6},
    )


def openai(name: str, text: str, model: str) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": text}]}
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}


def run(*arguments: object, code: int = 0, stdin: str | None = None) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
    return result


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(made: Any) -> list[str]:
    return [one["body"]["messages"][0]["content"] for one in records(made.requests)]


# --- batch


def test_a_plan_writes_nothing(made: Any) -> None:
    before = listing(made.folder)
    arguments = ["batch", made.mixture, "-i", made.requests, "--plan"]
    shown = run(*arguments).stdout
    assert "10 requests, 10 answers to make" in shown
    assert "2 loads; answering one request after the other: 2 loads" in shown
    assert "sort" in shown
    assert "reverse" in shown
    planned = json.loads(run(*arguments, "-o", made.folder / "out.jsonl", "--json").stdout)
    assert (planned["requests"], planned["bad"], planned["calls"], planned["answered"]) == (10, 0, 10, 0)
    assert (planned["loads"], planned["naive_loads"]) == (2, 2)
    assert {one["experts"][0]: one["calls"] for one in planned["groups"]} == {"sort": 9, "reverse": 1}
    assert all(one["bytes"] > 1000 and one["new_tokens"] == 6 * one["calls"] for one in planned["groups"])
    run(*arguments, "-o", made.folder / "out.jsonl", "-i", "-", stdin=made.requests.read_text())
    assert listing(made.folder) == before


def test_a_file_is_answered(made: Any) -> None:
    out = made.folder / "out.jsonl"
    result = run("batch", made.mixture, "-i", made.requests, "-o", out)
    assert result.stdout.splitlines()[0] == str(out)
    assert "10 of 10 requests answered" in result.stdout
    assert "2 loads in " in result.stdout
    assert result.stderr == ""
    found = records(out)
    assert [one["custom_id"] for one in found] == [*(f"q{i}" for i in range(9)), "named"]
    bodies = [one["response"]["body"] for one in found]
    assert [one["model"] for one in bodies] == [*["sort"] * 9, "reverse"]
    answers = Mixture.load(made.mixture).answer(prompts(made)[:9])
    assert [one["choices"][0]["message"]["content"] for one in bodies[:9]] == [one.text for one in answers]
    assert [one["usage"]["completion_tokens"] for one in bodies[:9]] == [one.tokens_out for one in answers]
    report = json.loads(
        run("batch", made.mixture, "-i", made.requests, "-o", made.folder / "b.jsonl", "--json").stdout
    )
    assert report["output"] == str(made.folder / "b.jsonl")
    assert (report["requests"], report["answered"], report["failed"], report["splits"]) == (10, 10, 0, 0)
    assert [(one["expert"], one["answers"]) for one in report["experts"]] == [("sort", 9), ("reverse", 1)]
    assert [one["times"] for one in report["loads"]] == [1, 1]
    again = records(made.folder / "b.jsonl")
    for one in (*found, *again):
        assert abs(one["response"]["body"].pop("created") - time.time()) < 600
    assert again == found


def test_adapters_of_one_base_are_one_load(case: Make, experts: Any) -> None:
    names = ("reverse", "sort")
    asked = [
        openai(f"{name}{i}", one.prompt, name)
        for i, one in enumerate(experts.questions("sort")[:6])
        for name in (*names, "base")
    ]
    adapters = {name: {"adapter": str(experts.adapter(name)), "base": str(experts.base)} for name in names}
    made = case({**adapters, "base": {"model": str(experts.base)}}, asked, generate={"max_new_tokens": 4})
    result = run("batch", made.mixture, "-i", made.requests, "-o", made.folder / "out.jsonl", "--json")
    report = json.loads(result.stdout)
    assert [one["times"] for one in report["loads"]] == [1]
    assert report["naive_loads"] == 1
    assert {one["expert"]: one["answers"] for one in report["experts"]} == {
        "reverse": 6,
        "sort": 6,
        "base": 6,
    }
    found = records(made.folder / "out.jsonl")
    assert [one["error"] for one in found] == [None] * 18


def test_a_prompt_that_is_too_long(made: Any) -> None:
    with made.requests.open("a") as file:
        file.write(json.dumps(openai("long", "3 " * 5000, "mixmerge")) + "\n")
    out = made.folder / "out.jsonl"
    result = run("batch", made.mixture, "-i", made.requests, "-o", out)
    assert "1 requests have an error record" in result.stderr
    *others, long = records(out)
    assert [one["error"] for one in others] == [None] * 10
    assert "tokens" in long["error"]["message"]
    assert "reads less than" in long["error"]["message"]


def test_requests_on_stdin(commands: Any, case: Make) -> None:
    """A killed run goes on with the same requests, and no others; nothing but the answers is left."""
    expert = {"model": "m", "engine": "echo", "options": {"delay": 0.05}}
    made = case({"a": expert}, [{"id": f"r{i}", "text": f"say {i}"} for i in range(30)])
    content, out = made.requests.read_bytes(), made.folder / "out.jsonl"
    arguments = ["batch", made.mixture, "-i", "-", "-o", out, "--batch-tokens", 300]
    journal = made.folder / ".out.jsonl.job" / "journal.jsonl"
    run("batch", made.mixture, "-i", made.requests, "-o", made.folder / "whole.jsonl", "--batch-tokens", 300)
    pid = commands.begin(*arguments, stdin=content)
    while not journal.exists() or b'"end"' not in journal.read_bytes():
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert commands.end().code == -signal.SIGKILL
    copies = listing(made.folder)
    other = commands(*arguments, stdin=content + b'{"text": "more"}\n', code=2)
    assert "belongs to a job with another input" in other.err
    assert listing(made.folder) == copies, "the requests of the job are not touched"
    before = journal.read_bytes().count(b'"key"')
    assert 0 < before < 30
    report = json.loads(commands(*arguments, "--json", stdin=content).out)
    assert sum(one["answers"] for one in report["experts"]) == 30, "none was asked again"
    assert out.read_bytes() == (made.folder / "whole.jsonl").read_bytes()
    assert {path.name for path in made.folder.iterdir() if path.name.startswith(".")} == set()


# --- ask


def test_ask(made: Any) -> None:
    prompt = prompts(made)[0]
    (answer,) = Mixture.load(made.mixture).answer([prompt])
    plain = run("ask", made.mixture, prompt)
    assert (plain.stdout.rstrip("\n"), plain.stderr) == (answer.text.rstrip("\n"), "")
    assert run("ask", made.mixture, "-", stdin=prompt).stdout == plain.stdout
    explained = run("ask", made.mixture, prompt, "--explain")
    assert explained.stdout == plain.stdout
    first, *rest = explained.stderr.splitlines()
    assert first == f"answered by sort, 1 generations, {answer.tokens_out} tokens"
    assert any("policy top_k" in line for line in rest)
    assert any("sort 0.9, reverse 0.1" in line for line in rest)
    whole = json.loads(run("ask", made.mixture, prompt, "--json", "--max-new-tokens", 3).stdout)
    assert (whole["expert"], whole["calls"], whole["finish"]) == ("sort", 1, "length")
    assert whole["tokens_out"] == 3
    assert whole["decision"]["picks"][0]["expert"] == "sort"
    named = json.loads(run("ask", made.mixture, prompt, "--json", "--expert", "reverse").stdout)
    assert (named["expert"], named["decision"]) == ("reverse", {})
    unknown = run("ask", made.mixture, prompt, "--expert", "nobody", code=2)
    assert "nobody" in unknown.stderr
    assert "sort" in unknown.stderr


# --- profile


def tasks_of(experts: Any, folder: Path, count: int) -> Path:
    path = folder / "tasks.jsonl"
    lines = [{"text": one.prompt, "answer": one.answer} for one in experts.questions("sort")[:count]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_profile(made: Any, experts: Any) -> None:
    tasks, out = tasks_of(experts, made.folder, 8), made.folder / "profiled.jsonl"
    arguments = ["profile", made.mixture, "--tasks", tasks, "-o", out]
    late = run(*arguments, "--deadline", 1e-6, code=3)
    assert "Run the same command: it goes on" in late.stderr
    report = json.loads(run(*arguments, "--json").stdout)
    table = OutcomeTable.read(out)
    assert (table.experts, len(table)) == (("sort", "reverse"), 8)
    assert np.isin(table.score, (0, 1)).all()
    assert report["score"] == {name: float(table.score[:, e].mean()) for e, name in enumerate(table.experts)}
    assert [one["times"] for one in report["loads"]] == [1, 1]
    assert not (made.folder / ".profiled.jsonl.job").exists()
    assert "exists already" in run(*arguments, code=2).stderr
    shown = run(*arguments, "--overwrite").stdout
    assert shown.splitlines()[0] == str(out)
    assert "mean score" in shown
    assert OutcomeTable.read(out).score.tolist() == table.score.tolist()


def test_profile_without_a_trial_for_aggregators(made: Any, experts: Any) -> None:
    """Two experts cannot be wrong twice beside one that is right; the answers are kept for another call."""
    tasks, out = tasks_of(experts, made.folder, 4), made.folder / "profiled.jsonl"
    arguments = ["profile", made.mixture, "--tasks", tasks, "-o", out]
    assert (
        "of 4 questions none has 1 right answer and 2 wrong ones"
        in run(*arguments, "--aggregators", code=2).stderr
    )
    assert not out.exists()
    report = json.loads(run(*arguments, "--json").stdout)
    assert [one["times"] for one in report["loads"]] == [1, 1], "those of the first call"


def test_profile_refuses_before_there_is_a_job(made: Any, experts: Any) -> None:
    tasks = tasks_of(experts, made.folder, 3)
    right = tasks.read_text()
    tasks.write_text(right + '{"text": "and this one?"}\n[]\n')
    arguments = ["profile", made.mixture, "--tasks", tasks, "-o", made.folder / "p.jsonl"]
    wrong = run(*arguments, code=2).stderr
    assert "line 4: answer: is missing" in wrong
    assert "line 5" in wrong
    assert not (made.folder / ".p.jsonl.job").exists()
    tasks.write_text(right)
    ending = run(*arguments[:-1], made.folder / "p.xls", code=2).stderr
    assert "has the ending '.xls'" in ending
    assert not (made.folder / ".p.xls.job").exists()
    run(*arguments)


def test_a_killed_profile_goes_on(commands: Any, case: Make) -> None:
    expert = {"model": "m", "engine": "echo", "options": {"delay": 0.05}}
    made = case({"a": expert, "b": expert}, [{"text": f"{i} " * 30, "answer": str(i)} for i in range(20)])
    arguments = [
        "profile",
        made.mixture,
        "--tasks",
        made.requests,
        "--check",
        "number",
        "--batch-tokens",
        300,
    ]
    commands(*arguments, "-o", made.folder / "whole.jsonl")
    journal = made.folder / ".out.jsonl.job" / "journal.jsonl"
    pid = commands.begin(*arguments, "-o", made.folder / "out.jsonl")
    while not journal.exists() or b'"end"' not in journal.read_bytes():
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    assert commands.end().code == -signal.SIGKILL
    commands(*arguments, "-o", made.folder / "out.jsonl")
    assert (made.folder / "out.jsonl").read_bytes() == (made.folder / "whole.jsonl").read_bytes()


# --- what is said of prompts


def test_prompts_are_in_no_log_and_no_message(
    made: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """All loggers at DEBUG, warnings shown, bad lines, too long prompts and a server that is not there."""
    text = made.mixture.read_text()
    far = "  far: {endpoint: 'http://127.0.0.1:9/v1', model: far, options: {retries: 0, timeout: 1}}\n"
    made.mixture.write_text(text.replace("experts:\n", "experts:\n" + far, 1))
    table = OutcomeTable.read(made.folder / "outcomes.jsonl")
    OutcomeTable(
        ids=table.ids, queries=table.queries, experts=("far", *table.experts),
        score=np.column_stack([np.zeros(4), table.score]),
    ).write(made.folder / "more.jsonl")  # fmt: skip
    made.mixture.write_text(made.mixture.read_text().replace("outcomes.jsonl", "more.jsonl"))

    def asked(name: str, prompt: Any, **body: Any) -> str:
        messages = [{"role": "user", "content": prompt}]
        body = {"model": "mixmerge", "messages": messages, **body}
        return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body})

    lines = [
        asked("fine", SECRET),
        asked("long", f"{SECRET} " * 3000),
        asked("far", SECRET, model="far"),
        asked("nobody", SECRET, model="nobody"),
        asked("tools", SECRET, tools=[{"type": "function"}]),
        asked("parts", [{"type": "image_url", "image_url": SECRET}]),
        asked("role", SECRET).replace('"user"', '"stranger"'),
        asked("broken", SECRET)[:-3],
        asked("fine", SECRET),
    ]
    made.requests.write_text("\n".join(lines) + "\n")
    out = made.folder / "out.jsonl"
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = run("batch", made.mixture, "-i", made.requests, "-o", out)
        asked_once = run("ask", made.mixture, f"{SECRET} " * 3000, code=2)
    assert "8 requests have an error record" in result.stderr
    said = [json.dumps([one["error"], one["response"]["body"].get("error")]) for one in records(out)]
    assert sum("null, null" not in one for one in said) == 8
    told = capfd.readouterr()
    for where in (
        caplog.text, result.output, asked_once.output, told.out, told.err, *said, *(str(one) for one in warned)
    ):  # fmt: skip
        assert SECRET not in where
        assert "zebra" not in where
    assert caplog.records, "something is logged at this level"


def test_what_is_streamed_is_generated_once(case: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmerge.engines.echo import EchoEngine

    asked: list[int] = []
    generate = EchoEngine.generate

    def counted(self: EchoEngine, requests: Any) -> Any:
        asked.append(len(requests))
        return generate(self, requests)

    monkeypatch.setattr(EchoEngine, "generate", counted)
    made = case({"one": {"model": "one", "engine": "echo"}}, ["nothing"], name="once")
    assert run("ask", made.mixture, "say it once").stdout == "say it once\n"
    assert asked == [1]
