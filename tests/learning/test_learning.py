"""The learner: gradients by inner products against autograd and finite differences, and everything that can fail."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mixmerge.calibrate.coefficients import CoefficientSpace
from mixmerge.calibrate.deltas import MemoryDeltas
from mixmerge.calibrate.learning import Learned, Learning, learn
from mixmerge.calibrate.mixed import Mixed
from mixmerge.errors import MethodError
from mixmerge.methods.coefficients import bounds

State = dict[str, Tensor]


def small_model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 4))


def states(model: nn.Module, experts: int, scale: float = 0.3) -> tuple[State, list[State]]:
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(5)
    return base, [
        {name: value + scale * torch.randn(value.shape, generator=generator) for name, value in base.items()}
        for _ in range(experts)
    ]


TOKENS = torch.tensor([[1, 2, 3], [4, 4, 10]])


class Squares:
    """Mean square of the outputs less a target; may be told to give something else at a step."""

    def __init__(self, model: nn.Module, *, target: float = 1.0, at: dict[int, float] | None = None) -> None:
        self.model, self.target, self.at = model, target, at or {}

    def losses(self, step: int) -> Iterator[Tensor]:
        for half in TOKENS:
            yield (self.model(half[None]) - self.target).square().mean() * self.at.get(step, 1.0)

    def notes(self) -> tuple[str, ...]:
        return ()


def loss_of(model: nn.Module, base: State, experts: list[State], weights: dict[str, Tensor]) -> Tensor:
    """The objective through a merge that autograd sees."""
    merged = {}
    for name, value in base.items():
        flat = value.reshape(-1)
        mixed = []
        for row, (start, stop) in zip(weights[name], bounds(flat.numel(), len(weights[name])), strict=True):
            deltas = (
                torch.stack([state[name].reshape(-1)[start:stop] for state in experts]) - flat[start:stop]
            )
            mixed.append(flat[start:stop] + row.float() @ deltas)
        merged[name] = torch.cat(mixed).reshape(value.shape)
    return sum(
        ((functional_call(model, merged, (half[None],)) - 1.0).square().mean() for half in TOKENS),
        torch.zeros(()),
    )


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(("granularity", "chunks"), [("expert", 1), ("tensor", 1), ("chunk", 3)])
def test_inner_products_are_the_gradient_of_the_merge(granularity: str, chunks: int, used: bool) -> None:
    model = small_model()
    base, experts = states(model, 3)
    space = CoefficientSpace(granularity=granularity, chunks=chunks, start=(0.2, 0.3, 0.5))  # type: ignore[arg-type]
    layout = space.layout({name: tuple(value.shape) for name, value in base.items()}, 3)
    free = torch.tensor(layout.start, dtype=torch.float64, requires_grad=True)
    wanted = loss_of(model, base, experts, {name: free[list(rows)] for name, rows in layout.rows.items()})
    wanted.backward()
    table = {"0.weight": TOKENS.unique()} if used else {}
    mixed = Mixed(dict(model.named_parameters()), MemoryDeltas(base, experts), layout, table)
    mixed.build(free.detach(), everything=True)
    total = 0.0
    with mixed.watched():
        for loss in Squares(model).losses(0):
            total += float(loss.detach())
            loss.backward()
        assert all(parameter.grad is None for parameter in model.parameters())
    assert free.grad is not None
    assert total == pytest.approx(float(wanted), rel=1e-6)
    assert (mixed.gradient - free.grad).abs().max() <= 1e-5 * free.grad.abs().max()
    step = 1e-2  # float32 losses: a central difference of this width is good to about 1e-3
    row = len(layout.start) - 1
    sides = []
    for sign in (1, -1):
        moved = free.detach().clone()
        moved[row, 1] += sign * step
        mixed.build(moved, everything=True)
        sides.append(sum(float(loss.detach()) for loss in Squares(model).losses(0)))
    assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(
        float(mixed.gradient[row, 1]), rel=2e-2, abs=1e-4
    )


def test_only_used_rows_of_a_table_follow_the_coefficients() -> None:
    model = small_model()
    base, experts = states(model, 2)
    space = CoefficientSpace()
    layout = space.layout({name: tuple(value.shape) for name, value in base.items()}, 2)
    mixed = Mixed(
        dict(model.named_parameters()),
        MemoryDeltas(base, experts),
        layout,
        {"0.weight": torch.tensor([2, 4])},
    )
    mixed.build(torch.full((len(layout.start), 2), 0.5), everything=True)
    before = model.get_parameter("0.weight").detach().clone()
    mixed.build(torch.full((len(layout.start), 2), 0.1))
    changed = (model.get_parameter("0.weight") != before).any(1).nonzero().flatten().tolist()
    assert changed == [2, 4]


def learned(
    objective_options: dict[str, object] | None = None,
    *,
    space: CoefficientSpace | None = None,
    **options: object,
) -> tuple[Learned, Squares]:
    model = small_model()
    base, experts = states(model, 2)
    objective = Squares(model, **(objective_options or {}))  # type: ignore[arg-type]
    result = learn(
        dict(model.named_parameters()),
        MemoryDeltas(base, experts),
        objective,
        space or CoefficientSpace(),
        learning=Learning(**{"steps": 40, "learning_rate": 0.05, **options}),  # type: ignore[arg-type]
    )
    return result, objective


def test_the_loss_falls_and_the_same_seed_gives_the_same_bytes() -> None:
    one, _ = learned()
    two, _ = learned()
    assert one == two
    assert one.losses[-1] < 0.8 * one.losses[0]
    assert (one.steps, one.kept, one.skipped, one.stopped, one.warnings) == (40, 40, 0, "", ())
    assert all(0 <= value <= 1 for rows in one.weights.values() for row in rows for value in row)


def test_parameters_get_back_what_they_had() -> None:
    model = small_model()
    model.get_parameter("1.bias").requires_grad_(False)
    base, experts = states(model, 2)
    space = CoefficientSpace(frozen=("3.*",))
    result = learn(
        dict(model.named_parameters()),
        MemoryDeltas(base, experts),
        Squares(model),
        space,
        learning=Learning(steps=2),
    )
    assert [name for name, value in model.named_parameters() if not value.requires_grad] == ["1.bias"]
    assert all(value.grad is None for value in model.parameters())
    assert result.weights["3.weight"] == ((0.3, 0.3),)
    assert result.weights["1.weight"] != ((0.3, 0.3),)
    # the model is left with what the coefficients say, frozen tensors too
    for name, value in model.named_parameters():
        rows = result.weights[name]
        wanted = base[name] + sum(
            w * (state[name] - base[name]) for w, state in zip(rows[0], experts, strict=True)
        )
        assert torch.allclose(value, wanted, atol=1e-6)


def test_a_dead_coefficient_stays_dead_and_a_projected_one_comes_back() -> None:
    def path(clamp: str) -> float:
        """Where the coefficient of a*x ends when the target is below 0 at first, and then 1."""
        layer = nn.Linear(1, 1, bias=False)
        layer.weight.data.fill_(0.0)

        class Turns:
            def losses(self, step: int) -> Iterator[Tensor]:
                yield (layer(torch.ones(1, 1)) - (-1.0 if step < 5 else 1.0)).square().sum()

            def notes(self) -> tuple[str, ...]:
                return ()

        deltas = MemoryDeltas({"weight": torch.zeros(1, 1)}, [{"weight": torch.ones(1, 1)}])
        result = learn(
            {"weight": layer.weight},
            deltas,
            Turns(),
            CoefficientSpace(start=0.05, clamp=clamp),  # type: ignore[arg-type]
            learning=Learning(steps=60, learning_rate=0.05, patience=100),
        )
        return result.weights["weight"][0][0]

    assert path("dead") == 0.0
    assert path("project") > 0.3


def test_sigmoid_and_regulariser() -> None:
    free, _ = learned(space=CoefficientSpace(transform="sigmoid", start=0.1))
    held, _ = learned(
        space=CoefficientSpace(transform="sigmoid", start=0.1), regulariser=1e4, learning_rate=1e-3
    )

    def distance(result: Learned, start: float) -> float:
        return max(abs(v - start) for rows in result.weights.values() for row in rows for v in row)

    assert distance(free, 0.1) > 0.1 > 0.01 > distance(held, 0.1)


def test_cosine_restarts_and_clipping() -> None:
    rates = [
        Learning(schedule="cosine", learning_rate=0.5, period=50).rate(step) for step in (0, 25, 49, 50, 100)
    ]
    assert rates == pytest.approx([0.5, 0.25, 0.25 * (1 + math.cos(math.pi * 0.98)), 0.5, 0.5])
    one, _ = learned(schedule="cosine", period=10, clip=1.0, optimiser="adamw", weight_decay=1e-5)
    assert one.losses[-1] < one.losses[0]


def test_steps_that_are_not_finite_are_skipped_and_counted() -> None:
    result, _ = learned({"at": {3: math.nan, 4: math.inf}})
    assert (result.skipped, result.steps, result.stopped) == (2, 40, "")
    assert len(result.losses) == 38
    assert result.warnings == ("2 steps were skipped: their loss or gradient was not finite",)
    stopped, _ = learned({"at": dict.fromkeys(range(10, 40), math.nan)})
    assert stopped.stopped == "5 steps in a row were not finite"
    assert stopped.kept <= 10
    with pytest.raises(MethodError, match="no step had a finite loss and gradient"):
        learned({"at": dict.fromkeys(range(40), math.nan)})


def test_coefficients_after_a_last_step_that_was_not_finite_are_not_kept() -> None:
    """Fewer such steps than make it stop: nothing is known of the coefficients they had."""
    result, _ = learned({"at": dict.fromkeys(range(37, 40), math.nan)})
    assert not result.stopped
    assert result.kept == 36
    assert "the last steps were not finite; the best coefficients are kept" in result.warnings


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    class Rooted(Squares):
        def losses(self, step: int) -> Iterator[Tensor]:
            for loss in super().losses(step):
                yield torch.sqrt(loss * 0) if step == 2 else loss  # 0, with an infinite slope

    model = small_model()
    base, experts = states(model, 2)
    result = learn(
        dict(model.named_parameters()),
        MemoryDeltas(base, experts),
        Rooted(model),
        CoefficientSpace(),
        learning=Learning(steps=6),
    )
    assert result.skipped == 1


def test_a_diverging_loss_stops_and_the_best_is_kept() -> None:
    growing = {step: 3.0 ** (step - 10) for step in range(11, 40)}
    result, _ = learned({"at": growing})
    assert result.stopped.startswith("the loss rose to twice its start")
    assert result.steps < 40
    assert result.kept <= 13
    assert "the best coefficients are kept" in result.warnings[0]
    unbounded, _ = learned(space=CoefficientSpace(clamp="none"), learning_rate=50.0)
    assert unbounded.kept == 0
    assert {value for rows in unbounded.weights.values() for row in rows for value in row} == {0.3}


class Uneven:
    """Distance of a weight to a target, of batches of which each adds what it is hard by; ``slope`` may mislead."""

    def __init__(self, weight: nn.Parameter, hard: list[float], slope: float = 1.0) -> None:
        self.weight, self.hard, self.slope = weight, hard, slope

    def losses(self, step: int) -> Iterator[Tensor]:
        gap = (self.weight - 0.8).square().sum()
        seen = (1 - self.slope) * gap.detach() + self.slope * gap
        yield self.hard[step % len(self.hard)] + seen

    def notes(self) -> tuple[str, ...]:
        return ()


def uneven(hard: list[float], *, steps: int = 12, slope: float = 1.0) -> Learned:
    weight = nn.Parameter(torch.zeros(1))
    deltas = MemoryDeltas({"weight": torch.zeros(1)}, [{"weight": torch.ones(1)}])
    learning = Learning(steps=steps, learning_rate=0.01, turn=len(hard))
    space = CoefficientSpace(start=0.3, clamp="none")
    return learn({"weight": weight}, deltas, Uneven(weight, hard, slope), space, learning=learning)


def test_how_hard_the_first_batch_is_decides_nothing() -> None:
    """Losses of other rows are not compared: neither does an easy first batch undo what was learned, nor stop it."""
    plain = uneven([1.0, 1.0, 1.0])
    easy = uneven([1.0, 1.3, 1.3])
    assert easy.losses[-1] > easy.losses[0]
    assert (easy.kept, easy.warnings) == (12, ())
    assert easy.weights["weight"][0] == pytest.approx(plain.weights["weight"][0], abs=1e-6)
    near_nothing = uneven([-0.24, 1.3, 1.3], steps=30)
    assert (near_nothing.kept, near_nothing.stopped, near_nothing.warnings) == (30, "", ())
    # it rises, and the hard first batch hides that
    risen = uneven([5.0, 1.0, 1.0], slope=-1.0)
    assert risen.losses[-1] < risen.losses[0]
    assert risen.kept == 0
    assert risen.weights["weight"] == ((0.3,),)
    assert risen.warnings == ("the loss did not fall; the best coefficients are kept",)


def test_experts_that_cannot_be_told_apart() -> None:
    model = small_model()
    base, experts = states(model, 1)
    options = {"objective": Squares(model), "space": CoefficientSpace(), "learning": Learning(steps=1)}
    with pytest.raises(MethodError) as caught:
        learn(
            dict(model.named_parameters()),
            MemoryDeltas(base, [experts[0], base, experts[0]]),
            labels=("a", "b", "c"),
            **options,  # type: ignore[arg-type]
        )
    assert [str(fault) for fault in caught.value.faults] == [
        "b: equals the base in every tensor that is learned, so it has no coefficients to learn. Leave it out.",
        "c: equals a in every tensor that is learned. List it once.",
    ]
    broken = {name: value * math.nan for name, value in base.items()}
    with pytest.raises(MethodError, match="expert 2: holds values that are not finite"):
        learn(dict(model.named_parameters()), MemoryDeltas(base, [experts[0], broken]), **options)  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"no parameter for 1 merged tensors: 4\.bias"):
        learn(
            {name: value for name, value in model.named_parameters() if name != "4.bias"},
            MemoryDeltas(base, experts),
            **options,  # type: ignore[arg-type]
        )


def test_progress_is_told() -> None:
    model = small_model()
    base, experts = states(model, 2)
    seen: list[tuple[int, int, float]] = []
    result = learn(
        dict(model.named_parameters()),
        MemoryDeltas(base, experts),
        Squares(model),
        CoefficientSpace(),
        learning=Learning(steps=3),
        progress=lambda *now: seen.append(now),
    )
    assert seen == [(step + 1, 3, loss) for step, loss in enumerate(result.losses)]
