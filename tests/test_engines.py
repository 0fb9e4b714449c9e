"""Engines: the protocol, echo, and transformers on tiny real models."""

from __future__ import annotations

import gc
import json
import math
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from mixmerge.engines.base import Engine
from mixmerge.engines.batching import batches
from mixmerge.engines.callables import generator, likelihoods
from mixmerge.engines.contract import check_engine
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Generation, Message, Request, Scoring, cut_at_stop, held_back
from mixmerge.errors import MixmergeError
from mixmerge.experts.loading import read_config
from mixmerge.registry import find

PROMPTS = ["a", "one two three", "the quick brown fox jumps over it", "1 + 2 = ", "lazy"]


@pytest.fixture(scope="module")
def tiny(family: Callable[..., Any]) -> Callable[..., TransformersEngine]:
    """``tiny(name, **options)``: an engine of a tiny float32 model."""

    def make(name: str = "llama", **options: Any) -> TransformersEngine:
        return TransformersEngine(str(family(name, dtype="float32").base), **options)

    return make


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., TransformersEngine]) -> TransformersEngine:
    return tiny()


# --- records


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: is 0. 1 or more"),
        ({"temperature": -0.1}, "temperature: is -0.1"),
        ({"temperature": math.nan}, "temperature: is nan"),
        ({"top_p": 0.0}, "top_p: is 0.0. Above 0, at most 1"),
        ({"top_p": 1.5}, "top_p: is 1.5"),
        ({"stop": ("x", "")}, "stop: is ['x', '']"),
        ({"seed": -1}, "seed: is -1"),
        ({"prompt": ""}, "prompt: is empty"),
        ({"prompt": ()}, "prompt: is empty"),
        ({"prompt": (Message("robot", "x"),)}, "prompt[0].role: is 'robot'. system, user, assistant, tool"),
    ],
)
def test_a_wrong_request(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MixmergeError) as caught:
        Request(**{"id": "7", "prompt": "x", **options})
    assert f"request 7: {words}" in str(caught.value)


def test_all_faults_of_a_request_at_once() -> None:
    with pytest.raises(MixmergeError) as caught:
        Request("7", "", max_new_tokens=0, top_p=2)
    assert len(caught.value.faults) == 3


def test_an_empty_continuation() -> None:
    with pytest.raises(MixmergeError, match="continuation: is empty"):
        Scoring("s", "x", "")


def test_stop_texts_by_hand() -> None:
    assert cut_at_stop("one two three", ["three", "two"]) == ("one ", True)
    assert cut_at_stop("one", ["two"]) == ("one", False)
    assert cut_at_stop("one", []) == ("one", False)
    assert held_back("answer: ##", ["###", "\n"]) == 2
    assert held_back("answer", ["###"]) == 0
    assert held_back("#", ["###"]) == 1


@given(st.text("ab#", max_size=12), st.lists(st.text("ab#", min_size=1, max_size=4), min_size=1, max_size=3))
def test_what_is_not_held_back_is_safe_to_show(text: str, stop: list[str]) -> None:
    before, stopped = cut_at_stop(text, stop)
    assert (before == text) is not stopped
    shown = text[: len(text) - held_back(text, stop)]
    for more in ("", *(one[n:] for one in stop for n in range(len(one)))):
        cut, _ = cut_at_stop(text + more, stop)
        assert stopped or cut.startswith(shown)


# --- batches


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=9), st.integers(0, 9)), max_size=20),
    st.integers(1, 60),
    st.integers(1, 5),
    st.randoms(),
)
def test_batches(rows: list[tuple[list[int], int]], budget: int, most: int, random: Any) -> None:
    texts, extra = [text for text, _ in rows], [more for _, more in rows]
    made = batches(texts, extra, budget=budget, rows=most)
    assert sorted(at for batch in made for at in batch) == list(range(len(rows)))
    for batch in made:
        assert 1 <= len(batch) <= most
        cost = len(batch) * (max(len(texts[at]) for at in batch) + max(extra[at] for at in batch))
        assert len(batch) == 1 or cost <= budget
    shuffled = random.sample(rows, len(rows))
    again = batches([text for text, _ in shuffled], [more for _, more in shuffled], budget=budget, rows=most)
    contents = [[rows[at] for at in batch] for batch in made]
    assert [[shuffled[at] for at in batch] for batch in again] == contents


