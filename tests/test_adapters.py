"""LoRA adapters against PEFT's own merge, feature by feature; broken ones by their messages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.checkpoint.adapter import AdapterDelta, read_adapter
from mixmerge.checkpoint.adapter_delta import LoadedDelta, read_values
from mixmerge.checkpoint.adapter_names import parse
from mixmerge.checkpoint.header import read_header
from mixmerge.checkpoint.reader import read_weights

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# What is trained -> (family, how many tensors change, LoraConfig). Two layers, three MoE experts, hidden 32.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("llama", 14, {"target_modules": ATTENTION + MLP}),
    "alpha": ("llama", 4, {"target_modules": ["q_proj", "down_proj"], "lora_alpha": 3, "r": 6}),
    "rslora": ("llama", 4, {"target_modules": ["q_proj", "down_proj"], "r": 5, "use_rslora": True}),
    "patterns": (
        "llama",
        8,
        {
            "target_modules": ATTENTION,
            "r": 4,
            "rank_pattern": {"q_proj": 2, "^model.layers.0.self_attn.k_proj": 3, "1.self_attn.(k|v)_proj": 6},
            "alpha_pattern": {"layers.1.*q_proj": 5, "q_proj": 9, "proj": 1},
        },
    ),
    "patterns and rslora": (
        "llama",
        8,
        {
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"layers.0.*": 2},
            "alpha_pattern": {"v_proj": 5},
        },
    ),
    "modules_to_save": (
        "llama",
        9,  # PEFT matches the end of a name: norm is every layer's post_attention_layernorm too
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    ),
    "embedding": ("llama", 4, {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "use_rslora": True}),
    "dora": ("llama", 14, {"target_modules": ATTENTION + MLP, "use_dora": True, "lora_alpha": 5}),
    "dora embedding": ("llama", 3, {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "dora gpt2": ("gpt2", 8, {"target_modules": GPT2, "use_dora": True, "fan_in_fan_out": True}),
    "bias all": ("llama_bias", 28, {"target_modules": ATTENTION + MLP, "bias": "all"}),
    "bias lora_only": ("llama_bias", 8, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"}),
    "lora_bias": ("llama_bias", 4, {"target_modules": ["q_proj"], "lora_bias": True, "lora_alpha": 3}),
    "lora_bias and bias": (
        "llama_bias",
        16,
        {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all", "lora_alpha": 3},
    ),
    "gpt2": ("gpt2", 8, {"target_modules": GPT2, "fan_in_fan_out": True}),
    "gpt2 bias": ("gpt2", 16, {"target_modules": GPT2, "bias": "lora_only", "fan_in_fan_out": True}),
    "gpt_neox": ("gpt_neox", 4, {"target_modules": ["query_key_value", "dense"], "use_rslora": True}),
    "bert": ("bert", 13, {"target_modules": "all-linear"}),
    "t5": ("t5", 10, {"target_modules": ["q", "wo"], "use_rslora": True}),
    "mixtral": ("mixtral", 22, {"target_modules": ["q_proj", "gate"], "target_parameters": EXPERTS, "r": 3}),
    "mixtral patterns": (
        "mixtral",
        6,
        {"target_modules": [], "target_parameters": EXPERTS[1:], "rank_pattern": {"down_proj": 2}, "r": 5},
    ),
    "mixtral of transformers 4": ("mixtral", 18, {"target_modules": ["w1", "w2", "w3"], "r": 3}),
}
TIED: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("llama_tied", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "embedding": ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama_tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both saved": (
        "llama_tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "embedding saved": ("llama_tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "gpt2 head": ("gpt2", {"target_modules": ["lm_head", "c_attn"]}),
}


@dataclass(frozen=True)
class Trained:
    """An adapter on disk, its base, and what PEFT makes of the two."""

    base: Path
    adapter: Path
    merged: Mapping[str, Any]
    logits: Any


Train = Callable[..., Trained]


def _randomise(model: Any) -> None:
    """Move every tensor that the adapter saves away from where training starts."""
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.1 * noise)
            elif parameter.requires_grad or "lora_" in name:
                parameter.add_(0.1 * noise)


def _auto(name: str) -> Any:
    import transformers

    special = {"bert": transformers.AutoModel, "t5": transformers.AutoModelForSeq2SeqLM}
    return special.get(name, transformers.AutoModelForCausalLM)


TOKENS = [[3, 17, 41, 5, 99, 200]]


@pytest.fixture(scope="session")
def train(family: Any, read_tensors: Any, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """``train(family, settings, safe=True)``: made once for the same arguments."""
    import peft
    import torch

    made: dict[str, Trained] = {}

    def make(name: str, settings: dict[str, Any], *, safe: bool = True) -> Trained:
        key = json.dumps([name, settings, safe])
        if key not in made:
            base = family(name, experts=0, dtype="float32").base
            folder = tmp_path_factory.mktemp("adapter")
            # PEFT writes into the config it is given
            config = peft.LoraConfig(**json.loads(json.dumps(settings)))
            model = peft.get_peft_model(_auto(name).from_pretrained(base), config).eval()
            _randomise(model)
            logits = None
            if name not in ("bert", "t5"):
                with torch.no_grad():
                    logits = model(torch.tensor(TOKENS)).logits
            model.save_pretrained(folder / "adapter", safe_serialization=safe)
            model.merge_and_unload().save_pretrained(folder / "merged")
            made[key] = Trained(base, folder / "adapter", read_tensors(folder / "merged"), logits)
        return made[key]

    return make


def values(folder: Path) -> dict[str, np.ndarray]:
    headers, _ = read_weights(folder)
    return {name: read_values(header).reshape(header.shape) for name, header in headers.items()}


def expert(delta: AdapterDelta, base: Mapping[str, np.ndarray]) -> np.ndarray:
    """The expert's tensor as a merge gets it: base plus delta."""
    weight = base[delta.weight.name]
    matrix = weight.reshape(delta.shape)
    loaded = delta.load()
    moved = matrix + loaded.rows(0, len(matrix), matrix)
    np.testing.assert_allclose(loaded.expert(0, len(matrix), matrix), moved, rtol=1e-6, atol=1e-6)
    return moved.reshape(weight.shape)


