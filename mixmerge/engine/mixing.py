"""Deltas in mapped files where they meet the learner: inner products and mixed weights by compiled loops.

n elements of a slice, T experts. A slice is cut into pieces at places that do not depend on threads, and products of
pieces are added in order: neither depends on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.kernels import loops
from mixmerge.kernels.layout import BLOCK, CODES, LANES

if TYPE_CHECKING:
    import torch

Raw = NDArray[np.uint8]
Pieces = Sequence[tuple[int, int]]


def code_of(tensor: torch.Tensor) -> int | None:
    """The loops' code of a tensor's dtype; None where they cannot read or write it: not in this machine's memory,
    not in one piece, of another dtype, or not on an address they can take."""
    names = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}
    name = names.get(str(tensor.dtype))
    lies_well = tensor.device.type == "cpu" and tensor.is_contiguous()
    if name is None or not lies_well or tensor.data_ptr() % tensor.element_size():
        return None
    return CODES[name]


@dataclass(frozen=True)
class Inputs:
    """Where the inputs of one tensor lie in memory, row 0 the base: ``addresses`` and ``codes`` (T + 1).

    ``masks`` (T, bytes) say which entries of the deltas are kept, or have no row where all are. Whoever makes it keeps
    that memory for as long as this is used.
    """

    addresses: NDArray[np.int64]
    codes: NDArray[np.int64]
    masks: Raw = field(default_factory=lambda: np.empty((0, 0), np.uint8))

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Inputs | None:
        """Of tensors whose deltas are kept whole; None where the loops cannot read one."""
        codes = [code_of(tensor) for tensor in tensors]
        if None in codes:
            return None
        addresses = [tensor.data_ptr() for tensor in tensors]
        return cls(np.array(addresses, np.int64), np.array(codes, np.int64))

    def products(
        self, pieces: Pieces, gradient: torch.Tensor, code: int, pool: ThreadPoolExecutor | None
    ) -> NDArray[np.float64]:
        """<gradient, delta> of every expert (T,).

        Args:
            pieces: (start, stop) of the tensor, one behind the other.
            gradient: (n,), of the first piece's start to the last one's stop.
            code: of its dtype.
            pool: what runs pieces side by side.
        """
        raw, width, first = bytes_of(gradient), gradient.element_size(), pieces[0][0] if pieces else 0
        experts = len(self.codes) - 1

        def one(piece: tuple[int, int]) -> NDArray[np.float64]:
            start, stop = piece
            part, sums = raw[(start - first) * width : (stop - first) * width], np.empty(experts)
            scratch, lanes = _scratch(), np.empty(LANES, np.float32)
            wide, count = np.empty((experts, LANES)), stop - start
            loops.gradient_products(
                self.addresses, self.codes, self.masks, start, count, part, code, scratch, lanes, wide, sums
            )
            return sums

        total = np.zeros(experts)
        for sums in _each(one, pieces, pool):
            total += sums
        return total

    def mix(
        self,
        pieces: Pieces,
        factors: NDArray[np.float32],
        out: torch.Tensor,
        code: int,
        pool: ThreadPoolExecutor | None,
    ) -> None:
        """Write base + sum of factors (T,) * delta into ``out`` (n,); the other arguments as above."""
        raw, width, first = bytes_of(out), out.element_size(), pieces[0][0] if pieces else 0

        def one(piece: tuple[int, int]) -> None:
            start, stop = piece
            part = raw[(start - first) * width : (stop - first) * width]
            count, scratch = stop - start, _scratch()
            loops.mixed_chunk(
                self.addresses, self.codes, self.masks, start, count, factors, part, code, scratch
            )

        for _ in _each(one, pieces, pool):
            pass


def bytes_of(tensor: torch.Tensor) -> Raw:
    """The bytes of a tensor of one dimension, not copied."""
    import torch

    raw: Raw = tensor.detach().view(torch.uint8).numpy()
    return raw


def _scratch() -> NDArray[np.float32]:
    return np.empty((4, BLOCK + 8), np.float32)


def _each(work: Callable[[Any], Any], pieces: Pieces, pool: ThreadPoolExecutor | None) -> Any:
    return map(work, pieces) if pool is None or len(pieces) < 2 else pool.map(work, pieces)