def test_batches_by_hand() -> None:
    texts = [[1] * 8, [1], [1, 2], [1] * 3]
    assert batches(texts, [2] * 4, budget=12) == [[1, 2], [3], [0]]
    assert batches(texts, [2] * 4, budget=15) == [[1, 2, 3], [0]]
    assert batches([], [], budget=1) == []


# --- echo


def test_echo_keeps_the_protocol() -> None:
    check_engine(EchoEngine)


def test_echo_by_hand() -> None:
    engine = find("engine", "echo")()
    chat = (Message("user", "say one two three"),)
    given = engine.generate(
        [
            Request("a", "one two three", 2),
            Request("b", chat, 9, stop=("two",)),
            Request("c", "x", logprobs=True),
        ]
    )
    assert [one.text for one in given] == ["one two", "say one ", "x"]
    assert [one.finish for one in given] == ["length", "stop", "stop"]
    assert [one.tokens_in for one in given] == [3, 4, 1]
    assert given[2].logprobs == (math.log(0.5),)
    scripted = EchoEngine(reply=lambda request: f"seed {request.seed}")
    assert scripted.generate([Request("a", "x", seed=4)])[0].text == "seed 4"
    likely, unlikely = engine.loglikelihood([Scoring("a", "one two", " two"), Scoring("b", "one", " two")])
    assert (likely.total, likely.greedy) == (math.log(0.5), True)
    assert (unlikely.total, unlikely.greedy) == (math.log(0.01), False)


def test_what_an_engine_does_not_do_is_said() -> None:
    class Mute(EchoEngine):
        capabilities = frozenset({"generate"})
        stream, loglikelihood = Engine.stream, Engine.loglikelihood

    with pytest.raises(MixmergeError, match=r"engine mute: has no stream. It has: generate"):
        next(Mute("mute").stream(Request("a", "x")))
    with pytest.raises(MixmergeError, match="has no loglikelihood"):
        Mute("mute").loglikelihood([Scoring("a", "x", "y")])
    with pytest.raises(MixmergeError) as caught:
        Mute("mute").generate([Request(name, "x", logprobs=True) for name in "ab"])
    assert [fault.where for fault in caught.value.faults] == ["request a: logprobs", "request b: logprobs"]


