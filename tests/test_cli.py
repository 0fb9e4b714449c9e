"""The commands: what goes to stdout, what to stderr, exit codes; faults without a traceback."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import mixmerge
from mixmerge.cli import app
from mixmerge.cli.show import size

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """``run(*arguments, code=0)``: a command in this process; its exit code is checked."""

    def invoke(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


@dataclass(frozen=True)
class Case:
    recipe: Path
    out: Path
    base: Path
    experts: list[Path]


@pytest.fixture
def case(family: Any, tmp_path: Path) -> Case:
    """A recipe that works and has one warning."""
    made = family("llama")
    recipe = {
        "merge_method": "ties",
        "base_model": str(made.base),
        "models": [{"model": str(path), "parameters": {"weight": 0.5}} for path in made.experts],
        "parameters": {"density": [0.3, 0.6], "int8_mask": True},
        "output": {"shard_size": 40_000},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return Case(path, tmp_path / "out", made.base, made.experts)


# --- merge


def test_merge(run: Run, case: Case, assert_loads: Any) -> None:
    result = run("merge", case.recipe, case.out, "--threads", 1)
    assert re.fullmatch(rf"{case.out}: 21 tensors, \d+\.\d\d kB in \d+\.\d s\n", result.stdout)
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: parameters.int8_mask")
    assert_loads(case.out)
    fault = run("merge", case.recipe, case.out, code=2)
    assert fault.stdout == ""
    assert (
        fault.stderr.splitlines()[-1]
        == f"error: {case.out}: it exists. Name another folder, or pass --overwrite."
    )
    run("merge", case.recipe, case.out, "--overwrite")


def test_quiet_is_quiet(run: Run, case: Case) -> None:
    result = run("merge", case.recipe, case.out, "--quiet")
    assert result.stderr == ""
    assert len(result.stdout.splitlines()) == 1
    assert run("plan", case.recipe, "-q").stderr == ""
    assert run("merge", case.recipe, case.out, "--dry-run", "-q").stderr == ""


def test_merge_as_json(run: Run, case: Case) -> None:
    result = run("merge", case.recipe, case.out, "--json", "--verify", "--no-kernels")
    report = json.loads(result.stdout)
    plan = mixmerge.make_plan(case.recipe)
    assert report.pop("seconds") > 0
    assert report.pop("warnings") == list(plan.warnings)
    assert report == {
        "path": str(case.out),
        "plan": plan.hash,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "tensors": 21,
        "resumed": 0,
    }
    assert "sha256" in (case.out / "mixmerge_manifest.json").read_text()


def test_a_dry_run_is_the_plan_and_writes_nothing(run: Run, case: Case) -> None:
    dry, plan = run("merge", case.recipe, case.out, "--dry-run"), run("plan", case.recipe)
    assert dry.stdout == plan.stdout
    assert dry.stderr == plan.stderr
    as_json = [run("merge", case.recipe, case.out, "--dry-run", "--json"), run("plan", case.recipe, "--json")]
    assert json.loads(as_json[0].stdout) == json.loads(as_json[1].stdout)
    assert sorted(path.name for path in case.recipe.parent.iterdir()) == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "mergekitt"], "--engine: is 'mergekitt'. mixmerge and mergekit are known."),
        (["--device", "cudaa"], "device: torch cannot use 'cudaa' here"),
        (["--threads", "0"], "Invalid value for '--threads'"),
        (["--no-such"], "No such option: --no-such"),
    ],
)
def test_options_that_are_wrong(run: Run, case: Case, options: list[str], message: str) -> None:
    result = run("merge", case.recipe, case.out, *options, code=2)
    assert message in result.stderr
    assert result.stdout == ""
    assert not case.out.exists()


def test_mergekit_engine(run: Run, case: Case, read_tensors: Any) -> None:
    pytest.importorskip("mergekit")
    result = run("merge", case.recipe, case.out, "--engine", "mergekit")
    assert result.stdout == f"{case.out}\n"
    assert len(read_tensors(case.out)) == 21
    fault = run("merge", case.recipe, case.out, "--engine", "mergekit", code=2)
    assert "it exists" in fault.stderr


# --- plan


def test_plan(run: Run, case: Case) -> None:
    lines = run("plan", case.recipe).stdout.splitlines()
    plan = mixmerge.make_plan(case.recipe)
    text = "\n".join(lines)
    for path in (case.base, *case.experts):
        assert re.search(rf"│ {path}\s+│\s+21 │\s+│", text)
    for what, value in {
        "output tensors": "21 merged, 0 copied, 0 of the inputs dropped",
        "config and tokenizer": str(case.base),
        "to read": size(plan.bytes_read),
        "to write": f"{size(plan.bytes_written)} in {len(plan.shards)} file(s)",
        "plan hash": plan.hash,
    }.items():
        assert re.search(rf"│ {what}\s+│\s+{re.escape(value)} │", text), what
    assert len(plan.shards) > 1
    assert max(map(len, lines)) <= 200


def test_every_tensor_of_a_plan(run: Run, case: Case, clone: Any) -> None:
    short, long = run("plan", case.recipe).stdout, run("plan", case.recipe, "--tensors").stdout
    assert "lm_head.weight" not in short
    row = next(line for line in long.splitlines() if "layers.1.mlp.up_proj" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:4] == ["model.layers.1.mlp.up_proj.weight", "[48, 32]", "BF16", "merged"]
    assert "weight=0.5,0.5 density=0.6,0.6" in cells[4]


def test_dropped_tensors_are_listed(run: Run, case: Case, clone: Any) -> None:
    from safetensors.torch import load_file, save_file

    expert = clone(case.experts[0])
    tensors = load_file(expert / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tensors[name] = tensors["model.norm.weight"].clone()
    save_file(tensors, expert / "model.safetensors", metadata={"format": "pt"})
    case.recipe.write_text(case.recipe.read_text().replace(str(case.experts[0]), str(expert)))
    text = run("plan", case.recipe).stdout
    assert "1 of the inputs dropped" in text
    assert re.search(rf"│ {name}\s+│.*a buffer the model computes itself │", text)
    assert json.loads(run("plan", case.recipe, "--json").stdout)["dropped"][0]["name"] == name


def test_every_fault_has_its_line(run: Run, case: Case) -> None:
    text = case.recipe.read_text().replace("ties", "tise").replace(str(case.experts[0]), "./nowhere")
    case.recipe.write_text(text + "dtype: fp16\n")
    for command in (["plan"], ["merge", "--dry-run"], ["merge"]):
        arguments = [command[0], case.recipe, *([case.out] if command[0] == "merge" else []), *command[1:]]
        result = run(*arguments, code=2)
        assert result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 3
        assert all(line.startswith("error: ") for line in lines)
        joined = "\n".join(lines)
        assert all(word in joined for word in ("Did you mean 'ties'", "models[0].model", "'float16'"))
    assert not case.out.exists()


def test_no_recipe(run: Run, tmp_path: Path) -> None:
    result = run("plan", tmp_path / "none.yaml", code=2)
    assert (
        result.stderr == f"error: {tmp_path}/none.yaml: cannot read the recipe: No such file or directory.\n"
    )


def test_tokenizer_mismatch(run: Run, case: Case, clone: Any) -> None:
    expert = clone(case.experts[0])
    tokenizer = json.loads((expert / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (expert / "tokenizer.json").write_text(json.dumps(tokenizer))
    case.recipe.write_text(case.recipe.read_text().replace(str(case.experts[0]), str(expert)))
    assert "--allow-tokenizer-mismatch" in run("plan", case.recipe, code=2).stderr
    for arguments in (["plan", case.recipe], ["merge", case.recipe, case.out]):
        assert "tokenizer differs" in run(*arguments, "--allow-tokenizer-mismatch").stderr


# --- recipes


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes that come with the package, for the tests of the command only."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    (folder / "ties.yaml").write_text("# Trim and elect.\nmerge_method: ties\n")
    (folder / "plain.yaml").write_text("merge_method: linear\n")
    monkeypatch.setattr("mixmerge.cli.recipes._folder", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


def test_recipes_ls(run: Run, shelf: Path) -> None:
    text = run("recipes", "ls").stdout
    assert re.search(r"│ ties\s+│ Trim and elect\. │", text)
    assert json.loads(run("recipes", "ls", "--json").stdout) == {"plain": "", "ties": "Trim and elect."}


def test_recipes_cp(run: Run, shelf: Path, tmp_path: Path) -> None:
    assert run("recipes", "cp", "ties").stdout == "ties.yaml\n"
    assert (tmp_path / "ties.yaml").read_text() == (shelf / "ties.yaml").read_text()
    run("recipes", "cp", "plain.yaml", tmp_path / "mine.yaml")
    assert (tmp_path / "mine.yaml").read_text() == "merge_method: linear\n"
    for arguments, message in (
        (["ties"], "error: ties.yaml: it exists. Name another file, or pass --overwrite."),
        (["tise"], "error: recipes: none is called 'tise'. Did you mean 'ties'? Known: plain, ties."),
        (["../recipe"], "none is called '../recipe'"),
        (["ties", tmp_path / "no" / "where.yaml"], f"error: {tmp_path}/no: no such folder."),
    ):
        result = run("recipes", "cp", *arguments, code=2)
        assert message in result.stderr
        assert result.stdout == ""
    (tmp_path / "ties.yaml").write_text("old")
    run("recipes", "cp", "ties", "--overwrite")
    assert (tmp_path / "ties.yaml").read_text() != "old"


def test_the_shipped_recipes_are_listed(run: Run) -> None:
    listed = json.loads(run("recipes", "ls", "--json").stdout)
    shipped = Path(mixmerge.__file__).parent / "recipes"
    found = [*sorted(shipped.glob("*.yaml")), *sorted(shipped.glob("mixtures/*.yaml"))]
    assert list(listed) == [path.stem for path in found]
    assert {"ties", "routed", "symbolic-moe"} <= set(listed)
    assert all(listed.values()), "a recipe begins with a comment that says what it shows"


# --- help


COMMANDS = (
    *([], ["merge"], ["plan"], ["inspect"], ["recipes"], ["recipes", "ls"], ["recipes", "cp"], ["zoo"]),
    *(["zoo", "outcomes"], ["route"], ["route", "fit"]),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(run: Run, command: list[str]) -> None:
    result = run(*command, "--help")
    assert "Usage: " in result.stdout
    assert result.stderr == ""


def test_every_option_says_what_it_does(run: Run) -> None:
    text = run("merge", "--help").stdout
    options = set(re.findall(r"--[a-z-]+", text))
    assert {"--overwrite", "--dry-run", "--engine", "--device", "--threads", "--json", "--quiet"} <= options
    assert "Merge models by a recipe" in text


def test_usage_errors(run: Run) -> None:
    assert "No such command 'merg'" in run("merg", code=2).stderr
    assert "Missing argument" in run("merge", code=2).stderr
    assert "Usage: " in run("recipes", code=2).stdout + run("recipes", code=2).stderr


# --- as a program


def test_the_program(case: Case) -> None:
    """Exit codes and streams of a real process; a fault prints no traceback."""
    program = [sys.executable, "-P", "-m", "mixmerge"]
    environment = os.environ | {"COLUMNS": "100"}
    done = subprocess.run(
        [*program, "merge", case.recipe, case.out], capture_output=True, text=True, env=environment
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stderr.startswith("warning: ")
    assert "\x1b" not in done.stdout + done.stderr
    fault = subprocess.run(
        [*program, "plan", "nowhere.yaml"], capture_output=True, text=True, env=environment
    )
    assert (fault.returncode, fault.stdout) == (2, "")
    assert fault.stderr == "error: nowhere.yaml: cannot read the recipe: No such file or directory.\n"
