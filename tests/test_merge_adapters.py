"""MODEL+ADAPTER in whole merges: one adapter with weight 1 is that adapter, as PEFT merges it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixmerge
from mixmerge.plan import make_plan

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")

State = dict[str, Tensor]
Train = Callable[..., tuple[Path, State]]
MLP = ["gate_proj", "up_proj", "down_proj"]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear layers": ("llama", {"target_modules": ["q_proj", *MLP], "use_rslora": True, "lora_alpha": 3}),
    "whole tensors": ("llama", {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "biases": ("llama_bias", {"target_modules": ["k_proj", "up_proj"], "lora_bias": True, "bias": "all"}),
    "DoRA": ("qwen3", {"target_modules": ["o_proj", "down_proj"], "use_dora": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "Conv1D and DoRA": ("gpt2", {"target_modules": ["c_fc"], "use_dora": True, "fan_in_fan_out": True}),
    "experts": ("mixtral", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "two stacks": ("t5", {"target_modules": "all-linear"}),
}
TIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
    "kept so": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}
TOKENS = torch.tensor([[5, 9, 200, 31], [7, 7, 279, 2]])


@pytest.fixture
def train(tmp_path: Path, read_tensors: Any) -> Train:
    """``train(model, name, **LoraConfig)``: (adapter, tensors of PEFT's own merge of it)."""

    def make(folder: Path, name: str, *, seed: int = 0, **settings: Any) -> tuple[Path, State]:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        auto = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        model = peft.get_peft_model(auto.from_pretrained(folder), peft.LoraConfig(r=4, **settings))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path / name)
        model.merge_and_unload().save_pretrained(tmp_path / f"{name}-merged")
        return tmp_path / name, read_tensors(tmp_path / f"{name}-merged")

    return make


def weighted(*models: str) -> list[dict[str, Any]]:
    return [{"model": model, "parameters": {"weight": 1.0}} for model in models]


def near(merged: State, expected: State) -> None:
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            merged[name], tensor, rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_one_adapter_is_that_adapter(
    family: Any, train: Train, tmp_path: Path, case: str, assert_loads: Any, read_tensors: Any
) -> None:
    name, settings = CASES[case]
    base = family(name, experts=0, dtype="float32").base
    adapter, expected = train(base, "adapter", **settings)
    expert = f"{base}+{adapter}"
    plan = make_plan({"merge_method": "linear", "models": weighted(expert)})
    assert set(plan.models[0].deltas) == {
        task.target.name for task in plan.tasks if any(source.adapter for source in task.sources)
    }
    for number, recipe in enumerate(
        [
            {"merge_method": "linear", "models": weighted(expert)},
            {"merge_method": "passthrough", "models": [{"model": expert}]},
            {"merge_method": "task_arithmetic", "models": weighted(expert), "base_model": str(base)},
        ]
    ):
        for kernels in (True, False):
            out = tmp_path / f"{number}{kernels}"
            mixmerge.merge(recipe, out, kernels=kernels)
            near(read_tensors(out), expected)
    assert_loads(tmp_path / "0True")


@pytest.mark.parametrize("case", TIED)
def test_an_adapter_of_a_tied_model(
    family: Any, train: Train, tmp_path: Path, case: str, assert_loads: Any
) -> None:
    """PEFT trains the head apart from the embedding, so the output computes what it computed before its merge."""
    import transformers

    made = family("llama_tied", experts=1, dtype="float32")
    adapter, _ = train(made.base, "adapter", **TIED[case])
    loaded = transformers.AutoModelForCausalLM.from_pretrained(made.base)
    with torch.no_grad():
        expected = peft.PeftModel.from_pretrained(loaded, adapter).eval()(TOKENS).logits
    expert = weighted(f"{made.base}+{adapter}")
    recipes = {
        "alone": {"merge_method": "linear", "models": expert},
        "added": {"merge_method": "task_arithmetic", "models": expert, "base_model": str(made.base)},
    }
    for name, recipe in recipes.items():
        mixmerge.merge(recipe, tmp_path / name)
        model = assert_loads(tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        assert model.config.tie_word_embeddings is (case in ("neither", "kept so"))


def test_an_adapted_head_beside_a_tied_expert(
    family: Any, train: Train, tmp_path: Path, assert_loads: Any, read_tensors: Any
) -> None:
    made = family("llama_tied", experts=1, dtype="float32")
    adapter, _ = train(made.base, "adapter", target_modules=["lm_head"])
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(made.base),
        "models": weighted(f"{made.base}+{adapter}", str(made.experts[0])),
    }
    mixmerge.merge(recipe, tmp_path / "out")
    assert_loads(tmp_path / "out")
    from safetensors.torch import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    up, down = (next(x for name, x in factors.items() if f"lora_{part}" in name) for part in "BA")
    expert, merged = read_tensors(made.experts[0]), read_tensors(tmp_path / "out")
    embedding = expert["model.embed_tokens.weight"]
    torch.testing.assert_close(merged["model.embed_tokens.weight"], embedding, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged["lm_head.weight"], embedding + 2 * up @ down, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "dare_linear", "della", "slerp"])
