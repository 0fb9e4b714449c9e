"""Merges of EMR and TALL on tasks: each task is asked of its own masks, and who is told what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mixmerge
from mixmerge.errors import RecipeError
from mixmerge.evaluate.heads import HeadSource, score_classes
from mixmerge.evaluate.task_file import read_tasks
from mixmerge.recipe import read
from mixmerge.searching.search import search
from mixmerge.searching.space import Dimension, Settings, Space

PROMPTS = ["the quick", "brown fox", "jumps over", "the lazy dog"]


def recipe_of(made: Any, task: str | int, method: str = "emr") -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(made.base),
        "models": [{"model": str(one)} for one in made.experts],
        "parameters": {"task": task},
    }


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def made(family: Callable[..., Any]) -> Any:
    return family("llama", dtype="float32")


def test_each_task_is_asked_of_its_own_masks(made: Any, tmp_path: Path) -> None:
    mixmerge.merge(recipe_of(made, "all"), tmp_path / "all")
    for number in range(2):
        mixmerge.merge(recipe_of(made, number), tmp_path / f"alone{number}")
    rows = [{"prompt": prompt, "answer": "x"} for prompt in PROMPTS]
    data, names = write(tmp_path / "rows.jsonl", rows), ["expert0", "expert1", None]
    tasks = {
        "tasks": [
            {"name": f"{name}", "data": data, "metric": "exact", "expert": name, "max_new_tokens": 6}
            for name in names
        ]
    }
    report = mixmerge.evaluate_models(
        {"all": tmp_path / "all", "first": tmp_path / "alone0", "second": tmp_path / "alone1"},
        tasks=tasks,
        base=made.base,
        resamples=100,
    )
    given = {row.name: {task: one.given for task, one in row.answers.items()} for row in report.rows}
    assert given["all"]["expert0"] == given["first"]["expert0"] != given["base"]["expert0"]
    assert given["all"]["expert1"] == given["second"]["expert1"] != given["base"]["expert1"]
    assert given["all"]["None"] == given["base"]["None"]
    said = " ".join(report.notes)
    assert "Told which expert each task belongs to, whose masks then make the model: all." in said
    assert "all has no masks for None: its base answers there." in said
    assert f"first is made for the task of {made.experts[0]}, and so is told which one that is." in said


def test_a_classifier_with_the_masks_of_its_task(
    family: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import BertForSequenceClassification

    made = family("bert", dtype="float32")
    folders = []
    for number, expert in enumerate(made.experts):
        torch.manual_seed(number)
        model = BertForSequenceClassification.from_pretrained(expert, num_labels=4)
        model.classifier.weight.data *= 40
        folders.append(tmp_path / f"mood{number}")
        model.save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    recipe = recipe_of(made, "all", "tall")
    recipe["models"] = [{"model": str(folder)} for folder in folders]
    mixmerge.merge(recipe, tmp_path / "all")
    mixmerge.merge({**recipe, "parameters": {"task": 1}}, tmp_path / "alone")
    rows = [{"text": f"{one} {two}", "label": 0} for one in PROMPTS for two in PROMPTS]
    task = {"name": "t", "data": write(tmp_path / "c.jsonl", rows), "metric": "accuracy", "head": "mood1"}
    (asked,) = read_tasks({"tasks": [task]})
    heads = {"mood1": HeadSource("mood1", folders[1])}
    alone = score_classes(tmp_path / "alone", asked, heads, name="alone")
    masked = score_classes(tmp_path / "all", asked, heads, name="all", alone="mood1")
    base = score_classes(tmp_path / "all", asked, heads, name="all")
    assert masked.given == alone.given != base.given


def test_a_search_refuses_masks_of_all_tasks(made: Any, tmp_path: Path) -> None:
    class Never:
        identity, chosen_by = "never", ()

        def rows(self, folder: Path, part: str) -> Any:
            raise NotImplementedError

    space = Space({"weight": Dimension(low=0.0, high=1.0)}, Settings(budget=3))
    with pytest.raises(RecipeError, match="all leaves the base and a mask for each expert"):
        search(read(recipe_of(made, "all", "tall")).require(), space, Never(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
