"""The engine of dynamic networks: the base and its bank are loaded once, and rows of all mixtures come in any order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from mixmerge.bank.gate import RowGate
from mixmerge.dynamic.folders import MIXTURE, folded_nbytes, is_constant, is_dynamic, nbytes, parts_of
from mixmerge.engines.batching import batches
from mixmerge.engines.decoding import Beside, Told
from mixmerge.engines.loading import Dtype, Loaded, load_model, loaded_of
from mixmerge.engines.local import FULL, TransformersEngine
from mixmerge.engines.records import Chunk, Generation, Likelihood, Request, Scoring
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.bank.folded import Folded
    from mixmerge.dynamic.running import Running


class DynamicEngine(TransformersEngine):
    """A network whose weights depend on the input, as an expert. What holds for ``TransformersEngine`` holds for it.

    A request's ``adapter`` names an expert of the bank that alone answers it; without one the gate decides, row by row.
    A gate of prompts decides once for each request, by its prompt alone. Where all rows without a name get the same, by
    a gate of constants or ``weights``, the layers hold that mixture while they are answered: in float32 alone, since
    shorter types would round changes away.

    Args:
        model: a model folder with ``bank/``, or a fitted mixture's folder.
        adapters: further names that a request's ``adapter`` may have -> experts of the bank.
        base: where the base is, if it is not where the folder says.
        weights: of experts, in place of the gate: a fixed mixture.
        fold: False: layers never hold a mixture, which takes the memory of the changed tensors once more.
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
        fold: bool = True,
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
        name: str | None = None,
    ) -> None:
        super().__init__(model, dtype=dtype, device=device, batch_tokens=batch_tokens, name=name)
        self._names = dict(adapters or {})
        self._base, self._weights, self._encoder = base, weights, encoder
        self._fold = fold
        self._folded: Folded | None = None
        self._running: Running | None = None
        self._mixtures: dict[str, Tensor] = {}
        self._experts: tuple[str, ...] | None = None

    @classmethod
    def over(
        cls,
        running: Running,
        mixtures: Mapping[str, Tensor] | None = None,
        *,
        fold: bool = True,
        batch_tokens: int = 8192,
    ) -> Self:
        """An engine of a network that is loaded already.

        Args:
            running: it.
            mixtures: further names that a request's ``adapter`` may have -> ``(E,)`` weights.
            fold, batch_tokens: as of the engine.
        """
        made = cls(running.name, fold=fold, batch_tokens=batch_tokens)
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

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        with self._folding():
            return super().generate(requests)

    def stream(self, request: Request) -> Iterator[Chunk]:
        with self._folding():
            yield from super().stream(request)

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        with self._folding():
            return super().loglikelihood(scorings)

    def unload(self) -> None:
        self._running = self._folded = None
        super().unload()

    def memory(self) -> int | None:
        """Bytes of the weights, those of the bank included."""
        if self._loaded is not None and self._running is not None:
            base = sum(int(one.numel() * one.element_size()) for one in self._loaded.model.parameters())
            folded = self._made(self._running)
            return base + self._running.attached.bank.nbytes + (0 if folded is None else folded.nbytes)
        if not is_dynamic(self.model):
            return None
        parts, held = parts_of(self.model, base=self._base), FULL.get(self.dtype)
        fixed = self._fold and (self._weights is not None or is_constant(parts))
        return nbytes(parts, held) + (folded_nbytes(parts, held) if fixed else 0)

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

    @contextmanager
    def _folding(self) -> Iterator[None]:
        """A mixture that layers hold is kept from batch to batch, and no longer. Who still needs it has it."""
        try:
            yield
        finally:
            self._folded = None

    def _constant(self, running: Running) -> Folded | None:
        """The mixture of rows without a name, if it is folded: by network and options, whoever shares the batch."""
        if self._folded is None:
            self._folded = self._made(running)
        return self._folded

    def _made(self, running: Running) -> Folded | None:
        from mixmerge.dynamic.weights import fixed_weights

        told = None if self._weights is None else fixed_weights(self._weights, running.experts)
        return running.folding(told) if self._fold else None

    def _beside(self, rows: Sequence[Told]) -> Beside:
        import torch

        self._expert()
        running = self._running
        if running is None:
            raise MixmergeError(Fault(f"engine {self.name}", "is not loaded"))
        if all(row.adapter is None for row in rows) and (folded := self._constant(running)) is not None:
            return running.rows(rows, folded=folded)
        mixtures = [self._mixture(row.adapter, running.experts) for row in rows]
        whole = [one for one in mixtures if one is not None]
        return running.rows(rows, torch.stack(whole) if len(whole) == len(rows) else None)

    def _unable(self, request: Request) -> Fault | None:
        fault = super()._unable(request)
        if fault is not None or request.adapter is not None or not self._mute():
            return fault
        what = f"names no expert, and the gate of {self.name} has no weights of its own"
        known = f"Known: {', '.join(self.adapters)}"
        return Fault(f"request {request.id}", what, known, "Name one, or fit the mixture with another gate")

    def _mute(self) -> bool:
        """Whether the network was fitted with a gate that says nothing, and is its base then. A twin is more."""
        self._expert()
        if self._running is None or self._weights is not None or self._running.gate.kind != RowGate.kind:
            return False
        return (Path(self.model).expanduser() / MIXTURE).is_file()

    def _mixture(self, adapter: str | None, experts: Sequence[str]) -> Tensor | None:
        """``(E,)``: what a request's ``adapter`` means; None for the gate."""
        from mixmerge.dynamic.weights import fixed_weights

        if adapter is None:
            return None if self._weights is None else fixed_weights(self._weights, experts)
        found = self._mixtures.get(adapter)
        return fixed_weights({self._names.get(adapter, adapter): 1.0}, experts) if found is None else found
