"""The glue learns, its router with it, and nothing else changes."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mixmerge.checkpoint.identity import digest
from mixmerge.data.rows import Row
from mixmerge.engines.records import Scoring
from mixmerge.errors import MixmergeError
from mixmerge.experts import Expert
from mixmerge.latent.curves import Point, thinned
from mixmerge.latent.deciding import Decided
from mixmerge.latent.engine import LatentEngine
from mixmerge.latent.files import values_of
from mixmerge.latent.fitting import Asked, Trained, prepare, train
from mixmerge.latent.frozen import Frozen, Remembered, weights_digest
from mixmerge.latent.interaction import Interaction
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.passes import Passes
from mixmerge.latent.recomputing import recomputed
from mixmerge.latent.resuming import read_state
from mixmerge.latent.settings import LossWeights, RouteOptions, TrainOptions
from mixmerge.latent.store import Store
from mixmerge.latent.texts import examples_of, hold_out
from mixmerge.latent.training import schedule

ROWS = tuple(
    Row(prompt=f"{name} and {other}: ", answer=f"{name[0]}{other[-1]}")
    for name in ("alpha", "kilo", "mike", "tango")
    for other in ("fox", "dog", "code")
)
FIXED = RouteOptions(kind="fixed", primary="llama")
QUICK = TrainOptions(
    steps=4, batch_size=4, learning_rate=1e-2, holdout=0.2, evaluate_every=2, save_steps=1, rows_at_once=3
)


def quiet(what: str, done: int, steps: int, note: str) -> None:
    """Says nothing."""


@pytest.fixture
def asked(homes: Mapping[str, Path]) -> Callable[..., Asked]:
    """``asked(train=QUICK, **changes)``: three experts, Llama answers."""

    def make(**changes: Any) -> Asked:
        plain = Asked(
            experts=tuple(Expert(name, str(folder)) for name, folder in homes.items()),
            rows=ROWS,
            mode="prompt",
            chunk=1,
            depths=((0, "last"), (0.5, 0.5)),
            bridge=BridgeOptions(width=24, heads=3),
            route=FIXED,
            too_long="refuse",
            train=QUICK,
        )
        return replace(plain, **changes)

    return make


def fitted(asked: Asked, work: Path) -> Trained:
    return train(prepare(asked), work, progress=quiet)


def values(one: Trained) -> dict[str, torch.Tensor]:
    return values_of(one.glue, one.router)


def same(one: Trained, other: Trained) -> bool:
    mine, others = values(one), values(other)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


def test_the_loss_falls_and_the_experts_stay(
    asked: Callable[..., Asked], homes: Mapping[str, Path], tmp_path: Path
) -> None:
    files = [path for folder in homes.values() for path in sorted(folder.iterdir())]
    before, drawn = digest(files), torch.get_rng_state()
    told: list[tuple[str, int, int, str]] = []
    long = QUICK.model_copy(update={"steps": 24, "evaluate_every": 6})
    made = train(
        prepare(asked(train=long)),
        tmp_path,
        progress=lambda *news: told.append(news),  # type: ignore[arg-type]
    )
    report = made.report
    first, last = report.points[:3], report.points[-3:]
    assert sum(one.lm for one in last) < 0.9 * sum(one.lm for one in first)
    assert [one.step for one in report.looks] == [0, 6, 12, 18, 24]
    best = min(one.per_byte for one in report.looks)
    assert best < 0.95 * report.looks[0].per_byte
    assert next(one for one in report.looks if one.step == report.best).per_byte == best
    assert report.alone == pytest.approx(report.looks[0].per_byte, rel=1e-4), "it starts as the primary is"
    assert report.rows + report.held_out == len(ROWS)
    assert report.rows_per_second > 0
    assert digest(files) == before
    assert torch.equal(torch.get_rng_state(), drawn), "nobody else's numbers are drawn"
    assert not made.glue.training
    whats = {what for what, _, _, _ in told}
    assert whats == {"latents of gpt_neox", "latents of opt", "learning", "held out"}
    assert "rows/s" in next(note for what, _, _, note in told if what == "learning")


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_values(asked: Callable[..., Asked], tmp_path: Path) -> None:
    job = asked(route=RouteOptions(k=2, hidden=[8], features=32))
    whole = fitted(job, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    for at in (1, 3):

        def stop(what: str, done: int, steps: int, note: str, at: int = at) -> None:
            if what == "learning" and done == at:
                raise StoppedError

        with pytest.raises(StoppedError):
            train(prepare(job), tmp_path / "work", progress=stop)
    gone_on = fitted(job, tmp_path / "work")
    assert same(whole, gone_on)
    assert gone_on.report.looks == whole.report.looks
    assert gone_on.report.points == whole.report.points
    other = prepare(replace(job, seed=1)).job
    assert read_state(tmp_path / "work", gone_on.ready.job) is not None
    assert read_state(tmp_path / "work", other) is None, "another job does not go on from there"


def test_a_damaged_state_is_started_over(asked: Callable[..., Asked], tmp_path: Path) -> None:
    whole = fitted(asked(), tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:100])
    assert same(fitted(asked(), tmp_path), whole)


def test_every_parameter_of_the_router_learns_from_the_answers_alone(
    asked: Callable[..., Asked], tmp_path: Path
) -> None:
    alone = LossWeights(entropy=0.0, balance=0.0, consistency=0.0)
    options = QUICK.model_copy(
        update={"weights": alone, "weight_decay": 0.0, "holdout": 0.0, "patience": None}
    )
    job = asked(route=RouteOptions(k=2, hidden=[8, 4], features=32), train=options)
    made = fitted(job, tmp_path)
    _, start = made.ready.card.blank(seed=0)
    assert made.router is not None
    assert start is not None
    begun = dict(start.named_parameters())
    for name, one in made.router.named_parameters():
        assert (one != begun[name]).any(), f"{name} got no gradient"
    assert all(point.consistency is None and point.entropy is not None for point in made.report.points)
    assert all(math.isfinite(point.lm) for point in made.report.points)


def test_all_terms_are_measured_where_a_router_learns(asked: Callable[..., Asked], tmp_path: Path) -> None:
    job = asked(route=RouteOptions(k=2, hidden=[8], features=32), mode="chunked", chunk=2)
    report = fitted(job, tmp_path).report
    last = report.points[-1]
    assert last.entropy is not None
    assert 0 < last.entropy <= math.log(3) + 1e-6
    assert last.balance == pytest.approx(1, abs=0.2)
    assert last.consistency is not None
    assert max(one.consistency or 0 for one in report.points) > 0, "other peers, other predictions"


def test_it_stops_early_and_keeps_the_best(asked: Callable[..., Asked], tmp_path: Path) -> None:
    wild = QUICK.model_copy(
        # the rate falls towards the last step: far from it two looks without a gain are certain to come
        update={"steps": 400, "learning_rate": 0.5, "warm_up": 0.0, "evaluate_every": 1, "patience": 2}
    )
    made = fitted(asked(train=wild), tmp_path)
    report = made.report
    assert report.stopped_early
    assert report.steps < 400
    assert report.steps - report.best == 2
    best = min(report.looks, key=lambda one: one.per_byte)
    assert report.best == best.step
    if best.step == 0:
        start, _ = made.ready.card.blank(seed=0)
        assert all(torch.equal(one, made.glue.state_dict()[name]) for name, one in start.state_dict().items())


def test_a_rate_that_is_too_high_is_said(asked: Callable[..., Asked], tmp_path: Path) -> None:
    wild = QUICK.model_copy(update={"steps": 40, "learning_rate": 1e30, "warm_up": 0.0, "holdout": 0.0})
    with pytest.raises(MixmergeError, match=r"not finite\. Try a smaller learning_rate"):
        fitted(asked(train=wild), tmp_path)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("gpt_neox", r"expert gpt_neox: its states are not finite"),
        (
            "llama",
            r"the loss of the rows held out, after step 0, is not finite\. Look at the primaries' weights",
        ),
    ],
)
def test_weights_that_are_no_numbers_are_not_the_rates_fault(
    asked: Callable[..., Asked], homes: Mapping[str, Path], tmp_path: Path, broken: str, said: str
) -> None:
    shutil.copytree(homes[broken], tmp_path / broken)
    path = tmp_path / broken / "model.safetensors"
    weights = load_file(path)
    weights[min(weights, key=lambda name: weights[name].numel())].fill_(math.nan)
    save_file(weights, path, {"format": "pt"})
    places = {**homes, broken: tmp_path / broken}
    experts = tuple(Expert(name, str(places[name])) for name in ("llama", "gpt_neox"))
    with pytest.raises(MixmergeError, match=said):
        fitted(asked(experts=experts), tmp_path / "work")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_computed_again_give_the_same(
    asked: Callable[..., Asked], tmp_path: Path, precision: str
) -> None:
    base = QUICK.model_copy(update={"precision": precision, "steps": 2})
    again = base.model_copy(update={"checkpointing": True})
    first, second = (fitted(asked(train=one), tmp_path / str(at)) for at, one in enumerate((base, again)))
    mine, others = values(first), values(second)
    for name, one in mine.items():
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, others[name], atol=1e-5, rtol=1e-4)


def test_recomputing_leaves_nothing_behind(experts: Mapping[str, Any]) -> None:
    model = experts["llama"].model
    with suppress(ValueError), recomputed(model.model.layers):
        assert any("forward" in vars(layer) for layer in model.model.layers)
        raise ValueError
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def hooks_inside(layer: Any, *args: Any, **given: Any) -> Any:
    """As transformers 5.16 has it, which is allowed: hooks are part of what is computed again."""
    plain = partial(torch.nn.Module.__call__, layer)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(partial(plain, **{**given, "past_key_values": None}), *args)
    return plain(*args, **given)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_a_model_that_computes_itself_again_runs_the_glue_once(
    table: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, inside: bool, reentrant: bool, within: bool
) -> None:
    """transformers' own gradient checkpointing, whichever way its version runs hooks."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    from mixmerge.latent.bridge import Bridge

    around = table(("llama", "gpt2"), depths=((0, "last"), (0.5, 0.5), (2, 2)))
    model = copy.deepcopy(around.experts["llama"].model).train()
    row = around.row("llama", ("gpt2",), "one two three", " four")
    _, told = around.view("llama", [row])
    read, layer_runs, glue_runs = Bridge.read, 0, 0

    def counted(self: Bridge, *args: Any) -> Any:
        nonlocal glue_runs
        glue_runs += 1
        return read(self, *args)

    def run(*_: Any) -> None:
        nonlocal layer_runs
        layer_runs += 1

    def gradients() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        around.glue.zero_grad()
        view, _ = around.view("llama", [row])
        with ExitStack() as stack:
            stack.enter_context(Interaction(model, around.glue, "llama").running(view))
            logits = model(**told).logits
            if not within:
                stack.close()
            logits.square().mean().backward()
        found = {name: one.grad for name, one in around.glue.named_parameters() if one.grad is not None}
        return logits.detach(), {name: one.clone() for name, one in found.items()}

    monkeypatch.setattr(Bridge, "read", counted)
    handles = [layer.mlp.register_forward_pre_hook(run) for layer in model.model.layers]
    kept, wanted = gradients()
    assert (layer_runs, glue_runs) == (3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer ones have another name for it
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if inside:
        monkeypatch.setattr(GradientCheckpointingLayer, "__call__", hooks_inside)
    again, found = gradients()
    assert (layer_runs, glue_runs) == (9, 6), "layers twice more, the glue once"
    assert torch.equal(kept, again)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        torch.testing.assert_close(one, wanted[name])
    assert all(layer.gradient_checkpointing for layer in model.model.layers), "as it was"
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    for handle in handles:
        handle.remove()


def test_the_primary_is_itself_before_it_learns(asked: Callable[..., Asked], tmp_path: Path) -> None:
    for mode in ("prompt", "chunked", "lockstep"):
        ready = prepare(asked(mode=mode, chunk=2))
        glue, _ = ready.card.blank()
        frozen = Frozen(ready.places, device="cpu", dtype="float32")
        hashes = {one.name: one.hash for one in ready.card.experts}
        depths = {name: glue.peer_depths(name) for name in ("gpt_neox", "opt")}
        remembered = Remembered(frozen, Store(tmp_path / mode), hashes=hashes, depths=depths)
        passes = Passes(
            frozen, remembered, glue, ready.texts, mode=ready.card.mode, chunk=2, checkpointing=False
        )
        gates = torch.full((3, 3), 1 / 3)
        with torch.no_grad():
            together = passes.predict("llama", [0, 5, 7], [("gpt_neox", "opt")] * 3, gates)
            alone = passes.alone("llama", [0, 5, 7])
            one = passes.alone("llama", [5])
        assert torch.equal(together.logits, alone.logits)
        assert torch.equal(together.wanted, alone.wanted)
        torch.testing.assert_close(alone.of([1]), one.logits, atol=1e-5, rtol=1e-5)
        reading = ready.texts.primary("llama", 5)
        assert one.wanted.tolist() == list(reading.ids[reading.answer_from :])
        assert one.wanted[-1] == 2, "it learns to end"


@pytest.mark.parametrize("mode", ["prompt", "chunked", "lockstep"])
def test_training_sees_what_answering_sees(
    asked: Callable[..., Asked], homes: Mapping[str, Path], tmp_path: Path, mode: str
) -> None:
    """The likelihood that was learned is that of the engine."""
    job = asked(mode=mode, chunk=2)
    made = fitted(job, tmp_path / "work")
    (tmp_path / "glue").mkdir()
    made.write(tmp_path / "glue")
    _, held = hold_out([one.digest for one in ROWS], QUICK.holdout, 0)
    engine = LatentEngine(
        str(tmp_path / "glue"),
        experts={name: {"model": str(folder)} for name, folder in homes.items()},
        expert="llama" if mode == "prompt" else None,
        dtype="float32",
    )
    reads = (("gpt_neox", 1 / 3), ("opt", 1 / 3))
    adapter = None if mode == "prompt" else "llama"
    scorings = [
        Scoring(str(row), ROWS[row].prompt, str(ROWS[row].answer), adapter=adapter, reads=reads)
        for row in held
    ]
    with engine:
        found = engine.loglikelihood(scorings)
    total = 0.0
    for row, one in zip(held, found, strict=True):
        reading = made.ready.texts.primary("llama", row)
        assert len(one.logprobs) == len(reading.ids) - reading.answer_from - 1, "all but the end"
        total -= one.total
    learned = _sum_without_ends(made, held, tmp_path / "work")
    assert total == pytest.approx(learned, abs=1e-3)


def _sum_without_ends(made: Trained, rows: list[int], work: Path) -> float:
    """Nats of the answers but their end tokens, as training passes them."""
    ready = made.ready
    frozen = Frozen(ready.places, device="cpu", dtype="float32")
    hashes = {one.name: one.hash for one in ready.card.experts}
    depths = {name: made.glue.peer_depths(name) for name in ("gpt_neox", "opt")}
    remembered = Remembered(frozen, Store(work / "latents"), hashes=hashes, depths=depths)
    passes = Passes(
        frozen,
        remembered,
        made.glue,
        ready.texts,
        mode=ready.card.mode,
        chunk=ready.card.chunk,
        checkpointing=False,
    )
    with torch.no_grad():
        told = passes.predict("llama", rows, [("gpt_neox", "opt")] * len(rows), None)
    logs = told.logits.log_softmax(-1).gather(-1, told.wanted[:, None])[:, 0]
    return -float(sum(part[:-1].sum() for part in logs.split(list(told.counts))))


def test_rows_that_the_disk_has_no_room_for_are_read_together(
    asked: Callable[..., Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixmerge.latent import frozen as module

    ready = prepare(asked())
    glue, _ = ready.card.blank()
    experts = Frozen(ready.places, device="cpu", dtype="float32")
    hashes = {one.name: one.hash for one in ready.card.experts}
    name = next(one for one in ready.card.names if one != ready.card.primary)
    depths = {name: glue.peer_depths(name)}
    calls: list[int] = []
    plain = module.latents

    def counted(expert: Any, readings: Any, places: Any) -> Any:
        calls.append(len(readings))
        return plain(expert, readings, places)

    monkeypatch.setattr(module, "latents", counted)
    readings = [ready.texts.peer(name, row, str(ready.card.primary)) for row in (0, 1, 2, 1)]
    known = Remembered(experts, Store(tmp_path / "room"), hashes=hashes, depths=depths)
    wanted = [known.of(name, [one], torch.device("cpu"))[0] for one in readings]
    assert calls == [1, 1, 1], "what is in memory is not made again"
    scarce = Remembered(experts, Store(tmp_path / "none", limit=1), hashes=hashes, depths=depths)
    for count in (3, 3):
        found = scarce.of(name, readings, torch.device("cpu"))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one.states, other.states, atol=1e-5, rtol=1e-4)
            assert torch.equal(one.ends, other.ends)
        assert calls[3:] == [count]


def test_an_expert_that_changes_in_memory_is_noticed(homes: Mapping[str, Path]) -> None:
    frozen = Frozen({"opt": (homes["opt"], None)}, device="cpu", dtype="float32")
    model = frozen["opt"].model
    assert not any(one.requires_grad for one in model.parameters())
    frozen.check()
    before = weights_digest(model)
    with torch.no_grad():
        next(iter(model.parameters())).view(-1)[3] += 1e-3
    assert weights_digest(model) != before
    with pytest.raises(MixmergeError, match="expert opt: its weights in memory changed"):
        frozen.check()
    with pytest.raises(MixmergeError, match="changed"):
        frozen.drop("opt")


def test_columns_and_groups_by_hand() -> None:
    gates = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.75, 0.25], [0.0, 1.0, 0.0]])
    decided = Decided((1, 1, 1), ((0, 1, 2), (1, 2), (1,)), gates)
    assert [decided.peers(row) for row in range(3)] == [(0, 2), (2,), ()]
    found = decided.columns([0, 1, 2], gates)
    assert found.tolist() == [[0.25, 0.5, 0.25], [0.75, 0.25, 0.0], [1.0, 0.0, 0.0]]
    other = Decided((1, 0, 1, 0, 1), ((0, 1), (0, 2), (1, 2), (0, 1), (0, 1)), torch.zeros(5, 3))
    assert other.groups(2) == [(0, [3, 1]), (1, [0, 4]), (1, [2])]


