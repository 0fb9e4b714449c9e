"""A router's second training, by the loss of its experts' tasks: what it learns, and what it never reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixmerge
from mixmerge.bank.attach import Attached
from mixmerge.bank.features import features_of
from mixmerge.bank.files import load_bank, load_gate, read_card
from mixmerge.bank.fitting import fit_gate
from mixmerge.bank.gate import Run
from mixmerge.bank.gates.refined import Refined, TaskTraining, Tensors
from mixmerge.bank.gates.router import Router, RouterOptions
from mixmerge.bank.gates.router_task import _of_classes, balance, label_faults
from mixmerge.bank.mix import apply, change
from mixmerge.bank.own_heads import Headed
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.data.rows import Row
from mixmerge.dynamic.model import DynamicModel
from mixmerge.engine.outlook import plan_with_data
from mixmerge.errors import MixmergeError, RecipeError
from mixmerge.experts.loading import load_expert, load_with_head

WORDS = ("red", "green", "blue")
TASK = {"epochs": 4, "batch": 8, "learning_rate": 1e-2, "hidden": 8, "patience": 4}


def bank_of(ranks: tuple[int, ...] = (2, 0, 1)) -> Bank:
    draw = torch.Generator().manual_seed(0)
    entries = [
        Entry(torch.randn(rank, 4, generator=draw), torch.randn(rank, 5, generator=draw)) if rank else None
        for rank in ranks
    ]
    names = (
        "model.layers.10.up.weight",
        "model.layers.2.up.weight",
        "model.layers.2.down.weight",
        "head.weight",
    )
    sites = {name: side_by_side(name, entries) for name in names}
    return Bank(("a", "b", "c"), sites, {"model.layers.2.up.bias": torch.randn(3, 5, generator=draw)})


def test_groups_are_layers_or_modules() -> None:
    layers = Tensors.of(bank_of(), "layer")
    assert layers.groups == {
        "model.layers.2.up.weight": 0,
        "model.layers.2.down.weight": 0,
        "model.layers.2.up.bias": 0,
        "model.layers.10.up.weight": 1,
        "head.weight": 2,
    }
    modules = Tensors.of(bank_of(), "site")
    assert modules.count == 4
    assert modules.groups["model.layers.2.up.bias"] == modules.groups["model.layers.2.up.weight"]
    assert Tensors.read(json.loads(json.dumps(layers.written()))).written() == layers.written()


def test_it_starts_as_the_router_and_adds_by_hand() -> None:
    refined = Refined(3, Tensors.of(bank_of(), "layer"), TaskTraining(hidden=2))
    router = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    assert torch.equal(refined.weights(router), router[:, None].expand(-1, 3, -1))
    site = "head.weight"
    found = refined.of_ranks(site, router)
    assert found is not None
    assert torch.equal(found, router[:, [0, 0, 2]])
    with torch.no_grad():
        refined.network[-1].bias.copy_(torch.arange(9.0))
        refined.factors[site].copy_(torch.tensor([1.0, 2.0, 3.0]))
    weights = refined.weights(router)
    # What top_k has put to 0 stays 0.
    torch.testing.assert_close(weights[0], torch.tensor([[0.5, 1.5, 0.0], [3.5, 4.5, 0.0], [6.5, 7.5, 0.0]]))
    of_ranks = refined.of_ranks(site, weights[1, 2][None])
    torch.testing.assert_close(of_ranks, torch.tensor([[6.1, 12.2, 26.1]]))


def test_executors_agree_on_weights_of_layers_and_ranks() -> None:
    bank = bank_of()
    gate = Router(
        3, 4, RouterOptions(hidden=0, task=TaskTraining(hidden=2)), tensors=Tensors.of(bank, "layer")
    )
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in gate.parameters():
            value.copy_(torch.randn(value.shape, generator=draw))
    query = gate.query(torch.randn(2, 4, generator=draw)).detach()
    run, u, y = Run(query), torch.randn(2, 3, 4, generator=draw), torch.randn(2, 3, 5, generator=draw)
    mixes = {name: gate.mix(name, u, run) for name in bank.sites}
    first, second = mixes["model.layers.2.up.weight"], mixes["model.layers.10.up.weight"]
    assert first is not None
    assert second is not None
    assert not torch.allclose(first.weights, second.weights)
    for name, mix in mixes.items():
        assert mix is not None
        wanted = y + change(bank.sites[name], u, mix)
        for executor in ("concat", "segmented", "gather"):
            torch.testing.assert_close(apply(bank.sites[name], u, y, mix, executor=executor), wanted)


def test_smoothing_spreads_over_the_classes_there_are() -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf")], [0.0, 1.0, 2.0]])
    labels = torch.tensor([1, 0])
    found = _of_classes(logits, labels, 0.1)
    wanted = [
        torch.nn.functional.cross_entropy(row[None], label[None], label_smoothing=0.1)
        for row, label in zip((logits[0, :2], logits[1]), labels, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(wanted))
    assert balance(torch.tensor([0, 0, 0, 1]), 2).tolist() == pytest.approx([2 / 3, 2.0])


@pytest.fixture(scope="module")
def classifiers(family: Any, tokenizer: Any, tmp_path_factory: Any) -> tuple[Path, list[Path]]:
    """Two trunks from one base with heads of two and of three classes."""
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path_factory.mktemp("classifiers")
    base = family("bert", experts=0, dtype="float32").base
    experts = []
    for number, classes in enumerate((2, 3)):
        torch.manual_seed(number)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.1 * torch.randn(value.shape))
        experts.append(folder / f"of{classes}")
        model.save_pretrained(experts[-1])
        tokenizer.save_pretrained(experts[-1])
    return base, experts


def own_labels(expert: Path, texts: list[str]) -> list[int]:
    """What an expert says itself: what its part and its head are for."""
    model = load_expert(expert)
    with torch.no_grad():
        asked = [model.model(**model.tokenizer(text, return_tensors="pt")).logits for text in texts]
    return [int(one.argmax()) for one in asked]


def recipe_of(classifiers: Any, folder: Path, *, labels: bool = True, **task: Any) -> dict[str, Any]:
    """Both experts have the same texts but for a few, and other labels for them."""
    base, experts = classifiers
    paths = {}
    for number, expert in enumerate(experts):
        same = [f"{WORDS[at % 3]} {at} {WORDS[at % 2]}" for at in range(40)]
        texts = [*same, *(f"{expert.name} {at}" for at in range(8))]
        rows: list[dict[str, Any]] = [{"text": text} for text in texts]
        if labels:
            for row, label in zip(rows, own_labels(expert, texts), strict=True):
                row["label"] = label
        paths[expert.name] = folder / f"rows{number}.jsonl"
        paths[expert.name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "merge_method": "twin",
        "base_model": str(base),
        "models": [{"model": str(expert)} for expert in experts],
        "parameters": {"rank": 8},
        "dtype": "float32",
        "gate": {"hidden": 0, "epochs": 3, "batch": 16, "task": {**TASK, **task}},
        "calibration": {"per_expert": {name: str(path) for name, path in paths.items()}},
    }


def logits_of(folder: Path, head: str, ids: Tensor, gate: Router, query: Tensor) -> Tensor:
    model = load_with_head(folder, head).model
    attached = Attached(model, load_bank(folder), gate)
    with torch.no_grad(), attached.running(Run(query)):
        found: Tensor = model(ids).logits
    attached.detach()
    return found


def test_classifiers_of_the_same_texts_each_get_more(classifiers: Any, tmp_path: Path) -> None:
    recipe = recipe_of(classifiers, tmp_path)
    _, outlook = plan_with_data(recipe)
    assert outlook is not None
    assert "the bank" in outlook.need.memory
    done = mixmerge.merge(recipe, tmp_path / "out")
    assert done.bank is not None
    report = json.loads((tmp_path / "out" / "bank" / "training.json").read_text())
    task = report["task"]
    assert done.bank.gate is not None
    assert list(done.bank.gate["task"]["losses"]) == task["losses"]
    assert task["losses"][task["epoch"]] == min(task["losses"])
    assert task["epoch"] > 0
    assert len(task["accuracies"]) == len(task["losses"])
    gate = load_gate(tmp_path / "out" / "bank", bank=read_card(tmp_path / "out").hash)
    assert isinstance(gate, Router)
    assert gate.refined is not None
    rows = [Row(text="red 3 green"), Row(text="blue 14 red of the")]
    shown = features_of(load_expert(tmp_path / "out"), rows)
    query = gate.query(shown.values).detach()
    assert float(query.view(2, -1, 2).sum(-1).max()) > 1  # not bound to sum to 1
    ids = torch.randint(5, 270, (2, 6), generator=torch.Generator().manual_seed(2))
    for head in ("of2", "of3"):
        together = logits_of(tmp_path / "out", head, ids, gate, query)
        for row in range(2):
            alone = logits_of(tmp_path / "out", head, ids[[row]], gate, query[[row]])
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)
    again = mixmerge.merge(recipe, tmp_path / "again")
    assert again.bank is not None
    for name in ("gate.json", "gate.safetensors", "training.json"):
        one, other = (tmp_path / folder / "bank" / name for folder in ("out", "again"))
        assert one.read_bytes() == other.read_bytes()


def test_every_row_goes_through_its_own_head(classifiers: Any, tmp_path: Path) -> None:
    recipe = {**recipe_of(classifiers, tmp_path), "gate": "none"}
    del recipe["calibration"]
    mixmerge.merge(recipe, tmp_path / "out")
    headed = Headed.load(tmp_path / "out", ["of2", "of3"])
    ids = torch.randint(5, 270, (3, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = headed.of([1, 0, 1]).model(ids).logits
        for rows, name in (([0, 2], "of3"), ([1], "of2")):
            wanted = load_with_head(tmp_path / "out", name).model(ids).logits[rows]
            torch.testing.assert_close(found[rows, : wanted.shape[1]], wanted)
    assert found[1, 2] == float("-inf")


def test_what_cannot_be_learned_from_is_said(classifiers: Any, tmp_path: Path) -> None:
    from transformers import AutoModel

    with pytest.raises(
        RecipeError, match=r"48 of 48 rows have no label, and gate\.task learns from what is right"
    ):
        plan_with_data(recipe_of(classifiers, tmp_path, labels=False))
    recipe = recipe_of(classifiers, tmp_path)
    bare = AutoModel.from_pretrained(classifiers[1][0])
    bare.save_pretrained(tmp_path / "of2")
    recipe["models"][0] = {"model": str(tmp_path / "of2")}
    with pytest.raises(RecipeError, match=r"of2: says no classes and no tokens"):
        plan_with_data(recipe)
    recipe = recipe_of(classifiers, tmp_path)
    recipe["gate"] |= {"per_token": True, "task": {"epochs": 0, "scoop": 1}}
    with pytest.raises(RecipeError) as caught:
        plan_with_data(recipe)
    told = str(caught.value)
    assert "gate.task.epochs: expected a number greater than or equal to 1" in told
    assert "unknown key 'scoop'" in told
    recipe["gate"] = {"task": 3}
    with pytest.raises(RecipeError, match=r"gate\.task: .*got 3"):
        plan_with_data(recipe)
    recipe["gate"] = {"per_token": True, "task": {"learning_rate": "1e-3"}}
    with pytest.raises(RecipeError, match="task: trains weights of whole prompts"):
        plan_with_data(recipe)
    faults = label_faults([Row(text="a", label=3)], "rows", classes=3)
    assert [str(fault) for fault in faults] == ["rows: has the label 3. The expert has classes 0 to 2."]


def test_language_models_learn_from_their_answers(family: Any) -> None:
    made = family("llama", dtype="float32")
    model, expert = load_expert(made.base), load_expert(made.experts[0])
    name = "model.layers.1.mlp.up_proj.weight"
    delta = (expert.model.get_parameter(name) - model.model.get_parameter(name)).detach()
    u, s, v = torch.linalg.svd(delta)
    entry = Entry(v[:4], (u[:, :4] * s[:4]).T)
    bank = Bank(("a", "b"), {name: side_by_side(name, [entry, entry])}, {})
    rows = {
        "a": [Row(prompt=f"say {at} ", answer="yes") for at in range(12)],
        "b": [Row(prompt=f"ask {at} ", answer="no") for at in range(12)],
    }
    said = {"hidden": 0, "epochs": 2, "batch": 8, "task": {**TASK, "epochs": 1}}
    steps: list[str] = []
    gate = fit_gate(
        "router", said, bank, model=model, rows=rows, progress=lambda what, *_: steps.append(what)
    )
    assert isinstance(gate, Router)
    assert "router, by task" in steps
    assert not any(value.requires_grad for value in gate.parameters())
    network = DynamicModel(model.model, model.tokenizer, bank, gate)
    (explained,) = network.explain(["say 3 "])
    assert set(explained.layers()) == {"1"}
    assert (
        network.generate(["say 3 ", "ask 5 7 "], max_new_tokens=3)[0]
        == network.generate(["say 3 "], max_new_tokens=3)[0]
    )
    network.detach()
    assert model.model.training is False
    with pytest.raises(MixmergeError, match=r"gate\.task: trains weights of whole prompts"):
        fit_gate("router", {**said, "per_token": True}, bank, model=model, rows=rows)


def test_no_token_to_predict_is_said(family: Any) -> None:
    model = load_expert(family("llama", experts=0, dtype="float32").base)
    rows = {name: [Row(prompt=f"{name} {at}", answer="") for at in range(4)] for name in ("a", "b", "c")}
    bank = Bank(("a", "b", "c"), {}, {})
    with pytest.raises(MixmergeError, match="none of 12 rows has a token to predict"):
        fit_gate("router", {"hidden": 0, "epochs": 1, "task": {}}, bank, model=model, rows=rows)


def test_options_are_those_of_the_recipe() -> None:
    from mixmerge.recipe.gate import TaskBlock

    assert TaskBlock().model_dump() == TaskTraining().model_dump()
    assert RouterOptions().task is None
