"""Symbolic-MoE from end to end: the shipped mixture by the commands, and what the example prints of it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import mixmerge
from mixmerge.cli import app
from mixmerge.mixture import read
from mixmerge.zoo import TASKS, Spec, Zoo, copy_to

ROOT = Path(__file__).resolve().parent.parent
MIXTURES = Path(mixmerge.__file__).parent / "recipes" / "mixtures"
ROUTED = [one for one in sorted(MIXTURES.glob("*.yaml")) if "outcomes:" in one.read_text(encoding="utf-8")]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module("symbolic_moe")


@pytest.fixture
def folder(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Here, with a small zoo, labelled questions and others to ask."""
    monkeypatch.chdir(tmp_path)
    made = Zoo.open(zoo)
    copy_to(made, tmp_path / "zoo")
    lines = [json.dumps({"prompt": one.prompt, "answer": one.answer}) for one in _first(made, 6)]
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    (tmp_path / "queries.txt").write_text("\n".join(one.prompt for one in _first(made, 2)))
    return tmp_path


def _first(zoo: Zoo, count: int) -> list[Any]:
    return [one for task in zoo.tasks for one in zoo.questions(task)[:count]]


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTED, ids=lambda path: path.stem)
def test_a_shipped_mixture_with_a_router_runs_as_it_says(path: Path, folder: Path) -> None:
    outcomes = read(path).require().router.outcomes

    def run(*arguments: object) -> str:
        done = CliRunner().invoke(app, [str(one) for one in arguments])
        assert done.exit_code == 0, done.output
        return done.output

    run("recipes", "cp", path.stem)
    assert f"mixmerge profile {path.name} --tasks " in path.read_text(encoding="utf-8")
    run("profile", path.name, "--tasks", "tasks.jsonl", "-o", outcomes, "--check", "first_line")
    run("batch", path.name, "-i", "queries.txt", "-o", "answers.jsonl", "--explain")
    records = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(records) == 2 * len(TASKS)
    assert [one["error"] for one in records] == [None] * len(records)
    picks = 3 if path.stem == "symbolic-moe" else 1
    assert all(one["calls"] == picks == len(one["decision"]["picks"]) for one in records)
    assert all(sum(one["decision"]["scores"].values()) == pytest.approx(1) for one in records if picks == 3)


def test_questions_of_validation_and_test_have_nothing_in_common(example: Any, zoo: Path) -> None:
    found = Zoo.open(zoo)
    ours, others = example.split(found, 3, 4)
    assert all((len(ours[task]), len(others[task])) == (3, 4) for task in found.tasks)
    for some in (ours, others):
        for questions in some.values():
            trained = {one.prompt for task in found.tasks for one in found.questions(task, "train")}
            assert not trained & {one.prompt for one in questions}
    assert not {one.prompt for some in ours.values() for one in some} & {
        one.prompt for some in others.values() for one in some
    }


def test_what_it_is_compared_with(example: Any) -> None:
    """Random recruiting and the best expert's samples: as many answers at the same temperature, and the same vote."""
    spec = read(example.RECIPE).require()
    found = example.systems(spec)
    assert found[example.OURS] == spec
    chance = found[example.RANDOM]
    assert (chance.compose, chance.generate, chance.experts) == (spec.compose, spec.generate, spec.experts)
    assert (chance.policy.kind, chance.policy.draws) == ("sample", spec.policy.draws)
    samples = found["best single expert, its samples voted"].compose
    assert (samples.kind, samples.options) == ("self_consistency", {**spec.compose.options, "samples": 3})


def test_rows_have_intervals_and_paired_leads(example: Any) -> None:
    same = np.array([1.0, 1.0, 0.0, 1.0])
    result = example.Result(
        {example.OURS: same, "equal": same, "never": np.zeros(4)}, ("a", "b", "c", "d"), "never", ()
    )
    ours, equal, never = example.rows_of(result, resamples=200)
    assert ours == (example.OURS, ours[1], "")
    assert ours[1].startswith("75.0 (")
    assert equal[2] == "+0.0 (+0.0 to +0.0)"
    assert never[1] == "0.0 (0.0 to 0.0)"
    assert never[2].startswith("+75.0 (+")


@pytest.mark.slow
def test_the_example_prints_its_table(zoo: Path, programs: Any, tmp_path: Path) -> None:
    script = ROOT / "examples" / "symbolic_moe.py"
    sizes = ("--effort", "0.01", "--validation", "4", "--test", "4")
    done = programs(script, *sizes, "--out", "out", "--markdown", "out.md", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    written = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert "20 test questions of 5 tasks; 4 others of each to profile on" in done.stdout
    assert "| Symbolic-MoE |" in written
    assert "| best single expert: " in written
    assert "5 loads; one question after the other would take" in written


@pytest.mark.slow
def test_it_beats_the_best_expert_and_chance(
    example: Any, built: Callable[[Spec], Zoo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo = built(Spec())
    monkeypatch.chdir(tmp_path)
    example.place(zoo, tmp_path / "zoo")
    result = example.study(zoo, validation=40, test=40)
    ours = result.scores[example.OURS]
    for other in (result.best, example.RANDOM, "best single expert, its samples voted"):
        lead = example.paired_bootstrap(ours, result.scores[other], result.texts).difference
        assert lead.low > 0.4, other
    oracle = result.scores["best expert on each question (oracle)"]
    assert ours.mean() > oracle.mean() - 0.06
