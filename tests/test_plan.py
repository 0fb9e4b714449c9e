"""The plan: every tensor accounted for, and what the output will be; all of it from headers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.checkpoint.header import DTYPE_BYTES, read_header
from mixmerge.plan import Plan, as_json, make_plan
from mixmerge.plan.layout import Wanted, lay_out

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SMALL: Tensors = {
    "model.embed_tokens.weight": ("BF16", (20, 8)),
    "model.layers.0.mlp.weight": ("BF16", (8, 8)),
    "model.layers.1.mlp.weight": ("BF16", (8, 8)),
    "model.norm.weight": ("BF16", (8,)),
    "lm_head.weight": ("BF16", (20, 8)),
}


@pytest.fixture
def model(hollow: Any) -> Callable[..., str]:
    """``model(name, tensors, **more)``: the path of a hollow Llama."""
    return lambda name, tensors=SMALL, **more: str(hollow(name, tensors, **(LLAMA | more)))


def linear(*models: str, **more: Any) -> dict[str, Any]:
    """Equal parts of some models."""
    entries = [{"model": path} for path in models]
    return {"merge_method": "linear", "models": entries, "parameters": {"weight": 1.0}} | more


def accounted(plan: Plan) -> Counter[tuple[int, str]]:
    """How often the plan mentions each (model, tensor)."""
    found = Counter((drop.model, drop.name) for drop in plan.dropped)
    for task in plan.tasks:
        found.update((source.model, source.tensor.name) for source in task.sources)
        found.update([(task.base.model, task.base.tensor.name)] if task.base else [])
    return found


# --- every tensor


def test_every_tensor_of_every_input(family: Any, family_name: str) -> None:
    made = family(family_name)
    recipe = {
        "merge_method": "ties",
        "base_model": str(made.base),
        "models": [{"model": str(path), "parameters": {"weight": 1.0}} for path in made.experts],
    }
    plan = make_plan(recipe)
    there = Counter((number, name) for number, one in enumerate(plan.models) for name in one.tensors)
    assert accounted(plan) == there
    assert plan.dropped == ()
    assert [(task.target.name, task.target.shape) for task in plan.tasks] == [
        (header.name, header.shape) for header in plan.models[0].tensors.values()
    ]
    assert plan.bytes_read == sum(header.nbytes for one in plan.models for header in one.tensors.values())
    assert plan.bytes_written == (made.base / "model.safetensors").stat().st_size


def test_merged_copied_and_dropped(model: Any) -> None:
    extra: Tensors = {
        **SMALL,
        "model.steps": ("I64", (3,)),
        "model.flag": ("BOOL", ()),
        "model.rotary_emb.inv_freq": ("F32", (4,)),
        "transformer.h.0.attn.bias": ("BOOL", (1, 1, 4, 4)),
        "transformer.h.0.attn.masked_bias": ("F32", ()),
        "bert.embeddings.position_ids": ("I64", (1, 16)),
    }
    # Old checkpoints store buffers that new ones do not; both are of one architecture.
    new = {name: form for name, form in extra.items() if "steps" in name or "flag" in name or name in SMALL}
    plan = make_plan(linear(model("a", extra), model("b", new)))
    copied = {task.target.name for task in plan.tasks if task.copied}
    assert copied == {"model.steps", "model.flag"}
    assert {task.target.name for task in plan.tasks} == set(new)
    assert {(drop.model, drop.name) for drop in plan.dropped} == {
        (0, name) for name in extra.keys() - new.keys()
    }
    assert {drop.reason for drop in plan.dropped} == {"a buffer the model computes itself"}
    assert accounted(plan) == Counter([*((0, name) for name in extra), *((1, name) for name in new)])
    assert plan.bytes_read == 2 * sum(math.prod(s) * DTYPE_BYTES[d] for d, s in new.values())


def test_a_bias_that_is_four_dimensional_is_the_mask_and_others_are_not(model: Any) -> None:
    tensors = {**SMALL, "h.0.attn.bias": ("BF16", (8,)), "h.1.attn.bias": ("BF16", (1, 1, 4, 4))}
    plan = make_plan(linear(model("a", tensors)))
    assert [drop.name for drop in plan.dropped] == ["h.1.attn.bias"]


def test_an_unlisted_base_is_one_more_input_of_linear(model: Any) -> None:
    a, b = model("a"), model("b")
    entry = {"model": a, "parameters": {"weight": 2.0}}
    plan = make_plan(
        {"merge_method": "linear", "base_model": b, "models": [entry], "parameters": {"weight": 1.0}}
    )
    assert plan.base is None
    assert str(plan.models[plan.donor].ref) == b
    for task in plan.tasks:
        assert [str(plan.models[source.model].ref) for source in task.sources] == [a, b]
        assert task.parameters["weight"] == (2.0, 1.0)


def test_a_listed_base_is_no_expert(model: Any) -> None:
    base, a = model("base"), model("a")
    plan = make_plan(linear(base, a, merge_method="task_arithmetic", base_model=base))
    assert all([source.model for source in task.sources] == [1] for task in plan.tasks)
    assert all(task.base is not None and task.base.model == 0 for task in plan.tasks)


# --- bytes, dtypes, shards


@pytest.mark.parametrize(
    ("asked", "stored"),
    [
        ({}, "F32"),
        ({"dtype": "float16"}, "F16"),
        ({"dtype": "float16", "out_dtype": "bfloat16"}, "BF16"),
        ({"out_dtype": "float64"}, "F64"),
    ],
)
def test_dtype_of_the_output(model: Any, asked: dict[str, str], stored: str) -> None:
    other = {name: ("F16", shape) for name, (_, shape) in SMALL.items()}
    plan = make_plan(linear(model("a", dtype="bfloat16"), model("b", other)) | asked)
    assert {task.target.dtype for task in plan.tasks} == {stored}
    spoken = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}[stored]
    assert plan.config["dtype"] == spoken
    assert plan.bytes_written == sum(len(s.header) for s in plan.shards) + 456 * DTYPE_BYTES[stored]


def test_one_dtype_is_kept_tensor_by_tensor(model: Any) -> None:
    mixed = {**SMALL, "model.norm.weight": ("F32", (8,))}
    plan = make_plan(linear(model("a", mixed, torch_dtype="float16"), model("b", mixed)))
    assert {task.target.name: task.target.dtype for task in plan.tasks} == {
        n: d for n, (d, _) in mixed.items()
    }
    assert plan.config["torch_dtype"] == "bfloat16"  # most of the bytes; under the key that was there
    assert "dtype" not in plan.config


@pytest.mark.parametrize(("size", "files"), [("1GB", 1), (448, 3), (144, 4), (1, 5), ("0.448kB", 3)])
def test_shards(model: Any, size: Any, files: int) -> None:
    plan = make_plan(linear(model("a"), output={"shard_size": size}))
    limit = {"1GB": 10**9, "0.448kB": 448}.get(size, size)
    assert len(plan.shards) == files
    names = [shard.file for shard in plan.shards]
    numbered = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    assert names == (["model.safetensors"] if files == 1 else numbered)
    for number, shard in enumerate(plan.shards):
        inside = [task.target for task in plan.tasks if task.target.shard == number]
        data = sum(target.nbytes for target in inside)
        assert shard.nbytes == len(shard.header) + data
        assert data <= limit or len(inside) == 1
        written = json.loads(shard.header[8:])
        assert int.from_bytes(shard.header[:8], "little") == len(shard.header) - 8
        for target in inside:
            begin, end = written[target.name]["data_offsets"]
            assert (begin + len(shard.header), end - begin) == (target.offset, target.nbytes)


@given(
    forms=st.lists(
        st.tuples(
            st.sampled_from(["BF16", "F32", "F64", "I64", "BOOL"]),
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
        ),
        max_size=12,
    ),
    limit=st.integers(1, 2000),
)
def test_any_layout_is_a_sound_file(forms: list[tuple[str, tuple[int, ...]]], limit: int) -> None:
    """Each tensor has one place, in the order given, and the reader that trusts nothing accepts every header."""
    wanted = [Wanted(f"t{number}.\u00e9", shape, dtype) for number, (dtype, shape) in enumerate(forms)]
    targets, shards = lay_out(wanted, limit)
    assert sorted(target.name for target in targets) == sorted(one.name for one in wanted)
    assert [target.shard for target in targets] == sorted(target.shard for target in targets)
    with tempfile.TemporaryDirectory() as folder:
        for number, shard in enumerate(shards):
            path = Path(folder, shard.file)
            path.write_bytes(shard.header + bytes(shard.nbytes - len(shard.header)))
            found = read_header(path)
            mine = [target for target in targets if target.shard == number]
            assert [(t.name, t.dtype, t.shape, t.offset, t.nbytes) for t in mine] == [
                (h.name, h.dtype, h.shape, h.offset, h.nbytes) for h in found.values()
            ]
            assert all(target.offset % DTYPE_BYTES[target.dtype] == 0 for target in mine)
            assert sum(target.nbytes for target in mine) <= limit or len([t for t in mine if t.nbytes]) == 1


def test_memory_grows_with_inputs_not_with_tensors(model: Any) -> None:
    many = {f"model.layers.{i}.w": ("BF16", (64, 64)) for i in range(50)}
    few = {"model.layers.0.w": ("BF16", (64, 64))}
    a, b = model("a", many), model("b", few)
    peak = [as_json(make_plan(linear(path)), threads=2)["peak_memory"] for path in (a, b)]
    assert peak[0] == peak[1]
    more = as_json(make_plan(linear(a, model("c", many))), threads=2)["peak_memory"]
    assert peak[0] < more < 600_000_000


# --- parameters of each tensor


def test_gradients_run_over_every_stack_of_its_own(model: Any) -> None:
    tensors = {f"encoder.block.{i}.layer.0.w": ("BF16", (2,)) for i in range(3)}
    tensors |= {f"decoder.block.{i}.layer.1.w": ("BF16", (2,)) for i in range(5)}
    tensors |= {"shared.weight": ("BF16", (2,)), "encoder.final_layer_norm.weight": ("BF16", (2,))}
    recipe = linear(model("a", tensors), model("b", tensors))
    recipe["models"][0]["parameters"] = {"weight": [0.0, 1.0]}
    recipe["models"][1]["parameters"] = {
        "weight": [{"filter": "decoder.block.1.", "value": [4.0, 8.0]}, {"filter": "shared", "value": 7.0}]
    }
    recipe["parameters"] = {"weight": 3.0, "normalize": [True, False]}
    plan = make_plan(recipe)
    weights = {task.target.name: task.parameters["weight"] for task in plan.tasks}
    assert {name: pair[0] for name, pair in weights.items()} == {
        **{f"encoder.block.{i}.layer.0.w": i / 2 for i in range(3)},
        **{f"decoder.block.{i}.layer.1.w": i / 4 for i in range(5)},
        "shared.weight": 0.0,
        "encoder.final_layer_norm.weight": 0.0,
    }
    others = {name: pair[1] for name, pair in weights.items() if pair[1] != 3.0}
    assert others == {"decoder.block.1.layer.1.w": 5.0, "shared.weight": 7.0}
    last = {
        "encoder.block.2.layer.0.w",
        "decoder.block.4.layer.1.w",
    }  # a step: the last value at the end only
    assert {task.target.name for task in plan.tasks if not task.parameters["normalize"]} == last


# --- the hash


def test_the_hash_depends_on_neither_place_nor_process(
    model: Any, tmp_path: Path, family: Any, clone: Any
) -> None:
    made = family("llama_bias")
    base, expert = made.base, made.experts[0]
    recipe = linear(str(expert), merge_method="dare_ties", base_model=str(base))
    plan = make_plan(recipe)
    moved = linear(str(clone(expert)), merge_method="dare_ties", base_model=str(clone(base)))
    assert make_plan(moved).hash == plan.hash
    code = "import json, sys; from mixmerge.plan import make_plan; print(make_plan(json.loads(sys.argv[1])).hash)"
    for seed in ("1", "2"):
        run = [sys.executable, "-P", "-c", code, json.dumps(moved)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout.strip() == plan.hash


def test_the_hash_changes_with_whatever_decides_the_output(model: Any) -> None:
    base, a, b = model("base"), model("a"), model("b")
    norm = {**SMALL, "model.norm.weight": ("F32", (8,))}
    recipe = linear(a, b, merge_method="dare_ties", base_model=base)
    variants = [
        recipe,
        recipe | {"parameters": {"weight": 1.0, "density": 0.5}},
        recipe | {"parameters": {"weight": [{"filter": "mlp", "value": 0.9}, {"value": 1.0}]}},
        recipe | {"merge_method": "dare_linear"},
        recipe | {"seed": 1},
        recipe | {"dtype": "float16"},
        recipe | {"output": {"shard_size": 400}},
        linear(a, merge_method="dare_ties", base_model=base),
        linear(model("c", norm), b, merge_method="dare_ties", base_model=base),
        linear(a, b, merge_method="dare_ties", base_model=model("d", rope_theta=2.0)),
    ]
    assert len({make_plan(variant).hash for variant in variants}) == len(variants)
    spelled = recipe | {"parameters": {"weight": [{"filter": "*", "value": [1]}], "density": 1.0}}
    assert make_plan(spelled).hash == make_plan(recipe).hash


# --- headers only


def large_llama() -> Tensors:
    """The tensors of a model of 70 B parameters."""
    forms: dict[str, tuple[str, tuple[int, ...]]] = {"model.embed_tokens.weight": ("BF16", (128256, 8192))}
    for layer in range(80):
        for name, shape in (
            ("self_attn.q_proj", (8192, 8192)), ("self_attn.k_proj", (1024, 8192)),
            ("self_attn.v_proj", (1024, 8192)), ("self_attn.o_proj", (8192, 8192)),
            ("mlp.gate_proj", (28672, 8192)), ("mlp.up_proj", (28672, 8192)), ("mlp.down_proj", (8192, 28672)),
            ("input_layernorm", (8192,)), ("post_attention_layernorm", (8192,)),
        ):  # fmt: skip
            forms[f"model.layers.{layer}.{name}.weight"] = ("BF16", shape)
    return {**forms, "model.norm.weight": ("BF16", (8192,)), "lm_head.weight": ("BF16", (128256, 8192))}


def bytes_this_process_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


@pytest.mark.skipif(
    not Path("/proc/self/io").exists(), reason="the kernel does not count what a process reads"
)
def test_seventy_billion_parameters_are_planned_from_headers(model: Any, tmp_path: Path) -> None:
    base, *experts = (model(name, large_llama(), files=15) for name in ("base", "a", "b", "c"))
    recipe = linear(*experts, merge_method="ties", base_model=base)
    headers = sum(
        8 + int.from_bytes(file.open("rb").read(8), "little") for file in tmp_path.rglob("*.safetensors")
    )
    before = bytes_this_process_read()
    plan = make_plan(recipe | {"output": {"shard_size": "10GB"}})
    read = bytes_this_process_read() - before
    assert (
        read < headers + 15 * 4 * 140_000 + 1_000_000
    )  # headers, a buffer's read-ahead for each file, the configs
    assert plan.bytes_read == 4 * plan.bytes_written - 4 * sum(len(shard.header) for shard in plan.shards)
    assert plan.bytes_read / 4 == pytest.approx(141.1e9, rel=0.001)
    assert len(plan.tasks) == 723
    assert len(plan.shards) == 15
    assert all(file.stat().st_blocks < 1000 for file in tmp_path.rglob("*.safetensors"))


def test_planning_imports_no_torch(family: Any) -> None:
    made = family("mixtral")
    recipe = linear(*map(str, made.experts), merge_method="della", base_model=str(made.base))
    code = (
        "import json, sys; from mixmerge.plan import as_json, make_plan\n"
        "as_json(make_plan(json.loads(sys.argv[1])), threads=2)\n"
        "print([name for name in ('torch', 'transformers', 'mergekit', 'numba') if name in sys.modules])"
    )
    run = [sys.executable, "-P", "-c", code, json.dumps(recipe)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n"


# --- as JSON


def test_as_json(model: Any) -> None:
    base, a = model("base"), model("a", {**SMALL, "rotary_emb.inv_freq": ("F32", (4,))})
    recipe = linear(a, merge_method="breadcrumbs", base_model=base)
    plan = make_plan(recipe)
    report = json.loads(json.dumps(as_json(plan, threads=2)))
    assert report["method"] == "breadcrumbs"
    assert report["hash"] == plan.hash
    assert report["base"] == report["config_and_tokenizer_from"] == base
    assert report["models"] == [
        {"model": base, "tensors": 5, "adapted": 0},
        {"model": a, "tensors": 6, "adapted": 0},
    ]
    assert (report["bytes_read"], report["bytes_written"]) == (2 * 912, plan.shards[0].nbytes)
    assert report["shards"] == [{"file": "model.safetensors", "bytes": plan.shards[0].nbytes}]
    assert report["dropped"] == [
        {"model": a, "name": "rotary_emb.inv_freq", "reason": "a buffer the model computes itself"}
    ]
    norm = next(tensor for tensor in report["tensors"] if tensor["name"] == "model.norm.weight")
    assert norm == {
        "name": "model.norm.weight",
        "shape": [8],
        "dtype": "BF16",
        "action": "merged",
        "inputs": [{"model": path, "name": "model.norm.weight"} for path in (base, a)],
        "parameters": {
            "weight": [1.0],
            "density": [1.0],
            "gamma": [0.01],
            "normalize": False,
            "rescale": False,
            "lambda": 1.0,
        },
    }
