"""One folder for all tasks (``task: all``): bit for bit what a merge for each task alone writes, at any time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixmerge
from mixmerge import TaskModel
from mixmerge.bank.mask_files import MaskFolder, read_mask_card
from mixmerge.bank.masks import MaskedTensor
from mixmerge.dynamic.task_engine import TaskEngine
from mixmerge.engines.records import Request, Scoring
from mixmerge.errors import MixmergeError, RecipeError

EXPERTS = ("expert0", "expert1", "expert2")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("emr", {}),
    ("emr", {"rescaler": "means", "lambda": [0.5, 1.5]}),
    ("tall", {}),
    ("tall", {"multi": "ties", "mask_lambda": 0.3}),
]
Family = Callable[..., Any]


def recipe_of(made: Any, method: str, task: int | str, **parameters: Any) -> dict[str, Any]:
    models = [{"model": str(path)} for path in made.experts]
    given = {"task": task, **parameters}
    return {"merge_method": method, "base_model": str(made.base), "models": models, "parameters": given}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(bits(found[name]), bits(value))]


def tensors_of(folder: Path, read_tensors: Any, task: int) -> dict[str, Tensor]:
    """All tensors of a task's model: those without masks are the base's."""
    opened, whole = MaskFolder(folder), read_tensors(folder)
    return whole | {name: opened.tensor(name, task) for name in opened.names}


@pytest.fixture(scope="module")
def merged(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Path]]:
    """Tiny Llamas, one folder for all tasks, and one for each."""
    made, place = family("llama", experts=3, dtype="float32"), tmp_path_factory.mktemp("tasks")
    mixmerge.merge(recipe_of(made, "emr", "all"), place / "all")
    for task in range(3):
        mixmerge.merge(recipe_of(made, "emr", task), place / str(task))
    return made, place / "all", [place / str(task) for task in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "parameters"), VARIANTS, ids=str)
def test_every_task_is_what_its_own_merge_writes(
    family: Family, method: str, parameters: dict[str, Any], dtype: str, tmp_path: Path, read_tensors: Any
) -> None:
    made = family("llama", experts=3, dtype=dtype)
    done = mixmerge.merge(recipe_of(made, method, "all", **parameters), tmp_path / "all")
    assert differing(read_tensors(tmp_path / "all"), read_tensors(made.base)) == []
    for task in range(3):
        mixmerge.merge(recipe_of(made, method, task, **parameters), tmp_path / str(task))
        wanted = read_tensors(tmp_path / str(task))
        assert differing(tensors_of(tmp_path / "all", read_tensors, task), wanted) == []
    # The delta, a bit a task and entry, a factor a task and tensor, and a header.
    base = read_tensors(made.base)
    elements, header = sum(one.numel() for one in base.values()), 400 * len(base) + 2000
    width = 2 if dtype == "bfloat16" and method == "emr" else 4
    assert done.masks <= elements * width + 3 * (elements / 8 + 1 + 4 * len(base)) + header
    assert done.plan.masks is not None
    assert done.masks <= done.plan.masks.nbytes + header


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_other_models(family: Family, name: str, tmp_path: Path, read_tensors: Any) -> None:
    """An encoder, whose tensors TaskModel finds under the names of its trunk; and one with transposed matrices."""
    made = family(name, experts=3)
    mixmerge.merge(recipe_of(made, "emr", "all"), tmp_path / "all")
    model = TaskModel.load(tmp_path / "all", dtype="auto")
    for task in (1, 0):
        mixmerge.merge(recipe_of(made, "emr", task), tmp_path / str(task))
        alone = type(model.model).from_pretrained(tmp_path / str(task), dtype="auto").state_dict()
        assert differing(model.task(EXPERTS[task]).state_dict(), alone) == []


def test_tasks_in_any_order_leave_no_trace(merged: Any) -> None:
    made, folder, alone = merged
    model = TaskModel.load(folder)
    kind = type(model.model)
    wanted: dict[str | None, Any] = {None: kind.from_pretrained(made.base).state_dict()}
    wanted |= {name: kind.from_pretrained(path).state_dict() for name, path in zip(EXPERTS, alone, strict=True)}
    assert model.tasks == EXPERTS
    for name in (None, "expert2", "expert0", "expert0", "expert1", None, "expert0", "expert2", "expert1", None):
        assert differing(model.task(name).state_dict(), wanted[name]) == []
    with pytest.raises(MixmergeError, match=r"has no task 'expert3'.*Did you mean|has no task 'expert3'"):
        model.task("expert3")


def test_a_switch_that_is_cut_short_is_made_again(merged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, alone = merged
    model = TaskModel.load(folder)
    tensor, calls = MaskFolder.tensor, []

    def killed(self: MaskFolder, name: str, task: int) -> Tensor:
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return tensor(self, name, task)

    monkeypatch.setattr(MaskFolder, "tensor", killed)
    with pytest.raises(KeyboardInterrupt):
        model.task("expert1")
    wanted = type(model.model).from_pretrained(alone[1]).state_dict()
    assert differing(model.task("expert1").state_dict(), wanted) == []
    with pytest.raises(KeyboardInterrupt):
        calls.clear()
        model.task("expert2")
    base = type(model.model).from_pretrained(folder).state_dict()
    assert differing(model.task(None).state_dict(), base) == []


def test_generation_by_task(merged: Any) -> None:
    made, folder, alone = merged
    prompts = ["a b c", "one two three four", "x", "the quick brown"]
    wanted = {}
    for name, path in ((None, made.base), *zip(EXPERTS, alone, strict=True)):
        wanted[name] = TaskEngineAlone(path).texts(prompts)
    model = TaskModel.load(folder)
    for name, texts in wanted.items():
        assert model.generate(prompts, task=name, max_new_tokens=6) == texts
    names: list[str | None] = ["expert1", None, "expert2", "expert1"]
    mixed = [wanted[name][at] for at, name in enumerate(names)]
    assert model.generate(prompts, task=names, max_new_tokens=6) == mixed
    assert len({tuple(texts) for texts in wanted.values()}) == 4


class TaskEngineAlone:
    """An ordinary folder behind the ordinary engine."""

    def __init__(self, folder: Path) -> None:
        from mixmerge.engines.local import TransformersEngine

        self.engine = TransformersEngine(str(folder), dtype="float32")

    def texts(self, prompts: list[str]) -> list[str]:
        return [one.text for one in self.engine.generate([Request(p, p, 6) for p in prompts])]


def test_the_engine(merged: Any) -> None:
    _, folder, alone = merged
    engine = TaskEngine(str(folder), adapters={"code": "expert2"}, task="expert0")
    assert engine.adapters == ("code", *EXPERTS)
    first, second = (TaskEngineAlone(alone[task]).engine for task in (0, 2))
    asked = [Request("0", "a b c", 6), Request("2", "a b c", 6, adapter="code")]
    wanted = [first.generate(asked[:1])[0].text, second.generate([Request("2", "a b c", 6)])[0].text]
    assert [one.text for one in engine.generate(asked)] == wanted
    # Two streams that take turns: each token is of its own task.
    streams, told = [engine.stream(one) for one in asked], ["", ""]
    live = [0, 1]
    while live:
        for at in list(live):
            chunk = next(streams[at], None)
            if chunk is None:
                live.remove(at)
            else:
                told[at] += chunk.text
    assert told == wanted
    (score,) = engine.loglikelihood([Scoring("s", "a b", " c d", "code")])
    (other,) = second.loglikelihood([Scoring("s", "a b", " c d")])
    assert score.total == pytest.approx(other.total, abs=1e-6)
    with pytest.raises(MixmergeError, match="takes no further adapters"):
        engine.add_adapter("new", "folder")
    with pytest.raises(MixmergeError, match="has no adapter 'four'"):
        engine.generate([Request("a", "a", adapter="four")])
    engine.unload()
    assert not engine.loaded
    with pytest.raises(MixmergeError) as error:
        TaskEngine(str(folder), adapters={"code": "five"}, task="six").load()
    assert "there is no task 'five'" in str(error.value)
    assert "there is no task 'six'" in str(error.value)


def test_two_tasks_in_one_mixture(merged: Any, tmp_path: Path, run_cli: Any) -> None:
    _, folder, alone = merged
    (tmp_path / "outcomes.jsonl").write_text(
        "".join(
            json.dumps({"prompt_id": str(at), "text": text, "expert": expert, "score": float(good)}) + "\n"
            for at, (text, right) in enumerate([("sort 3 1 2", "sort"), ("keep a b", "keep")] * 4)
            for expert in ("sort", "keep")
            for good in [expert == right]
        )
    )
    (tmp_path / "mixture.yaml").write_text(
        f"""experts:
  sort: {{adapter: expert0, base: {folder}, options: {{dtype: float32}}}}
  keep: {{adapter: expert2, base: {folder}, options: {{dtype: float32}}}}
router: {{kind: knn, outcomes: {tmp_path / "outcomes.jsonl"}, options: {{k: 1}}}}
generate: {{max_new_tokens: 6}}
"""
    )
    wanted = {
        text: TaskEngineAlone(alone[task]).texts([text])[0]
        for text, task in (("sort 3 1 2", 0), ("keep a b", 2), ("sort 5 4", 0))
    }
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps({"id": str(at), "prompt": text}) + "\n" for at, text in enumerate(wanted))
    )
    mixture = mixmerge.Mixture.load(tmp_path / "mixture.yaml")
    asked = {text: mixture.ask(text).text for text in wanted}
    assert asked == wanted
