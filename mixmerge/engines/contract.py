"""What every engine keeps, as one function: ``check_engine(make)``, for the tests of plug-ins too.

Raises AssertionError with what was broken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mixmerge.engines.base import Engine
from mixmerge.engines.records import Generation, Message, Request, Scoring
from mixmerge.errors import Fault

_PROMPTS = ("a b c", "one two three four five six", "x", "the quick brown fox jumps")


def check_engine(
    make: Callable[[], Engine], *, adapters: Sequence[str] = (), tolerance: float = 1e-4
) -> None:
    """Every promise of the protocol.

    Of an engine that is not ``batch_exact``, texts are compared only where the batches are the same.

    Args:
        make: an engine of an expert that reads at least 64 tokens, not loaded, the same each time.
        adapters: of its adapters, those to ask beside the base; each must answer otherwise than the base.
        tolerance: by which log-probabilities may differ across batches.
    """
    engine = make()
    assert not engine.loaded, "making an engine loads nothing"
    requests = [
        Request(f"r{at}", prompt, max_new_tokens=4 + at, temperature=at % 2 * 0.8, top_p=0.9, seed=7 + at)
        for at, prompt in enumerate(_PROMPTS)
    ]
    requests.append(Request("chat", (Message("system", "be brief"), Message("user", "hello")), 5))
    answers = engine.generate(requests)
    assert engine.loaded, "answering loads the expert"
    _whole(requests, answers)
    _same(answers, engine.generate(requests), "the same requests gave other texts")
    turned = engine.generate(requests[::-1])[::-1]
    alone = [engine.generate([request])[0] for request in requests]
    for other in (turned, alone):
        _whole(requests, other)
    if engine.batch_exact:
        _same(answers, turned, "the order of requests changed texts")
        _same(answers, alone, "what else is in the batch changed texts")
    named = [replace(request, id=f"other {request.id}") for request in requests]
    _same(answers, engine.generate(named), "the names of requests changed texts")
    assert engine.generate([]) == [], "no requests, no answers"
    _each(engine, requests, answers)
    _adapters(engine, requests, answers, adapters)
    _stops(engine, requests, alone)
    if "stream" in engine.capabilities:
        _streams(engine, requests, alone)
    if "logprobs" in engine.capabilities:
        _logprobs(engine, _mixed(requests, adapters), tolerance)
    if "loglikelihood" in engine.capabilities:
        _likelihoods(engine, adapters, tolerance)
    engine.unload()
    engine.unload()
    assert not engine.loaded, "unloading unloads, and does so once"
    with engine:
        _same(answers, engine.generate(requests), "loading again changed texts")
    assert not engine.loaded, "leaving the with block unloads"


def _whole(requests: list[Request], answers: list[Generation]) -> None:
    assert [one.id for one in answers] == [one.id for one in requests], "one answer for each, in their order"
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens_in > 0, "the prompt has tokens"
        assert 0 <= answer.tokens_out <= request.max_new_tokens, "max_new_tokens bounds the answer"
        assert answer.finish in ("stop", "length")
        assert answer.seconds >= 0
        assert answer.logprobs is None, "log-probabilities come when they are asked for"


def _each(engine: Engine, requests: list[Request], answers: list[Generation]) -> None:
    unable = replace(requests[0], id="unable", adapter="an adapter that no engine has")
    given = engine.generate_each([unable, *requests[:2], unable, *requests[2:]])
    faults, texts = [given[0], given[3]], [*given[1:3], *given[4:]]
    assert all(isinstance(one, Fault) for one in faults), "a request that cannot be answered gets a fault"
    _same(answers, [one for one in texts if isinstance(one, Generation)], "a fault beside them changed texts")
    assert engine.generate_each([]) == []


def _mixed(requests: list[Request], adapters: Sequence[str]) -> list[Request]:
    """Every request of the base and of every adapter, one after the other."""
    return [
        replace(request, id=f"{request.id} {name}", adapter=name)
        for request in requests
        for name in (None, *adapters)
    ]


def _adapters(
    engine: Engine, requests: list[Request], answers: list[Generation], adapters: Sequence[str]
) -> None:
    assert set(adapters) <= set(engine.adapters), "an adapter is one of the engine's"
    if not adapters:
        return
    asked = _mixed(requests, adapters)
    mixed = engine.generate(asked)
    _whole(asked, mixed)
    alone = [engine.generate([request])[0] for request in asked]
    _whole(asked, alone)
    if engine.batch_exact:
        _same(mixed, alone, "what else is in the batch changed texts of adapters")
        _same(mixed[:: len(adapters) + 1], answers, "adapters in the batch changed texts of the base")
    for place in range(1, len(adapters) + 1):
        texts = [one.text for one in mixed[place :: len(adapters) + 1]]
        assert texts != [one.text for one in answers], "adapters answer as the base does"
    if "stream" in engine.capabilities:
        _streams(engine, asked, alone)


def _stops(engine: Engine, requests: list[Request], answers: list[Generation]) -> None:
    for request, answer in zip(requests, answers, strict=True):
        if len(answer.text) < 3:
            continue
        stop = answer.text[1:3]
        cut = engine.generate([replace(request, stop=(stop,))])[0]
        assert cut.text == answer.text[: answer.text.index(stop)], "a stop text ends the answer before it"
        assert cut.finish == "stop"


def _streams(engine: Engine, requests: list[Request], answers: list[Generation]) -> None:
    for request, answer in zip(requests, answers, strict=True):
        chunks = list(engine.stream(request))
        assert "".join(chunk.text for chunk in chunks) == answer.text, "pieces joined are the text"
        assert all(chunk.generation is None for chunk in chunks[:-1])
        last = chunks[-1].generation
        assert last is not None, "the last piece brings the whole"
        _same([answer], [last], "streaming changed the text")


def _logprobs(engine: Engine, requests: list[Request], tolerance: float) -> None:
    asked = [replace(request, logprobs=True) for request in requests]
    for request, one in zip(asked, engine.generate(asked), strict=True):
        given = one.logprobs
        assert given is not None, "log-probabilities were asked for"
        assert len(given) == one.tokens_out, "one for each token"
        assert all(value <= 0 for value in given)
        other = engine.generate([request])[0]
        alone = other.logprobs
        assert alone is not None
        if not engine.batch_exact and other.text != one.text:
            continue
        assert all(abs(a - b) <= tolerance for a, b in zip(given, alone, strict=True)), "batches agree"


def _likelihoods(engine: Engine, adapters: Sequence[str], tolerance: float) -> None:
    asked = [
        Scoring(f"s{at} {name}", prompt, " and more" * (at + 1), name)
        for at, prompt in enumerate(_PROMPTS)
        for name in (None, *adapters)
    ]
    asked.append(Scoring("whole", "", "nothing before"))
    given = engine.loglikelihood(asked)
    assert [one.id for one in given] == [one.id for one in asked]
    for one, found in zip(asked, given, strict=True):
        assert found.logprobs, "every continuation has a token"
        assert all(value <= 0 for value in found.logprobs)
        assert abs(found.total - engine.loglikelihood([one])[0].total) <= tolerance * len(found.logprobs)
    assert engine.loglikelihood([]) == []


def _same(one: list[Generation], other: list[Generation], what: str) -> None:
    assert [answer.text for answer in one] == [answer.text for answer in other], what
    assert [answer.tokens_out for answer in one] == [answer.tokens_out for answer in other], what
    assert [answer.finish for answer in one] == [answer.finish for answer in other], what