def test_the_rate_rises_and_falls() -> None:
    options = TrainOptions(steps=10, warm_up=0.2)
    rates = [schedule(step, options) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] > 0
    assert schedule(0, TrainOptions(steps=1, warm_up=0.0)) == 1.0


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=30), st.floats(0, 0.99), st.integers(0, 5))
def test_rows_are_held_out_by_what_they_show(digests: list[str], share: float, seed: int) -> None:
    learn, held = hold_out(digests, share, seed)
    assert sorted([*learn, *held]) == list(range(len(digests)))
    assert not {digests[at] for at in learn} & {digests[at] for at in held}
    assert learn, "never all"
    assert bool(held) == (share > 0 and len(set(digests)) > 1)
    assert hold_out(list(reversed(digests)), share, seed)[1] == [
        len(digests) - 1 - at for at in reversed(held)
    ]


def test_rows_without_answers_are_named() -> None:
    rows = [Row(prompt="a", answer="b"), Row(text="c"), Row(prompt="d", answer="")]
    with pytest.raises(MixmergeError, match=r"data: 2 rows \(2, 3\) have no answer"):
        examples_of(rows, "data")


def test_curves_are_thinned_by_means() -> None:
    points = [Point(step, float(step), entropy=1.0 if step % 2 else None) for step in range(1, 6)]
    assert thinned(points, 3) == [Point(2, 1.5, 1.0), Point(4, 3.5, 1.0), Point(5, 5.0, 1.0)]
    assert thinned(points) == points
    assert thinned([]) == []
