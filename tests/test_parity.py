"""mergekit as an oracle: equal where we mean to be equal; and docs/parity.md holds where we do not.

Both sides get one tensor group in memory. Entries tied at a top-k threshold are left out of comparisons, for
which of them survive depends on the sort, and their number is compared instead.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mixmerge.errors import MethodError
from mixmerge.kernels.philox import Draw
from mixmerge.methods import METHODS
from mixmerge.methods import sparsify as sp
from mixmerge.methods.memory import apply, merge_state_dicts

mergekit = pytest.importorskip("mergekit.merge_methods")

WEIGHTS = {"weight": [0.5, 0.3, -0.4]}
LINEAR = [{"normalize": flag} for flag in (True, False)]
FLAGS = [{"normalize": n, "rescale": r, "lambda": 0.7} for n, r in itertools.product((True, False), repeat=2)]
TOP = {"density": [0.2, 0.5, 1.0]}
BAND = {"density": [0.3, 0.5, 0.9], "gamma": [0.01, 0.1, 0.3]}


def group(*shape: int, count: int = 3) -> tuple[Tensor, list[Tensor]]:
    """A base and experts that are near it, as fine-tuned models are."""
    generator = torch.Generator().manual_seed(11)
    base = torch.randn(shape, generator=generator)
    return base, [base + 0.02 * torch.randn(shape, generator=generator) for _ in range(count)]


def theirs(method: str, base: Tensor | None, experts: list[Tensor], **parameters: object) -> Tensor:
    tensors = experts if base is None else [base, *experts]
    index = None if base is None else 0
    return mergekit.merge_tensors(tensors, method, parameters=parameters, base_index=index)


def ours(
    method: str, base: Tensor | None, experts: list[Tensor], *, seed: int = 0, **parameters: object
) -> Tensor:
    row = METHODS[method]
    origin = None if base is None else base.float()
    tensors = [expert.float() for expert in experts]
    if row.takes == "deltas":
        tensors = [tensor - origin for tensor in tensors]
    return apply(row, tensors, base=origin, parameters=parameters, draw=Draw(seed, "w"))


def tied(base: Tensor, experts: list[Tensor], parameters: dict[str, object]) -> Tensor:
    """Where an expert has an entry that equals one of its thresholds."""
    found = torch.zeros(base.shape, dtype=torch.bool)
    for i, expert in enumerate(experts):
        size = (expert.float() - base.float()).abs()
        n = size.numel()
        target = sp.keep_count(parameters["density"][i], n)
        bottom = 0
        if "gamma" in parameters:
            bottom = max(0, n - target - int(parameters["gamma"][i] * n))
        for count in (n - bottom, n - bottom - target) if "gamma" in parameters else (target,):
            if 0 < count < n:
                found |= size == sp.cut_at(size.flatten(), count).value
    return found


CASES = [
    *(("linear", WEIGHTS | flags) for flags in LINEAR),
    *(("slerp", {"t": t}) for t in (0.0, 0.3, 1.0, 1.4)),
    *(("task_arithmetic", WEIGHTS | flags | {"lambda": 0.7}) for flags in LINEAR),
    *(("ties", WEIGHTS | TOP | flags) for flags in FLAGS),
    *(("breadcrumbs", WEIGHTS | BAND | flags) for flags in FLAGS),
    *(("breadcrumbs_ties", WEIGHTS | BAND | flags) for flags in FLAGS),
]


def fit(method: str, shape: tuple[int, ...]) -> tuple[Tensor | None, list[Tensor]]:
    base, experts = group(*shape)
    if method == "slerp":  # far apart, so that the arc is bent
        return base, [experts[0].flip(0)]
    return (None if method == "linear" else base), experts


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_deterministic_methods_in_float32(method: str, parameters: dict[str, object]) -> None:
    base, experts = fit(method, (37, 53))
    left_out = torch.zeros(37, 53, dtype=torch.bool)
    if "density" in parameters:
        left_out = tied(base, experts, parameters)
        assert left_out.float().mean() < 0.01
    difference = (
        ours(method, base, experts, **parameters) - theirs(method, base, experts, **parameters)
    ).abs()
    assert difference[~left_out].max() <= 1e-6


@pytest.mark.parametrize(("method", "parameters"), CASES, ids=str)
def test_half_precision_is_one_rounding_from_float32(method: str, parameters: dict[str, object]) -> None:
    base, experts = fit(method, (37, 53))
    base = None if base is None else base.bfloat16()
    experts = [expert.bfloat16() for expert in experts]
    left_out = torch.zeros(37, 53, dtype=torch.bool)
    if "density" in parameters:
        left_out = tied(base, experts, parameters)
        assert left_out.float().mean() < 0.2  # deltas of rounded numbers tie often
    wide = theirs(method, None if base is None else base.float(), [e.float() for e in experts], **parameters)
    result = ours(method, base, experts, **parameters).bfloat16().float()
    excess = (result - wide).abs() - wide.abs() * 2**-8  # half a unit in the last place, at most
    assert excess[~left_out].max() <= 1e-6


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_as_many_tied_entries_survive(method: str) -> None:
    delta = torch.randint(-3, 4, (30, 40), generator=torch.Generator().manual_seed(2)).float()
    base = torch.zeros(30, 40)
    for density in (0.1, 0.25, 0.5, 0.9):
        parameters = {"weight": [1.0], "density": [density]}
        if method != "ties":
            parameters["gamma"] = [0.05]
        mine, other = (f(method, base, [delta], **parameters) for f in (ours, theirs))
        clear = ~tied(base, [delta], parameters)
        assert torch.equal(mine[clear], other[clear])
        assert torch.equal(
            mine.abs().unique(return_counts=True)[1], other.abs().unique(return_counts=True)[1]
        )


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (1, 4), (3, 2, 4), (0,), (0, 3)], ids=str)
def test_small_shapes(shape: tuple[int, ...]) -> None:
    base, experts = group(*shape, count=2)
    weight = {"weight": [1.0, 0.5]}
    for method, parameters in (
        ("ties", {"density": [0.5, 0.0]}),
        ("ties", {"density": [0.1, 1.0]}),
        ("breadcrumbs", {"density": [1.0, 0.0], "gamma": [0.01, 0.01]}),
        ("dare_linear", {"density": [0.0, 1.0]}),
        ("della", {"density": [0.0, 1.0], "epsilon": [0.15, 0.15]}),
    ):
        pair = [f(method, base, experts, **weight, **parameters) for f in (ours, theirs)]
        torch.testing.assert_close(*pair, atol=1e-6, rtol=0)


def test_state_dicts() -> None:
    shapes = {"a": (6, 8), "b": (8,)}
    tensors = {name: group(*shape) for name, shape in shapes.items()}
    base = {name: pair[0] for name, pair in tensors.items()} | {"n": torch.tensor([1, 2])}
    experts = [{name: pair[1][i] for name, pair in tensors.items()} | {"n": base["n"]} for i in range(3)]
    mine = merge_state_dicts("ties", experts, base=base, parameters={"weight": 0.5, "density": 0.5})
    models = {"base": base, **{str(i): expert for i, expert in enumerate(experts)}}
    other = mergekit.merge_state_dicts(
        models, "ties", base="base", parameters={"weight": 0.5, "density": 0.5}
    )
    assert list(mine) == list(other)
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, other[name], atol=1e-6, rtol=0)


# --- random masks: never equal, so means, rates and norms

SEEDS = 60
DRAWN = {
    "dare_linear": {"density": [0.3]},
    "dare_ties": {"density": [0.3]},
    "della": {"density": [0.4], "epsilon": [0.3]},
    "della_linear": {"density": [0.4], "epsilon": [0.3]},
}


def over_seeds(side: str, method: str, delta: Tensor, **parameters: object) -> tuple[Tensor, Tensor]:
    """Mean of the merged delta and share of seeds in which an entry was kept."""
    mean, kept, base = torch.zeros_like(delta), torch.zeros_like(delta), torch.zeros_like(delta)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        given = {"weight": [1.0], **parameters}
        merged = (
            theirs(method, base, [delta], **given)
            if side == "theirs"
            else ours(method, base, [delta], seed=seed, **given)
        )
        mean += merged / SEEDS
        kept += (merged != 0).float() / SEEDS
    return mean, kept


@pytest.mark.parametrize("method", DRAWN)
def test_random_masks_keep_the_same_share_and_mean(method: str) -> None:
    row = torch.linspace(0.1, 1, 10)
    delta = row.repeat(640, 1)  # every column is one magnitude, 38,400 draws of it
    mean, kept = (x.mean(dim=0) for x in over_seeds("ours", method, delta, **DRAWN[method]))
    other_mean, other_kept = (x.mean(dim=0) for x in over_seeds("theirs", method, delta, **DRAWN[method]))
    torch.testing.assert_close(kept, other_kept, atol=0.02, rtol=0)
    torch.testing.assert_close(mean, other_mean, atol=0.05, rtol=0)  # four and a half standard errors or more
    if "epsilon" in DRAWN[method]:
        torch.testing.assert_close(kept, torch.linspace(0.1, 0.7, 10), atol=0.02, rtol=0)


@pytest.mark.parametrize("method", DRAWN)
def test_l1_rescaling_restores_the_same_norm(method: str) -> None:
    base, (expert, *_) = group(30, 40)
    for side in (ours, theirs):
        merged = side(method, torch.zeros(30, 40), [expert - base], weight=[1.0], **DRAWN[method])
        torch.testing.assert_close(merged.abs().sum(), (expert - base).abs().sum())


# --- docs/parity.md: what mergekit does there, and what we do


def test_every_difference_has_its_test() -> None:
    here = Path(__file__)
    table = (here.parents[1] / "docs" / "parity.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)` \|", table))
    assert len(named) >= 10
    assert named <= set(re.findall(r"def (test_\w+)", here.read_text(encoding="utf-8")))


def test_zero_sum_of_weights() -> None:
    _, experts = group(4, 4, count=2)
    assert not torch.isfinite(theirs("linear", None, experts, weight=[1.0, -1.0])).any()
    with pytest.raises(MethodError):
        ours("linear", None, experts, weight=[1.0, -1.0])


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.85, 0.15), (0.15, 0.15), (0.5, 0.5)])
def test_epsilon_at_the_edge(density: float, epsilon: float) -> None:
    base, experts = group(4, 6, count=1)
    given = {"weight": [1.0], "density": [density], "epsilon": [epsilon]}
    with pytest.raises(ValueError, match="Epsilon"):
        theirs("della", base, experts, **given)
    assert torch.isfinite(ours("della", base, experts, **given)).all()


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (0,)], ids=str)
def test_della_rows_mergekit_cannot_rank(shape: tuple[int, ...]) -> None:
    base, experts = group(*shape, count=1)
    given = {"weight": [1.0], "density": [0.5], "epsilon": [0.15]}
    with pytest.raises((RuntimeError, IndexError)):
        theirs("della", base, experts, **given)
    assert ours("della", base, experts, **given).shape == shape


def test_della_ranks_the_last_dimension() -> None:
    delta = torch.arange(1, 7.0).reshape(1, 3, 2)
    given = {"density": [0.5], "epsilon": [0.4], "rescale": False}
    along_last = torch.tensor([0.1, 0.9]).expand(1, 3, 2)
    along_second = torch.tensor([0.1, 0.5, 0.9])[:, None].expand(1, 3, 2)
    torch.testing.assert_close(
        over_seeds("ours", "della_linear", delta, **given)[1], along_last, atol=0.25, rtol=0
    )
    other = over_seeds("theirs", "della_linear", delta, **given)[1]
    torch.testing.assert_close(other, along_second, atol=0.25, rtol=0)


def test_a_band_keeps_at_least_one_entry() -> None:
    base, experts = group(5, count=1)
    given = {"weight": [1.0], "density": [0.1], "gamma": [0.01]}
    assert torch.equal(theirs("breadcrumbs", base, experts, **given), base)
    assert int((ours("breadcrumbs", base, experts, **given) != base).sum()) == 1


def test_mergekit_rounds_half_precision_on_the_way() -> None:
    base, experts = group(64, 64)
    base, experts = base.bfloat16(), [expert.bfloat16() for expert in experts]
    given = {"weight": [0.5, 0.3, 0.4]}
    wide = theirs("task_arithmetic", base.float(), [e.float() for e in experts], **given).bfloat16()
    assert torch.equal(ours("task_arithmetic", base, experts, **given).bfloat16(), wide)
    assert (theirs("task_arithmetic", base, experts, **given) != wide).float().mean() > 0.01


def test_parameters_mergekit_takes_and_forgets() -> None:
    base, experts = group(4, 4, count=1)
    plain = theirs("task_arithmetic", base, experts, weight=[1.0])
    assert torch.equal(theirs("task_arithmetic", base, experts, weight=[1.0], density=[0.5]), plain)
    states = [{"w": experts[0]}]
    with pytest.raises(MethodError, match="has no effect"):
        merge_state_dicts(
            "task_arithmetic", states, base={"w": base}, parameters={"weight": 1, "density": 0.5}
        )
