"""From recipe to folder: every architecture loads whole, the values are the definitions', adapters are PEFT's."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixmerge
from mixmerge.errors import CheckpointError, OutputError, RecipeError

State = dict[str, Tensor]
WEIGHTS = (0.7, 0.4)
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"lambda": 0.9},
    "ties": {"density": 0.4},
    "dare_ties": {"density": 0.5},
    "della": {"density": 0.6},
}


def recipe_of(method: str, base: Path | str | None, experts: list[Any], **more: Any) -> dict[str, Any]:
    """Experts with the weights above; ``base`` where the method wants one."""
    weighted = method not in ("slerp", "passthrough")
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(path), **({"parameters": {"weight": weight}} if weighted else {})}
            for path, weight in zip(experts, WEIGHTS, strict=False)
        ],
        "parameters": METHODS.get(method, {}),
    }
    return recipe | ({} if base is None else {"base_model": str(base)}) | more


def in_memory(method: str, base: State | None, experts: list[State]) -> State:
    weights = [{} if method == "slerp" else {"weight": weight} for weight in WEIGHTS[: len(experts)]]
    return mixmerge.merge_state_dicts(
        method, experts, base=base, parameters=METHODS[method], expert_parameters=weights
    )


def same(merged: State, expected: State) -> None:
    assert merged.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(merged[name], tensor)]
    assert different == []


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


# --- architectures


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_every_architecture_loads_whole(
    family: Any, family_name: str, method: str, tmp_path: Path, assert_loads: Any, read_tensors: Any
) -> None:
    made = family(family_name)
    base = None if method == "linear" else made.base
    out = tmp_path / "merged"
    mixmerge.merge(recipe_of(method, base, made.experts), out)
    assert_loads(out)
    merged, experts = read_tensors(out), [read_tensors(path) for path in made.experts]
    same(merged, in_memory(method, None if base is None else read_tensors(base), experts))
    assert merged.keys() == experts[0].keys()
    present = {path.name for path in out.iterdir()}
    copied = {path.name for path in made.base.iterdir() if path.suffix in (".json", ".jinja")}
    ours = {"README.md", "mixmerge_manifest.json", "mixmerge_recipe.yaml", "model.safetensors"}
    assert present == copied | ours
    for name in copied - {"config.json"}:
        assert (out / name).read_bytes() == (made.experts[0] / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_every_kind_of_method(family: Any, method: str, tmp_path: Path, read_tensors: Any) -> None:
    made = family("llama", dtype="float16")
    base = None if method == "linear" else made.base
    experts = made.experts[:1] if method == "slerp" else made.experts
    out = tmp_path / "merged"
    done = mixmerge.merge(recipe_of(method, base, experts), out, threads=2)
    state = None if base is None else read_tensors(base)
    same(read_tensors(out), in_memory(method, state, [read_tensors(path) for path in experts]))
    assert (done.path, done.resumed) == (out, 0)
    assert done.plan.hash == json.loads((out / "mixmerge_manifest.json").read_text())["plan"]


def test_passthrough_is_a_copy(family: Any, tmp_path: Path, read_tensors: Any) -> None:
    made = family("llama_bias")
    mixmerge.merge({"merge_method": "passthrough", "models": [{"model": str(made.base)}]}, tmp_path / "copy")
    same(read_tensors(tmp_path / "copy"), read_tensors(made.base))
    scaled = {
        "merge_method": "passthrough",
        "models": [{"model": str(made.base)}],
        "parameters": {"scale": 0.5},
    }
    mixmerge.merge(scaled, tmp_path / "half")
    same(read_tensors(tmp_path / "half"), {n: x / 2 for n, x in read_tensors(made.base).items()})


def test_tied_and_untied_experts_give_an_untied_model(
    family: Any, tmp_path: Path, assert_loads: Any, read_tensors: Any
) -> None:
    tied, untied = family("llama_tied").experts[0], family("llama").experts[0]
    mixmerge.merge(recipe_of("linear", None, [tied, untied]), tmp_path / "out")
    model = assert_loads(tmp_path / "out")
    states = [read_tensors(path) for path in (tied, untied)]
    states[0]["lm_head.weight"] = states[0]["model.embed_tokens.weight"]
    expected = in_memory("linear", None, [{n: s[n].clone() for n in states[1]} for s in states])
    assert torch.equal(model.lm_head.weight, expected["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.config.tie_word_embeddings is False


# --- what is written beside the weights


def test_records(family: Any, tmp_path: Path) -> None:
    made = family("gpt2")
    text = f"""# keeps comments
merge_method: dare_linear
base_model: {made.base}
models:
  - {{model: {made.experts[0]}, parameters: {{weight: 1}}}}
