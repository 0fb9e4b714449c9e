"""Closed forms from statistics, against numbers worked out by hand; their invariants and their bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixmerge.errors import MethodError
from mixmerge.methods.average import linear
from mixmerge.methods.statistics import activation_ties, fisher, regmean
from mixmerge.methods.task_vectors import ties

SHAPES = [(), (1,), (5,), (4, 3), (2, 3, 4), (0,)]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grams(count: int, width: int, tokens: int) -> list[Tensor]:
    rows = [noise(tokens, width, seed=10 + at).double() for at in range(count)]
    return [x.T @ x / tokens for x in rows]


def test_fisher_by_hand() -> None:
    experts = [torch.tensor([1.0, 5.0]), torch.tensor([3.0, 7.0])]
    found = {"fisher": [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])], "norm": [torch.tensor(2.0)] * 2}
    # (3 * 1 + 1 * 3) / 4; where nothing is known, the floors are equal
    assert fisher(experts, statistics=found).tolist() == pytest.approx([1.5, 6.0], abs=1e-4)
    # norms 6 and 2 make both count alike: (0.5 * 1 + 0.5 * 3)
    found["norm"] = [torch.tensor(6.0), torch.tensor(2.0)]
    assert fisher(experts, statistics=found)[0].item() == pytest.approx(2.0, abs=1e-4)
    # three times the weight against it: (1.5 * 1 + 0.5 * 3) / 2
    assert fisher(experts, weight=[3, 1], statistics=found)[0].item() == pytest.approx(1.5, abs=1e-4)
    assert fisher(experts, statistics=found, normalize_fisher=False)[0].item() == pytest.approx(1.5, abs=1e-4)
    # a floor far above: only the norms are left, (1 / 6 + 3 / 2) / (2 / 3)
    assert fisher(experts, statistics=found, floor=1e9)[0].item() == pytest.approx(2.5, abs=1e-4)
    # a share of each norm: the plain average
    even = fisher(experts, statistics=found, floor=1e9, relative_floor=True)
    assert even[0].item() == pytest.approx(2.0, abs=1e-4)


def test_regmean_by_hand() -> None:
    """Two inputs that each expert sees in another strength, and one they see together."""
    experts = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 6.0]])]
    diagonal = {"gram": [torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([3.0, 1.0]))]}
    merged = regmean(experts, alpha=1, ridge=0, role="linear", statistics=diagonal)
    assert merged.tolist() == [pytest.approx([(1 + 9) / 4, (6 + 6) / 4])]
    # A = [[2, 1], [1, 2]] and B = [[2, 0], [0, 2]]: (A + B) w = A (1, 2) + B (3, 6) = (4, 5) + (6, 12)
    found = {"gram": [torch.tensor([[2.0, 1.0], [1.0, 2.0]]), 2 * torch.eye(2)]}
    solved = regmean(experts, alpha=1, ridge=0, role="linear", statistics=found)
    assert solved.tolist() == [pytest.approx([(40 - 17) / 15, (68 - 10) / 15], rel=1e-6)]
    turned = [expert.T.contiguous() for expert in experts]
    assert torch.allclose(regmean(turned, alpha=1, ridge=0, role="transposed", statistics=found), solved.T)
    # alpha 0 leaves the diagonals: equal here, so the average
    flat = regmean(experts, alpha=0, ridge=0, role="linear", statistics=found)
    assert flat.tolist() == [pytest.approx([2.0, 4.0])]


def test_regmean_against_least_squares() -> None:
    """The definition in words: outputs on all inputs at once, solved by another routine."""
    inputs = [noise(40, 6, seed=at).double() for at in range(3)]
    experts = [noise(4, 6, seed=20 + at).double() for at in range(3)]
    found = {"gram": [x.T @ x for x in inputs]}
    merged = regmean(experts, alpha=1, ridge=0, role="linear", statistics=found)
    outputs = torch.cat([x @ w.T for x, w in zip(inputs, experts, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(inputs), outputs).solution.T
    assert merged.dtype == torch.float64
    assert torch.allclose(merged, expected, atol=1e-10)


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_equal_grams_average(alpha: float) -> None:
    experts = [noise(4, 6, seed=at) for at in range(3)]
    same = grams(1, 6, 40) * 3
    merged = regmean(experts, alpha=alpha, role="linear", statistics={"gram": same})
    assert torch.allclose(merged, linear(experts, weight=[1, 1, 1]), atol=1e-5)


def test_one_hot_support_picks_the_expert() -> None:
    experts = [noise(4, 3, seed=at) for at in range(3)]
    hot = [torch.diag(torch.eye(3)[at]) for at in range(3)]
    merged = regmean(experts, ridge=0, role="linear", statistics={"gram": hot})
    for column, expert in enumerate(experts):
        assert torch.allclose(merged[:, column], expert[:, column], atol=1e-6)


def test_fewer_tokens_than_inputs() -> None:
    experts, few = [noise(4, 6, seed=at) for at in range(2)], grams(2, 6, 2)
    with pytest.raises(MethodError, match=r"sum of the Gram matrices \(6 inputs\) is singular"):
        regmean(experts, alpha=1, ridge=0, role="linear", statistics={"gram": few})
    for alpha, ridge in ((0.9, 0.0), (1.0, 1e-6)):
        merged = regmean(experts, alpha=alpha, ridge=ridge, role="linear", statistics={"gram": few})
        assert merged.isfinite().all()
        assert merged.abs().max() < 50
    dead = [gram.clone() for gram in grams(2, 6, 40)]
    for gram in dead:
        gram[2], gram[:, 2] = 0, 0
    merged = regmean(experts, role="linear", statistics={"gram": dead})
    assert torch.allclose(merged[:, 2], sum(experts)[:, 2] / 2, atol=0.3)  # the ridge's: near the average


@pytest.mark.parametrize("method", [fisher, regmean], ids=lambda function: function.__name__)
def test_without_statistics_the_average(method: object) -> None:
    experts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])]
    for found in (None, {}, {"fisher": [None, experts[0]], "gram": [None, torch.eye(2)]}):
        assert method(experts, statistics=found).tolist() == [2, 4]  # type: ignore[operator]
        assert method(experts, weight=[3, 1], statistics=found).tolist() == [1.5, 3]  # type: ignore[operator]
    with pytest.raises(MethodError, match="Numbers from 0, one of them above"):
        method(experts, weight=[0, 0])  # type: ignore[operator]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape(shape: tuple[int, ...]) -> None:
    experts = [noise(*shape, seed=at) for at in range(2)]
    found = {"fisher": [expert.square() for expert in experts], "norm": [torch.ones(())] * 2}
    merged = fisher(experts, statistics=found)
    assert merged.shape == torch.Size(shape)
    assert torch.allclose(
        fisher(experts[:1] * 2, statistics={**found, "fisher": found["fisher"][:1] * 2}), experts[0]
    )
    assert regmean(experts).shape == torch.Size(shape)
    assert activation_ties(experts, base=torch.zeros(shape)).shape == torch.Size(shape)


def test_experts_that_know_nothing() -> None:
    experts = [torch.ones(2), torch.zeros(2)]
    nothing = {"fisher": [torch.zeros(2)] * 2, "norm": [torch.zeros(())] * 2}
    with pytest.raises(MethodError, match="expert 0 has a Fisher of zero everywhere"):
        fisher(experts, statistics=nothing)
    assert fisher(experts, statistics=nothing, normalize_fisher=False).tolist() == [0.5, 0.5]
    with pytest.raises(MethodError, match="floor is 0"):
        fisher(experts, statistics=nothing, normalize_fisher=False, floor=0)


def test_activation_ties_by_hand() -> None:
    """Scores sqrt(9) * 1, 1 * 2, 1 * 2.5: the first and the last column are kept."""
    delta = torch.tensor([[1.0, 2.0, 2.5], [1.0, -2.0, -2.5]])
    found = {"second_moment": [torch.tensor([9.0, 1.0, 1.0])]}
    merged = activation_ties([delta], base=torch.zeros(2, 3), density=[0.67], role="linear", statistics=found)
    assert merged.tolist() == [[1, 0, 2.5], [1, 0, -2.5]]
    turned = activation_ties(
        [delta.T.contiguous()], base=torch.zeros(3, 2), density=[0.67], role="transposed", statistics=found
    )
    assert torch.equal(turned, merged.T)
    summed = activation_ties(
        [delta, -2 * delta], base=torch.ones(2, 3), elect=False, normalize=False, weight=[1, 0.5], role="linear",
        statistics={"second_moment": found["second_moment"] * 2},
    )  # fmt: skip
    assert summed.tolist() == torch.ones(2, 3).tolist()


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_equal_moments_are_plain_ties(density: float) -> None:
    deltas, base = [noise(4, 6, seed=at) for at in range(3)], noise(4, 6, seed=9)
    options = {"base": base, "weight": [1.0, 0.5, 2.0], "density": [density] * 3}
    flat = {"second_moment": [torch.full((6,), 4.0)] * 3}
    plain = ties(deltas, **options)  # type: ignore[arg-type]
    assert torch.equal(activation_ties(deltas, role="linear", statistics=flat, **options), plain)  # type: ignore[arg-type]
    assert torch.equal(activation_ties(deltas, role="other", statistics=None, **options), plain)  # type: ignore[arg-type]


def test_regmean_is_not_solved_by_rounding() -> None:
    """Twenty tokens for 24 inputs: one factorisation in forty came to an end, with noise as its result."""
    for seed in range(40):
        found = grams_of(seed)
        with pytest.raises(MethodError, match="is singular"):
            regmean(
                [noise(5, 24), noise(5, 24, seed=1)], alpha=1.0, ridge=0.0, role="linear", statistics=found
            )
        regmean([noise(5, 24), noise(5, 24, seed=1)], alpha=1.0, role="linear", statistics=found)


def grams_of(seed: int) -> dict[str, list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(10, 24, generator=generator).double() for _ in range(2)]
    return {"gram": [x.T @ x / 10 for x in rows]}
