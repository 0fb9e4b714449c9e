"""Adapters over one base: rows of different ones in one batch, against PEFT, alone and by hand."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.engines import adapter_reading, adapters
from mixmerge.engines.adapters import Bank, Factors
from mixmerge.engines.contract import check_engine
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Generation, Request, Scoring
from mixmerge.errors import DependencyError, MixmergeError

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
PROMPTS = ["a", "one two three", "the quick brown fox", "1 + 2 = ", "lazy"]
LLAMA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear", "r": 3},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "r": 5, "use_rslora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "r": 4,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 5},
    },
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"], "r": 2},
    "dora": {"target_modules": ["up_proj", "v_proj"], "use_dora": True, "lora_alpha": 5},
}
BIASED = {
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "lora_bias": {"target_modules": ["q_proj", "gate_proj"], "lora_bias": True, "lora_alpha": 3},
}
OTHERS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": LLAMA,
    "llama_bias": BIASED,
    "llama_tied": {"head": {"target_modules": ["lm_head", "q_proj"]}, "both": LLAMA["embedding"]},
    "gpt2": {
        "one": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
        "dora": {"target_modules": ["c_proj"], "fan_in_fan_out": True, "use_dora": True},
    },
    "gpt_neox": {"one": {"target_modules": ["query_key_value", "dense"], "r": 2}},
    "mixtral": {"one": {"target_modules": ["q_proj", "o_proj"], "r": 2}},
}

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def adapter(family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``adapter(name, settings, seed=0)``: a folder PEFT wrote, far enough from the base to change answers."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(name: str, settings: dict[str, Any], *, seed: int = 0) -> Path:
        key = json.dumps([name, settings, seed])
        if key not in made:
            folder = tmp_path_factory.mktemp("adapter")
            base = AutoModelForCausalLM.from_pretrained(family(name, dtype="float32").base)
            model = peft.get_peft_model(base, peft.LoraConfig(**json.loads(json.dumps(settings))))
            drawn = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for part, value in sorted(model.named_parameters()):
                    noise = torch.randn(value.shape, generator=drawn)
                    if "lora_magnitude" in part:
                        value.mul_(1 + 0.3 * noise)
                    elif "lora_" in part:
                        value.add_(0.3 * noise)
            model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


def folders(adapter: Make, name: str) -> dict[str, str]:
    return {one: str(adapter(name, settings)) for one, settings in OTHERS[name].items()}


@pytest.fixture
def engine(family: Callable[..., Any], adapter: Make) -> Callable[..., TransformersEngine]:
    """``engine(family, **options)``: with all of its adapters."""

    def make(name: str = "llama", **options: Any) -> TransformersEngine:
        given = {"adapters": folders(adapter, name), **options}
        return TransformersEngine(str(family(name, dtype="float32").base), **given)

    return make


@pytest.fixture(params=["together", "run by run"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to apply factors, whatever is cheaper."""
    monkeypatch.setattr(adapters, "_CALL", 10**18 if request.param == "together" else -1)


@pytest.mark.parametrize("name", list(OTHERS))
def test_every_row_is_that_of_peft_under_its_adapter(
    name: str, way: None, engine: Callable[..., TransformersEngine], family: Callable[..., Any]
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = engine(name)
    names = [None, *asked.adapters, asked.adapters[0]]
    scorings = [
        Scoring(f"{prompt} {one}", prompt, " jumps over" * (1 + at % 2), adapter=one)
        for at, prompt in enumerate(PROMPTS)
        for one in names
    ]
    found = {one.id: one for one in asked.loglikelihood(scorings)}
    base = family(name, dtype="float32").base
    tokenizer = AutoTokenizer.from_pretrained(base)
    for one in dict.fromkeys(names):
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        if one is not None:
            model = peft.PeftModel.from_pretrained(model, asked._adapters[one]).eval()
        for scoring in (each for each in scorings if each.adapter == one):
            ids = tokenizer(scoring.prompt + scoring.continuation, return_tensors="pt")["input_ids"]
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0].log_softmax(-1)
            count = len(found[scoring.id].logprobs)
            expected = [float(logits[at - 1, ids[0, at]]) for at in range(ids.shape[1] - count, ids.shape[1])]
            np.testing.assert_allclose(
                found[scoring.id].logprobs, expected, atol=1e-4, err_msg=f"{name} {one}"
            )


def test_mixed_batches_keep_the_protocol(way: None, engine: Callable[..., TransformersEngine]) -> None:
    check_engine(engine, adapters=["plain", "dora", "embedding", "rslora"])


