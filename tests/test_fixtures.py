"""The checkpoints and the check that other tests lean on are themselves right, and the check can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest


def test_a_family_is_real_whole_and_all_different(
    family: Any, family_name: str, assert_loads: Any, read_tensors: Any
) -> None:
    import torch

    made = family(family_name)
    assert made is family(family_name)
    base, *experts = map(read_tensors, (made.base, *made.experts))
    for name, tensor in base.items():
        assert tensor.dtype == torch.bfloat16
        assert tensor.float().std() > 0, f"{name} is a constant: a lost one would not show"
        assert not any(torch.equal(tensor, expert[name]) for expert in experts), f"{name} did not move"
    assert [expert.keys() for expert in experts] == [base.keys()] * 2
    assert_loads(made.experts[1])


def test_only_dtype_and_shards_change(family: Any, assert_loads: Any, read_tensors: Any) -> None:
    import torch

    exact = read_tensors(family("llama_bias", dtype="float32").base)
    folder = family("llama_bias", dtype="float16", shard_size="20KB", experts=1).base
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
    sharded = read_tensors(folder)
    assert sharded.keys() == exact.keys()
    assert all(torch.equal(exact[name].half(), tensor) for name, tensor in sharded.items())
    assert_loads(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [("drop", "missing_keys"), ("add", "unexpected_keys"), ("reshape", "mismatch"), ("nan", "is not finite")],
)
def test_assert_loads_sees_damage(
    family: Any, clone: Any, assert_loads: Any, damage: str, message: str
) -> None:
    from safetensors.torch import load_file, save_file

    folder = clone(family("llama_bias").base)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.bias"
    if damage == "drop":
        del tensors[name]
    elif damage == "add":
        tensors["model.layers.7.extra"] = tensors[name].clone()
    elif damage == "reshape":
        tensors[name] = tensors[name][:-1].clone()
    else:
        tensors[name][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises((AssertionError, RuntimeError), match=message):
        assert_loads(folder)


def test_tokenizer_survives_any_text(family: Any) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(family("t5").base)
    text = "naïve 模型\tdef f(x):\n    return x"
    assert loaded.decode(loaded(text).input_ids) == text
