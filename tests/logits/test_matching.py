"""Shifts and matched strengths, against tensors worked out by hand and a slow search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixmerge.errors import MixmergeError
from mixmerge.logits.fusing import Settings, fuse, fuse_rows
from mixmerge.logits.matching import (
    Path,
    centred,
    match_grid,
    match_joint,
    match_one,
    moments,
    objective,
)
from mixmerge.logits.shifts import divergences, fused, nucleus, shift
from mixmerge.logits.vocabulary import Shared

LOG = math.log


def drawn(rows: int, width: int, seed: int, *, scale: float = 1.0, count: int = 1) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=draw) * scale for _ in range(count)]


def case(
    rows: int = 5, width: int = 40, seed: int = 0, experts: int = 2
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Logits of a base, of a reference and of experts near it."""
    base, reference = drawn(rows, width, seed, scale=2, count=2)
    return base, reference, [reference + one for one in drawn(rows, width, seed + 1, count=experts)]


def wanted(reference: Tensor, experts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return divergences(experts, reference)


# --- by hand


def test_proxy_tuning_by_hand() -> None:
    base = torch.tensor([[LOG(0.5), LOG(0.25), LOG(0.25)]])
    reference = (
        torch.tensor([[LOG(0.5), LOG(0.25), LOG(0.25)]]) + 7
    )  # a constant is nothing to a distribution
    expert = torch.tensor([[LOG(0.25), LOG(0.5), LOG(0.25)]])
    delta = shift(expert, reference)
    torch.testing.assert_close(delta, torch.tensor([[-LOG(2), LOG(2), 0.0]]))
    made = fuse(base, reference, [expert], Settings("static"), (1.0,))
    torch.testing.assert_close(made.logits.softmax(-1), torch.tensor([[0.25, 0.5, 0.25]]))
    twice = fuse(base, reference, [expert], Settings("static"), (2.0,)).logits.softmax(-1)
    torch.testing.assert_close(twice, torch.tensor([[0.125, 1.0, 0.25]]) / 1.375)
    against = fuse(base, reference, [expert], Settings("static"), (-1.0,)).logits.softmax(-1)
    torch.testing.assert_close(against, torch.tensor([[1.0, 0.125, 0.25]]) / 1.375)


def test_a_clip_and_what_is_not_finite() -> None:
    expert = torch.tensor([[0.0, -torch.inf, -30.0, 0.0]])
    reference = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    delta = shift(expert, reference, clip=2.0)
    assert delta[0, 1] == delta[0, 3] == 0
    assert delta[0, 2] == -2
    assert delta.isfinite().all()


def test_the_base_is_cut_to_its_likeliest() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.9, 0.05, 0.03, 0.02]]).log()
    kept = nucleus(logits, 0.8).isfinite()
    assert kept.tolist() == [[True, True, False, False], [True] * 4, [True, False, False, False]]
    assert nucleus(logits, 0.5).isfinite()[1].tolist() == [
        True,
        True,
        False,
        False,
    ]  # of equal ones the first
    assert nucleus(logits, 1.0) is logits
    cut = fuse(logits, logits, [logits.flip(-1)], Settings("static", top_p_base=0.8), (1.0,))
    assert cut.logits.isfinite().tolist() == kept.tolist()


def test_divergences_by_hand() -> None:
    expert, reference = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward, backward = divergences([expert], reference)
    assert forward.item() == pytest.approx(0.25 * LOG(0.5) + 0.75 * LOG(1.5), abs=1e-6)
    assert backward.item() == pytest.approx(0.5 * LOG(2) + 0.5 * LOG(2 / 3), abs=1e-6)


def test_moments_are_divergences_and_their_derivatives() -> None:
    base, reference, experts = case()
    logp = base.double().log_softmax(-1)
    deltas = [shift(one.double(), reference.double()) for one in experts]
    alphas = torch.tensor([[0.3, 1.2]], dtype=torch.float64).expand(len(base), -1).clone().requires_grad_()
    there = moments(logp, centred(logp, deltas), alphas)
    tilted = (logp + alphas[:, :1] * deltas[0] + alphas[:, 1:] * deltas[1]).log_softmax(-1)
    forward = (tilted.exp() * (tilted - logp)).sum(-1)
    backward = (logp.exp() * (logp - tilted)).sum(-1)
    torch.testing.assert_close(there.forward, forward)
    torch.testing.assert_close(there.backward, backward)
    for value, gradient in ((forward, there.d_forward), (backward, there.d_backward)):
        (slope,) = torch.autograd.grad(value.sum(), alphas, retain_graph=True)
        torch.testing.assert_close(gradient, slope)
    alone = Path(logp, centred(logp, deltas)[1]).at(alphas[:, 1].detach())
    only = torch.tensor([[0.0, 1.2]], dtype=torch.float64).expand(len(base), -1)
    both = moments(logp, centred(logp, deltas), only)
    torch.testing.assert_close(alone.forward, both.forward)
    torch.testing.assert_close(alone.d_forward, both.d_forward[:, 1])
    torch.testing.assert_close(alone.d_backward, both.d_backward[:, 1])


