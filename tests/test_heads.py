"""Experts whose heads differ: the trunk is merged by any method, every expert keeps its head beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.engine.merge import merge
from mixmerge.errors import MixmergeError
from mixmerge.experts.loading import heads_of, load_expert, load_with_head
from mixmerge.plan import make_plan

LABELS = {"two": 2, "three": 3, "five": 5}


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, bert: Any) -> Path:
    """A plain trunk, a language model of it, and classifiers of 2, 3 and 5 classes."""
    root = tmp_path_factory.mktemp("heads")
    bert(root / "base", "BertModel", seed=0)
    bert(root / "masked", "BertForMaskedLM", seed=1)
    for seed, (name, count) in enumerate(LABELS.items(), 2):
        names = {number: f"{name}-{number}" for number in range(count)}
        bert(
            root / name, "BertForSequenceClassification", seed=seed,
            num_labels=count, id2label=names, label2id={label: at for at, label in names.items()},
        )  # fmt: skip
    return root


def recipe(
    root: Path, method: str, *, base: str | None = "base", experts: tuple[str, ...] = tuple(LABELS)
) -> Any:
    written: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(root / name)} for name in experts],
        "parameters": {"weight": 0.5} if method != "slerp" else {"t": 0.5},
        "dtype": "float32",
    }
    if base is not None:
        written["base_model"] = str(root / base)
    return written


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = load_file(folder / "model.safetensors")
    return found


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "dare_linear"])
def test_trunk_is_merged_and_heads_are_kept(
    suite: Path, tmp_path: Path, method: str, assert_loads: Callable[[Path], Any]
) -> None:
    import torch
    from safetensors.torch import load_file

    merge(recipe(suite, method, base=None if method == "linear" else "base"), tmp_path / "out")
    model = assert_loads(tmp_path / "out")
    assert type(model).__name__ == "BertModel"
    assert heads_of(tmp_path / "out") == ("five", "three", "two")
    for name, count in LABELS.items():
        own, kept = weights(suite / name), load_file(tmp_path / "out" / "heads" / name / "head.safetensors")
        assert kept.keys() == {"classifier.weight", "classifier.bias"}
        assert all(torch.equal(kept[tensor], own[tensor]) for tensor in kept)
        config = json.loads((tmp_path / "out" / "heads" / name / "config.json").read_text())
        assert config["id2label"] == {str(number): f"{name}-{number}" for number in range(count)}
    assert "id2label" not in json.loads((tmp_path / "out" / "config.json").read_text())
    merged = weights(tmp_path / "out")
    if method in ("task_arithmetic", "linear"):
        experts = [weights(suite / name) for name in LABELS]
        base = weights(suite / "base")
        for tensor in (
            "embeddings.word_embeddings.weight",
            "encoder.layer.1.output.dense.bias",
            "pooler.dense.weight",
        ):
            each = torch.stack([expert[f"bert.{tensor}"] for expert in experts])
            start = base[tensor]
            expected = each.mean(0) if method == "linear" else start + 0.5 * (each - start).sum(0)
            assert torch.allclose(merged[tensor], expected, atol=1e-6)


def test_the_head_comes_with_the_request_and_nothing_else(suite: Path, tmp_path: Path) -> None:
    import torch

    out = tmp_path / "out"
    merge(recipe(suite, "task_arithmetic"), out)
    trunk = weights(out)
    for name, count in LABELS.items():
        loaded = load_with_head(out, name)
        assert loaded.kind == "classifier"
        assert loaded.prefix == "bert."
        state = loaded.model.state_dict()
        assert all(torch.equal(state[f"bert.{tensor}"], trunk[tensor]) for tensor in trunk)
        own = weights(suite / name)
        assert torch.equal(state["classifier.weight"], own["classifier.weight"])
        given = loaded.tokenizer("some text", return_tensors="pt")
        assert loaded.model(given["input_ids"]).logits.shape == (1, count)
        assert loaded.model.config.id2label[count - 1] == f"{name}-{count - 1}"
    with pytest.raises(
        MixmergeError, match=r"no head is called 'too'. Did you mean 'two'\? Known: five, three, two"
    ):
        load_with_head(out, "too")
    with pytest.raises(MixmergeError, match="It keeps no heads"):
        load_with_head(suite / "base", "two")


def test_one_expert_of_weight_one_is_that_expert(suite: Path, tmp_path: Path) -> None:
    import torch

    alone = recipe(suite, "task_arithmetic", experts=("three",))
    alone["parameters"]["weight"] = 1.0
    merge(alone, tmp_path / "out")
    mine, its = load_with_head(tmp_path / "out", "three"), load_expert(suite / "three")
    assert its.kind == "classifier"
    given = its.tokenizer(["some text", "and more of it"], return_tensors="pt", padding=True)
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.allclose(mine.model(**inputs).logits, its.model(**inputs).logits, atol=1e-5)


def test_a_base_with_another_head_and_no_pooler(suite: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plan = make_plan(recipe(suite, "task_arithmetic", base="masked"))
    merge(recipe(suite, "task_arithmetic", base="masked"), tmp_path / "out")
    assert not any("pooler" in name for name in weights(tmp_path / "out"))
    kept = load_file(tmp_path / "out" / "heads" / "two" / "head.safetensors")
    assert sorted(kept) == [
        "bert.pooler.dense.bias",
        "bert.pooler.dense.weight",
        "classifier.bias",
        "classifier.weight",
    ]
    reasons = {drop.reason for drop in plan.dropped}
    assert {"not of the trunk", "its head, kept in heads/two"} <= reasons
    everything = [(drop.model, drop.name) for drop in plan.dropped]
    assert len(everything) == len(set(everything))
    counted = sum(len(task.sources) + (task.base is not None) for task in plan.tasks) + len(everything)
    assert counted == sum(len(model.tensors) for model in plan.models)
    loaded = load_with_head(tmp_path / "out", "two")
    assert loaded.model.config.num_labels == 2


def test_heads_that_are_alike_are_merged_and_kept(suite: Path, tmp_path: Path, bert: Any) -> None:
    import torch

    for seed in (10, 11):
        bert(tmp_path / f"same{seed}", "BertForSequenceClassification", seed=seed)
    written = recipe(tmp_path, "linear", base=None, experts=("same10", "same11"))
    plan = make_plan(written)
    assert plan.warnings == (
        "all heads are alike, so they are merged too; each expert's own is kept in heads/",
    )
    merge(written, tmp_path / "out")
    both = [weights(tmp_path / name)["classifier.weight"] for name in ("same10", "same11")]
    assert torch.allclose(weights(tmp_path / "out")["classifier.weight"], sum(both) / 2, atol=1e-6)
    assert heads_of(tmp_path / "out") == ("same10", "same11")
    own = load_with_head(tmp_path / "out", "same11").model.state_dict()
    assert torch.equal(own["classifier.weight"], both[1])
    assert not torch.equal(
        own["bert.pooler.dense.weight"], weights(tmp_path / "same11")["bert.pooler.dense.weight"]
    )


def test_the_plan_names_heads_and_they_count_in_its_hash(suite: Path, tmp_path: Path, clone: Any) -> None:
    plan = make_plan(recipe(suite, "ties"))
    assert [head.expert for head in plan.heads] == list(LABELS)
    again = clone(suite / "two")
    config = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps({**config, "id2label": {"0": "no", "1": "yes"}}))
    other = recipe(suite, "ties")
    other["models"][0]["model"] = str(again)
    assert make_plan(other).hash != plan.hash


def test_two_experts_with_one_folder_name_and_overwriting(suite: Path, tmp_path: Path, bert: Any) -> None:
    bert(
        tmp_path / "other" / "two",
        "BertForSequenceClassification",
        seed=20,
        num_labels=2,
    )
    written = recipe(suite, "linear", base=None, experts=("two", "three"))
    written["models"].append({"model": str(tmp_path / "other" / "two")})
    merge(written, tmp_path / "out")
    assert heads_of(tmp_path / "out") == ("three", "two-0", "two-2")
    merge(written, tmp_path / "out", overwrite=True)
    assert "Each expert's own" in (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "out" / "heads" / "mine").mkdir()
    (tmp_path / "out" / "heads" / "mine" / "notes.txt").write_text("x")
    with pytest.raises(MixmergeError, match="not a model folder and nothing else"):
        merge(written, tmp_path / "out", overwrite=True)


def test_trunks_that_do_not_fit_are_faults(suite: Path, tmp_path: Path, bert: Any) -> None:
    bert(tmp_path / "wide", "BertForSequenceClassification", seed=1, intermediate_size=32)
    written = recipe(suite, "linear", base="base", experts=("two",))
    written["models"].append({"model": str(tmp_path / "wide")})
    with pytest.raises(
        MixmergeError, match=r"encoder.layer.0.intermediate.dense.bias is \[32\], there \[24\]"
    ):
        make_plan(written)


def tuned(root: Path, base: str, name: str, *, labels: int, seed: int) -> Path:
    """An adapter of a sequence classifier: low-rank deltas of the trunk, and its head whole."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(
            root / base, num_labels=labels, ignore_mismatched_sizes=True
        )
        adapted = get_peft_model(
            model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
        )
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(root / name)
    return root / name


