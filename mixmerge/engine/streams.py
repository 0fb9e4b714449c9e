"""Base and deltas of a plan's tensors a piece at a time, from memory-mapped files: what coefficients are learned on.

Mapped pages belong to the page cache: they are no memory of ours, however many experts there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.engine.kept_entries import KeptEntries, of_rows
from mixmerge.engine.mixing import Inputs, code_of
from mixmerge.engine.reading import TORCH
from mixmerge.engine.worker import Adapters
from mixmerge.errors import CheckpointError, Fault
from mixmerge.plan import Source, Task

if TYPE_CHECKING:
    import torch

Thresholds = Mapping[str, Sequence[tuple[float, int]]]


class FileDeltas:
    """``mixmerge.calibrate.deltas.Deltas`` of the merged tensors of a plan.

    Args:
        tasks: that are merged; each has a base.
        adapters: read when first needed.
        cuts: for deltas that are trimmed and sign-elected first: by tensor, each expert's threshold as
            ``methods.sparsify.above`` takes it.
    """

    def __init__(self, tasks: Sequence[Task], adapters: Adapters, *, cuts: Thresholds | None = None) -> None:
        self._tasks = {task.target.name: task for task in tasks}
        self._adapters, self._cuts = adapters, cuts
        self._kept = KeptEntries(self.experts)
        self._files: dict[Path, NDArray[np.uint8]] = {}
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pool_size = 1

    @property
    def experts(self) -> int:
        return max((len(task.sources) for task in self._tasks.values()), default=0)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: task.target.shape for name, task in self._tasks.items()}

    def gathers(self, name: str) -> bool:
        """Whether ``read_rows`` can read single rows of a tensor: it is stored as it is merged, and where entries are
        trimmed a row's bits are whole bytes."""
        whole = self._cuts is None or self._tasks[name].target.shape[-1] % 8 == 0
        return whole and self._is_stored(name)

    def _is_stored(self, name: str) -> bool:
        task = self._tasks[name]
        sources = (*task.sources, *((task.base,) if task.base else ()))
        return not any(source.adapter for source in sources)

    def _bits(self, name: str) -> NDArray[np.uint8] | None:
        """Which entries of the deltas are kept; None where all are."""
        from mixmerge.calibrate.deltas import pieces

        if self._cuts is None:
            return None
        elements = math.prod(self._tasks[name].target.shape)
        parts = pieces(self, name, unit=8)
        return self._kept.bits(name, elements, parts, lambda start, stop: self.read(name, start, stop)[1])

    def read(self, name: str, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Elements ``start`` to ``stop`` of the base (n,) and of the deltas (T, n), in buffers that are used again."""
        task, count = self._tasks[name], stop - start
        base, deltas = self._room(count)
        if task.base is None:
            raise TypeError(f"{name} has no base")
        self._load(task.base, start, stop, base)
        for row, source in zip(deltas, task.sources, strict=True):
            self._load(source, start, stop, row)
            if not source.delta_only:
                row -= base
        if self._cuts is not None:
            self._elect(self._cuts[name], start, deltas)
        return base, deltas

    def read_rows(self, name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the base (r, c) and of the deltas (T, r, c)."""
        import torch

        task = self._tasks[name]
        if task.base is None:
            raise TypeError(f"{name} has no base")
        base = self._stored(task.base).reshape(task.target.shape)[rows].float()
        experts = [self._stored(source).reshape(task.target.shape)[rows].float() for source in task.sources]
        deltas, bits = torch.stack(experts).sub_(base), self._bits(name)
        return base, deltas if bits is None else deltas.mul_(of_rows(bits, rows, base.shape[1]))

    def products(self, name: str, start: int, gradient: torch.Tensor) -> torch.Tensor:
        """Inner products (T,), float64, of a gradient (n,) with every delta from ``start`` on."""
        import torch

        from mixmerge.calibrate.deltas import pieces, plain_products

        inputs, code = self._inputs(name), code_of(gradient)
        if inputs is None or code is None:
            return plain_products(self, name, start, gradient)
        parts = pieces(self, name, start, start + gradient.numel())
        return torch.from_numpy(inputs.products(parts, gradient, code, self._threads()))

    def mix(self, name: str, start: int, coefficients: torch.Tensor, out: torch.Tensor) -> None:
        """Fill ``out`` (n,) with the base and coefficients (T,) times deltas from ``start`` on."""
        from mixmerge.calibrate.deltas import pieces, plain_mix

        inputs, code = self._inputs(name), code_of(out)
        if inputs is None or code is None:
            plain_mix(self, name, start, coefficients, out)
            return
        factors = np.ascontiguousarray(coefficients.detach().numpy(), np.float32)
        parts = pieces(self, name, start, start + out.numel())
        inputs.mix(parts, factors, out, code, self._threads())

    def _inputs(self, name: str) -> Inputs | None:
        """Where a tensor's inputs are mapped; None if the loops cannot mix what is stored there as it is."""
        task = self._tasks[name]
        if task.base is None or not self._is_stored(name):
            return None
        found = Inputs.of([self._stored(source) for source in (task.base, *task.sources)])
        if found is None or (bits := self._bits(name)) is None:
            return found
        return replace(found, masks=bits)

    def _threads(self) -> ThreadPoolExecutor | None:
        """As many threads as torch has; None for one."""
        import torch

        if self._pool_size != torch.get_num_threads():
            self._pool_size = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(self._pool_size) if self._pool_size > 1 else None
        return self._pool

    def _room(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        if self._buffers is None or self._buffers[0].numel() < count:
            self._buffers = torch.empty(count), torch.empty(self.experts * count)
        base, deltas = self._buffers
        return base[:count], deltas[: self.experts * count].view(self.experts, count)

    def _stored(self, source: Source) -> torch.Tensor:
        """All elements of a tensor as they are in the file: a view of mapped pages."""
        import torch

        header = source.tensor
        if header.elements == 0:
            return torch.empty(0)
        if header.file not in self._files:
            try:
                mapped: Any = np.memmap(
                    header.file, np.uint8, "c"
                )  # private, so that torch may have it; never written
            except (OSError, ValueError) as error:
                raise CheckpointError(Fault(str(header.file), f"cannot be mapped: {error}")) from error
            self._files[header.file] = mapped.view(np.ndarray)
        data = self._files[header.file][header.offset : header.offset + header.nbytes]
        return torch.frombuffer(data, dtype=getattr(torch, TORCH[header.dtype]))

    def _load(self, source: Source, start: int, stop: int, out: torch.Tensor) -> None:
        stored = self._stored(source)
        if source.adapter is None:
            out.copy_(stored[start:stop])
            return
        loaded = self._adapters.get(source.adapter)
        columns = source.tensor.elements // source.tensor.shape[0]
        first, last = start // columns, -(-stop // columns)
        weight = None
        if loaded.needs_weight or not source.delta_only:
            weight = stored[first * columns : last * columns].float().reshape(-1, columns).numpy()
        rows = (loaded.rows if source.delta_only else loaded.expert)(first, last, weight)
        out.copy_(torch_of(rows).reshape(-1)[start - first * columns : stop - first * columns])

    def _elect(self, cuts: Sequence[tuple[float, int]], start: int, deltas: torch.Tensor) -> None:
        """Trim each delta and keep what has the sign of the sum, in place."""
        import torch

        from mixmerge.methods.learned import elected

        index = torch.arange(start, start + deltas.shape[1])
        for row, (value, limit) in zip(deltas, cuts, strict=True):
            size = row.abs()
            row[~((size > value) | ((size == value) & (index < limit)))] = 0.0
        for row, kept in zip(deltas, elected(list(deltas)), strict=True):
            row.copy_(kept)


def torch_of(values: NDArray[np.float32]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(values))


def tensor_cuts(
    deltas: FileDeltas, densities: Mapping[str, Sequence[float]]
) -> dict[str, list[tuple[float, int]]]:
    """The threshold of each expert in each tensor by itself, for ``scope: tensor``; one whole delta at a time.

    Args:
        deltas: not trimmed.
        densities: by tensor, one for each expert.
    """
    import torch

    from mixmerge.calibrate.deltas import pieces
    from mixmerge.methods.sparsify import cut_at, keep_count

    found: dict[str, list[tuple[float, int]]] = {}
    for name, shares in densities.items():
        elements, found[name] = math.prod(deltas.shapes[name]), []
        for expert, share in enumerate(shares):
            size = torch.empty(elements)
            for start, stop in pieces(deltas, name):
                size[start:stop] = deltas.read(name, start, stop)[1][expert].abs()
            cut = cut_at(size, keep_count(share, elements))
            found[name].append((cut[0], cut[1]))
    return found
