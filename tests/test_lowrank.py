"""The low-rank kernel against its plain definition."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.kernels import lowrank


@settings(max_examples=40, deadline=None)
@given(
    layout=st.sampled_from([(1, 1), (1, 7), (3, 5), (2, 8)]),
    rank=st.sampled_from([1, 2, 4, 5, 8, 33]),
    columns=st.sampled_from([1, 3, 16, 100, 1023, 1025, 2100]),
    cuts=st.lists(st.integers(0, 16), max_size=5),
    seed=st.integers(0, 1000),
)
def test_the_product_equals_its_reference_to_the_last_bit(
    layout: tuple[int, int], rank: int, columns: int, cuts: list[int], seed: int
) -> None:
    import torch

    groups, rows_of_each = layout
    rows = groups * rows_of_each
    random = np.random.default_rng(seed)
    left = lowrank.pad(random.standard_normal((rows, rank)), axis=1)
    right = lowrank.pad(random.standard_normal((groups, rank, columns)), axis=1)
    whole = lowrank.product_reference(torch.from_numpy(left), torch.from_numpy(right), start=0, stop=rows)
    for start, stop in pairwise(sorted([0, *(min(cut, rows) for cut in cuts), rows])):
        out = np.full((stop - start, columns), np.nan, dtype=np.float32)
        lowrank.product(left, right, start=start, stop=stop, out=out)
        assert np.array_equal(out.view(np.uint32), whole[start:stop].numpy().view(np.uint32))


@pytest.mark.parametrize(("rank", "padded"), [(1, 4), (4, 4), (5, 8), (0, 0)])
def test_padding_fills_the_rank_up_with_zeros(rank: int, padded: int) -> None:
    factor = lowrank.pad(np.ones((3, rank)), axis=1)
    assert factor.shape == (3, padded)
    assert factor.dtype == np.float32
    assert factor.sum() == 3 * rank
    assert not factor[:, rank:].any()


@pytest.mark.parametrize("columns", [1, 7, 8, 33, 1000])
def test_row_norms_equal_their_reference(columns: int) -> None:
    import torch

    rows = np.random.default_rng(columns).standard_normal((5, columns)).astype(np.float32)
    expected = lowrank.row_norms_reference(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(lowrank.row_norms(rows), expected, rtol=1e-14)
