"""vLLM: against a stand-in of its calls in the worker's process, and the real one where there is one.

``MIXMERGE_VLLM_PYTHON`` may name an interpreter that has vLLM, if this one has not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mixmerge.engines.contract import check_engine
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Generation, Message, Request
from mixmerge.engines.vllm import VllmEngine, VllmOptions
from mixmerge.engines.vllm_inside import VllmInside
from mixmerge.errors import DependencyError, MixmergeError, OutOfMemoryError
from mixmerge.registry import find

STANDIN, ROOT = Path(__file__).parent / "vllm_standin", Path(__file__).parent.parent.parent
PROMPTS = ["one two three", "a", "the quick brown fox jumps"]
REAL_PYTHON = os.environ.get("MIXMERGE_VLLM_PYTHON") or (
    sys.executable if importlib.util.find_spec("vllm") is not None else None
)


def make_adapter(base: Path, folder: Path, seed: int, rank: int) -> str:
    """A LoRA adapter that peft writes, strong enough to change texts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    wrapped.save_pretrained(str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def base(family: Callable[..., Any]) -> Path:
    return Path(family("llama", dtype="float32").base)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(base, root / name, seed, 2 + seed) for seed, name in enumerate(["a", "b"])}


def on_standin(python: str, model: Path, platform: str, **arguments: Any) -> VllmEngine:
    path = os.pathsep.join([str(STANDIN), str(ROOT)])
    environment = {"PYTHONPATH": path, "STANDIN_PLATFORM": platform}
    return VllmEngine(str(model), name="v", python=python, environment=environment, **arguments)


@pytest.fixture
def engine(base: Path, programs: Any) -> Iterator[Callable[..., VllmEngine]]:
    """``engine(platform, model=base, **arguments)`` on the stand-in; all are unloaded at the end."""
    made = []

    def make(platform: str = "cpu", *, model: Path = base, **arguments: Any) -> VllmEngine:
        made.append(on_standin(programs.python, model, platform, **arguments))
        return made[-1]

    yield make
    for one in made:
        one.unload()


@pytest.fixture(scope="module")
def shared(base: Path, programs: Any, adapters: dict[str, str]) -> Iterator[VllmEngine]:
    """One that has adapters, can sleep and is used by many tests: a process of transformers takes seconds to start."""
    with on_standin(programs.python, base, "cuda", adapters=adapters, options={"sleep_mode": True}) as made:
        yield made


def texts(engine: Any, asked: list[Request]) -> list[str]:
    return [one.text for one in engine.generate(asked)]


# --- without a process


def test_it_is_in_the_table() -> None:
    assert find("engine", "vllm") is VllmEngine
    made = VllmEngine("x", options=VllmOptions(max_model_len=9))
    assert (made.loaded, made.pid, made.batch_exact) == (False, None, False)
    assert made.capabilities == {"generate", "stream", "logprobs"}
    assert "vllm" not in sys.modules


def test_wrong_options() -> None:
    with pytest.raises(MixmergeError) as caught:
        VllmEngine(
            "x", name="v", options={"max_modle_len": 9, "dtype": "float8", "gpu_memory_utilization": 1.5}
        )
    said = "\n".join(str(fault) for fault in caught.value.faults)
    assert len(caught.value.faults) == 3
    assert "engine v: max_modle_len: is no option. Did you mean 'max_model_len'?" in said
    assert "engine v: dtype: is 'float8'" in said
    assert "engine v: gpu_memory_utilization: is 1.5" in said


