"""``mixmerge route ask``: decisions, policies, files of queries and mixtures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge import Policy, Query, Router

Run, Fault = Callable[..., Any], Callable[..., str]
CODE, VERSE = "python function loop class return", "rhyme moon river song sorrow"


# --- ask


def test_a_decision_to_read(route: Run, fitted: Path) -> None:
    lines = route("ask", fitted / "router", CODE).stdout.splitlines()
    assert lines[0] == "code"
    router = Router.load(fitted / "router")
    scores = router.score([CODE])
    at = router.experts.index("code")
    assert scores.cost is not None
    facts = dict(re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines[1:7] if line)
    assert facts == {
        "expected score": f"{scores.mean[0, at]:.4g} ± {scores.std[0, at]:.2g}",
        "cost": f"${scores.cost[0, at]:.4g}",
        "margin": f"{scores.mean[0, at] - np.sort(scores.mean[0])[-2]:.4g}",
        "rule": "highest expected score",
        "policy": "argmax",
        "router": router.version,
    }
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == [router.experts[e] for e in np.argsort(-scores.mean[0], kind="stable")]
    assert rows[0] == ["code", f"{scores.mean[0, at]:.4g}", "yes"]
    assert "neighbours" not in "\n".join(lines)


def test_explain(route: Run, fitted: Path) -> None:
    shown = route("ask", fitted / "router", CODE, "--explain", "--top", 3).stdout
    assert "neighbours" in shown
    record = json.loads(route("ask", fitted / "router", CODE, "--explain", "--top", 3, "--json").stdout)
    assert len(record["reason"]["neighbours"]) == 3
    for neighbour in record["reason"]["neighbours"]:
        assert neighbour["query"][:30] in shown


def test_the_record_is_that_of_the_library(route: Run, fitted: Path) -> None:
    router = Router.load(fitted / "router")
    query = Query(VERSE)
    (wanted,) = Policy(kind="top_k", k=2).decide(router.score([query]), [query], version=router.version)
    given = json.loads(route("ask", fitted / "router", VERSE, "--top-k", 2, "--json").stdout)
    assert given == json.loads(json.dumps(wanted.as_dict()))
    assert given["picks"][0]["expert"] == given["primary"] == "verse"
    assert given["query_id"] == query.id


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        (["--policy", "lower_bound"], "lower_bound(z=1.0)"),
        (["--policy", "lower_bound(z=2)"], "lower_bound(z=2.0)"),
        (["--policy", "threshold(threshold=0.1, strong=verse, weak=sums)"], None),
        (["--policy", "sample", "--fallback", "plain"], "sample(draws=3, temperature=0.5, fallback=plain)"),
        (["--top-k", "3"], "top_k(k=3)"),
        (["--policy", "top_k", "--top-k", "3"], "top_k(k=3)"),
        (["--willingness-to-pay", "0.01"], "willingness_to_pay(willingness_to_pay=0.01)"),
        (["--abstain-below", "0.2"], "argmax(abstain_below=0.2)"),
    ],
)
def test_policies(route: Run, fitted: Path, options: list[str], policy: str | None) -> None:
    record = json.loads(route("ask", fitted / "router", CODE, *options, "--json").stdout)
    assert record["policy"] == (policy or "threshold(threshold=0.1, strong=verse, weak=sums)")
    assert (
        json.loads(route("ask", fitted / "router", CODE, "--json", "--policy", record["policy"]).stdout)
        == record
    )


def test_nobody_and_the_fallback(route: Run, fitted: Path) -> None:
    lines = route("ask", fitted / "router", CODE, "--abstain-below", 2).stdout.splitlines()
    assert lines[0] == "nobody"
    assert "nobody answers" in lines[4]
    instead = route("ask", fitted / "router", CODE, "--abstain-below", 2, "--fallback", "plain")
    assert instead.stdout.splitlines()[0] == "plain"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--policy", "argmex"], "policy.kind: no policy is called 'argmex'. Did you mean 'argmax'? Known: "),
        (
            ["--policy", "argmax", "--top-k", "2"],
            "--top-k and --policy argmax: are two policies. One of them.",
        ),
        (["--policy", "top k"], "--policy: 'top k' is no policy. KIND or KIND(NAME=VALUE, ...)."),
        (["--policy", "top_k"], "policy.k: top_k needs it."),
        (["--policy", "argmax(k=2)"], "policy.k: argmax does not use it."),
        (["--top-k", "9"], "policy.k: there are only 4 experts. At most 4."),
        (["--fallback", "plane"], "policy.fallback: no expert is called 'plane'. Did you mean 'plain'?"),
        (
            ["--budget", "0.001"],
            "policy.trade: a budget needs the trade that keeps it. Find it on outcomes of ",
        ),
        (["--budget", "-1"], "policy.budget: "),
    ],
)
def test_faults_of_policies(fault: Fault, fitted: Path, options: list[str], message: str) -> None:
    assert message in fault("ask", fitted / "router", CODE, *options)


def test_a_price_is_needed_to_weigh_costs(route: Run, fault: Fault, tmp_path: Path) -> None:
    (tmp_path / "free.csv").write_text("query,expert,score\nadd one,a,1\nadd one,b,0\n")
    route("fit", "free.csv", "--out", "r")
    message = fault("ask", "r", "add", "--willingness-to-pay", 1)
    assert "needs costs, and the router knows none" in message
    assert "--prices" in message
    assert "cost            not known" in route("ask", "r", "add").stdout


def test_files_of_queries(route: Run, fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(f"{CODE}\n{VERSE}\n\n\n", encoding="utf-8-sig")
    lines = [
        json.dumps({"custom_id": "one", "prompt": CODE, "task": "code", "choices": ["a", "b"]}),
        json.dumps(VERSE),
    ]
    (tmp_path / "q.jsonl").write_text("\r\n".join(lines))
    text = route("ask", fitted / "router", "-i", "q.txt").stdout
    records = [json.loads(line) for line in text.splitlines()]
    assert [record["primary"] for record in records] == ["code", "verse"]
    assert [record["query_id"] for record in records] == [Query(CODE).id, Query(VERSE).id]
    named = [
        json.loads(line) for line in route("ask", fitted / "router", "-i", "q.jsonl").stdout.splitlines()
    ]
    assert [record["query_id"] for record in named] == ["one", Query(VERSE).id]
    assert [record["scores"] for record in named] == [record["scores"] for record in records]
    assert route("ask", fitted / "router", "-i", "-", stdin=f"{CODE}\n{VERSE}\n").stdout == text
    field = json.dumps({"body": CODE, "text": VERSE})
    other = route("ask", fitted / "router", "-i", "-", "--field", "body", stdin=field)
    assert json.loads(other.stdout)["primary"] == "code"


def test_decisions_are_written_whole(route: Run, fault: Fault, fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(f"{CODE}\n{VERSE}\n{VERSE} night\n")
    printed = route("ask", fitted / "router", "-i", "q.txt").stdout
    result = route("ask", fitted / "router", "-i", "q.txt", "-o", "d.jsonl")
    assert (tmp_path / "d.jsonl").read_text(encoding="utf-8") == printed
    assert result.stdout.splitlines()[0] == "d.jsonl"
    assert re.search(r"│ verse\s+│\s+2 │ 66.7% │", result.stdout)
    message = fault("ask", fitted / "router", "-i", "q.txt", "-o", "d.jsonl")
    assert message == "d.jsonl: exists already. Choose another name, or pass --overwrite."
    again = route("ask", fitted / "router", CODE, "-o", "d.jsonl", "--overwrite", "--json")
    assert json.loads(again.stdout) == {"path": "d.jsonl", "decisions": 1, "primary": {"code": 1}}
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 1
    assert "no expert is called 'nobody'" in fault(
        "ask", fitted / "router", CODE, "-o", "e.jsonl", "--fallback", "nobody"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.jsonl", "q.txt"]


def test_trimming_counts_all_queries(route: Run, fitted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixmerge.cli.route.ask.BLOCK", 2)
    text = "\n".join(f"{CODE} {n}" for n in range(9))
    options = ("-i", "-", "--policy", "sample(trim=0.2)")
    result = route("ask", fitted / "router", *options, stdin=text)
    assert "counts the draws of all queries, so all 9 are held in memory" in result.stderr
    blocks = result.stdout
    monkeypatch.undo()
    again = route("ask", fitted / "router", *options, stdin=text)
    assert (again.stdout, again.stderr) == (blocks, "")
    assert len(blocks.splitlines()) == 9


@pytest.mark.parametrize(
    ("name", "content", "messages"),
    [
        ("q.txt", b"", ["q.txt: holds no query. Lines of text (.txt) or of JSON (.jsonl)."]),
        ("q.txt", b"one\n\n  \ntwo\n\n", ["q.txt, line 2: is empty", "q.txt, line 3: is empty"]),
        ("q.txt", b"one\ncaf\xe9\n", ["q.txt, line 2: is not UTF-8: byte 4 of the line is 0xe9. UTF-8."]),
        ("q.txt", b"x" * 10_000_001, ["q.txt, line 1: has 10,000,001 characters. At most 10,000,000."]),
        ("q.txt", b"x" * 50_000_000 + b"\ny\n", ["q.txt, line 1: is longer than 41,048,576 bytes."]),
        ("q.jsonl", b'{"text": "a"}\nplain\n', ["q.jsonl, line 2: is not JSON: "]),
        ("q.jsonl", b"[1]\n7\n", ["q.jsonl, line 1: is JSON, but a list", "line 2: is JSON, but a int"]),
        (
            "q.jsonl",
            b'{"body": "a"}',
            ["q.jsonl, line 1: has no text. Fields here: body. Usual names: text, "],
        ),
        ("q.jsonl", b'{"text": 3}', ["q.jsonl, line 1: text is a int. A string."]),
        ("q.jsonl", b'{"text": "  "}', ["q.jsonl, line 1: is empty."]),
        ("q.jsonl", b'{"text": "\\ud800"}', ["q.jsonl, line 1: is not valid Unicode text. UTF-8."]),
        ("q.jsonl", b'{"text": "a", "id": [1]}', ["q.jsonl, line 1: id is a list. A string or a number."]),
        (
            "q.jsonl",
            b'{"text": "a", "id": 1}\n{"text": "b", "id": "1"}',
            ["q.jsonl, line 2: '1' is the name of line 1 too. Names are unique."],
        ),
        (
            "q.jsonl",
            b'{"text": "a", "embedding": [1, NaN]}\n{"text": "a", "embedding": ["x"]}\n'
            b'{"text": "a", "embedding": [1e400]}\n{"text": "a", "embedding": []}',
            [f"q.jsonl, line {n}: embedding is not a list of finite numbers." for n in (1, 2, 3, 4)],
        ),
        ("q.csv", b"query\na\n", ["q.csv: queries are not read from .csv files."]),
    ],
)
def test_queries_that_are_none(
    route: Run, fitted: Path, tmp_path: Path, name: str, content: bytes, messages: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    result = route("ask", fitted / "router", "-i", name, "-o", "d.jsonl", code=2)
    lines = result.stderr.splitlines()
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith("error: ")
        assert message in line
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_many_faults_are_counted(route: Run, fitted: Path) -> None:
    lines = route("ask", fitted / "router", "-i", "-", stdin="{\n" * 30, code=2).stderr.splitlines()
    assert len(lines) == 21
    assert lines[-1] == "error: stdin: and 10 more like these."


def test_labels_of_a_prompt(route: Run, fault: Fault, fitted: Path, tmp_path: Path) -> None:
    route("fit", fitted / "a.jsonl", "--router", "task_mean", "--out", "r")
    for task in ("code", "verse"):
        given = json.loads(route("ask", "r", "whatever it is", "--meta", f"task={task}", "--json").stdout)
        assert given["primary"] == task
    (tmp_path / "q.txt").write_text("one\n")
    assert fault("ask", "r", "-i", "q.txt", "--meta", "task=code").startswith("--meta: is of a prompt.")
    assert fault("ask", "r", "one", "--meta", "task") == "--meta: 'task' is not NAME=VALUE. As k=20."


def test_nothing_to_ask(fault: Fault, fitted: Path) -> None:
    assert "there is nothing to ask" in fault("ask", fitted / "router")
    both = fault("ask", fitted / "router", "one", "-i", "two.txt")
    assert "there is a prompt, and -i names queries too" in both
    assert fault("ask", fitted / "router", " ").startswith("PROMPT: is empty.")
    missing = fault("ask", fitted / "router", "-i", "none.txt")
    assert missing == "none.txt: cannot be read: No such file or directory."


def test_routers_that_are_none(fault: Fault, mine: Path, tmp_path: Path) -> None:
    assert "is no fitted router. A folder with router.json." in fault("ask", tmp_path, "a")
    card = json.loads((mine / "router.json").read_text())
    (mine / "router.json").write_text(json.dumps({**card, "version": 99}))
    message = fault("ask", mine, "a")
    assert "is of version 99. This mixmerge reads version 1. Fit the router again." in message
    (mine / "router.json").write_text(json.dumps({**card, "experts": ["x", "y", "z", "w"]}))
    assert "was changed after it was fitted" in fault("ask", mine, "a")


# --- mixtures


MIXTURE = """\
experts:
  sums: {model: ./sums}
  code: {model: ./code}
  verse: {model: ./verse}
  plain: {model: ./plain}
