"""Rows of a batch while small models read along with the base, each with keys and values of its own.

Legend: B rows, S tokens of one pass, K of them whose logits are wanted, V columns of the base, W of a small model, T
experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmerge.engines.adapters import Bank
from mixmerge.engines.decoding import Row, Told, accepted, left_padded, positions
from mixmerge.engines.loading import Loaded
from mixmerge.errors import Fault, MixmergeError
from mixmerge.logits.fusing import Settings, fuse_rows
from mixmerge.logits.vocabulary import Shared, VocabMap

_DIGITS = 4  # of alphas that are told


@dataclass(frozen=True, eq=False)
class Small:
    """A small model in memory.

    Args:
        name: of the part.
        loaded: it, or the model whose adapter it is.
        adapter: its name in the bank; None for the model itself.
        map: its tokens beside the base's.
        own: its tokenizer reads texts and turns; else it reads the base's tokens as they are.
    """

    name: str
    loaded: Loaded
    adapter: str | None
    map: VocabMap
    own: bool

    def prompt_of(self, text: str) -> list[int]:
        """Its tokens of a text, at least one."""
        tokenizer = self.loaded.tokenizer
        found = list(tokenizer(text, verbose=False)["input_ids"])
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else self.loaded.pad
        return found or [first]


@dataclass(frozen=True, eq=False)
class Fusion:
    """All models of a fusion in memory.

    Args:
        base: the large model.
        base_adapter: its name in the base's bank, where the large model is an adapter.
        small: the reference first, then the experts.
        experts: their names.
        shared: tokens that all know; None where all columns are the same.
        settings: how the experts shift the base.
        alphas: of mode ``static``.
    """

    base: Loaded
    base_adapter: str | None
    small: tuple[Small, ...]
    experts: tuple[str, ...]
    shared: Shared | None
    settings: Settings
    alphas: tuple[float, ...]


class FusedRows:
    """Rows that base and small models answer together; a ``decoding.Beside``.

    Args:
        fusion: the models.
        told: of the rows.
        prompts: of each small model with tokens of its own, by its place: the tokens of each row's prompt.
        rows: those that are generated: one ends where a small model has no room for another token.
    """

    def __init__(
        self,
        fusion: Fusion,
        told: Sequence[Told],
        prompts: Mapping[int, Sequence[Sequence[int]]],
        rows: Sequence[Row] = (),
    ) -> None:
        self._fusion, self._told, self._rows = fusion, told, list(rows)
        self._left = list(range(len(told)))
        self._readers = [
            _OwnReader(one, prompts[at], told) if one.own else _Reader(one)
            for at, one in enumerate(fusion.small)
        ]
        self._alphas: list[list[list[float]]] = [[] for _ in told]
        self._covered: list[list[float]] = [[] for _ in told]

    def running(self, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        return _answering(self._fusion.base.bank, self._fusion.base_adapter, given)

    def logits(self, given: Mapping[str, Any], logits: Tensor) -> Tensor:
        kept = logits.shape[1]
        reference, *experts = (one.read(given, kept).flatten(0, 1) for one in self._readers)
        fusion = self._fusion
        found = fuse_rows(
            logits.flatten(0, 1), reference, experts, fusion.shared, fusion.settings, fusion.alphas
        )
        if kept == 1:
            self._tell(found.alphas, found.covered)
        for rooms in (one.rooms() for one in self._readers if self._rows):
            for row, room in zip(self._rows, rooms, strict=bool(rooms)):
                row.limit = row.limit if room > 0 else min(row.limit, len(row.out) + 1)
        return found.logits.view_as(logits)

    def keep(self, rows: Sequence[int]) -> None:
        self._left = [self._left[at] for at in rows]
        self._rows = [self._rows[at] for at in rows] if self._rows else []
        for one in self._readers:
            one.keep(rows)

    def weights(self, row: int) -> Mapping[str, Any] | None:
        if not self._told[row].explain:
            return None
        steps, covered, names = self._alphas[row], self._covered[row], list(self._fusion.experts)
        columns = zip(*steps, strict=True) if steps else ()
        mean = {
            name: round(sum(values) / len(values), _DIGITS)
            for name, values in zip(names, columns, strict=bool(steps))
        }
        return {
            "experts": names,
            "mode": self._fusion.settings.mode,
            "steps": steps,
            "mean": mean,
            "covered": round(sum(covered) / max(len(covered), 1), _DIGITS),
        }

    def _tell(self, alphas: Tensor, covered: Tensor) -> None:
        if not any(self._told[at].explain for at in self._left):
            return
        for at, strengths, share in zip(self._left, alphas.tolist(), covered.tolist(), strict=True):
            self._alphas[at].append([round(one, _DIGITS) for one in strengths])
            self._covered[at].append(share)


def _answering(bank: Bank, adapter: str | None, given: Mapping[str, Any]) -> AbstractContextManager[None]:
    return bank.answering([adapter] * len(given["input_ids"]))


class _Reader:
    """A small model that reads the base's tokens."""

    def __init__(self, small: Small) -> None:
        self._small = small
        self._takes = accepted(small.loaded.model)
        self._cache: Any = None

    def read(self, given: Mapping[str, Any], kept: int) -> Tensor:
        """``(B, K, W)``: logits of the last tokens of what the base is given.

        Args:
            given: arguments of the base.
            kept: K.
        """
        ids = given["input_ids"]
        mask = given["attention_mask"]
        # The base's padding may be no token of the small model.
        known = (mask[:, -ids.shape[1] :] > 0) & (ids < self._small.map.other_columns)
        ids = torch.where(known, ids, torch.full_like(ids, self._small.loaded.pad))
        logits = self._run(ids, mask, given["position_ids"], cached=bool(given["use_cache"]), kept=kept)
        return logits[:, -kept:]

    def rooms(self) -> list[float]:
        """How many of the longest spellings' tokens each row has room for; none where the base's context says it."""
        return []

    def keep(self, rows: Sequence[int]) -> None:
        if self._cache is not None:
            self._cache.reorder_cache(torch.tensor(rows, device=self._small.loaded.model.device))

    def _run(self, ids: Tensor, mask: Tensor, places: Tensor, *, cached: bool, kept: int) -> Tensor:
        model = self._small.loaded.model
        if cached and self._cache is None:
            from transformers import DynamicCache

            self._cache = DynamicCache(config=model.config)
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": places,
            "past_key_values": self._cache,
            "use_cache": cached,
            "logits_to_keep": kept,
        }
        with _answering(self._small.loaded.bank, self._small.adapter, given):
            out = model(**{name: value for name, value in given.items() if name in self._takes})
        logits: Tensor = out.logits
        return logits


class _OwnReader(_Reader):
    """A small model that reads prompts in its own tokens, and then the base's tokens as its own spell them.

    Where a token of the base is several of its own, rows get unequal numbers of them: shorter ones are masked in front,
    so that each row's last token is the last of the pass.
    """

    def __init__(self, small: Small, prompts: Sequence[Sequence[int]], told: Sequence[Told]) -> None:
        super().__init__(small)
        self._prompts, self._told = prompts, told
        self._mask: Tensor | None = None

    def read(self, given: Mapping[str, Any], kept: int) -> Tensor:
        if not given["use_cache"]:
            return self._whole(given, kept)
        device = given["input_ids"].device
        spelled = self._prompts
        if self._mask is not None:
            spelled = [self._small.map.spelled(row) for row in given["input_ids"].tolist()]
        ids, mask = left_padded(spelled, pad=self._small.loaded.pad, device=device)
        self._mask = mask if self._mask is None else torch.cat([self._mask, mask], dim=1)
        places = positions(self._mask)[:, -ids.shape[1] :]
        return self._run(ids, self._mask, places, cached=True, kept=1)[:, -1:]

    def rooms(self) -> list[float]:
        context = self._small.loaded.context
        if context is None or self._mask is None:
            return []
        return [context - used - self._small.map.longest + 1 for used in self._mask.sum(dim=1).tolist()]

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        if self._mask is not None:
            self._mask = self._mask[torch.tensor(rows, device=self._mask.device)]

    def _whole(self, given: Mapping[str, Any], kept: int) -> Tensor:
        """Texts read whole: at the end of each of the base's tokens, what the small model expects next."""
        texts, ends = [], []
        for row, mask, told, prompt in zip(
            given["input_ids"], given["attention_mask"], self._told, self._prompts, strict=True
        ):
            after = row[mask > 0].tolist()[len(told.prompt) :]
            pieces = [self._small.map.spelled([token]) for token in after]
            upto = [len(prompt)]
            for one in pieces:
                upto.append(upto[-1] + len(one))
            texts.append([*prompt, *(piece for one in pieces for piece in one)])
            ends.append([upto[max(0, len(upto) - kept + at)] for at in range(kept)])
        longest, context = max(map(len, texts)), self._small.loaded.context
        if context is not None and longest > context:
            what = f"a text has {longest:,} of its tokens"
            raise MixmergeError(Fault(f"small model {self._small.name}", what, f"It reads {context:,}"))
        ids, mask = left_padded(texts, pad=self._small.loaded.pad, device=given["input_ids"].device)
        logits = self._run(ids, mask, positions(mask), cached=False, kept=0)  # of all: 0 keeps everything
        places = [
            [longest - len(text) + end - 1 for end in row] for text, row in zip(texts, ends, strict=True)
        ]
        at = torch.tensor(places, device=logits.device)[..., None].expand(-1, -1, logits.shape[-1])
        return logits.gather(1, at)
