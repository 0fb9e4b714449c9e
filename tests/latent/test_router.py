"""Who is active, who answers, and how the gates learn."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.batch.records import Item
from mixmerge.engines.records import Message
from mixmerge.latent.router import HashedText, LatentRouter, Routing, decide, fixed, gumbel, routed_text
from mixmerge.latent.settings import RouteOptions

LOG3 = math.log(3.0)


def test_the_top_k_and_their_gates_by_hand() -> None:
    routes = decide(torch.tensor([[0.0, LOG3, -5.0], [2.0, 1.0, 2.0]]), 2)
    assert routes.active.tolist() == [[0, 1], [0, 2]]
    assert routes.primary.tolist() == [1, 0], "of equals the first"
    torch.testing.assert_close(routes.gates, torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]]))


def test_a_primary_that_is_said_is_active_whatever_its_score() -> None:
    routes = decide(torch.tensor([[5.0, 4.0, -3.0]]), 2, primary=torch.tensor([2]))
    assert routes.active.tolist() == [[0, 2]]
    assert routes.primary.tolist() == [2]
    assert routes.gates[0, 2] == pytest.approx(1 / (1 + math.exp(8.0)))


def test_noise_decides_who_is_active_and_not_what_they_weigh() -> None:
    scores, noise = torch.tensor([[0.0, LOG3, 1.0]]), torch.tensor([[9.0, 0.0, -9.0]])
    routes = decide(scores, 2, noise=noise)
    assert routes.active.tolist() == [[0, 1]]
    assert routes.primary.tolist() == [0]
    torch.testing.assert_close(routes.gates, torch.tensor([[0.25, 0.75, 0.0]]))


def test_the_choice_is_hard_forward_and_soft_backward() -> None:
    for noise, reaches in ((None, False), (torch.zeros(1, 3), True)):
        scores = torch.tensor([[1.0, 0.5, -1.0]], requires_grad=True)
        routes = decide(scores, 2, noise=noise)
        assert routes.gates[0, 2].item() == 0
        (grad,) = torch.autograd.grad(routes.gates[0, 0], scores)
        assert grad[0, 0] > 0 > grad[0, 1]
        assert (grad[0, 2] != 0) == reaches, "who was left out learns, too"


@given(
    st.lists(st.lists(st.floats(-200, 200, width=32), min_size=4, max_size=4), min_size=1, max_size=4),
    st.integers(1, 6),
    st.booleans(),
)
def test_what_holds_of_every_routing(rows: list[list[float]], k: int, noisy: bool) -> None:
    scores = torch.tensor(rows, requires_grad=True)
    noise = gumbel(scores.shape, torch.Generator().manual_seed(k)) if noisy else None
    routes = decide(scores, k, noise=noise)
    assert routes.active.shape == (len(rows), min(k, 4))
    torch.testing.assert_close(routes.gates.sum(-1), torch.ones(len(rows)))
    assert ((routes.gates > 0).sum(-1) <= min(k, 4)).all()
    assert all(primary in active for primary, active in zip(routes.primary, routes.active, strict=True))
    routes.gates.square().sum().backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_gumbel_noise_is_gumbel_noise() -> None:
    drawn = gumbel((20_000,), torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.03)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, abs=0.08)


def test_a_router_starts_with_all_alike_and_learns_by_its_gates() -> None:
    torch.manual_seed(0)
    router = LatentRouter(32, 3, RouteOptions(k=2, hidden=[16, 8]))
    features = torch.nn.functional.normalize(torch.randn(6, 32), dim=-1)
    assert router(features).gates.tolist() == [[0.5, 0.5, 0.0]] * 6
    adam = torch.optim.Adam(router.parameters(), lr=0.01)
    for step in range(2):
        routes = router(features, draw=torch.Generator().manual_seed(step))
        adam.zero_grad()
        (routes.gates[:, 2] * torch.arange(6)).sum().backward()  # type: ignore[no-untyped-call]
        adam.step()
    for name, one in router.named_parameters():
        assert one.grad is not None, name
        assert (one.grad != 0).any(), f"{name} gets no gradient after one update"


def test_rows_are_decided_alone_and_noise_is_by_seed() -> None:
    torch.manual_seed(1)
    router = LatentRouter(16, 4, RouteOptions(k=2, hidden=[8]))
    torch.nn.init.normal_(router.layers[-1].weight)
    features = torch.nn.functional.normalize(torch.randn(5, 16), dim=-1)
    whole = router(features)
    for at in range(5):
        assert router(features[at : at + 1]).active[0].tolist() == whole.active[at].tolist()
    draws = [router(features, draw=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert draws[0].active.tolist() == draws[1].active.tolist() != draws[2].active.tolist()
    again = router(features, draw=torch.Generator().manual_seed(5), primary=draws[0].primary)
    assert again.primary.tolist() == draws[0].primary.tolist()


def test_a_fixed_routing() -> None:
    routes = fixed(2, 4, 3)
    assert routes.active.tolist() == [[0, 1, 2, 3]] * 2
    assert routes.primary.tolist() == [3, 3]
    (told,) = Routing(("a", "b"), None, None, primary="b")(["whatever"])
    assert (told.primary, dict(told.gates), dict(told.scores)) == ("b", {"a": 0.5, "b": 0.5}, {})


def test_routing_by_names() -> None:
    torch.manual_seed(2)
    encode = HashedText(64)
    router = LatentRouter(64, 3, RouteOptions(k=2, hidden=[8]), primary=1)
    torch.nn.init.normal_(router.layers[-1].weight)
    chat = (Message("system", "be short"), Message("user", "sort 3 1"), Message("user", "down"))
    told = Routing(("a", "b", "c"), router, encode)(["sort 3 1\n\ndown", chat])
    assert told[0] == told[1], "a router reads what users said"
    assert told[0].primary == "b"
    assert len(told[0].gates) == 2
    assert sum(told[0].gates.values()) == pytest.approx(1)
    assert set(told[0].scores) == {"a", "b", "c"}


def test_a_router_reads_in_training_what_it_reads_in_a_batch() -> None:
    chat = (
        Message("system", "be short"),
        Message("user", "one"),
        Message("assistant", "x"),
        Message("user", "2"),
    )
    for prompt in ("plain text", chat):
        assert routed_text(prompt) == Item("id", prompt).text


def test_hashed_texts() -> None:
    made = HashedText(128)(["sort 3 1 2", "sort 3 1 2", "reverse LEMON"])
    assert made.shape == (3, 128)
    torch.testing.assert_close(made.norm(dim=-1), torch.ones(3))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    assert HashedText(32)([""]).norm() == 0