"""


def test_a_mixture_asks_like_its_router(route: Run, fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(
        f"{MIXTURE}router: {{folder: {fitted / 'router'}}}\npolicy: {{kind: top_k, k: 2}}\n"
    )
    by_router = json.loads(route("ask", fitted / "router", CODE, "--json", "--top-k", 2).stdout)
    assert json.loads(route("ask", "m.yaml", CODE, "--json").stdout) == by_router
    other = json.loads(route("ask", "m.yaml", CODE, "--json", "--policy", "argmax").stdout)
    assert (other["policy"], len(other["picks"])) == ("argmax", 1)
    (tmp_path / "n.yaml").write_text(f"{MIXTURE}router: {{kind: knn, outcomes: {fitted / 'a.jsonl'}}}\n")
    fresh = json.loads(route("ask", "n.yaml", CODE, "--json").stdout)
    assert (fresh["scores"], fresh["version"]) == (by_router["scores"], "unsaved")


def test_a_mixture_with_other_experts(route: Run, fitted: Path, tmp_path: Path) -> None:
    text = MIXTURE.replace("plain:", "other:") + f"router: {{folder: {fitted / 'router'}}}\n"
    (tmp_path / "m.yaml").write_text(text)
    result = route("ask", "m.yaml", CODE, code=2)
    assert "does not know other. It knows sums, code, verse, plain." in result.stderr
    assert "the mixture lacks plain" in result.stderr
    (tmp_path / "m.yaml").write_text(f"{MIXTURE}router: {{kind: knnn, outcomes: a}}\nrouters: 1\n")
    result = route("ask", "m.yaml", CODE, code=2)
    assert "Did you mean 'knn'?" in result.stderr
    assert "Did you mean 'router'?" in result.stderr


def test_a_mixture_is_fitted_to_a_folder(
    route: Run, fault: Fault, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes = f"router: {{kind: knn, outcomes: {fitted / 'a.jsonl'}, seed: 3}}\n"
    (tmp_path / "m.yaml").write_text(f"{MIXTURE}{outcomes}policy: {{kind: top_k, k: 2}}\n")
    by_yaml = json.loads(route("ask", "m.yaml", CODE, "--json").stdout)
    made = route("fit", "m.yaml", "--out", "folder", "--holdout", 0.2)
    assert "folder: knn, fitted on 200 queries x 4 experts" in made.stdout
    assert "held out 40 queries" in made.stdout
    monkeypatch.chdir(fitted)
    answer = json.loads(route("ask", tmp_path / "folder", CODE, "--json").stdout)
    assert answer == by_yaml | {"version": Router.load(tmp_path / "folder").version}
    monkeypatch.chdir(tmp_path)
    assert "4 experts" not in route("ls", ".").stdout
    route("calibrate", "folder", "--data", fitted / "b.jsonl", "--budget", 1e-4)
    again = json.loads(route("ask", "folder", CODE, "--json").stdout)
    assert again["policy"].startswith("budget(")
    # a mixture of a fitted router is packed as it is
    (tmp_path / "n.yaml").write_text(f"{MIXTURE}router: {{folder: folder}}\n")
    packed = json.loads(route("fit", "n.yaml", "--out", "packed", "--json").stdout)
    assert (packed["queries"], packed["version"]) == (200, Router.load(tmp_path / "folder").version)
    assert json.loads(route("ask", "packed", CODE, "--json").stdout) == again
    assert "is fitted already. Leave it out" in fault("fit", "n.yaml", "--out", "x", "--holdout", 0.2)
    assert "is a fitted mixture: mixture.yaml names its experts too" in fault(
        "remove-expert", "folder", "plain"
    )
    data = ("--data", fitted / "b.jsonl", "--expert", "plain")
    assert "is a fitted mixture" in fault("add-expert", "folder", *data)
    route("remove-expert", "folder", "plain", "--out", "alone")
    assert not (tmp_path / "alone" / "mixture.yaml").exists()


def test_options_that_a_mixture_has_itself(route: Run, fitted: Path, tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_text(f"{MIXTURE}router: {{kind: knn, outcomes: {fitted / 'a.jsonl'}}}\n")
    options = ("--router", "ridge", "--seed", 0, "--option", "k=1", "--features", "tfidf", "--kind", "long")
    result = route("fit", "m.yaml", "--out", "folder", *options, code=2)
    assert result.stderr.count("a mixture says this itself. Leave it out, or change m.yaml") == 5
    assert not (tmp_path / "folder").exists()
