"""EMR, TALL masks, Consensus and MagMax: by hand, invariants, whole-model sums and thresholds, what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixmerge.errors import MethodError
from mixmerge.methods import METHODS
from mixmerge.methods.memory import merge_state_dicts
from mixmerge.methods.sums import total

State = dict[str, Tensor]
FAMILY = ("pcb", "emr", "tall", "consensus", "magmax")


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def merged(method: str, deltas: Sequence[Tensor | State], **parameters: object) -> State:
    """Merge deltas on a base of zeros; a tensor is a model of one."""
    experts = [delta if isinstance(delta, dict) else {"w": delta} for delta in deltas]
    base = {name: torch.zeros_like(tensor) for name, tensor in experts[0].items()}
    return merge_state_dicts(method, experts, base=base, parameters=parameters)


def close(found: Tensor, *expected: float) -> None:
    torch.testing.assert_close(found, vector(*expected), rtol=1e-6, atol=1e-7)


# --- EMR

EMR = [vector(4, -1, 2, -3, 1), vector(-2, 5, 1, -6, -1)]  # sums: 2, 4, 3, -9, 0
# Unified: 4, 5, 2, -6, and where the sum is 0 the negative one: -1.


@pytest.mark.parametrize(
    ("task", "kept", "factor"),
    [(0, [4, 0, 2, -6, 0], 11 / 12), (1, [0, 5, 2, -6, -1], 15 / 14)],
)
def test_emr_by_hand(task: int, kept: list[float], factor: float) -> None:
    close(merged("emr", EMR, task=task)["w"], *(factor * value for value in kept))
    close(merged("emr", EMR, task=task, **{"lambda": 0.5})["w"], *(0.5 * factor * value for value in kept))


def test_emr_rescalers_are_of_the_whole_model() -> None:
    first = {"w": vector(4, 2), "v": torch.tensor(1.0), "e": torch.empty(0)}
    second = {"w": vector(6, -2.5), "v": torch.tensor(-4.0), "e": torch.empty(0)}
    # First: unified w = 6, -2.5 and v = -4, of which it keeps the 6. Sums 7 / 6; means (3 + 1) / (3 + 0).
    close(merged("emr", [first, second], task=0)["w"], 7, 0)
    close(merged("emr", [first, second], task=0, rescaler="means")["w"], 8, 0)
    assert merged("emr", [first, second], task=0)["v"].item() == 0
    # Second: keeps all, 12.5 / 12.5, and so by means.
    for rescaler in ("sums", "means"):
        close(merged("emr", [first, second], task=1, rescaler=rescaler)["w"], 6, -2.5)


def test_emr_of_an_expert_that_keeps_nothing_is_the_base() -> None:
    zeros, delta = torch.zeros(3), vector(1, -2, 3)
    close(merged("emr", [zeros, delta], task=0)["w"], 0, 0, 0)
    close(merged("emr", [zeros, zeros], task=1)["w"], 0, 0, 0)
    close(merged("emr", [-0.5 * delta, delta], task=0)["w"], 0, 0, 0)


def test_emr_of_the_smallest_numbers() -> None:
    """A product of two of them is 0; their signs are not."""
    tiny = vector(1e-45, -1e-45, 1e-30)
    assert torch.equal(merged("emr", [tiny, tiny], task=0)["w"], tiny)


# --- TALL masks and Consensus

TALL = [vector(4, 1, 0, -2), vector(1, 1, 3, 3), vector(0, 1, -3, 3)]  # sums: 5, 3, 0, 4
# |delta| against |sum - delta|: first 4/1, 1/2, 0/0, 2/6; second 1/4, 1/2, 3/3, 3/1; third 0/5, 1/2, 3/3, 3/1.


@pytest.mark.parametrize(
    ("task", "mask_lambda", "kept"),
    [
        (0, 0.6, [5, 0, 0, 0]),
        (0, 0.4, [5, 3, 0, 0]),
        (0, 0.3, [5, 3, 0, 4]),
        (1, 0.6, [0, 0, 0, 4]),
        (1, 0.5, [0, 0, 0, 4]),
        (2, 0.0, [0, 3, 0, 4]),
    ],
)
def test_tall_by_hand(task: int, mask_lambda: float, kept: list[float]) -> None:
    close(merged("tall", TALL, task=task, mask_lambda=mask_lambda)["w"], *kept)


@pytest.mark.parametrize(
    ("least", "kept"), [(0, [5, 3, 0, 4]), (1, [5, 0, 0, 4]), (2, [0, 0, 0, 4]), (3, [0] * 4)]
)
def test_consensus_by_hand(least: int, kept: list[float]) -> None:
    found = merged("consensus", TALL, least=least, **{"lambda": 0.5})["w"]
    close(found, *(0.5 * value for value in kept))
    close(merged("consensus", TALL, least=least)["w"], *(0.3 * value for value in kept))


def test_every_expert_has_its_own_mask_lambda() -> None:
    experts = [{"w": delta} for delta in TALL]
    own = [{"mask_lambda": 0.4}, {"mask_lambda": 0.4}, {}]
    found = merge_state_dicts("consensus", experts, base={"w": torch.zeros(4)}, expert_parameters=own)
    close(found["w"], 0, 0.9, 0, 1.2)


def trimmed_sum(deltas: Sequence[Tensor], density: float) -> Tensor:
    """TIES with sums over whole deltas, by a sort of each."""
    size = deltas[0].numel()
    rank = max(size - int(density * size), 1)
    kept = torch.stack([torch.where(x.abs() >= x.abs().sort().values[rank - 1], x, 0.0) for x in deltas])
    sign = kept.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    return torch.where(torch.where(sign > 0, kept > 0, kept < 0), kept, 0.0).sum(0)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.integers(2, 12), st.sampled_from([0.1, 0.3, 0.5, 1.0]))
def test_ties_is_of_whole_deltas(data: st.DataObject, size: int, density: float) -> None:
    numbers = st.lists(st.integers(-3, 3).map(float), min_size=size, max_size=size)
    deltas = [vector(*data.draw(numbers)) for _ in range(3)]
    cut = data.draw(st.integers(0, size))
    parts = [{"b": delta[:cut].clone(), "a": delta[cut:].clone()} for delta in deltas]
    given = {"multi": "ties", "density": density}
    together = trimmed_sum(deltas, density)
    found = merged("consensus", parts, least=0, **given, **{"lambda": 1.0})
    assert torch.equal(torch.cat([found["b"], found["a"]]), together)
    found = merged("tall", parts, task=1, **given)
    mask = deltas[1].abs() > 0.6 * (together - deltas[1]).abs()
    assert torch.equal(torch.cat([found["b"], found["a"]]), together * mask)


# --- MagMax


def test_magmax_by_hand() -> None:
    deltas = [vector(1, -4, 2, 0), vector(-3, 3, -2, 0)]
    close(merged("magmax", deltas, **{"lambda": 1.0})["w"], -3, -4, -2, 0)  # among equals the later one
    close(merged("magmax", deltas)["w"], -1.5, -2, -1, 0)
    own = [{"weight": 0.1}, {"weight": 2.0}]  # who is taken does not depend on them
    experts = [{"w": delta} for delta in deltas]
    found = merge_state_dicts("magmax", experts, base={"w": torch.zeros(4)}, expert_parameters=own)
    close(found["w"], -3, -0.2, -2, 0)


def test_magmax_of_each_order_is_the_same_but_for_equals() -> None:
    deltas = list(torch.randn(4, 60, generator=torch.Generator().manual_seed(2)))
    turned = merged("magmax", [deltas[2], deltas[0], deltas[3], deltas[1]])["w"]
    assert torch.equal(merged("magmax", deltas)["w"], turned)


def test_gradients_reach_what_was_taken() -> None:
    deltas = [vector(1, -4).requires_grad_(), vector(-3, 3).requires_grad_()]
    weight = torch.tensor(0.5, requires_grad=True)
    merged("magmax", deltas, **{"lambda": weight})["w"].sum().backward()
    assert [delta.grad.tolist() for delta in deltas if delta.grad is not None] == [[0, 0.5], [0.5, 0]]
    assert weight.grad is not None
    assert weight.grad.item() == -7


# --- all of them


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("emr", {}),
        ("emr", {"rescaler": "means"}),
        ("tall", {}),
        ("tall", {"multi": "ties"}),
        ("consensus", {}),
        ("consensus", {"multi": "ties"}),
    ],
    ids=str,
)
def test_order_of_experts_is_irrelevant(method: str, parameters: dict[str, object]) -> None:
    deltas = list(torch.randn(3, 90, generator=torch.Generator().manual_seed(6)))
    places = [2, 0, 1]
    for task in range(3) if METHODS[method].parameter("task") else (None,):
        one = parameters if task is None else parameters | {"task": task}
        other = parameters if task is None else parameters | {"task": places.index(task)}
        turned = merged(method, [deltas[at] for at in places], **other)["w"]
        torch.testing.assert_close(turned, merged(method, deltas, **one)["w"], rtol=1e-5, atol=1e-6)


def required(method: str) -> dict[str, object]:
    return {"task": 0} if METHODS[method].parameter("task") else {}


@pytest.mark.parametrize("method", ["emr", "tall", "magmax"])
@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=20), st.integers(-4, 4))
def test_one_expert_is_that_expert(method: str, values: list[float], origin: int) -> None:
    base = torch.full((len(values),), float(origin), dtype=torch.float64)
    expert = base + torch.tensor(values, dtype=torch.float64)
    parameters = required(method) | {"lambda": 1.0}
    found = merge_state_dicts(method, [{"w": expert}], base={"w": base}, parameters=parameters)
    assert torch.equal(found["w"], expert)


@pytest.mark.parametrize("method", FAMILY)
@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (3, 2, 4), (0,), (3, 0)], ids=str)
def test_any_shape(method: str, shape: tuple[int, ...]) -> None:
    deltas = [torch.full(shape, 0.5), torch.full(shape, 0.25)]
    found = merged(method, deltas, **required(method))["w"]
    assert found.shape == shape
    assert torch.isfinite(found).all()
    nothing = merged(method, [torch.zeros(shape)] * 2, **required(method))["w"]
    assert torch.equal(nothing, torch.zeros(shape))


@pytest.mark.parametrize("method", FAMILY)
def test_a_model_without_floats_is_copied(method: str) -> None:
    state = {"steps": torch.tensor([3, 4])}
    assert torch.equal(
        merge_state_dicts(method, [state] * 2, base=state, parameters=required(method))["steps"],
        state["steps"],
    )


def test_a_sum_does_not_depend_on_threads() -> None:
    values = torch.randn(70_001, generator=torch.Generator().manual_seed(0)).abs()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = total(values)
        torch.set_num_threads(4)
        assert total(values) == alone
    finally:
        torch.set_num_threads(before)
    assert alone == pytest.approx(values.double().sum().item(), rel=1e-12)
    assert total(torch.empty(0, 3)) == 0


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("emr", {}, "parameters: emr needs 'task'"),
        ("emr", {"task": 2}, "parameters.task: is 2, and experts have positions 0 to 1"),
        ("tall", {"task": 0.5}, "parameters.task: is 0.5, and experts have positions 0 to 1"),
        ("tall", {"task": -1}, "parameters.task: is -1. 0 to inf"),
        ("emr", {"task": 0, "rescaler": "mean"}, "parameters.rescaler: is 'mean'. sums or means"),
        ("consensus", {"multi": "tie"}, "parameters.multi: is 'tie'. sum or ties"),
        ("consensus", {"least": -1}, "parameters.least: is -1. 0 to inf"),
    ],
)
def test_what_is_refused(method: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(MethodError) as error:
        merged(method, EMR, **parameters)
    assert message in str(error.value)


def test_definitions_without_their_sketch() -> None:
    from mixmerge.methods.emr import emr
    from mixmerge.methods.tall import tall

    with pytest.raises(MethodError, match="emr needs the sums of the whole model"):
        emr(EMR, base=torch.zeros(5), task=0)
    with pytest.raises(MethodError, match="multi: ties needs the thresholds of whole deltas"):
        tall(TALL, base=torch.zeros(4), task=0, multi="ties")
    with pytest.raises(MethodError, match="task: is 3, and experts have positions 0 to 2"):
        tall(TALL, base=torch.zeros(4), task=3)


def test_consensus_is_of_two_experts_or_more() -> None:
    with pytest.raises(MethodError, match="consensus got 1"):
        merged("consensus", EMR[:1])