def test_a_mixed_batch_is_one_batch_and_gives_each_row_its_own(
    engine: Callable[..., TransformersEngine],
) -> None:
    one = engine()
    asked = [
        Request(f"{prompt} {name}", prompt, 3 + at, adapter=name)
        for at, prompt in enumerate(PROMPTS)
        for name in (*one.adapters, None)
    ]
    with one:
        batches = []
        answers = one._answers
        one._answers = lambda rows: batches.append(len(rows)) or answers(rows)  # type: ignore[method-assign]
        mixed = one.generate(asked)
        assert batches == [len(asked)]
        assert [answer.id for answer in mixed] == [request.id for request in asked]
        for request, answer in zip(asked, mixed, strict=True):
            assert one.generate([request])[0].text == answer.text
    by_prompt = {prompt: {g.text for g in mixed if g.id.startswith(f"{prompt} ")} for prompt in PROMPTS}
    assert all(len(texts) > 3 for texts in by_prompt.values()), "adapters change answers"


def test_the_base_is_as_it_was(engine: Callable[..., TransformersEngine]) -> None:
    """Its rows, its tensors, and its answers before and beside adapters."""
    with engine(adapters={}) as plain, engine() as full:
        ours = dict(full._expert().model.state_dict())
        theirs = plain._expert().model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(bool((ours[key] == theirs[key]).all()) for key in ours)
        assert not hasattr(full._expert().model, "peft_config")
        asked = [Request(prompt, prompt, 9) for prompt in PROMPTS]
        mixed = full.generate([*asked, replace(asked[0], id="x", adapter="plain")])
        assert [one.text for one in mixed[:-1]] == [one.text for one in plain.generate(asked)]


def test_an_adapter_is_added_without_loading_the_base_again(
    engine: Callable[..., TransformersEngine], adapter: Make
) -> None:
    one = engine(adapters={})
    one.add_adapter("plain", str(adapter("llama", LLAMA["plain"])))
    before = one.memory()
    with one:
        model = one._expert().model
        request = Request("a", "one two three", 9, adapter="plain")
        first = one.generate([request])[0].text
        one.add_adapter("dora", str(adapter("llama", LLAMA["dora"])))
        assert one._expert().model is model
        assert one.adapters == ("plain", "dora")
        given = one.generate([replace(request, adapter="dora"), request])
        assert (given[0].text != first, given[1].text) == (True, first)
        with pytest.raises(MixmergeError, match="adapter dora: there is one of that name"):
            one.add_adapter("dora", "elsewhere")
        other = adapter("gpt2", OTHERS["gpt2"]["one"])
        with pytest.raises(MixmergeError, match="adapter wrong: cannot load it"):
            one.add_adapter("wrong", str(other))
        assert one.adapters == ("plain", "dora")
        assert one.generate([request])[0].text == first
        assert before is not None
        assert (one.memory() or 0) > before
    assert one.generate([request])[0].text == first


def test_memory_counts_adapters(engine: Callable[..., TransformersEngine], adapter: Make) -> None:
    from safetensors.numpy import load_file

    plain = engine(adapters={})
    folder = adapter("llama", LLAMA["plain"])
    count = sum(value.size for value in load_file(folder / "adapter_model.safetensors").values())
    base = plain.memory()
    assert base is not None
    for dtype, size in (("auto", 4), ("bfloat16", 2)):
        one = engine(adapters={"a": str(folder), "b": str(folder)}, dtype=dtype)
        expected = base * size // 4 + 2 * count * size
        assert one.memory() == expected
        with one:
            assert one.memory() == expected
            assert one.generate([Request("a", "one", 3, adapter="b")])[0].tokens_out == 3
    assert engine(adapters={"a": "nobody/nothing"}).memory() is None


def test_unloading_gives_the_memory_back(engine: Callable[..., TransformersEngine]) -> None:
    """Hooks and layers refer to each other, so that nothing of it would go by itself."""
    loaded = engine()
    loaded.generate([Request("a", "one", 2, adapter=loaded.adapters[0]), Request("b", "two", 2)])
    kept = [weakref.ref(one) for one in loaded._expert().model.parameters()]
    gc.disable()
    try:
        loaded.unload()
        assert not any(one() is not None for one in kept)
    finally:
        gc.enable()


