"""The engine of interactions keeps every promise of an engine, and says what keeps an expert from being read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mixmerge.engines.contract import check_engine
from mixmerge.engines.process import ProcessEngine
from mixmerge.engines.process_wire import request_of, scoring_of
from mixmerge.engines.records import Chunk, Generation, Likelihood, Message, Request, Scoring
from mixmerge.errors import Fault, MixmergeError, OutOfMemoryError, OutputError
from mixmerge.latent.engine import LatentEngine

BOTH = (("b", 0.3), ("c", 0.2))


class Reading(LatentEngine):
    """Whatever is asked, the peers are read."""

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        return super().check([replace(one, reads=BOTH) for one in requests])

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return super().generate([replace(one, reads=BOTH) for one in requests])

    def stream(self, request: Request) -> Iterator[Chunk]:
        return super().stream(replace(request, reads=BOTH))

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        # without a prompt there is nothing that a peer could have read
        return super().loglikelihood([replace(one, reads=BOTH if one.prompt else ()) for one in scorings])


@pytest.mark.parametrize("mode", ["prompt", "lockstep"])
def test_it_keeps_the_promises_of_an_engine(trio: Any, mode: str) -> None:
    made = trio.fitted(f"{mode}-2", mode=mode)
    expert = "a" if mode == "prompt" else None
    check_engine(lambda: Reading(str(made.folder), experts=made.experts, expert=expert))


def test_experts_of_one_engine_answer_for_themselves(trio: Any) -> None:
    engine = trio.fitted("chunked-2", mode="chunked").engine()
    requests = [Request(name, "one two three", 6, adapter=name) for name in "abc"]
    requests += [
        replace(one, id=f"{one.id} reads", reads=((("b", 0.4),) if one.id != "b" else (("a", 0.4),)))
        for one in requests
    ]
    together = [one.text for one in engine.generate(requests)]
    assert [engine.generate([one])[0].text for one in requests] == together
    assert len(set(together)) == 6


def test_an_expert_alone_is_itself(trio: Any) -> None:
    from mixmerge.engines.local import TransformersEngine

    made = trio.fitted("prompt-2")
    request = Request("r", "one two three", 12)
    alone = TransformersEngine(str(trio.experts["b"])).generate([request])[0]
    found = made.engine(expert="b").generate([request])[0]
    assert (found.text, found.tokens_in, found.finish) == (alone.text, alone.tokens_in, alone.finish)


def test_what_a_peer_has_offered_is_read_without_it(trio: Any, tmp_path: Path) -> None:
    """An engine that finds latents in the store needs no weights of the peer."""
    root = tmp_path / "moved"
    shutil.copytree(trio.experts["b"], root)
    made = trio.fitted("offered", experts={**trio.experts, "b": root})
    store = str(tmp_path / "latents")
    peer = made.engine(expert="b", store=store)
    asked = [Request(f"r{at}", text, 6) for at, text in enumerate(("a b c", "one two", "a b c"))]
    told = peer.generate([replace(one, offers=True) for one in asked])
    assert [one.tokens_out for one in told] == [0, 0, 0]
    assert told[0].text == told[2].text != told[1].text, "a prompt is kept under one name"
    (root / "model.safetensors").unlink()
    engine = made.engine(expert="a", store=store)
    reading = [replace(one, reads=(("b", 0.5),)) for one in asked]
    assert [one.finish for one in engine.generate(reading)]
    assert (
        engine.generate(reading)[0].text
        == trio.fitted("prompt-2").engine(expert="a").generate(reading)[0].text
    )
    (found,) = engine.check([Request("other", "not offered", 6, reads=(("b", 0.5),))])
    assert found is not None
    assert "b" in str(found)
    assert "cannot load it" in str(found)
    rest = engine.generate_each([Request("other", "not offered", 6, reads=(("b", 0.5),)), *reading])
    assert isinstance(rest[0], Fault)
    assert all(isinstance(one, Generation) for one in rest[1:]), "only the request concerned"


def test_one_expert_is_in_memory_at_a_time(trio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers are loaded one after the other, before the primary, which leaves if they come late."""
    import gc
    import weakref

    from mixmerge.latent import companions

    alive: list[Any] = []
    seen: list[tuple[str, int]] = []
    load = companions.load_model

    def counted(*given: Any) -> Any:
        gc.collect()
        seen.append((given[-1], sum(one() is not None for one in alive)))
        loaded = load(*given)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(companions, "load_model", counted)
    engine = trio.fitted("prompt-2").engine(expert="a")
    request = Request("r", "a b c", 3, reads=BOTH)
    engine.generate([request])
    assert seen == [("b", 0), ("c", 0), ("a", 0)]
    engine.generate([request])
    assert len(seen) == 3, "what peers have left is read again"
    engine.generate([replace(request, prompt="another")])
    assert seen[3:] == [("b", 0), ("c", 0), ("a", 0)]


