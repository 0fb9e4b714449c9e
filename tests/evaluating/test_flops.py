"""Operations of a token, beside what torch counts while a real model runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mixmerge.evaluate.flops import flops_per_token

LENGTH = 24


def counted(folder: Path) -> float:
    """What torch counts for a token of a row: products of matrices alone, attention to the whole row."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    bert = "bert" in json.loads((folder / "config.json").read_text())["model_type"]
    kind: Any = AutoModelForMaskedLM if bert else AutoModelForCausalLM
    model = kind.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(5, 5 + LENGTH)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return float(counter.get_total_flops()) / LENGTH


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "llama_bias", "qwen3", "gemma", "gpt2", "gpt_neox", "bert_mlm", "mixtral"]
)
def test_as_torch_counts(name: str, family: Callable[..., Any]) -> None:
    folder = family(name, dtype="float32").base
    found = flops_per_token(folder, context=LENGTH)
    # Norms and biases are counted here and not there; they are some per cent of models as small as these.
    assert counted(folder) <= found <= 1.1 * counted(folder)


def test_by_hand(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {
        "model.embed_tokens.weight": (10, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        "model.layers.0.mlp.gate.weight": (8, 4),
        **{f"model.layers.0.mlp.experts.{at}.up_proj.weight": (6, 4) for at in range(8)},
        "model.layers.0.mlp.shared_experts.up_proj.weight": (3, 4),
        "visual.blocks.0.weight": (99, 4),
        "lm_head.weight": (10, 4),
    }
    config: dict[str, Any] = {
        **{"num_hidden_layers": 1, "hidden_size": 4, "num_attention_heads": 2, "num_experts": 8},
        **{"num_experts_per_tok": 2, "architectures": ["XForCausalLM"], "vocab_size": 10},
    }

    def told(context: int = 0, **changes: Any) -> float:
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        stored = {name: torch.zeros(shape) for name, shape in tensors.items()}
        save_file(stored, tmp_path / "model.safetensors")
        return flops_per_token(tmp_path, context=context)

    active = 16 + 32 + 2 * 24 + 12 + 40  # attention, gate, two of eight experts, the shared one, the head
    assert told() == 2 * active
    assert told(100) == 2 * active + 4 * 100 * 4
    assert told(100, sliding_window=10) == 2 * active + 4 * 10 * 4
    assert told(100, sliding_window=10, use_sliding_window=False) == told(100)
    kinds = {"layer_types": ["full_attention", "sliding_attention", "linear_attention"], "sliding_window": 10}
    assert told(100, **kinds) == 2 * active + 4 * (100 + 10) * 4
    assert told(100, qk_nope_head_dim=3, qk_rope_head_dim=1, v_head_dim=2) == 2 * active + 2 * 100 * 2 * (
        4 + 2
    )
    assert told(num_experts_per_tok=8) == 2 * (active + 6 * 24)
    assert math.isnan(told(num_experts_per_tok=None))
    assert math.isnan(told(is_encoder_decoder=True))
    del tensors["lm_head.weight"]
    assert told() == 2 * active  # tied: the embedding is the head
    assert told(architectures=["XModel"]) == 2 * (active - 40)
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": (8, 4, 6), "b.input_linear.weight": (8, 6, 4)}
    assert told(architectures=["XModel"]) == 2 * (2 * 24 + 2 * 24)
    assert math.isnan(flops_per_token(tmp_path / "gone"))


def test_a_bank_adds_the_factors_of_all_experts(family: Callable[..., Any], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = family("llama", dtype="float32").base
    site, table = "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"
    shapes = {
        f"a/{site}": (6, 16),
        f"b/{site}": (24, 6),
        f"a/{table}": (6, 16),
        f"b/{table}": (300, 6),
        "v/x": (9,),
    }
    save_file(
        {name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "factors-00001.safetensors"
    )
    assert flops_per_token(folder, tmp_path) == flops_per_token(folder) + 2 * 6 * (16 + 24)


def test_an_adapter_adds_its_factors(family: Callable[..., Any], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = family("llama", dtype="float32").base
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    factors = {f"{layer}.lora_A.weight": torch.zeros(2, 16), f"{layer}.lora_B.weight": torch.zeros(16, 2)}
    save_file(
        {**factors, "base_model.model.lm_head.weight": torch.zeros(4, 4)},
        tmp_path / "adapter_model.safetensors",
    )
    assert flops_per_token(folder, tmp_path) == flops_per_token(folder) + 2 * 64