# --- transformers


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_transformers_keep_the_protocol(name: str, tiny: Callable[..., TransformersEngine]) -> None:
    check_engine(lambda: tiny(name))


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "qwen3", "gemma", "gpt2", "mixtral"])
def test_greedy_answers_are_those_of_transformers(
    name: str, tiny: Callable[..., TransformersEngine], family: Callable[..., Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = family(name, dtype="float32").base
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tiny(name).generate([Request(prompt, prompt, 12) for prompt in PROMPTS])
    for prompt, answer in zip(PROMPTS, given, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
            )
        assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer.tokens_in == ids.shape[1]


def test_a_window_of_attention(family: Callable[..., Any], tmp_path: Path) -> None:
    """Rows that are padded and leave the batch, beside a cache that forgets."""
    import torch
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(family("llama").base)
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=280,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            sliding_window=6,
            initializer_range=0.3,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = [Request(prompt, prompt, 5 + 5 * at) for at, prompt in enumerate(PROMPTS)]
    for request, answer in zip(asked, TransformersEngine(str(tmp_path)).generate(asked), strict=True):
        ids = tokenizer(request.prompt, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            out = model.generate(ids, do_sample=False, max_new_tokens=request.max_new_tokens)
        assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_log_probabilities_agree_across_batches_and_with_the_model(
    name: str, tiny: Callable[..., TransformersEngine], family: Callable[..., Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [Scoring(prompt, prompt, " jumps over" * (at + 1)) for at, prompt in enumerate(PROMPTS)]
    together = tiny(name).loglikelihood(asked)
    apart = tiny(name, batch_tokens=1).loglikelihood(asked)
    model = AutoModelForCausalLM.from_pretrained(family(name, dtype="float32").base).eval()
    tokenizer = AutoTokenizer.from_pretrained(family(name, dtype="float32").base)
    for one, a, b in zip(asked, together, apart, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        before = tokenizer(one.prompt)["input_ids"]
        ids = tokenizer(one.prompt + one.continuation, return_tensors="pt")["input_ids"]
        assert ids[0, : len(before)].tolist() == before
        with torch.inference_mode():
            logits = model(ids).logits[0].log_softmax(-1)
        expected = [float(logits[at - 1, ids[0, at]]) for at in range(len(before), ids.shape[1])]
        np.testing.assert_allclose(a.logprobs, expected, atol=1e-4)
        assert a.total == pytest.approx(sum(expected), abs=1e-3)


def test_log_probabilities_of_generated_tokens_are_those_of_scoring_them(llama: TransformersEngine) -> None:
    answer = llama.generate([Request("a", "the quick", 6, temperature=1.0, seed=3, logprobs=True)])[0]
    assert answer.logprobs is not None
    scored = llama.loglikelihood([Scoring("a", "the quick", answer.text)])[0]
    if len(scored.logprobs) == len(answer.logprobs):  # the text may be read as other tokens
        np.testing.assert_allclose(scored.logprobs, answer.logprobs, atol=1e-4)
    greedy = llama.generate([Request("a", "the quick", 6, logprobs=True)])[0]
    assert greedy.logprobs is not None
    assert sum(greedy.logprobs) != sum(answer.logprobs)


def test_greedy_is_told(llama: TransformersEngine) -> None:
    answers = llama.generate([Request(str(n), "x" * n, 1) for n in range(1, 40)])
    prompt, best = next(("x" * int(one.id), one.text) for one in answers if one.text.isascii() and one.text)
    likely, other = llama.loglikelihood([Scoring("a", prompt, best), Scoring("b", prompt, best + " brown")])
    assert len(likely.logprobs) == 1
    assert likely.greedy
    assert not other.greedy
    assert likely.logprobs[0] == pytest.approx(other.logprobs[0], abs=1e-4)


def test_draws_depend_on_seed_and_prompt_alone(llama: TransformersEngine) -> None:
    asked = [Request(str(at), prompt, 8, temperature=1.5, seed=5) for at, prompt in enumerate(PROMPTS)]
    texts = [one.text for one in llama.generate(asked)]
    assert [one.text for one in llama.generate([asked[3], asked[0]])] == [texts[3], texts[0]]
    other = llama.generate([replace(one, seed=6) for one in asked])
    assert [one.text for one in other] != texts


def test_draws_follow_the_distribution() -> None:
    import torch

    from mixmerge.engines.decoding import drawn

    logits = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))
    uniform = (np.arange(1000) + 0.5) / 1000
    count = np.bincount([drawn(logits, 1.0, 1.0, u) for u in uniform], minlength=4)
    assert count.tolist() == [100, 500, 150, 250]
    # 0.5 and 0.25 are the smallest set of 0.7; 0.5 that of 0.5; of next to nothing, the likeliest one
    nucleus = np.bincount([drawn(logits, 1.0, 0.7, u) for u in uniform], minlength=4)
    assert nucleus.tolist() == [0, 667, 0, 333]
    assert {drawn(logits, 1.0, 0.5, u) for u in uniform} == {1}
    assert {drawn(logits, 1.0, 1e-9, u) for u in uniform} == {1}
    # temperature 1/2 squares the odds: 1 : 25 : 2.25 : 6.25
    cold = np.bincount([drawn(logits, 0.5, 1.0, u) for u in uniform], minlength=4)
    np.testing.assert_allclose(cold / 1000, np.array([1, 25, 2.25, 6.25]) / 34.5, atol=0.002)
    assert drawn(logits, 1.0, 1.0, 1 - 2**-53) == 3


def test_stop_texts_may_span_tokens(llama: TransformersEngine) -> None:
    whole = llama.generate([Request("a", "one two", 20)])[0]
    stop = whole.text[3:9]
    answer = llama.generate([Request("a", "one two", 20, stop=("not there", stop))])[0]
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert (answer.finish, whole.finish) == ("stop", "length")
    assert answer.tokens_out < whole.tokens_out == 20


def test_rows_end_one_by_one(llama: TransformersEngine) -> None:
    asked = [Request(str(n), "one two three", n) for n in (1, 9, 3, 20)]
    given = llama.generate(asked)
    assert [one.tokens_out for one in given] == [1, 9, 3, 20]
    assert all(given[3].text.startswith(one.text.rstrip("\ufffd")) for one in given)
    assert all(one.seconds >= 0 for one in given)


def test_an_end_token_ends(tiny: Callable[..., TransformersEngine], clone: Callable[[Path], Path]) -> None:
    engine = tiny()
    rows = engine._rows([Request("a", "one two", 5)])
    decoder = engine._decoder(rows)
    while decoder.live:
        decoder.step()
    ids, folder = rows[0].out, clone(Path(engine.model))
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [2, ids[3]]}))
    cut = TransformersEngine(str(folder)).generate([Request("a", "one two", 5, logprobs=True)])[0]
    assert (cut.finish, cut.tokens_out) == ("stop", ids.index(ids[3]))
    assert cut.logprobs is not None
    assert len(cut.logprobs) == cut.tokens_out


def test_tokens_without_embeddings(
    tiny: Callable[..., TransformersEngine], clone: Callable[[Path], Path]
) -> None:
    """A token that was added to the tokenizer alone is told where it is asked for; as padding it harms nobody."""
    engine = tiny()
    folder = clone(Path(engine.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    while len(tokenizer) <= rows:
        tokenizer.add_tokens([f"<extra {len(tokenizer)}>"])
    tokenizer.add_special_tokens({"pad_token": "<pad here>"})
    assert tokenizer.pad_token_id >= rows
    tokenizer.save_pretrained(folder)
    other = TransformersEngine(str(folder))
    requests = [Request(prompt, prompt, 5) for prompt in PROMPTS]
    assert [one.text for one in other.generate(requests)] == [one.text for one in engine.generate(requests)]
    beyond = tokenizer.convert_ids_to_tokens(rows)
    words = rf"holds '{re.escape(beyond)}', token {rows:,} of the tokenizer, and the model has embeddings of {rows:,}"
    with pytest.raises(MixmergeError, match=f"request b: prompt: {words}"):
        other.generate([Request("a", "one", 5), Request("b", f"one {beyond}", 5)])
    with pytest.raises(MixmergeError, match=f"scoring s: {words}"):
        other.loglikelihood([Scoring("s", "one ", beyond)])


def test_a_model_that_gives_no_cache_back_is_told(
    tiny: Callable[..., TransformersEngine], tmp_path: Path
) -> None:
    config = RecurrentGemmaConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=1,
        intermediate_size=64, lru_width=32, attention_window_size=16,
    )  # fmt: skip
    AutoTokenizer.from_pretrained(tiny().model).save_pretrained(tmp_path)
    RecurrentGemmaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(MixmergeError, match="recurrent_gemma: keeps no keys and values"):
        TransformersEngine(str(tmp_path)).generate([Request("a", "one", 5)])


def test_a_chat_template_is_used_where_there_is_one(
    llama: TransformersEngine, clone: Callable[[Path], Path]
) -> None:
    turns = (Message("system", "be brief"), Message("user", "one two"))
    plain = llama.generate([Request("a", turns, 4), Request("b", "be brief\n\none two", 4)])
    assert plain[0].text == plain[1].text
    folder = clone(Path(llama.model))
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]"
    )
    (folder / "chat_template.jinja").write_text(template)
    engine = TransformersEngine(str(folder))
    given = engine.generate(
        [Request("a", turns, 4), Request("b", "[system] be brief [user] one two [assistant]", 4)]
    )
    assert given[0].text == given[1].text
    assert given[0].tokens_in == given[1].tokens_in
    tool = Request("a", (Message("tool", "x"),), 4)
    assert "refuses these turns: no tools" in str(engine.check([tool])[0])
    with pytest.raises(MixmergeError, match=r"request a: prompt: .* refuses these turns"):
        engine.generate([tool])