def test_what_is_damaged_on_the_disk_is_made_anew(trio: Any, tmp_path: Path) -> None:
    store = tmp_path / "latents"
    engine = trio.fitted("prompt-2").engine(expert="a", store=str(store))
    request = Request("r", "a b c", 6, reads=BOTH)
    (wanted,) = engine.generate([request])
    kept = sorted(store.rglob("*.latents"))
    assert len(kept) == 2
    kept[0].write_bytes(kept[0].read_bytes()[:-7])
    assert engine.generate([request])[0].text == wanted.text


@pytest.mark.parametrize("mode", ["prompt", "lockstep"])
def test_a_prompt_that_a_peer_has_no_room_for(trio: Any, mode: str, tmp_path: Path) -> None:
    """It is refused, or the peer reads its end; other requests are answered all the same."""
    long = (
        "the quick brown fox jumps over the lazy dog, " * 6
    )  # too many letters for b, whose tokens they are
    experts = {name: trio.experts[name] for name in "ab"}
    options = {"expert": "a"} if mode == "prompt" else {}
    refusing = trio.fitted(f"refuse-{mode}", mode=mode, experts=experts).engine(**options)
    short, far = Request("short", "a b", 4, reads=(("b", 0.5),)), Request("far", long, 4, reads=(("b", 0.5),))
    found, answered = refusing.generate_each([far, short])
    assert isinstance(found, Fault)
    assert "reads" in found.where
    assert "b reads less than 256" in str(found)
    assert isinstance(answered, Generation)
    cutting = trio.fitted(f"cut-{mode}", mode=mode, experts=experts, too_long="left").engine(**options)
    assert all(isinstance(one, Generation) for one in cutting.generate_each([far, short]))
    offered = trio.fitted("refuse-prompt", experts=experts).engine(expert="b")
    told = offered.generate_each([replace(one, reads=(), offers=True) for one in (far, short)])
    assert isinstance(told[0], Fault)
    assert isinstance(told[1], Generation)


