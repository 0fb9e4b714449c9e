"""The experts of an interaction as an engine meets them: where they are, how they read, what they leave of prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mixmerge.engines.batching import batches
from mixmerge.engines.loading import Dtype, Loaded, load_model, loaded_of
from mixmerge.engines.records import Message
from mixmerge.engines.shortage import within_memory
from mixmerge.errors import Fault, MixmergeError, OutOfMemoryError, OutputError
from mixmerge.latent.offsets import Reader, TooLong, reader_of
from mixmerge.latent.peers import latents
from mixmerge.latent.records import Latents, Reading
from mixmerge.latent.store import Store
from mixmerge.registry import choices

Prompt = str | tuple[Message, ...]
Wanted = tuple[str, Prompt]  # a peer and what it is to have read
_REMEMBERED = 1024  # prompts
Depths = tuple[int | Literal["last"], ...]


class Companion:
    """One of the experts.

    Args:
        name: of it.
        model: folder or hub id; of the base, where there is an ``adapter``.
        adapter: of PEFT, which is merged into the weights.
        revision: of a hub id.
        hash: of the expert, as the glue knows it.
        depths: where its states are read.
        dtype, device: of the weights in memory.
        too_long: what becomes of a prompt that it has no room for.
    """

    def __init__(
        self,
        name: str,
        model: str,
        *,
        adapter: str | None = None,
        revision: str | None = None,
        hash: str,
        depths: Depths,
        dtype: Dtype,
        device: str,
        too_long: TooLong,
    ) -> None:
        self.name, self.model, self.adapter, self.revision = name, model, adapter, revision
        self.hash, self.depths = hash, depths
        self.dtype, self.device, self.too_long = dtype, device, too_long
        self._readings: dict[
            Prompt, Reading
        ] = {}  # a prompt is looked at when it is checked, and when it is answered

    def load(self) -> Loaded:
        """Into memory.

        Raises:
            MixmergeError: it cannot be read.
            OutOfMemoryError: it does not fit.
        """
        return within_memory(
            self._load,
            where=f"expert {self.name}",
            what="out of memory while it was loaded",
            run="Unload another expert, or load it in a smaller dtype",
        )

    @cached_property
    def reader(self) -> Reader:
        """How it reads texts; its weights are not needed for that.

        Raises:
            MixmergeError: its files cannot be read, or its tokenizer gives no offsets.
        """
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(self.model, revision=self.revision, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(
                self.model, revision=self.revision, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            what = f"cannot be read: {reason}"
            raise MixmergeError(
                Fault(f"expert {self.name}", what, "A folder with config, weights and tokenizer")
            ) from error
        return reader_of(tokenizer, config, name=self.name)

    def reading(self, prompt: Prompt) -> Reading:
        """A prompt, as it reads it for others.

        Raises:
            MixmergeError: it has no room for it, and does not cut; as ``reader``.
        """
        found = self._readings.get(prompt)
        if found is None:
            if len(self._readings) >= _REMEMBERED:
                self._readings.clear()
            found = self._readings[prompt] = self.reader.prompt(prompt, too_long=self.too_long)
        return found

    def key(self, store: Store, reading: Reading) -> str:
        """What its latents of a prompt are kept under. ``auto`` is one type, that of the weights in its files."""
        return store.key(self.hash, reading, self.depths, self.dtype)

    def offer(
        self,
        loaded: Loaded,
        readings: Sequence[Reading],
        store: Store,
        *,
        batch_tokens: int,
        beside: Collection[str] = (),
    ) -> list[str]:
        """Keep its latents of prompts, and say under which names; what is there already is not made again.

        Args:
            loaded: it.
            readings: of the prompts.
            store: where they are kept.
            batch_tokens: of a batch; more than one batch of them is never in memory.
            beside: as of ``Store.put``.
        """
        keys = [self.key(store, reading) for reading in readings]
        lacking = {key: reading for key, reading in zip(keys, readings, strict=True) if not store.has(key)}
        names, left = list(lacking), list(lacking.values())
        for batch in batches([one.ids for one in left], [0] * len(left), budget=batch_tokens):
            made = latents(loaded, [left[at] for at in batch], self.depths, batch_tokens=batch_tokens)
            for at, one in zip(batch, made, strict=True):
                store.put(names[at], one, beside=beside)
        return keys

    def _load(self) -> Loaded:
        if self.adapter is None:
            return load_model(self.model, self.revision, self.dtype, self.device, self.name)
        from mixmerge.experts.loading import load_expert

        found = load_expert(
            self.model, adapter=self.adapter, revision=self.revision, device=self.device, dtype=self.dtype
        )
        return loaded_of(found.model, found.tokenizer, self.name)


@dataclass(frozen=True)
class Lacking:
    """Latents that are wanted and not there."""

    peer: str
    prompt: Prompt
    reading: Reading


class Offers:
    """What peers leave of prompts: read from a store, or made by loading them one after the other.

    Args:
        companions: by name.
        store: folder; None, or one whose parent is not on this machine: a temporary one.
        limit: bytes of it, as of ``Store``; what a single prompt's peers leave is kept all the same.
        batch_tokens: of a batch.
    """

    def __init__(
        self,
        companions: Mapping[str, Companion],
        store: str | None,
        *,
        limit: int | None = None,
        batch_tokens: int,
    ) -> None:
        self.companions, self._batch_tokens = companions, batch_tokens
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._folder, self._limit = store, limit

    @cached_property
    def store(self) -> Store:
        folder = self._folder
        if folder is None or not Path(folder).parent.is_dir():
            self._own = tempfile.TemporaryDirectory(prefix="mixmerge-latents-")
            folder = self._own.name
        return Store(Path(folder), limit=self._limit)

    def companion(self, name: str) -> Companion:
        if name not in self.companions:
            what = f"no expert is called {name!r}"
            raise MixmergeError(Fault("peer", what, choices(name, list(self.companions))))
        return self.companions[name]

    def get(self, peer: str, prompt: Prompt) -> Latents:
        """What a peer has left of a prompt.

        Raises:
            MixmergeError: it cannot read it.
            OutOfMemoryError: it is not there, or no more: what else was wanted needed the room.
        """
        one = self.companion(peer)
        reading = one.reading(prompt)
        found = self.store.get(one.key(self.store, reading), reading)
        if found is None:
            what = "what it left of a prompt is gone: there was no room for it beside others"
            run = "Give it fewer requests at once, or more room for latents"
            raise OutOfMemoryError(Fault(f"peer {peer}", what, run=run))
        return found

    def lacking(self, wanted: Sequence[Wanted]) -> tuple[list[Lacking], dict[Wanted, Fault]]:
        """What is not there of peers' prompts; and what cannot be there, with the reason."""
        found, faults = [], {}
        for peer, prompt in dict.fromkeys(wanted):
            try:
                one = self.companion(peer)
                reading = one.reading(prompt)
            except MixmergeError as error:
                faults[peer, prompt] = _told(error, peer)
                continue
            # Read, not looked for: a damaged file is none, and what was just read is the last to make room.
            if self.store.get(one.key(self.store, reading), reading) is None:
                found.append(Lacking(peer, prompt, reading))
        return found, faults

    def prepare(self, wanted: Sequence[Wanted], *, before: Callable[[], None]) -> dict[Wanted, Fault]:
        """Make what is lacking: load the peers, one after the other, and keep what they leave.

        Args:
            wanted: peers and prompts.
            before: called before any of them is loaded.

        Returns:
            What cannot be made, with the reason.

        Raises:
            OutOfMemoryError: of several prompts at once it does not fit into memory, or into the store.
            OutputError: the disk refuses.
        """
        lacking, faults = self.lacking(wanted)
        if not lacking:
            return faults
        before()
        keys = self._keys([pair for pair in wanted if pair not in faults])
        prompts = len({prompt for _, prompt in wanted})
        for peer in dict.fromkeys(one.peer for one in lacking):
            mine = [one for one in lacking if one.peer == peer]
            failed = self._make(self.companions[peer], [one.reading for one in mine], keys)
            if failed is not None and failed.crowded:
                raise OutOfMemoryError(failed.fault)
            if failed is not None:
                faults |= dict.fromkeys([(peer, one.prompt) for one in mine], failed.fault)
            taken = self.store.nbytes(keys)
            if prompts > 1 and taken > self.store.room:
                room = f"{taken / 1e9:,.3g} GB, and there is room for {self.store.room / 1e9:,.3g}"
                what = f"what peers leave of {prompts:,} prompts takes {room}"
                run = "Give it fewer requests at once, or more room for latents"
                raise OutOfMemoryError(Fault("latents", what, run=run))
        return faults

    def _keys(self, wanted: Sequence[Wanted]) -> set[str]:
        found = ((self.companions[peer], prompt) for peer, prompt in wanted)
        return {one.key(self.store, one.reading(prompt)) for one, prompt in found}

    def _make(self, one: Companion, readings: Sequence[Reading], keys: Collection[str]) -> _Failed | None:
        """Load a peer, and keep what it leaves. An error is not handed on: it would hold the peer in memory."""
        try:
            loaded = one.load()
        except MixmergeError as error:
            return _Failed(_told(error, one.name))

        def work() -> None:
            one.offer(loaded, readings, self.store, batch_tokens=self._batch_tokens, beside=keys)

        run = "Give it shorter prompts, or fewer batch_tokens"
        try:
            within_memory(work, where=f"expert {one.name}", what="out of memory on its prompts", run=run)
        except OutputError:
            raise
        except MixmergeError as error:
            crowded = isinstance(error, OutOfMemoryError) and len(readings) > 1
            return _Failed(_told(error, one.name), crowded)
        return None


@dataclass(frozen=True)
class _Failed:
    """Why a peer left nothing; ``crowded``: fewer prompts may do."""

    fault: Fault
    crowded: bool = False


def _told(error: MixmergeError, peer: str) -> Fault:
    """The first fault, with whose it is."""
    fault = error.faults[0]
    where = fault.where if peer in fault.where else f"peer {peer}: {fault.where}"
    return Fault(where, fault.what, fault.allowed, fault.run)


def companions_of(
    experts: Mapping[str, Mapping[str, Any]],
    hashes: Mapping[str, str],
    depths: Mapping[str, Depths],
    *,
    dtype: Dtype,
    device: str,
    too_long: TooLong,
) -> dict[str, Companion]:
    """The experts by name.

    Args:
        experts: name -> ``model``, and ``adapter`` and ``revision`` where there are.
        hashes, depths: as the glue knows them.
        dtype, device, too_long: as of ``Companion``.
    """
    return {
        name: Companion(
            name,
            str(one["model"]),
            adapter=one.get("adapter"),
            revision=one.get("revision"),
            hash=hashes[name],
            depths=depths[name],
            dtype=dtype,
            device=device,
            too_long=too_long,
        )
        for name, one in experts.items()
    }
