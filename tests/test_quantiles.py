"""Order statistics by histograms: the same as by sorting, whatever the values and however they are cut up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixmerge.methods import quantiles
from mixmerge.methods.quantiles import (
    BINS,
    from_top,
    locate,
    lower_counts,
    ordered,
    upper_counts,
    values,
)

FEW = [0.0, -0.0, 1.0, -1.0, 1.5, 1e-45, -1e-45, 3e-39, 3.4028235e38, -3.4028235e38]
floats = st.one_of(
    st.sampled_from(FEW), st.floats(width=32, allow_nan=False, allow_infinity=False), st.just(0.25)
)


def found(rows: Sequence[Sequence[Tensor]], wanted: Sequence[tuple[int, int]]) -> tuple[float, ...]:
    """Order statistics of rows, each of several tensors, as the passes of a sketch gather them."""
    upper = np.stack([sum((upper_counts(t) for t in row), np.zeros(BINS, np.int64)) for row in rows])
    sought = locate(upper, wanted)
    lower = np.zeros((len(sought), BINS), np.int64)
    for at, row in enumerate(rows):
        mine = [i for i, each in enumerate(sought) if each.row == at]
        for tensor in row:
            lower[mine] += lower_counts(tensor, [sought[i] for i in mine])
    return values(lower, sought)


def float32(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@settings(max_examples=60)
@given(st.lists(st.lists(floats, min_size=1, max_size=40), min_size=1, max_size=3), st.data())
def test_they_are_what_sorting_finds(rows: list[list[float]], data: st.DataObject) -> None:
    wanted = [(at, data.draw(st.integers(1, len(row)))) for at, row in enumerate(rows) for _ in range(2)]
    cuts = [data.draw(st.integers(0, len(row))) for row in rows]
    parts = [[float32(row[:cut]), float32(row[cut:])] for row, cut in zip(rows, cuts, strict=True)]
    for value, (at, rank) in zip(found(parts, wanted), wanted, strict=True):
        assert value == np.sort(np.array(rows[at], np.float32))[rank - 1]


def test_a_large_tensor_is_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantiles, "BLOCK", 1000)
    tensor = torch.randn(7, 900, generator=torch.Generator().manual_seed(3))
    ranks = [1, 2, 3150, 6299, from_top(6300, 1)]
    ascending = tensor.reshape(-1).sort().values
    assert found([[tensor]], [(0, rank) for rank in ranks]) == tuple(
        float(ascending[rank - 1]) for rank in ranks
    )


def test_the_order_of_the_keys_is_the_order_of_the_values() -> None:
    tensor = float32([-3.4028235e38, -1, -1e-45, -0.0, 0.0, 1e-45, 3e-39, 1, 3.4028235e38])
    keys = ordered(tensor).tolist()
    assert keys == sorted(keys)
    assert keys[3] == keys[4] == 0
    assert len(set(keys)) == len(tensor) - 1


@pytest.mark.parametrize("value", [0.0, -0.0, -2.5, 1e-45])
def test_constants(value: float) -> None:
    tensors = [torch.full((), value), torch.full((2, 3), value), torch.empty(0, 4), torch.empty(0)]
    for rank in (1, 4, 7):
        assert found([tensors], [(0, rank)]) == (float(np.float32(value)),)


@pytest.mark.parametrize(("rank", "size"), [(0, 3), (4, 3), (1, 0)])
def test_a_rank_that_is_not_there(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of {size} values"):
        found([[torch.ones(size)]], [(0, rank)])


def test_double_precision_is_rounded() -> None:
    assert found([[torch.tensor([1.0, 1.0 + 1e-12, 2.0], dtype=torch.float64)]], [(0, 2)]) == (1.0,)
