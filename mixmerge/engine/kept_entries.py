"""Which entries of every delta are kept, as bits in a file of their own: found once, mapped wherever they are used.

Of a tensor of n elements and T experts the bits are (T, ceil(n / 8)) bytes, lowest bit first. Mapped pages belong to
the page cache.
"""

from __future__ import annotations

import mmap
import tempfile
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import CheckpointError, Fault

if TYPE_CHECKING:
    from torch import Tensor

Raw = NDArray[np.uint8]
Pieces = Sequence[tuple[int, int]]
Find = Callable[[int, int], "Tensor"]


class KeptEntries:
    """The bits of every tensor, in a file that has no name and is gone with this process.

    Args:
        experts: T.
    """

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self._file: Any = None
        self._end = 0
        self._maps: dict[str, Raw] = {}

    def bits(self, name: str, elements: int, pieces: Pieces, find: Find) -> Raw:
        """The bits of one tensor, mapped.

        Args:
            pieces: of the whole tensor; their edges are multiples of 8.
            find: of elements ``start`` to ``stop``, the deltas (T, n) with 0 for what is not kept.

        Raises:
            CheckpointError: there is no room for them on disk.
        """
        if name not in self._maps:
            try:
                self._maps[name] = self._write(-(-elements // 8), pieces, find)
            except OSError as error:
                what = f"cannot keep which entries of {name} are trimmed: {error.strerror or error}"
                run = "Make room there, or set TMPDIR to another folder"
                raise CheckpointError(Fault(tempfile.gettempdir(), what, run=run)) from error
        return self._maps[name]

    def _write(self, length: int, pieces: Pieces, find: Find) -> Raw:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="mixmerge-kept-")  # noqa: SIM115, closed with this object
            weakref.finalize(self, self._file.close)
        start = -(-self._end // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        for first, last in pieces:
            for row, packed in enumerate(_packed(find(first, last))):
                self._file.seek(start + row * length + first // 8)
                self._file.write(packed)
        self._file.flush()
        self._end = start + self._experts * length
        if not length:
            return np.empty((self._experts, 0), np.uint8)
        return np.memmap(self._file, np.uint8, "r", start, (self._experts, length)).view(np.ndarray)


def _packed(deltas: Tensor) -> Iterable[bytes]:
    for delta in deltas:
        yield np.packbits((delta != 0).numpy(), bitorder="little").tobytes()


def of_rows(bits: Raw, rows: Tensor, columns: int) -> Tensor:
    """The bits of rows (r) of a table of ``columns``, a multiple of 8, as bool (T, r, columns)."""
    import torch

    found = bits.reshape(len(bits), -1, columns // 8)[:, rows.cpu().numpy()]
    return torch.from_numpy(np.unpackbits(found, axis=2, bitorder="little").astype(bool))
