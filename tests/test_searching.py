"""The black-box search of a recipe: real merges of tiny models, scored by how near they come to a known mixture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from mixmerge.errors import MixmergeError, OutputError
from mixmerge.methods import METHODS
from mixmerge.recipe import read
from mixmerge.searching.search import BEST, TRIALS, Found, Part, search
from mixmerge.searching.space import Dimension, Settings, Space, read_space, slots, with_values

TENSOR = "model.layers.{}.self_attn.q_proj.weight"


@dataclass
class Nearness:
    """A row for each layer: how near the candidate's delta is to base + sum of ``wanted`` shares of the deltas.

    Args:
        wanted: for each layer, one share for each expert.
    """

    base: Path
    experts: tuple[Path, ...]
    wanted: tuple[tuple[float, ...], ...]
    calls: int = 0
    stop_after: int | None = None
    identity: str = "nearness"
    chosen_by: tuple[str, ...] = ()

    def rows(self, folder: Path, part: Part) -> Mapping[str, NDArray[np.float64]]:
        self.calls += 1
        if self.stop_after is not None and self.calls > self.stop_after:
            raise KeyboardInterrupt
        base, merged = (load_file(path / "model.safetensors") for path in (self.base, folder))
        experts = [load_file(path / "model.safetensors") for path in self.experts]
        found = []
        for layer, shares in enumerate(self.wanted):
            name = TENSOR.format(layer)
            target = base[name].float()
            for share, expert in zip(shares, experts, strict=True):
                target = target + share * (expert[name].float() - base[name].float())
            size = (target - base[name].float()).norm()
            found.append(float(torch.exp(-(((merged[name].float() - target).norm() / size) ** 2))))
        return {"near": np.array(found), "again": np.array(found)}


@pytest.fixture
def make(family: Any) -> Callable[..., tuple[Any, Nearness]]:
    def made(*wanted: tuple[float, ...], **parameters: Any) -> tuple[Any, Nearness]:
        tiny = family("llama")
        recipe = {
            "merge_method": "task_arithmetic",
            "base_model": str(tiny.base),
            "models": [{"model": str(path)} for path in tiny.experts[:2]],
            "parameters": {"weight": 0.5, **parameters},
            "dtype": "float32",
        }
        return read(recipe).require(), Nearness(tiny.base, tuple(tiny.experts[:2]), wanted)

    return made


def space_of(budget: int, optimizer: Any = "cma", **dimensions: Dimension) -> Space:
    return Space(dimensions, Settings(optimizer=optimizer, budget=budget, seed=3))


def weighted(base: Path, weights: Mapping[Path, float]) -> dict[str, Any]:
    """A recipe whose experts have weights of their own."""
    models = [{"model": str(path), "parameters": {"weight": weight}} for path, weight in weights.items()]
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": models,
        "dtype": "float32",
    }


def told(found: Found, name: str) -> float:
    return float(found.best.values[name])


def test_a_weight_for_each_expert_is_found(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((0.9, 0.2), (0.9, 0.2))
    space = space_of(40, weight=Dimension(low=0.0, high=1.5, per="expert"))
    found = search(recipe, space, scorer, tmp_path / "out")
    assert told(found, "weight[0]") == pytest.approx(0.9, abs=0.15)
    assert told(found, "weight[1]") == pytest.approx(0.2, abs=0.15)
    assert found.trials[0].values == {"weight[0]": 0.5, "weight[1]": 0.5}, "the recipe as it was comes first"
    assert found.best.worth > found.trials[0].worth
    assert found.gain.difference.value > 0
    written = read(tmp_path / "out" / BEST).require()
    assert written == read(dict(found.recipe)).require(), "what is written is what was found"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [BEST, TRIALS]


def test_a_weight_for_each_layer_and_expert(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((1.0, 0.0), (0.0, 1.0))
    space = space_of(60, weight=Dimension(low=-0.5, high=1.5, per="expert", anchors="layers"))
    found = search(recipe, space, scorer, tmp_path)
    assert set(found.best.values) == {"weight[0]@0", "weight[0]@1", "weight[1]@0", "weight[1]@1"}
    assert found.best.worth > found.trials[0].worth + 0.1
    models = yaml.safe_load((tmp_path / BEST).read_text())["models"]
    assert len(models[0]["parameters"]["weight"]) == 2, "the layers' values are a gradient of the recipe"


def test_choices_are_tried(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((0.9, 0.9), (0.9, 0.9))
    space = space_of(12, "random", weight=Dimension(choices=(0.1, 0.5, 0.9)))
    found = search(recipe, space, scorer, tmp_path)
    assert found.best.values == {"weight": 0.9}
    assert {trial.values["weight"] for trial in found.trials} == {0.1, 0.5, 0.9}


@pytest.mark.parametrize("optimizer", ["cma", "ngopt"])
def test_nothing_is_tried_twice(make: Any, tmp_path: Path, optimizer: str) -> None:
    recipe, scorer = make((0.9, 0.9), (0.9, 0.9))
    found = search(recipe, space_of(6, optimizer, weight=Dimension(low=0.0, high=1.5)), scorer, tmp_path)
    assert len({trial.values["weight"] for trial in found.trials}) == len(found.trials) == 6


def test_where_nothing_new_is_left_scores_are_reused(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((0.9, 0.9), (0.9, 0.9))
    space = space_of(8, "random", weight=Dimension(choices=(0.1, 0.5)))
    found = search(recipe, space, scorer, tmp_path)
    assert scorer.calls == 2 + (1 if found.best.number == 0 else 2)
    assert [trial.number for trial in found.trials] == list(range(8))
    assert len({(trial.values["weight"], trial.worth) for trial in found.trials}) == 2


def test_a_search_that_was_stopped_goes_on(make: Any, tmp_path: Path) -> None:
    space = space_of(12, weight=Dimension(low=0.0, high=1.5, per="expert"))
    recipe, scorer = make((0.9, 0.2))
    whole = search(recipe, space, scorer, tmp_path / "whole")
    recipe, stopped = make((0.9, 0.2))
    stopped.stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        search(recipe, space, stopped, tmp_path / "part")
    lines = (tmp_path / "part" / TRIALS).read_bytes()
    (tmp_path / "part" / TRIALS).write_bytes(lines + b'{"number": 5, "val')  # torn by the kill
    recipe, again = make((0.9, 0.2))
    found = search(recipe, space, again, tmp_path / "part")
    assert again.calls == 12 - 5 + 2, "what was tried is not tried again; two calls are of the test rows"
    assert [trial.values for trial in found.trials] == [trial.values for trial in whole.trials]
    assert (tmp_path / "part" / BEST).read_text() == (tmp_path / "whole" / BEST).read_text()


def test_trials_of_another_search_are_refused(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((0.9, 0.2))
    search(recipe, space_of(2, weight=Dimension(low=0.0, high=1.0)), scorer, tmp_path)
    with pytest.raises(OutputError, match="another recipe, space or set of tasks"):
        search(recipe, space_of(3, weight=Dimension(low=0.0, high=1.0)), scorer, tmp_path)


def test_a_file_that_holds_no_trials_is_left_alone(make: Any, tmp_path: Path) -> None:
    (tmp_path / TRIALS).write_text("my own notes\nand more\n")
    recipe, scorer = make((0.9, 0.2))
    with pytest.raises(OutputError, match="line 1 holds no trial"):
        search(recipe, space_of(2, weight=Dimension(low=0.0, high=1.0)), scorer, tmp_path)
    assert (tmp_path / TRIALS).read_text() == "my own notes\nand more\n"


def test_the_recipe_as_it_was_wins_a_tie(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((0.5, 0.5))
    found = search(recipe, space_of(6, weight=Dimension(low=0.0, high=1.0)), scorer, tmp_path)
    assert found.best.number == 0
    lead = found.gain.difference
    assert (lead.value, lead.low, lead.high) == (0, 0, 0)
    assert all(one == other for one, other in found.test.values())


@pytest.mark.parametrize("best", ["recipe", "nearest"])
@pytest.mark.parametrize("dimension", [Dimension(low=0.2, high=0.3), Dimension(choices=(0.3, 0.2))])
def test_a_recipe_that_is_no_point_of_the_space(
    make: Any, tmp_path: Path, best: str, dimension: Dimension
) -> None:
    """Its weights are 0.9 and 0.1, and one weight for both is searched; it is merged and kept as it is."""
    wanted = (0.9, 0.1) if best == "recipe" else (0.3, 0.3)
    _, scorer = make(wanted, wanted)
    recipe = read(weighted(scorer.base, dict(zip(scorer.experts, (0.9, 0.1), strict=True)))).require()
    found = search(recipe, space_of(2, "random", weight=dimension), scorer, tmp_path)
    assert [dict(trial.values) for trial in found.trials] == [{}, {"weight": 0.3}]
    kept = read(tmp_path / BEST).require()
    was, now = found.test["near"]
    if best == "recipe":
        assert found.best.number == 0
        assert kept == recipe
        assert was == now == pytest.approx(1.0)
    else:
        assert found.best.number == 1
        assert now == pytest.approx(1.0)
        assert was < 0.9
        assert found.gain.difference.value == pytest.approx(now - was)


def test_trials_of_other_weights_are_refused(make: Any, tmp_path: Path, clone: Any) -> None:
    _, scorer = make((0.9, 0.2))
    copy = clone(scorer.experts[1])
    plain = weighted(scorer.base, {scorer.experts[0]: 0.5, copy: 0.5})
    space = space_of(2, weight=Dimension(low=0.0, high=1.0))
    search(read(plain).require(), space, scorer, tmp_path / "out")
    weights = load_file(copy / "model.safetensors")
    weights[TENSOR.format(0)] += 1.0
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(OutputError, match="other weights or rows"):
        search(read(plain).require(), space, scorer, tmp_path / "out")


def test_other_answers_are_other_tasks() -> None:
    from mixmerge.data.rows import Row
    from mixmerge.evaluate.task_file import EvalTask, TaskSpec
    from mixmerge.searching.scoring import TaskScorer

    spec = TaskSpec(name="t", data="rows.jsonl", metric="exact")
    known = [
        TaskScorer([EvalTask(spec, tuple(Row(prompt=f"question {at}", answer=answer) for at in range(20)))])
        for answer in ("yes", "no", "yes")
    ]
    assert known[0].identity == known[2].identity != known[1].identity


def test_candidates_that_cannot_be_merged_are_noted(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((0.5, 0.5), normalize=True)
    space = space_of(4, "random", weight=Dimension(choices=(0.0, 0.5)))
    found = search(recipe, space, scorer, tmp_path)
    failed = [trial for trial in found.trials if trial.fault]
    assert failed
    assert all(trial.scores == {} and trial.values == {"weight": 0.0} for trial in failed)
    assert found.best.values == {"weight": 0.5}


def test_layers_by_hand(make: Any) -> None:
    recipe, _ = make((1.0, 1.0))
    space = space_of(
        2,
        weight=Dimension(low=0, high=1, per="expert", anchors=2),
        normalize=Dimension(choices=(True, False)),
    )
    found = slots(space, recipe, layers=5)
    names = ["weight[0]@0", "weight[0]@1", "weight[1]@0", "weight[1]@1", "normalize"]
    assert [slot.name for slot in found] == names
    plain = with_values(recipe, found, dict(zip(names, [0.1, 0.2, 0.3, 0.4, True], strict=True)))
    assert [model["parameters"]["weight"] for model in plain["models"]] == [[0.1, 0.2], [0.3, 0.4]]
    assert plain["parameters"]["normalize"] is True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("parameters: {}", "nothing is searched"),
        ("parameters: {wieght: {low: 0, high: 1}}", "Did you mean 'weight'"),
        ("parameters: {weight: {low: 1, high: 0}}", "low below its high"),
        ("parameters: {weight: {choices: [1]}}", "two different choices"),
        ("parameters: {weight: {low: 0, high: 1, log: true}}", "low above 0"),
        ("parameters: {density: {low: 0, high: 2}}", "0 to 1"),
        ("parameters: {lambda: {low: 0, high: 2, per: expert}}", "one value for the whole merge"),
        ("parameters: {normalize: {low: 0, high: 1}}", "it is no number"),
        ("parameters: {normalize: {choices: [1, 2]}}", "true and false"),
        ("parameters: {weight: {low: 0, high: 1}}\nbudget: 1", "greater than or equal to 2"),
        ("parameters: {weight: {low: 0, high: 1}}\nbudgte: 10", "Did you mean 'budget'"),
        ("parameters: {weight: {low: 0, high: 1}}\noptimizer: adam", "cma"),
    ],
)
def test_spaces_that_are_wrong(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(text)
    with pytest.raises(MixmergeError) as caught:
        read_space(path, METHODS["ties"])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("dimension", "words"),
    [
        ("{low: 0, high: 9}", r"it is a whole number. choices: \[...\]"),
        ("{choices: [1, 2.5]}", "2.5 is no value of it. whole numbers from 0 to 1e"),
    ],
)
def test_counts_are_searched_by_choices(dimension: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(f"parameters: {{steps: {dimension}}}")
    with pytest.raises(MixmergeError, match=words):
        read_space(path, METHODS["wudi"])
    path.write_text("parameters: {steps: {choices: [0, 300.0]}}")
    assert read_space(path, METHODS["wudi"]).dimensions["steps"].choices == (0, 300.0)


def test_the_journal_is_plain_json(make: Any, tmp_path: Path) -> None:
    recipe, scorer = make((0.9, 0.2))
    search(recipe, space_of(2, weight=Dimension(low=0.0, high=1.0)), scorer, tmp_path)
    head, first, _ = map(json.loads, (tmp_path / TRIALS).read_text().splitlines())
    assert set(head) == {"search"}
    assert (first["number"], first["values"]) == (0, {"weight": 0.5})
    assert set(first["scores"]) == {"near", "again"}


# --- the command


@pytest.fixture
def asked(zoo: Path, tmp_path: Path) -> list[str]:
    """Arguments of a small search over the zoo's experts."""
    from mixmerge.zoo import Zoo

    first, second = Zoo.open(zoo).tasks[:2]
    models = [{"model": str(zoo / "experts" / task)} for task in (first, second)]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(zoo / "base"), "models": models}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "parameters": {"weight": 0.5}}))
    (tmp_path / "space.yaml").write_text("{parameters: {weight: {low: 0, high: 1}}, budget: 3}")
    rows = [
        {
            "name": task,
            "data": str(zoo / "questions" / f"{task}.heldout.jsonl"),
            "metric": "exact",
            "max_new_tokens": 4,
        }
        for task in (first, second)
    ]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump({"tasks": rows}))
    return [
        *("search", *(str(tmp_path / name) for name in ("recipe.yaml", "space.yaml", "out"))),
        *("--eval", str(tmp_path / "tasks.yaml")),
    ]


