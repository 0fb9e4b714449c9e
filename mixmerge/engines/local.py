"""The engine of models that transformers runs in this process. B rows, T tokens, V entries of vocabulary."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mixmerge.checkpoint.header import DTYPE_BYTES, read_header
from mixmerge.engines.adapter_reading import stored_elements
from mixmerge.engines.adapters import Bank, BankRows
from mixmerge.engines.base import Capability, Engine
from mixmerge.engines.batching import batches
from mixmerge.engines.decoding import Beside, Decoder, Row, Told, accepted, left_padded, positions
from mixmerge.engines.loading import Dtype, Loaded, empty_cache, load_model, no_bars
from mixmerge.engines.records import Chunk, Generation, Likelihood, Message, Request, Scoring, held_back
from mixmerge.engines.shortage import within_memory
from mixmerge.errors import DependencyError, Fault, MixmergeError, OutOfMemoryError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Dtype", "TransformersEngine", "no_bars"]

T = TypeVar("T")
FULL = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_LOGITS_A_TOKEN = 8192  # as many logits take about the memory of one token's activations


class TransformersEngine(Engine):
    """A causal language model of a folder or of the hub. Code from its repository is never run.

    Rows of like length share a batch, padded on the left; a row's logits agree across batches to 1e-4 in float32.
    The turns of a chat go through the tokenizer's chat template; without one their texts are joined by empty lines.
    Sampling does what the request says: defaults of the model's generation_config are not used, but for the tokens
    that end a text.

    Adapters are PEFT's LoRA adapters of this model. They are read once, beside the base, and rows of different ones
    share batches; what a row gets does not depend on the adapters of others. They are held in the base's type.

    Args:
        model: a folder, or a hub id.
        adapters: name -> folder or hub id, of what a request's ``adapter`` may name.
        revision: branch, tag or commit of a hub id.
        dtype: of the weights in memory; ``auto``: as they are stored.
        device: a torch device.
        batch_tokens: of a batch, prompts and what may be generated; 1 or more.
        name: what errors call it; by default the model.
    """

    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {"generate", "stream", "loglikelihood", "logprobs"}
    )

    def __init__(
        self,
        model: str,
        *,
        adapters: Mapping[str, str] | None = None,
        revision: str | None = None,
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
        name: str | None = None,
    ) -> None:
        super().__init__(name or model)
        faults = []
        if dtype != "auto" and dtype not in FULL:
            faults.append(Fault(f"engine {self.name}: dtype", f"is {dtype!r}", f"auto, {', '.join(FULL)}"))
        if batch_tokens < 1:
            faults.append(Fault(f"engine {self.name}: batch_tokens", f"is {batch_tokens}", "1 or more"))
        if faults:
            raise MixmergeError(faults)
        self.model, self.revision, self.dtype, self.device = model, revision, dtype, device
        self.batch_tokens = batch_tokens
        self._adapters = dict(adapters or {})
        self.load_seconds = 0.0
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    @property
    def whole(self) -> Loaded:
        """The model, loaded if it is not."""
        return self._expert()

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(self._adapters)

    def add_adapter(self, name: str, folder: str) -> None:
        """One more adapter; if the base is loaded it stays, and the adapter is read now.

        Raises:
            MixmergeError: the name is taken, or the adapter cannot be read; then everything is as before.
            DependencyError: peft is not installed.
        """
        if name in self._adapters:
            raise MixmergeError(Fault(f"engine {self.name}: adapter {name}", "there is one of that name"))
        if self._loaded is not None:
            self._read_adapter(self._loaded.bank, name, folder)
        self._adapters[name] = folder

    def load(self) -> None:
        self._expert()

    def unload(self) -> None:
        if self._loaded is None:
            return
        weights = [weakref.ref(one) for one in self._loaded.model.parameters()]
        self._loaded = None
        # Most models go by themselves. What refers to itself, as with adapters, waits for a collection, which looks at
        # every object of the process.
        if any(one() is not None for one in weights):
            gc.collect()
        empty_cache(self.device)

    def memory(self) -> int | None:
        """Bytes of the weights, those of the adapters included."""
        if self._loaded is not None:
            base = sum(int(one.numel() * one.element_size()) for one in self._loaded.model.parameters())
            return base + self._loaded.bank.nbytes
        files = sorted(Path(self.model).expanduser().glob("*.safetensors"))
        headers = [header for path in files for header in read_header(path).values()]
        stored = [stored_elements(folder) for folder in self._adapters.values()]
        if not headers or None in stored:
            return None
        added = sum(count or 0 for count in stored)
        if self.dtype == "auto":
            widest = max(DTYPE_BYTES[header.dtype] for header in headers)
            return sum(header.nbytes for header in headers) + added * widest
        return (sum(header.elements for header in headers) + added) * DTYPE_BYTES[FULL[self.dtype]]

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        return [self._unable(request) or self._read(request)[1] for request in requests]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """A text for each request, in their order. What a request gets depends on no other of them.

        Raises:
            MixmergeError: what ``check`` says, of all requests at once.
            OutOfMemoryError: a batch did not fit; nothing of it is held any more.
        """
        rows = self._rows(requests)
        found: dict[int, Generation] = {}
        texts, extra = [row.prompt for row in rows], [row.limit for row in rows]
        for batch in self._batches(texts, extra, [row.request.adapter for row in rows]):
            made = self._fit(partial(self._answers, [rows[at] for at in batch]), len(batch))
            found.update(zip(batch, made, strict=True))
        return [found[at] for at in range(len(rows))]

    def stream(self, request: Request) -> Iterator[Chunk]:
        expert, (row,) = self._expert(), self._rows([request])
        start, shown = time.perf_counter(), 0
        decoder = self._decoder([row])
        while decoder.live:
            self._fit(decoder.step, 1)
            text = row.text(expert.tokenizer)
            if row.finish is None:  # half a character, or what may become a stop text, waits
                text = text.rstrip("\ufffd")
                text = text[: len(text) - held_back(text, request.stop)]
            if len(text) > shown:
                yield Chunk(text[shown:])
                shown = len(text)
        yield Chunk("", row.generation(expert.tokenizer, start, decoder.beside.weights(0)))

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        self._refuse_adapters(scorings)
        texts, scored = self._scored(scorings)
        vocabulary = self._expert().model.get_input_embeddings().weight.shape[0]
        extra = [1 + count * vocabulary // _LOGITS_A_TOKEN for count in scored]
        found: dict[int, Likelihood] = {}
        told = [
            Told(one.adapter, text[: len(text) - count], one.prompt)
            for one, text, count in zip(scorings, texts, scored, strict=True)
        ]
        for batch in self._batches(texts, extra, [one.adapter for one in scorings]):
            keep = max(scored[at] for at in batch) + 1
            beside = self._beside([told[at] for at in batch])
            logits = self._fit(
                partial(self._logits, [texts[at] for at in batch], beside, keep), len(batch)
            )  # (B, keep, V)
            for at, row in zip(batch, logits, strict=True):
                found[at] = likelihood(scorings[at].id, row, texts[at][len(texts[at]) - scored[at] :])
        return [found[at] for at in range(len(scorings))]

    # --- tokens

    def _read(self, request: Request) -> tuple[list[int], Fault | None]:
        """The tokens of a prompt, and what keeps the expert from answering it."""
        from jinja2 import TemplateError

        where, context = f"request {request.id}: prompt", self._expert().context
        try:
            tokens = self.tokens_of(request.prompt)
        except TemplateError as error:
            return [], Fault(where, f"{self.name} refuses these turns: {error}")
        if not tokens:
            return [], Fault(where, f"has no token for {self.name}")
        if context is not None and len(tokens) >= context:
            return [], Fault(where, f"has {len(tokens):,} tokens", f"{self.name} reads less than {context:,}")
        return tokens, self._expert().strange(tokens, where=where)

    def tokens_of(self, prompt: str | tuple[Message, ...]) -> list[int]:
        """A prompt in the expert's tokens: a text as it is, turns through the chat template."""
        tokenizer = self._expert().tokenizer
        # Not verbose: of prompts that are too long it would speak on stderr, and here each is a fault.
        if isinstance(prompt, str):
            return list(tokenizer(prompt, verbose=False)["input_ids"])
        if tokenizer.chat_template is None:
            text = "\n\n".join(turn.content for turn in prompt)
            return list(tokenizer(text, verbose=False)["input_ids"])
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _rows(self, requests: Sequence[Request]) -> list[Row]:
        context = self._expert().context
        rows, faults = [], []
        for request in requests:
            tokens, fault = self._read(request)
            fault = self._unable(request) or fault
            if fault is not None:
                faults.append(fault)
                continue
            room = request.max_new_tokens if context is None else context - len(tokens)
            rows.append(Row(request, tokens, min(request.max_new_tokens, room)))
        if faults:
            raise MixmergeError(faults)
        return rows

    def _scored(self, scorings: Sequence[Scoring]) -> tuple[list[list[int]], list[int]]:
        """Of each scoring: its tokens, prompt first, and how many of them at the end are scored."""
        expert = self._expert()
        texts, counts, faults = [], [], []
        for one in scorings:
            before = list(expert.tokenizer(one.prompt)["input_ids"]) if one.prompt else []
            whole = list(expert.tokenizer(one.prompt + one.continuation)["input_ids"])
            # A token may reach over the border; it is scored then.
            same = next((at for at, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), None)
            border = min(len(before), len(whole)) if same is None else same
            begin = expert.tokenizer.bos_token_id
            if begin is not None and whole[:1] != [begin] and border == 0:
                whole = [begin, *whole]
            border = max(1, border)
            if border >= len(whole):
                faults.append(Fault(f"scoring {one.id}", "has no token with something before it"))
            elif expert.context is not None and len(whole) > expert.context:
                what = f"has {len(whole):,} tokens"
                faults.append(Fault(f"scoring {one.id}", what, f"{self.name} reads {expert.context:,}"))
            elif fault := expert.strange(whole, where=f"scoring {one.id}"):
                faults.append(fault)
            texts.append(whole)
            counts.append(len(whole) - border)
        if faults:
            raise MixmergeError(faults)
        return texts, counts

    # --- the model

    def _batches(
        self, texts: Sequence[Sequence[int]], extra: Sequence[int], adapters: Sequence[str | None]
    ) -> Iterator[list[int]]:
        """Places of what shares a batch, rows of one adapter side by side."""
        for batch in batches(texts, extra, budget=self.batch_tokens):
            yield sorted(batch, key=lambda at: adapters[at] or "")

    def _beside(self, rows: Sequence[Told]) -> Beside:
        """What answers the rows of a batch beside the model's weights."""
        return BankRows(self._expert().bank, [row.adapter for row in rows])

    def _decoder(self, rows: Sequence[Row]) -> Decoder:
        expert, beside = self._expert(), self._beside([row.told for row in rows])
        return Decoder(expert.model, expert.tokenizer, rows, beside=beside, ends=expert.ends, pad=expert.pad)

    def _answers(self, rows: Sequence[Row]) -> list[Generation]:
        start, decoder = time.perf_counter(), self._decoder(rows)
        while decoder.live:
            decoder.step()
        tokenizer, weights = self._expert().tokenizer, decoder.beside.weights
        return [row.generation(tokenizer, start, weights(at)) for at, row in enumerate(rows)]

    def _fit(self, work: Callable[[], T], rows: int) -> T:
        what, run = (
            f"out of memory on a batch of {rows}",
            "Give it fewer requests at once, or fewer batch_tokens",
        )
        try:
            return within_memory(work, where=f"engine {self.name}", what=what, run=run)
        except OutOfMemoryError:
            empty_cache(self.device)
            raise

    def _logits(self, texts: Sequence[Sequence[int]], beside: Beside, keep: int) -> Tensor:
        """``(B, keep, V)`` float32: of the last ``keep`` tokens of every text."""
        import torch

        expert = self._expert()
        ids, mask = left_padded(texts, pad=expert.pad, device=expert.model.device)
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions(mask),
            "use_cache": False,
            "logits_to_keep": keep,
        }
        takes = accepted(expert.model)
        with torch.inference_mode(), beside.running(given):
            out = expert.model(**{name: value for name, value in given.items() if name in takes})
            return beside.logits(given, out.logits[:, -keep:].float())

    def _expert(self) -> Loaded:
        if self._loaded is None:
            start = time.perf_counter()
            self._loaded = within_memory(
                self._load,
                where=f"engine {self.name}",
                what="out of memory while it was loaded",
                run="Unload another expert, or load it in a smaller dtype",
            )
            self.load_seconds = time.perf_counter() - start
        return self._loaded

    def _load(self) -> Loaded:
        loaded = load_model(self.model, self.revision, self.dtype, self.device, self.name)
        faults: list[Fault] = []
        for name, folder in self._adapters.items():
            try:
                self._read_adapter(loaded.bank, name, folder)
            except DependencyError:
                raise
            except MixmergeError as error:
                faults += error.faults
        if faults:
            raise MixmergeError(faults)
        return loaded

    def _read_adapter(self, bank: Bank, name: str, folder: str) -> None:
        bank.add(name, folder, where=f"engine {self.name}: adapter {name}")


def likelihood(name: str, logits: Tensor, tokens: Sequence[int]) -> Likelihood:
    """From the ``(keep, V)`` logits of the last tokens of a text; the last ``tokens`` of it are scored."""
    import torch

    before = logits[len(logits) - len(tokens) - 1 : -1]  # (n, V): what each token was expected from
    wanted = torch.tensor(tokens, device=logits.device)
    logprobs = before.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
    return Likelihood(name, tuple(logprobs.tolist()), bool((before.argmax(dim=-1) == wanted).all()))
