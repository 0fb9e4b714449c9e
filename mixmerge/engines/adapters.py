"""LoRA adapters over one loaded model: each row of a batch is answered under its own, and the base stays as it is.

B rows, T tokens, d inputs and o outputs of a layer, r rank of an adapter there, R sum of the ranks of a batch.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from mixmerge.errors import Fault, MixmergeError

if TYPE_CHECKING:
    from torch import Tensor

# What a call of a small product costs, in multiply-adds: 10 microseconds at 100 billion a second.
_CALL = 1_000_000


@dataclass(frozen=True)
class Factors:
    """What one adapter does at one layer: ``y * scale + offset + (x @ a.T) @ b``.

    Args:
        a: ``(r, d)``; of an embedding ``(r, V)``, where x is a token's unit vector.
        b: ``(r, o)``, alpha over r and DoRA's scale in it.
        scale: ``(o,)``, DoRA's magnitude over the norm of the changed weight; None for 1.
        offset: ``(o,)``: what DoRA keeps of the base's bias, or the bias of ``lora_bias``; None for 0.
    """

    a: Tensor
    b: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def nbytes(self) -> int:
        held = (self.a, self.b, self.scale, self.offset)
        return sum(int(one.numel() * one.element_size()) for one in held if one is not None)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Who answers the rows of a batch.

    Args:
        adapters: of each row; None for the base.
        runs: adapter, first row and one past the last of rows beside each other; those of the base left out.
        masks: by the ranks of the adapters at a layer: ``(B, 1, R)``, True for what is not a row's own.
    """

    adapters: tuple[str | None, ...]
    runs: tuple[tuple[str, int, int], ...]
    masks: dict[tuple[tuple[str, int], ...], Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, adapters: tuple[str | None, ...]) -> _Rows:
        runs, at = [], 0
        for name, group in groupby(adapters):
            count = len(list(group))
            if name is not None:
                runs.append((name, at, at + count))
            at += count
        return cls(adapters, tuple(runs))

    def others(self, ranks: tuple[tuple[str, int], ...], device: Any) -> Tensor:
        import torch

        if ranks not in self.masks:
            owners = [name for name, rank in ranks for _ in range(rank)]
            mask = [[owner != name for owner in owners] for name in self.adapters]
            self.masks[ranks] = torch.tensor(mask, device=device)[:, None, :]
        return self.masks[ranks]


_NOBODY = _Rows.of(())


