"""Coefficients learned from answers and labels: against plain autograd, and merges that learn, replay and refuse."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.calibrate import labelled
from mixmerge.calibrate.coefficients import CoefficientSpace
from mixmerge.calibrate.labelled import (
    Labelled,
    answer_loss,
    label_counts,
    label_loss,
    labelled_batches,
)
from mixmerge.calibrate.objectives import Schedule
from mixmerge.data.batches import Batch, make_batches
from mixmerge.data.rows import Row
from mixmerge.engine import learning as engine_learning
from mixmerge.engine.merge import merge
from mixmerge.engine.outlook import plan_with_data
from mixmerge.errors import MethodError, MixmergeError, RecipeError
from mixmerge.evaluate.leaks import read_made
from mixmerge.experts.loading import load_expert
from mixmerge.methods.coefficients import FILE, Coefficients, read_coefficients
from mixmerge.plan import make_plan

NAME = "adamerging_labels"
WORDS = ("sun", "rain", "snow", "wind", "fog", "hail")
ROWS = [{"prompt": f"{a} and {b}: ", "answer": f"{b} {a}"} for a in WORDS for b in WORDS[:2] if a != b]
Read = Callable[[Path], dict[str, Tensor]]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe(made: Any, folder: Path, shown: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    given = {"steps": 3, "rows": 10, "learning_rate": 0.05, "from_layer": 1, **options}
    return {
        "merge_method": NAME,
        "base_model": str(made.base),
        "models": [{"model": str(expert)} for expert in made.experts],
        "parameters": given,
        "calibration": {"data": write_rows(folder / "rows.jsonl", shown or ROWS), "batch_size": 4},
        "dtype": "float32",
    }


def learned_of(folder: Path) -> Coefficients:
    return read_coefficients((folder / FILE).read_text(), where="test")


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_shares_of_a_softmax() -> None:
    shapes = {"a": (2, 3), "b": (4,)}
    start = {"a": (0.5, 0.25, 0.25), "b": (1 / 3, 1 / 3, 1 / 3)}
    space = CoefficientSpace(transform="softmax", clamp="none", start=start)
    layout = space.layout(shapes, 3)
    free = space.free(layout.start).requires_grad_(True)
    assert free[1].tolist() == pytest.approx([0.5] * 3)  # as FusionBench starts them
    found = space.coefficients(free)
    torch.testing.assert_close(found, torch.tensor([start["a"], start["b"]], dtype=torch.float64))
    # the gradient of a share's input is the share times what its own gradient is above the mean one
    products = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    (found * products).sum().backward()
    wanted = [[0.5 * (1 - 2), 0.25 * (2 - 2), 0.25 * (4 - 2)], [-1 / 3, 2 / 3, -1 / 3]]
    assert free.grad is not None
    torch.testing.assert_close(free.grad, torch.tensor(wanted, dtype=torch.float64))
    moved = torch.tensor([[-9.0, 0.2, 7.0], [3.0, 3.0, 3.0]], dtype=torch.float64)
    assert space.coefficients(moved).sum(1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("clamp", ["project", "dead"])
def test_inputs_of_a_softmax_in_bounds(clamp: Any) -> None:
    space = CoefficientSpace(transform="softmax", clamp=clamp, start=(0.5, 0.5))
    space.layout({"a": (2,)}, 2)
    free = torch.tensor([[-3.0, 8.0]], dtype=torch.float64)
    space.project(free)
    assert (free.tolist() == [[0.0, 1.0]]) == (clamp == "project")
    assert space.coefficients(free)[0].tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)])
    with pytest.raises(
        MethodError, match=r"by inputs of the softmax \(1\.09, -1\.11\) that are out of bounds"
    ):
        CoefficientSpace(transform="softmax", clamp=clamp, start=(0.9, 0.1)).layout({"a": (2,)}, 2)


def test_starts_that_are_no_shares() -> None:
    for start in ((0.0, 1.0), (0.5, 0.6), (-0.5, 1.5)):
        with pytest.raises(MethodError, match="shares above 0 that add up to 1"):
            CoefficientSpace(transform="softmax", start=start).layout({"a": (2,), "b": (1,)}, 2)
    with pytest.raises(MethodError, match="whose share is always 1: there is nothing to learn"):
        CoefficientSpace(transform="softmax", start=1.0).layout({"a": (2,)}, 1)


def test_cross_entropy_by_torch(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model's own loss over two batches, whatever the number of positions that have logits at once."""
    expert = load_expert(family("llama", dtype="float32").base)
    rows = [Row(prompt=row["prompt"], answer=row["answer"]) for row in ROWS[:5]] + [Row(text="plain words")]
    batches = labelled_batches(rows, expert.tokenizer, task="causal", max_tokens=64, batch_size=4)
    (whole,) = make_batches(rows, expert.tokenizer, batch_size=6)
    labels = whole.input_ids.masked_fill(~whole.loss_mask, -100)
    with torch.no_grad():
        wanted = expert.model(**whole.inputs(), labels=labels).loss.item()
        for places in (256, 3):
            monkeypatch.setattr(labelled, "POSITIONS", places)
            objective = Labelled(
                lambda _, number: answer_loss(expert.model, batches[number]),
                [label_counts(batches)],
                [[batch.tokens for batch in batches]],
                Schedule((2,), each=2),
            )
            assert sum(map(float, objective.losses(0))) == pytest.approx(wanted, rel=1e-5)
    assert sum(label_counts(batches)) == int((labels[:, 1:] != -100).sum())


