"""Peers that read an answer along while it is said.

Legend: that of ``records``; b rows of one peer, t tokens that it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mixmerge.engines.decoding import accepted, keeps_state, right_padded
from mixmerge.latent.closing import Growth
from mixmerge.latent.decoders import Anatomy, reading
from mixmerge.latent.glue import Glue
from mixmerge.latent.offsets import Reader
from mixmerge.latent.records import NEVER, Memory, Reading


class Follower:
    """A peer with its keys and values of some rows, which are only ever appended to.

    Rows read as many tokens as they have; where others read more there are holes in the cache, which are masked.

    Args:
        model: of the peer, of transformers.
        reader: of the peer.
        name: of it, in the glue.
        glue: on the device of the primary.
        rows: of the batch that read it, ascending.
        columns: of ``View.gates``, for each of these rows.
        prompts: of each of these rows, as the peer reads it.
        dtype: of the primary's states.
    """

    def __init__(
        self,
        model: Any,
        reader: Reader,
        name: str,
        glue: Glue,
        *,
        rows: Sequence[int],
        columns: Sequence[int],
        prompts: Sequence[Reading],
        dtype: torch.dtype,
    ) -> None:
        from transformers import DynamicCache

        self._anatomy = Anatomy.of(model, name=name)
        self._name, self._glue, self._context, self._dtype = name, glue, reader.context, dtype
        self._depths = glue.peer_depths(name)
        self._takes = accepted(self._anatomy.trunk)
        self._singly = keeps_state(model)
        self.rows, self._columns = list(rows), list(columns)
        self._prompts = list(prompts)
        self._growths: list[Growth] = [reader.growth() for _ in prompts]
        self._read = [0] * len(prompts)
        self._cache: Any = DynamicCache(config=model.config)
        self._mask = torch.zeros((len(prompts), 0), dtype=torch.long, device=model.device)

    def begin(self, rows: int) -> Memory:
        """What it leaves of the prompts, for a batch of so many rows."""
        return self._forward([one.ids for one in self._prompts], [one.ends for one in self._prompts], rows)

    def follow(self, texts: Sequence[str], rows: int) -> Memory | None:
        """What it leaves of the tokens that are closed once the answers are these; None if it reads nothing new.

        Past its context it reads no further.

        Args:
            texts: of the rows of the batch, all that each of them has said.
            rows: of the batch.
        """
        ids: list[Sequence[int]] = []
        ends: list[Sequence[int]] = []
        for at, row in enumerate(self.rows):
            new, until = self._growths[at].add(texts[row])
            room = len(new) if self._context is None else max(0, self._context - self._read[at])
            before = self._prompts[at].prompt_bytes
            ids.append(new[:room])
            ends.append([before + end for end in until[:room]])
        return self._forward(ids, ends, rows) if any(ids) else None

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows of the batch go on, in this order, which is theirs."""
        places = {row: at for at, row in enumerate(rows)}
        kept = [at for at, row in enumerate(self.rows) if row in places]
        if len(kept) < len(self.rows):
            chosen = torch.tensor(kept, dtype=torch.long, device=self._mask.device)
            if kept:
                self._cache.reorder_cache(chosen)
            self._mask = self._mask[chosen]
        self._columns = [self._columns[at] for at in kept]
        self._prompts = [self._prompts[at] for at in kept]
        self._growths = [self._growths[at] for at in kept]
        self._read = [self._read[at] for at in kept]
        self.rows = [places[self.rows[at]] for at in kept]

    def _forward(self, ids: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], rows: int) -> Memory:
        """Read further tokens, padded on the right, and project the states that they leave."""
        device = self._mask.device
        tokens, mask = right_padded(ids, pad=0, device="cpu")
        start = torch.tensor(self._read)[:, None]
        place = (start + mask.cumsum(dim=1) - 1).clamp(min=0)  # (b, t)
        size = 1 if self._singly and any(self._read) else tokens.shape[1]
        parts = zip(*(torch.split(one.to(device), size, dim=1) for one in (tokens, mask, place)), strict=True)
        found = [self._states(*part) for part in parts]
        self._read = [done + len(one) for done, one in zip(self._read, ids, strict=True)]
        until, _ = right_padded(ends, pad=NEVER, device=device)
        columns = torch.tensor(self._columns, device=device)
        states = [torch.cat(one, dim=1) for one in zip(*found, strict=True)]
        told = self._glue.told(self._name, states, until, column=columns, dtype=self._dtype)
        return told if len(self.rows) == rows else told.spread(self.rows, rows)

    def _states(self, tokens: Tensor, mask: Tensor, places: Tensor) -> list[Tensor]:
        """What tokens that go through at once leave at each level; all ``(b, t)``."""
        self._mask = torch.cat([self._mask, mask], dim=1)
        given = {
            "input_ids": tokens,
            "attention_mask": self._mask,
            "position_ids": places,
            "past_key_values": self._cache,
            "use_cache": True,
        }
        with torch.inference_mode(), reading(self._anatomy, self._depths) as states:
            out = self._anatomy.trunk(**{name: value for name, value in given.items() if name in self._takes})
        self._cache = out.past_key_values
        return [states[one] for one in self._depths]
