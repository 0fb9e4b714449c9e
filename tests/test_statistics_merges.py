"""Merges by statistics of calibration data, from recipe to folder: values, manifests, resuming, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.data.batches import make_batches
from mixmerge.data.rows import Row, read_rows
from mixmerge.engine.calibrating import cache_folder
from mixmerge.engine.merge import merge
from mixmerge.errors import MixmergeError
from mixmerge.experts.loading import heads_of, load_expert, load_with_head

TEXTS = {
    "expert0": ["the quick brown fox", "jumps over", "a lazy dog and 12 more of them"],
    "expert1": ["1 + 2 = 3", "4 * 5 = 20, so 20 / 5 = 4", "7 - 7 = 0"],
}


def write(folder: Path, texts: dict[str, list[str]] = TEXTS) -> dict[str, str]:
    """A file of rows for every expert."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        rows = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(rows)
    return {name: str(folder / f"{name}.jsonl") for name in texts}


def recipe(method: str, experts: list[Path], data: dict[str, str], **more: Any) -> dict[str, Any]:
    calibration = {"per_expert": data, **more.pop("calibration", {})}
    base = {"base_model": str(more.pop("base"))} if "base" in more else {}
    return {
        "merge_method": method,
        "models": [{"model": str(path)} for path in experts],
        **base,
        "parameters": more,
        "dtype": "float32",
        "calibration": calibration,
    }


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {
        name: value
        for file in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def gram_of(expert: Path, file: str, module: str) -> Any:
    """The mean of x xᵀ before a module, row by row without any padding."""
    import torch

    loaded = load_expert(expert)
    seen: list[Any] = []
    handle = loaded.model.get_submodule(module).register_forward_pre_hook(
        lambda _, given: seen.append(given[0][0])
    )
    for batch in make_batches(read_rows(file), loaded.tokenizer, batch_size=1):
        with torch.no_grad():
            loaded.model(batch.input_ids)
    handle.remove()
    inputs = torch.cat(seen).double()
    return inputs.T @ inputs / len(inputs)


@pytest.mark.parametrize(
    ("name", "module"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_fc")]
)
def test_regmean_solves_the_normal_equations(
    family: Callable[..., Any], tmp_path: Path, name: str, module: str, assert_loads: Callable[[Path], Any]
) -> None:
    import torch

    made = family(name, dtype="float32")
    data = write(tmp_path / "data")
    merge(recipe("regmean", made.experts, data, alpha=0.8, ridge=0.01), tmp_path / "out")
    assert_loads(tmp_path / "out")
    left, right = 0.0, 0.0
    for expert, file in zip(made.experts, data.values(), strict=True):
        gram = gram_of(expert, file, module)
        diagonal = torch.diag(gram.diagonal())
        scaled = 0.8 * gram + 0.2 * diagonal + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        matrix = weights(expert)[f"{module}.weight"].double()
        left, right = left + scaled, right + scaled @ (matrix if name == "gpt2" else matrix.T)
    expected = torch.linalg.solve(left, right)
    merged = weights(tmp_path / "out")
    found = merged[f"{module}.weight"].double()
    assert torch.allclose(found if name == "gpt2" else found.T, expected, atol=1e-5)
    norm = "model.norm.weight" if name == "llama" else "transformer.ln_f.weight"
    average = sum(weights(expert)[norm] for expert in made.experts) / 2
    assert torch.allclose(merged[norm], average, atol=1e-6)


def test_the_manifest_and_the_card_name_the_rows(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    data = write(tmp_path / "data")
    asked = {"max_examples": 2, "transductive": True}
    merged = merge(recipe("regmean", made.experts, data, calibration=asked), tmp_path / "out")
    said = json.loads((tmp_path / "out" / "mixmerge_manifest.json").read_text())
    every = {row.digest for file in data.values() for row in read_rows(file)}
    assert len(said["calibration"]["rows"]) == 4
    assert set(said["calibration"]["rows"]) < every
    assert said["calibration"]["transductive"] is True
    assert [entry["rows"] for entry in said["calibration"]["experts"].values()] == [2, 2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**Transductive**" in card
    assert data["expert0"] in card
    assert "singular without alpha and ridge" in merged.notes[0]
    assert list(merged.notes) == said["calibration"]["notes"]
    assert not cache_folder(tmp_path / "out").exists()


def test_a_killed_merge_gathers_once(
    family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill leaves, as finished statistics beside the output, is used and not gathered again."""
    import torch

    from mixmerge.engine import merge as engine

    made = family("llama", dtype="float32")
    written = recipe("regmean", made.experts, write(tmp_path / "data"))
    merge(written, tmp_path / "whole")

    def killed(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine, "_tensors", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(written, tmp_path / "out")
    kept = sorted(cache_folder(tmp_path / "out").iterdir())
    assert len(kept) == 2
    (kept[0] / "statistics.safetensors").write_bytes(b"cut short")
    stamp = (kept[1] / "statistics.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(engine, "forget", lambda out: None)
        merge(written, tmp_path / "out")
    assert (kept[1] / "statistics.safetensors").stat().st_mtime_ns == stamp
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_squares_of_batches_are_statistics_of_their_own(
    family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was gathered for one form, or another batch size, is not taken for the other."""
    import torch

    from mixmerge.engine import merge as engine

    made = family("llama", dtype="float32")
    data = write(tmp_path / "data")
    monkeypatch.setattr(engine, "forget", lambda out: None)
    forms: list[dict[str, Any]] = [
        {},
        {"calibration": {"batch_size": 2}},
        {"squares": "batches", "calibration": {"batch_size": 2}},
        {"squares": "batches", "calibration": {"batch_size": 3}},
    ]
    kept, found = [], []
    for form in forms:
        merge(recipe("fisher", made.experts, data, floor=1e-20, **form), tmp_path / "out", overwrite=True)
        kept.append(len(list(cache_folder(tmp_path / "out").iterdir())))
        found.append(weights(tmp_path / "out"))
    assert kept == [2, 2, 4, 6]  # of each expert one; example by example, the batch size does not matter

    def alike(one: int, other: int) -> bool:
        return all(torch.equal(found[one][name], found[other][name]) for name in found[0])

    assert [alike(0, 1), alike(0, 2), alike(2, 3)] == [True, False, False]
    with pytest.raises(MixmergeError, match="squares"):
        merge(recipe("fisher", made.experts, data, squares="rows"), tmp_path / "other")


def test_one_expert_comes_back_whole(family: Callable[..., Any], tmp_path: Path) -> None:
    import torch

    made = family("llama", dtype="float32")
    data = write(tmp_path / "data", {"expert0": TEXTS["expert0"]})
    for method in ("regmean", "fisher", "activation_ties"):
        based = {"base": made.base} if method == "activation_ties" else {}
        merge(recipe(method, made.experts[:1], data, **based), tmp_path / method)
        own, merged = weights(made.experts[0]), weights(tmp_path / method)
        assert all(torch.allclose(merged[name], own[name], atol=1e-5) for name in own)


def test_fisher_with_heads(tmp_path: Path, tokenizer: Any) -> None:
    """Classifiers of 2 and 3 classes: what only one expert depends on, that expert decides."""
    import torch
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for seed, count in enumerate((2, 3)):
        config = transformers.BertConfig(vocab_size=280, num_labels=count, **sizes)
        torch.manual_seed(seed)
        model = transformers.BertForSequenceClassification(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / f"expert{seed}")
        tokenizer.save_pretrained(tmp_path / f"expert{seed}")
    experts = [tmp_path / "expert0", tmp_path / "expert1"]
    data = write(tmp_path / "data", {"expert0": ["aaaa", "aab"], "expert1": ["zzzz", "zzy"]})
    merge(recipe("fisher", experts, data, floor=1e-20), tmp_path / "out")
    assert heads_of(tmp_path / "out") == ("expert0", "expert1")
    merged = weights(tmp_path / "out")["embeddings.word_embeddings.weight"]
    first, second = (weights(path)["bert.embeddings.word_embeddings.weight"] for path in experts)
    for text, own in (("a", first), ("z", second)):
        (token,) = tokenizer(text)["input_ids"]
        assert torch.allclose(merged[token], own[token], atol=1e-4)
    unseen = tokenizer("q")["input_ids"][0]
    assert torch.allclose(merged[unseen], (first + second)[unseen] / 2, atol=0.3)
    assert load_with_head(tmp_path / "out", "expert1").model.config.num_labels == 3
    merge(recipe("regmean", experts, data), tmp_path / "regmean")
    note = json.loads((tmp_path / "regmean" / "mixmerge_manifest.json").read_text())["calibration"]["notes"]
    assert not any("had no statistics" in each for each in note)


def test_activation_ties_keeps_what_moves_the_outputs(family: Callable[..., Any], tmp_path: Path) -> None:

    made = family("llama", dtype="float32")
    data = write(tmp_path / "data", {"expert0": TEXTS["expert0"]})
    merge(recipe("activation_ties", made.experts[:1], data, base=made.base, density=0.3), tmp_path / "out")
    module = "model.layers.0.mlp.gate_proj"
    scale = gram_of(made.experts[0], data["expert0"], module).diagonal().sqrt().float()
    base, expert = (weights(path)[f"{module}.weight"] for path in (made.base, made.experts[0]))
    kept = weights(tmp_path / "out")[f"{module}.weight"] != base
    score = (expert - base).abs() * scale
    assert int(kept.sum()) == int(0.3 * kept.numel())
    assert float(score[kept].min()) >= float(score[~kept].max()) * (1 - 1e-5)
    plain = (expert - base).abs()
    assert float(plain[kept].min()) < float(plain[~kept].max())


def test_bad_data_is_said_before_anything_is_written(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    data = write(tmp_path / "data")
    (tmp_path / "data" / "expert0.jsonl").write_text('{"txt": 1}\n')
    gone = {**data, "expert1": str(tmp_path / "gone.jsonl")}
    with pytest.raises(MixmergeError) as raised:
        merge(recipe("regmean", made.experts, gone), tmp_path / "out")
    said = [str(fault) for fault in raised.value.faults]
    assert "has neither text, prompt nor messages" in said[0]
    assert said[1].startswith(f"{tmp_path / 'gone.jsonl'}: does not exist")
    assert not list(tmp_path.glob(".out*"))
    with pytest.raises(MixmergeError, match=r"expert1 has no data, and regmean needs some of every expert"):
        merge(recipe("regmean", made.experts, {"expert0": data["expert0"]}), tmp_path / "out")
    plain = recipe("regmean", made.experts, data)
    del plain["calibration"]
    with pytest.raises(MixmergeError, match="regmean learns from data, and the recipe has none"):
        merge(plain, tmp_path / "out")


def test_too_little_data(family: Callable[..., Any], tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    data = write(tmp_path / "data")
    with pytest.raises(
        MixmergeError, match=r"tokens for the 48 inputs of .*down_proj.weight: its Gram matrix is singular"
    ):
        merge(recipe("regmean", made.experts, data, alpha=1.0, ridge=0.0), tmp_path / "out")
    data = write(tmp_path / "short", {"expert0": ["a"], "expert1": ["b"]})
    with pytest.raises(MixmergeError, match="none of 1 rows gives two tokens"):
        merge(recipe("regmean", made.experts, data), tmp_path / "out")
    bare = family("bert", dtype="float32")
    with pytest.raises(MixmergeError, match="it predicts neither a token nor a class"):
        merge(recipe("fisher", bare.experts, write(tmp_path / "data")), tmp_path / "out")


def test_an_adapter_is_an_expert(family: Callable[..., Any], tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = family("llama", dtype="float32")
    torch.manual_seed(0)
    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(made.base), LoraConfig(r=2, target_modules=["down_proj"])
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    tuned.save_pretrained(tmp_path / "tutor")
    data = write(tmp_path / "data", {"tutor": TEXTS["expert0"], "expert1": TEXTS["expert1"]})
    written = recipe("regmean", made.experts[1:], data)
    written["models"].append({"model": f"{made.base}+{tmp_path / 'tutor'}"})
    merge(written, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj.weight"
    merged, base = weights(tmp_path / "out")[name], weights(made.base)[name]
    assert not torch.allclose(merged, (base + weights(made.experts[1])[name]) / 2, atol=1e-4)
    assert Row(text=TEXTS["expert0"][0]).digest in (tmp_path / "out" / "mixmerge_manifest.json").read_text()


def test_regmean_plus_sees_what_was_merged_before(
    family: Callable[..., Any], tmp_path: Path, assert_loads: Callable[[Path], Any]
) -> None:
    """The last block solves the equations of its own input: the merged model's hidden states, expert by expert."""
    import torch

    made = family("llama", dtype="float32")
    data = write(tmp_path / "data")
    merge(recipe("regmean_plus", made.experts, data, alpha=0.8, ridge=0.01), tmp_path / "out")
    merge(recipe("regmean", made.experts, data, alpha=0.8, ridge=0.01), tmp_path / "plain")
    model = assert_loads(tmp_path / "out")
    left, right = 0.0, 0.0
    for expert, file in zip(made.experts, data.values(), strict=True):
        loaded = load_expert(expert)
        norm, inputs = loaded.model.model.layers[1].input_layernorm, []
        for batch in make_batches(read_rows(file), loaded.tokenizer, batch_size=1):
            with torch.no_grad():
                hidden = model(batch.input_ids, output_hidden_states=True).hidden_states[1]
                inputs.append(norm(hidden)[0].double())
        seen = torch.cat(inputs)
        gram = seen.T @ seen / len(seen)
        scaled = (
            0.8 * gram
            + 0.2 * torch.diag(gram.diagonal())
            + 0.01 * gram.diagonal().mean() * torch.eye(len(gram))
        )
        left, right = (
            left + scaled,
            right + scaled @ loaded.model.model.layers[1].self_attn.q_proj.weight.T.double(),
        )
    name = "model.layers.1.self_attn.q_proj.weight"
    merged = weights(tmp_path / "out")[name]
    assert torch.allclose(merged.T.double(), torch.linalg.solve(left, right), atol=2e-5)
    assert not torch.allclose(merged, weights(tmp_path / "plain")[name], atol=1e-4)
    assert not cache_folder(tmp_path / "out").exists()


def test_regmean_plus_of_one_expert_and_of_poolers(
    family: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mixmerge.calibrate import sequential
    from mixmerge.engine import merge as engine

    made = family("bert", dtype="float32")
    data = write(tmp_path / "data")
    alone = recipe("regmean_plus", made.experts[:1], {"expert0": data["expert0"]})
    with monkeypatch.context() as patched:
        patched.setattr(engine, "forget", lambda out: None)
        merge(alone, tmp_path / "one")
    own, merged = weights(made.experts[0]), weights(tmp_path / "one")
    assert all(torch.allclose(merged[name], own[name], atol=1e-5) for name in own)
    with monkeypatch.context() as patched:  # what was gathered is not gathered again
        patched.delattr(sequential, "gather_sequential")
        patched.setattr(sequential, "gather_sequential", None, raising=False)
        merge(alone, tmp_path / "one", overwrite=True)
    done = merge(recipe("regmean_plus", made.experts, data), tmp_path / "two")
    assert not any("had no statistics" in note for note in done.notes)
    seq = family("t5", dtype="float32")
    for method in ("regmean", "regmean_plus"):
        with pytest.raises(MixmergeError, match=r"an encoder with a decoder|has 2 stacks of layers"):
            merge(recipe(method, seq.experts, write(tmp_path / "data")), tmp_path / "t5")
