"""One expert of an interaction as an engine: alone, while it reads peers, or as a peer. Legend: that of ``records``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from mixmerge.engines.base import Capability
from mixmerge.engines.batching import batches
from mixmerge.engines.decoding import Beside
from mixmerge.engines.decoding import Told as Asked
from mixmerge.engines.loading import Loaded
from mixmerge.engines.local import TransformersEngine, likelihood
from mixmerge.engines.records import Generation, Likelihood, Request, Scoring
from mixmerge.errors import Fault, MixmergeError
from mixmerge.latent.companions import Companion, Offers, Prompt
from mixmerge.latent.records import Latents, Mode, Reading, upto_of

if TYPE_CHECKING:
    import torch

    from mixmerge.latent.following import Follower
    from mixmerge.latent.generating import Told
    from mixmerge.latent.glue import Glue
    from mixmerge.latent.interaction import Interaction
    from mixmerge.latent.records import Memory


class PrimaryEngine(TransformersEngine):
    """An expert that answers, or leaves latents for others. What holds for ``TransformersEngine`` holds for it.

    A request either reads peers or does not; those of one call are of one kind, which who calls sees to.

    Args:
        companion: the expert; an adapter is merged into its base.
        glue: what it reads through.
        offers: what peers leave of prompts.
        mode, chunk: as of ``upto_of``.
        peers: of modes in which they read along: the engines of all experts, by name.
        batch_tokens: as of ``TransformersEngine``.
    """

    capabilities: ClassVar[frozenset[Capability]] = TransformersEngine.capabilities | {"latents"}

    def __init__(
        self,
        companion: Companion,
        glue: Glue,
        offers: Offers,
        *,
        mode: Mode,
        chunk: int,
        peers: Mapping[str, PrimaryEngine],
        batch_tokens: int,
    ) -> None:
        super().__init__(
            companion.model,
            revision=companion.revision,
            dtype=companion.dtype,
            device=companion.device,
            batch_tokens=batch_tokens,
            name=companion.name,
        )
        self.companion = companion
        self._glue, self._offers, self._peers = glue, offers, peers
        self._mode: Mode = mode
        self._chunk = chunk

    def offer(self, requests: Sequence[Request]) -> list[Generation]:
        """Read prompts and keep what others may read of them; each answer's text is the name it is kept under.

        Raises:
            MixmergeError: a prompt is too long, or the disk refuses.
            OutOfMemoryError: a batch did not fit.
        """
        start, expert = time.perf_counter(), self._expert()
        readings = [self.companion.reading(one.prompt) for one in requests]
        keep = partial(
            self.companion.offer, expert, readings, self._offers.store, batch_tokens=self.batch_tokens
        )
        keys = self._fit(keep, len(requests))
        seconds = time.perf_counter() - start
        return [
            Generation(one.id, key, len(reading.ids), 0, "stop", seconds)
            for one, key, reading in zip(requests, keys, readings, strict=True)
        ]

    def likelihood_reading(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        """How likely continuations are while peers are read: of peers that read along, as if the primary said them.

        Raises:
            MixmergeError: a text does not fit into the expert's context, or a peer has left nothing.
        """
        reader = self.companion.reader
        readings = [
            reader.with_answer(one.prompt, one.continuation, role="primary", end=False) for one in scorings
        ]
        found: dict[int, Likelihood] = {}
        texts = [one.ids for one in readings]
        for batch in batches(texts, [1] * len(texts), budget=self.batch_tokens):
            some = [readings[at] for at in batch]
            told = [scorings[at] for at in batch]
            logits = self._fit(partial(self._logits_reading, told, some), len(batch))
            for at, row, one in zip(batch, logits, some, strict=True):
                found[at] = likelihood(scorings[at].id, row, one.ids[one.answer_from :])
        return [found[at] for at in range(len(scorings))]

    def _load(self) -> Loaded:
        loaded = self.companion.load()
        _in_type(self._glue, self.name, loaded.model.dtype)
        return loaded

    def _read(self, request: Request) -> tuple[list[int], Fault | None]:
        if not request.offers:
            return super()._read(request)
        try:
            return list(self.companion.reading(request.prompt).ids), None
        except MixmergeError as error:
            fault = error.faults[0]
            return [], Fault(
                f"request {request.id}: prompt", f"{fault.where}: {fault.what}", fault.allowed, fault.run
            )

    # --- what is read beside

    def _beside(self, rows: Sequence[Asked]) -> Beside:
        if not any(row.reads for row in rows):
            return super()._beside(rows)
        from mixmerge.latent.generating import LatentRows, Told

        reader = self.companion.reader
        prompts = [row.text if row.asked is None else row.asked for row in rows]
        told = [
            Told(reader.prompt(prompt), row.reads, row.explain)
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return LatentRows(
            self._interaction(),
            reader,
            told,
            self._memory(told, prompts),
            followers=self._followers(told, prompts),
            mode=self._mode,
            chunk=self._chunk,
        )

    def _logits_reading(self, scorings: Sequence[Scoring], readings: Sequence[Reading]) -> torch.Tensor:
        keep = max(len(one.ids) - one.answer_from for one in readings) + 1
        return self._logits([one.ids for one in readings], self._scoring(scorings, readings), keep)

    def _scoring(self, scorings: Sequence[Scoring], readings: Sequence[Reading]) -> Beside:
        from mixmerge.latent.generating import ScoredRows, Told

        told = [Told(reading, one.reads) for one, reading in zip(scorings, readings, strict=True)]
        prompts = [one.prompt for one in scorings]
        if self._mode == "prompt":
            memory = self._memory(told, prompts)
        else:
            memory = self._whole(scorings, readings)
        upto = [upto_of(reading, self._mode, self._chunk) for reading in readings]
        return ScoredRows(self._interaction(), told, memory, upto)

    @property
    def _dtype(self) -> torch.dtype:
        found: torch.dtype = self._expert().model.dtype
        return found

    def _interaction(self) -> Interaction:
        from mixmerge.latent.interaction import Interaction

        return Interaction(self._expert().model, self._glue, self.name)

    def _memory(self, rows: Sequence[Told], prompts: Sequence[Prompt]) -> Memory:
        """What rows may read of prompts; nothing yet where peers read along."""
        if self._mode != "prompt":
            return self._glue.blank(self.name, len(rows), dtype=self._dtype)
        found = [
            [(peer, self._near(self._offers.get(peer, prompt))) for peer, _ in row.reads]
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return self._glue.memory(self.name, found, dtype=self._dtype)

    def _whole(self, scorings: Sequence[Scoring], readings: Sequence[Reading]) -> Memory:
        """What rows may read of prompts and answers, where peers read along."""
        reader = self.companion.reader
        found: list[list[tuple[str, Latents]]] = []
        for one, reading in zip(scorings, readings, strict=True):
            said = reader.said(reading.ids[reading.answer_from :])
            found.append([(peer, self._peers[peer].read(one.prompt, said)) for peer, _ in one.reads])
        return self._glue.memory(self.name, found, dtype=self._dtype)

    def read(self, prompt: Prompt, said: str) -> Latents:
        """What it leaves of a prompt and what was said to it."""
        from mixmerge.latent.peers import latents

        one = self.companion
        reading = one.reader.with_answer(prompt, said, role="peer", too_long=one.too_long)
        return latents(self._expert(), [reading], one.depths, batch_tokens=self.batch_tokens)[0]

    def _followers(self, rows: Sequence[Told], prompts: Sequence[Prompt]) -> list[Follower]:
        """Peers that read along, each for the rows that read it."""
        if self._mode == "prompt":
            return []
        found = []
        for name in dict.fromkeys(peer for row in rows for peer, _ in row.reads):
            places = [
                (at, column)
                for at, row in enumerate(rows)
                for column, (peer, _) in enumerate(row.reads, start=1)
                if peer == name
            ]
            found += self._peers[name].following(
                places, [prompts[at] for at, _ in places], self._glue, self._dtype
            )
        return found

    def following(
        self, places: Sequence[tuple[int, int]], prompts: Sequence[Prompt], glue: Glue, dtype: torch.dtype
    ) -> list[Follower]:
        """This expert as a peer of rows.

        Args:
            places: of each row, its place in the batch and its column of gates.
            prompts: of these rows.
            glue: projects what it leaves.
            dtype: of the primary's states.
        """
        from mixmerge.engines.decoding import slides
        from mixmerge.latent.following import Follower

        expert = self._expert()
        readings = [self.companion.reading(one) for one in prompts]
        # What counts places in a cache counts the holes that rows of unlike lengths leave in it.
        alone = slides(expert.model)
        parts = [[at] for at in range(len(places))] if alone else [list(range(len(places)))]
        return [
            Follower(
                expert.model,
                self.companion.reader,
                self.name,
                glue,
                rows=[places[at][0] for at in part],
                columns=[places[at][1] for at in part],
                prompts=[readings[at] for at in part],
                dtype=dtype,
            )
            for part in parts
        ]

    def _near(self, one: Latents) -> Latents:
        """The same on the expert's device."""
        return Latents(tuple(state.to(self.device) for state in one.states), one.ends.to(self.device))


def _in_type(glue: Glue, name: str, dtype: torch.dtype) -> None:
    """Its matrices in the expert's type: what products are in anyway, converted once and not for every token."""
    for level in range(glue.levels):
        for one in glue.bridge(name, level).parameters():
            if one.dim() > 1:
                one.data = one.data.to(dtype)
