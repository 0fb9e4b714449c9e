"""The engine of models that transformers runs in this process. B rows, T tokens, V entries of vocabulary."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from mixmerge.checkpoint.header import DTYPE_BYTES, read_header
from mixmerge.engines.base import Capability, Engine
from mixmerge.engines.batching import batches
from mixmerge.engines.decoding import Decoder, Row, accepted, left_padded, positions
from mixmerge.engines.records import Chunk, Generation, Likelihood, Message, Request, Scoring, held_back
from mixmerge.errors import Fault, MixmergeError

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
_FULL = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CAUSAL = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
_LOGITS_A_TOKEN = 8192  # as many logits take about the memory of one token's activations


@dataclass(frozen=True)
class _Loaded:
    model: Any
    tokenizer: Any
    context: int | None  # tokens, None if it has no bound
    ends: frozenset[int]
    pad: int


class TransformersEngine(Engine):
    """A causal language model of a folder or of the hub. Code from its repository is never run.

    Rows of like length share a batch, padded on the left; a row's logits agree across batches to 1e-4 in float32.
    The turns of a chat go through the tokenizer's chat template; without one their texts are joined by empty lines.
    Sampling does what the request says: defaults of the model's generation_config are not used, but for the tokens
    that end a text.

    Args:
        model: a folder, or a hub id.
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
        revision: str | None = None,
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
        name: str | None = None,
    ) -> None:
        super().__init__(name or model)
        faults = []
        if dtype != "auto" and dtype not in _FULL:
            faults.append(Fault(f"engine {self.name}: dtype", f"is {dtype!r}", f"auto, {', '.join(_FULL)}"))
        if batch_tokens < 1:
            faults.append(Fault(f"engine {self.name}: batch_tokens", f"is {batch_tokens}", "1 or more"))
        if faults:
            raise MixmergeError(faults)
        self.model, self.revision, self.dtype, self.device = model, revision, dtype, device
        self.batch_tokens = batch_tokens
        self.load_seconds = 0.0
        self._loaded: _Loaded | None = None

    @property
    def loaded(self) -> bool:
        return self._loaded is not None

    def load(self) -> None:
        self._expert()

    def unload(self) -> None:
        if self._loaded is None:
            return
        self._loaded = None
        gc.collect()  # modules refer to each other
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def memory(self) -> int | None:
        if self._loaded is not None:
            return sum(int(one.numel() * one.element_size()) for one in self._loaded.model.parameters())
        files = sorted(Path(self.model).expanduser().glob("*.safetensors"))
        headers = [header for path in files for header in read_header(path).values()]
        if not headers:
            return None
        if self.dtype == "auto":
            return sum(header.nbytes for header in headers)
        return sum(header.elements for header in headers) * DTYPE_BYTES[_FULL[self.dtype]]

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        return [self._unable(request) or self._read(request)[1] for request in requests]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        expert, rows = self._expert(), self._rows(requests)
        found: dict[int, Generation] = {}
        texts, extra = [row.prompt for row in rows], [row.limit for row in rows]
        for batch in batches(texts, extra, budget=self.batch_tokens):
            start = time.perf_counter()
            decoder = self._decoder([rows[at] for at in batch])
            while decoder.live:
                decoder.step()
            found.update({at: rows[at].generation(expert.tokenizer, start) for at in batch})
        return [found[at] for at in range(len(rows))]

    def stream(self, request: Request) -> Iterator[Chunk]:
        expert, (row,) = self._expert(), self._rows([request])
        start, shown = time.perf_counter(), 0
        decoder = self._decoder([row])
        while decoder.live:
            decoder.step()
            text = row.text(expert.tokenizer)
            if row.finish is None:  # half a character, or what may become a stop text, waits
                text = text.rstrip("\ufffd")
                text = text[: len(text) - held_back(text, request.stop)]
            if len(text) > shown:
                yield Chunk(text[shown:])
                shown = len(text)
        yield Chunk("", row.generation(expert.tokenizer, start))

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        texts, scored = self._scored(scorings)
        vocabulary = self._expert().model.get_input_embeddings().weight.shape[0]
        extra = [1 + count * vocabulary // _LOGITS_A_TOKEN for count in scored]
        found: dict[int, Likelihood] = {}
        for batch in batches(texts, extra, budget=self.batch_tokens):
            keep = max(scored[at] for at in batch) + 1
            logits = self._logits([texts[at] for at in batch], keep)  # (B, keep, V)
            for at, row in zip(batch, logits, strict=True):
                found[at] = _likelihood(scorings[at].id, row, texts[at][len(texts[at]) - scored[at] :])
        return [found[at] for at in range(len(scorings))]

    # --- tokens

    def _read(self, request: Request) -> tuple[list[int], Fault | None]:
        """The tokens of a prompt, and what keeps the expert from answering it."""
        from jinja2 import TemplateError

        where, context = f"request {request.id}: prompt", self._expert().context
        try:
            tokens = self._tokens(request.prompt)
        except TemplateError as error:
            return [], Fault(where, f"{self.name} refuses these turns: {error}")
        if not tokens:
            return [], Fault(where, f"has no token for {self.name}")
        if context is not None and len(tokens) >= context:
            return [], Fault(where, f"has {len(tokens):,} tokens", f"{self.name} reads less than {context:,}")
        return tokens, None

    def _tokens(self, prompt: str | tuple[Message, ...]) -> list[int]:
        tokenizer = self._expert().tokenizer
        if isinstance(prompt, str):
            return list(tokenizer(prompt)["input_ids"])
        if tokenizer.chat_template is None:
            return list(tokenizer("\n\n".join(turn.content for turn in prompt))["input_ids"])
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

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
            texts.append(whole)
            counts.append(len(whole) - border)
        if faults:
            raise MixmergeError(faults)
        return texts, counts

    # --- the model

    def _decoder(self, rows: Sequence[Row]) -> Decoder:
        expert = self._expert()
        return Decoder(expert.model, expert.tokenizer, rows, ends=expert.ends, pad=expert.pad)

    def _logits(self, texts: Sequence[Sequence[int]], keep: int) -> Tensor:
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
        with torch.inference_mode():
            out = expert.model(**{name: value for name, value in given.items() if name in takes})
            logits: Tensor = out.logits[:, -keep:].float()
        return logits

    def _expert(self) -> _Loaded:
        if self._loaded is None:
            start = time.perf_counter()
            self._loaded = _load(self.model, self.revision, self.dtype, self.device, self.name)
            self.load_seconds = time.perf_counter() - start
        return self._loaded


def _likelihood(name: str, logits: Tensor, tokens: Sequence[int]) -> Likelihood:
    """From the ``(keep, V)`` logits of the last tokens of a text; the last ``tokens`` of it are scored."""
    import torch

    before = logits[len(logits) - len(tokens) - 1 : -1]  # (n, V): what each token was expected from
    wanted = torch.tensor(tokens, device=logits.device)
    logprobs = before.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0]
    return Likelihood(name, tuple(logprobs.tolist()), bool((before.argmax(dim=-1) == wanted).all()))