class Bank:
    """Adapters by name, applied by hooks on the layers that one of them changes.

    A row's result does not depend on the adapters of other rows beyond float rounding. Two ways give it, and
    the cheaper one is taken layer by layer: one product with the factors of all the batch's adapters, where what is
    not a row's own is blanked between a and b; or one product for each run of rows of one adapter.

    Args:
        model: of transformers, in evaluation mode; its weights are not changed.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers: dict[Any, _Layer] = {}
        self._names: list[str] = []
        self._lock = threading.RLock()
        self._last = self.rows = _NOBODY

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._names)

    @property
    def nbytes(self) -> int:
        """Of all factors; those of a batch's adapters are held a second time, side by side, while it runs."""
        return sum(one.nbytes for layer in self._layers.values() for one in layer.factors.values())

    def add(self, name: str, folder: str, *, where: str) -> None:
        """Read an adapter. Arguments and errors as those of ``adapter_reading.read_factors``."""
        from mixmerge.engines.adapter_reading import read_factors

        with self._lock:
            for module, factors in read_factors(self._model, folder, where=where).items():
                if module not in self._layers:
                    self._layers[module] = _Layer(self, module)
                self._layers[module].factors[name] = factors
            self._names.append(name)

    @contextmanager
    def answering(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Within it, row i of what goes through the model is answered by ``adapters[i]``. One thread at a time."""
        wanted = tuple(adapters)
        with self._lock:
            if wanted != self._last.adapters:
                self._last = _Rows.of(wanted)
            self.rows = self._last
            try:
                yield
            finally:
                self.rows = _NOBODY


class BankRows:
    """The adapters of rows that are being answered; a ``decoding.Beside``."""

    def __init__(self, bank: Bank, adapters: Sequence[str | None]) -> None:
        self._bank, self._adapters = bank, list(adapters)

    def running(self, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        return self._bank.answering(self._adapters)

    def logits(self, given: Mapping[str, Any], logits: Tensor) -> Tensor:
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        self._adapters = [self._adapters[at] for at in rows]

    def weights(self, row: int) -> Mapping[str, Any] | None:
        return None


@dataclass(frozen=True)
class _Share:
    """What a layer does for one ``_Rows``: the runs that it changes, and its factors side by side.

    Args:
        runs: factors, first row, one past the last.
        ranks: of the adapters in the batch, by name.
        used: sum over the rows of their own ranks.
    """

    runs: tuple[tuple[Factors, int, int], ...]
    ranks: tuple[tuple[str, int], ...]
    used: int

    @property
    def rank(self) -> int:
        return sum(rank for _, rank in self.ranks)


class _Layer:
    """The hook of one layer."""

    def __init__(self, bank: Bank, module: Any) -> None:
        from torch.nn import Embedding

        self.factors: dict[str, Factors] = {}
        self._bank = bank
        self._of: _Rows | None = None
        self._share = _Share((), (), 0)
        self._joined: tuple[tuple[str, ...], Tensor | None, Tensor | None] = ((), None, None)
        module.register_forward_hook(self._embedded if isinstance(module, Embedding) else self._changed)

    def _now(self) -> _Share:
        rows = self._bank.rows
        if self._of is not rows:
            runs = [(name, start, stop) for name, start, stop in rows.runs if name in self.factors]
            names = dict.fromkeys(name for name, _, _ in runs)
            self._share = _Share(
                tuple((self.factors[name], start, stop) for name, start, stop in runs),
                tuple((name, self.factors[name].rank) for name in names),
                sum((stop - start) * self.factors[name].rank for name, start, stop in runs),
            )
            self._of = rows
        return self._share

    def _changed(self, module: Any, given: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After a linear layer: x ``(B, T, d)`` or ``(B * T, d)``, output the same with o; it is changed in place."""
        share = self._now()
        if not share.runs:
            return None
        x, rows = given[0], len(self._bank.rows.adapters)
        if (x.dim() == 3 and len(x) != rows) or x.dim() not in (2, 3) or len(x) % rows:
            what = f"gave a layer {tuple(x.shape)} for {rows} rows"
            raise MixmergeError(Fault("adapters", what, "Layers that see every token of every row"))
        y = output.contiguous()
        by_row = y.view(rows, -1, y.shape[-1])
        x = x.reshape(rows, -1, x.shape[-1]).to(share.runs[0][0].a.dtype)
        for one, start, stop in share.runs:
            if one.scale is not None:
                by_row[start:stop].mul_(one.scale)
            if one.offset is not None:
                by_row[start:stop].add_(one.offset)
        blanked = (rows * share.rank - share.used) * x.shape[1] * (x.shape[2] + y.shape[-1])
        if blanked <= _CALL * (len(share.runs) - 1):
            self._together(share, x, by_row)
        else:
            _run_by_run(share, x, by_row)
        return y

    def _together(self, share: _Share, x: Tensor, y: Tensor) -> None:
        a, b = self._side_by_side(share)
        inner = x.flatten(0, 1) @ a.T  # (B * T, R)
        if _rows_differ(share, len(x)):
            others = self._bank.rows.others(share.ranks, inner.device)
            inner.view(len(x), -1, len(a)).masked_fill_(others, 0)  # 0 times what overflowed would be nan
        y.view(-1, y.shape[-1]).addmm_(inner.to(y.dtype), b.to(y.dtype))

    def _side_by_side(self, share: _Share) -> tuple[Tensor, Tensor]:
        """The factors of all adapters of the batch, ``(R, d)`` and ``(R, o)``; kept for the next token."""
        import torch

        names = tuple(name for name, _ in share.ranks)
        if len(names) == 1:
            return self.factors[names[0]].a, self.factors[names[0]].b
        held, a, b = self._joined
        if held != names or a is None or b is None:
            a = torch.cat([self.factors[name].a for name in names])
            b = torch.cat([self.factors[name].b for name in names])
            self._joined = names, a, b
        return a, b

    def _embedded(self, module: Any, given: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """After an embedding: tokens ``(B, T)``, output ``(B, T, o)``."""
        share = self._now()
        if not share.runs:
            return None
        y = output.clone()  # it may be read again as a hidden state
        for one, start, stop in share.runs:
            y[start:stop] += (one.a.T[given[0][start:stop]] @ one.b).to(y.dtype)
        return y


def _rows_differ(share: _Share, rows: int) -> bool:
    """Whether a row's own factors are not all that is there."""
    return share.used < rows * share.rank


def _run_by_run(share: _Share, x: Tensor, y: Tensor) -> None:
    for one, start, stop in share.runs:
        inner = x[start:stop].flatten(0, 1) @ one.a.T
        y[start:stop].view(-1, y.shape[-1]).addmm_(inner.to(y.dtype), one.b.to(y.dtype))