def run(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from mixmerge.cli import app

    return CliRunner().invoke(app, arguments)


def test_the_command(asked: list[str], tmp_path: Path) -> None:
    done = run(*asked, "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["recipe"] == str(tmp_path / "out" / BEST)
    assert len((tmp_path / "out" / TRIALS).read_text().splitlines()) == 4
    assert read(Path(told["recipe"])).require().merge_method == "task_arithmetic"
    assert told["gain"]["low"] <= told["gain"]["value"] <= told["gain"]["high"]
    again = run(*asked)
    assert again.exit_code == 0
    assert "trial" in again.stdout
    assert "gain" in again.stdout


def test_rows_that_chose_a_recipe_are_not_evaluated(asked: list[str], tmp_path: Path) -> None:
    import mixmerge

    assert run(*asked, "--limit", "20").exit_code == 0
    best, tasks = tmp_path / "out" / BEST, tmp_path / "tasks.yaml"
    chosen_by = read(best).require().tuned_on
    assert 10 < len(chosen_by) < 30, "about half of 40 rows"
    mixmerge.merge(best, tmp_path / "merged")
    with pytest.raises(MixmergeError) as caught:
        mixmerge.evaluate_models([tmp_path / "merged"], tasks=tasks, limit=20)
    told = [int(str(fault).split("made with ")[1].split()[0]) for fault in caught.value.faults]
    assert sum(told) == len(chosen_by)
    copied = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "merged")}]}
    mixmerge.merge(copied, tmp_path / "of it")
    with pytest.raises(MixmergeError, match="made with"):
        mixmerge.evaluate_models([tmp_path / "of it"], tasks=tasks, limit=20)
    # The best recipe can be searched on, with the same division of the rows and with no other.
    again = [str(best) if one.endswith("recipe.yaml") else one for one in asked]
    again[3] = str(tmp_path / "more")
    assert run(*again, "--limit", "20").exit_code == 0
    again[3] = str(tmp_path / "other")
    other = run(*again, "--limit", "20", "--held-out", "0.8")
    assert other.exit_code == 2
    assert "recipe: was made with" in other.stderr