@pytest.mark.parametrize("method", ["task_arithmetic", "regmean", "fisher", "adamerging", "learned_spectrum"])
def test_an_adapter_with_a_classifier_is_an_expert_with_a_head(
    suite: Path, tmp_path: Path, method: str, bert: Any
) -> None:
    """Beside an expert of other classes: the trunk is merged with its deltas, its own head is kept."""
    import torch
    from safetensors.torch import load_file

    adapter = tuned(suite, "two", f"tutor-{method}", labels=2, seed=9)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("some text", "and more of it"))
    )
    written = recipe(
        suite, method, base=None if method in ("regmean", "fisher") else "base", experts=("three",)
    )
    written["models"].append({"model": f"{suite / 'two'}+{adapter}"})
    if method != "task_arithmetic":
        written["calibration"] = {"data": str(tmp_path / "rows.jsonl")}
        written["parameters"] = {"steps": 1} if method in ("adamerging", "learned_spectrum") else {}
    merge(written, tmp_path / "out")
    assert heads_of(tmp_path / "out") == ("three", adapter.name)
    whole = load_expert(suite / "two", adapter=adapter).model.state_dict()
    kept = load_file(tmp_path / "out" / "heads" / adapter.name / "head.safetensors")
    assert kept.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(kept[name], whole[name]) for name in kept)
    assert not torch.equal(kept["classifier.weight"], weights(suite / "two")["classifier.weight"])
    if method == "task_arithmetic":
        name = "encoder.layer.0.attention.self.query.weight"
        start, other = weights(suite / "base")[name], weights(suite / "three")[f"bert.{name}"]
        expected = start + 0.5 * (other - start) + 0.5 * (whole[f"bert.{name}"] - start)
        assert torch.allclose(weights(tmp_path / "out")[name], expected, atol=1e-5)
    judged = load_with_head(tmp_path / "out", adapter.name)
    given = judged.tokenizer("some text", return_tensors="pt")
    assert judged.model(given["input_ids"]).logits.shape == (1, 2)


