"""The engine of fusion: its promises, its arithmetic, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.engines.contract import check_engine
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Message, Request, Scoring
from mixmerge.errors import MixmergeError
from mixmerge.logits.engine import FusionEngine
from mixmerge.logits.fusing import Settings, fuse

TEXT = "the quick brown fox jumps over"


def last_logits(folder: Path, text: str) -> Tensor:
    """``(1, V)``: what transformers gives after a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(text)["input_ids"]])
    with torch.no_grad():
        return model(ids).logits[:, -1]


@pytest.mark.parametrize("mode", ["static", "joint"])
def test_the_engine_keeps_its_promises(roles: Any, mode: str) -> None:
    check_engine(
        lambda: FusionEngine(str(roles.base), mode=mode, **roles.arguments()),
        adapters=["reference", "lora"],
    )


def test_a_token_is_drawn_from_the_fused_logits(roles: Any) -> None:
    engine = FusionEngine(str(roles.base), **roles.arguments())
    base, reference, full = (last_logits(one, TEXT) for one in (roles.base, roles.reference, roles.full))
    lora = adapted(roles, TEXT)
    for mode in ("static", "one", "joint", "grid"):
        settings = Settings(mode, 0.75)
        engine.set(settings)
        wanted = fuse(base, reference, [full, lora], settings, settings.fixed(("full", "lora")))
        asked = Request("r", TEXT, 1, logprobs=True, explain=True)
        given = engine.generate([asked])[0]
        assert given.logprobs is not None
        assert given.weights is not None
        logp = wanted.logits.log_softmax(-1)
        assert given.logprobs[0] == pytest.approx(logp.max().item(), abs=2e-4)
        assert given.weights["steps"][0] == pytest.approx(wanted.alphas[0].tolist(), abs=2e-2)
        assert given.weights["mean"].keys() == {"full", "lora"}
        assert given.weights["covered"] == 1
    engine.set(Settings("static", 0.0))
    plain = TransformersEngine(str(roles.base))
    requests = [Request(str(at), text, 6, seed=at) for at, text in enumerate(("a b", TEXT, "x"))]
    assert [one.text for one in engine.generate(requests)] == [one.text for one in plain.generate(requests)]
    scored = [Scoring("s", "the quick", " brown fox")]
    assert engine.loglikelihood(scored) == plain.loglikelihood(scored)


def adapted(roles: Any, text: str) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(roles.reference, dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(roles.reference)(text)["input_ids"]])
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(roles.adapter)).eval()(ids).logits[:, -1]


def test_the_reference_is_in_memory_once(roles: Any) -> None:
    engine = FusionEngine(str(roles.base), **roles.arguments())
    before = engine.memory()
    with engine:
        assert len(engine._hosts) == 3
        assert engine.memory() == pytest.approx(before, rel=0.02)
        sizes = [TransformersEngine(str(one)).memory() for one in (roles.base, roles.reference, roles.full)]
        assert sum(sizes) < engine.memory() < 1.1 * sum(sizes)
    assert not any(host.loaded for host in engine._hosts.values())


def test_a_cut_base_and_texts_read_whole(roles: Any) -> None:
    """Texts scored whole give what was said as they were generated, token by token."""
    engine = FusionEngine(str(roles.base), mode="one", top_p_base=0.6, clip=3.0, **roles.arguments())
    request = Request("r", TEXT, 5, temperature=0.9, seed=3, logprobs=True)
    given = engine.generate([request])[0]
    assert given.logprobs is not None
    assert all(value > -20 for value in given.logprobs)
    engine.set(Settings("one", clip=3.0))
    greedy = engine.generate([Request("r", TEXT, 5, logprobs=True)])[0]
    scored = engine.loglikelihood([Scoring("s", TEXT, greedy.text)])[0]
    if scored.greedy:  # the same tokens
        assert scored.logprobs == pytest.approx(greedy.logprobs, abs=1e-3)


def test_the_least_context_counts(roles: Any, clone: Callable[[Path], Path]) -> None:
    short = clone(roles.reference)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    engine = FusionEngine(str(roles.base), reference=str(short), experts={"full": str(roles.full)})
    (fault,) = engine.check([Request("r", TEXT * 2, 2)])
    assert "reads less than 16" in str(fault)
    given = engine.generate([Request("r", "a b", 40)])[0]
    assert given.tokens_in + given.tokens_out <= 16


# --- other vocabularies


