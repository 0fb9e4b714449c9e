"""Model folders with a bank beside their weights, as a twin merge leaves them: loaded whole, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixmerge import DynamicModel
from mixmerge.bank.building import fingerprint_of
from mixmerge.bank.files import save_bank
from mixmerge.bank.gate_files import save_gate
from mixmerge.bank.gates.mean import MeanGate
from mixmerge.dynamic.folders import is_dynamic, nbytes, parts_of
from mixmerge.errors import MixmergeError

Clone = Callable[[Path], Path]


def give_bank(folder: Path, standins: Any, *, gate: bool = True) -> str:
    """A bank of three experts beside a model's weights, and a gate that weighs them alike; returns its hash."""
    from mixmerge.experts.loading import load_expert

    bank = standins.bank_of(load_expert(folder).model)
    hashes = {name: name * 8 for name in bank.experts}
    card = save_bank(folder, bank, base=fingerprint_of(folder), hashes=hashes)
    if gate:
        save_gate(folder / "bank", MeanGate(3), bank=card.hash, experts=card.experts)
    return card.hash


@pytest.fixture
def twin(family: Callable[..., Any], clone: Clone, standins: Any) -> Path:
    folder = clone(family("llama", dtype="float32").base)
    give_bank(folder, standins)
    return folder


def test_a_model_folder_is_its_own_base(twin: Path) -> None:
    parts = parts_of(twin)
    assert parts.base == parts.folder == twin
    model = DynamicModel.load(twin)
    ids = torch.tensor([model.tokenizer("a b c")["input_ids"]])
    with torch.no_grad():
        third = model(ids, weights=[1 / 3] * 3)
        torch.testing.assert_close(model(ids), third, atol=1e-6, rtol=1e-6)
        assert not torch.allclose(model(ids, weights={"one": 0.0}), third, atol=1e-3)
    whole = sum(path.stat().st_size for path in twin.rglob("factors*.safetensors"))
    assert nbytes(parts) > whole
    assert nbytes(parts, "BF16") * 2 == pytest.approx(nbytes(parts, "F32"))


def test_without_a_gate_weights_are_said_or_it_is_its_base(
    family: Callable[..., Any], clone: Clone, standins: Any
) -> None:
    folder = clone(family("llama", dtype="float32").base)
    give_bank(folder, standins, gate=False)
    model = DynamicModel.load(folder)
    ids = torch.tensor([model.tokenizer("a b c")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids, weights={"one": 0.0}))


def test_what_is_wrong_with_a_folder(
    twin: Path, tmp_path: Path, clone: Clone, standins: Any, family: Callable[..., Any]
) -> None:
    with pytest.raises(MixmergeError, match=r"has no bank/bank.json"):
        DynamicModel.load(tmp_path)
    assert not is_dynamic(tmp_path)
    card = json.loads((twin / "bank" / "gate.json").read_text())
    (twin / "bank" / "gate.json").write_text(json.dumps({**card, "bank": "0" * 64}))
    with pytest.raises(MixmergeError, match="gate for another bank"):
        DynamicModel.load(twin)
    weights = load_file(twin / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, twin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MixmergeError, match="made for another base"):
        DynamicModel.load(twin)
    (tmp_path / "net").mkdir()
    shutil.copytree(twin / "bank", tmp_path / "net" / "bank")
    (tmp_path / "net" / "mixture.yaml").write_text("compose: {kind: adapters}\n")
    with pytest.raises(MixmergeError, match="does not say what the base is"):
        DynamicModel.load(tmp_path / "net")


def test_heads_of_a_merged_trunk(tmp_path: Path, tokenizer: Any, standins: Any) -> None:
    """The bank changes the trunk, the head is the named expert's; a row alone is the row in a batch."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=280, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    folder = tmp_path / "twin"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, classes in (("two", 2), ("three", 3)):
        config = BertConfig(vocab_size=280, max_position_embeddings=64, num_labels=classes, **sizes)
        model = BertForSequenceClassification(config)
        config.architectures = ["BertForSequenceClassification"]
        own = folder / "heads" / name
        config.save_pretrained(own)
        head = {key: one.contiguous() for key, one in model.state_dict().items() if "classifier" in key}
        save_file(head, own / "head.safetensors", metadata={"format": "pt"})
    give_bank(folder, standins)
    texts = ["a b c", "one two three four", "x"]
    for name, classes in (("two", 2), ("three", 3)):
        dynamic = DynamicModel.load(folder, head=name)
        batch = dynamic.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            together = dynamic(batch["input_ids"], batch["attention_mask"])
            assert together.shape == (3, classes)
            alone = dynamic(dynamic.tokenizer(texts[2], return_tensors="pt")["input_ids"])
            torch.testing.assert_close(together[2:], alone, atol=1e-5, rtol=1e-5)
            base = dynamic(batch["input_ids"], batch["attention_mask"], weights=[0, 0, 0])
            assert not torch.allclose(base, together, atol=1e-4)
    from mixmerge.evaluate.heads import score_classes
    from mixmerge.evaluate.task_file import one_task, read_tasks

    rows = [{"text": text, "label": int(pick)} for text, pick in zip(texts, together.argmax(-1), strict=True)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (task,) = read_tasks(one_task(str(tmp_path / "rows.jsonl"), "accuracy", head="three"))
    assert score_classes(folder, task, {}, name="twin").scores.tolist() == [1, 1, 1]
    told = score_classes(folder, task, {}, name="twin", alone="one")
    model = DynamicModel.load(folder, head="three")
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"], weights={"one": 1.0})
    assert told.given == tuple(str(int(pick)) for pick in logits.argmax(-1))


@pytest.mark.parametrize("per_token", [False, True])
def test_a_twin_merge_is_a_network(family: Callable[..., Any], tmp_path: Path, per_token: bool) -> None:
    """Its head and its table are in the bank, too, and its gate may want a second pass."""
    from mixmerge.dynamic.engine import DynamicEngine
    from mixmerge.engine.merge import merge
    from mixmerge.engines.contract import check_engine

    made = family("llama", dtype="float32")
    rows = {}
    for name, word in (("expert0", "abc"), ("expert1", "1+2=")):
        rows[name] = str(tmp_path / f"{name}.jsonl")
        lines = [{"prompt": f"{word} {at}", "answer": f"{at} {word}"} for at in range(12)]
        Path(rows[name]).write_text("\n".join(map(json.dumps, lines)) + "\n")
    recipe = {
        "merge_method": "twin",
        "base_model": str(made.base),
        "models": [{"model": str(folder)} for folder in made.experts],
        "parameters": {"rank": 4},
        "shared": {"merge_method": "task_arithmetic", "parameters": {"weight": 0.3}},
        "gate": {"epochs": 2, "batch": 8, "per_token": per_token},
        "calibration": {"per_expert": rows, "max_examples": 12},
        "dtype": "float32",
    }
    merge(recipe, tmp_path / "out")
    model = DynamicModel.load(tmp_path / "out")
    assert model.gate.second_pass == per_token
    assert "lm_head.weight" in model.bank.sites
    check_engine(lambda: DynamicEngine(str(tmp_path / "out")), adapters=[])
    texts = ["abc 3", "1+2= 5"]
    shown = model.explain(texts)
    assert shown[0].experts == ("expert0", "expert1")
    assert sum(shown[0].mean().values()) == pytest.approx(1, abs=1e-4)