@pytest.mark.parametrize(("base", "labels"), [("base", 2), ("masked", 2), ("two", 3)])
def test_a_head_that_only_the_adapter_has_is_refused(suite: Path, base: str, labels: int) -> None:
    """The folder it was trained on has no such head, so naming another folder is no help."""
    adapter = tuned(suite, base, f"own-{base}", labels=labels, seed=9)
    written = recipe(suite, "linear", base=None, experts=("three",))
    written["models"].append({"model": f"{suite / base}+{adapter}"})
    with pytest.raises(MixmergeError) as raised:
        make_plan(written)
    said = [str(fault) for fault in raised.value.faults]
    assert len(said) == 1
    for one in said:
        assert one.startswith(f"models[1].model: {adapter / 'adapter_model.safetensors'}: ")
        assert "classifier" in one
        assert one.endswith("merge it with PEFT (merge_and_unload, save_pretrained), name that folder.")


def test_tasks_in_one_folder_with_their_heads(suite: Path, tmp_path: Path) -> None:
    """A trunk of masks under an expert's head is the model that a merge for its task alone makes."""
    import torch

    from mixmerge import TaskModel

    given = {**recipe(suite, "emr"), "parameters": {"task": "all"}}
    merge(given, tmp_path / "all")
    assert make_plan(given).masks is not None
    for task, head in ((2, "two"), (0, "five")):
        at = list(LABELS).index(head)
        merge({**given, "parameters": {"task": at}}, tmp_path / str(task))
        wanted = load_with_head(tmp_path / str(task), head).model.state_dict()
        found = TaskModel.load(tmp_path / "all", head=head).task(head).state_dict()
        assert found.keys() == wanted.keys()
        assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []
