"""Token after token for a batch of requests, each with its own settings. B rows, T tokens, V entries of vocabulary.

A row is drawn with numbers of its own request, and leaves the batch when it ends. Nothing here is random otherwise.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mixmerge.engines.records import Finish, Generation, Message, Request, cut_at_stop
from mixmerge.errors import Fault, MixmergeError

if TYPE_CHECKING:
    from torch import Tensor

_ATTEND = (
    "full_attention",
    "sliding_attention",
    "chunked_attention",
    "mlp",
)  # kinds of layers without a state
_A_CHARACTER = 4  # tokens at most, of a tokenizer that falls back to bytes


@dataclass(frozen=True)
class Told:
    """What of a row says by which experts it is answered.

    Args:
        adapter: as in ``Request``.
        prompt: its tokens.
        text: of the prompt.
        explain, reads: as in ``Request``.
        asked: the prompt as it came; None where nobody reads peers.
    """

    adapter: str | None
    prompt: Sequence[int]
    text: str
    explain: bool = False
    reads: tuple[tuple[str, float], ...] = ()
    asked: str | tuple[Message, ...] | None = None


class Beside(Protocol):
    """What answers the rows of a batch beside the model's own weights. It follows them until they have left."""

    def running(self, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Within it the model answers the rows' next tokens, of which ``given`` are its arguments."""
        ...

    def logits(self, given: Mapping[str, Any], logits: Tensor) -> Tensor:
        """The rows' logits ``(B, T, V)`` in float32, of the model's own for the last tokens of ``given``."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Only these of the rows that are left go on, in this order."""
        ...

    def weights(self, row: int) -> Mapping[str, Any] | None:
        """What a row, by its place at the start, got of each expert, if it asked; None where there are no weights."""
        ...


@dataclass
class Row:
    """One request while it is answered.

    Args:
        request: what is asked.
        prompt: its tokens.
        limit: tokens it may get, 1 or more.
    """

    request: Request
    prompt: list[int]
    limit: int
    out: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None
    ended: float = 0.0

    def __post_init__(self) -> None:
        key = np.array([self.request.seed, *self.prompt], "<i8").tobytes()
        digest = hashlib.blake2b(key, digest_size=16).digest()
        self._draws = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))

    def draw(self) -> float:
        """The next of its uniform numbers in [0, 1)."""
        return float(self._draws.random())

    def text(self, tokenizer: Any) -> str:
        """What has been generated, before a stop text."""
        return cut_at_stop(plain_text(tokenizer, self.out), self.request.stop)[0]

    @property
    def told(self) -> Told:
        asked = self.request
        return Told(asked.adapter, self.prompt, asked.text, asked.explain, asked.reads, asked.prompt)

    def generation(
        self, tokenizer: Any, start: float, weights: Mapping[str, Any] | None = None
    ) -> Generation:
        return Generation(
            id=self.request.id,
            text=self.text(tokenizer),
            tokens_in=len(self.prompt),
            tokens_out=len(self.out),
            finish=self.finish or "length",
            seconds=self.ended - start,
            logprobs=tuple(self.logprobs) if self.request.logprobs else None,
            weights=weights,
        )


def plain_text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def slides(model: Any) -> bool:
    """Whether some of its layers count places in the cache, where rows of unlike lengths leave holes: layers that see
    only the last so many tokens or keep a state, and distances in a model that is not told positions, such as MPT's."""
    config = model.config.get_text_config()
    # Bloom counts distances by the mask.
    if "position_ids" not in accepted(model) and config.model_type != "bloom":
        return True
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ()
    if kinds:
        return any(kind not in ("full_attention", "global") for kind in kinds)
    return getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)


def keeps_state(model: Any) -> bool:
    """Whether some of its layers hand a state from token to token, not keys and values: Jamba's take up what they have
    kept for one token at a time, and begin anew where more go through at once."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return any(kind not in _ATTEND for kind in kinds)


def left_padded(texts: Sequence[Sequence[int]], *, pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and mask, both ``(B, T)``: texts end where the rows end."""
    longest = max(len(text) for text in texts)
    return _padded(texts, [longest - len(text) for text in texts], longest, pad, device)


def right_padded(texts: Sequence[Sequence[int]], *, pad: int, device: Any) -> tuple[Tensor, Tensor]:
    """Tokens and mask, both ``(B, T)``, T 1 or more: texts begin where the rows begin. None may look behind itself."""
    longest = max((len(text) for text in texts), default=0)
    return _padded(texts, [0] * len(texts), max(1, longest), pad, device)


def _padded(
    texts: Sequence[Sequence[int]], starts: Sequence[int], longest: int, pad: int, device: Any
) -> tuple[Tensor, Tensor]:
    import torch

    ids = torch.full((len(texts), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (text, start) in enumerate(zip(texts, starts, strict=True)):
        part = slice(start, start + len(text))
        ids[row, part] = torch.tensor(text, dtype=torch.long)
        mask[row, part] = 1
    return ids.to(device), mask.to(device)


def positions(mask: Tensor) -> Tensor:
    """``(B, T)``: each token's place in its own text; 0 for padding."""
    return (mask.cumsum(dim=-1) - 1).clamp(min=0)


def accepted(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's ``forward`` takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def strange(tokens: Iterable[int], tokenizer: Any, rows: int, *, where: str) -> Fault | None:
    """Of tokens that a model has no embeddings of, whose first ``rows`` it has, the first."""
    at = next((token for token in tokens if token >= rows), None)
    if at is None:
        return None
    text = tokenizer.convert_ids_to_tokens(at)
    what = f"holds {text!r}, token {at:,} of the tokenizer, and the model has embeddings of {rows:,}"
    return Fault(where, what, "A folder whose tokenizer is that of its weights")


class Decoder:
    """A batch that is being generated: ``step`` until ``live`` is empty.

    Args:
        model: a causal language model of transformers that keeps keys and values.
        tokenizer: its tokenizer.
        rows: what is asked; changed in place.
        beside: what answers the rows beside the model.
        ends: tokens that end a text.
        pad: any token; it is masked.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Row],
        *,
        beside: Beside,
        ends: frozenset[int],
        pad: int,
    ) -> None:
        from transformers import DynamicCache

        self._model, self._tokenizer, self._ends = model, tokenizer, ends
        self.beside = beside
        self.live = list(rows)
        self._cache = DynamicCache(config=model.config)
        self._ids, self._mask = left_padded([row.prompt for row in rows], pad=pad, device=model.device)
        self._positions = positions(self._mask)
        self._takes = accepted(model)

    def step(self) -> None:
        """One token for every live row."""
        import torch

        with torch.inference_mode():
            logits = self._forward()  # (B, V)
            tokens = self._choose(logits)
            now = time.perf_counter()
            for row, token in zip(self.live, tokens, strict=True):
                self._take(row, token, now)
            self._advance(tokens)

    def _forward(self) -> Tensor:
        given = {
            "input_ids": self._ids,
            "attention_mask": self._mask,
            "position_ids": self._positions,
            "past_key_values": self._cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        with self.beside.running(given):
            out = self._model(**{name: value for name, value in given.items() if name in self._takes})
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:  # RecurrentGemma takes one, and gives none back
            kind = self._model.config.model_type
            raise MixmergeError(Fault(kind, "keeps no keys and values", "A transformer decoder"))
        return self.beside.logits(given, out.logits[:, -1:].float())[:, -1]

    def _choose(self, logits: Tensor) -> list[int]:
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        for at, row in enumerate(self.live):
            asked = row.request
            if asked.temperature > 0:
                tokens[at] = drawn(logits[at], asked.temperature, asked.top_p, row.draw())
            if asked.logprobs:
                row.logprobs.append(float(logits[at].log_softmax(dim=-1)[tokens[at]]))
        return tokens

    def _take(self, row: Row, token: int, now: float) -> None:
        if token in self._ends:
            row.finish, row.ended = "stop", now
            del row.logprobs[len(row.out) :]
            return
        row.out.append(token)
        if row.request.stop and self._stopped(row):
            row.finish, row.ended = "stop", now
        elif len(row.out) == row.limit:
            row.finish, row.ended = "length", now

    def _stopped(self, row: Row) -> bool:
        """Whether a stop text ends in the last token; the end of the text is looked at before all of it."""
        window = _A_CHARACTER * max(len(one) for one in row.request.stop) + 8
        shown = plain_text(self._tokenizer, row.out[-window:])
        # A run of bytes that begins within a character is shown as broken, however it goes on.
        if "\ufffd" not in shown and not cut_at_stop(shown, row.request.stop)[1]:
            return False
        return cut_at_stop(plain_text(self._tokenizer, row.out), row.request.stop)[1]

    def _advance(self, tokens: Sequence[int]) -> None:
        import torch

        going = [at for at, row in enumerate(self.live) if row.finish is None]
        self.live = [self.live[at] for at in going]
        if not going:
            return
        if len(going) < len(tokens):
            kept = torch.tensor(going, device=self._mask.device)
            self._cache.reorder_cache(kept)  # every kind of layer has it; rows that are not named go
            self._mask = self._mask[kept]
            self.beside.keep(going)
        chosen = torch.tensor([tokens[at] for at in going], device=self._mask.device)
        self._ids = chosen[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)
        self._positions = self._mask.sum(dim=-1, keepdim=True) - 1


def drawn(logits: Tensor, temperature: float, top_p: float, uniform: float) -> int:
    """The token of ``(V,)`` logits at a uniform number's place in their distribution.

    Source: Holtzman et al., The Curious Case of Neural Text Degeneration (ICLR 2020), section 3.1 (nucleus).

    Args:
        logits: finite, or minus infinity for what is never drawn.
        temperature: above 0.
        top_p: the smallest set of likeliest tokens that has this much probability is drawn from.
        uniform: in [0, 1).
    """
    import torch

    share = (logits.double() / temperature).softmax(dim=-1)
    if top_p >= 1:
        return _at(share.cumsum(dim=-1), uniform)
    ordered, tokens = share.sort(descending=True, stable=True)
    upto = ordered.cumsum(dim=-1)
    count = max(1, int(torch.count_nonzero(upto - ordered < top_p)))
    return int(tokens[_at(upto[:count], uniform)])


def _at(upto: Tensor, uniform: float) -> int:
    import torch

    place = torch.searchsorted(upto, upto.new_tensor(uniform) * upto[-1], right=True)
    return min(int(place), len(upto) - 1)