def test_rows_of_either_part_that_a_merge_uses_end_the_search_at_once(
    asked: list[str], tmp_path: Path
) -> None:
    from mixmerge.evaluate.task_file import read_tasks
    from mixmerge.searching.scoring import TaskScorer

    test = TaskScorer(read_tasks(tmp_path / "tasks.yaml", limit=20)).parts["test"][0]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": test.rows[0].prompt}) + "\n")
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    data = {"calibration": {"data": str(tmp_path / "rows.jsonl")}, "merge_method": "fisher", "parameters": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, **data}))
    (tmp_path / "space.yaml").write_text("{parameters: {weight: {low: 0.5, high: 1}}, budget: 3}")
    done = run(*asked, "--limit", "20")
    assert done.exit_code == 2
    assert "recipe: was made with 1 of the" in done.stderr
    assert len((tmp_path / "out" / TRIALS).read_text().splitlines()) == 1, "no trial was kept"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--objective", "best"], "--objective: is 'best'. average, worst"),
        (["--held-out", "1"], "held_out: is 1. Above 0, below 1"),
        (["--limit", "2"], "2 or more"),
    ],
)
def test_the_command_refuses(asked: list[str], more: list[str], words: str, tmp_path: Path) -> None:
    done = run(*asked, *more)
    assert done.exit_code == 2
    assert words in done.stderr
    assert not (tmp_path / "out").exists()
