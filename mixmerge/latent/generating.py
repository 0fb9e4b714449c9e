"""A primary's rows while they are generated: what their next tokens may read. Legend: that of ``records``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmerge.engines.decoding import left_padded
from mixmerge.latent.following import Follower
from mixmerge.latent.interaction import Interaction
from mixmerge.latent.offsets import Reader
from mixmerge.latent.records import Memory, Mode, Reading, View

NOTHING = "(nothing)"  # what is looked at where no peer is, in explanations


@dataclass(frozen=True)
class Told:
    """One row as it is known at the start.

    Args:
        reading: of the prompt, by the primary.
        reads: its peers and their gates.
        explain: as in ``engines.records.Request``.
    """

    reading: Reading
    reads: tuple[tuple[str, float], ...]
    explain: bool = False

    @property
    def gates(self) -> tuple[float, ...]:
        """Of the primary and its peers, in this order; they add up to 1."""
        given = [gate for _, gate in self.reads]
        return (max(0.0, 1.0 - sum(given)), *given)


def gates_of(rows: Sequence[Told], device: Any) -> Tensor:
    """``(B, K)``; 0 in columns that a row does not use."""
    widest = max(len(row.reads) for row in rows) + 1
    found = torch.zeros((len(rows), widest))
    for at, row in enumerate(rows):
        found[at, : len(row.gates)] = torch.tensor(row.gates)
    return found.to(device)


class ScoredRows:
    """Rows whose answers are given, which go through at once; an ``engines.decoding.Beside``.

    Args:
        primary: it.
        rows: their readings have the answers.
        memory: all that they may read.
        upto: of each row, up to where each of its tokens may look.
    """

    def __init__(
        self, primary: Interaction, rows: Sequence[Told], memory: Memory, upto: Sequence[Sequence[int]]
    ) -> None:
        self._primary, self._rows, self._memory, self._upto = primary, list(rows), memory, list(upto)

    @contextmanager
    def running(self, given: Mapping[str, Any]) -> Iterator[None]:
        ids, device = given["input_ids"], self._memory.ends.device
        seen = left_padded([row.reading.seen for row in self._rows], pad=0, device=device)[0]
        upto = left_padded(self._upto, pad=0, device=device)[0]
        count = ids.shape[1]
        view = View(self._memory, gates_of(self._rows, device), seen[:, -count:], upto[:, -count:])
        with self._primary.running(view):
            yield

    def logits(self, given: Mapping[str, Any], logits: Tensor) -> Tensor:
        """The primary's own."""
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """They all go through at once: none leaves before."""

    def weights(self, row: int) -> Mapping[str, Any] | None:
        return None


class LatentRows:
    """Rows of one primary that read peers; an ``engines.decoding.Beside``.

    In ``prompt`` mode the memory is what peers have left of the prompts, and stays so. In the others the peers are
    here, and read along whenever a chunk of the answer is whole: before its last token goes through.

    Args:
        primary: it.
        reader: of the primary.
        rows: of the batch.
        memory: what they may read of the prompts.
        followers: peers that read along; none in ``prompt`` mode.
        mode, chunk: as of ``upto_of``.
    """

    def __init__(
        self,
        primary: Interaction,
        reader: Reader,
        rows: Sequence[Told],
        memory: Memory,
        *,
        followers: Sequence[Follower] = (),
        mode: Mode,
        chunk: int,
    ) -> None:
        self._primary, self._reader, self._rows = primary, reader, list(rows)
        self._followers = list(followers)
        self._step = {"prompt": 0, "lockstep": 1, "chunked": chunk}[mode]
        device = memory.ends.device
        for one in self._followers:
            memory = memory.append(one.begin(len(rows)))
        self._memory, self._gates = memory, gates_of(rows, device)
        self._begun, self._left = False, list(range(len(rows)))
        self._said = [reader.saying() for _ in rows]
        self._spoken = 0
        asked = any(row.explain for row in rows)
        self._watched = torch.zeros(self._gates.shape) if asked else None
        self._handed = [row.reading.prompt_bytes for row in rows]

    @contextmanager
    def running(self, given: Mapping[str, Any]) -> Iterator[None]:
        view = self._view(given["input_ids"])
        if self._watched is not None:
            view.watch = torch.zeros_like(self._gates)
        with self._primary.running(view):
            yield
        if self._watched is not None and view.watch is not None:
            self._watched[self._left] += view.watch.cpu()

    def logits(self, given: Mapping[str, Any], logits: Tensor) -> Tensor:
        """The primary's own."""
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        kept = list(rows)
        for one in self._followers:
            one.keep(kept)
        self._followers = [one for one in self._followers if one.rows]
        self._memory = self._memory.keep(kept)
        self._gates = self._gates[torch.tensor(kept, device=self._gates.device)]
        self._left = [self._left[at] for at in kept]
        self._said = [self._said[at] for at in kept]
        self._handed = [self._handed[at] for at in kept]

    def weights(self, row: int) -> Mapping[str, Any] | None:
        """Shares of the row's attention, of all tokens and levels: to nothing, and to each peer."""
        told = self._rows[row]
        if self._watched is None or not told.explain:
            return None
        names = [NOTHING, *(peer for peer, _ in told.reads)]
        looked = self._watched[row][: len(names)]
        shares = (looked / looked.sum().clamp(min=1e-30)).tolist()
        mean = dict(zip(names, shares, strict=True))
        return {"title": "share of the attention", "experts": names, "layers": {}, "mean": mean}

    def _view(self, ids: Tensor) -> View:
        """For the tokens that go through now: the prompts, or one more token of each row."""
        device = self._memory.ends.device
        if not self._begun:
            self._begun = True
            seen = left_padded([row.reading.seen for row in self._rows], pad=-1, device=device)[0]
            return View(self._memory, self._gates, seen, seen.clamp(min=0))
        return self._next(ids[:, 0].tolist(), device)

    def _next(self, tokens: Sequence[int], device: Any) -> View:
        for said, token in zip(self._said, tokens, strict=True):
            said.add(token)
        self._spoken += 1
        seen = [
            self._rows[row].reading.prompt_bytes + said.bytes
            for row, said in zip(self._left, self._said, strict=True)
        ]
        if self._step == 0:
            upto = seen
        else:
            if self._spoken % self._step == 0:
                texts = [said.text for said in self._said]
                for one in self._followers:
                    more = one.follow(texts, len(texts))
                    self._memory = self._memory if more is None else self._memory.append(more)
                self._handed = seen
            upto = self._handed
        return View(
            self._memory,
            self._gates,
            torch.tensor(seen, device=device)[:, None],
            torch.tensor(upto, device=device)[:, None],
        )
