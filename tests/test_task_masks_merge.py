"""PCB, EMR, TALL, Consensus and MagMax on folders: streamed as in memory, by any number of threads; faults."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import pytest
import torch
from torch import Tensor

import mixmerge
from mixmerge.errors import RecipeError
from mixmerge.methods import METHODS
from mixmerge.methods.memory import apply
from mixmerge.methods.sketch import Group, add
from mixmerge.registry import load

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("pcb", {"density": 0.2}),
    ("pcb", {"inter": "prod", "clamp": 0.0001}),
    ("pcb", {"inter": "pairwise"}),
    ("pcb", {"inter": "softmax"}),
    ("emr", {"task": 1}),
    ("emr", {"task": 0, "rescaler": "means"}),
    ("tall", {"task": 1}),
    ("tall", {"task": 0, "multi": "ties"}),
    ("consensus", {"mask_lambda": 0.3}),
    ("consensus", {"multi": "ties", "least": 1}),
    ("magmax", {"weight": 0.8}),
]


def recipe_of(method: str, parameters: dict[str, Any], base: Path, experts: Sequence[Path]) -> dict[str, Any]:
    models = [{"model": str(path)} for path in experts]
    return {"merge_method": method, "base_model": str(base), "models": models, "parameters": parameters}


@pytest.mark.parametrize(("method", "parameters"), VARIANTS, ids=str)
def test_streamed_as_in_memory(
    family: Any, method: str, parameters: dict[str, Any], tmp_path: Path, read_tensors: Any
) -> None:
    made = family("llama", experts=3)
    recipe = recipe_of(method, parameters, made.base, made.experts)
    folders = [read_tensors(path) for path in (made.base, *made.experts)]
    expected = mixmerge.merge_state_dicts(method, folders[1:], base=folders[0], parameters=parameters)
    for threads in (1, 3):
        mixmerge.merge(recipe, tmp_path / str(threads), threads=threads)
        found = read_tensors(tmp_path / str(threads))
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
    assert [name for name, tensor in expected.items() if not torch.equal(folders[0][name], tensor)] != []


def test_one_task_each(family: Any, tmp_path: Path, read_tensors: Any, assert_loads: Any) -> None:
    """EMR's model of a task is far nearer to its expert than to the others."""
    made = family("bert", experts=3)
    experts = [read_tensors(path) for path in made.experts]
    for task in range(3):
        mixmerge.merge(recipe_of("emr", {"task": task}, made.base, made.experts), tmp_path / str(task))
        assert_loads(tmp_path / str(task))
        found = read_tensors(tmp_path / str(task))
        apart = [sum(float((found[n] - x[n]).float().square().sum()) for n in found) for x in experts]
        assert min(apart) == apart[task]
        assert sorted(apart)[1] > 2 * apart[task]


class Lent(Sequence[Tensor]):
    """Tensors made anew whenever one is asked for, and how many of them were alive at once."""

    def __init__(self, count: int) -> None:
        self.count, self.most = count, 0
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: Any) -> Any:
        if index >= self.count:
            raise IndexError(index)
        made = torch.randn(50, 20, generator=torch.Generator().manual_seed(index))
        self.alive.add(made)
        self.most = max(self.most, len(self.alive))
        return made


@pytest.mark.parametrize(
    ("method", "parameters"),
    [variant for variant in VARIANTS if variant[1].get("inter") not in ("pairwise", "softmax")],
    ids=str,
)
def test_no_more_of_the_experts_is_held_for_more_of_them(method: str, parameters: dict[str, Any]) -> None:
    row, most = METHODS[method], {}
    assert row.streams
    for count in (3, 8):
        lent, base = Lent(count), torch.ones(50, 20)
        given = {
            p.name: value if p.per == "merge" else [value] * count
            for p in row.parameters
            if (value := parameters.get(p.name, p.default)) is not None
        }
        state = None
        if row.sketch:
            sketch = load(row.sketch)()
            for number in range(sketch.passes()):
                totals = add({}, sketch.observe(number, Group(lent, base, "linear", given), state))
                state = sketch.settle(number, totals, state)
        assert torch.isfinite(apply(row, lent, base=base, parameters=given, sketch=state)).all()
        most[count] = lent.most
    assert most[3] == most[8] <= 2


@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        (
            "emr",
            {},
            [
                "parameters.task",
                "emr needs task (position of the expert the model is for, from 0; all: a mask for each)",
            ],
        ),
        (
            "emr",
            {"task": 2},
            ["parameters.task", "is 2, and experts have positions 0 to 1", "0: ", "expert0, 1: "],
        ),
        ("tall", {"task": 0.5}, ["parameters.task", "is 0.5, and experts have positions 0 to 1"]),
        ("tall", {"task": -1}, ["-1 is out of range", "task is at least 0"]),
        ("tall", {"task": [0, 1]}, ["task may not change from tensor to tensor"]),
        ("pcb", {"density": [0.1, 0.2]}, ["density may not change from tensor to tensor"]),
        ("pcb", {"inter": "cosine"}, ["expected one of the known words", "norm, prod, pairwise, softmax"]),
    ],
    ids=str,
)
def test_faults_of_recipes(family: Any, method: str, parameters: dict[str, Any], words: list[str]) -> None:
    made = family("llama", experts=3)
    with pytest.raises(RecipeError) as error:
        mixmerge.make_plan(recipe_of(method, parameters, made.base, made.experts[:2]))
    for word in words:
        assert word in str(error.value)


def test_without_an_expert_no_position_is_asked_for(family: Any) -> None:
    made = family("llama")
    with pytest.raises(RecipeError) as caught:
        mixmerge.merge(recipe_of("emr", {"task": 0}, made.base, [made.base]), Path("unused"))
    said = [str(fault) for fault in caught.value.faults]
    assert len(said) == 1
    assert "emr takes at least 1 expert besides the base_model, and there are 0" in said[0]


def test_consensus_of_one(family: Any) -> None:
    made = family("llama", experts=3)
    with pytest.raises(
        RecipeError, match="consensus takes at least 2 experts besides the base_model, and there are 1"
    ):
        mixmerge.make_plan(recipe_of("consensus", {}, made.base, made.experts[:1]))