def test_the_context_bounds_prompt_and_answer(llama: TransformersEngine) -> None:
    long, longer = "x," * 30, "x," * 40  # 60 and 80 tokens; the context is 64
    given = llama.generate([Request("a", long, 50)])[0]
    assert (given.tokens_in + given.tokens_out, given.finish) == (64, "length")
    asked = [Request("a", long, 50), Request("b", longer), Request("c", longer)]
    assert [fault is None for fault in llama.check(asked)] == [True, False, False]
    with pytest.raises(MixmergeError) as caught:
        llama.generate(asked)
    assert [fault.where for fault in caught.value.faults] == ["request b: prompt", "request c: prompt"]
    assert "has 80 tokens" in str(caught.value)
    with pytest.raises(MixmergeError, match="scoring s: has 81 tokens"):
        llama.loglikelihood([Scoring("s", longer, "y")])


def test_memory_and_unloading(tiny: Callable[..., TransformersEngine]) -> None:
    engine, half = tiny(), tiny(dtype="bfloat16")
    before = engine.memory()
    assert before is not None
    engine.load()
    assert engine.memory() == before
    assert engine.load_seconds > 0
    assert half.memory() == before // 2
    with half:
        assert half.memory() == before // 2
        assert half.generate([Request("a", "one", 3)])[0].tokens_out == 3
    kept = weakref.ref(engine._expert().model)
    engine.generate([Request("a", "one", 3)])
    collections = []

    def count(phase: str, info: Any) -> None:
        collections.append(phase)

    gc.disable()
    gc.callbacks.append(count)
    try:
        engine.unload()
    finally:
        gc.callbacks.remove(count)
        gc.enable()
    assert kept() is None
    assert not collections, "a collection takes a quarter of a second where transformers is loaded"