def test_methods_over_adapters(
    family: Any, train: Train, tmp_path: Path, method: str, read_tensors: Any
) -> None:
    """Against full models of the same adapters; an entry near a threshold may fall on its other side."""
    base = family("llama", experts=0, dtype="float32").base
    settings = {"target_modules": ["q_proj", *MLP]}
    made = [
        train(base, f"adapter{seed}", seed=seed, **settings) for seed in range(1 if method == "slerp" else 2)
    ]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": f"{base}+{adapter}"} for adapter, _ in made],
        "parameters": {"t": 0.4} if method == "slerp" else {"weight": 0.6, "density": 0.5},
    }
    states = [{name: tensor.clone() for name, tensor in state.items()} for _, state in made]
    expected = mixmerge.merge_state_dicts(
        method, states, base=read_tensors(base), parameters=recipe["parameters"]
    )
    merged = []
    for kernels in (True, False):
        mixmerge.merge(recipe, tmp_path / str(kernels), kernels=kernels)
        merged.append(read_tensors(tmp_path / str(kernels)))
    far = total = 0
    for name, tensor in expected.items():
        assert torch.equal(merged[0][name], merged[1][name])
        far += int(((merged[0][name] - tensor).abs() > 1e-6).sum())
        total += tensor.numel()
    assert far <= total / 2000


def test_an_adapter_on_another_model_than_the_base(
    family: Any, train: Train, tmp_path: Path, read_tensors: Any
) -> None:
    made = family("llama", dtype="float32")
    adapter, full = train(made.experts[0], "adapter", target_modules=["q_proj", "down_proj"])
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(made.base),
        "models": weighted(f"{made.experts[0]}+{adapter}", str(made.experts[1])),
        "parameters": {"lambda": 0.5},
    }
    mixmerge.merge(recipe, tmp_path / "out")
    states = [full, read_tensors(made.experts[1])]
    expected = mixmerge.merge_state_dicts(
        "task_arithmetic", states, base=read_tensors(made.base), parameters={"weight": 1.0, "lambda": 0.5}
    )
    near(read_tensors(tmp_path / "out"), expected)


def test_small_chunks_of_whole_rows(
    family: Any, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of an adapter's delta are a function of that row alone, so chunks do not show."""
    from mixmerge.engine import worker

    base = family("llama", experts=0, dtype="bfloat16").base
    adapter, _ = train(base, "adapter", target_modules=["q_proj", *MLP, "embed_tokens"], use_dora=True)
    recipe = {
        "merge_method": "della",
        "base_model": str(base),
        "models": weighted(f"{base}+{adapter}"),
        "parameters": {"density": 0.5},
    }
    mixmerge.merge(recipe, tmp_path / "whole")
    monkeypatch.setattr(worker, "CHUNK", 150)
    mixmerge.merge(recipe, tmp_path / "pieces")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (
        tmp_path / "pieces/model.safetensors"
    ).read_bytes()


def test_a_plan_knows_its_adapters(family: Any, train: Train, clone: Any) -> None:
    base = family("llama", experts=0, dtype="float32").base
    one, _ = train(base, "one", target_modules=["q_proj"])
    other, _ = train(base, "other", target_modules=["q_proj"], lora_alpha=9)
    plans = [
        make_plan({"merge_method": "ties", "base_model": str(base), "models": weighted(f"{base}+{adapter}")})
        for adapter in (one, clone(one), other)
    ]
    assert plans[0].hash == plans[1].hash != plans[2].hash
    adapted = [task.sources[0] for task in plans[0].tasks if task.sources[0].adapter]
    assert len(adapted) == 2
    assert all(source.delta_only for source in adapted)
    factors = sum(header.nbytes for delta in plans[0].models[1].deltas.values() for header in delta.headers)
    weights = sum(header.nbytes for header in plans[0].models[0].tensors.values())
    assert plans[0].bytes_read == weights + factors


@pytest.mark.parametrize("case", ["linear layers", "Conv1D", "experts"])
def test_spectral_methods_of_adapters_are_those_of_merged_experts(
    family: Any, train: Train, tmp_path: Path, case: str, read_tensors: Any
) -> None:
    """The factors of adapters, those of a stack of experts too, give what the dense deltas give."""
    name, settings = CASES[case]
    base = family(name, experts=0, dtype="float32").base
    adapters = [train(base, f"adapter{seed}", seed=seed, **settings)[0] for seed in range(2)]
    short: dict[str, dict[str, Any]] = {"wudi": {"steps": 20}, "doge_ta": {"steps": 5, "density": 1.0}}
    for method in ("tsv_m", "iso_c", "iso_cts", "wudi", "doge_ta"):
        found = []
        for kind, experts in (
            ("thin", [f"{base}+{adapter}" for adapter in adapters]),
            ("dense", [f"{adapter}-merged" for adapter in adapters]),
        ):
            recipe = {
                "merge_method": method,
                "base_model": str(base),
                "models": [{"model": expert} for expert in experts],
                "parameters": short.get(method, {}),
            }
            mixmerge.merge(recipe, tmp_path / f"{method}-{kind}")
            found.append(read_tensors(tmp_path / f"{method}-{kind}"))
        thin, dense = found
        assert any(not torch.equal(thin[key], value) for key, value in read_tensors(base).items())
        for key, expected in dense.items():
            torch.testing.assert_close(
                thin[key], expected, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}"
            )