def test_classes_by_hand() -> None:
    ones = torch.ones(2, 1, dtype=torch.int64)
    batch = Batch(ones, ones, torch.zeros(2, 1, dtype=torch.bool), torch.tensor([0, 1]), (0, 1))
    logits = torch.tensor([[math.log(3.0), 0.0], [math.log(3.0), 0.0]])
    assert label_loss(logits, batch).item() == pytest.approx(-math.log(0.75) - math.log(0.25))
    assert label_counts([batch]) == [2]


def shown(tokenizer: Any) -> tuple[Batch, Tensor]:
    """All rows, and the labels of transformers."""
    rows = [Row(prompt=row["prompt"], answer=row["answer"]) for row in ROWS]
    (batch,) = make_batches(rows, tokenizer, batch_size=99)
    return batch, batch.input_ids.masked_fill(~batch.loss_mask, -100)


def learned_by_autograd(made: Any, read_tensors: Read, steps: int, rate: float, soft: bool) -> dict[str, Any]:
    """Coefficients of the layers' tensors, merged inside of autograd; the loss is the model's own."""
    expert = load_expert(made.base)
    base, *others = (read_tensors(folder) for folder in (made.base, *made.experts))
    batch, labels = shown(expert.tokenizer)
    learned = [name for name in base if ".layers.1." in name and "self_attn" not in name]
    averaged = [name for name in base if ".layers." in name and name not in learned]
    free = {name: torch.full((2,), 0.5, dtype=torch.float64, requires_grad=True) for name in learned}
    optimiser = torch.optim.Adam(free.values(), lr=rate)

    def shares(name: str) -> Tensor:
        return torch.softmax(free[name], 0) if soft else free[name]

    for _ in range(steps):
        merged = dict(base)
        for name in (*learned, *averaged):
            each = shares(name).float() if name in learned else torch.tensor([0.5, 0.5])
            merged[name] = base[name] + sum(
                w * (one[name] - base[name]) for w, one in zip(each, others, strict=True)
            )
        out = torch.func.functional_call(expert.model, merged, kwargs={**batch.inputs(), "labels": labels})
        optimiser.zero_grad()
        (2 * out.loss).backward()  # of both experts, who have the same rows here
        optimiser.step()
    return {name: shares(name).tolist() for name in learned}


@pytest.mark.parametrize("transform", ["softmax", "none"])
def test_steps_are_those_of_plain_autograd(
    family: Any, tmp_path: Path, read_tensors: Read, transform: str
) -> None:
    made = family("llama", experts=2, dtype="float32")
    learned = merge(recipe(made, tmp_path, transform=transform), tmp_path / "out").learned
    assert learned is not None
    wanted = learned_by_autograd(made, read_tensors, 3, 0.05, transform == "softmax")
    assert set(wanted) == set(learned.weights) - set(learned.frozen)
    for name, values in wanted.items():
        assert learned.weights[name][0] == pytest.approx(values, abs=2e-6), name
    assert learned.start == pytest.approx((0.5, 0.5))
    assert learned.moved() > 0.01


