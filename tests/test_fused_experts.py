"""Fused experts of MoE layers, E x inputs x outputs or E x outputs x inputs: merged matrix by matrix, the right way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import mixmerge
from mixmerge.methods import METHODS
from mixmerge.methods.memory import apply, merge_state_dicts
from mixmerge.methods.roles import role_of

SMALL: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8},
    **{"num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0},
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (
        Llama4ForCausalLM,
        Llama4TextConfig,
        {"num_local_experts": 4, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 2},
    ),
    "qwen3_moe": (
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    ),
}
GIVEN: dict[str, dict[str, Any]] = {
    "iso_cts": {"common_fraction": 0.5},
    "wudi": {"solver": "closed"},
    "doge_ta": {"steps": 3, "lr": 0.01, "density": 1.0},
}


def build(name: str, folder: Path, tokenizer: Any) -> list[Path]:
    """A base and two experts that differ from it in every tensor."""
    kind, config, more = FAMILIES[name]
    torch.manual_seed(1)
    model = kind(config(**{**SMALL, **more})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    paths = []
    for one in ("base", "expert0", "expert1"):
        model.save_pretrained(folder / one)
        tokenizer.save_pretrained(folder / one)
        paths.append(folder / one)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    return paths


def weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("method", ["tsv_m", "iso_cts", "wudi", "doge_ta"])
@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_each_matrix_is_merged_as_outputs_x_inputs(
    name: str, method: str, tmp_path: Path, tokenizer: Any, assert_loads: Callable[..., Any]
) -> None:
    paths, given = build(name, tmp_path, tokenizer), GIVEN.get(method, {})
    recipe = {
        "merge_method": method,
        "base_model": str(paths[0]),
        "models": [{"model": str(path)} for path in paths[1:]],
        "parameters": given,
    }
    mixmerge.merge(recipe, tmp_path / "out")
    assert_loads(tmp_path / "out")
    base, *experts = map(weights, paths)
    merged, row = weights(tmp_path / "out"), METHODS[method]
    each = {key: [value] * 2 if key == "density" else value for key, value in given.items()}
    fused = [key for key, value in base.items() if value.ndim == 3]
    assert sorted({key.rpartition(".")[2] for key in fused}) == ["down_proj", "gate_up_proj"]
    for key in fused:
        for at in range(4):
            one, deltas = base[key][at].T, [expert[key][at].T - base[key][at].T for expert in experts]
            alone = apply(row, deltas, base=one, parameters=each, role="linear")
            torch.testing.assert_close(merged[key][at].T, alone, rtol=1e-4, atol=1e-5)
    memory = merge_state_dicts(method, experts, base=base, parameters=given, model_type=name)
    for key, value in memory.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-5, atol=1e-6)
    for key in [key for key in base if key.endswith("bias") or key.endswith("sinks")]:
        mean = base[key] if method == "doge_ta" else (experts[0][key] + experts[1][key]) / 2
        torch.testing.assert_close(merged[key], mean, rtol=1e-5, atol=1e-6)


def test_regmean_averages_what_no_module_reads_alone(tmp_path: Path, tokenizer: Any) -> None:
    """Fused experts have no Gram matrices; all else of a GPT-OSS has, but for its router."""
    paths = build("gpt_oss", tmp_path, tokenizer)
    lines = [{"text": f"row {number} of some text to look at"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": str(path)} for path in paths[1:]],
        "calibration": {"data": str(tmp_path / "rows.jsonl")},
    }
    done = mixmerge.merge(recipe, tmp_path / "out")
    assert [note for note in done.notes if "had no statistics" in note] == [
        "2 tensors had no statistics and are merged without them: "
        "model.layers.0.mlp.router.weight, model.layers.1.mlp.router.weight"
    ]
    merged, (one, two) = weights(tmp_path / "out"), map(weights, paths[1:])
    averaged = {key for key in merged if torch.allclose(merged[key], (one[key] + two[key]) / 2, atol=1e-6)}
    moved = {key for key in merged if "proj.weight" in key}
    assert len(moved) == 8
    assert averaged == merged.keys() - moved


def test_which_way_they_are_stored() -> None:
    up, down = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"
    for kind in ("gpt_oss", "llama4", "llama4_text", "aria_text"):
        assert role_of(up, (4, 16, 48), kind) == role_of(down, (4, 24, 16), kind) == "transposed"
    for kind in ("qwen3_moe", "mixtral", ""):
        assert role_of(up, (4, 48, 16), kind) == role_of(down, (4, 16, 24), kind) == "other"
    # Released files of Qwen3-VL-MoE are turned on loading; the hidden states' width tells, whatever the type.
    assert role_of(up, (4, 16, 48), "qwen3_vl_moe", hidden=16) == "transposed"
    assert role_of(down, (4, 24, 16), "qwen3_vl_moe", hidden=16) == "transposed"
    assert role_of(up, (4, 48, 16), "qwen3_vl_moe", hidden=16) == "other"
    assert role_of(up, (4, 16, 16), "gpt_oss", hidden=16) == "transposed"
    assert role_of(up, (4, 16, 16), "qwen3_moe", hidden=16) == "other"
    assert role_of("conv.weight", (4, 16, 3), "gpt_oss", hidden=16) == "other"
    # A bias of fused experts has two dimensions, and is no map.
    assert (
        role_of(f"{up}_bias", (4, 48), "gpt_oss")
        == role_of("router.e_score_correction_bias", (2, 8))
        == "other"
    )
    assert role_of("layer.relative_attention_bias.weight", (32, 8)) == "table"


def test_experts_that_were_the_right_way_stay_so(tmp_path: Path, tokenizer: Any) -> None:
    paths = build("qwen3_moe", tmp_path, tokenizer)
    recipe = {
        "merge_method": "wudi",
        "base_model": str(paths[0]),
        "models": [{"model": str(path)} for path in paths[1:]],
    }
    roles = {task.target.name: task.role for task in mixmerge.make_plan(recipe).tasks}
    assert not [name for name, role in roles.items() if role == "transposed"]
