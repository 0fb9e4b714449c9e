"""The plain definitions: numbers worked out by hand, the papers' invariants, boundary cases, gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixmerge.errors import MethodError
from mixmerge.kernels.philox import Draw, draws
from mixmerge.methods import METHODS, Method
from mixmerge.methods import sparsify as sp
from mixmerge.methods import task_vectors as tv
from mixmerge.methods.average import linear, passthrough, slerp
from mixmerge.methods.memory import apply

DRAW = Draw(seed=7, tensor="layer.weight")
# These work entry by entry; each other family has a file of tests of its own.
PLAIN_METHODS = [row for row in METHODS.values() if row.kernel and not row.needs_data]
DELTA_METHODS = [row for row in PLAIN_METHODS if row.takes == "deltas"]
DETERMINISTIC = [row for row in DELTA_METHODS if not row.stochastic]
STOCHASTIC = [row for row in DELTA_METHODS if row.stochastic]
BOUNDARY_SHAPES = [(), (1,), (5,), (4, 1), (1, 4), (3, 2, 4), (0,), (0, 3), (3, 0)]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def close(actual: Tensor, *expected: float) -> None:
    torch.testing.assert_close(actual, vector(*expected).reshape(actual.shape), rtol=1e-6, atol=1e-6)


def options(row: Method, count: int, **given: object) -> dict[str, object]:
    """Recipe parameters for ``count`` experts: one number per expert where the row wants that."""
    values: dict[str, object] = {
        "weight": 1.0,
        "density": 1.0,
        "gamma": 0.0,
        "epsilon": 0.1,
        "t": 0.5,
    } | given
    return {
        p.name: values[p.name] if p.per == "merge" else [values[p.name]] * count
        for p in row.parameters
        if p.name in values
    }


def run(row: Method, deltas: list[Tensor], base: Tensor, **given: object) -> Tensor:
    return apply(row, deltas, base=base, parameters=options(row, len(deltas), **given), draw=DRAW)


# --- by hand


def test_linear_by_hand() -> None:
    experts = [vector(1, 2), vector(3, 6)]
    close(linear(experts, weight=[1, 3]), 2.5, 5)
    close(linear(experts, weight=[1, 3], normalize=False), 10, 20)
    close(linear(experts, weight=[2, -1]), -1, -2)


def test_linear_refuses_a_zero_sum() -> None:
    experts = [vector(1, 2), vector(3, 6)]
    with pytest.raises(MethodError, match="sum to 0"):
        linear(experts, weight=[1, -1])
    close(linear(experts, weight=[1, -1], normalize=False), -2, -4)


@pytest.mark.parametrize(
    ("base", "expert", "t", "expected"),
    [
        ([1, 0], [0, 1], 1 / 3, [0.8660254, 0.5]),  # sin 60, sin 30
        ([2, 0], [0, 4], 0.5, [1.4142136, 2.8284271]),  # lengths are kept, only the angle is normalised
        ([1, 1], [3, 3], 0.25, [1.5, 1.5]),  # same direction: straight
        ([1, 0], [-1, 0], 0.25, [0.5, 0]),  # opposite: straight too
        ([0, 0], [0, 4], 0.5, [0, 2.8284271]),  # no direction: taken as orthogonal
        ([5], [-3], 0.5, [1]),
    ],
)
def test_slerp_by_hand(base: list[float], expert: list[float], t: float, expected: list[float]) -> None:
    close(slerp([vector(*expert)], base=vector(*base), t=t), *expected)


def test_slerp_ends_are_exact() -> None:
    base, expert = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp([expert], base=base, t=0.0), base)
    assert torch.equal(slerp([expert], base=base, t=1.0), expert)


def test_passthrough_copies_or_scales() -> None:
    expert = vector(1, -2)
    copy = passthrough([expert], scale=[None])
    assert torch.equal(copy, expert)
    assert copy.data_ptr() != expert.data_ptr()
    close(passthrough([expert], scale=[-0.5]), -0.5, 1)


def test_task_arithmetic_by_hand() -> None:
    deltas, base = [vector(1, -2, 0), vector(3, 2, -1)], vector(1, 1, 1)
    close(tv.task_arithmetic(deltas, base=base, weight=[0.5, 0.25], lambda_=2), 3.5, 0, 0.5)
    normalized = tv.task_arithmetic(deltas, base=base, weight=[0.5, 0.25], normalize=True, lambda_=0.75)
    close(normalized, 2.25, 0.5, 0.75)
    undivided = tv.task_arithmetic(deltas, base=base, weight=[1, -1], normalize=True)
    close(undivided, -1, -3, 2)


TIES_DELTAS = [vector(4, -1, 2, -3), vector(-2, 5, 1, -6)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [4, 5, 1.5, -4.5]),
        ({"density": [0.5, 0.5]}, [4, 5, 0, -4.5]),
        ({"density": [0.5, 0.5], "agg": "sum"}, [4, 5, 0, -9]),
        ({"density": [0.5, 0.5], "normalize": False}, [4, 5, 0, -9]),
        ({"normalize": False, "agg": "mean"}, [4, 5, 1.5, -4.5]),
        ({"weight": [1, 3]}, [-2, 5, 1.25, -5.25]),  # weights sway the election
        ({"density": [0.5, 0.0], "rescale": True}, [40 / 7, 0, 0, -30 / 7]),  # L1 10, of which 7 is kept
        ({"density": [0.5, 0.5], "lambda_": 0.5}, [2, 2.5, 0, -2.25]),
    ],
)
def test_ties_by_hand(given: dict[str, object], expected: list[float]) -> None:
    merged = tv.ties(TIES_DELTAS, base=vector(1, 1, 1, 1), **({"weight": [1, 1]} | given))
    close(merged - 1, *expected)


def test_an_undecided_election_is_positive() -> None:
    close(tv.ties([vector(1), vector(-1)], base=vector(0), weight=[1, 1]), 1)


def test_ties_over_the_whole_delta() -> None:
    deltas = {"b": vector(2, 2, 5), "a": vector(3, 1, -2)}
    cuts = sp.model_cuts(deltas, 0.5)  # three of 3 1 2 | 2 2 5: of the three 2s the first one stays
    assert cuts == {"a": (2.0, 3), "b": (2.0, 0)}
    for name, expected in {"a": [3, 0, -2], "b": [0, 0, 5]}.items():
        merged = tv.ties([deltas[name]], base=torch.zeros(3), weight=[1], scope="model", cuts=[cuts[name]])
        close(merged, *expected)
    with pytest.raises(MethodError, match="pass cuts"):
        tv.ties([deltas["a"]], base=torch.zeros(3), weight=[1], scope="model")


def test_breadcrumbs_by_hand() -> None:
    delta, base = vector(10, -9, 8, -7, 6, -5, 4, -3, 2, -1), torch.zeros(10)
    merged = tv.breadcrumbs([delta], base=base, weight=[1], density=[0.5], gamma=[0.2])
    close(merged, 0, 0, 8, -7, 6, -5, 4, 0, 0, 0)
    rescaled = tv.breadcrumbs([delta], base=base, weight=[2], density=[0.2], gamma=[0.0], rescale=True)
    close(rescaled, 20 * 55 / 19, -18 * 55 / 19, 0, 0, 0, 0, 0, 0, 0, 0)
    crowded = tv.breadcrumbs([delta], base=base, weight=[1], density=[0.9], gamma=[0.5])
    close(crowded, 0, -9, 8, -7, 6, -5, 4, -3, 2, -1)


def test_breadcrumbs_ties_by_hand() -> None:
    deltas = [vector(9, -1, 4, 2), vector(8, 3, -5, 1)]
    given = {"base": torch.zeros(4), "weight": [1, 1], "density": [0.5, 0.5], "gamma": [0.25, 0.25]}
    close(tv.breadcrumbs_ties(deltas, **given), 0, 3, -5, 2)  # gamma drops 9 and 8; 4 and -5 sum to -1
    close(tv.breadcrumbs(deltas, **given), 0, 3, -1, 2)


def test_dare_by_hand() -> None:
    delta, base = vector(*range(1, 9)), torch.zeros(8)
    kept = draws(DRAW, expert=0, start=0, stop=8) < 2**30  # a quarter of 2**32
    assert 0 < int(kept.sum()) < 8
    survivors = delta * kept
    given = {"base": base, "weight": [0.5], "density": [0.25], "draw": DRAW}
    close(tv.dare_linear([delta], **given, rescale=False), *(survivors * 0.5).tolist())
    close(tv.dare_linear([delta], **given, rescale_by="inverse_p"), *(survivors * 2).tolist())
    close(tv.dare_linear([delta], **given), *(survivors * 0.5 * 36 / float(survivors.sum())).tolist())
    with pytest.raises(MethodError, match="inverse_p, l1"):
        tv.dare_linear([delta], **given, rescale_by="l2")


def test_della_by_hand() -> None:
    row = vector(3, -1, 2, 2)
    chances = sp.ranked(torch.stack((row, row.flip(0))), 0.5, 0.3)
    expected = torch.tensor([[0.8, 0.2, 0.6, 0.4], [0.6, 0.4, 0.2, 0.8]], dtype=torch.float64)
    torch.testing.assert_close(chances, expected)
    kept = sp.sampled_by_rank(row, 0.5, 0.3, draw=DRAW, expert=0)
    assert 0 < int(kept.sum()) < 4
    merged = tv.della([row], base=torch.zeros(4), weight=[1], density=[0.5], epsilon=[0.3], draw=DRAW)
    alone = row * kept
    close(merged, *(alone * 8 / float(alone.abs().sum())).tolist())
    exact = tv.della_linear(
        [row],
        base=torch.zeros(4),
        weight=[1],
        density=[0.5],
        epsilon=[0.3],
        draw=DRAW,
        rescale_by="inverse_p",
    )
    close(exact, *(alone / expected[0]).tolist())


@pytest.mark.parametrize("rescale_by", ["l1", "inverse_p"])
@pytest.mark.parametrize(("della", "dare"), [("della", "dare_ties"), ("della_linear", "dare_linear")])
def test_della_without_epsilon_is_dare(della: str, dare: str, rescale_by: str) -> None:
    """Every rank has the same chance then: the same draws keep the same entries, to the bit."""
    generator = torch.Generator().manual_seed(4)
    deltas = [torch.randn(7, 33, generator=generator) for _ in range(3)]
    given = {
        "base": torch.randn(7, 33, generator=generator),
        "weight": [0.5, 0.9, 0.3],
        "density": [0.3, 0.5, 0.9],
        "draw": DRAW,
        "rescale_by": rescale_by,
        "normalize": True,
    }
    expected = getattr(tv, dare)(deltas, **given)
    assert torch.equal(getattr(tv, della)(deltas, epsilon=[0.0] * 3, **given), expected)
    assert not torch.equal(getattr(tv, della)(deltas, epsilon=[0.2] * 3, **given), expected)


# --- invariants

# Small whole numbers: their sums are exact, and equal magnitudes are common.
whole = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=24).map(lambda values: vector(*values))


@pytest.mark.parametrize("row", DELTA_METHODS, ids=lambda row: row.name)
@given(expert=whole, origin=st.integers(-4, 4))
@settings(max_examples=15, deadline=None)
def test_one_expert_kept_whole_is_that_expert(row: Method, expert: Tensor, origin: int) -> None:
    base = torch.full_like(expert, origin)
    assert torch.equal(run(row, [expert - base], base), expert)


@pytest.mark.parametrize("row", DETERMINISTIC, ids=lambda row: row.name)
@given(data=st.data(), n=st.integers(1, 12))
@settings(max_examples=20, deadline=None)
def test_order_of_experts_is_irrelevant(row: Method, data: st.DataObject, n: int) -> None:
    numbers = st.lists(st.integers(-4, 4).map(float), min_size=n, max_size=n)
    deltas = [vector(*data.draw(numbers)) for _ in range(3)]
    base = torch.zeros(n)
    merged = run(row, deltas, base, density=0.5, gamma=0.2)
    assert torch.equal(run(row, [deltas[2], deltas[0], deltas[1]], base, density=0.5, gamma=0.2), merged)


@given(expert=whole, weights=st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_the_average_of_equals_is_their_value(expert: Tensor, weights: list[float]) -> None:
    torch.testing.assert_close(linear([expert] * len(weights), weight=weights), expert)


@pytest.mark.parametrize("row", STOCHASTIC, ids=lambda row: row.name)
def test_inverse_p_is_unbiased_over_seeds(row: Method) -> None:
    delta, seeds = torch.linspace(-1, 1, 8).repeat(250), 40
    total = torch.zeros_like(delta)
    for seed in range(seeds):
        total += apply(
            row,
            [delta],
            base=torch.zeros_like(delta),
            parameters=options(row, 1, density=0.4, epsilon=0.2, rescale_by="inverse_p", normalize=False),
            draw=Draw(seed, "w"),
        )
    mean = (
        (total / seeds).reshape(250, 8).mean(dim=0)
    )  # 10,000 draws an entry: 0.02 is four deviations or more
    torch.testing.assert_close(mean, torch.linspace(-1, 1, 8), atol=0.06, rtol=0)


@pytest.mark.parametrize("row", STOCHASTIC, ids=lambda row: row.name)
def test_masks_are_a_function_of_seed_tensor_and_expert(row: Method) -> None:
    delta = torch.linspace(-1, 1, 100)
    draw = {"seed": 3, "tensor": "w"}
    parameters = options(row, 2, density=0.5, weight=1.0, normalize=False)

    def merged(deltas: list[Tensor], **changed: object) -> Tensor:
        return apply(row, deltas, base=torch.zeros(100), parameters=parameters, draw=Draw(**(draw | changed)))

    nothing = torch.zeros(100)
    first = merged([delta, nothing])
    assert torch.equal(first, merged([delta, nothing]))
    for other in (
        merged([nothing, delta]),
        merged([delta, nothing], seed=4),
        merged([delta, nothing], tensor="v"),
    ):
        assert not torch.equal(first, other)


# --- boundary cases, each of which fails or surprises somewhere else


@pytest.mark.parametrize("shape", BOUNDARY_SHAPES, ids=str)
@pytest.mark.parametrize("row", DELTA_METHODS, ids=lambda row: row.name)
def test_any_shape_and_any_density(row: Method, shape: tuple[int, ...]) -> None:
    base = torch.ones(shape)
    deltas = [torch.full(shape, 0.5), torch.full(shape, 0.25)]
    for density in (0.0, 1e-9, 0.5, 1 - 1e-9, 1.0):
        for epsilon in (0.0, 0.15, 0.5, 1.0):
            merged = run(row, deltas, base, density=density, gamma=0.01, epsilon=epsilon)
            assert merged.shape == base.shape
            assert merged.dtype == torch.float32
            assert torch.isfinite(merged).all()
            if density == 0 and row.parameter("density"):
                assert torch.equal(merged, base)
            if density == 1:
                mean = row.parameter("normalize").default
                torch.testing.assert_close(merged, base + (0.375 if mean else 0.75))


@pytest.mark.parametrize("row", DELTA_METHODS, ids=lambda row: row.name)
def test_experts_without_a_delta_change_nothing(row: Method) -> None:
    base, zeros, delta = torch.linspace(-1, 1, 30), torch.zeros(30), torch.linspace(1, 2, 30)
    assert torch.equal(run(row, [zeros, zeros], base, density=0.5), base)
    normalized = row.parameter("normalize").default
    if row.name.endswith("ties") or row.name == "della":  # no dilution: a zero never takes part
        beside = run(row, [delta, zeros], base, density=1.0)
        torch.testing.assert_close(beside, base + delta)
        assert normalized == (row.name in ("ties", "della", "activation_ties"))


@pytest.mark.parametrize("row", DELTA_METHODS, ids=lambda row: row.name)
@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0]], ids=str)
def test_weights_that_sum_to_zero_stay_finite(row: Method, weights: list[float]) -> None:
    deltas = [torch.linspace(1, 2, 30), torch.linspace(-2, 3, 30)]
    parameters = options(row, 2, density=0.5, normalize=True) | {"weight": weights}
    merged = apply(row, deltas, base=torch.ones(30), parameters=parameters, draw=DRAW)
    assert merged.abs().max() < 20
    if not any(weights):
        assert torch.equal(merged, torch.ones(30))


@pytest.mark.parametrize("gamma", [0.0, 0.01])
def test_breadcrumbs_of_a_tensor_too_small_for_gamma(gamma: float) -> None:
    close(
        tv.breadcrumbs([vector(3, 1, 2, 4)], base=torch.zeros(4), weight=[1], density=[0.5], gamma=[gamma]),
        *(3, 0, 0, 4),
    )


# --- gradients


@pytest.mark.parametrize("row", PLAIN_METHODS, ids=lambda row: row.name)
def test_gradients_reach_tensors_and_numbers(row: Method) -> None:
    generator = torch.Generator().manual_seed(1)
    count = min(2, row.inputs[1])
    shape = (2, 5)
    tensors = [torch.randn(shape, generator=generator).double().requires_grad_() for _ in range(count)]
    base = torch.randn(shape, generator=generator).double().requires_grad_()
    names = [name for name in ("weight", "scale", "lambda", "t") if row.parameter(name)]
    per_merge = [name for name in names if row.parameter(name).per == "merge"]
    numbers = {
        name: [torch.tensor(0.3 + i, dtype=torch.float64, requires_grad=True) for i in range(size)]
        for name, size in ((name, 1 if name in per_merge else count) for name in names)
    }
    fixed = options(row, count, density=0.6, gamma=0.2, epsilon=0.2) | (
        {"normalize": True} if row.parameter("normalize") else {}
    )

    def merge(*values: Tensor) -> Tensor:
        rest = list(values[count + 1 :])
        given: dict[str, object] = {}
        for name, own in numbers.items():
            taken = [rest.pop(0) for _ in own]
            given[name] = taken[0] if name in per_merge else taken
        return apply(row, values[:count], base=values[count], parameters=fixed | given, draw=DRAW)

    flat = [value for own in numbers.values() for value in own]
    assert torch.autograd.gradcheck(merge, (*tensors, base, *flat))
