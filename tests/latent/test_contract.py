"""What every family keeps, as primary and as peer: training is decoding, rows are alone, experts stay as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmerge.engines.records import Message
from mixmerge.latent.glue import Glue
from mixmerge.latent.interaction import Interaction
from mixmerge.latent.records import NEVER, Memory, View

FAMILIES = ("llama", "qwen3", "gemma", "gpt2", "gpt_neox", "opt")
MODES = (("prompt", 1), ("chunked", 3), ("lockstep", 1))
DEPTHS = ((0, "last"), (0.5, 0.5), (1, 2))
PLAIN = "Name the cell: kilo é mike 😀\r\n  gives"
CHAT = (Message("user", " Name the cell: kilo e\u0301 mike 😀 "), Message("assistant", "it"))
ANSWER = " we're 42 and 你好 fox, isn't  it.\r\n\r\n 👩‍🚀 alpha kilo"


def peers_of(primary: str) -> tuple[str, str]:
    at = FAMILIES.index(primary)
    return FAMILIES[(at + 1) % 6], FAMILIES[(at + 2) % 6]


def prompt_of(primary: str) -> Any:
    return CHAT if primary in ("llama", "gemma", "opt") else PLAIN


def blinded(view: View) -> View:
    return replace(view, upto=torch.full_like(view.upto, NEVER - 1))


@pytest.mark.parametrize(("mode", "chunk"), MODES)
@pytest.mark.parametrize("primary", FAMILIES)
def test_what_a_text_teaches_is_what_its_beginning_says(
    table: Callable[..., Any], primary: str, mode: str, chunk: int
) -> None:
    """Logits at a token of a whole text are those of the text that ends there. Without the mask they are not."""
    around, peers, prompt = table(depths=DEPTHS), peers_of(primary), prompt_of(primary)
    gates = torch.tensor([[0.5, 0.2, 0.3]])
    row = around.row(primary, peers, prompt, ANSWER, mode=mode)
    view, given = around.view(primary, [row], mode=mode, chunk=chunk, gates=gates)
    whole = around.logits(primary, view, given)[0]
    open_, alone = around.logits(primary, blinded(view), given)[0], []
    count = len(row.read.ids) - row.read.answer_from
    assert count > 12
    leaks = 0.0
    for tokens in {0, 1, 2, 3, *range(5, count, 4), count}:
        short = around.row(
            primary,
            peers,
            prompt,
            ANSWER,
            mode=mode,
            tokens=tokens,
            handed=tokens // chunk * chunk,
        )
        view, given = around.view(primary, [short], mode=mode, chunk=chunk, gates=gates)
        at = row.read.answer_from + tokens - 1
        alone.append(around.logits(primary, view, given)[0, -1])
        assert (whole[at] - alone[-1]).abs().max() < 1e-4, tokens
        free = around.logits(primary, blinded(view), given)[0, -1]
        leaks = max(leaks, float((open_[at] - free).abs().max()))
    assert (leaks > 1e-2) == (mode != "prompt")


def steps_of(around: Any, primary: str, row: Any, upto: Tensor) -> Tensor:
    """The answer's tokens one by one behind cached keys and values, the memory growing by what they may see."""
    from transformers import DynamicCache

    model, glue, read = around.experts[primary].model, around.glue, row.read
    run, cache = Interaction(model, glue, primary), DynamicCache(config=model.config)
    ids, seen = torch.tensor([read.ids]), torch.tensor([read.seen])
    memory, given = glue.blank(primary, 1), [0 for _ in row.peers]
    found = []
    for low, high in [
        (0, read.answer_from),
        *((at, at + 1) for at in range(read.answer_from, len(read.ids))),
    ]:
        for at, (peer, whole) in enumerate(row.peers):
            stop = int((whole.ends <= upto[0, high - 1]).sum())
            states = [one[None, given[at] : stop] for one in whole.states]
            memory = memory.append(glue.told(peer, states, whole.ends[None, given[at] : stop], column=at + 1))
            given[at] = stop
        view = View(memory, None, seen[:, low:high], upto[:, low:high])
        with torch.no_grad(), run.running(view):
            out = model(input_ids=ids[:, low:high], past_key_values=cache, use_cache=True)
        found.append(out.logits[0, -1])
    return torch.stack(found)