def test_a_peer_without_offsets_is_refused_by_name(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmerge.latent import offsets

    class Plain(offsets.Reader):
        def __init__(
            self, tokenizer: Any, *, name: str, context: int | None, embedded: int | None = None
        ) -> None:
            if name == "b":
                tokenizer = object()  # of no kind that says which characters a token stands for
            super().__init__(tokenizer, name=name, context=context, embedded=embedded)

    monkeypatch.setattr(offsets, "Reader", Plain)
    engine = trio.fitted("prompt-2").engine(expert="a")
    reads, alone = Request("r", "a b", 3, reads=(("b", 0.5),)), Request("s", "a b", 3, reads=(("c", 0.5),))
    fault, answered = engine.generate_each([reads, alone])
    assert "which characters" in str(fault)
    assert "b" in str(fault)
    assert isinstance(answered, Generation)


def test_a_peer_that_does_not_fit(trio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixmerge.latent import companions

    load = companions.load_model

    def scarce(*given: Any) -> Any:
        if given[-1] == "b":
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"
            )
        return load(*given)

    monkeypatch.setattr(companions, "load_model", scarce)
    engine = trio.fitted("prompt-2").engine(expert="a")
    fault, answered = engine.generate_each(
        [Request("r", "a b", 3, reads=(("b", 0.5),)), Request("s", "a b", 3, reads=(("c", 0.5),))]
    )
    assert "expert b: out of memory while it was loaded" in str(fault)
    assert isinstance(answered, Generation)
    together = trio.fitted("lockstep-2", mode="lockstep").engine()
    with pytest.raises(OutOfMemoryError, match="expert b"):
        together.load()


PROMPTS = ("a b c", "one two three", "the quick brown fox", "lazy dog")


def test_a_store_without_room_costs_time_and_no_answer(trio: Any, tmp_path: Path) -> None:
    """What one request reads is kept whatever the limit; of several it is said that fewer may do."""
    made = trio.fitted("prompt-2")
    asked = [Request(f"r{at}", text, 6, reads=BOTH) for at, text in enumerate(PROMPTS)]
    wanted = [one.text for one in made.engine(expert="a").generate(asked)]
    engine = made.engine(expert="a", store=str(tmp_path / "latents"), store_bytes=1)
    assert [engine.generate([one])[0].text for one in asked] == wanted
    assert len(list((tmp_path / "latents").rglob("*.latents"))) == 2, "those of the last one"
    with pytest.raises(OutOfMemoryError, match=r"4 prompts takes .* Give it fewer requests at once, or more"):
        engine.generate(asked)
    with pytest.raises(OutOfMemoryError):
        engine.generate_each(asked[:3])
    scoring = Scoring("s", PROMPTS[0], " d", None, BOTH)
    (told,), (known,) = (one.loglikelihood([scoring]) for one in (engine, made.engine(expert="a")))
    assert told.total == pytest.approx(known.total, abs=1e-4)
    with pytest.raises(MixmergeError, match="store_bytes: is 0"):
        made.engine(expert="a", store_bytes=0)


def test_latents_that_go_before_they_are_read_are_made_again(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines of other devices share the store, and may need its room."""
    from mixmerge.latent import companions

    made, store = trio.fitted("prompt-2"), tmp_path / "latents"
    request = Request("r", "a b c", 6, reads=BOTH)
    (wanted,) = made.engine(expert="a").generate([request])
    get, times = companions.Offers.get, 0

    def robbed(self: Any, peer: str, prompt: Any) -> Any:
        nonlocal times
        times += 1
        if times <= lost:
            shutil.rmtree(store)
        return get(self, peer, prompt)

    monkeypatch.setattr(companions.Offers, "get", robbed)
    lost = 1
    assert made.engine(expert="a", store=str(store)).generate([request])[0].text == wanted.text
    lost, times = 1, 0
    assert made.engine(expert="a", store=str(store)).loglikelihood([Scoring("s", "a b", " c", None, BOTH)])
    lost, times = 99, 0
    with pytest.raises(OutOfMemoryError, match="peer b: what it left of a prompt is gone"):
        made.engine(expert="a", store=str(store)).generate([request])


def test_a_peer_out_of_memory_on_many_prompts_asks_for_fewer(
    trio: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmerge.latent import companions

    plain = companions.latents

    def scarce(expert: Any, readings: Sequence[Any], depths: Any, **options: Any) -> Any:
        if len(readings) > 1 or len(readings[0].ids) > 30:
            raise MemoryError
        return plain(expert, readings, depths, **options)

    monkeypatch.setattr(companions, "latents", scarce)
    engine = trio.fitted("prompt-2").engine(expert="a")
    asked = [Request(f"r{at}", text, 3, reads=(("b", 0.5),)) for at, text in enumerate(PROMPTS)]
    with pytest.raises(OutOfMemoryError, match="expert b: out of memory on its prompts"):
        engine.generate_each(asked)
    assert all(isinstance(engine.generate_each([one])[0], Generation) for one in asked)
    long = replace(asked[0], prompt="the quick brown fox jumps over the dog")
    (fault,) = engine.generate_each([long])
    assert "expert b: out of memory on its prompts" in str(fault)


def test_a_disk_that_refuses_is_nobodys_fault(
    trio: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job ends there, and goes on later: no request is refused for it."""
    (tmp_path / "file").write_text("")
    engine = trio.fitted("prompt-2").engine(expert="a", store=str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot be written"):
        engine.generate_each([Request("r", "a b", 3, reads=BOTH)])


def test_what_could_not_be_made_is_not_remembered(trio: Any) -> None:
    """A server that runs for long must not grow by every prompt that a peer refused."""
    made = trio.fitted("prompt-2")
    engine = made.engine(expert="a")
    asked = [Request(f"r{at}", f"{at} " * 200, 3, reads=(("b", 0.5),)) for at in range(3)]
    assert all(isinstance(one, Fault) for one in engine.generate_each(asked))
    assert not [one for one in vars(engine._made.offers).values() if isinstance(one, dict) and len(one) > 3]


@pytest.mark.parametrize(
    ("reads", "words"),
    [
        ((("d", 0.5),), "no expert is called 'd'"),
        ((("a", 0.5),), "a does not read itself"),
    ],
)
def test_peers_that_nobody_can_read(trio: Any, reads: Any, words: str) -> None:
    engine = trio.fitted("prompt-2").engine(expert="a")
    with pytest.raises(MixmergeError, match=words):
        engine.generate([Request("r", "a b", 3, reads=reads)])
    with pytest.raises(MixmergeError, match=words):
        engine.loglikelihood([Scoring("s", "a b", " c", None, reads)])


def test_only_a_fixed_primary_reads(trio: Any) -> None:
    made = trio.fitted("fixed", route={"kind": "fixed", "primary": "a"})
    assert made.engine(expert="a").generate([Request("r", "a b", 3, reads=(("b", 0.5),))])
    with pytest.raises(MixmergeError, match="lets a alone read"):
        made.engine(expert="b").generate([Request("r", "a b", 3, reads=(("a", 0.5),))])


def test_gates_and_peers_are_checked_by_the_request() -> None:
    for reads in [(("b", 0.5), ("b", 0.1)), (("b", -0.1),), (("b", 0.9), ("c", 0.2)), (("b", float("nan")),)]:
        with pytest.raises(MixmergeError, match="reads"):
            Request("r", "a", reads=reads)
    with pytest.raises(MixmergeError, match="offers"):
        Request("r", "a", reads=(("b", 0.5),), offers=True)


def test_other_engines_refuse_what_reads_or_offers(trio: Any) -> None:
    from mixmerge.engines.echo import EchoEngine

    found = EchoEngine("e").check(
        [Request("r", "a", reads=(("b", 0.5),)), Request("o", "a", offers=True), Request("p", "a")]
    )
    assert [fault and fault.where for fault in found] == ["request r: reads", "request o: offers", None]
    with pytest.raises(MixmergeError, match="does not read the latents"):
        EchoEngine("e").loglikelihood([Scoring("s", "a", " b", None, (("b", 0.5),))])


def test_requests_and_scorings_come_through_to_other_processes() -> None:
    request = Request("r", (Message("user", "hi"),), reads=BOTH)
    scoring = Scoring("s", "one", " two", None, BOTH)
    for one, read in ((request, request_of), (replace(request, reads=(), offers=True), request_of)):
        assert read(json.loads(json.dumps(asdict(one)))) == one
    assert scoring_of(json.loads(json.dumps(asdict(scoring)))) == scoring


@pytest.mark.slow
def test_it_runs_in_a_process_of_its_own(trio: Any, tmp_path: Path) -> None:
    made = trio.fitted("prompt-2")
    arguments = {
        "model": str(made.folder),
        "experts": dict(made.experts),
        "expert": "a",
        "store": str(tmp_path / "s"),
    }
    request = Request("r", "one two", 5, reads=BOTH, explain=True)
    wanted = made.engine(expert="a").generate([request])[0]
    with ProcessEngine("latent", arguments, name="a") as engine:
        engine.prepare([request])
        found = engine.generate([request])[0]
        assert (found.text, found.tokens_out) == (wanted.text, wanted.tokens_out)
        assert "".join(chunk.text for chunk in engine.stream(request)) == wanted.text
        scoring = Scoring("s", "one two", " three", None, BOTH)
        total = made.engine(expert="a").loglikelihood([scoring])[0].total
        assert engine.loglikelihood([scoring])[0].total == pytest.approx(total, abs=1e-4)
    assert list((tmp_path / "s").rglob("*.latents"))


def test_a_folder_that_holds_no_glue(trio: Any, tmp_path: Path) -> None:
    with pytest.raises(MixmergeError, match="holds no glue"):
        LatentEngine(str(tmp_path), experts={}).load()
    made = trio.fitted("prompt-2")
    with pytest.raises(MixmergeError, match="no place of c"):
        LatentEngine(str(made.folder), experts={name: made.experts[name] for name in "ab"}).load()
    with pytest.raises(MixmergeError, match="is 'd'"):
        made.engine(expert="d")
    card = json.loads((made.folder / "latent.json").read_text())
    assert not any("weight" in key for key in card), "a card names experts, and holds none"
