"""``--engine mergekit``: the same recipe through mergekit gives what our engine gives."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import mixmerge
from mixmerge.engine.oracle import merge_by_mergekit
from mixmerge.errors import DependencyError, MixmergeError, OutputError
from mixmerge.recipe import dump, read

pytest.importorskip("mergekit")

GRADIENT = {"weight": [{"filter": "mlp", "value": [0.2, 0.9]}, {"value": 0.5}]}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"parameters": GRADIENT},
    "slerp": {"parameters": {"t": [0.1, 0.8]}},
    "passthrough": {"parameters": {"scale": 0.5}},
    "task_arithmetic": {"parameters": {**GRADIENT, "lambda": 0.7}},
    "ties": {"parameters": {**GRADIENT, "density": [0.3, 0.6]}},
    "breadcrumbs_ties": {"parameters": {**GRADIENT, "density": 0.5, "gamma": 0.1}},
}
BASED = ("slerp", "task_arithmetic", "ties", "breadcrumbs_ties", "dare_ties")


def recipe_file(folder: Path, method: str, base: Path, experts: list[Any], **more: Any) -> Path:
    """A recipe of some experts; ``base`` where the method wants one."""
    count = 1 if method in ("slerp", "passthrough") else 2
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(e)} for e in experts[:count]]}
    recipe |= {"base_model": str(base)} if method in BASED else {}
    path = folder / f"{method}.yaml"
    path.write_text(dump(read(recipe | RECIPES.get(method, {}) | more).require()))
    return path


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("llama", method) for method in RECIPES),
        ("gpt2", "linear"),
        ("qwen3", "linear"),
        ("gemma", "ties"),
    ],
)
def test_both_engines_agree(
    family: Any, tmp_path: Path, name: str, method: str, assert_loads: Any, read_tensors: Any
) -> None:
    """Gradients and filters included, so layers are found in the same places."""
    made = family(name, dtype="float32")
    path = recipe_file(tmp_path, method, made.base, made.experts)
    mixmerge.merge(path, tmp_path / "ours")
    merge_by_mergekit(path, tmp_path / "theirs")
    assert_loads(tmp_path / "theirs")
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert {path.name for path in tmp_path.iterdir()} == {path.name, "ours", "theirs"}


def test_adapters(family: Any, tmp_path: Path, read_tensors: Any) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    made = family("llama", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(made.base)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    experts = [f"{made.base}+{tmp_path / 'adapter'}", made.experts[0]]
    path = recipe_file(tmp_path, "task_arithmetic", made.base, experts)
    mixmerge.merge(path, tmp_path / "ours")
    merge_by_mergekit(path, tmp_path / "theirs")
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    assert all(torch.allclose(tensor, theirs[name], rtol=0, atol=1e-6) for name, tensor in ours.items())


def test_the_seed_of_the_recipe_is_mergekits(family: Any, tmp_path: Path) -> None:
    made = family("llama")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        parameters = {"weight": 1.0, "density": 0.5}
        path = recipe_file(tmp_path, "dare_ties", made.base, made.experts, parameters=parameters, seed=seed)
        merge_by_mergekit(path, tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_output_rules_hold_for_mergekit_too(family: Any, tmp_path: Path) -> None:
    made, out = family("llama", dtype="float32"), tmp_path / "out"
    split = recipe_file(tmp_path, "linear", made.base, made.experts, output={"shard_size": 20_000})
    merge_by_mergekit(split, out)
    assert len(list(out.glob("*.safetensors"))) > 2
    with pytest.raises(OutputError, match="it exists"):
        merge_by_mergekit(split, out)
    whole = recipe_file(tmp_path, "linear", made.base, made.experts)
    merge_by_mergekit(whole, out, overwrite=True)
    assert [path.name for path in out.glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("method", "more", "name"),
    [
        ("ties", {"parameters": {"weight": 1.0, "agg": "mean"}}, "agg"),
        ("ties", {"parameters": {"weight": 1.0, "scope": "model"}}, "scope"),
        ("dare_ties", {"parameters": {"weight": 1.0, "rescale_by": "inverse_p"}}, "rescale_by"),
    ],
)
def test_what_mergekit_has_not_is_refused_by_name(
    family: Any, tmp_path: Path, method: str, more: dict[str, Any], name: str
) -> None:
    made = family("llama")
    path = recipe_file(tmp_path, method, made.base, made.experts, **more)
    with pytest.raises(MixmergeError, match=f"--engine mergekit: mergekit has no {name}"):
        merge_by_mergekit(path, tmp_path / "out")


def test_a_failure_of_mergekit_is_told_and_leaves_nothing(family: Any, tmp_path: Path) -> None:
    made = family("bert")  # mergekit 0.1.5 fails on its optional pooler
    path = recipe_file(tmp_path, "linear", made.base, made.experts, parameters={"weight": 1.0})
    with pytest.raises(MixmergeError, match="mergekit: it failed: "):
        merge_by_mergekit(path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["linear.yaml"]


def test_mergekit_is_optional(family: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = family("llama")
    path = recipe_file(tmp_path, "linear", made.base, made.experts)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'mixmerge\[mergekit\]'"):
        merge_by_mergekit(path, tmp_path / "out")