@pytest.mark.parametrize("primary", FAMILIES)
def test_token_by_token_is_all_at_once(table: Callable[..., Any], primary: str) -> None:
    around = table(depths=DEPTHS)
    row = around.row(primary, peers_of(primary), prompt_of(primary), ANSWER, mode="lockstep")
    view, given = around.view(primary, [row], mode="lockstep")
    whole = around.logits(primary, view, given)[0, row.read.answer_from - 1 :]
    assert (whole - steps_of(around, primary, row, view.upto)).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("start", ["write", "gate"])
@pytest.mark.parametrize("primary", FAMILIES)
def test_before_training_a_primary_is_itself_to_the_last_bit(
    table: Callable[..., Any], primary: str, start: str, kind: torch.dtype
) -> None:
    around = table(depths=DEPTHS, start=start, stirred=False)
    row = around.row(primary, peers_of(primary), prompt_of(primary), ANSWER)
    view, given = around.view(primary, [row], gates=torch.tensor([[0.5, 0.2, 0.3]]))
    model = copy.deepcopy(around.experts[primary].model).to(kind)
    with torch.no_grad():
        before = model(**given).logits
        with Interaction(model, around.glue, primary).running(view):
            after = model(**given).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("primary", FAMILIES)
def test_a_row_gets_the_same_in_any_batch(table: Callable[..., Any], primary: str) -> None:
    around = table(depths=DEPTHS)
    one, two = peers_of(primary)
    asked = [
        ((one, two), prompt_of(primary), ANSWER, [0.5, 0.2, 0.3]),
        ((two,), "kilo", " alpha", [0.4, 0.6, 0.0]),
        ((two, one), PLAIN * 2, " the fox 😀", [0.2, 0.2, 0.6]),
        ((), "mike", " 7", [1.0, 0.0, 0.0]),
    ]
    rows = [around.row(primary, names, prompt, said, mode="chunked") for names, prompt, said, _ in asked]
    gates = [gate for *_, gate in asked]
    alone = []
    for row, gate in zip(rows, gates, strict=True):
        view, given = around.view(primary, [row], mode="chunked", chunk=2, gates=torch.tensor([gate]))
        alone.append(around.logits(primary, view, given)[0])
    for side in ("right", "left"):
        for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
            view, given = around.view(
                primary,
                [rows[at] for at in order],
                mode="chunked",
                chunk=2,
                gates=torch.tensor([gates[at] for at in order]),
                side=side,
            )
            for place, found in zip(order, around.logits(primary, view, given), strict=True):
                size = len(rows[place].read.ids)
                own = found[:size] if side == "right" else found[-size:]
                assert (own - alone[place]).abs().max() < 1e-5, (side, order, place)


def test_the_order_of_experts_is_of_no_account(table: Callable[..., Any]) -> None:
    around, other = table(["llama", "opt", "gpt2"]), table(["gpt2", "llama", "opt"])
    assert list(around.glue.state_dict()) == list(other.glue.state_dict())
    found = []
    for these, peers, gates in (
        (around, ("opt", "gpt2"), [0.5, 0.2, 0.3]),
        (other, ("gpt2", "opt"), [0.5, 0.3, 0.2]),
    ):
        row = these.row("llama", peers, PLAIN, ANSWER, mode="lockstep")
        view, given = these.view("llama", [row], mode="lockstep", gates=torch.tensor([gates]))
        found.append(these.logits("llama", view, given))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("null", [True, False])
