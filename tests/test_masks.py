"""Which entries survive: exact counts under ties, DELLA's chances, the counter-based draws, rescaling."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixmerge.kernels.philox import Draw, blocks, draws
from mixmerge.methods import sparsify as sp

DRAW = Draw(seed=7, tensor="layer.weight")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


# Small whole numbers: equal magnitudes are common.
whole = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=24).map(lambda values: vector(*values))


@given(delta=whole, density=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_magnitude_keeps_exactly_k_first_index_first(delta: Tensor, density: float) -> None:
    mask = sp.magnitude(delta, density)
    k = max(1, int(density * len(delta))) if density > 0 else 0
    order = sorted(range(len(delta)), key=lambda i: (-abs(float(delta[i])), i))
    assert sorted(mask.nonzero().flatten().tolist()) == sorted(order[:k])


@given(delta=whole, density=st.floats(0, 1), gamma=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_band_keeps_its_ranks(delta: Tensor, density: float, gamma: float) -> None:
    n = len(delta)
    k = max(1, int(density * n)) if density > 0 else 0
    bottom = max(0, n - k - int(gamma * n))
    ascending = sorted(range(n), key=lambda i: (abs(float(delta[i])), -i))
    kept = sp.band(delta, density, gamma).nonzero().flatten().tolist()
    assert sorted(kept) == sorted(ascending[bottom : bottom + k])


@given(first=whole, second=whole, density=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_model_cuts_equal_one_flat_delta(first: Tensor, second: Tensor, density: float) -> None:
    cuts = sp.model_cuts({"b": second, "a": first}, density)
    masks = torch.cat((sp.above(first, cuts["a"]), sp.above(second, cuts["b"])))
    assert torch.equal(masks, sp.magnitude(torch.cat((first, second)), density))


@given(delta=whole, density=st.floats(0, 1), epsilon=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_della_chances_are_chances_around_density(delta: Tensor, density: float, epsilon: float) -> None:
    chances = sp.ranked(delta, density, epsilon)
    assert float(chances.min()) >= 0
    assert float(chances.max()) <= 1 + 1e-12
    assert math.isclose(float(chances.mean()), density, abs_tol=1e-9)
    by_size = sorted(range(len(delta)), key=lambda i: (abs(float(delta[i])), -i))
    assert chances[by_size].diff().ge(0).all()


@given(delta=whole, density=st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_della_without_epsilon_is_dare(delta: Tensor, density: float) -> None:
    dare = sp.sampled(delta, density, draw=DRAW, expert=1)
    assert torch.equal(sp.sampled_by_rank(delta, density, 0.0, draw=DRAW, expert=1), dare)


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.5, 0.15), (0.5, 0.5), (0.9, 0.3), (0.05, 0.15), (0.4, 0.0)]
)
def test_della_keeps_each_rank_as_often_as_its_chance(density: float, epsilon: float) -> None:
    """And independently of the other entries: five entries, two of them tied, in 40,000 rows."""
    delta = vector(3, -1, 2, 2, 0.5).expand(40_000, 5)
    kept = sp.sampled_by_rank(delta, density, epsilon, draw=DRAW, expert=0).double()
    chance = sp.ranked(delta[:1], density, epsilon)[0]
    error = 5 * (chance * (1 - chance) / len(delta)).sqrt() + 1e-12  # five standard errors
    assert ((kept.mean(0) - chance).abs() <= error).all()
    both = kept.T @ kept / len(delta)  # (5, 5)
    expected = torch.outer(chance, chance).where(~torch.eye(5, dtype=torch.bool), torch.diag(chance))
    assert ((both - expected).abs() <= 5 * (expected * (1 - expected) / len(delta)).sqrt() + 1e-12).all()


def test_a_draw_between_the_chances_picks_a_rival() -> None:
    """By hand: density 0.5, epsilon 0.25, four entries; a draw of 1/4 to 3/4 picks one of the other three."""
    row = vector(2, -2, 1, 3)
    uniform = draws(DRAW, expert=0, start=0, stop=4).double() / 2**32
    expected = []
    for i, (draw, mine) in enumerate(zip(uniform.tolist(), row.abs().tolist(), strict=True)):
        others = [j for j in range(4) if j != i]
        rival = others[int(min(max(draw - 0.25, 0.0) * 2, 0.999) * 3)]
        after = (row[rival].abs(), -rival) < (mine, -i)
        expected.append(draw < 0.25 or (draw < 0.75 and after))
    assert sp.sampled_by_rank(row, 0.5, 0.25, draw=DRAW, expert=0).tolist() == expected


def test_rows_of_one_entry_are_kept_with_chance_density() -> None:
    assert sp.ranked(torch.ones(3, 1), 0.4, 0.15).tolist() == [[0.4]] * 3
    assert sp.ranked(torch.tensor(2.0), 0.4, 0.15).item() == 0.4


@pytest.mark.parametrize(
    ("density", "epsilon", "low", "high"),
    [
        (0.9, 0.15, 0.8, 1.0),
        (0.1, 0.15, 0.0, 0.2),
        (0.5, 0.5, 0.0, 1.0),
        (1.0, 0.15, 1.0, 1.0),
        (0.0, 1.0, 0.0, 0.0),
    ],
)
def test_a_wide_epsilon_shrinks(density: float, epsilon: float, low: float, high: float) -> None:
    chances = sp.ranked(vector(3, 1, 2), density, epsilon).tolist()
    assert chances == pytest.approx([high, low, (low + high) / 2])


def test_nothing_is_rescaled_when_nothing_is_left() -> None:
    delta = vector(1, 2)
    none = torch.zeros(2, dtype=torch.bool)
    for by in ("l1", "inverse_p"):
        assert torch.equal(sp.survivors(delta, none, rescale_by=by, p=0.0), torch.zeros(2))
    tiny = vector(1e-9, 1e-9)
    assert torch.equal(sp.survivors(tiny, tiny > 0, rescale_by="l1"), tiny)


@pytest.mark.parametrize("by", ["l1", "inverse_p"])
def test_a_mask_is_a_constant_but_its_factor_is_not(by: str) -> None:
    delta = torch.linspace(-1, 2, 8, dtype=torch.float64).requires_grad_()
    mask = torch.arange(8) % 2 == 0
    assert torch.autograd.gradcheck(lambda x: sp.survivors(x, mask, rescale_by=by, p=0.5), (delta,))


# --- the draws; Random123 publishes known answers (kat_vectors, philox4x32 10)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    words = [int(word, 16) for word in counter.split()]
    first, second = (int(word, 16) for word in key.split())
    result = blocks(torch.tensor(words)[:, None], (first, second))
    assert [f"{word:08x}" for word in result.flatten().tolist()] == expected.split()


@given(start=st.integers(0, 40), length=st.integers(0, 40), expert=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_draws_depend_on_nothing_but_their_place(start: int, length: int, expert: int) -> None:
    whole = draws(DRAW, expert=expert, start=0, stop=80)
    assert torch.equal(
        draws(DRAW, expert=expert, start=start, stop=start + length), whole[start : start + length]
    )
