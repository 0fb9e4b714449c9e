"""An expert that reads its peers says, token by token, what the whole text gives at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from mixmerge.engines.records import Message, Request, Scoring
from mixmerge.latent.interaction import Interaction
from mixmerge.latent.peers import latents
from mixmerge.latent.records import Reading, View, upto_of

PROMPTS = ("a b c", "one two three four five six", "x", "the quick brown fox jumps, grün 漢")
READS = ((("b", 0.3), ("c", 0.2)), (("c", 0.5),), (("b", 0.9),), (("c", 0.1), ("b", 0.4)))
MODES = [("prompt", 3), ("chunked", 3), ("lockstep", 1)]


def asked(**more: Any) -> list[Request]:
    """Rows with different peers and gates, of different lengths."""
    return [
        Request(f"r{at}", prompt, 7 + at, reads=reads, **more)
        for at, (prompt, reads) in enumerate(zip(PROMPTS, READS, strict=True))
    ]


def named(engine: Any, name: str, requests: Sequence[Request]) -> list[Request]:
    """As the engine of one expert takes them, or that of all."""
    from dataclasses import replace

    return [replace(one, adapter=None if engine.expert else name) for one in requests]


def engine_of(trio: Any, mode: str, chunk: int, **options: Any) -> Any:
    made = trio.fitted(f"{mode}-{options.pop('depths', 2)}", mode=mode, chunk=chunk)
    return made.engine(expert="a" if mode == "prompt" else None, **options)


class Slow:
    """The same by one forward of the whole text for every token, through CORE's interaction alone."""

    def __init__(self, engine: Any, mode: str, chunk: int) -> None:
        self._parts, self.mode, self.chunk = engine._parts(), mode, chunk
        self._loaded = {name: one.companion.load() for name, one in self._parts.experts.items()}

    def logits(self, name: str, prompt: Any, ids: list[int], reads: Any) -> torch.Tensor:
        """``(T, V)``, of the prompt with the answer's tokens behind it."""
        primary = self._parts.experts[name].companion
        prompted = primary.reader.prompt(prompt)
        saying = primary.reader.saying()
        seen = list(prompted.seen)
        for token in ids:
            saying.add(token)
            seen.append(prompted.prompt_bytes + saying.bytes)
        whole = (*prompted.ids, *ids)
        reading = Reading(whole, tuple(seen), tuple(seen), len(prompted.ids), prompted.prompt_bytes)
        text = primary.reader.said(ids)
        left = []
        for peer, _ in reads:
            one = self._parts.experts[peer].companion
            its = one.reader.prompt(prompt)
            if self.mode != "prompt":
                its = one.reader.with_answer(prompt, text, role="peer")
            left.append((peer, latents(self._loaded[peer], [its], one.depths)[0]))
        memory = self._parts.glue.memory(name, [left])
        gates = torch.tensor([[1 - sum(gate for _, gate in reads), *(gate for _, gate in reads)]])
        upto = upto_of(reading, self.mode, self.chunk)  # type: ignore[arg-type]
        view = View(memory, gates, torch.tensor([reading.seen]), torch.tensor([upto]))
        model = self._loaded[name].model
        with torch.no_grad(), Interaction(model, self._parts.glue, name).running(view):
            found: torch.Tensor = model(torch.tensor([whole])).logits[0]
        return found

    def says(self, name: str, request: Request) -> str:
        loaded = self._loaded[name]
        ids: list[int] = []
        while len(ids) < request.max_new_tokens:
            token = int(self.logits(name, request.prompt, ids, request.reads)[-1].argmax())
            if token in loaded.ends:
                break
            ids.append(token)
        return str(loaded.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_it_says_what_the_whole_text_gives(trio: Any, mode: str, chunk: int) -> None:
    """And rows of unlike peers and gates, padded, are what each is alone."""
    engine = engine_of(trio, mode, chunk)
    requests = named(engine, "a", asked())
    together = [one.text for one in engine.generate(requests)]
    assert [engine.generate([one])[0].text for one in requests] == together
    slow = Slow(engine, mode, chunk)
    assert [slow.says("a", one) for one in requests] == together
    alone = [
        one.text
        for one in engine.generate(
            [Request(one.id, one.prompt, one.max_new_tokens, adapter=one.adapter) for one in requests]
        )
    ]
    assert alone != together, "peers have something to say"


@pytest.mark.parametrize(("mode", "chunk"), MODES)
@pytest.mark.parametrize("primary", ["a", "b", "c"])
def test_logits_token_by_token_are_those_of_the_text(
    trio: Any, mode: str, chunk: int, primary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-4 in float32, for every family and tokenizer as the primary, in a padded batch."""
    from mixmerge.engines.decoding import Decoder

    made = trio.fitted(f"{mode}-2", mode=mode, chunk=chunk)
    engine = made.engine(expert=primary if mode == "prompt" else None)
    others = [name for name in "abc" if name != primary]
    requests = named(
        engine,
        primary,
        [
            Request("r0", PROMPTS[3], 8, reads=((others[0], 0.3), (others[1], 0.2))),
            Request("r1", PROMPTS[0], 8, reads=((others[1], 0.6),)),
        ],
    )
    rows: dict[str, list[torch.Tensor]] = {}
    tokens: dict[str, list[int]] = {}
    forward = Decoder._forward

    def kept(self: Any) -> torch.Tensor:
        logits = forward(self)
        for row, one in zip(self.live, logits, strict=True):
            rows.setdefault(row.request.id, []).append(one.clone())
            tokens[row.request.id] = row.out
        return logits

    monkeypatch.setattr(Decoder, "_forward", kept)
    engine.generate(requests)
    slow = Slow(engine, mode, chunk)
    for one in requests:
        said = tokens[one.id]
        whole = slow.logits(primary, one.prompt, said, one.reads)
        start = len(whole) - len(said) - 1
        for at, logits in enumerate(rows[one.id]):
            assert torch.allclose(logits, whole[start + at], atol=1e-4), (one.id, at)


@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_likelihoods_are_those_of_the_text(trio: Any, mode: str, chunk: int) -> None:
    engine = engine_of(trio, mode, chunk)
    adapter = None if engine.expert else "a"
    scorings = [
        Scoring(f"s{at}", prompt, " and more, 漢", adapter, reads)
        for at, (prompt, reads) in enumerate(zip(PROMPTS, READS, strict=True))
    ]
    slow = Slow(engine, mode, chunk)
    for one, found in zip(scorings, engine.loglikelihood(scorings), strict=True):
        reader = engine._parts().experts["a"].companion.reader
        whole = reader.with_answer(one.prompt, one.continuation, role="primary", end=False)
        said = list(whole.ids[whole.answer_from :])
        logits = slow.logits("a", one.prompt, said, one.reads)[whole.answer_from - 1 : -1].log_softmax(-1)
        wanted = logits.gather(1, torch.tensor(said)[:, None]).sum()
        assert found.total == pytest.approx(float(wanted), abs=1e-3)
        assert found.total == pytest.approx(engine.loglikelihood([one])[0].total, abs=1e-3)


@pytest.mark.parametrize(("mode", "chunk"), MODES)
def test_before_training_it_is_the_expert_alone(trio: Any, mode: str, chunk: int) -> None:
    """To the last bit of every log-probability."""
    made = trio.fitted(f"zero-{mode}", mode=mode, chunk=chunk, scale=0.0)
    engine = made.engine(expert="a" if mode == "prompt" else None)
    reading = named(engine, "a", asked(logprobs=True, temperature=0.7, seed=3))
    plain = named(
        engine,
        "a",
        [Request(one.id, one.prompt, one.max_new_tokens, 0.7, seed=3, logprobs=True) for one in reading],
    )
    for one, other in zip(reading, plain, strict=True):
        (found,), (wanted,) = engine.generate([one]), engine.generate([other])
        assert (found.text, found.logprobs) == (wanted.text, wanted.logprobs)


def test_it_says_how_much_it_looked_at_whom(trio: Any) -> None:
    engine = engine_of(trio, "prompt", 3)
    found = engine.generate([Request("r", "a b c", 4, reads=(("b", 0.3), ("c", 0.2)), explain=True)])[
        0
    ].weights
    assert list(found["mean"]) == ["(nothing)", "b", "c"]
    assert sum(found["mean"].values()) == pytest.approx(1, abs=1e-5)
    assert min(found["mean"].values()) > 0
    short = Request("r", "a b c", 4, reads=(("b", 0.3), ("c", 0.2)), explain=True)
    both = engine.generate([short, replace(short, id="long", prompt="a b c d e f g " * 4)])
    assert both[0].weights["mean"] == pytest.approx(found["mean"], abs=1e-4), "a longer mate changes nothing"


def test_a_chat_is_read_by_all(trio: Any) -> None:
    engine = engine_of(trio, "prompt", 3)
    turns = (Message("system", "be brief"), Message("user", "hello"))
    request = Request("chat", turns, 5, reads=(("b", 0.5),))
    assert engine.generate([request])[0].text == Slow(engine, "prompt", 3).says("a", request)


@pytest.mark.parametrize("stop", ["谢", "👍", "ok"])
def test_a_stop_text_is_seen_within_a_run_of_bytes(tokenizers: Any, stop: str) -> None:
    from mixmerge.engines.decoding import Decoder, Row

    tokenizer = tokenizers["llama_2"]
    whole = tokenizer("早上好，👍🏽👍🏽👍🏽谢谢 ok.", add_special_tokens=False)["input_ids"]
    row = Row(Request("r", "x", len(whole), stop=(stop,)), [1], len(whole))
    decoder = Decoder.__new__(Decoder)
    decoder._tokenizer, decoder._ends = tokenizer, frozenset()
    for token in whole:
        if row.finish is None:
            decoder._take(row, token, 0.0)
    assert row.finish == "stop"
    assert stop not in row.text(tokenizer)
    assert stop in tokenizer.decode(row.out)
    assert stop not in tokenizer.decode(row.out[:-1]), "at once, not when the run is over"
