"""Twins of classifiers whose heads are alike: a head comes with the request, so the bank changes the trunk alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.dynamic.model import DynamicModel
from mixmerge.engine.merge import merge
from mixmerge.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
HEAD = ("classifier.weight", "classifier.bias")
TEXTS = ["a b c", "one two three four"]


def classifier() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=280, max_position_embeddings=64, **SIZES))


def changed(model: Any, seed: int, part: Callable[[str], bool] = lambda name: True) -> Any:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if part(name):
                value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return model.eval()


def written(tmp_path: Path, tokenizer: Any, *, adapters: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A recipe, and each expert as its own library runs it."""
    import peft

    torch.manual_seed(0)
    base, paths, models = tmp_path / "base", [], {}
    classifier().save_pretrained(base)
    tokenizer.save_pretrained(base)
    for seed, name in enumerate(("first", "second"), start=1):
        folder = tmp_path / name
        model = classifier()
        model.load_state_dict(type(model).from_pretrained(base).state_dict())
        if adapters:
            config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"])
            model = peft.get_peft_model(model, config)
            changed(model, seed, lambda key: "lora_" in key or "modules_to_save" in key)
        else:
            changed(model, seed)
        model.save_pretrained(folder)
        models[name] = model
        paths.append(f"{base}+{folder}" if adapters else str(folder))
        if not adapters:
            tokenizer.save_pretrained(folder)
    entries = [{"model": path} for path in paths]
    recipe = {"merge_method": "twin", "base_model": str(base), "models": entries, "dtype": "float32"}
    return {**recipe, "parameters": {"energy": 1.0}, "gate": "none"}, models


def rows_of(tmp_path: Path, recipe: dict[str, Any]) -> dict[str, str]:
    found = {}
    for number, entry in enumerate(recipe["models"]):
        lines = [{"text": f"{'abc' if number else '1 + 2'} {at}", "label": at % 2} for at in range(12)]
        path = tmp_path / f"rows{number}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found[entry["model"]] = str(path)
    return found


def logits_of(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "adapters"])
def test_an_experts_head_and_part_are_the_expert(tmp_path: Path, tokenizer: Any, adapters: bool) -> None:
    recipe, models = written(tmp_path, tokenizer, adapters=adapters)
    (told,) = [note for note in make_plan(recipe).warnings if note.startswith("bank")]
    assert told.startswith(
        "bank: 2 tensors stay as in the shared model (each expert's own is kept in heads/): "
    )
    merge(recipe, tmp_path / "out")
    for name, model in models.items():
        network = DynamicModel.load(tmp_path / "out", head=name)
        assert not {*network.bank.sites, *network.bank.vectors} & {*HEAD}
        batch = network.tokenizer(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = network(batch["input_ids"], batch["attention_mask"], weights={name: 1.0})
        wanted = logits_of(model, {key: batch[key] for key in ("input_ids", "attention_mask")})
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_without_a_head_it_is_the_merged_one(tmp_path: Path, tokenizer: Any) -> None:
    recipe, models = written(tmp_path, tokenizer, adapters=False)
    merge(recipe, tmp_path / "out")
    network = DynamicModel.load(tmp_path / "out")
    batch = network.tokenizer(TEXTS, padding=True, return_tensors="pt")
    merged = {name: network.model.state_dict()[name].clone() for name in HEAD}
    with torch.no_grad():
        found = network(batch["input_ids"], batch["attention_mask"], weights={"first": 1.0})
    models["first"].load_state_dict(merged, strict=False)
    wanted = logits_of(models["first"], {key: batch[key] for key in ("input_ids", "attention_mask")})
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_gate_learns_through_the_experts_own_heads(tmp_path: Path, tokenizer: Any) -> None:
    recipe, _ = written(tmp_path, tokenizer, adapters=False)
    recipe["gate"] = {"hidden": 0, "epochs": 1, "task": {"epochs": 1, "hidden": 4, "batch": 8}}
    recipe["calibration"] = {"per_expert": rows_of(tmp_path, recipe)}
    done = merge(recipe, tmp_path / "out")
    assert done.bank is not None
    assert done.bank.gate is not None
    assert "task" in done.bank.gate
    network = DynamicModel.load(tmp_path / "out", head="second")
    batch = network.tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert network(batch["input_ids"], batch["attention_mask"]).isfinite().all()


def test_a_head_is_of_the_type_of_its_trunk(tmp_path: Path, tokenizer: Any) -> None:
    recipe, _ = written(tmp_path, tokenizer, adapters=False)
    merge({**recipe, "dtype": "bfloat16"}, tmp_path / "out")
    for asked, held in (("auto", torch.bfloat16), ("float32", torch.float32)):
        network = DynamicModel.load(tmp_path / "out", head="first", dtype=asked)  # type: ignore[arg-type]
        assert {one.dtype for one in network.model.parameters()} == {held}
        assert {one.b.dtype for one in network.bank.sites.values()} == {held}
