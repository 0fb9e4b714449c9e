"""DOGE-TA: beside the published program written down plainly, its mask over the whole model, its projection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixmerge
from mixmerge.errors import MethodError
from mixmerge.methods.doge import LargestEntries, Thresholds, doge_ta
from mixmerge.methods.memory import merge_state_dicts
from mixmerge.methods.sketch import Group, add

State = dict[str, Tensor]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def published(
    deltas: list[Tensor], limits: list[float], *, steps: int, lr: float, eta: float = 0.07
) -> Tensor:
    """By autograd, with a projection matrix; the mask is given."""
    k, count = min(deltas[0].shape), len(deltas)
    scales = [eta / delta.norm() for delta in deltas]
    left = torch.cat([torch.linalg.svd(delta, full_matrices=False).U[:, : k // count] for delta in deltas], 1)
    basis = torch.linalg.svd(left, full_matrices=False).U[:, : k // 6]
    d = torch.nn.Parameter(torch.zeros_like(deltas[0]))
    optimizer = torch.optim.Adam([d], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        merged = sum(scale * (delta + d) for scale, delta in zip(scales, deltas, strict=True))
        loss = sum((delta * (delta - merged)).sum(1).square().sum() for delta in deltas)
        loss.backward()
        d.grad -= basis @ (basis.T @ d.grad)
        optimizer.step()
    parts = zip(scales, deltas, limits, strict=True)
    return sum(scale * (delta + d.detach()) * (delta.abs() >= limit) for scale, delta, limit in parts)


@pytest.mark.parametrize("shape", [(13, 18), (18, 13)], ids=str)
@pytest.mark.parametrize(("steps", "lr"), [(400, 1e-4), (30, 1e-2)])
def test_the_published_program(shape: tuple[int, int], steps: int, lr: float) -> None:
    deltas = [draw(*shape, seed=seed, dtype=torch.float64) for seed in range(2)]
    sizes = [delta.abs().flatten().sort().values for delta in deltas]
    limits = [float(size[-int(0.3 * size.numel())]) for size in sizes]
    given = Thresholds((), tuple(limits))
    base = torch.zeros(shape, dtype=torch.float64)
    merged = doge_ta(deltas, base=base, steps=steps, lr=lr, sketch=given)
    torch.testing.assert_close(merged, published(deltas, limits, steps=steps, lr=lr), rtol=1e-6, atol=1e-9)
    alone = doge_ta([delta.float() for delta in deltas], base=base.float(), steps=steps, lr=lr)
    torch.testing.assert_close(alone, merged.float(), rtol=1e-3, atol=1e-5)


def test_by_hand() -> None:
    """Without steps: 0.07 / 5 of delta (3, 0, 4, 0), of whose four entries one is kept, and none of a zero expert."""
    delta = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    merged = doge_ta(
        [delta, torch.zeros(2, 2)], base=torch.ones(2, 2), density=[0.25, 0.25], steps=0, lambda_=100
    )
    torch.testing.assert_close(merged, torch.tensor([[1.0, 1.0], [6.6, 1.0]]))
    more = doge_ta([delta], base=torch.ones(2, 2), density=[0.9], weight=[2.0], steps=0, lambda_=100)
    torch.testing.assert_close(
        more, torch.tensor([[9.4, 1.0], [12.2, 1.0]])
    )  # zeros are never among the largest


def test_parts_of_experts_are_what_is_added_up() -> None:
    deltas, base = [draw(12, 9, seed=seed) for seed in range(3)], draw(12, 9, seed=9)
    options = {"steps": 20, "lr": 1e-2, "eta": 0.5}
    parts = [doge_ta(deltas, base=base, part=at, **options) - base for at in range(3)]
    scales = [0.5 / float(delta.norm()) for delta in deltas]
    whole = base + sum(scale * each for scale, each in zip(scales, parts, strict=True))
    torch.testing.assert_close(doge_ta(deltas, base=base, **options), whole, rtol=1e-5, atol=1e-6)
    correction = [(part - delta)[part != 0] for part, delta in zip(parts, deltas, strict=True)]
    assert all(1e-4 < each.abs().mean() < 1 for each in correction), "D is added where an entry is kept"
    with pytest.raises(MethodError, match="part"):
        doge_ta(deltas, base=base, part=3)


@pytest.mark.parametrize(("steps", "lr"), [(400, 1e-4), (30, 1e-2)])
def test_a_correction_for_each_expert_would_be_the_one_of_all(steps: int, lr: float) -> None:
    """The released DOGE-AM has D_i: their gradients are multiples of one another, which Adam does not see."""
    deltas = [draw(14, 19, seed=seed, dtype=torch.float64) for seed in range(3)]
    scales = [0.07 / delta.norm() for delta in deltas]
    left = torch.cat([torch.linalg.svd(delta, full_matrices=False).U[:, : 14 // 3] for delta in deltas], 1)
    basis = torch.linalg.svd(left, full_matrices=False).U[:, : 14 // 3]
    own = [torch.nn.Parameter(torch.zeros_like(delta)) for delta in deltas]
    optimizer = torch.optim.Adam(own, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        merged = sum(scale * (delta + d) for scale, delta, d in zip(scales, deltas, own, strict=True))
        loss = sum((delta * (delta - merged)).sum(1).square().sum() for delta in deltas)
        loss.backward()
        for d in own:
            assert d.grad is not None
            d.grad -= basis @ (basis.T @ d.grad)
        optimizer.step()
    given: Any = {"steps": steps, "lr": lr, "subspace": 3, "density": [1.0] * 3}
    for at, (delta, d) in enumerate(zip(deltas, own, strict=True)):
        found = doge_ta(deltas, base=torch.zeros_like(delta), part=at, **given)
        away, size = (found - delta - d.detach()).abs(), float(d.detach().abs().max())
        assert size > 0.01
        # Adam's epsilon, which is absolute, tells them apart where a gradient is next to nothing.
        assert float(away.max()) < 0.02 * size
        assert float(away.quantile(0.95)) < 1e-3 * size


def test_doge_am_is_adamerging_of_the_parts(tmp_path: Path, zoo: Path) -> None:
    """Coefficients learned on the parts of two experts, and what they make of the base."""
    experts = [str(zoo / "experts" / name) for name in ("sort", "keep")]
    recipe = {"merge_method": "doge_ta", "base_model": str(zoo / "base"), "dtype": "float32"}
    recipe["models"] = [{"model": expert} for expert in experts]
    for at in range(2):
        mixmerge.merge({**recipe, "parameters": {"part": at, "steps": 3}}, tmp_path / f"part{at}")
    rows = [
        (zoo / "questions" / f"{name}.choices.jsonl").read_text().splitlines()[:4]
        for name in ("sort", "keep")
    ]
    for at, lines in enumerate(rows):
        (tmp_path / f"rows{at}.jsonl").write_text("\n".join(lines))
    places = [str(tmp_path / f"part{at}") for at in range(2)]
    learned = {
        "merge_method": "adamerging",
        "base_model": str(zoo / "base"),
        "models": [{"model": place} for place in places],
        "parameters": {"steps": 2, "rows": 4},
        "calibration": {
            "per_expert": {place: str(tmp_path / f"rows{at}.jsonl") for at, place in enumerate(places)}
        },
        "dtype": "float32",
    }
    mixmerge.merge(learned, tmp_path / "out")
    weights = json.loads((tmp_path / "out" / "mixmerge_coefficients.json").read_text())["weights"]
    base, *made = (
        load_file(Path(place) / "model.safetensors") for place in (zoo / "base", *places, tmp_path / "out")
    )
    out = made.pop()
    name = next(key for key in base if key.endswith("layers.0.mlp.up_proj.weight"))
    wanted = base[name] + sum(
        w * (part[name] - base[name]) for w, part in zip(weights[name][0], made, strict=True)
    )
    torch.testing.assert_close(out[name], wanted, rtol=1e-5, atol=1e-6)


def test_projection_by_step_stays_outside_the_subspace() -> None:
    deltas = [draw(12, 30, seed=seed) for seed in range(2)]
    left = torch.cat([torch.linalg.svd(delta, full_matrices=False).U[:, :6] for delta in deltas], 1)
    basis = torch.linalg.svd(left, full_matrices=False).U[:, :2]
    scales = sum(0.07 / float(delta.norm()) for delta in deltas)
    plain = sum(0.07 / delta.norm() * delta for delta in deltas)
    inside = {}
    for projection in ("gradient", "step"):
        given: Any = {"projection": projection, "density": [1.0, 1.0], "lr": 1e-3, "steps": 50}
        moved = (doge_ta(deltas, base=torch.zeros(12, 30), **given) - plain) / scales
        assert float(moved.norm()) > 0.1
        inside[projection] = float((basis.T @ moved).norm() / moved.norm())
    assert inside["step"] < 1e-5
    assert inside["gradient"] > 1e-2


def test_the_threshold_is_of_all_matrices_of_an_expert() -> None:
    shapes = [
        ((9, 14), "linear"),
        ((14, 5), "transposed"),
        ((3, 6, 5), "other"),
        ((20, 5), "table"),
        ((9,), "other"),
    ]
    model = [
        [draw(*shape, seed=10 * at + index) * (index + 1) for index in range(3)]
        for at, (shape, _) in enumerate(shapes)
    ]
    density = [0.3, 0.05, 0.0]
    sketch, state = LargestEntries(), None
    for number in range(sketch.passes()):
        totals: Any = {}
        for tensors, (shape, role) in zip(model, shapes, strict=True):
            given = {"density": density, "tables": "base"}
            group = Group(tensors, torch.zeros(shape), role, given)  # type: ignore[arg-type]
            totals = add(totals, sketch.observe(number, group, state))
        state = sketch.settle(number, totals, state)
    for index in range(2):
        sizes = (
            torch.cat([tensors[index].abs().flatten() for tensors in model[:3]]).sort(descending=True).values
        )
        assert state.values[index] == float(sizes[int(density[index] * len(sizes)) - 1])
    assert state.values[2] == float("inf")


def write(folder: Path, state: State) -> str:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "none", "architectures": ["None"]}))
    return str(folder)


@pytest.mark.parametrize("method", ["tsv_m", "iso_cts", "wudi", "doge_ta"])
def test_a_merge_streams_what_memory_gives(tmp_path: Path, method: str) -> None:
    """Matrices, a stack of them read one by one, a table, a vector; and float64, whatever the threads."""
    base = {
        "h.0.a.weight": draw(9, 14),
        "h.0.experts.down_proj": draw(3, 6, 5),
        "h.1.a.weight": draw(14, 9, dtype=torch.float64),
        "wte.weight": draw(20, 5),
        "norm.weight": draw(9),
        "empty.weight": draw(0, 4),
    }
    made = [{key: x + draw(*x.shape, seed=at + 1).to(x) for key, x in base.items()} for at in range(3)]
    given = {"steps": 5} if method in ("wudi", "doge_ta") else {}
    expected = merge_state_dicts(method, made, base=base, parameters=given)
    recipe = {
        "merge_method": method,
        "base_model": write(tmp_path / "base", base),
        "models": [{"model": write(tmp_path / f"e{at}", state)} for at, state in enumerate(made)],
        "parameters": given,
    }
    for threads in (1, 2):
        mixmerge.merge(recipe, tmp_path / f"out{threads}", threads=threads)
        merged = load_file(tmp_path / f"out{threads}" / "model.safetensors")
        for key, value in expected.items():
            torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-6)