def test_what_cannot_be_loaded(
    tmp_path: Path,
    family: Callable[..., Any],
    clone: Callable[[Path], Path],
    read_tensors: Callable[[Path], dict[str, Any]],
) -> None:
    from safetensors.torch import save_file

    with pytest.raises(MixmergeError, match="cannot load it"):
        TransformersEngine(str(tmp_path)).load()
    with pytest.raises(MixmergeError, match="cannot load it"):
        TransformersEngine("nobody/nothing").load()
    for name, what in (("bert", "is a BertModel"), ("t5", "cannot load it|does not continue")):
        with pytest.raises(MixmergeError, match=what):
            TransformersEngine(str(family(name).base)).load()
    folder = clone(family("llama").base)
    tensors = read_tensors(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MixmergeError, match=r"lack 1 tensors, model\.norm\.weight"):
        TransformersEngine(str(folder)).load()
    (folder / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(MixmergeError, match="cannot load it"):
        TransformersEngine(str(folder)).load()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))
    with pytest.raises(MixmergeError, match=r"cannot load it: .*'hidden_size'\. A folder"):
        TransformersEngine(str(folder)).load()
    with pytest.raises(MixmergeError, match=r"x: cannot be loaded: .*'hidden_size'\. A folder"):
        read_config(folder, "x")


def test_wrong_options() -> None:
    with pytest.raises(MixmergeError) as caught:
        TransformersEngine("x", dtype="float8", batch_tokens=0)  # type: ignore[arg-type]
    assert len(caught.value.faults) == 2


def test_engines_as_functions(llama: TransformersEngine) -> None:
    texts = generator(llama, stop=("\n",))(["one", "two"], max_new_tokens=4, temperature=0.7, seeds=[1, 2])
    again = generator(llama, stop=("\n",))(["two"], max_new_tokens=4, temperature=0.7, seeds=[2])
    assert texts[1:] == again
    total = likelihoods(llama)(["one"], [" two"])
    assert total == [llama.loglikelihood([Scoring("a", "one", " two")])[0].total]


def test_the_contract_can_fail() -> None:
    class Forgetful(EchoEngine):
        def generate(self, requests: Any) -> list[Generation]:
            return [replace(one, text=one.text + "!" * len(requests)) for one in super().generate(requests)]

    with pytest.raises(AssertionError, match="what else is in the batch"):
        check_engine(Forgetful)