# --- the search


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("scale", [0.05, 0.5, 3.0])
def test_three_evaluations_are_as_good_as_two_thousand(experts: int, scale: float) -> None:
    base, reference, others = case(40, 60, seed=3, experts=experts)
    tuned = [reference + scale * (one - reference) for one in others]
    logp, deltas = base.log_softmax(-1), [shift(one, reference) for one in tuned]
    found = match_one(logp, deltas, *wanted(reference, tuned))
    slow = match_grid(logp, deltas, *wanted(reference, tuned), points=2001)
    published = match_grid(logp, deltas, *wanted(reference, tuned))
    assert found.evaluations <= 4
    assert ((found.alphas >= 0) & (found.alphas <= 2)).all()
    assert ((found.alphas > 0).sum(1) <= 1).all()
    assert found.value.mean() <= 1.05 * slow.value.mean() + 1e-6
    assert found.value.mean() <= published.value.mean() + 1e-6
    torch.testing.assert_close(
        objective(logp, deltas, found.alphas, *wanted(reference, tuned)), found.value, atol=2e-4, rtol=1e-3
    )


def test_a_base_that_is_the_reference_is_shifted_by_one() -> None:
    """Then P~(1) is the expert."""
    _, reference, (expert, _) = case()
    for mode in ("one", "joint", "grid"):
        made = fuse(reference, reference, [expert], Settings(mode, points=21), ())
        torch.testing.assert_close(made.alphas, torch.ones(5, 1), atol=2e-3, rtol=0)
        torch.testing.assert_close(made.logits.softmax(-1), expert.softmax(-1), atol=1e-3, rtol=1e-3)


def test_the_joint_form_against_a_slow_search() -> None:
    base, reference, experts = case(12, 50, seed=9)
    logp, deltas = base.double().log_softmax(-1), [shift(one, reference).double() for one in experts]
    forward, backward = (one.double() for one in wanted(reference, experts))
    found = match_joint(logp, deltas, forward, backward, damping=0.5, evaluations=8)
    anchor = torch.cat(
        [
            match_one(logp, [one], forward[:, [at]], backward[:, [at]], evaluations=30).alphas
            for at, one in enumerate(deltas)
        ],
        dim=1,
    )

    def penalised(alphas: Tensor) -> Tensor:
        return objective(logp, deltas, alphas, forward, backward) + 0.5 * ((alphas - anchor) ** 2).sum(1)

    line = torch.linspace(0, 2, 41, dtype=torch.float64)
    least = torch.stack(
        [penalised(torch.stack([one, two]).expand(len(base), -1)) for one in line for two in line]
    ).amin(0)
    assert (penalised(found.alphas) <= least + 2e-3).all()
    assert (objective(logp, deltas, found.alphas, forward, backward) <= found.value + 1e-6).all()
    quick = match_joint(logp, deltas, forward, backward, damping=0.5)
    assert quick.evaluations <= 4
    assert (
        objective(logp, deltas, quick.alphas, forward, backward).mean() < 1.1 * found.value.mean() + 1e-3
    ).all()
    held = match_joint(logp, deltas, forward, backward, damping=1e6, evaluations=8)
    torch.testing.assert_close(held.alphas, anchor, atol=1e-2, rtol=0)


def test_of_one_expert_all_modes_are_one() -> None:
    base, reference, (expert, _) = case()
    one = fuse(base, reference, [expert], Settings("one"), ())
    joint = fuse(base, reference, [expert], Settings("joint"), ())
    assert torch.equal(one.alphas, joint.alphas)
    assert torch.equal(one.logits, joint.logits)


@pytest.mark.parametrize("mode", ["static", "one", "joint", "grid"])
def test_an_expert_that_is_the_reference_changes_no_bit(mode: str) -> None:
    base, reference, (expert, _) = case()
    same = fuse(base, reference, [reference], Settings(mode), (1.0,))
    assert torch.equal(same.logits, base)
    both = fuse(base, reference, [reference, expert], Settings(mode), (1.0, 0.0))
    assert both.logits.isfinite().all()
    assert torch.equal(fused(base, [shift(expert, reference)], torch.zeros(5, 1)), base)