seed: 5
"""
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(text)
    mixmerge.merge(path, out, verify_inputs=True)
    assert (out / "mixmerge_recipe.yaml").read_text() == text
    manifest = json.loads((out / "mixmerge_manifest.json").read_text())
    assert (manifest["method"], manifest["seed"], manifest["mixmerge"]) == (
        "dare_linear",
        5,
        mixmerge.__version__,
    )
    assert [entry["model"] for entry in manifest["inputs"]] == [str(made.base), str(made.experts[0])]
    weights = (made.base / "model.safetensors").read_bytes()
    assert manifest["inputs"][0]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert all(len(entry["fingerprint"]) == 64 for entry in manifest["inputs"])
    assert manifest["recipe"]["models"][0]["parameters"] == {"weight": 1.0}
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["base_model"] == [str(made.base), str(made.experts[0])]
    assert text in card
    again = mixmerge.merge(out / "mixmerge_recipe.yaml", tmp_path / "again", verify_inputs=True)
    assert hashes(again.path) == hashes(out)


def test_same_bytes_whatever_the_threads(family: Any, tmp_path: Path) -> None:
    made = family("qwen3", shard_size="20KB")
    recipe = recipe_of("della", made.base, made.experts, output={"shard_size": 25_000})
    for threads in (1, 2, 5):
        mixmerge.merge(recipe, tmp_path / str(threads), threads=threads)
    mixmerge.merge(recipe, tmp_path / "plain", kernels=False)
    first = hashes(tmp_path / "1")
    assert len([name for name in first if name.endswith(".safetensors")]) > 2
    assert all(hashes(tmp_path / name) == first for name in ("2", "5", "plain"))


# --- shards and dtypes


def test_shards_in_and_out(family: Any, tmp_path: Path, assert_loads: Any, read_tensors: Any) -> None:
    whole, split = family("mixtral"), family("mixtral", shard_size="20KB")
    assert len(list(split.base.glob("*.safetensors"))) > 2
    mixed = [whole.experts[0], split.experts[1]]
    mixmerge.merge(recipe_of("ties", split.base, mixed, output={"shard_size": "30kB"}), tmp_path / "many")
    mixmerge.merge(recipe_of("ties", whole.base, whole.experts), tmp_path / "one")
    assert_loads(tmp_path / "many")
    same(read_tensors(tmp_path / "many"), read_tensors(tmp_path / "one"))
    shards = sorted(tmp_path.joinpath("many").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(tmp_path / "many")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for shard in shards:
        inside = load_file(shard)
        assert sum(tensor.nbytes for tensor in inside.values()) <= 30_000 or len(inside) == 1


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32", "float64"])
def test_output_dtypes(
    family: Any, tmp_path: Path, assert_loads: Any, read_tensors: Any, out_dtype: str
) -> None:
    made = family("gemma", dtype="float32")
    half = family("gemma", dtype="bfloat16")
    recipe = recipe_of("task_arithmetic", made.base, [made.experts[0], half.experts[1]], out_dtype=out_dtype)
    mixmerge.merge(recipe, tmp_path / "out")
    model = assert_loads(tmp_path / "out")
    wanted = getattr(torch, out_dtype)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {wanted} == {model.dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == out_dtype
    states = [read_tensors(path) for path in (made.base, made.experts[0], half.experts[1])]
    work = torch.float64 if out_dtype == "float64" else torch.float32
    base, *experts = ({name: tensor.to(work) for name, tensor in state.items()} for state in states)
    expected = in_memory("task_arithmetic", base, experts)
    same(read_tensors(tmp_path / "out"), {name: tensor.to(wanted) for name, tensor in expected.items()})


def test_float64_inputs(
    family: Any, tmp_path: Path, clone: Any, assert_loads: Any, read_tensors: Any
) -> None:
    made = family("llama", dtype="float32")
    wide = clone(made.experts[0])
    tensors = {
        name: tensor.double() + 1e-12 for name, tensor in load_file(wide / "model.safetensors").items()
    }
    save_file(tensors, wide / "model.safetensors", metadata={"format": "pt"})
    mixmerge.merge(recipe_of("ties", made.base, [wide, made.experts[1]]), tmp_path / "out")
    assert_loads(tmp_path / "out")
    states = [
        {n: x.double() for n, x in read_tensors(path).items()} for path in (made.base, wide, made.experts[1])
    ]
    same(read_tensors(tmp_path / "out"), in_memory("ties", states[0], states[1:]))


def test_integers_are_copied_and_must_agree(
    family: Any, tmp_path: Path, clone: Any, read_tensors: Any
) -> None:
    made = family("llama")
    folders = [clone(path) for path in (made.base, *made.experts)]
    for folder in folders:
        tensors = load_file(folder / "model.safetensors")
        tensors["model.steps"] = torch.arange(5)
        tensors["model.ready"] = torch.tensor([True, False])
        tensors["model.none"] = torch.empty(0, 3, dtype=torch.bfloat16)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of("dare_ties", folders[0], folders[1:])
    mixmerge.merge(recipe, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")
    assert merged["model.steps"].tolist() == [0, 1, 2, 3, 4]
    assert merged["model.ready"].tolist() == [True, False]
    assert merged["model.none"].shape == (0, 3)
    tensors["model.steps"][3] = 7
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.steps': it holds I64, and .* differ in it"):
        mixmerge.merge(recipe, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


# --- Python


def test_public_names_stay_what_they_are() -> None:
    """A subpackage of the same name would take the place of a function as soon as it is imported."""
    code = """