def test_an_adapter_that_is_not_there(engine: Callable[..., TransformersEngine], tmp_path: Path) -> None:
    one = engine()
    with pytest.raises(
        MixmergeError, match=r"request a: adapter: .* has no adapter 'x'\. Known: plain, rslora"
    ):
        one.generate([Request("a", "one", 3, adapter="x")])
    with pytest.raises(MixmergeError, match=r"scoring s: adapter: .* has no adapter 'x'"):
        one.loglikelihood([Scoring("s", "one", "two", adapter="x")])
    with pytest.raises(MixmergeError, match=r"scoring s: adapter: echo has no adapter 'x'\. Known: none"):
        EchoEngine().loglikelihood([Scoring("s", "one", "two", adapter="x")])
    missing = {"gone": str(tmp_path / "gone"), "empty": str(tmp_path)}
    broken = engine(adapters=missing)
    with pytest.raises(MixmergeError) as caught:
        broken.load()
    assert len(caught.value.faults) == 2
    assert "adapter gone" in str(caught.value)
    assert not broken.loaded


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("llama_bias", {"target_modules": ["q_proj"], "bias": "all"}, "bias: all replaces the base's biases"),
        (
            "llama",
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            "modules_to_save replaces lm_head",
        ),
        (
            "llama",
            {"target_modules": ["embed_tokens"], "use_dora": True},
            "DoRA of an embedding cannot be mixed",
        ),
        (
            "mixtral",
            {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"], "r": 3},
            "target_parameters adapts tensors of a mixture of experts",
        ),
        (
            "llama",
            {"target_modules": ["q_proj"], "trainable_token_indices": [3]},
            "trainable_token_indices is set",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(
    name: str, settings: dict[str, Any], words: str, adapter: Make, engine: Callable[..., TransformersEngine]
) -> None:
    one = engine(name, adapters={})
    with one:
        before = one.generate([Request("a", "one two", 8)])[0].text
        with pytest.raises(MixmergeError) as caught:
            one.add_adapter("odd", str(adapter(name, settings)))
        assert "adapter odd" in str(caught.value)
        assert words in str(caught.value)
        assert one.generate([Request("a", "one two", 8)])[0].text == before


def test_damaged_adapters(
    adapter: Make, engine: Callable[..., TransformersEngine], clone: Callable[[Path], Path]
) -> None:
    from safetensors.torch import load_file, save_file

    good = adapter("llama", LLAMA["plain"])
    tensors = load_file(good / "adapter_model.safetensors")
    first = sorted(tensors)[0]
    lacking, strange, infinite, wrong = (dict(tensors) for _ in range(4))
    del lacking[first]
    strange[first.replace("layers.0", "layers.7")] = tensors[first].clone()
    infinite[first] = tensors[first] * float("inf")
    wrong[first] = tensors[first][:, :3].contiguous()
    with engine(adapters={}) as one:
        for changed, words in (
            (lacking, "its file lacks 1 tensors"),
            (strange, "the base has no place for 1 tensors"),
            (infinite, "values that are not finite"),
            (wrong, "cannot load it"),
        ):
            folder = clone(good)
            save_file(changed, folder / "adapter_model.safetensors")
            with pytest.raises(MixmergeError, match=words):
                one.add_adapter("odd", str(folder))
        folder = clone(good)
        (folder / "adapter_model.safetensors").write_bytes(b"nothing")
        with pytest.raises(MixmergeError, match="cannot load it"):
            one.add_adapter("odd", str(folder))
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(MixmergeError, match="holds no adapter weights"):
            one.add_adapter("odd", str(folder))
        one.add_adapter("good", str(good))


def test_a_saved_copy_of_the_embedding_is_left_out_or_refused(
    adapter: Make, engine: Callable[..., TransformersEngine], clone: Callable[[Path], Path]
) -> None:
    """PEFT saves the whole embedding beside factors of it, and would put it in the base's place."""
    from safetensors.torch import load_file, save_file

    folder = clone(adapter("llama_tied", OTHERS["llama_tied"]["both"]))
    tensors = load_file(folder / "adapter_model.safetensors")
    whole = [name for name in tensors if "lora_" not in name]
    assert whole
    with engine("llama_tied", adapters={}) as one:
        kept = {name: value.data_ptr() for name, value in one._expert().model.named_parameters()}
        one.add_adapter("same", str(folder))
        assert {name: value.data_ptr() for name, value in one._expert().model.named_parameters()} == kept
        tensors[whole[0]] = tensors[whole[0]] + 1
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(MixmergeError, match="replaces whole tensors"):
            one.add_adapter("own", str(folder))
        assert {name: value.data_ptr() for name, value in one._expert().model.named_parameters()} == kept


# --- the bank by hand


def test_a_layer_by_hand(way: None) -> None:
    """x = (1, 2); the base gives x; a doubles the first, b adds 3 x second to both, with a scale and an offset."""
    import torch

    linear = torch.nn.Linear(2, 2, bias=False)
    embedding = torch.nn.Embedding(3, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        embedding.weight.copy_(torch.tensor([[1.0, 2.0], [5.0, 6.0], [7.0, 8.0]]))
    bank = Bank(torch.nn.Sequential(embedding, linear))
    bank._names += ["a", "b"]
    for module in (linear, embedding):
        bank._layers[module] = adapters._Layer(bank, module)
    bank._layers[linear].factors |= {
        "a": Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]])),
        "b": Factors(
            torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
            torch.tensor([[3.0, 3.0], [9.0, 9.0]]),
            torch.tensor([10.0, 100.0]),
            torch.tensor([0.5, 0.0]),
        ),
    }
    bank._layers[embedding].factors["b"] = Factors(
        torch.tensor([[4.0, 0.0, 1.0]]), torch.tensor([[1.0, -1.0]])
    )
    tokens = torch.tensor([[0], [0], [0], [1], [2]])
    with torch.inference_mode(), bank.answering(["a", None, "b", "b", "a"]):
        out = bank._model(tokens)[:, 0]
    # b turns token 0 into (5, -2): (10 * 5 + 0.5 - 6, 100 * -2 - 6)
    assert out.tolist() == [[2, 2], [1, 2], [44.5, -206], [68.5, 618], [14, 8]]
    with torch.inference_mode():
        assert bank._model(tokens)[:, 0].tolist() == [[1, 2], [1, 2], [1, 2], [5, 6], [7, 8]]
        assert bank.nbytes == 4 * (2 + 2 + 4 + 4 + 2 + 2 + 3 + 2)
        with bank.answering(["a", "b", None]), pytest.raises(MixmergeError, match="for 3 rows"):
            bank._model(tokens)