@pytest.mark.parametrize("mode", ["static", "one", "joint", "grid"])
def test_rows_and_order_of_experts_do_not_matter(mode: str) -> None:
    base, reference, experts = case(9, 33, experts=3)
    settings, alphas = Settings(mode), (0.5, 1.0, -0.25)
    whole = fuse(base, reference, experts, settings, alphas)
    for row in range(9):
        alone = fuse(base[[row]], reference[[row]], [one[[row]] for one in experts], settings, alphas)
        assert torch.equal(alone.logits[0], whole.logits[row])
    turned = fuse(base, reference, experts[::-1], settings, alphas[::-1])
    torch.testing.assert_close(turned.alphas.flip(1), whole.alphas, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(turned.logits, whole.logits, atol=1e-4, rtol=1e-4)
    many = fuse_rows(base.repeat(10, 1), reference.repeat(10, 1), [one.repeat(10, 1) for one in experts], None,
                     settings, alphas)  # fmt: skip
    assert torch.equal(many.logits, whole.logits.repeat(10, 1))


@pytest.mark.parametrize("mode", ["static", "one", "joint"])
def test_rows_beyond_what_is_passed_over_at_once(mode: str) -> None:
    base, reference, experts = case(9, 60_000)
    settings = Settings(mode, top_p_base=0.99)
    whole = fuse_rows(base, reference, experts, None, settings, (0.5, 1.0))
    for row in (0, 4, 8):
        some = [one[[row]] for one in experts]
        alone = fuse_rows(base[[row]], reference[[row]], some, None, settings, (0.5, 1.0))
        torch.testing.assert_close(alone.alphas[0], whole.alphas[row], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.logits[0], whole.logits[row], atol=1e-4, rtol=1e-5)


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 4.0), width=st.integers(2, 30))
def test_both_divergences_grow_with_alpha(seed: int, scale: float, width: int) -> None:
    base, reference, (expert, _) = case(2, width, seed)
    logp, delta = base.double().log_softmax(-1), shift(scale * expert.double(), scale * reference.double())
    path = Path(logp, centred(logp, [delta])[0])
    there = [
        path.at(torch.full((2,), alpha, dtype=torch.float64)) for alpha in torch.linspace(0, 2, 9).tolist()
    ]
    for before, after in itertools.pairwise(there):
        assert (after.forward >= before.forward - 1e-9).all()
        assert (after.backward >= before.backward - 1e-9).all()
    assert (there[0].forward.abs() < 1e-9).all()
    assert (there[0].backward.abs() < 1e-9).all()


@given(seed=st.integers(0, 10_000), strength=st.floats(0.0, 30.0), sharp=st.floats(0.1, 30.0))
def test_no_logits_make_a_search_leave_its_bounds(seed: int, strength: float, sharp: float) -> None:
    base, reference, experts = case(3, 12, seed)
    tuned = [reference + strength * (one - reference) for one in experts]
    for mode in ("one", "joint"):
        made = fuse(base * sharp, reference, tuned, Settings(mode), ())
        assert made.logits.isfinite().all()
        assert ((made.alphas >= 0) & (made.alphas <= 2)).all()


# --- other vocabularies


def test_what_is_not_shared_keeps_its_logit() -> None:
    base, reference, (expert, _) = case(4, 6)
    shared = Shared(torch.tensor([0, 2, 5]), (torch.tensor([3, 1, 0]), torch.tensor([1, 0, 2])))
    small, tuned = reference[:, :4], expert[:, :3]
    made = fuse_rows(base, small, [tuned], shared, Settings("static"), (1.0,))
    assert torch.equal(made.logits[:, [1, 3, 4]], base[:, [1, 3, 4]])
    delta = tuned[:, [1, 0, 2]].log_softmax(-1) - small[:, [3, 1, 0]].log_softmax(-1)
    torch.testing.assert_close(made.logits[:, [0, 2, 5]], base[:, [0, 2, 5]] + delta)
    torch.testing.assert_close(made.covered, base.softmax(-1)[:, [0, 2, 5]].sum(-1))


# --- settings


def test_settings_that_are_wrong_are_all_said() -> None:
    with pytest.raises(MixmergeError) as error:
        Settings("two", 9.0, top_p_base=0.0, clip=-1.0, damping=0.0, points=1)  # type: ignore[arg-type]
    assert [str(one).split(":")[0] for one in error.value.faults] == [
        *("alpha", "mode", "top_p_base", "clip", "damping", "points")
    ]
    with pytest.raises(MixmergeError, match=r"alpha\.x: is nan"):
        Settings("static", {"x": math.nan})
    with pytest.raises(MixmergeError, match="Did you mean 'sort'"):
        Settings("static", {"sorf": 1.0}).fixed(["sort"])
    assert Settings("static", {"b": 0.5}).fixed(["a", "b"]) == (0.0, 0.5)
