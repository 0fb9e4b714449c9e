"""TSV-M, Iso-C, Iso-CTS and WUDI: by hand, beside the published programs written down plainly, and at their edges."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixmerge.errors import MethodError
from mixmerge.methods import METHODS
from mixmerge.methods.doge import Thresholds, doge_ta
from mixmerge.methods.isotropic import iso_c, iso_cts, own_directions
from mixmerge.methods.lowrank import LowRank, total
from mixmerge.methods.memory import apply, merge_state_dicts
from mixmerge.methods.roles import is_matrix
from mixmerge.methods.spectral import orthogonal, triplets
from mixmerge.methods.tsv import tsv_m
from mixmerge.methods.wudi import wudi

NAMES = ("tsv_m", "iso_c", "iso_cts", "wudi", "doge_ta")
WITH_DATA = (*NAMES, "learned_spectrum")  # what it is without any
FAST: dict[str, dict[str, Any]] = {"doge_ta": {"steps": 5}, "wudi": {"steps": 5}}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def experts(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(*shape, seed=seed, dtype=dtype) for seed in range(count)]


def factors(count: int, m: int, n: int, rank: int) -> list[LowRank]:
    return [LowRank(draw(m, rank, seed=i), draw(rank, n, seed=100 + i)) for i in range(count)]


def run(name: str, deltas: Sequence[Any], base: Tensor, role: Any = "linear", **given: Any) -> Tensor:
    return apply(METHODS[name], deltas, base=base, parameters=FAST.get(name, {}) | given, role=role)


def matrix(*rows: Sequence[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def close(merged: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(merged, expected.to(merged.dtype), rtol=tolerance, atol=tolerance)


# --- by hand


def test_iso_c_by_hand() -> None:
    """diag(3, 0) + diag(0, -1): singular values 3 and 1, so 2 and 2."""
    deltas = [matrix([3, 0], [0, 0]), matrix([0, 0], [0, -1])]
    close(iso_c(deltas, base=torch.ones(2, 2)), matrix([3, 1], [1, -1]))
    close(iso_c(deltas, base=torch.zeros(2, 2), weight=[1, 3], lambda_=0.5), matrix([1.5, 0], [0, -1.5]))


def test_learned_spectrum_by_hand() -> None:
    """Singular values 3 and 1 become 2 times the factors of their directions; a stack has those of each matrix."""
    deltas = [matrix([3, 0], [0, 0]), matrix([0, 0], [0, -1])]
    base, given = torch.ones(2, 2), {"lambda": 0.5, "factors": (2.0, 3.0), "nuclear": 4.0}
    wanted = base + matrix([2, 0], [0, -3])
    close(run("learned_spectrum", deltas, base, **given), wanted)
    close(run("learned_spectrum", deltas, base, "transposed", **given), wanted)
    close(run("learned_spectrum", deltas, base, factors=(2.0,)), base + matrix([4, 0], [0, -4]))
    close(run("learned_spectrum", deltas, base, "other", factors=(2.0,)), base + matrix([3, 0], [0, -1]))
    one = matrix([2, 0], [0, 0])
    stack = [torch.stack([deltas[0] + deltas[1], one])]
    merged = run(
        "learned_spectrum", stack, torch.zeros(2, 2, 2), "other", factors=(2.0, 3.0, 5.0), nuclear=6.0
    )
    close(merged, torch.stack([matrix([4, 0], [0, -6]), matrix([10, 0], [0, 0])]))
    for factors in ((1.0, 2.0), (1.0, 2.0, 3.0, 4.0)):
        with pytest.raises(MethodError, match=f"factors: are {len(factors)} for 3 directions"):
            run("learned_spectrum", stack, torch.zeros(2, 2, 2), "other", factors=factors)
    with pytest.raises(MethodError, match="a sum of nuclear norm 5, and this one's is 4"):
        run("learned_spectrum", deltas, base, factors=(2.0, 3.0), nuclear=5.0)
    with pytest.raises(MethodError, match="are 2 for 1 directions"):
        run("learned_spectrum", deltas, base, "table", factors=(2.0, 3.0))


def test_factors_of_1_are_iso_c_to_the_last_bit() -> None:
    for shape, role in (
        ((10, 14), "linear"),
        ((14, 10), "transposed"),
        ((3, 5, 9), "other"),
        ((7,), "other"),
    ):
        deltas, base = experts(3, *shape), draw(*shape, seed=7)
        given = {"weight": [0.5, 1.0, 2.0], "lambda": 1.7}
        wanted = run("iso_c", deltas, base, role, **given)
        assert torch.equal(run("learned_spectrum", deltas, base, role, **given), wanted)
        count = 10 if len(shape) == 2 else 15 if len(shape) == 3 else 1
        merged = run("learned_spectrum", deltas, base, role, **given, factors=(1.0,) * count)
        assert torch.equal(merged, wanted)


def test_tsv_m_by_hand() -> None:
    """Two experts in two dimensions keep one triplet each: 3 e1 e1' and 2 e2 e2'; the small ones go."""
    deltas = [matrix([3, 0], [0, 1]), matrix([0.5, 0], [0, 2])]
    close(tsv_m(deltas, base=torch.zeros(2, 2)), matrix([3, 0], [0, 2]))
    same_side = [matrix([0, 3], [0, 0]), matrix([2, 0], [0, 0])]  # both write to the first output
    close(tsv_m(same_side, base=torch.zeros(2, 2)), matrix([2, 3], [0, 0]) / 2**0.5)


def test_iso_cts_by_hand() -> None:
    """Of four directions two are common (10 and 9); each expert has one of its own (4 and 3): mean 6.5."""
    deltas = [torch.diag(torch.tensor(values)) for values in ([10.0, 0, 4, 0], [0.0, 9, 0, 3])]
    close(iso_cts(deltas, base=torch.zeros(4, 4), common_fraction=0.5), 6.5 * torch.eye(4))
    assert [own_directions(*case) for case in ((10, 2, 0.8), (10, 3, 0.8), (10, 5, 0.8), (3, 2, 0.0))] == [
        1,
        1,
        0,
        1,
    ]


def test_wudi_by_hand() -> None:
    """S = [[1.5, .5], [.5, .5]] and C = [2, 1], so D = [1, 1], and nothing interferes."""
    deltas = [matrix([1, 0]), matrix([1, 1])]
    close(wudi(deltas, base=torch.zeros(1, 2), solver="closed"), matrix([1, 1]))
    close(wudi(deltas, base=torch.zeros(1, 2), steps=0), matrix([2, 1]))
    close(wudi(deltas, base=torch.zeros(1, 2), steps=1, lr=0.25), matrix([1.75, 0.75]), 1e-4)


def test_wudi_within_reach_by_hand() -> None:
    """A ridge of 1: S + I = [[2.5, .5], [.5, 1.5]], so D = [5, 3] / 7, whose norm is sqrt(34) / 7."""
    deltas, reach = [matrix([1, 0]), matrix([1, 1])], 34**0.5 / 7 / (1 + 2**0.5)
    for each in (deltas, [LowRank(torch.ones(1, 1), delta) for delta in deltas]):
        close(wudi(each, base=torch.zeros(1, 2), solver="closed", reach=reach), matrix([5 / 7, 3 / 7]))


# --- beside what was published


def published_tsv_m(deltas: list[Tensor]) -> Tensor:
    kept = min(deltas[0].shape) // len(deltas)
    parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    u = torch.cat([part.U[:, :kept] for part in parts], 1)
    v = torch.cat([part.Vh[:kept] for part in parts])
    p, _, q = torch.linalg.svd(u, full_matrices=False)
    a, _, b = torch.linalg.svd(v, full_matrices=False)
    return p @ q @ torch.diag(torch.cat([part.S[:kept] for part in parts])) @ a @ b


def published_iso_cts(deltas: list[Tensor], fraction: float) -> Tensor:
    k, count = min(deltas[0].shape), len(deltas)
    own = round((k - int(k * fraction)) / count)
    u, s, vt = torch.linalg.svd(sum(deltas), full_matrices=False)
    common = k - own * count
    us, ss, vs = [u[:, :common]], [s[:common]], [vt[:common]]
    for delta in deltas:
        rest = torch.linalg.svd(delta - us[0] @ us[0].T @ delta, full_matrices=False)
        us.append(rest.U[:, :own])
        ss.append(rest.S[:own])
        vs.append(rest.Vh[:own])
    p, _, q = torch.linalg.svd(torch.cat(us, 1), full_matrices=False)
    a, _, b = torch.linalg.svd(torch.cat(vs), full_matrices=False)
    return torch.cat(ss).mean() * (p @ q @ a @ b)


def interference(d: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    parts = [((d - delta) @ delta.T).square().sum() / delta.square().sum() for delta in deltas]
    return torch.stack(parts).sum()


def published_wudi(deltas: list[Tensor], steps: int, lr: float) -> Tensor:
    d = torch.nn.Parameter(torch.stack(deltas).sum(0))
    optimizer = torch.optim.Adam([d], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        interference(d, deltas).backward()
        optimizer.step()
    return d.detach()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (15, 15)], ids=str)
@pytest.mark.parametrize("given", [{}, {"tolerance": 0.0}], ids=["rank", "all"])
def test_the_published_programs(shape: tuple[int, int], given: dict[str, Any]) -> None:
    deltas, zero = experts(3, *shape), torch.zeros(shape)
    wide = [delta.double() for delta in deltas]
    close(tsv_m(deltas, base=zero, **given), published_tsv_m(wide))
    u, s, vt = torch.linalg.svd(torch.stack(wide).sum(0), full_matrices=False)
    close(iso_c(deltas, base=zero, **given), s.mean() * u @ vt)
    close(iso_cts(deltas, base=zero, common_fraction=0.6, **given), published_iso_cts(wide, 0.6))
    exact = iso_cts(wide, base=zero.double(), common_fraction=0.6, **given)
    torch.testing.assert_close(exact, published_iso_cts(wide, 0.6))


@pytest.mark.parametrize(("steps", "lr"), [(300, 1e-5), (40, 1e-3)])
def test_the_published_adam(steps: int, lr: float) -> None:
    deltas = experts(3, 9, 14, dtype=torch.float64)
    merged = wudi(deltas, base=torch.zeros(9, 14, dtype=torch.float64), steps=steps, lr=lr)
    torch.testing.assert_close(merged, published_wudi(deltas, steps, lr), rtol=1e-6, atol=1e-9)


# --- invariants


@pytest.mark.parametrize("name", ["tsv_m", "wudi"])
@pytest.mark.parametrize("given", [{}, {"tolerance": 0.0}], ids=["rank", "all"])
def test_one_expert_is_that_expert(name: str, given: dict[str, Any]) -> None:
    base, delta = draw(8, 13, seed=9), draw(8, 13)
    close(run(name, [delta], base, **given), base + delta, 1e-6)
    if name == "wudi":
        close(run(name, [delta], base, solver="closed", **given), base + delta, 1e-6)


@pytest.mark.parametrize("name", ["tsv_m", "wudi"])
def test_orthogonal_low_rank_experts_add_up(name: str) -> None:
    q = torch.linalg.qr(draw(16, 16)).Q
    r = torch.linalg.qr(draw(16, 16, seed=1)).Q
    deltas = [(q[:, i : i + 4] * torch.arange(1, 5)) @ r[:, i : i + 4].T for i in (0, 4, 8)]
    for solver in ({},) if name == "tsv_m" else ({}, {"solver": "closed"}):
        close(run(name, deltas, torch.zeros(16, 16), **solver), torch.stack(deltas).sum(0))


def test_iso_c_keeps_the_nuclear_norm() -> None:
    deltas = [f.b @ f.a for f in factors(2, 20, 30, 2)]
    merged = iso_c(deltas, base=torch.zeros(20, 30))
    before, after = (torch.linalg.svdvals(x) for x in (deltas[0] + deltas[1], merged))
    torch.testing.assert_close(after.sum(), before.sum())
    close(after[:4], torch.full((4,), float(before.sum()) / 4))
    assert float(after[4:].max()) < 1e-6  # the published method has 20 of equal size, 16 of them noise
    published = torch.linalg.svdvals(iso_c(deltas, base=torch.zeros(20, 30), tolerance=0.0))
    close(published, torch.full((20,), float(before.sum()) / 20))


def test_closed_wudi_is_the_minimum() -> None:
    deltas, zero = experts(3, 9, 14, dtype=torch.float64), torch.zeros(9, 14, dtype=torch.float64)
    closed = wudi(deltas, base=zero, solver="closed").requires_grad_()
    loss = interference(closed, deltas)
    (gradient,) = torch.autograd.grad(loss, closed)
    assert float(gradient.abs().max()) < 1e-12
    published = interference(wudi(deltas, base=zero), deltas)
    far = interference(wudi(deltas, base=zero, steps=3000, lr=1e-3), deltas)
    assert (
        float(loss) < float(far) < float(published) < float(interference(torch.stack(deltas).sum(0), deltas))
    )


def steep(m: int, n: int) -> Tensor:
    """A delta of full rank whose last singular value is a thousandth of the first."""
    k = min(m, n)
    u, v = torch.linalg.qr(draw(m, k, seed=5)).Q, torch.linalg.qr(draw(n, k, seed=6)).Q
    return 0.1 * (u * torch.logspace(0, -3, k)) @ v.T


@pytest.mark.parametrize(("m", "n"), [(96, 96), (144, 96), (64, 96)])
def test_closed_wudi_of_adapters_beside_a_full_model_stays_within_reach(m: int, n: int) -> None:
    """Adapters read mostly what the full model reads most, and a little of what it hardly reads."""
    whole = steep(m, n)
    main = torch.linalg.svd(whole).Vh[:4]
    reads = [draw(4, n, seed=i) / n**0.5 + draw(4, 4, seed=10 + i) @ main for i in range(2)]
    thin = [LowRank(draw(m, 4, seed=20 + i), read) for i, read in enumerate(reads)]
    deltas: list[Any] = [*(each * float(whole.norm() / (each.b @ each.a).norm()) for each in thin), whole]
    dense, zero = [*(each.b @ each.a for each in deltas[:2]), whole], torch.zeros(m, n)
    norms = [float(delta.norm()) for delta in dense]
    bare = wudi(deltas, base=zero, solver="closed", reach=1e6)
    assert float(bare.norm()) > 5 * max(norms)
    for reach in (1.0, 0.4):
        merged = wudi(deltas, base=zero, solver="closed", reach=reach)
        close(wudi(dense, base=zero, solver="closed", reach=reach), merged, 1e-4)
        torch.testing.assert_close(float(merged.norm()), reach * sum(norms), rtol=1e-4, atol=0)
        alike = [merged * 0 + torch.stack(dense).sum(0) * reach, bare * (merged.norm() / bare.norm())]
        assert all(interference(merged, dense) < 0.7 * interference(other, dense) for other in alike)
    slope = merged.double().requires_grad_()
    loss = interference(slope, [delta.double() for delta in dense])
    (gradient,) = torch.autograd.grad(loss, slope)
    close(gradient / gradient.norm(), -merged / merged.norm(), 1e-3)  # only a shorter or longer D is better


def test_what_is_within_reach_is_the_minimum_itself() -> None:
    for shape in ((30, 20), (20, 20)):
        deltas = experts(3, *shape)
        s = torch.stack([(d.double().T @ d.double()) / d.double().square().sum() for d in deltas]).sum(0)
        c = torch.stack(
            [d.double() @ d.double().T @ d.double() / d.double().square().sum() for d in deltas]
        ).sum(0)
        merged = wudi(deltas, base=torch.zeros(shape), solver="closed")
        close(merged, c @ torch.linalg.pinv(s), 1e-5)
        assert torch.equal(merged, wudi(deltas, base=torch.zeros(shape), solver="closed", reach=1e6))


@pytest.mark.parametrize("name", WITH_DATA)
def test_order_and_orientation(name: str) -> None:
    deltas, base = experts(3, 10, 14), draw(10, 14, seed=7)
    merged = run(name, deltas, base)
    close(run(name, [deltas[2], deltas[0], deltas[1]], base), merged)
    turned = run(name, [delta.T.contiguous() for delta in deltas], base.T.contiguous(), "transposed")
    close(turned.T, merged, 1e-6)
    alike = torch.allclose(run(name, deltas, base, "transposed"), merged, atol=1e-5)
    assert alike == (name in ("tsv_m", "iso_c", "learned_spectrum"))  # the others tell inputs from outputs


@pytest.mark.parametrize("name", WITH_DATA)
def test_what_is_no_matrix(name: str) -> None:
    for shape, role in (((7,), "other"), ((), "other"), ((9, 4), "table"), ((6, 5, 3), "other")):
        deltas, base = experts(2, *shape), draw(*shape, seed=7)
        merged = run(name, deltas, base, role)
        close(merged, base if name == "doge_ta" else base + (deltas[0] + deltas[1]) / 2, 1e-6)
    table = experts(2, 9, 4)
    close(
        run(name, table, torch.zeros(9, 4), "table", tables="spectral"),
        run(name, table, torch.zeros(9, 4)),
        1e-6,
    )
    assert is_matrix((3, 5, 4), "other", "mean")
    assert not is_matrix((6, 5, 4), "other", "mean")
    assert not is_matrix((1, 5, 4), "other", "spectral")  # positions of a vision model, its class token
    stack, base = experts(2, 3, 5, 4), draw(3, 5, 4, seed=7)
    merged = run(name, stack, base, "other", **({"density": [1.0, 1.0]} if name == "doge_ta" else {}))
    for at in range(3):
        given = {"density": [1.0, 1.0]} if name == "doge_ta" else {}
        close(merged[at], run(name, [delta[at] for delta in stack], base[at], **given), 1e-6)


def test_iso_cts_without_own_directions_is_iso_c_and_alone_is_one_spectrum() -> None:
    deltas, base = experts(3, 10, 14), draw(10, 14, seed=7)
    close(iso_cts(deltas, base=base, common_fraction=1.0), iso_c(deltas, base=base))
    u, s, vt = torch.linalg.svd(deltas[0], full_matrices=False)
    for method in (iso_c, iso_cts):
        close(method(deltas[:1], base=base), base + s.mean() * u @ vt)


# --- edges


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 6), (6, 1), (2, 9), (5, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("tolerance", [None, 0.0, 0.99])
def test_more_experts_than_directions(name: str, shape: tuple[int, ...], tolerance: float | None) -> None:
    deltas, base = experts(7, *shape), draw(*shape, seed=9)
    for variant in ({}, {"solver": "closed"}) if name == "wudi" else ({},):
        merged = run(name, deltas, base, tolerance=tolerance, **variant)
        assert merged.shape == base.shape
        assert torch.isfinite(merged).all()
        unchanged = not base.numel() or (name == "doge_ta" and base.numel() == 1)  # 0.3 of one entry is none
        assert torch.equal(merged, base) == unchanged


@pytest.mark.parametrize("name", WITH_DATA)
@pytest.mark.parametrize("tolerance", [None, 0.0])
def test_zero_and_identical_experts(name: str, tolerance: float | None) -> None:
    base, delta, zero = draw(8, 12, seed=9), draw(8, 12), torch.zeros(8, 12)
    for variant in ({}, {"solver": "closed"}) if name == "wudi" else ({},):
        assert torch.equal(run(name, [zero, zero], base, tolerance=tolerance, **variant), base)
        for deltas in ([delta, zero], [delta, delta], [delta, -delta]):
            assert torch.isfinite(run(name, deltas, base, tolerance=tolerance, **variant)).all()


def test_a_zero_expert_takes_no_part_and_a_twin_adds_nothing_new() -> None:
    base, delta = torch.zeros(8, 12), draw(8, 12)
    found = torch.linalg.svd(delta, full_matrices=False)
    half = (found.U[:, :4] * found.S[:4]) @ found.Vh[:4]
    close(tsv_m([delta, base], base=base), half)
    close(tsv_m([delta, delta], base=base), half)
    close(wudi([delta, base], base=base, solver="closed"), delta)
    close(wudi([delta, delta], base=base, solver="closed"), delta)
    close(iso_c([delta, -delta], base=base), base)


def test_pieces() -> None:
    x = draw(9, 5)
    full = triplets(x, tolerance=None)
    close((full.u * full.s) @ full.v.T, x, 1e-6)
    assert len(triplets(torch.zeros(4, 3), tolerance=0.0).s) == 0
    assert len(triplets(LowRank(torch.ones(6, 3), torch.ones(3, 5)), tolerance=0.0).s) == 1
    square = orthogonal(x, None)
    close(square.T @ square, torch.eye(5))
    doubled = orthogonal(torch.cat([square[:, :2], square[:, :2]], 1), None)
    close(doubled, torch.cat([square[:, :2], square[:, :2]], 1) / 2**0.5)
    thin = total([LowRank(draw(6, 2), draw(2, 9)) for _ in range(2)])
    assert isinstance(thin, LowRank)
    assert isinstance(total([LowRank(draw(6, 4), draw(4, 9)) for _ in range(2)]), Tensor)


# --- factors, and how much is held


class Sizes(TorchDispatchMode):
    """How many results of operations have at least so many entries, and how many of them are new memory."""

    def __init__(self, entries: int) -> None:
        super().__init__()
        self.entries, self.seen = entries, 0
        self.storages: list[torch.UntypedStorage] = []  # held, so that none is the place of another again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        outs = found if isinstance(found, tuple | list) else [found]
        large = [out for out in outs if isinstance(out, Tensor) and out.numel() >= self.entries]
        self.seen += len(large)
        self.storages += [out.untyped_storage() for out in large]
        return found

    @property
    def made(self) -> int:
        return len({storage.data_ptr() for storage in self.storages})


@pytest.mark.parametrize("shape", [(40, 64), (64, 40)], ids=str)
@pytest.mark.parametrize("role", ["linear", "transposed", "table"])
@pytest.mark.parametrize("name", WITH_DATA)
def test_factors_are_the_matrix_and_never_made_one(name: str, role: str, shape: tuple[int, int]) -> None:
    thin, base = factors(8, *shape, 2), torch.zeros(shape)
    dense = [delta.b @ delta.a for delta in thin]
    seen = []
    for variant in ({}, {"solver": "closed"}) if name == "wudi" else ({},):
        close(run(name, thin, base, role, **variant), run(name, dense, base, role, **variant))
        counts = []
        for count in (2, 4):
            with Sizes(40 * 64) as sizes:
                run(name, thin[:count], base, role, **variant)
            counts.append(sizes.seen)
        seen.append(counts)
    if name != "doge_ta" and role != "table":  # DOGE and the mean add experts to a sum, some rows at a time
        assert all(few == many for few, many in seen)


@pytest.mark.parametrize(
    ("tolerance", "dtype"), [(0.0, torch.float32), (None, torch.float64), (None, torch.float32)]
)
def test_a_few_triplets_hold_no_more_memory_than_they_have_entries(
    tolerance: float | None, dtype: torch.dtype
) -> None:
    found = triplets(draw(40, 60, dtype=dtype), tolerance=tolerance, count=2)
    for part, entries in ((found.u, 80), (found.s, 60), (found.v, 120)):
        assert part.untyped_storage().nbytes() <= entries * part.element_size()


class Counted(Sequence[Tensor]):
    """Experts made when asked for, and the most of them there were at once."""

    def __init__(self, count: int) -> None:
        self.count, self.alive, self.most, self.asked = count, 0, 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("all at once")

    def __getitem__(self, index: Any) -> Any:
        made = draw(16, 24, seed=index)
        self.asked += 1
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(made, self._gone)
        return made

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "iso_cts", "wudi", "learned_spectrum"])
@pytest.mark.parametrize("role", ["linear", "table"])
def test_experts_are_asked_for_one_at_a_time(name: str, role: str) -> None:
    gc.collect()
    counted = Counted(9)
    run(name, counted, draw(16, 24), role, **({"common_fraction": 0.2} if name == "iso_cts" else {}))
    assert counted.most <= 2  # the last is let go when the next is there
    assert counted.asked == (18 if name == "iso_cts" and role == "linear" else 9)


def test_doge_holds_the_experts_once() -> None:
    """Every step needs all of them: they are copied into one tensor as they come, and nothing else has its size."""
    counted = Counted(9)
    gc.collect()
    with Sizes(9 * 16 * 24) as sizes:
        doge_ta(counted, base=draw(16, 24), steps=3, sketch=Thresholds((), (0.1,) * 9))
    assert counted.most <= 2
    assert sizes.made == 1


def test_state_dicts_in_memory() -> None:
    base = {
        "model.layers.0.mlp.up_proj.weight": draw(6, 8),
        "embed_tokens.weight": draw(9, 8),
        "norm.weight": draw(8),
    }
    made = [{name: x + 0.1 * draw(*x.shape, seed=i + 1) for name, x in base.items()} for i in range(2)]
    for name in NAMES:
        merged = merge_state_dicts(name, made, base=base, parameters=FAST.get(name, {}))
        for key, role in zip(base, ("linear", "table", "other"), strict=True):
            deltas = [state[key] - base[key] for state in made]
            if name != "doge_ta":
                close(merged[key], run(name, deltas, base[key], role), 1e-6)
            elif role != "linear":
                assert torch.equal(merged[key], base[key])
