"""Inner products and mixed weights by compiled loops, beside their plain definitions and on real files."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from mixmerge.calibrate.deltas import PIECE, plain_mix, plain_products
from mixmerge.engine.streams import FileDeltas
from mixmerge.engine.worker import Adapters
from mixmerge.errors import CheckpointError
from mixmerge.kernels import loops
from mixmerge.kernels.layout import BLOCK, CODES, LANES
from mixmerge.kernels.mixing import gradient_products_reference, mixed_reference
from mixmerge.plan import make_plan

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LENGTHS = (0, 1, 63, 64, 65, 4095, 4096, 4097, 12_289)
# Of a sum of BLOCK / LANES terms in float32, and of a term: how far rounding can take it, over the sum of magnitudes.
ROUNDING = (BLOCK / LANES + 2) * 2.0**-24
# (base, experts) as stored
STORED = [
    ("BF16", ("BF16", "BF16", "BF16", "BF16")),
    ("BF16", ("F32", "F16", "BF16")),
    ("F16", ("F16", "F16")),
    ("F32", ("F32",)),
    ("F32", ("BF16", "F16")),
]
SHAPES = {"model.embed_tokens.weight": (400, 401), "model.norm.weight": (7,), "lm_head.weight": (1, 1)}


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.view(torch.uint8).numpy()


NO_MASKS = np.empty((0, 0), np.uint8)


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("other", list(CODES))
@pytest.mark.parametrize(("base", "experts"), STORED)
@pytest.mark.parametrize("start", [0, 5, 8])
def test_loops_and_their_definitions(
    base: str, experts: tuple[str, ...], other: str, start: int, trimmed: bool
) -> None:
    random = torch.Generator().manual_seed(3)
    for n in LENGTHS:
        kinds = (base, *experts)
        stored = [torch.randn(start + n, generator=random).to(TORCH[kind]) for kind in kinds]
        values = [tensor[start:].float().numpy() for tensor in stored]
        addresses = np.array([tensor.data_ptr() for tensor in stored])
        codes = np.array([CODES[kind] for kind in kinds])
        scratch = np.full((4, BLOCK + 8), np.nan, np.float32)
        kept = torch.rand(len(experts), start + n, generator=random).numpy() < 0.4
        masks = np.packbits(kept, axis=1, bitorder="little") if trimmed else NO_MASKS
        left = kept[:, start:] if trimmed else None

        slope = torch.randn(n, generator=random).to(TORCH[other])
        sums = np.full(len(experts), np.nan)
        lanes, wide = np.full(LANES, np.nan, np.float32), np.full((len(experts), LANES), np.nan)
        loops.gradient_products(
            addresses, codes, masks, start, n, raw_bytes(slope), CODES[other], scratch, lanes, wide, sums
        )
        known = values[0], np.stack(values[1:]), slope.float().numpy()
        wanted = gradient_products_reference(*known, left)
        size = (np.abs(known[1] - known[0]).astype(np.float64) * np.abs(known[2])).sum(axis=1)
        assert (np.abs(sums - wanted) <= ROUNDING * size).all()

        factors = torch.randn(len(experts), generator=random).numpy()
        out = torch.full((n + 2,), 7.0, dtype=TORCH[other])
        loops.mixed_chunk(
            addresses, codes, masks, start, n, factors, raw_bytes(out[1 : n + 1]), CODES[other], scratch
        )
        mixed = torch.from_numpy(mixed_reference(known[0], known[1], factors, left)).to(TORCH[other])
        assert torch.equal(out[1 : n + 1], mixed)
        assert (out[0], out[-1]) == (7.0, 7.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    stored = [torch.zeros(5000).bfloat16(), torch.ones(5000).bfloat16(), torch.zeros(5000).bfloat16()]
    slope = torch.ones(5000)
    slope[4999] = bad
    addresses, codes = np.array([tensor.data_ptr() for tensor in stored]), np.zeros(3, np.int64)
    sums, scratch = np.empty(2), np.empty((4, BLOCK + 8), np.float32)
    lanes, wide = np.empty(LANES, np.float32), np.empty((2, LANES))
    given = addresses, codes, NO_MASKS, 0, 5000
    loops.gradient_products(*given, raw_bytes(slope), 2, scratch, lanes, wide, sums)
    assert not np.isfinite(sums).any()  # 0 times an infinite slope is none either
    out = torch.zeros(5000).bfloat16()
    loops.mixed_chunk(*given, np.array([bad, 0], np.float32), raw_bytes(out), 0, scratch)
    assert not out.isfinite().any()


class Counted(FileDeltas):
    """Counts what is read for the plain definitions."""

    reads = 0

    def read(self, name: str, start: int, stop: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        return super().read(name, start, stop)


@pytest.fixture
def deltas_of(tmp_path: Path) -> Callable[..., Counted]:
    """``deltas_of(dtypes, *, pad=0, cuts=None, shapes=SHAPES)``: of a base and experts of these dtypes; ``pad`` moves
    the data."""

    def make(
        dtypes: tuple[torch.dtype, ...], *, pad: int = 0, cuts: Any = None, shapes: Any = SHAPES
    ) -> Counted:
        random, folders = torch.Generator().manual_seed(5), []
        for number, dtype in enumerate(dtypes):
            folders.append(tmp_path / f"model{number}")
            folders[-1].mkdir(exist_ok=True)
            tensors = {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}
            config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
            (folders[-1] / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
            data = save(tensors)
            length = int.from_bytes(data[:8], "little")
            header = data[8 : 8 + length] + b" " * pad
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
            (folders[-1] / "model.safetensors").write_bytes(data)
        base, *experts = map(str, folders)
        plan = make_plan(
            {
                "merge_method": "task_arithmetic",
                "base_model": base,
                "models": [{"model": expert} for expert in experts],
                "parameters": {"weight": 0.3},
            }
        )
        return Counted(plan.tasks, Adapters(), cuts=cuts)

    return make


def both(deltas: Counted, name: str, dtype: torch.dtype) -> tuple[int, NDArray[np.float64], Tensor]:
    """Products and weights of a slice, held against the plain ones; how many pieces were read for them."""
    elements = int(np.prod(SHAPES[name]))
    start, stop = elements // 7, elements
    slope = torch.randn(stop - start, generator=torch.Generator().manual_seed(6)).to(dtype)
    factors = torch.linspace(-0.5, 1, deltas.experts)
    out = torch.zeros(stop - start, dtype=dtype)
    deltas.reads = 0
    products = deltas.products(name, start, slope)
    deltas.mix(name, start, factors, out)
    reads = deltas.reads
    _, delta = deltas.read(name, start, stop)
    size = (delta.double().abs() @ slope.double().abs()).numpy()
    wanted = plain_products(deltas, name, start, slope).numpy()
    assert products.dtype == torch.float64
    assert (np.abs(products.numpy() - wanted) <= 1e-5 * size).all()
    plain = torch.zeros_like(out)
    plain_mix(deltas, name, start, factors, plain)
    # A sum in another order may round to the neighbour.
    torch.testing.assert_close(out, plain, rtol=torch.finfo(dtype).eps, atol=2e-6)
    return reads, products.numpy(), out


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("kept", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_files_are_mixed_where_they_are_mapped(
    name: str, kept: str, dtype: str, deltas_of: Callable[..., Counted]
) -> None:
    deltas = deltas_of((getattr(torch, kept),) * 4)
    reads, _, _ = both(deltas, name, getattr(torch, dtype))
    assert reads == 0


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("kept", ["bfloat16", "float32"])
def test_trimmed_entries_are_found_once(name: str, kept: str, deltas_of: Callable[..., Counted]) -> None:
    cuts = {name: [(0.5, 0), (2.0, 3), (1.0, 1)] for name in SHAPES}
    deltas = deltas_of((getattr(torch, kept),) * 4, cuts=cuts)
    pieces = -(-int(np.prod(SHAPES[name])) // PIECE)
    reads, _, _ = both(deltas, name, torch.float32)
    assert reads == pieces  # for the bits, when they were first wanted
    reads, _, _ = both(deltas, name, torch.bfloat16)
    assert reads == 0


def test_rows_of_a_trimmed_table(deltas_of: Callable[..., Counted]) -> None:
    table, odd = "model.embed_tokens.weight", "model.norm.weight"
    for columns in (401, 400):
        shapes = {**SHAPES, table: (60, columns)}
        deltas = deltas_of(
            (torch.bfloat16,) * 3, cuts={name: [(0.5, 0), (1.0, 1)] for name in shapes}, shapes=shapes
        )
        assert deltas.gathers(table) == (columns == 400)
        assert not deltas.gathers(odd)
    rows = torch.tensor([0, 7, 59])
    base, found = deltas.read_rows(table, rows)
    whole, wanted = deltas.read(table, 0, 60 * 400)
    assert torch.equal(base, whole.view(60, 400)[rows])
    assert torch.equal(found, wanted.view(2, 60, 400)[:, rows])
    assert 0.1 < (found == 0).float().mean() < 0.9


def test_no_room_for_what_is_kept(
    deltas_of: Callable[..., Counted], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    deltas = deltas_of((torch.bfloat16,) * 3, cuts={name: [(0.5, 0)] * 2 for name in SHAPES})
    with pytest.raises(CheckpointError, match=r"gone: .* which entries of lm_head.weight .* set TMPDIR"):
        deltas.products("lm_head.weight", 0, torch.ones(1))


@pytest.mark.parametrize("why", ["dtype stored", "dtype of the model", "odd address"])
def test_what_the_loops_cannot_take_goes_the_plain_way(why: str, deltas_of: Callable[..., Counted]) -> None:
    kept = torch.float64 if why == "dtype stored" else torch.bfloat16
    deltas = deltas_of((kept,) * 3, pad=int(why == "odd address"))
    dtype = torch.float64 if why == "dtype of the model" else torch.float32
    reads, _, _ = both(deltas, "model.embed_tokens.weight", dtype)
    assert reads == 4  # two pieces, for products and for weights


def test_threads_change_no_bit(deltas_of: Callable[..., Counted]) -> None:
    deltas, before = deltas_of((torch.bfloat16,) * 3), torch.get_num_threads()
    name = "model.embed_tokens.weight"
    assert int(np.prod(SHAPES[name])) * 6 // 7 > PIECE  # there is more than one piece to share out
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(both(deltas, name, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for reads, products, out in found:
        assert reads == 0
        assert np.array_equal(products, found[0][1])
        assert torch.equal(out, found[0][2])