def test_what_is_not_learned(family: Any, tmp_path: Path, read_tensors: Read) -> None:
    """To the bit: attention and the first layer as the mean, the rest as the base, the model as said."""
    made = family("llama", experts=2, dtype="float32")
    asked = recipe(made, tmp_path, steps=1)
    done = merge(asked, tmp_path / "out")
    mean = {**asked, "merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}
    del mean["calibration"]
    merge(mean, tmp_path / "mean")
    base, half, out = (read_tensors(folder) for folder in (made.base, tmp_path / "mean", tmp_path / "out"))
    assert done.learned is not None
    for name, value in out.items():
        learned = ".layers.1." in name and "self_attn" not in name
        assert (name in done.learned.frozen) != learned, name
        if not learned:
            assert torch.equal(value, half[name] if ".layers." in name else base[name]), name
        else:
            assert not torch.equal(value, half[name]), name
    for options, count in (
        ({"average_attention": False}, 9),
        ({"from_layer": 0.5}, 5),
        ({"from_layer": 0.3}, 10),
        ({"from_layer": 0, "average_attention": False}, 18),
        ({"learn": [{"filter": "up_proj", "value": "none"}, {"value": "all"}]}, 4),
    ):
        plan = make_plan(recipe(made, tmp_path, **options))
        assert sum(task.parameters["learn"] != "none" for task in plan.tasks) == count, options
    plan = make_plan(recipe(made, tmp_path, outside="mean", weight=3.0))
    assert {task.parameters["weight"] for task in plan.tasks} == {(0.5, 0.5)}
    uneven = recipe(made, tmp_path)
    uneven["models"][0]["parameters"] = {"weight": 1.5}
    assert {task.parameters["weight"] for task in make_plan(uneven).tasks} == {(0.75, 0.25), (0.0, 0.0)}


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "gpt_neox", "mixtral"])
def test_layers_and_attention_of_other_models(family: Any, tmp_path: Path, name: str) -> None:
    plan = make_plan(recipe(family(name, experts=2, dtype="float32"), tmp_path))
    named = {
        task.target.name: (task.parameters["learn"], task.parameters["weight"])
        for task in plan.tasks
        if not task.copied
    }
    in_layers = [one for one in named if ".0." in one.split("experts")[0] or ".1." in one.split("experts")[0]]
    assert all(named[one] == ("none", (0.0, 0.0)) for one in named if one not in in_layers)
    attends = [one for one in in_layers if any(part in one for part in ("attn.", "attention."))]
    assert attends
    assert {named[one] for one in attends} == {("none", (0.5, 0.5))}
    learned = {one for one in in_layers if named[one][0] == "all"}
    assert any("norm" in one or "ln_1" in one for one in learned)
    assert learned.isdisjoint(attends)
    assert len(learned) == len([one for one in in_layers if one not in attends]) // 2


def taught(base: Path, folder: Path) -> tuple[Path, float]:
    """An expert whose layers were trained on the answers, and its loss."""
    expert = load_expert(base)
    batch, labels = shown(expert.tokenizer)
    layers = [value for name, value in expert.model.named_parameters() if ".layers." in name]
    for value in layers:
        value.requires_grad_(True)
    optimiser = torch.optim.Adam(layers, lr=0.01)
    for _ in range(20):
        optimiser.zero_grad()
        expert.model(**batch.inputs(), labels=labels).loss.backward()
        optimiser.step()
    expert.model.save_pretrained(folder)
    expert.tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return folder, float(expert.model(**batch.inputs(), labels=labels).loss)


def test_a_merge_that_learns_and_replays(
    family: Any, tmp_path: Path, assert_loads: Callable[[Path], Any]
) -> None:
    found = family("llama", experts=2, dtype="float32")
    knowing, loss = taught(found.base, tmp_path / "taught")
    made = dataclasses.replace(found, experts=[found.experts[0], knowing])
    asked = recipe(made, tmp_path, steps=12, learning_rate=0.3, average_attention=False, from_layer=0)
    seen: list[tuple[int, int, float]] = []
    learned = merge(asked, tmp_path / "out", learning=lambda *now: seen.append(now)).learned
    assert learned == learned_of(tmp_path / "out")
    assert learned is not None
    assert learned.losses == tuple(loss for _, _, loss in seen)
    assert learned.losses[-1] < learned.losses[0] - 0.05
    assert learned.losses[-1] == pytest.approx(2 * loss, rel=2e-3)  # nearly all of the expert that knows
    assert not learned.warnings
    rows = [each[0] for name, each in learned.weights.items() if name not in learned.frozen]
    assert all(sum(row) == pytest.approx(1.0) and min(row) > 0 for row in rows)
    assert sum(row[1] for row in rows) > 0.6 * len(rows)
    assert_loads(tmp_path / "out")
    assert (tmp_path / "out" / engine_learning.HEAT_MAP).read_bytes()[:4] == b"\x89PNG"
    used = read_made(tmp_path / "out").rows
    assert len(used) == len(ROWS)
    again = {key: value for key, value in asked.items() if key != "calibration"}
    again["coefficients"] = str(tmp_path / "out" / FILE)
    again["parameters"] = {}
    for method in (NAME, "task_arithmetic"):
        merge({**again, "merge_method": method}, tmp_path / method)
        assert same_weights(tmp_path / method, tmp_path / "out")
        assert read_made(tmp_path / method).rows == used