def compare(base: Path, adapter: Path, merged: Mapping[str, Any], *, changed: int) -> dict[str, AdapterDelta]:
    stored = values(base)
    deltas = read_adapter(adapter, read_weights(base)[0], where="models[0].model")
    assert len(deltas) == changed
    assert deltas.keys() <= merged.keys()
    for name, tensor in merged.items():
        ours = expert(deltas[name], stored) if name in deltas else stored[name]
        np.testing.assert_allclose(ours, tensor.numpy(), rtol=1e-6, atol=1e-6, err_msg=name)
        moved = float(np.abs(tensor.numpy() - stored[name]).max())
        assert (moved > 1e-3) == (name in deltas), name
    return deltas


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_base_plus_delta_is_what_peft_merges(train: Train, case: str) -> None:
    name, changed, config = CASES[case]
    trained = train(name, config)
    compare(trained.base, trained.adapter, trained.merged, changed=changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", TIED)
def test_a_tied_head_gets_its_own_tensor(train: Train, case: str) -> None:
    """PEFT trains embedding and head apart, and its merge adds both changes to both: compare with the former."""
    import torch

    name, config = TIED[case]
    trained = train(name, config)
    stored = values(trained.base)
    deltas = read_adapter(trained.adapter, read_weights(trained.base)[0], where="models[0].model")
    assert "lm_head.weight" in deltas
    assert "lm_head.weight" not in stored
    tensors = {**stored, **{target: expert(delta, stored) for target, delta in deltas.items()}}
    model = _auto(name).from_pretrained(trained.base, tie_word_embeddings=False)
    model.load_state_dict({key: torch.tensor(value) for key, value in tensors.items()}, strict=True)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(TOKENS)).logits
    torch.testing.assert_close(logits, trained.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_peft_keeps_tied_stays_tied(train: Train) -> None:
    config = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    trained = train("llama_tied", config)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {
        parse(name).module for name in read_header(trained.adapter / "adapter_model.safetensors")
    }
    compare(trained.base, trained.adapter, trained.merged, changed=3)


@pytest.mark.filterwarnings("ignore")
def test_bin_adapters(train: Train) -> None:
    trained = train("llama", CASES["patterns"][2], safe=False)
    assert not (trained.adapter / "adapter_model.safetensors").exists()
    compare(trained.base, trained.adapter, trained.merged, changed=8)


def rewrite(
    folder: Path, edit: Callable[[dict[str, Any]], dict[str, Any]], file: str = "adapter_model"
) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / f"{file}.safetensors"
    save_file(edit(load_file(path)), path)


def reconfigure(folder: Path, **keys: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "prefix"),
    [("gpt2", "transformer."), ("gpt2 bias", "transformer."), ("modules_to_save", "model.")],
)
def test_prefixes_may_differ(train: Train, clone: Any, case: str, prefix: str) -> None:
    """GPT-2 is on the hub without ``transformer.``; headless models are saved without ``model.``"""
    name, changed, config = CASES[case]
    trained = train(name, config)

    def bare(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    base = clone(trained.base)
    rewrite(base, bare, "model")
    compare(base, trained.adapter, bare(dict(trained.merged)), changed=changed)
    adapter = clone(trained.adapter)  # and the other way: trained without the prefix, base with it
    rewrite(adapter, lambda tensors: {name.replace(f".{prefix}", ".", 1): t for name, t in tensors.items()})
    compare(trained.base, adapter, trained.merged, changed=changed)


@pytest.mark.filterwarnings("ignore")
def test_names_with_the_adapters_name_and_wrappers(train: Train, clone: Any) -> None:
    name, changed, config = CASES["modules_to_save"]
    trained = train(name, config)
    adapter = clone(trained.adapter)

    def long(key: str) -> str:
        key = key.replace("lora_A.weight", "lora_A.tutor.weight").replace(
            "lora_B.weight", "lora_B.tutor.weight"
        )
        key = key.replace("lm_head.weight", "lm_head.modules_to_save.tutor.weight")
        return key.replace(".model.", "._orig_mod.model.", 1)

    rewrite(adapter, lambda tensors: {long(key): tensor for key, tensor in tensors.items()})
    compare(trained.base, adapter, trained.merged, changed=changed)


@pytest.mark.filterwarnings("ignore")
def test_a_square_conv1d_is_known_whatever_the_config_says(train: Train, clone: Any) -> None:
    """PEFT saves the flag of the module it came to last, so ``fan_in_fan_out`` proves nothing."""
    name, changed, config = CASES["gpt2"]
    trained = train(name, config)
    adapter = clone(trained.adapter)
    reconfigure(adapter, fan_in_fan_out=False)
    compare(trained.base, adapter, trained.merged, changed=changed)
    llama = train(*CASES["plain"][::2])
    adapter = clone(llama.adapter)
    reconfigure(adapter, fan_in_fan_out=True)
    compare(llama.base, adapter, llama.merged, changed=14)


@pytest.mark.filterwarnings("ignore")
def test_whole_expert_tensors(train: Train, clone: Any) -> None:
    """The same adapter on the same MoE base, stored as transformers 5 holds it in memory."""
    import torch

    name, _, config = CASES["mixtral"]
    trained = train(name, config)

    def fuse(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors = {key.replace("block_sparse_moe", "mlp"): tensor for key, tensor in tensors.items()}
        for layer in range(2):
            at = f"model.layers.{layer}.mlp.experts"
            w1, w2, w3 = ([tensors.pop(f"{at}.{e}.{w}.weight") for e in range(3)] for w in ("w1", "w2", "w3"))
            tensors[f"{at}.gate_up_proj"] = torch.stack(
                [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
            )
            tensors[f"{at}.down_proj"] = torch.stack(w2)
        return tensors

    base = clone(trained.base)
    rewrite(base, fuse, "model")
    deltas = compare(base, trained.adapter, fuse(dict(trained.merged)), changed=8)
    assert deltas["model.layers.0.mlp.experts.gate_up_proj"].shape == (3, 96 * 32)

    def turn(tensors: dict[str, Any]) -> dict[str, Any]:
        return {
            key: tensor.transpose(1, 2).contiguous() if tensor.dim() == 3 else tensor
            for key, tensor in tensors.items()
        }

    rewrite(base, turn, "model")
    deltas = compare(base, trained.adapter, turn(fuse(dict(trained.merged))), changed=8)
    assert deltas["model.layers.0.mlp.experts.gate_up_proj"].transposed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_factors_of_every_float_type(train: Train, clone: Any, dtype: str) -> None:
    import torch

    trained = train(*CASES["plain"][::2])
    adapter = clone(trained.adapter)
    rewrite(adapter, lambda tensors: {name: t.to(getattr(torch, dtype)) for name, t in tensors.items()})
    from safetensors.torch import load_file

    stored = load_file(adapter / "adapter_model.safetensors")
    deltas = read_adapter(adapter, read_weights(trained.base)[0], where="models[0].model")
    for delta in deltas.values():
        assert delta.a is not None
        assert delta.b is not None
        a, b = stored[delta.a.name].float(), stored[delta.b.name].float()
        rows = delta.load().rows(0, delta.shape[0])
        np.testing.assert_allclose(rows, (b @ a * delta.scale).numpy(), rtol=1e-5, atol=1e-7)


# -- rows ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def loaded(train: Train) -> list[tuple[LoadedDelta, np.ndarray]]:
    """One delta of each kind and layout, with the base's matrix."""
    wanted = [
        ("plain", "model.layers.0.mlp.down_proj.weight"),
        ("dora", "model.layers.0.mlp.up_proj.weight"),
        ("dora gpt2", "transformer.h.0.mlp.c_fc.weight"),
        ("modules_to_save", "model.embed_tokens.weight"),
        ("embedding", "model.embed_tokens.weight"),
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        ("lora_bias and bias", "model.layers.1.self_attn.q_proj.bias"),
    ]
    found = []
    for case, target in wanted:
        name, _, config = CASES[case]
        trained = train(name, config)
        delta = read_adapter(trained.adapter, read_weights(trained.base)[0], where="")[target]
        found.append((delta.load(), values(trained.base)[delta.weight.name].reshape(delta.shape)))
    return found


def _cuts(data: st.DataObject, rows: int) -> Iterator[tuple[int, int]]:
    inner = data.draw(st.lists(st.integers(0, rows), max_size=6), label="cuts")
    return pairwise(sorted([0, *inner, rows]))


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_split_of_the_rows_changes_a_bit(
    loaded: list[tuple[LoadedDelta, np.ndarray]], data: st.DataObject
) -> None:
    delta, weight = data.draw(st.sampled_from(loaded), label="delta")
    whole = delta.rows(0, len(weight), weight)
    parts = [delta.rows(start, stop, weight[start:stop]) for start, stop in _cuts(data, len(weight))]
    assert np.array_equal(np.concatenate(parts).view(np.uint32), whole.view(np.uint32))
