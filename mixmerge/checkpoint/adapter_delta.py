"""One tensor's change by an adapter: where its factors are, and its rows as float32.

Shapes: R rows, C columns of the tensor seen as a matrix: the first dimension by all others, so that a vector is
one column and a row of an MoE tensor is an expert. K rank, E experts, I inputs and O outputs of a module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mixmerge.checkpoint.header import TensorHeader
from mixmerge.errors import CheckpointError, Fault

Kind = Literal["lowrank", "dora", "bias", "replace", "same"]
Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
Doubles = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

# Elements of the base read at once for the column norms of DoRA: 4 MiB of float32.
_BLOCK = 1 << 20
_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}


def read_values(tensor: TensorHeader, *, start: int = 0, stop: int | None = None) -> Floats:
    """Elements ``start`` to ``stop`` of a BF16, F16, F32 or F64 tensor, flat, as float32.

    Raises:
        CheckpointError: the file ends early or cannot be read, or a value is NaN or Inf.
    """
    count = (tensor.elements if stop is None else stop) - start
    stored = np.dtype(_STORED[tensor.dtype])
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset + start * stored.itemsize)
            raw = np.fromfile(file, dtype=stored, count=count)
    except OSError as error:
        raise CheckpointError(Fault(str(tensor.file), f"cannot be read: {error.strerror}")) from error
    if raw.size != count:
        raise _cut_off(tensor)
    return _decode(tensor, raw)


def _read_columns(tensor: TensorHeader, *, first: int, last: int, start: int, step: int) -> Floats:
    """Columns ``start::step`` of rows ``first`` to ``last`` of a matrix, as float32.

    A map: of the factors of a hundred stacked experts, only the pages of one are touched.

    Raises:
        CheckpointError: as ``read_values``.
    """
    try:
        stored = np.memmap(tensor.file, _STORED[tensor.dtype], "r", tensor.offset, tensor.shape)
    except OSError as error:
        raise CheckpointError(Fault(str(tensor.file), f"cannot be read: {error.strerror}")) from error
    except ValueError as error:  # the map would reach beyond the file
        raise _cut_off(tensor) from error
    return _decode(tensor, np.array(stored[first:last, start::step]))


def _cut_off(tensor: TensorHeader) -> CheckpointError:
    return CheckpointError(
        Fault(
            str(tensor.file),
            f"it ends inside tensor {tensor.name!r}",
            run="The file changed or was cut off: copy or download it again",
        )
    )


def _decode(tensor: TensorHeader, raw: np.ndarray[tuple[int, ...], Any]) -> Floats:
    if tensor.dtype == "BF16":
        values = (raw.astype(np.uint32) << 16).view(np.float32)
    else:
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, which is refused below
            values = raw.astype(np.float32, copy=False)
    if not np.isfinite(values).all():
        raise CheckpointError(
            Fault(
                str(tensor.file),
                f"tensor {tensor.name!r} holds NaN or Inf",
                run="The training that wrote it diverged: use an earlier checkpoint of it",
            )
        )
    return values


@dataclass(frozen=True)
class AdapterDelta:
    """One tensor that an adapter changes: from W to W', the expert's.

    ``lowrank``: W' = W + s B A. ``dora``: W' = m (W + s B A) / ||W + s B A||, arXiv:2402.09353 section 4, the
    norm taken over the inputs of each output. ``bias``: W' = W + s b, the bias of factor B. ``replace``: W'
    is stored whole. ``same``: W' = W: the head of a base that ties it to an embedding the adapter changes.
    With ``full``, the first three start from that tensor instead of W.

    Args:
        target: the tensor's name in the expert.
        kind: as above.
        weight: the base's tensor, W. Its name differs from ``target`` only for the head of a base that ties
            it to its embedding: the expert has a head of its own then.
        scale: s, alpha / r or alpha / sqrt(r).
        a: factor A, ``(E * K, I)``.
        b: factor B, ``(O, E * K)``, column k * E + e for rank k of expert e; for ``bias`` the vector b.
        magnitude: DoRA's m, one for each output.
        full: a whole tensor of W's shape.
        transposed: W is stored as (I, O): Conv1D and embeddings.
        experts: E.
        slot: W holds only this (expert, first output, last output) of the stacked factors.
    """

    target: str
    kind: Kind
    weight: TensorHeader
    scale: float = 1.0
    a: TensorHeader | None = None
    b: TensorHeader | None = None
    magnitude: TensorHeader | None = None
    full: TensorHeader | None = None
    transposed: bool = False
    experts: int = 1
    slot: tuple[int, int, int] | None = None

    @property
    def headers(self) -> tuple[TensorHeader, ...]:
        """Every adapter tensor that is read for it."""
        return tuple(part for part in (self.a, self.b, self.magnitude, self.full) if part is not None)

    @property
    def shape(self) -> tuple[int, int]:
        """``(R, C)``."""
        rows = self.weight.shape[0] if self.weight.shape else 1
        return rows, self.weight.elements // rows if rows else 0

    def facts(self) -> dict[str, Any]:
        """Everything that decides W' but the values and where they are stored, as JSON data."""
        parts = {"a": self.a, "b": self.b, "magnitude": self.magnitude, "full": self.full}
        read = {key: [part.name, part.dtype, part.shape] for key, part in parts.items() if part is not None}
        layout = [self.transposed, self.experts, self.slot]
        return {
            "target": self.target,
            "kind": self.kind,
            "scale": self.scale,
            "layout": layout,
            "parts": read,
        }

    @property
    def needs_weight(self) -> bool:
        """Whether the delta depends on W, so that ``rows`` has to be given it."""
        return self.kind == "dora" or self.full is not None

    def load(self) -> LoadedDelta:
        """Read the factors, and for DoRA on transposed tensors the whole of W once, in blocks.

        Raises:
            CheckpointError: a file cannot be read, or holds NaN or Inf.
        """
        if self.kind == "bias" and self.b is not None:
            return LoadedDelta(self, vector=self._scaled(read_values(self.b)))
        if self.a is None or self.b is None:
            return LoadedDelta(self)
        left, right = self._factors(self.a, self.b)
        if self.magnitude is None:
            return LoadedDelta(self, left, right)
        magnitude = read_values(self.magnitude)
        if not self.transposed:
            return LoadedDelta(self, left, right, magnitude=magnitude)
        norms = LoadedDelta(self, left, right).column_norms()
        return LoadedDelta(self, left, right, column_factors=magnitude / norms)

    def _scaled(self, values: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = values * np.float32(self.scale)
        if not np.isfinite(scaled).all():
            raise CheckpointError(
                Fault(
                    str(self.headers[0].file),
                    f"the factors of {self.target} times their scale {self.scale:g} exceed float32",
                    run="Check lora_alpha in adapter_config.json",
                )
            )
        return scaled

    def _factors(self, a: TensorHeader, b: TensorHeader) -> tuple[Floats, Floats]:
        """(left, right), ``(E * O, K)`` and ``(E, K, I)``, or the other way round where W is transposed."""
        from mixmerge.kernels.lowrank import pad

        rank, inputs = a.shape[0] // self.experts, a.shape[1]
        if self.slot is None:
            down: Floats = read_values(a).reshape(self.experts, rank, inputs)
            up: Floats = read_values(b).reshape(-1, rank, self.experts).transpose(2, 0, 1)
        else:
            expert, first, last = self.slot
            size = rank * inputs
            down = read_values(a, start=expert * size, stop=(expert + 1) * size).reshape(1, rank, inputs)
            up = _read_columns(b, first=first, last=last, start=expert, step=self.experts)[None]
        # down (E, K, I), up (E, O, K)
        left, right = (down.transpose(0, 2, 1), up.transpose(0, 2, 1)) if self.transposed else (up, down)
        return pad(self._scaled(left).reshape(-1, rank), axis=1), pad(right, axis=1)


@dataclass(frozen=True)
class LoadedDelta:
    """An adapter's change of one tensor, ready to give any rows of it, from any thread.

    Every row is a function of the factors and of that row of W alone (and of the column norms, taken once),
    so the bytes do not depend on how the rows are asked for.

    Args:
        delta: what it was loaded from.
        left, right: the low-rank factors as ``kernels.lowrank.product`` takes them, scale included.
        vector: ``bias``: s b.
        magnitude: DoRA by rows: ``(R,)``.
        column_factors: DoRA by columns: magnitude over norm, ``(C,)``.
    """

    delta: AdapterDelta
    left: Floats | None = None
    right: Floats | None = None
    vector: Floats | None = None
    magnitude: Floats | None = None
    column_factors: Floats | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.delta.shape

    @property
    def needs_weight(self) -> bool:
        return self.delta.needs_weight

    def rows(
        self, start: int, stop: int, weight: Floats | None = None, *, out: Floats | None = None
    ) -> Floats:
        """The delta W' - W of rows ``start`` to ``stop``: ``(stop - start, C)`` float32.

        Args:
            weight: the same rows of W; needed where ``needs_weight``, else ignored.
            out: where to put it, contiguous; fresh memory without.

        Raises:
            CheckpointError: a whole tensor that cannot be read; DoRA of a row that is all zero.
        """
        out = self._out(start, stop, out)
        if not self.needs_weight:
            return self._change(start, stop, out)
        given = self._given(start, stop, weight)
        self.expert(start, stop, given, out=out)
        return np.subtract(out, given, out=out)

    def expert(
        self, start: int, stop: int, weight: Floats | None = None, *, out: Floats | None = None
    ) -> Floats:
        """The expert's rows W' themselves: as accurate as W' - W plus W, but for one rounding less.

        Args and Raises as ``rows``; ``weight`` is needed for every kind but ``replace``.
        """
        out = self._out(start, stop, out)
        ground = self._given(start, stop, weight) if self.delta.full is None else self._full(start, stop)
        if self.delta.kind in ("replace", "same"):
            out[:] = ground
            return out
        self._change(start, stop, out)
        out += ground
        if self.delta.kind == "dora":
            self._normalise(start, out)
        return out

    def column_norms(self) -> Floats:
        """The norm of every column of W + s B A over all its rows, summed in float64: ``(C,)``.

        Raises:
            CheckpointError: as ``read_values``; or a column is all zero.
        """
        total, columns = self.shape
        squares = np.zeros(columns, dtype=np.float64)
        step = max(1, _BLOCK // columns)
        source = self.delta.weight if self.delta.full is None else self.delta.full
        for start in range(0, total, step):
            stop = min(total, start + step)
            moved = self._change(start, stop, self._out(start, stop, None))
            moved += read_values(source, start=start * columns, stop=stop * columns).reshape(-1, columns)
            squares += np.square(moved, dtype=np.float64).sum(axis=0)
        norms = np.sqrt(squares)
        self._check_norms(norms, "column", 0)
        return norms.astype(np.float32)

    def _out(self, start: int, stop: int, out: Floats | None) -> Floats:
        return np.empty((stop - start, self.shape[1]), dtype=np.float32) if out is None else out

    def _given(self, start: int, stop: int, weight: Floats | None) -> Floats:
        if weight is None:
            raise ValueError(f"{self.delta.target}: a {self.delta.kind} delta needs the rows of the base")
        return weight.reshape(stop - start, self.shape[1])

    def _full(self, start: int, stop: int) -> Floats:
        columns = self.shape[1]
        if self.delta.full is None:
            raise ValueError(f"{self.delta.target}: no whole tensor is stored")
        return read_values(self.delta.full, start=start * columns, stop=stop * columns).reshape(-1, columns)

    def _change(self, start: int, stop: int, out: Floats) -> Floats:
        """s B A or s b, which does not depend on W."""
        if self.vector is not None:
            out[:] = self.vector[start:stop, None]
        elif self.left is not None and self.right is not None:
            from mixmerge.kernels.lowrank import product

            inner = len(self.left) // self.shape[0]  # rows of one expert; else 1
            flat = out.reshape(-1, self.right.shape[2])
            product(self.left, self.right, start=start * inner, stop=stop * inner, out=flat)
        else:
            out[:] = 0
        return out

    def _normalise(self, start: int, moved: Floats) -> None:
        """W + s B A to W', in place."""
        if self.column_factors is not None:
            moved *= self.column_factors
        elif self.magnitude is not None:
            from mixmerge.kernels.lowrank import row_norms

            norms = row_norms(moved)
            self._check_norms(norms, "row", start)
            factors = self.magnitude[start : start + len(moved)] / norms
            moved *= factors.astype(np.float32)[:, None]

    def _check_norms(
        self, norms: np.ndarray[tuple[int, ...], np.dtype[np.float64]], axis: str, first: int
    ) -> None:
        if not norms.all():
            at = first + int(np.argmin(norms))
            raise CheckpointError(
                Fault(
                    str(self.delta.weight.file),
                    f"{axis} {at} of {self.delta.weight.name} and its LoRA sum to zero: DoRA cannot scale it",
                    run="Leave that module out of the adapter, or train it without DoRA",
                )
            )