@pytest.fixture(scope="module")
def foreign(family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small models with tokenizers of their own: single bytes only; and ids in another order."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    made = {}
    small = family("llama", dtype="float32")
    for kind in ("bytes", "turned"):
        tokenizer = AutoTokenizer.from_pretrained(small.base)
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        vocabulary = whole["model"]["vocab"]
        if kind == "bytes":
            kept = sorted((at, one) for one, at in vocabulary.items() if len(one) == 1 or one.startswith("<"))
            whole["model"]["merges"] = []
            whole["model"]["vocab"] = {one: at for at, (_, one) in enumerate(kept)}
        else:
            plain = [one for one in vocabulary if not one.startswith("<")]
            turned = dict(zip(plain, reversed([vocabulary[one] for one in plain]), strict=True))
            whole["model"]["vocab"] = {**vocabulary, **turned}
        for one in whole["added_tokens"]:
            one["id"] = whole["model"]["vocab"][one["content"]]
        new = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(json.dumps(whole)),
            pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64,
        )  # fmt: skip
        for name, folder in (("reference", small.base), ("expert", small.experts[0])):
            target = tmp_path_factory.mktemp(kind) / name
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            if kind == "bytes":
                model.resize_token_embeddings(len(whole["model"]["vocab"]))
            else:
                with torch.no_grad():
                    order = torch.arange(len(vocabulary))
                    for word, at in vocabulary.items():
                        order[whole["model"]["vocab"][word]] = at
                    for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                        weight.copy_(weight[order].clone())
            model.save_pretrained(target)
            new.save_pretrained(target)
            made[f"{kind} {name}"] = target
    return made


def turned(roles: Any, foreign: dict[str, Path]) -> tuple[FusionEngine, FusionEngine]:
    """A fusion, and the same with small models under other token ids."""
    other = FusionEngine(
        str(roles.base),
        reference=str(foreign["turned reference"]),
        experts={"full": str(foreign["turned expert"])},
        vocabulary="intersection",
    )
    return FusionEngine(
        str(roles.base), reference=str(roles.reference), experts={"full": str(roles.full)}
    ), other


def test_tokens_in_another_order_change_nothing(roles: Any, foreign: dict[str, Path]) -> None:
    """The same small models under other token ids: every token is shared, and every answer the same."""
    same, other = turned(roles, foreign)
    requests = [Request(str(at), text, 8, logprobs=True) for at, text in enumerate((TEXT, "a", "1 + 2"))]
    for one, two in zip(same.generate(requests), other.generate(requests), strict=True):
        assert one.text == two.text
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-3)
    scorings = [Scoring("s", "the quick", " brown fox"), Scoring("t", "", TEXT)]
    for first, second in zip(same.loglikelihood(scorings), other.loglikelihood(scorings), strict=True):
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-3)


def test_a_small_model_of_single_bytes(roles: Any, foreign: dict[str, Path]) -> None:
    arguments = {
        "reference": str(foreign["bytes reference"]),
        "experts": {"full": str(foreign["bytes expert"])},
    }
    with pytest.raises(MixmergeError) as error:
        FusionEngine(str(roles.base), **arguments).load()
    assert len(error.value.faults) == 2
    assert "vocabulary of 261 tokens is not the base's of 280" in str(error.value)
    assert "vocabulary: intersection" in str(error.value)
    engine = FusionEngine(str(roles.base), vocabulary="intersection", mode="one", **arguments)
    check_engine(lambda: FusionEngine(str(roles.base), vocabulary="intersection", mode="one", **arguments))
    reference, expert = engine.maps()
    assert len(reference.base) == len(expert.base) == 261
    assert reference.longest > 1
    given = engine.generate([Request("r", TEXT, 12, explain=True)])[0]
    assert given.weights is not None
    assert 0 < given.weights["covered"] < 1
    # 64 bytes are all that the small models read
    near = engine.generate([Request("r", "x" * 55, 40)])[0]
    assert near.finish == "length"
    assert near.tokens_out < 15
    (fault,) = engine.check([Request("r", TEXT * 3, 2)])
    assert "tokens for reference" in str(fault)
    with pytest.raises(MixmergeError, match="It reads 64"):
        engine.loglikelihood([Scoring("s", TEXT, TEXT * 2)])


def test_a_prompt_with_special_tokens_is_scored_as_it_is_read(roles: Any, foreign: dict[str, Path]) -> None:
    """As chats that were rendered before have them."""
    same, other = turned(roles, foreign)
    scorings = [Scoring("s", "the </s> quick", " brown fox"), Scoring("t", "<s>a<pad> b", " 1 + 2")]
    for first, second in zip(same.loglikelihood(scorings), other.loglikelihood(scorings), strict=True):
        assert first.logprobs == pytest.approx(second.logprobs, abs=1e-3)


