"""The leading singular vectors of large changes, found without the others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixmerge.bank.factors import low_rank, spectrum
from mixmerge.bank.leading import leading
from mixmerge.errors import MixmergeError

K, N = 264, 400
STEPS = torch.arange(1, K + 1, dtype=torch.float64)
SPECTRA = {
    "even": torch.ones(K, dtype=torch.float64),
    "slow": STEPS**-0.5,
    "quick": 0.9**STEPS,
    "few above a floor": torch.cat([torch.full((20,), 5.0), torch.ones(K - 20)]).double(),
}


def matrix(values: Tensor, seed: int = 0) -> Tensor:
    """``(K, N)``, float32, of these singular values."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(size, K, generator=draw, dtype=torch.float64))[0] for size in (K, N)
    )
    return ((left * values) @ right.T).float()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_the_error_is_that_of_the_exact_truncation(name: str, rank: int) -> None:
    delta = matrix(SPECTRA[name])
    assert leading(delta, rank) is not None
    least = torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt()
    for one in (delta, delta.T.contiguous()):
        made = low_rank(one, rank=rank)
        whole = made.b.double().T @ (made.a.double() * torch.as_tensor(made.scale).double()[:, None])
        assert made.rank == rank
        assert (one.double() - whole).norm() <= 1.01 * least
        torch.testing.assert_close(made.a @ made.a.T, torch.eye(rank), atol=1e-5, rtol=0)


def test_drawn_entries_whose_values_lie_close() -> None:
    delta = torch.randn(K, N, generator=torch.Generator().manual_seed(3))
    found = leading(delta, 20)
    assert found is not None
    near, values, far, total = found
    least = torch.linalg.svdvals(delta.double())[20:].square().sum().sqrt()
    assert (delta.double() - (near * values) @ far.T).norm() <= 1.01 * least
    assert total == pytest.approx(float(delta.double().square().sum()))


def test_it_depends_on_the_matrix_alone() -> None:
    delta = matrix(SPECTRA["slow"])
    first = low_rank(delta, rank=8)
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    again = low_rank(delta.clone(), rank=8)
    assert torch.equal(first.a, again.a)
    assert torch.equal(first.b, again.b)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_table_a_low_rank_and_no_change() -> None:
    thin = matrix(torch.cat([torch.ones(3), torch.zeros(K - 3)]).double())
    for kind in ("linear", "embedding"):
        made = low_rank(thin, rank=10, kind=kind)
        scale = torch.as_tensor(made.scale)[:, None]
        whole = made.a @ (made.b * scale) if kind == "embedding" else made.b.T @ (made.a * scale)
        torch.testing.assert_close(whole, thin, atol=1e-6, rtol=0)
        assert torch.as_tensor(made.scale)[:3].tolist() == pytest.approx([1.0] * 3)
    assert low_rank(torch.zeros(K, N), rank=10).rank == 0


def test_energy_counts_what_was_not_found() -> None:
    delta = matrix(SPECTRA["quick"])
    exact = spectrum(delta).square().cumsum(0)
    few = int((exact < 0.5 * exact[-1]).sum()) + 1
    assert low_rank(delta, rank=20, energy=0.5).rank == few
    assert low_rank(delta, rank=2, energy=0.9).rank == 2


def test_where_it_does_not_pay_all_is_decomposed() -> None:
    assert leading(torch.randn(64, 64), 2) is None
    assert leading(matrix(SPECTRA["slow"]), 60) is None
    broken = matrix(SPECTRA["slow"])
    broken[3, 5] = float("nan")
    with pytest.raises(MixmergeError, match="NaN"):
        low_rank(broken, rank=4)
