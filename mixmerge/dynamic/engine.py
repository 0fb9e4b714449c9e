"""The engine of dynamic networks: the base and its bank are loaded once, and rows of all mixtures come in any order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mixmerge.dynamic.folders import is_dynamic, nbytes, parts_of
from mixmerge.engines.batching import batches
from mixmerge.engines.decoding import Beside, Told
from mixmerge.engines.loading import Dtype, Loaded, load_model, loaded_of
from mixmerge.engines.local import FULL, TransformersEngine
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.dynamic.running import Running


class DynamicEngine(TransformersEngine):
    """A network whose weights depend on the input, as an expert. What holds for ``TransformersEngine`` holds for it.

    A request's ``adapter`` names an expert of the bank that alone answers it; without one the gate decides, row by row.
    A gate of prompts decides once for each request, by its prompt alone.

    Args:
        model: a model folder with ``bank/``, or a fitted mixture's folder.
        adapters: further names that a request's ``adapter`` may have -> experts of the bank.
        base: where the base is, if it is not where the folder says.
        weights: of experts, in place of the gate: a fixed mixture.
        encoder: folder or hub id of the text encoder, for a gate of texts.
        dtype, device, batch_tokens, name: as of ``TransformersEngine``.
    """

    def __init__(
        self,
        model: str,
        *,
        adapters: Mapping[str, str] | None = None,
        base: str | None = None,
        weights: Mapping[str, float] | None = None,
        encoder: str | None = None,
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
        name: str | None = None,
    ) -> None:
        super().__init__(model, dtype=dtype, device=device, batch_tokens=batch_tokens, name=name)
        self._names = dict(adapters or {})
        self._base, self._weights, self._encoder = base, weights, encoder
        self._running: Running | None = None
        self._mixtures: dict[str, Tensor] = {}
        self._experts: tuple[str, ...] | None = None

    @classmethod
    def over(
        cls, running: Running, mixtures: Mapping[str, Tensor] | None = None, *, batch_tokens: int = 8192
    ) -> Self:
        """An engine of a network that is loaded already.

        Args:
            running: it.
            mixtures: further names that a request's ``adapter`` may have -> ``(E,)`` weights.
            batch_tokens: of a batch.
        """
        made = cls(running.name, batch_tokens=batch_tokens)
        made._running, made._mixtures = running, dict(mixtures or {})
        made._loaded = loaded_of(running.model, running.tokenizer, running.name)
        return made

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._names, *self._mixtures, *self._bank_experts())))

    def add_adapter(self, name: str, folder: str) -> None:
        """Refused: the gate knows the experts it was fitted with.

        Raises:
            MixmergeError: always.
        """
        what = "a fitted bank takes no further adapters"
        raise MixmergeError(Fault(f"engine {self.name}: adapter {name}", what, run="Fit the mixture again"))

    def unload(self) -> None:
        self._running = None
        super().unload()

    def memory(self) -> int | None:
        """Bytes of the weights, those of the bank included."""
        if self._loaded is not None and self._running is not None:
            base = sum(int(one.numel() * one.element_size()) for one in self._loaded.model.parameters())
            return base + self._running.attached.bank.nbytes
        if not is_dynamic(self.model):
            return None
        return nbytes(parts_of(self.model, base=self._base), FULL.get(self.dtype))

    def _bank_experts(self) -> tuple[str, ...]:
        if self._running is not None:
            return self._running.experts
        if self._experts is None:
            from mixmerge.bank.cards import read_card

            self._experts = tuple(read_card(Path(self.model).expanduser()).experts)
        return self._experts

    def _load(self) -> Loaded:
        from mixmerge.dynamic.loading import running
        from mixmerge.dynamic.weights import fixed_weights

        parts = parts_of(self.model, base=self._base)
        loaded = load_model(str(parts.base), None, self.dtype, self.device, self.name)
        made = running(parts, loaded.model, loaded.tokenizer, encoder=self._encoder)
        where = f"engine {self.name}"
        faults = [
            Fault(f"{where}: adapter {name}", f"is expert {expert!r}", choices(expert, list(made.experts)))
            for name, expert in self._names.items()
            if expert not in made.experts
        ]
        if faults:
            raise MixmergeError(faults)
        if self._weights is not None:
            fixed_weights(self._weights, made.experts, where=f"{where}: weights")
        self._running = made
        return loaded

    def _batches(
        self, texts: Sequence[Sequence[int]], extra: Sequence[int], adapters: Sequence[str | None]
    ) -> Iterator[list[int]]:
        """What a gate decides and what is said beforehand go through the model apart."""
        gated = [at for at, name in enumerate(adapters) if name is None]
        said = [at for at, name in enumerate(adapters) if name is not None]
        for some in (gated, said):
            chosen = batches([texts[at] for at in some], [extra[at] for at in some], budget=self.batch_tokens)
            for batch in chosen:
                yield [some[at] for at in batch]

    def _beside(self, rows: Sequence[Told]) -> Beside:
        import torch

        self._expert()
        running = self._running
        if running is None:
            raise MixmergeError(Fault(f"engine {self.name}", "is not loaded"))
        mixtures = [self._mixture(row.adapter, running.experts) for row in rows]
        whole = [one for one in mixtures if one is not None]
        return running.rows(rows, torch.stack(whole) if len(whole) == len(rows) else None)

    def _mixture(self, adapter: str | None, experts: Sequence[str]) -> Tensor | None:
        """``(E,)``: what a request's ``adapter`` means; None for the gate."""
        from mixmerge.dynamic.weights import fixed_weights

        if adapter is None:
            return None if self._weights is None else fixed_weights(self._weights, experts)
        found = self._mixtures.get(adapter)
        return fixed_weights({self._names.get(adapter, adapter): 1.0}, experts) if found is None else found
