"""LoRA adapters against PEFT's own merge, adapter by adapter; broken ones by their messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.checkpoint.adapter import AdapterDelta, read_adapter
from mixmerge.checkpoint.adapter_delta import read_values
from mixmerge.checkpoint.reader import read_weights

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

Train = Callable[..., tuple[Path, Path, dict[str, Any]]]


def _randomise(model: Any, seed: int = 0) -> None:
    """Every tensor that the adapter saves, so that none is at the value training starts from."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif parameter.requires_grad or "lora_" in name:
                parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def train(family: Any, read_tensors: Any, tmp_path: Path) -> Train:
    """``train(family, safe=True, **LoraConfig)``: (base, adapter, tensors of PEFT's merge)."""

    def make(name: str, *, safe: bool = True, **settings: Any) -> tuple[Path, Path, dict[str, Any]]:
        import transformers

        base = family(name, experts=0, dtype="float32").base
        auto = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
        if name == "t5":
            auto = transformers.AutoModelForSeq2SeqLM
        model = peft.get_peft_model(auto.from_pretrained(base), peft.LoraConfig(**settings))
        _randomise(model)
        model.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
        model.merge_and_unload().save_pretrained(tmp_path / "merged")
        return base, tmp_path / "adapter", read_tensors(tmp_path / "merged")

    return make


def expert(delta: AdapterDelta, base: Mapping[str, np.ndarray]) -> np.ndarray:
    """The expert's tensor as the engine gets it: base plus delta."""
    rows, columns = delta.shape
    weight = base[delta.weight.name].reshape(rows, columns)
    return (weight + delta.load().rows(0, rows, weight)).reshape(base[delta.weight.name].shape)


def check(base: Path, adapter: Path, merged: Mapping[str, Any], *, changed: int) -> dict[str, AdapterDelta]:
    headers, _ = read_weights(base)
    stored = {name: read_values(header).reshape(header.shape) for name, header in headers.items()}
    deltas = read_adapter(adapter, headers, where="models[0].model")
    assert len(deltas) == changed
    for name, tensor in merged.items():
        ours = expert(deltas[name], stored) if name in deltas else stored[name]
        np.testing.assert_allclose(ours, tensor.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
        if name in deltas:
            assert np.abs(tensor.numpy() - stored[deltas[name].weight.name]).max() > 1e-3, name
    return deltas


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
CASES = {
    "plain": ("llama", 14, {"target_modules": ATTENTION + MLP}),
    "rslora": ("llama", 4, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "r": 5}),
    "alpha": ("llama", 4, {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3, "r": 6}),
    "pattern": ("llama", 8, {"target_modules": ATTENTION, "r": 4, "rank_pattern": {"q_proj": 2, "^model.layers.0.self_attn.k_proj": 3, "layers.1.self_attn.(k|v)_proj": 6}, "alpha_pattern": {"layers.1.*q_proj": 5, "q_proj": 9}}),
    "pattern_rs": ("llama", 8, {"target_modules": ATTENTION, "r": 4, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.*q_proj": 5, "q_proj": 9}}),
    "gpt2": ("gpt2", 8, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "gpt2b": ("gpt2", 8, {"target_modules": ["c_attn", "c_proj", "c_fc"]}),
    "gpt2_dora": ("gpt2", 8, {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "gpt2_head": ("gpt2", 9, {"target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]}),
    "gpt2_wte": ("gpt2", 5, {"target_modules": ["c_attn", "wte", "wpe"]}),
    "gpt2_bias": ("gpt2", 100, {"target_modules": ["c_attn", "wte", "wpe"], "bias": "all"}),
    "save": ("llama", 4, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "savenorm": ("llama", 7, {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm", "post_attention_layernorm", "norm"]}),
    "embed": ("llama", 4, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    "embed_dora": ("llama", 4, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_dora": True}),
    "dora": ("llama", 14, {"target_modules": ATTENTION + MLP, "use_dora": True, "lora_alpha": 5}),
    "bias_all": ("llama_bias", 100, {"target_modules": ATTENTION + MLP, "bias": "all"}),
    "bias_only": ("llama_bias", 8, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "lora_bias": ("llama_bias", 8, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "lora_alpha": 3}),
    "lora_bias_all": ("llama_bias", 8, {"target_modules": ["q_proj", "down_proj"], "lora_bias": True, "lora_alpha": 3, "bias": "all"}),
    "neox": ("gpt_neox", 8, {"target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], "bias":"lora_only"}),
    "bert": ("bert", 8, {"target_modules": "all-linear", "bias":"lora_only"}),
    "t5": ("t5", 8, {"target_modules": "all-linear"}),
    "tied_save": ("llama_tied", 4, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "tied_save_tie": ("llama_tied", 4, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}),
    "tied_save_tie1": ("llama_tied", 4, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied_save_emb": ("llama_tied", 4, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "tied_lora": ("llama_tied", 4, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied_lora_tie": ("llama_tied", 4, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True}),
    "tied_lora_emb": ("llama_tied", 4, {"target_modules": ["q_proj", "embed_tokens"]}),
    "tied_lora_head": ("llama_tied", 4, {"target_modules": ["q_proj", "lm_head"]}),
    "mixtral": ("mixtral", 4, {"target_modules": ["q_proj"]}),
    "mixtral_lin": ("mixtral", 8, {"target_modules": "all-linear"}),
    "mixtral_par": ("mixtral", 40, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "r": 3}),
    "mixtral_par1": ("mixtral", 40, {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "r": 3}),
    "mixtral_gate": ("mixtral", 40, {"target_modules": [], "target_parameters": ["gate.weight"], "r": 3}),
    "mixtral_old": ("mixtral", 40, {"target_modules": ["w1", "w2", "w3", "gate"], "r": 3, "rank_pattern": {"down_proj": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_peft(train: Train, case: str) -> None:
    name, changed, settings = CASES[case]
    check(*train(name, **settings), changed=changed)