def test_what_vllm_is_given(adapters: dict[str, str], tmp_path: Path) -> None:
    plain = VllmInside("x", revision="r", options={"max_num_seqs": 4})._given(1)
    assert "enable_lora" not in plain
    assert "max_model_len" not in plain, "vLLM's own default"
    assert (plain["max_num_seqs"], plain["revision"], plain["trust_remote_code"]) == (4, "r", False)
    assert plain["enable_prefix_caching"] is False
    assert VllmInside("x")._rank() == 1
    assert VllmInside("x", adapters=adapters)._rank() == 8
    config = {"r": 8, "rank_pattern": {"q_proj": 24}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    inside = VllmInside("x", adapters={str(at): str(tmp_path) for at in range(20)}, options={"max_loras": 3})
    assert inside._rank() == 32
    given = inside._given(32)
    assert (given["max_lora_rank"], given["max_loras"], given["max_cpu_loras"]) == (32, 3, 20)


def test_adapters_that_cannot_be(tmp_path: Path) -> None:
    for name, text in [("none", "{}"), ("torn", "{"), ("wide", '{"r": 513}'), ("list", "[]")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
    folders = {name: str(tmp_path / name) for name in ("none", "torn", "wide", "list", "gone")}
    with pytest.raises(MixmergeError) as caught:
        VllmInside("x", adapters=folders, name="v").load()
    said = [str(fault) for fault in caught.value.faults]
    assert [one.split(": ")[1] for one in said] == [f"adapter {name}" for name in folders]
    assert "has rank 513. vLLM takes 512 at most" in said[2]
    assert "cannot read" in said[4]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_vllm_is_not_installed(base: Path) -> None:
    with pytest.raises(
        DependencyError, match=r"engine v: vllm is not installed. pip install 'mixmerge\[vllm\]'"
    ):
        VllmEngine(str(base), name="v").load()


# --- the stand-in


@pytest.mark.slow
def test_the_stand_in_keeps_the_protocol(
    engine: Callable[..., VllmEngine], adapters: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(VllmInside, "batch_exact", True)  # the stand-in is: it shall keep the whole of it
    check_engine(lambda: engine(adapters=adapters), adapters=("a", "b"))


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_answers_and_adapters(
    shared: VllmEngine,
    engine: Callable[..., VllmEngine],
    base: Path,
    adapters: dict[str, str],
    platform: str,
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = shared if platform == "cuda" else engine(platform, adapters=adapters)
    asked = [
        Request(f"{prompt}/{name}", prompt, 6, adapter=name, logprobs=True)
        for prompt in PROMPTS
        for name in ("b", None, "a")
    ]
    given = made.generate(asked)
    plain = [one for one in asked if one.adapter is None]
    assert texts(TransformersEngine(str(base)), plain) == [one.text for one in given[1::3]]
    tokenizer = AutoTokenizer.from_pretrained(base)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapters["a"], "a")
    wrapped.load_adapter(adapters["b"], "b")
    for request, answer in zip(asked, given, strict=True):
        if request.adapter is None:
            continue
        wrapped.set_adapter(request.adapter)
        ids = tokenizer(request.prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = wrapped.eval().generate(input_ids=ids, do_sample=False, max_new_tokens=6)
        assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.logprobs is not None
        assert len(answer.logprobs) == answer.tokens_out
    assert len({one.text for one in given[:3]}) == 3, "the adapters change texts"
    with pytest.raises(MixmergeError, match=r"v has no adapter 'c'\. Known: a, b"):
        made.generate([Request("x", "x", adapter="c")])


def test_prompts_context_and_ends(
    engine: Callable[..., VllmEngine], base: Path, clone: Callable[[Path], Path]
) -> None:
    folder, many = clone(base), [Request(str(at), f"say {at}", 30, logprobs=True) for at in range(12)]
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    )
    (folder / "chat_template.jinja").write_text(template)
    said = "".join(one.text for one in TransformersEngine(str(base)).generate(many))
    tokens = json.loads((base / "tokenizer.json").read_text())["model"]["vocab"]
    end = max(sorted(set(said) & tokens.keys()), key=said.count)  # something that is really said ends texts
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": end}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[end]}))
    made, here = engine(model=folder, options={"max_model_len": 48}), TransformersEngine(str(folder))

    given, same = made.generate(many), here.generate(many)
    assert [(one.tokens_out, one.finish) for one in given] == [(one.tokens_out, one.finish) for one in same]
    assert {one.finish for one in given} == {"stop", "length"}
    assert all(one.logprobs is not None and len(one.logprobs) == one.tokens_out for one in given)

    chat = Request("chat", (Message("system", "be"), Message("user", "one")), 4)
    answer = made.generate([chat])[0]
    assert replace(answer, seconds=0.0) == replace(here.generate([chat])[0], seconds=0.0)
    bounded = made.generate([Request("long", "x," * 20, 50)])[0]
    assert bounded.tokens_in + bounded.tokens_out <= 48
    asked = [Request("a", "x," * 24), Request("b", (Message("tool", "x"),)), Request("c", "x", 2)]
    faults = made.check(asked)
    assert "request a: prompt: has 48 tokens. v reads less than 48" in str(faults[0])
    assert "request b: prompt: v refuses these turns: no tools" in str(faults[1])
    assert faults[2] is None
    with pytest.raises(MixmergeError) as caught:
        made.generate(asked)
    assert list(caught.value.faults) == faults[:2]
    each = made.generate_each(asked)
    assert each[:2] == faults[:2]
    assert isinstance(each[2], Generation)


def test_sleep(shared: VllmEngine, engine: Callable[..., VllmEngine]) -> None:
    made, awake = shared, engine()
    awake.sleep()
    assert awake.pid is None, "there is nothing to put to sleep"
    asked = [Request(name or "none", "one two", 6, adapter=name) for name in (None, "a", "b")]
    before = texts(made, asked)
    pid = made.pid
    for level in (1, 2):
        made.sleep(level)
        assert not made.loaded
        assert made.pid == pid
        assert texts(made, asked) == before
        assert made.loaded
        made.sleep(level)
        made.load()
        assert made.loaded
    with pytest.raises(MixmergeError, match=r"level: is 3\. 1 or 2"):
        made.sleep(3)
    with pytest.raises(MixmergeError, match="engine v: sleep_mode: is off"):
        VllmInside("x", name="v").sleep(1)


@pytest.mark.slow
def test_what_cannot_be_loaded(
    engine: Callable[..., VllmEngine], adapters: dict[str, str], clone: Callable[[Path], Path], tmp_path: Path
) -> None:
    with pytest.raises(MixmergeError, match="engine v: cannot load it: Sleep mode is not supported"):
        engine(options={"sleep_mode": True}).load()
    with pytest.raises(MixmergeError, match="engine v: cannot load it: "):
        engine(model=tmp_path).load()
    torn = clone(Path(adapters["a"]))
    (torn / "adapter_model.safetensors").unlink()
    with pytest.raises(MixmergeError, match="engine v: cannot load adapter torn: "):
        engine(adapters={"a": adapters["a"], "torn": str(torn)}).load()


def test_out_of_memory_leaves_nothing_behind(shared: VllmEngine) -> None:
    made = shared
    asked = [Request(prompt, prompt, 6) for prompt in PROMPTS]
    before = texts(made, asked)
    with pytest.raises(OutOfMemoryError, match="engine v: out of memory: CUDA out of memory"):
        made.generate([*asked, Request("large", "x", 6, seed=13)])
    assert texts(made, asked) == before


def test_a_stream_that_is_left(shared: VllmEngine) -> None:
    made = shared
    pieces = made.stream(Request("r", "one two", 40))
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert texts(made, [Request("r", "one", 3)]) == texts(made, [Request("s", "one", 3)])


# --- vLLM itself


@pytest.mark.slow
@pytest.mark.skipif(REAL_PYTHON is None, reason="vllm is not installed")
def test_vllm_keeps_the_protocol(tokenizer: Any, tmp_path: Path) -> None:
    """In float32, on any platform: the contract, greedy texts of transformers, and each adapter's own."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=192,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    base = tmp_path / "base"
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapters = {name: make_adapter(base, tmp_path / name, seed, 4) for seed, name in enumerate("ab")}
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 16, "kv_cache_memory_bytes": 2**26}

    def make() -> VllmEngine:
        return VllmEngine(str(base), adapters=adapters, options=options, python=REAL_PYTHON, name="v")

    check_engine(make, adapters=("a", "b"), tolerance=1e-3)
    with make() as made:
        asked = [Request(f"{p}/{name}", p, 8, adapter=name) for p in PROMPTS for name in ("a", None, "b")]
        together = texts(made, asked)
        assert together == [texts(made, [one])[0] for one in asked]
        assert together[1::3] == texts(TransformersEngine(str(base)), asked[1::3])
        assert len(set(together[:3])) == 3
