"""What a bridge computes, by hand and by its invariants, and what learns at which step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from mixmerge.latent import sight as sights
from mixmerge.latent.bridge import Bridge
from mixmerge.latent.glue import Glue
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.records import NEVER, NOBODY, Latents, Memory, Shape, View
from mixmerge.latent.sight import Ground, Sight


def seen_by(
    memory: Memory, seen: list[int], *, upto: list[int] | None = None, gates: Tensor | None = None, null: bool
) -> Sight:
    rows = memory.ends.shape[0]
    told = torch.tensor(seen).expand(rows, -1)
    view = View(memory, gates, told, told if upto is None else torch.tensor(upto).expand(rows, -1))
    return Sight(Ground.of(memory, gates), view, null=null)


def memory_of(keys: Tensor, values: Tensor, ends: list[int], peer: list[int]) -> Memory:
    rows = keys.shape[0]
    return Memory(
        (keys,), (values,), torch.tensor(ends).expand(rows, -1), torch.tensor(peer).expand(rows, -1)
    )


def test_attention_by_hand() -> None:
    """One head of one number: logits q k - slope * bytes + log(K gate)."""
    keys = torch.tensor([0.0, 1.0, 2.0, 5.0])[None, None, :, None]
    values = torch.tensor([0.0, 10.0, 20.0, 1000.0])[None, None, :, None]
    memory = memory_of(keys, values, [0, 4, 6, 9], [NOBODY, 1, 2, 1])
    gates = torch.tensor([[0.5, 0.3, 0.2]])
    query, slope = 0.5, 0.1
    found = seen_by(memory, [8], upto=[6], gates=gates, null=True).attend(
        torch.tensor(query)[None, None, None, None], keys, values, torch.tensor([slope])
    )
    weights = [
        math.exp(0.0),
        math.exp(query * 1.0 - slope * 4 + math.log(0.9)),
        math.exp(query * 2.0 - slope * 2 + math.log(0.6)),
    ]
    wanted = (10.0 * weights[1] + 20.0 * weights[2]) / sum(weights)
    assert found.item() == pytest.approx(wanted, rel=1e-6)


def test_distances_start_like_alibi_over_eight_bytes() -> None:
    bridge = Bridge(4, 4, BridgeOptions(width=8, heads=4), same=True, seed=0)
    slopes = torch.nn.functional.softplus(bridge.slopes)
    assert slopes.tolist() == pytest.approx([0.25 / 8, 0.0625 / 8, 2**-6 / 8, 2**-8 / 8], rel=1e-3)


def test_the_default_reads_from_far_and_a_short_reach_does_not() -> None:
    """Against the empty latent, 200 bytes on: what the documentation says of the default, and of 0.03."""
    zeros = torch.zeros(1, 8, 2, 4)
    memory = memory_of(zeros, zeros, [0, 10], [NOBODY, 1])
    shares = {}
    for reach in (BridgeOptions().reach, 0.03):
        bridge = Bridge(4, 4, BridgeOptions(width=32, heads=8, reach=reach), same=True, seed=0)
        slopes = torch.nn.functional.softplus(bridge.slopes.detach())
        told, values = torch.tensor([[210]]), zeros.clone()
        values[:, :, 1] = 1.0
        sight = Sight(Ground.of(memory, None), View(memory, None, told, told), null=True)
        shares[reach] = sight.attend(zeros[:, :, :1], zeros, values, slopes)[0, :, 0, 0]
        wanted = [1 / (1 + math.exp(min(700, 200 * 2 ** -(head + 1) / reach))) for head in range(8)]
        assert shares[reach].tolist() == pytest.approx(wanted, abs=1e-6)
    assert shares[8.0][-1].item() == pytest.approx(0.4756, abs=1e-3)
    assert shares[0.03].max().item() < 1e-11


def random_memory(rows: int, count: int, *, null: bool) -> Memory:
    draw = torch.Generator().manual_seed(3)
    keys, values = (torch.randn(rows, 2, count, 4, generator=draw) for _ in range(2))
    ends = torch.randint(1, 20, (rows, count), generator=draw).sort(dim=1).values
    peer = torch.randint(1, 3, (rows, count), generator=draw)
    if null:
        ends[:, 0], peer[:, 0] = 0, NOBODY
    ends[0, -1] = NEVER
    return Memory((keys,), (values,), ends, peer)


@pytest.mark.parametrize("blocks", [3, 8])
@pytest.mark.parametrize("null", [True, False])
def test_blocks_and_computing_again_change_nothing(
    monkeypatch: pytest.MonkeyPatch, null: bool, blocks: int
) -> None:
    memory = random_memory(2, 7, null=null)
    seen = [0, 0, 3, 8, 11, 15, 19, 25]
    query = torch.randn(2, 2, 8, 4, generator=torch.Generator().manual_seed(1))

    def run() -> tuple[Tensor, list[Tensor]]:
        gates = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.8, 0.0]], requires_grad=True)
        slopes = torch.tensor([0.1, 0.02], requires_grad=True)
        asks = query.clone().requires_grad_()
        keys = memory.keys[0].clone().requires_grad_()
        sight = seen_by(memory, seen, gates=gates, null=null)
        found = sight.attend(asks, keys, memory.values[0], slopes)
        found = sight.attend(found, keys, memory.values[0], slopes)  # another level
        found.square().sum().backward()
        return found.detach(), [one.grad for one in (gates, slopes, asks, keys) if one.grad is not None]

    plain, grads = run()
    monkeypatch.setattr(sights, "_AT_ONCE", 2 * 2 * 7 * blocks)
    monkeypatch.setattr(sights, "_AGAIN", 0)
    cut, again = run()
    assert torch.allclose(plain, cut, atol=1e-6)
    assert len(grads) == 4
    for one, other in zip(grads, again, strict=True):
        assert torch.isfinite(one).all()
        assert torch.allclose(one, other, atol=1e-5)


def test_who_sees_nothing_reads_nothing() -> None:
    memory = random_memory(1, 5, null=False)
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    found = seen_by(memory, [0, 0, 50], null=False).attend(
        query, memory.keys[0], memory.values[0], torch.ones(2)
    )
    assert found[:, :, :2].abs().sum() == 0
    assert found[:, :, 2].abs().sum() > 0
    found.sum().backward()
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()
    nobody = memory_of(torch.zeros(1, 2, 0, 4), torch.zeros(1, 2, 0, 4), [], [])
    assert (
        seen_by(nobody, [9], null=False)
        .attend(query, nobody.keys[0], nobody.values[0], torch.ones(2))
        .eq(0)
        .all()
    )


@settings(max_examples=60)
@given(
    ends=st.lists(st.integers(0, 30), min_size=1, max_size=8),
    seen=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), min_size=1, max_size=4),
)
def test_what_ends_later_than_a_token_may_look_is_nothing_to_it(
    ends: list[int], seen: list[tuple[int, int]]
) -> None:
    draw = torch.Generator().manual_seed(len(ends))
    query = torch.randn(1, 2, len(seen), 4, generator=draw)
    keys, values, others = (torch.randn(1, 2, 1 + len(ends), 4, generator=draw) for _ in range(3))
    peer = [NOBODY, *(1 + at % 2 for at in range(len(ends)))]
    stand, upto = [one for one, _ in seen], [max(0, one - less) for one, less in seen]
    for at, limit in enumerate(upto):
        later = torch.tensor([False, *(end > limit for end in ends)])[None, None, :, None]
        found = [
            seen_by(memory_of(one, other, [0, *ends], peer), stand, upto=upto, null=True).attend(
                query, one, other, torch.tensor([0.1, 0.0])
            )
            for one, other in (
                (keys, values),
                (torch.where(later, 9.0 * others, keys), torch.where(later, others, values)),
            )
        ]
        assert torch.equal(found[0][:, :, at], found[1][:, :, at])


def test_equal_gates_are_no_gates() -> None:
    memory = random_memory(2, 6, null=True)
    equal = torch.full((2, 3), 1 / 3)
    one, other = Ground.of(memory, equal), Ground.of(memory, None)
    assert one.term is not None
    assert one.scale is not None
    assert torch.allclose(one.term, torch.zeros(2, 6), atol=1e-6)
    assert torch.allclose(one.scale, torch.ones(2, 1, 1))
    assert other.term is None
    # a row with one peer fewer has 0 in the column that it does not use
    fewer = Ground.of(memory, torch.tensor([[0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3]]))
    assert fewer.scale is not None
    assert torch.allclose(fewer.scale, torch.ones(2, 1, 1))


@pytest.mark.parametrize("gates", [(1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_peers_whose_gates_are_nothing_are_not_read(gates: tuple[float, ...]) -> None:
    """Without an empty latent a softmax over them alone would read them in full, however small their gates."""
    memory = random_memory(1, 5, null=False)
    query = torch.randn(1, 2, 3, 4, requires_grad=True)
    given = torch.tensor([gates], requires_grad=True)
    watch = torch.zeros(1, 3)
    told = torch.full((1, 3), 30)
    for null in (False, True):
        around = random_memory(1, 5, null=True) if null else memory
        sight = Sight(Ground.of(around, given), View(around, given, told, told, watch=watch), null=null)
        found = sight.attend(query, around.keys[0], around.values[0], torch.ones(2))
        if null:  # its value, which glue has as 0
            assert torch.allclose(found, around.values[0][:, :, :1].expand_as(found))
        else:
            assert found.eq(0).all()
        found.sum().backward()
        assert query.grad is not None
        assert given.grad is not None
        assert torch.isfinite(query.grad).all()
        assert torch.isfinite(given.grad).all()
    assert torch.allclose(watch, torch.tensor([[6.0, 0.0, 0.0]])), "attention went nowhere"
    half = torch.tensor([[0.5, 0.5, 0.0]])
    sight = Sight(Ground.of(memory, half), View(memory, half, told, told), null=False)
    some = sight.attend(query, memory.keys[0], memory.values[0], torch.ones(2))
    kept = Memory(memory.keys, memory.values, memory.ends.masked_fill(memory.peer == 2, NEVER), memory.peer)
    alone = seen_by(kept, [30, 30, 30], null=False).attend(
        query, memory.keys[0], memory.values[0], torch.ones(2)
    )
    assert torch.allclose(some, alone), "as if the other one were not there"


def test_where_attention_goes_is_told() -> None:
    memory = random_memory(2, 6, null=True)
    told = torch.tensor([[4, 20]]).expand(2, -1)
    watch = torch.zeros(2, 3)
    view = View(memory, None, told, told, watch=watch)
    Sight(Ground.of(memory, None), view, null=True).attend(
        torch.zeros(2, 2, 2, 4), memory.keys[0], memory.values[0], torch.zeros(2)
    )
    assert torch.allclose(watch.sum(dim=-1), torch.full((2,), 2.0))
    visible = (memory.ends[0, None] <= told[0, :, None]).float()
    wanted = visible / visible.sum(dim=-1, keepdim=True)
    for column in (1, 2):
        assert torch.allclose(watch[0, column], wanted[:, memory.peer[0] == column].sum())


def test_memory_grows_and_rows_leave() -> None:
    memory = random_memory(3, 4, null=True)
    both = memory.append(memory)
    assert both.keys[0].shape == (3, 2, 8, 4)
    kept = both.keep([2, 0])
    assert torch.equal(kept.ends, torch.cat([memory.ends, memory.ends], dim=1)[[2, 0]])
    assert torch.equal(kept.values[0][1], both.values[0][0])
    assert kept.keys[0].shape == (2, 2, 8, 4)


SHAPES = (Shape("a.b", 12, 4, "1", 50), Shape("keys", 20, 6, "2", 60, 24))


def told(depth_widths: list[int], rows: int = 1) -> list[Latents]:
    draw = torch.Generator().manual_seed(7)
    return [
        Latents(
            tuple(torch.randn(5, width, generator=draw) for width in depth_widths),
            torch.tensor([1, 2, 3, 5, 8]),
        )
        for _ in range(rows)
    ]


def loss_of(glue: Glue, gates: Tensor, *, states: Tensor) -> Tensor:
    widths = [glue.shapes["keys"].width_at(depth) for depth in glue.peer_depths("keys")]
    memory = glue.memory("a.b", [[("keys", one)] for one in told(widths)])
    seen = torch.tensor([[0, 4, 9]])
    view = View(memory, gates, seen, seen)
    sight = Sight(Ground.of(memory, gates), view, null=glue.options.null)
    for level in range(glue.levels):
        states = states + glue.bridge("a.b", level).read(
            states, memory.keys[level], memory.values[level], sight
        )
    return (states * torch.linspace(-1, 1, 12)).tanh().sum()


def moved(glue: Glue, expert: str) -> dict[str, bool]:
    names = {name: one for name, one in glue.named_parameters() if expert in name}
    return {
        name.partition(f"{expert}.")[2]: one.grad is not None and bool(one.grad.abs().sum() > 0)
        for name, one in names.items()
    }


@pytest.mark.parametrize("start", ["write", "gate"])
@pytest.mark.parametrize("depths", [3, ((0, "last"), (2, 0.5))])
def test_what_learns_first_and_that_all_learn_after_one_update(start: Any, depths: Any) -> None:
    glue = Glue(SHAPES, depths, BridgeOptions(width=8, heads=2, start=start), primary="a.b")
    gates = torch.tensor([[0.6, 0.4]], requires_grad=True)
    states = torch.randn(1, 3, 12, generator=torch.Generator().manual_seed(2))
    first = loss_of(glue, gates, states=states)
    assert torch.equal(first, (states * torch.linspace(-1, 1, 12)).tanh().sum())
    first.backward()
    assert {name for name, found in moved(glue, "a%2Eb").items() if found} == {start}
    assert not any(moved(glue, "keys").values())
    assert gates.grad is not None
    assert not gates.grad.any()
    torch.optim.SGD(glue.parameters(), lr=0.5).step()
    glue.zero_grad()
    loss_of(glue, gates, states=states).backward()
    assert all(moved(glue, "a%2Eb").values()), moved(glue, "a%2Eb")
    assert all(moved(glue, "keys").values()), moved(glue, "keys")
    assert (gates.grad != 0).all()  # the router learns from the task


def test_two_zeros_would_never_learn() -> None:
    glue = Glue(SHAPES, 2, BridgeOptions(width=8, heads=2), primary="a.b")
    with torch.no_grad():
        glue.bridge("a.b", 0).gate.zero_()
    gates = torch.tensor([[0.6, 0.4]], requires_grad=True)
    loss_of(glue, gates, states=torch.randn(1, 3, 12)).backward()
    assert not any(moved(glue, "a%2Eb").values())
    with pytest.raises(ValidationError, match="start"):
        BridgeOptions.model_validate({"start": "both"})


def test_roles_have_what_they_need_and_nothing_else() -> None:
    names = {
        name for name, _ in Glue(SHAPES, ((0, "last"),), BridgeOptions(), primary="a.b").named_parameters()
    }
    reads = {"reads.weight", "reads.bias", "reads.into", "query", "out", "write", "gate", "slopes", "nothing"}
    hears = {"told.weight", "told.bias", "told.into", "key", "value"}
    assert names == {f"bridges.0.expert a%2Eb.{one}" for one in reads} | {
        f"bridges.0.expert keys.{one}" for one in hears
    }
    # at one depth both roles share a projection, at two they do not
    shared = Glue(SHAPES[:1], ((2, 2), (2, 3)), BridgeOptions(null=False))
    first = {name.partition("b.")[2] for name, _ in shared.bridges[0].named_parameters()}
    assert first == (reads | {"key", "value"}) - {"nothing"}
    assert {name.partition("b.")[2] for name, _ in shared.bridges[1].named_parameters()} == first | hears


def test_a_bridge_starts_the_same_whoever_else_is_there() -> None:
    one, other = Glue(SHAPES, 3, BridgeOptions()), Glue(SHAPES[::-1], 3, BridgeOptions())
    alone = Glue(SHAPES[:1], 3, BridgeOptions())
    assert list(one.state_dict()) == list(other.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
        assert "keys" in name or torch.equal(value, alone.state_dict()[name])
    assert not torch.equal(one.bridge("keys", 0).key, one.bridge("keys", 1).key)
    assert not torch.equal(
        one.bridge("keys", 0).key, Glue(SHAPES, 3, BridgeOptions(), seed=1).bridge("keys", 0).key
    )


def test_products_are_in_the_type_of_the_states() -> None:
    glue = Glue(SHAPES, 2, BridgeOptions(width=8, heads=2))
    with torch.no_grad():
        glue.bridge("a.b", 0).write.normal_()
    (latents,) = told([20])
    half = Latents(tuple(one.bfloat16() for one in latents.states), latents.ends)
    memory = glue.memory("a.b", [[("keys", half)]])
    assert memory.keys[0].dtype == torch.bfloat16
    seen = torch.tensor([[9]])
    for kind in (torch.bfloat16, torch.float32):
        sight = Sight(Ground.of(memory, None), View(memory, None, seen, seen), null=True)
        read = glue.bridge("a.b", 0).read(
            torch.ones(1, 1, 12, dtype=kind), memory.keys[0], memory.values[0], sight
        )
        assert read.dtype == kind
        assert read.abs().sum() > 0
    assert glue.memory("a.b", [[("keys", half)]], dtype=torch.float32).keys[0].dtype == torch.float32
    assert {one.dtype for one in glue.parameters()} == {torch.float32}


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="width 10 is no multiple of heads 4"):
        BridgeOptions(width=10, heads=4)
    with pytest.raises(ValidationError, match="dropout"):
        BridgeOptions(dropout=1.0)
    with pytest.raises(ValidationError, match="depth"):
        BridgeOptions.model_validate({"depth": 3})
