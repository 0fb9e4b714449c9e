"""Rows on which primaries stay what they are alone, while the glue learns from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.data.rows import Row
from mixmerge.errors import MixmergeError
from mixmerge.experts import Expert
from mixmerge.latent.fitting import Asked, Trained, prepare, train
from mixmerge.latent.frozen import Frozen, Remembered
from mixmerge.latent.losses import departures
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.order import taken
from mixmerge.latent.passes import Passes, Predicted
from mixmerge.latent.settings import LossWeights, RouteOptions, TrainOptions
from mixmerge.latent.store import Store
from mixmerge.latent.texts import hold_out

WORDS = ("fox", "dog", "code")
ROWS = tuple(
    Row(prompt=f"{name} and {other}: ", answer=f"{name[0]}{other[-1]}")
    for name in ("alpha", "kilo")
    for other in WORDS
)
KEEP = tuple(
    Row(prompt=f"{name} or {other}: ", answer="what?") for name in ("mike", "tango") for other in WORDS
)
OPTIONS = TrainOptions(
    steps=24,
    batch_size=4,
    rows_at_once=3,
    learning_rate=1e-2,
    holdout=0.0,
    save_steps=1,
    keep_batch_size=4,
    weights=LossWeights(keep=4.0),
)
MODES = ("prompt", "chunked", "lockstep")


@pytest.fixture
def asked(homes: Mapping[str, Path]) -> Callable[..., Asked]:
    """``asked(**changes)``: Llama answers, GPT-NeoX is read."""

    def make(**changes: Any) -> Asked:
        told: dict[str, Any] = {
            "rows": ROWS,
            "keep": KEEP,
            "mode": "prompt",
            "route": RouteOptions(kind="fixed", primary="llama"),
            "train": OPTIONS,
            **changes,
        }
        return Asked(
            experts=tuple(Expert(name, str(homes[name])) for name in ("llama", "gpt_neox")),
            chunk=2,
            depths=((0, "last"), (0.5, 0.5)),
            bridge=BridgeOptions(width=24, heads=3),
            too_long="refuse",
            **told,
        )

    return make


def quiet(what: str, done: int, steps: int, note: str) -> None:
    """Says nothing."""


def fitted(asked: Asked, work: Path) -> Trained:
    return train(prepare(asked), work, progress=quiet)


def values(one: Trained) -> dict[str, torch.Tensor]:
    return dict(one.glue.state_dict())


def same(one: Trained, other: Trained) -> bool:
    mine, others = values(one), values(other)
    return all(torch.equal(value, others[name]) for name, value in mine.items())


def both(made: Trained, rows: range, work: Path) -> tuple[Predicted, Predicted]:
    """What the primary says of rows with its peer, and alone."""
    ready = made.ready
    frozen = Frozen(ready.places, device="cpu", dtype="float32")
    remembered = Remembered(
        frozen,
        Store(work / "latents"),
        hashes={one.name: one.hash for one in ready.card.experts},
        depths={"gpt_neox": made.glue.peer_depths("gpt_neox")},
    )
    card = ready.card
    passes = Passes(
        frozen, remembered, made.glue, ready.texts, mode=card.mode, chunk=card.chunk, checkpointing=False
    )
    with torch.no_grad():
        told = passes.predict("llama", rows, [("gpt_neox",)] * len(rows), None)
        return told, passes.alone("llama", rows)


def test_departures_by_hand() -> None:
    alone = torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log()
    now = torch.tensor([[1.0, 3.0], [5.0, 5.0]]).log().requires_grad_()
    # (3/4, 1/4) against (1/4, 3/4): 3/4 log 3 + 1/4 log 1/3 = 1/2 log 3
    found = departures(now, alone.requires_grad_())
    torch.testing.assert_close(found.detach(), torch.tensor([0.5 * torch.tensor(3.0).log(), 0.0]))
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert alone.grad is None, "what it said alone is not what learns"
    # by logits the gradient is q - p
    torch.testing.assert_close(now.grad, torch.tensor([[-0.5, 0.5], [0.0, 0.0]]))


@given(st.lists(st.lists(st.floats(-30, 30), min_size=5, max_size=5), min_size=1, max_size=4))
def test_departures_are_none_of_the_same_and_never_below_zero(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    assert departures(logits, logits + 3).abs().max().item() < 1e-4
    assert departures(logits, logits.flip(-1)).min().item() > -1e-4


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 5))
def test_every_row_is_taken_once_an_epoch(count: int, size: int, seed: int, epoch: int) -> None:
    rows = [7 * at for at in range(count)]
    flat = [
        row for step in range(count * (epoch + 1)) for row in taken(rows, size=size, step=step, seed=seed)
    ]
    assert sorted(flat[epoch * count : (epoch + 1) * count]) == rows
    assert taken([], size=size, step=0, seed=seed) == []
    assert taken(rows, size=size, step=epoch, seed=seed) == taken(rows, size=size, step=epoch, seed=seed)


@pytest.mark.parametrize("mode", MODES)
def test_the_primary_stays_itself_on_rows_to_keep(
    asked: Callable[..., Asked], tmp_path: Path, mode: str
) -> None:
    free = OPTIONS.model_copy(update={"weights": LossWeights(keep=0.0)})
    kept = fitted(asked(mode=mode), tmp_path / "kept")
    loose = fitted(asked(mode=mode, train=free), tmp_path / "loose")
    places = range(len(ROWS), len(ROWS) + len(KEEP))
    away = [
        departures(*(one.logits for one in both(made, places, tmp_path / f"{mode}{at}"))).mean().item()
        for at, made in enumerate((kept, loose))
    ]
    assert away[0] < 0.5 * away[1], "with a weight of 0 it is only looked at"
    first, last = kept.report.points[0], kept.report.points[-1]
    assert first.keep == 0.0, "before the first step it is what it is alone"
    assert 0 < (last.keep or 0.0) < (loose.report.points[-1].keep or 0.0)
    assert last.lm < 0.9 * first.lm, "and the lessons are learned all the same"
    assert (kept.report.rows, kept.report.held_out) == (len(ROWS), 0)


def test_what_a_step_says_is_the_mean_over_the_tokens(asked: Callable[..., Asked], tmp_path: Path) -> None:
    options = OPTIONS.model_copy(update={"steps": 3, "keep_batch_size": len(KEEP)})
    two = fitted(asked(train=options.model_copy(update={"steps": 1, "warm_up": 0.0})), tmp_path / "one")
    at_once = fitted(asked(train=options.model_copy(update={"rows_at_once": 32})), tmp_path / "at once")
    parts = fitted(asked(train=options.model_copy(update={"rows_at_once": 1})), tmp_path / "parts")
    assert two.report.points[0].keep == 0.0
    for one, other in zip(at_once.report.points, parts.report.points, strict=True):
        assert one.keep == pytest.approx(other.keep, rel=1e-3, abs=1e-6)
        assert one.lm == pytest.approx(other.lm, rel=1e-4)


def test_without_rows_to_keep_nothing_is_other(asked: Callable[..., Asked], tmp_path: Path) -> None:
    plain = OPTIONS.model_copy(update={"steps": 4})
    other = plain.model_copy(update={"weights": LossWeights(keep=0.0)})
    without = fitted(asked(keep=(), train=plain), tmp_path / "without")
    looked = fitted(asked(train=other), tmp_path / "looked")
    assert same(without, looked), "lessons and their order are the same"
    assert all(one.keep is None for one in without.report.points)
    assert without.ready.job != looked.ready.job


def test_a_killed_fit_takes_the_same_rows_to_keep(asked: Callable[..., Asked], tmp_path: Path) -> None:
    job = asked(train=OPTIONS.model_copy(update={"steps": 4}))
    whole = fitted(job, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop(what: str, done: int, steps: int, note: str) -> None:
        if what == "learning" and done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(prepare(job), tmp_path / "work", progress=stop)
    gone_on = fitted(job, tmp_path / "work")
    assert same(whole, gone_on)
    assert gone_on.report.points == whole.report.points


def test_rows_to_keep_never_judge(asked: Callable[..., Asked], tmp_path: Path) -> None:
    halves = OPTIONS.model_copy(update={"steps": 2, "holdout": 0.5, "evaluate_every": 1})
    report = fitted(asked(train=halves), tmp_path).report
    assert report.rows + report.held_out == len(ROWS)
    assert report.alone == pytest.approx(report.looks[0].per_byte, rel=1e-4)


def test_a_row_to_keep_that_judges_takes_no_part(asked: Callable[..., Asked], tmp_path: Path) -> None:
    halves = OPTIONS.model_copy(update={"steps": 2, "holdout": 0.5})
    made = fitted(asked(keep=ROWS, train=halves), tmp_path / "some")
    assert (made.kept, made.report.rows, made.report.held_out) == (3, 3, 3)
    _, held = hold_out([row.digest for row in ROWS], 0.5, 0)
    none = fitted(asked(keep=(ROWS[held[0]],), train=halves), tmp_path / "none")
    assert none.kept == 0
    assert all(one.keep is None for one in none.report.points)
    other = replace(ROWS[held[0]], answer=" another")  # which says nothing of the answer that judges
    assert fitted(asked(keep=(other,), train=halves), tmp_path / "other").kept == 1


def test_the_gate_is_not_taught_by_rows_to_keep(asked: Callable[..., Asked], tmp_path: Path) -> None:
    """A router that learns who is read of an expert that is named decides these rows, too, and they teach the glue."""
    free = LossWeights(lm=0.0, keep=4.0, entropy=0.0, balance=0.0, consistency=0.0)
    options = OPTIONS.model_copy(update={"steps": 3, "weights": free, "weight_decay": 0.0})
    job = asked(route=RouteOptions(k=2, primary="llama", hidden=[8], features=32), train=options)
    made = fitted(job, tmp_path)
    _, start = made.ready.card.blank(seed=0)
    assert made.router is not None
    assert start is not None
    begun = dict(start.named_parameters())
    assert all(torch.equal(one, begun[name]) for name, one in made.router.named_parameters())


def test_rows_that_cannot_be_kept_are_named_by_their_own_numbers(asked: Callable[..., Asked]) -> None:
    with pytest.raises(MixmergeError, match=r"compose\.keep: row 2 has no answer"):
        prepare(asked(keep=(KEEP[0], Row(prompt="nothing"))))
    long = Row(prompt="alpha kilo " * 200, answer="b")
    with pytest.raises(MixmergeError) as caught:
        prepare(asked(keep=(KEEP[0], KEEP[1], long)))
    assert [fault.where for fault in caught.value.faults] == ["compose.keep: row 3, as llama reads it"]
