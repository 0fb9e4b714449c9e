"""``mixmerge route fit``, ``add-expert``, ``remove-expert``, ``ls``, ``check``, on real files; help and documents."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge import Decision, OutcomeTable, Router
from mixmerge.errors import MixmergeError
from mixmerge.outcomes.importers import IMPORTERS
from mixmerge.routers import ROUTERS
from mixmerge.routers.contract import sample
from mixmerge.routers.embedding_files import write_embeddings
from mixmerge.routers.table import kinds, markdown

Run, Fault = Callable[..., Any], Callable[..., str]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "routing.md"
CODE, VERSE = "python function loop class return", "rhyme moon river song sorrow"


# --- fit


def test_fit(route: Run, fitted: Path) -> None:
    result = route("fit", fitted / "a.jsonl", "--router", "knn", "--option", "k=7", "--seed", 3, "--out", "r")
    assert result.stdout == "r: knn, fitted on 200 queries x 4 experts\n"
    assert result.stderr == ""
    assert (Path("r").stat().st_mode & 0o777, {p.stat().st_mode & 0o777 for p in Path("r").iterdir()}) == (
        0o755,
        {0o644},
    )
    router = Router.load("r")
    assert (router.kind, router.seed, router.options.model_dump()["k"]) == ("knn", 3, 7)
    assert router.experts == ("sums", "code", "verse", "plain")
    same = type(router)({"k": 7}, seed=3).fit(OutcomeTable.read(fitted / "a.jsonl"))
    np.testing.assert_array_equal(router.score([CODE]).mean, same.score([CODE]).mean)


def test_a_held_out_score_is_of_queries_that_were_not_fitted_on(route: Run, fitted: Path) -> None:
    from mixmerge.outcomes.splits import split

    shown = route("fit", fitted / "a.jsonl", "--out", "r", "--holdout", 0.25)
    found = json.loads(route("fit", fitted / "a.jsonl", "--out", "s", "--holdout", 0.25, "--json").stdout)
    table = OutcomeTable.read(fitted / "a.jsonl")
    train, test = (table.rows(part) for part in split(table, test=0.25, seed=0))
    router = type(Router.load("r"))().fit(train)
    picks = router.score(list(test.queries)).mean.argmax(axis=1)
    got = test.score[np.arange(len(test)), picks]
    row = found["holdout"]["rows"][0]
    assert row["score"]["value"] == pytest.approx(np.nanmean(got))
    assert row["scored"] == (~np.isnan(got)).sum()
    best = int(np.nanmean(train.score, axis=0).argmax())
    assert f"held out {row['scored']} queries: mean score {np.nanmean(got):.3f} [" in shown.stdout
    single = np.nanmean(test.score[:, best])
    assert f"best single: {train.experts[best]} {single:.3f} [" in shown.stdout
    assert "the saved one is fitted on all 200 queries" in shown.stdout
    assert found["queries"] == 200
    assert (found["path"], found["version"]) == ("s", Router.load("s").version)
    whole = type(router)().fit(table)
    np.testing.assert_array_equal(Router.load("r").score([CODE]).mean, whole.score([CODE]).mean)


def test_fit_with_prices(route: Run, tmp_path: Path) -> None:
    (tmp_path / "long.csv").write_text(
        "query,expert,score\nadd one,a,1\nadd one,b,0\nwrite it,a,0\nwrite it,b,1\n", encoding="utf-8"
    )
    (tmp_path / "prices.yaml").write_text("a: {input: 1, output: 2}\nb: {input: 10, output: 20, size: 7B}\n")
    route("fit", "long.csv", "--out", "r", "--prices", "prices.yaml")
    decision = json.loads(route("ask", "r", "add one more", "--json").stdout)
    assert decision["primary"] == "a"
    # 12 characters of a quarter token each, and 256 tokens of an answer
    assert decision["reason"]["cost"] == pytest.approx((12 * 0.25 * 1 + 256 * 2) / 1e6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--router", "knnn"], "router: no router is called 'knnn'. Did you mean 'knn'? Known: "),
        (["--option", "kk=3"], "router knn: kk: no such option. Options: k, "),
        (["--option", "k=0"], "router knn: k: Input should be greater than or equal to 1. Options: k, "),
        (["--option", "k"], "--option: 'k' is not NAME=VALUE. As k=20."),
        (["--option", "k=1", "--option", "k=2"], "--option: k is given twice."),
        (["--features", "tfdf"], "features: no features is called 'tfdf'. Did you mean 'tfidf'?"),
        (["--features", "tfidf:dim=3"], "--features tfidf: there is no option 'dim'. "),
        (["--router", "random", "--features", "tfidf"], "--features: random does not embed queries."),
        (["--holdout", "1.5"], "--holdout: is 1.5. More than 0, less than 1."),
        (["--kind", "routelm"], "outcomes: no outcomes is called 'routelm'. Did you mean 'routellm'?"),
        (["--prices", "none.json"], "none.json: does not exist."),
        (["--out", "taken"], "taken: exists already. Choose another name, or pass --overwrite."),
        (["--out", "taken", "--overwrite"], "taken: is no router, so it is not replaced. "),
    ],
)
def test_faults_of_fit(fault: Fault, fitted: Path, tmp_path: Path, options: list[str], message: str) -> None:
    (tmp_path / "taken").mkdir()
    out = [] if "--out" in options else ["--out", "r"]
    assert message in fault("fit", fitted / "a.jsonl", *out, *options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_overwrite_replaces_a_router(route: Run, fault: Fault, fitted: Path) -> None:
    route("fit", fitted / "a.jsonl", "--out", "r")
    assert "exists already" in fault("fit", fitted / "a.jsonl", "--out", "r")
    route("fit", fitted / "a.jsonl", "--out", "r", "--overwrite", "--router", "best_single")
    assert Router.load("r").kind == "best_single"


def test_outcomes_that_hold_nothing(route: Run, fault: Fault, tmp_path: Path) -> None:
    head = "query,expert,score\n"
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "nan.csv").write_text(head + "add one,a,NaN\nadd one,b,\n")
    (tmp_path / "infinite.csv").write_text(head + "add one,a,inf\n")
    (tmp_path / "word.csv").write_text(head + "add one,a,well\n")
    assert "is empty" in fault("fit", "empty.csv", "--out", "r")
    silent = fault("fit", "nan.csv", "--out", "r", "-q")
    assert silent == "outcomes: no query has a score. At least one row with a score."
    for name in ("infinite.csv", "word.csv"):
        assert f"{name}, line 2, column score" in fault("fit", name, "--out", "r")
    assert "none.csv: does not exist." in fault("fit", "none.csv", "--out", "r")
    assert not (tmp_path / "r").exists()


def test_missing_scores_are_not_zeros(route: Run, tmp_path: Path) -> None:
    rows = [f"add {n},a,1\nadd {n},b,{'NaN' if n % 2 else 1}\n" for n in range(20)]
    (tmp_path / "gaps.csv").write_text("query,expert,score\n" + "".join(rows))
    route("fit", "gaps.csv", "--out", "r")
    scores = json.loads(route("ask", "r", "add 30", "--json").stdout)["scores"]
    assert scores == {"a": 1.0, "b": 1.0}


def test_one_expert_is_always_picked_and_said(route: Run, tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("query,expert,score\nadd one,a,1\nadd two,a,0\n")
    result = route("fit", "one.csv", "--out", "r")
    assert result.stderr == "warning: one expert, so there is nothing to route\n"
    assert route("fit", "one.csv", "--out", "r", "--overwrite", "--quiet").stderr == ""
    assert route("ask", "r", "write it").stdout.splitlines()[0] == "a"


def test_given_embeddings(route: Run, fault: Fault, tmp_path: Path) -> None:
    table = sample(60)
    table.write(tmp_path / "a.jsonl")
    of = np.eye(3, dtype=np.float32)[[["sums", "code", "verse"].index(t) for t in table.metadata["task"]]]
    write_embeddings(tmp_path / "e.safetensors", table.ids, of)
    route("fit", "a.jsonl", "--out", "r", "--features", "given:e.safetensors")
    asked = json.dumps({"text": "anything", "id": "x", "embedding": [0, 1, 0]})
    decision = json.loads(route("ask", "r", "-i", "-", stdin=asked).stdout)
    assert (decision["query_id"], decision["primary"]) == ("x", "code")
    wrong = json.dumps({"text": "anything", "id": "x", "embedding": [0, 1]})
    message = fault("ask", "r", "-i", "-", stdin=wrong)
    assert message == "query x: its embedding has shape (2,). 3 finite numbers."
    assert "query " in (message := fault("ask", "r", "no embedding"))
    assert "brings no embedding" in message


# --- experts


def test_experts_come_and_go(route: Run, fitted: Path, mine: Path) -> None:
    before = Router.load(mine).score([CODE, VERSE]).mean
    route("calibrate", mine, "--data", fitted / "b.jsonl", "--strong-share", 0.5, "--quiet")
    left = route("remove-expert", mine, "sums")
    assert left.stdout == f"{mine}: 3 experts: code, verse, plain\n"
    assert "policy.json was for the experts before, and is gone: calibrate again" in left.stderr
    np.testing.assert_allclose(Router.load(mine).score([CODE, VERSE]).mean, before[:, 1:])
    added = route(
        "add-expert", mine, "--data", fitted / "a.jsonl", "--expert", "sums", "--out", "new", "--json"
    )
    assert json.loads(added.stdout) == {"path": "new", "experts": ["code", "verse", "plain", "sums"]}
    np.testing.assert_allclose(Router.load("new").score([CODE, VERSE]).mean[:, :3], before[:, 1:])
    assert Router.load(mine).experts == ("code", "verse", "plain")


def test_faults_of_experts(route: Run, fault: Fault, fitted: Path, mine: Path, tmp_path: Path) -> None:
    before = (mine / "router.json").read_bytes()
    data = ("--data", fitted / "a.jsonl")
    assert "no outcomes of sum. Known: sums, " in fault("add-expert", mine, *data, "--expert", "sum")
    assert "the router has code already" in fault("add-expert", mine, *data, "--expert", "code")
    assert "the router has no expert 'sum'. Known: " in fault("remove-expert", mine, "sum")
    taken = fault("remove-expert", mine, "sums", "--out", fitted)
    assert "exists already" in taken
    assert (mine / "router.json").read_bytes() == before
    fixed = next(one.name for one in kinds() if not one.removes and not one.row.reference)
    route("fit", fitted / "a.jsonl", "--out", "fixed", "--router", fixed, "--quiet")
    assert "cannot remove an expert" in fault("remove-expert", "fixed", "sums")


# --- ls and check


def test_ls_of_kinds(route: Run) -> None:
    found = json.loads(route("ls", "--json").stdout)
    assert list(found)[: len(ROUTERS)] == list(ROUTERS)
    assert found["knn"]["options"]["k"] == 40
    assert (found["knn"]["adds"], found["knn"]["removes"]) == (True, True)
    shown = route("ls").stdout
    assert all(re.search(rf"│ {name}\s+│", shown) for name in ROUTERS)
    assert "k = 40" in shown


def test_ls_of_a_folder(route: Run, fault: Fault, fitted: Path, mine: Path, tmp_path: Path) -> None:
    route("calibrate", mine, "--data", fitted / "b.jsonl", "--strong-share", 0.5)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "router.json").write_text("{")
    (tmp_path / "other").mkdir()
    found = json.loads(route("ls", ".", "--json").stdout)
    assert [one["path"] for one in found] == ["broken", "mine"]
    assert "cannot be read" in found[0]["fault"]
    assert (found[1]["kind"], found[1]["queries"]) == ("knn", 200)
    assert found[1]["policy"].startswith("threshold(")
    assert json.loads(route("ls", mine, "--json").stdout)[0]["version"] == Router.load(mine).version
    assert re.search(r"│ mine\s+│ knn", route("ls", ".").stdout)
    assert "there is no such folder" in fault("ls", "nowhere")


def test_check(route: Run, fitted: Path, tmp_path: Path) -> None:
    table = OutcomeTable.read(fitted / "a.jsonl")
    shown = route("check", fitted / "a.jsonl").stdout.splitlines()
    assert shown[0].startswith("200 queries x 4 experts, ")
    best = int(np.nanmean(table.score, axis=0).argmax())
    assert any(line.startswith(table.experts[best]) for line in shown)
    found = json.loads(route("check", fitted / "a.jsonl", "--train", fitted / "a.jsonl", "--json").stdout)
    assert found["rows"] == 200
    assert len(found["leaks"]["exact"]) == 200
    with (tmp_path / "long.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["query", "expert", "score"])
        writer.writerows([[f"q {n}", e, int(e == "a")] for n in range(4) for e in "ab"])
    assert "4 queries x 2 experts" in route("check", "long.csv").stdout


# --- help, documents, Python


def test_help(route: Run) -> None:
    text = route("--help").stdout
    for command in ("fit", "ask", "eval", "calibrate", "add-expert", "remove-expert", "ls", "check"):
        assert re.search(rf"│ {command} +[A-Z]", text), command
        assert "Usage: " in route(command, "--help").stdout
    assert "mixmerge route fit outcomes.jsonl --out router --holdout 0.2" in text
    assert "No such command 'fitt'" in route("fitt", code=2).stderr


def test_help_of_the_program_makes_no_command_of_routing() -> None:

    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom mixmerge.cli import app\n"
        "done = CliRunner().invoke(app, ['--help'])\nassert 'route' in done.output, done.output\n"
        "print(*[name for name in ('numpy', 'pydantic', 'sklearn', 'mixmerge.cli.route.fit') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_document_lists_what_there_is() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.search(r"<!-- routers -->\n(.*?)\n<!-- /routers -->", text, re.DOTALL)
    assert found, "docs/routing.md has no <!-- routers --> table <!-- /routers -->"
    assert found[1].strip() == markdown(), f"the table of routers is old; it should be\n{markdown()}"
    from mixmerge.decision.policies import KINDS

    for name in (*KINDS, *IMPORTERS):
        assert f"`{name}`" in text, f"docs/routing.md does not name {name}"


def test_the_table_has_a_line_for_each_router() -> None:
    head, rule, *rows = markdown().splitlines()
    assert [row.split("`")[1] for row in rows] == list(ROUTERS)
    assert {line.replace("\\|", "").count("|") for line in (head, rule, *rows)} == {head.count("|")}
    assert "`k` = 40" in next(row for row in rows if row.startswith("| `knn`"))


def test_from_python(fitted: Path) -> None:
    import mixmerge

    router = mixmerge.Router.load(fitted / "router")
    query = mixmerge.Query(CODE, id="mine")
    (decision,) = mixmerge.Policy().decide(router.score([query]), [query], version=router.version)
    assert isinstance(decision, Decision)
    assert (decision.query_id, decision.primary) == ("mine", "code")
    assert math.isfinite(decision.scores["code"])
    assert mixmerge.Mixture.__name__ == "Mixture"
    with pytest.raises(MixmergeError, match="does not exist"):
        mixmerge.OutcomeTable.read(fitted / "none.csv")