@pytest.mark.parametrize("gates", [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_where_no_peer_has_a_gate_the_primary_is_itself_to_the_last_bit(
    table: Callable[..., Any], null: bool, gates: tuple[float, ...]
) -> None:
    around = table(depths=DEPTHS, null=null)
    row = around.row("llama", ("qwen3", "gpt2"), PLAIN, ANSWER)
    view, given = around.view("llama", [row], gates=torch.tensor([gates]))
    with torch.no_grad():
        alone = around.experts["llama"].model(**given).logits
    assert torch.equal(around.logits("llama", view, given), alone)
    even, _ = around.view("llama", [row])
    assert not torch.allclose(around.logits("llama", even, given), alone, atol=1e-3)


def test_a_peer_whose_gate_is_small_is_hardly_heard(table: Callable[..., Any]) -> None:
    around = table(["llama", "opt", "gpt2"])
    row = around.row("llama", ("opt", "gpt2"), PLAIN)
    without = around.row("llama", ("opt",), PLAIN)
    view, given = around.view("llama", [row], gates=torch.tensor([[0.5, 0.5, 0.0]]))
    less, _ = around.view("llama", [without], gates=torch.tensor([[0.5, 0.5]]))
    assert (around.logits("llama", view, given) - around.logits("llama", less, given)).abs().max() < 1e-5


@pytest.mark.parametrize("primary", ["llama", "gpt2"])
def test_training_changes_the_glue_alone(table: Callable[..., Any], primary: str) -> None:
    """And with layers that are computed again on the way back it learns the same."""
    around = table([primary, "opt"], depths=DEPTHS, primary=primary)
    before = {name: value.clone() for name, value in around.experts[primary].model.state_dict().items()}
    row = around.row(primary, ("opt",), PLAIN, ANSWER, mode="chunked")
    gates = torch.tensor([[0.6, 0.4]], requires_grad=True)
    found = []
    for again in (False, True):
        model = copy.deepcopy(around.experts[primary].model)
        if again:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for one in model.modules():
                if isinstance(one, torch.nn.Dropout):
                    one.p = 0.0
        view, given = around.view(primary, [row], mode="chunked", chunk=4, gates=gates)
        with Interaction(model, around.glue, primary).running(view):
            loss = model(**given, labels=given["input_ids"], use_cache=False).loss
            loss.backward()
        assert all(one.grad is None for one in model.parameters())
        found.append({name: one.grad.clone() for name, one in around.glue.named_parameters()})
        around.glue.zero_grad()
    assert all(value.abs().sum() > 0 for value in found[0].values())
    assert all(torch.allclose(value, found[1][name], atol=1e-5) for name, value in found[0].items())
    after = around.experts[primary].model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_error_in_a_forward_leaves_the_expert_as_it_was(table: Callable[..., Any]) -> None:
    around = table(["llama", "opt"])
    row = around.row("llama", ("opt",), PLAIN)
    view, given = around.view("llama", [row])
    model = around.experts["llama"].model
    with torch.no_grad():
        plain = model(**given).logits
    wrong = replace(view, memory=Memory((), (), view.memory.ends, view.memory.peer))
    with pytest.raises(IndexError):
        around.logits("llama", wrong, given)
    with torch.no_grad():
        assert torch.equal(model(**given).logits, plain)


def test_a_glue_is_kept_and_read_again_without_experts(table: Callable[..., Any], tmp_path: Path) -> None:
    around = table(["llama", "opt", "gpt2"], depths=DEPTHS)
    state = around.glue.state_dict()
    save_file(state, tmp_path / "glue.safetensors")
    read = Glue(tuple(around.glue.shapes.values()), DEPTHS, around.glue.options, seed=9)
    assert read.load_state_dict(load_file(tmp_path / "glue.safetensors")).missing_keys == []
    row = around.row("llama", ("opt", "gpt2"), PLAIN)
    view, given = around.view("llama", [row])
    wanted = around.logits("llama", view, given)
    again = replace(around, glue=read)
    view, given = again.view("llama", [row])
    assert torch.equal(again.logits("llama", view, given), wanted)
    largest = max(one.numel() for one in around.experts["llama"].model.parameters())
    assert all(one.numel() < largest for one in state.values())
    assert sum(one.numel() for one in state.values()) == sum(one.numel() for one in read.parameters())


def test_interaction_is_told_who_attended_to_whom(
    table: Callable[..., Any], experts: Mapping[str, Any]
) -> None:
    around = table(["llama", "opt", "gpt2"], depths=DEPTHS)
    row = around.row("llama", ("opt", "gpt2"), PLAIN)
    view, given = around.view("llama", [row])
    watched = replace(view, watch=torch.zeros(1, 3))
    wanted = around.logits("llama", view, given)
    assert torch.equal(around.logits("llama", watched, given), wanted)
    assert watched.watch is not None
    assert watched.watch.sum() == pytest.approx(len(DEPTHS) * given["input_ids"].numel(), rel=1e-4)
    assert (watched.watch > 0).all()