def _load(model: str, revision: str | None, dtype: Dtype, device: str, name: str) -> _Loaded:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        with no_bars():
            # Said each time: left open, transformers asks on the terminal whether to run a repository's code.
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
            _refuse_architecture(config, name)
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model,
                revision=revision,
                dtype="auto" if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                trust_remote_code=False,
            )
            tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        loaded = loaded.to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixmergeError(
            Fault(
                f"engine {name}", f"cannot load it: {reason}", "A folder with config, weights and tokenizer"
            )
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        what = f"its files lack {len(missing)} tensors, {missing[0]} for one"
        raise MixmergeError(
            Fault(f"engine {name}", what, "A whole model: it would answer from random weights")
        )
    if "past_key_values" not in accepted(loaded):
        raise MixmergeError(
            Fault(f"engine {name}", f"{config.model_type} keeps no keys and values", "A transformer decoder")
        )
    return _Loaded(loaded, tokenizer, *_limits(loaded, tokenizer))


def _refuse_architecture(config: Any, name: str) -> None:
    architectures = config.architectures or []
    if architectures and not any(one.endswith(_CAUSAL) for one in architectures):
        what = f"is a {architectures[0]}, which does not continue texts"
        raise MixmergeError(Fault(f"engine {name}", what, "A causal language model"))


def _limits(model: Any, tokenizer: Any) -> tuple[int | None, frozenset[int], int]:
    """Tokens of context, tokens that end a text, and one to pad with."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    given = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = {*(given if isinstance(given, list) else [given]), tokenizer.eos_token_id} - {None}
    pad = tokenizer.pad_token_id
    return context, frozenset(int(one) for one in ends), 0 if pad is None else int(pad)


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' progress bars: who loads many experts shows progress in another way."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