def test_what_overflows_for_one_adapter_does_not_reach_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(adapters, "_CALL", 10**18)
    linear = torch.nn.Linear(1, 1, bias=False)
    bank = Bank(linear)
    bank._layers[linear] = adapters._Layer(bank, linear)
    big, small = torch.tensor([[3e38]]), torch.tensor([[1.0]])
    bank._layers[linear].factors |= {"big": Factors(big, small), "small": Factors(small, small)}
    with torch.inference_mode(), bank.answering(["big", "small"]):
        out = linear(torch.full((2, 1, 1), 2.0))
    assert not out[0].isfinite().all()
    assert out[1].isfinite().all()


def test_the_contract_finds_adapters_that_are_ignored_or_leak() -> None:
    class Named(EchoEngine):
        @property
        def adapters(self) -> tuple[str, ...]:
            return ("a", "b")

    with pytest.raises(AssertionError, match="adapters answer as the base does"):
        check_engine(Named, adapters=["a", "b"])

    class Leaky(Named):
        def generate(self, requests: Any) -> list[Generation]:
            named = {request.adapter for request in requests}
            said = super().generate(requests)
            return [
                replace(one, text=f"{one.text}{request.adapter}{'!' * (len(named) > 2)}")
                for one, request in zip(said, requests, strict=True)
            ]

    with pytest.raises(AssertionError, match="what else is in the batch"):
        check_engine(Leaky, adapters=["a", "b"])


def test_peft_is_named_when_it_is_not_there(
    adapter: Make, engine: Callable[..., TransformersEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter("llama", LLAMA["plain"])
    with engine(adapters={}) as one:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(
            DependencyError, match=r"adapters need peft\. Run: pip install 'mixmerge\[peft\]'"
        ):
            one.add_adapter("a", str(folder))
    assert adapter_reading.stored_elements("nowhere") is None


@pytest.mark.slow
def test_the_benchmark_runs(family: Callable[..., Any], programs: Any, tmp_path: Path) -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "bench_adapters.py"
    base = family("llama", dtype="float32").base
    sizes = ("--adapters", "2", "--rows", "2", "--tokens", "3")
    done = programs(example, "--base", base, *sizes, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "2 adapters of rank 8 x 2 requests" in said
    assert "bar: at least 2 x" in said
    assert "100% of the texts are the same both ways" in said