def test_each_small_model_may_have_its_own_template(
    roles: Any, clone: Callable[[Path], Path], tmp_path: Path
) -> None:
    expert = clone(roles.full)
    config = json.loads((expert / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}user: {{ m.content }} {% endfor %}"
    (expert / "tokenizer_config.json").write_text(json.dumps(config))
    turns = (Message("user", "the fox"),)

    def logprobs(template: str, folder: Path, prompt: Any) -> Any:
        engine = FusionEngine(
            str(roles.base), reference=str(roles.reference), experts={"full": str(folder)},
            mode="static", template=template,
        )  # fmt: skip
        return engine.generate([Request("r", prompt, 4, logprobs=True), Request("o", TEXT, 3)])[0].logprobs

    plain = logprobs("own", roles.full, turns)
    assert logprobs("base", expert, turns) == pytest.approx(plain, abs=1e-4)
    assert logprobs("own", expert, turns) != pytest.approx(plain, abs=1e-4)


# --- what is refused


def test_what_cannot_be_loaded_is_said_of_all(
    roles: Any, family: Callable[..., Any], clone: Callable[[Path], Path], tmp_path: Path
) -> None:
    without = clone(roles.full)
    for path in without.glob("tokenizer*"):
        path.unlink()
    engine = FusionEngine(
        str(roles.base),
        reference=str(roles.reference),
        experts={"none": str(tmp_path / "none"), "bert": str(family("bert").base), "mute": str(without)},
        name="mix",
    )
    with pytest.raises(MixmergeError) as error:
        engine.load()
    said = [str(fault) for fault in error.value.faults]
    assert [one.split(": ")[1] for one in said] == ["none", "bert", "mute"]
    assert "does not continue texts" in said[1]
    assert not engine.loaded
    assert not any(host.loaded for host in engine._hosts.values())


def test_wrong_arguments_are_refused_when_it_is_made(roles: Any) -> None:
    with pytest.raises(MixmergeError) as error:
        FusionEngine(
            str(roles.base), reference="x", experts={"base": "y"}, adapters={"a": "b"}, vocabulary="none"
        )  # fmt: skip
    assert len(error.value.faults) == 3
    with pytest.raises(MixmergeError, match="there is none that shifts"):
        FusionEngine(str(roles.base), reference="x", experts={})
    with pytest.raises(MixmergeError, match="no expert that shifts is called 'c'"):
        FusionEngine(str(roles.base), reference="x", experts={"a": "y"}, alpha={"c": 1.0})
    with pytest.raises(MixmergeError, match="takes no further adapters"):
        FusionEngine(str(roles.base), reference="x", experts={"a": "y"}).add_adapter("b", "z")


def test_arguments_of_every_kind_are_refused_at_once(roles: Any) -> None:
    with pytest.raises(MixmergeError) as error:
        FusionEngine(
            str(roles.base), reference={"modle": "x"}, experts={"a": {"model": "y", "adaptor": "z"}, "b": 3},
            mode="two", template="mine", name="mix",
        )  # fmt: skip
    said = [str(one) for one in error.value.faults]
    assert [one.split(": ")[0] for one in said] == ["mode", *["engine mix"] * 4]
    assert "engine mix: reference: is {'modle': 'x'}. A folder or hub id, or {model: ..., adapter" in said[1]


def test_a_small_model_with_a_window_that_spells(
    roles: Any, foreign: dict[str, Path], tmp_path: Path
) -> None:
    """Tokens that are spelled by unequal numbers of others leave holes, which a window would count."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(foreign["bytes reference"])
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=len(tokenizer), intermediate_size=16, sliding_window=6, **sizes)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    experts = {"full": str(foreign["bytes expert"])}
    engine = FusionEngine(
        str(roles.base), reference=str(tmp_path), experts=experts, vocabulary="intersection", name="mix"
    )
    with pytest.raises(
        MixmergeError, match="engine mix: reference: has layers that see a window of tokens, or"
    ):
        engine.load()
    assert not any(host.loaded for host in engine._hosts.values())


def test_memory_that_runs_out(roles: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmerge.engines import local
    from mixmerge.errors import OutOfMemoryError

    loading, seen = local.load_model, []

    def full(model: str, *rest: Any) -> Any:
        seen.append(model)
        if len(seen) == 3:
            raise MemoryError("no memory left")
        return loading(model, *rest)

    monkeypatch.setattr(local, "load_model", full)
    engine = FusionEngine(str(roles.base), name="mix", **roles.arguments())
    with pytest.raises(OutOfMemoryError, match="engine mix: full: out of memory while it was loaded"):
        engine.load()
    assert not any(host.loaded for host in engine._hosts.values())