import mixmerge, types
names = [name for name in mixmerge.__all__ if not name.startswith("_")]
first = {name: getattr(mixmerge, name) for name in names}
import mixmerge.cli, mixmerge.engine.merge, mixmerge.plan
print([name for name in names if getattr(mixmerge, name) is not first[name]])
print([name for name in names if isinstance(first[name], types.ModuleType)])
"""
    run = [sys.executable, "-P", "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n[]\n"


def test_the_python_interface(family: Any, tmp_path: Path) -> None:
    made = family("bert")
    recipe = recipe_of("linear", None, made.experts)
    plan = mixmerge.make_plan(recipe)
    seen: list[tuple[int, int]] = []
    done = mixmerge.merge(recipe, str(tmp_path / "out"), progress=lambda *now: seen.append(now))
    assert done.plan.hash == plan.hash
    assert [count for count, _ in seen] == sorted(count for count, _ in seen)
    assert len(seen) == len(plan.tasks)
    assert seen[-1] == (sum(task.target.nbytes for task in plan.tasks),) * 2
    with pytest.raises(OutputError, match="it exists"):
        mixmerge.merge(recipe, tmp_path / "out")
    other = recipe_of("linear", None, made.experts[::-1])
    before = hashes(tmp_path / "out")
    mixmerge.merge(other, tmp_path / "out", overwrite=True)
    assert hashes(tmp_path / "out")["model.safetensors"] != before["model.safetensors"]
    with pytest.raises(RecipeError) as error:
        mixmerge.merge(recipe | {"merge_method": "linaer"}, tmp_path / "new")
    assert "Did you mean 'linear'" in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_gradients_reach_experts_and_weights(family: Any, read_tensors: Any) -> None:
    made = family("llama", dtype="float32")
    base, *experts = ({n: x.clone() for n, x in read_tensors(p).items()} for p in (made.base, *made.experts))
    for state in experts:
        for tensor in state.values():
            tensor.requires_grad_()
    weights = [torch.tensor(weight, requires_grad=True) for weight in WEIGHTS]
    merged = mixmerge.merge_state_dicts(
        "task_arithmetic", experts, base=base, expert_parameters=[{"weight": weight} for weight in weights]
    )
    sum(tensor.sum() for tensor in merged.values()).backward()
    for number, weight in enumerate(weights):
        change = sum((experts[number][name] - base[name]).sum() for name in base)
        assert weight.grad is not None
        assert weight.grad.item() == pytest.approx(change.item(), rel=1e-4, abs=1e-4)
        assert all(
            torch.allclose(x.grad, torch.full_like(x, WEIGHTS[number])) for x in experts[number].values()
        )


def test_a_merge_by_kernels_imports_no_torch(family: Any, tmp_path: Path) -> None:
    made = family("llama")
    code = """
import json, sys, mixmerge
for number, recipe in enumerate(json.loads(sys.argv[1])):
    mixmerge.merge(recipe, f"{sys.argv[2]}/{number}")
print([name for name in json.loads(sys.argv[3]) if name in sys.modules])
"""
    heavy = ["torch", "transformers", "peft", "mergekit"]
    recipes = [
        recipe_of(
            method, None if method == "linear" else made.base, made.experts[: 1 if method == "slerp" else 2]
        )
        for method in METHODS
    ]
    recipes.append(
        recipe_of("ties", made.base, made.experts) | {"parameters": {"scope": "model", "density": 0.3}}
    )
    for names, turn in ((heavy, "first"), ([*heavy, "numba"], "second")):  # the first may have to compile
        run = [sys.executable, "-P", "-c", code, json.dumps(recipes), str(tmp_path / turn), json.dumps(names)]
        done = subprocess.run(run, capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "[]\n"
        assert len(list((tmp_path / turn).glob("*/model.safetensors"))) == len(recipes)
