"""``mixmerge route eval`` and ``calibrate``, on real files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge import OutcomeTable, Router
from mixmerge.decision.files import read_policy

Run, Fault = Callable[..., Any], Callable[..., str]
CODE, VERSE = "python function loop class return", "rhyme moon river song sorrow"


# --- eval


def test_eval(route: Run, fitted: Path) -> None:
    route("fit", fitted / "a.jsonl", "--out", "constant", "--router", "best_single")
    result = route("eval", fitted / "router", "constant", "--data", fitted / "b.jsonl")
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in result.stdout.splitlines()
        if line.startswith("│")
    ]
    names = [row[0] for row in rows]
    assert names[:3] == ["router", "constant (!)", "random choice"]
    assert names[-1] == "query oracle"
    table, router = OutcomeTable.read(fitted / "b.jsonl"), Router.load(fitted / "router")
    picks = router.score(list(table.queries)).mean.argmax(axis=1)
    assert rows[0][1].startswith(f"{np.nanmean(table.score[np.arange(len(table)), picks]):.3f} [")
    assert "constant: sends 100.0% of the queries to one expert" in result.stderr
    assert route("eval", "constant", "--data", fitted / "b.jsonl", "--quiet").stderr == ""
    found = json.loads(route("eval", fitted / "router", "--data", fitted / "b.jsonl", "--json").stdout)
    assert found["queries"] == 120
    assert found["policy"] == "argmax"


def test_reports_of_eval(route: Run, fault: Fault, fitted: Path, tmp_path: Path) -> None:
    options = ("--report", "r.html", "--per-query", "q.jsonl", "--top-k", 2, "--perturb")
    result = route("eval", fitted / "router", "--data", fitted / "b.jsonl", *options)
    assert "router: choices that rewording leaves: case 1" in result.stdout
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<html" in page
    assert 'src="http' not in page
    records = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(records) == 120
    assert {len(record["choice"]) for record in records} == {2}
    again = fault("eval", fitted / "router", "--data", fitted / "b.jsonl", *options)
    assert again.startswith("r.html: exists already.")


def test_eval_refuses_what_was_fitted_on(route: Run, fault: Fault, fitted: Path, tmp_path: Path) -> None:
    both = [
        *(fitted / "b.jsonl").read_text().splitlines(),
        *(fitted / "a.jsonl").read_text().splitlines()[1:11],
    ]
    both[0] = json.dumps({**json.loads(both[0]), "rows": 130})
    (tmp_path / "both.jsonl").write_text("\n".join(both))
    message = fault("eval", fitted / "router", "--data", "both.jsonl")
    assert message == (
        "--data: 10 of its 130 queries were fitted on. Queries that are new to the routers. "
        "Pass --unseen to leave them out, or --allow-trained."
    )
    clean = route("eval", fitted / "router", "--data", "both.jsonl", "--unseen")
    assert "warning: 10 queries that were fitted on are left out\n" in clean.stderr
    assert "120 queries" in clean.stdout
    used = route("eval", fitted / "router", "--data", "both.jsonl", "--allow-trained")
    assert "130 queries" in used.stdout
    assert "fitted on 10 of these 130 queries" in used.stderr.lower()
    all_seen = fault("eval", fitted / "router", "--data", fitted / "a.jsonl", "--unseen")
    assert all_seen == "--data: all its queries were fitted on. Outcomes of other queries."


def test_faults_of_eval(fault: Fault, fitted: Path, mine: Path, tmp_path: Path) -> None:
    OutcomeTable.read(fitted / "b.jsonl").only(["code", "verse"]).write(tmp_path / "two.jsonl")
    message = fault("eval", mine, "--data", "two.jsonl")
    assert "router mine: the table has no outcomes of sums, plain." in message
    twice = fault("eval", mine, mine, "--data", fitted / "b.jsonl")
    assert twice == f"{mine}: is given twice. Each router once."
    assert "there is no" in fault("eval", mine, "--data", fitted / "b.jsonl", "--saved")


# --- calibrate


def test_a_budget(route: Run, fault: Fault, fitted: Path, mine: Path) -> None:
    result = route("calibrate", mine, "--data", fitted / "b.jsonl", "--budget", 0.00008)
    assert result.stdout.splitlines()[0] == str(mine / "policy.json")
    policy = read_policy(mine, router=Router.load(mine).version)
    assert (policy.kind, policy.budget) == ("budget", 0.00008)
    assert json.loads(route("ask", mine, CODE, "--json").stdout)["policy"] == policy.describe()
    # the same budget by its option, with more
    more = json.loads(route("ask", mine, CODE, "--json", "--budget", 0.00008, "--fallback", "plain").stdout)
    assert more["policy"] == policy.but(fallback="plain").describe()
    assert "a budget needs the trade" in fault("ask", mine, CODE, "--budget", 0.0001)
    assert json.loads(route("ask", mine, CODE, "--json", "--policy", "argmax").stdout)["policy"] == "argmax"
    saved = route("eval", mine, "--data", fitted / "b.jsonl", "--saved", "--quiet")
    assert "policy budget(" in saved.stdout


def test_a_share_and_a_score(route: Run, fitted: Path, mine: Path) -> None:
    data = ("--data", fitted / "b.jsonl", "--json")
    share = json.loads(route("calibrate", mine, *data, "--strong-share", 0.3).stdout)
    assert (share["policy"]["strong"], share["policy"]["weak"]) == ("code", "sums")
    assert share["shares"]["code"] == pytest.approx(0.3, abs=0.02)
    named = json.loads(
        route("calibrate", mine, *data, "--recovered", 0.5, "--strong", "sums", "--weak", "plain").stdout
    )
    assert named["policy"]["strong"] == "sums"
    score = json.loads(route("calibrate", mine, *data, "--min-score", 0.85, "--fallback", "plain").stdout)
    assert score["score"] >= 0.85
    assert read_policy(mine).fallback == "plain"
    assert read_policy(mine).abstain_below == score["policy"]["abstain_below"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "calibrate: no goals are given. One of --budget, --strong-share, --recovered, --min-score."),
        (["--budget", "1", "--min-score", "1"], "--budget and --min-score: 2 goals are given."),
        (["--budget", "1e-9"], "budget: $1e-09 is less than the cheapest experts cost, $"),
        (["--budget", "1", "--policy", "argmax"], "--policy: --budget does not use it. Leave it out."),
        (["--budget", "1", "--bound", "norml"], "--bound: is 'norml'. Did you mean 'normal'?"),
        (["--min-score", "1.5"], "target: no bound reaches a mean score of 1.5. At most 1"),
        (
            ["--strong-share", "0.5", "--strong", "cod"],
            "policy.strong: no expert is called 'cod'. Did you mean",
        ),
        (
            ["--strong-share", "0.5", "--weak", "code", "--strong", "code"],
            "policy.weak: is code, as strong is.",
        ),
    ],
)
def test_faults_of_calibrate(
    fault: Fault, fitted: Path, mine: Path, options: list[str], message: str
) -> None:
    assert message in fault("calibrate", mine, "--data", fitted / "b.jsonl", *options)
    assert not (mine / "policy.json").exists()


def test_calibrating_on_what_was_fitted_on(route: Run, fault: Fault, fitted: Path, mine: Path) -> None:
    arguments = ("calibrate", mine, "--data", fitted / "a.jsonl", "--strong-share", 0.5)
    assert "200 of its 200 queries were fitted on" in fault(*arguments)
    assert "scores look surer on them" in route(*arguments, "--allow-trained").stderr


def test_a_policy_of_another_router(route: Run, fault: Fault, fitted: Path, mine: Path) -> None:
    route("calibrate", mine, "--data", fitted / "b.jsonl", "--strong-share", 0.5)
    policy = (mine / "policy.json").read_text()
    route("fit", fitted / "b.jsonl", "--out", mine, "--overwrite")
    assert not (mine / "policy.json").exists()
    (mine / "policy.json").write_text(policy)
    message = fault("ask", mine, CODE)
    assert "Calibrate again: mixmerge route calibrate." in message