def test_the_order_of_rows_in_batches_is_nothing(family: Any, tmp_path: Path) -> None:
    """A step's mean is over its tokens: answers of many batches count as those of one."""
    made = family("llama", experts=2, dtype="float32")
    uneven = [*ROWS[:6], {"text": "so much plain text that it has more tokens"}]
    found = []
    for size in (2, 7):
        asked = recipe(made, tmp_path, uneven, steps=1, rows=8)
        asked["calibration"]["batch_size"] = size
        learned = merge(asked, tmp_path / f"out{size}").learned
        assert learned is not None
        found.append(learned.losses[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_plan_says_what_it_takes(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    _, outlook = plan_with_data(recipe(made, tmp_path))
    assert outlook is not None
    assert outlook.work == "learning"
    assert [seen.rows for seen in outlook.experts] == [10, 10]
    assert all(seen.tokens for seen in outlook.experts)
    assert {"model", "logits", "activations"} <= set(outlook.need.memory)
    assert outlook.need.disk == 0


def test_rows_without_answers(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    prompts = [*ROWS[:2], {"prompt": "and now? "}, {"prompt": "one of? ", "choices": ["a", "b"]}]
    for work in (plan_with_data, lambda asked: merge(asked, tmp_path / "out")):
        with pytest.raises(RecipeError, match="2 of 4 rows have a prompt and no answer") as caught:
            work(recipe(made, tmp_path, prompts))
        assert "Add answers, or use expert_merging" in str(caught.value)
        assert str(tmp_path / "rows.jsonl") in str(caught.value)
    long = [{"prompt": "z" * 80, "answer": "y"}, {"prompt": "x" * 70, "answer": "y"}]
    with pytest.raises(MixmergeError, match="none of 2 rows has an answer that begins within 64 tokens"):
        merge(recipe(made, tmp_path, long), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    chosen = {"prompt": "one of? ", "choices": ["a", "b"], "label": 1}
    learned = merge(recipe(made, tmp_path, [*ROWS[:2], chosen, long[0]]), tmp_path / "out").learned
    assert learned is not None
    assert [said.partition(": ")[2] for said in learned.warnings] == [
        "1 of 4 rows are left out: no token of an answer fits in max_tokens"
    ] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"from_layer": 2}, "from_layer: is 2, and the model has 2 layers: none is left to learn"),
        ({"from_layer": 1.5}, "from_layer: is 1.5, which is neither a share of the layers nor a number"),
        ({"from_layer": -1}, "from_layer"),
        ({"weight": 0.0}, "the weights of all experts are 0"),
        ({"weight": -0.5}, "weight"),
        ({"transform": "sigmoid"}, "transform"),
        ({"transform": "none", "weight": 1.5, "clamp": "project"}, "out of bounds. From 0 to 1"),
        ({"steps": 0}, "steps"),
    ],
)
def test_values_that_will_not_do(family: Any, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    made = family("llama", experts=2, dtype="float32")
    with pytest.raises(RecipeError) as caught:
        plan_with_data(recipe(made, tmp_path, **options))
    assert len(caught.value.faults) == 1
    assert message in str(caught.value)


def test_nothing_to_learn(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    one = recipe(made, tmp_path)
    one["models"] = one["models"][:1]
    with pytest.raises(RecipeError, match="takes at least 2 experts"):
        plan_with_data(one)
    none = recipe(made, tmp_path)
    none["models"][0]["parameters"] = {"weight": 0.0}
    with pytest.raises(RecipeError, match="shares above 0 that add up to 1"):
        plan_with_data(none)
    with pytest.raises(MethodError, match="no tensor has coefficients that are learned"):
        merge(recipe(made, tmp_path, learn="none"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_without_the_outputs(family: Any, tmp_path: Path) -> None:
    made = family("bert", experts=2, dtype="float32")
    with pytest.raises(RecipeError, match="has no head, and labels are held against its predictions"):
        plan_with_data(recipe(made, tmp_path))


def classifier(
    base: Path, folder: Path, tokenizer: Any, *, labels: int, seed: int, problem: str | None = None
) -> Path:
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=labels)
    model.config.problem_type = problem
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_classifiers_learn_from_labels(family: Any, tmp_path: Path, tokenizer: Any) -> None:
    made = family("bert", experts=2, dtype="float32")
    experts = [classifier(made.base, tmp_path / str(n), tokenizer, labels=2 + n, seed=n) for n in range(2)]
    texts = [f"{a} or {b}" for a in WORDS for b in WORDS[:2]]
    files = {
        str(folder): write_rows(
            tmp_path / f"{at}.jsonl", [{"text": text, "label": n % (2 + at)} for n, text in enumerate(texts)]
        )
        for at, folder in enumerate(experts)
    }
    asked = recipe(made, tmp_path, rows=12, steps=10, learning_rate=0.2)
    asked["models"] = [{"model": folder} for folder in files]
    asked["calibration"] = {"per_expert": files, "batch_size": 6}
    learned = merge(asked, tmp_path / "out").learned
    assert learned is not None
    assert learned.losses[-1] < learned.losses[0]
    assert learned.weights["embeddings.word_embeddings.weight"] == ((0.0, 0.0),)
    more = {**asked, "calibration": {"data": files[str(experts[1])]}}
    with pytest.raises(MixmergeError, match="a row has label 2, and its head tells 2 classes apart"):
        merge(more, tmp_path / "refused")
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": text} for text in texts])
    with pytest.raises(RecipeError, match="12 of 12 rows have no label"):
        merge({**asked, "calibration": {"data": plain}}, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    for labels, problem, message in (
        (1, None, "gives numbers, a regression or a single class, and a label is one of several"),
        (3, "multi_label_classification", "says of each class whether it is there"),
    ):
        other = classifier(
            made.base, tmp_path / f"other{labels}", tokenizer, labels=labels, seed=5, problem=problem
        )
        asked["models"][1] = {"model": str(other)}
        asked["calibration"] = {"data": files[str(experts[0])]}
        with pytest.raises(RecipeError, match=message):
            plan_with_data(asked)


def test_pruned_matrices_are_a_step_before(family: Any, tmp_path: Path, read_tensors: Read) -> None:
    """What the released code has ``sparsity_ratio`` for: the largest of each matrix's delta, all of the norms'."""
    made = family("llama", experts=2, dtype="float32")
    one = {
        "merge_method": "breadcrumbs",
        "base_model": str(made.base),
        "models": [{"model": str(made.experts[0]), "parameters": {"weight": 1.0, "gamma": 0.0}}],
        "parameters": {"density": [{"filter": "norm", "value": 1.0}, {"value": 0.25}]},
        "dtype": "float32",
    }
    merge(one, tmp_path / "pruned")
    base, expert, pruned = map(read_tensors, (made.base, made.experts[0], tmp_path / "pruned"))
    for name, value in base.items():
        delta = expert[name] - value
        if value.ndim > 1:
            least = delta.abs().flatten().sort(descending=True).values[delta.numel() // 4 - 1]
            delta = torch.where(delta.abs() >= least, delta, 0.0)
        torch.testing.assert_close(pruned[name], value + delta, atol=1e-6, rtol=1e-5)
    asked = recipe(made, tmp_path, steps=1)
    asked["models"][0] = {"model": str(tmp_path / "pruned")}
    assert merge(asked, tmp_path / "out").learned is not None


def test_norms_beside_attention_are_learned(tmp_path: Path) -> None:
    """As Falcon and BERT name them: a norm before or after attention is none of its parts, unless it is inside."""
    from safetensors.torch import save_file

    learned = ("ln_attn", "ln_mlp", "post_attention_layernorm", "self_attn_layer_norm", "mlp.up")
    averaged = ("self_attention.dense", "self_attn.q_norm", "attention.output.LayerNorm", "linear_attn.a")
    names = [f"model.h.1.{part}.weight" for part in (*learned, *averaged)]
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_file({name: torch.full((2,), float(number)) for name in names}, folder / "model.safetensors")
        (folder / "config.json").write_text(
            '{"model_type": "falcon", "architectures": ["FalconForCausalLM"]}'
        )
    made = SimpleNamespace(base=tmp_path / "0", experts=[tmp_path / "1", tmp_path / "2"])
    plan = make_plan(recipe(made, tmp_path))
    found = {task.target.name for task in plan.tasks if task.parameters["learn"] == "all"}
    assert found == {f"model.h.1.{part}.weight" for part in learned}
