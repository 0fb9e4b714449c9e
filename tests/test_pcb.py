"""PCB-Merging: its published forms against their formulas on one flat vector, by hand, and where they give 0/0."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mixmerge.errors import MethodError
from mixmerge.methods.memory import merge_state_dicts
from mixmerge.methods.pcb import pcb

State = dict[str, Tensor]
SHAPES = {"matrix": (40, 50), "vector": (30,), "number": (), "empty": (0, 3), "cube": (2, 3, 4)}


def states(count: int, *, seed: int = 0) -> tuple[State, list[State]]:
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> State:
        return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    base = noise(1.0)
    return base, [{name: base[name] + x for name, x in noise(0.01).items()} for _ in range(count)]


def flat(state: State) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in state.values()])


def merged(base: State, experts: Sequence[State], **parameters: object) -> Tensor:
    return flat(merge_state_dicts("pcb", list(experts), base=base, parameters=parameters)) - flat(base)


def scaled(rows: Tensor) -> Tensor:
    low, high = rows.min(dim=1, keepdim=True).values, rows.max(dim=1, keepdim=True).values
    return (rows - low) / (high - low)


def clamped(rows: Tensor, low: float, high: float) -> Tensor:
    ordered, size = rows.sort(dim=1).values, rows.shape[1]
    return rows.clamp(ordered[:, int(size * low)][:, None], ordered[:, int(size * (1 - high) - 1)][:, None])


def as_published(deltas: Tensor, inter: str, clamp: float, density: float, weight: float) -> Tensor:
    """The same on a matrix of experts times entries, sorted as a whole, in float64."""
    count, size = deltas.shape
    rows = deltas.double()
    if inter == "softmax":
        between = [[scaled((one * other)[None])[0].softmax(0) for other in rows] for one in rows]
        score = (count * scaled(rows * rows)).softmax(1) * torch.stack([sum(each) for each in between])
        score = score * (score >= score.sort(dim=1).values[:, int(size * (1 - density))][:, None])
        divisor = score.sum(0)
        return (weight * rows * score).sum(0) / torch.where(divisor > 0, divisor, 1.0)
    magnitudes = clamped(rows.abs(), clamp, clamp)
    intra, signed = (count * scaled(magnitudes) ** 2).exp(), rows.sign() * scaled(magnitudes)
    agreed = {
        "prod": (rows * rows.sum(0)).tanh(),
        "norm": (rows * signed.sum(0)).tanh(),
        "pairwise": torch.stack([(one * signed).tanh().sum(0) for one in signed]),
    }[inter]
    score = scaled(clamped(intra * agreed, 1 - density, 0))
    return (rows.sign() * magnitudes * weight * score).sum(0) / score.sum(0).clamp(min=1e-12)


@pytest.mark.parametrize("inter", ["prod", "norm", "pairwise", "softmax"])
@pytest.mark.parametrize(("clamp", "density"), [(0.01, 0.05), (1e-4, 0.2), (0.0, 1.0)])
def test_the_published_forms(inter: str, clamp: float, density: float) -> None:
    base, experts = states(4)
    deltas = torch.stack([flat(expert) - flat(base) for expert in experts])
    found = merged(base, experts, inter=inter, clamp=clamp, density=density, weight=0.9)
    expected = as_published(deltas, inter, clamp, density, 0.9)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-6)
    assert not torch.allclose(found.double(), deltas.double().mean(0), atol=1e-3)


def test_the_forms_differ_and_so_do_their_parameters() -> None:
    base, experts = states(3)
    found = [merged(base, experts, inter=inter) for inter in ("prod", "norm", "pairwise", "softmax")]
    found += [merged(base, experts, **given) for given in ({"clamp": 0.1}, {"density": 0.2}, {"weight": 1.0})]
    assert all(not torch.equal(one, other) for at, one in enumerate(found) for other in found[:at])


def test_by_hand() -> None:
    """Ten entries, no clamping, a density of 0.3: the third highest score of each expert is its cut, and counts 0."""
    base = {"w": torch.zeros(10)}
    first = {"w": torch.tensor([10.0, 8, 1, 1, 1, 1, 1, 1, 1, 0])}
    second = {"w": torch.tensor([-10.0, 0, 0, 0, 0, 0, 0, 5, 4, 0])}
    found = merged(base, [first, second], inter="prod", clamp=0, density=0.3, weight=1.0)
    # Entry 0 is opposed: tanh(10 * 0) = 0. First: entry 1 has exp(2 * 0.64) = 3.597, the cut is the third highest,
    # exp(2 * 0.01) = 1.02 * tanh(1). Second: entries 7 and 8 have exp(2 * 0.25) and exp(2 * 0.16), the cut is 0.
    a7, a8 = (
        torch.tanh(torch.tensor(6.0)).item() * 1.0202013,
        torch.tanh(torch.tensor(5.0)).item() * 1.0202013,
    )
    cut = torch.tanh(torch.tensor(5.0)).item() * 1.0202013
    s1 = (a7 - cut) / (3.5966397 - cut)
    b7 = 1.0
    assert a8 == cut
    assert found[0] == 0
    assert found[1].item() == pytest.approx(8.0)
    assert found[2:7].tolist() == [0.0] * 5
    assert found[7].item() == pytest.approx((s1 * 1 + b7 * 5) / (s1 + b7), rel=1e-5)
    assert found[8].item() == pytest.approx(4.0)


@pytest.mark.parametrize("inter", ["prod", "norm", "pairwise", "softmax"])
class TestEdges:
    def test_experts_that_are_the_base(self, inter: str) -> None:
        base, (expert,) = states(1)
        assert merged(base, [base, base], inter=inter).abs().max() == 0
        alone, beside = merged(base, [expert], inter=inter), merged(base, [base, expert], inter=inter)
        assert torch.isfinite(beside).all()
        assert beside.abs().max() > 0.01
        assert torch.equal(beside.sign().abs() * alone.sign(), beside.sign())
        assert (
            float((beside - alone).abs().max()) < 1e-6 or inter != "softmax"
        )  # exp(T) moves the others' scores

    def test_order_of_experts_is_irrelevant(self, inter: str) -> None:
        base, experts = states(3)
        found = merged(base, experts, inter=inter, density=0.2)
        turned = merged(base, [experts[at] for at in (2, 0, 1)], inter=inter, density=0.2)
        torch.testing.assert_close(turned, found, rtol=1e-4, atol=1e-6)

    def test_equal_experts_are_one(self, inter: str) -> None:
        base, (expert,) = states(1)
        found = merged(base, [expert, expert, expert], inter=inter, weight=1.0, clamp=0.0)
        delta = flat(expert) - flat(base)
        kept = found != 0
        assert kept.any()
        torch.testing.assert_close(found[kept], delta[kept], rtol=1e-4, atol=1e-6)

    def test_deltas_of_one_magnitude(self, inter: str) -> None:
        base = {"w": torch.zeros(4, 5), "v": torch.zeros(3)}
        expert = {"w": torch.full((4, 5), -0.5), "v": torch.full((3,), 0.5)}
        found = merged(base, [expert, expert], inter=inter, weight=1.0)
        torch.testing.assert_close(found, flat(expert))

    def test_nothing_and_one_number(self, inter: str) -> None:
        assert merged({"e": torch.empty(0, 2)}, [{"e": torch.empty(0, 2)}], inter=inter).numel() == 0
        one = merged({"e": torch.tensor(1.0)}, [{"e": torch.tensor(3.0)}], inter=inter, weight=1.0)
        assert one.tolist() == [2.0]

    def test_density_of_nothing_is_the_base(self, inter: str) -> None:
        base, experts = states(2)
        assert merged(base, experts, inter=inter, density=0.0).abs().max() == 0

    def test_double_precision(self, inter: str) -> None:
        base, experts = states(3)
        wide = [{name: tensor.double() for name, tensor in state.items()} for state in (base, *experts)]
        found = merged(wide[0], wide[1:], inter=inter)
        assert found.dtype == torch.float64
        deltas = torch.stack([flat(expert) - flat(wide[0]) for expert in wide[1:]])
        torch.testing.assert_close(found, as_published(deltas, inter, 0.01, 0.05, 1.2), rtol=1e-4, atol=1e-6)


def test_what_it_refuses() -> None:
    base, experts = states(2)
    for given, message in (
        ({"inter": "product"}, "parameters.inter: is 'product'. norm or prod or pairwise or softmax"),
        ({"clamp": 0.6}, "parameters.clamp: is 0.6. 0 to 0.5"),
        ({"density": 1.5}, "parameters.density: is 1.5. 0 to 1"),
    ):
        with pytest.raises(MethodError) as error:
            merged(base, experts, **given)
        assert message in str(error.value)
    with pytest.raises(MethodError, match="pcb needs figures of whole deltas"):
        pcb([torch.ones(2)], base=torch.ones(2), weight=[1.0], density=[0.5])
