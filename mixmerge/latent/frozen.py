"""Experts as they are loaded to be learned with, and proof that they stay what they are.

Legend as in ``records``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mixmerge.engines.shortage import within_memory
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import LoadedExpert, load_expert
from mixmerge.latent.peers import latents
from mixmerge.latent.records import Latents, Reading
from mixmerge.latent.store import Store

_AT_ONCE = 32  # readings that are handed to a peer together
_KEPT = 2**28  # bytes of latents that stay in memory
_SAMPLES = 16  # values of a tensor that are looked at one by one
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Depth = int | Literal["last"]


def weights_digest(model: Any) -> str:
    """SHA-256 over the sum of every tensor's bits and over samples of them: a changed value changes it, cheaply.

    Args:
        model: parameters and buffers are looked at.
    """
    state = hashlib.sha256()
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, value in sorted(named, key=lambda pair: pair[0]):
        flat = value.detach().reshape(-1)
        bits = flat if flat.dtype == torch.bool else flat.view(_BITS[flat.element_size()])
        total = int(bits.sum(dtype=torch.int64)) if len(bits) else 0
        step = max(1, len(bits) // _SAMPLES)
        sample = bits[::step][: _SAMPLES + 1].tolist()
        state.update(f"{name}\0{tuple(value.shape)}\0{value.dtype}\0{total}\0{sample}\n".encode())
    return state.hexdigest()


class Frozen:
    """Experts by name; each is loaded when it is wanted first.

    Args:
        places: name -> folder of the model, and of the adapter that is merged into it.
        device: a torch device.
        dtype: of the weights in memory.
    """

    def __init__(
        self,
        places: Mapping[str, tuple[Path, Path | None]],
        *,
        device: str,
        dtype: Literal["float32", "bfloat16"],
    ) -> None:
        self._places, self._device, self._dtype = places, device, dtype
        self._loaded: dict[str, LoadedExpert] = {}
        self._digests: dict[str, str] = {}

    @property
    def dtype(self) -> str:
        return self._dtype

    def __getitem__(self, name: str) -> LoadedExpert:
        """An expert in evaluation mode, none of whose parameters wants a gradient."""
        if name not in self._loaded:
            model, adapter = self._places[name]
            found = within_memory(
                partial(load_expert, model, adapter=adapter, device=self._device, dtype=self._dtype),
                where=f"expert {name}",
                what="out of memory while it was loaded",
                run="Try precision: bfloat16, or a fixed primary: then peers are loaded one at a time",
            )
            self._loaded[name] = found
            self._digests[name] = weights_digest(found.model)
        return self._loaded[name]

    def drop(self, name: str) -> None:
        """Let go of an expert, if it is loaded.

        Raises:
            MixmergeError: it is not what it was.
        """
        if name in self._loaded:
            self.check(name)
            del self._loaded[name], self._digests[name]

    def check(self, *names: str) -> None:
        """Look whether experts are as they were loaded; of no names all that are.

        Raises:
            MixmergeError: one is not.
        """
        changed = [
            name
            for name in names or tuple(self._loaded)
            if weights_digest(self._loaded[name].model) != self._digests[name]
        ]
        if changed:
            what = "its weights in memory changed while the glue learned"
            raise MixmergeError([Fault(f"expert {name}", what, "Experts are frozen") for name in changed])


class Remembered:
    """Peers' latents of readings, from disk where they are there.

    What a text gets could differ in its last bit with the texts it shares a batch with. Readings are therefore made in
    fixed groups, so that a fit which was killed goes on to the same result.

    Args:
        frozen: the experts.
        store: on disk.
        hashes: of the experts.
        depths: of each expert, where it is read.
    """

    def __init__(
        self,
        frozen: Frozen,
        store: Store,
        *,
        hashes: Mapping[str, str],
        depths: Mapping[str, Sequence[Depth]],
    ) -> None:
        self._frozen, self._store, self._hashes, self._depths = frozen, store, hashes, depths
        self._near: dict[tuple[str, Reading], Latents] = {}  # what was used last is at the end
        self._nbytes = 0

    def prepare(self, expert: str, readings: Sequence[Reading], say: Callable[[int, int], None]) -> None:
        """Make what is not there yet.

        Args:
            expert: a peer.
            readings: all that will be asked for, in an order that is always the same.
            say: told (readings done, in all).

        Raises:
            MixmergeError: its states are not finite.
        """
        unique = list(dict.fromkeys(readings))
        for start in range(0, len(unique), _AT_ONCE):
            group = unique[start : start + _AT_ONCE]
            lacking = [at for at, one in enumerate(group) if self._stored(expert, one) is None]
            if lacking:
                made = within_memory(
                    partial(latents, self._frozen[expert], group, self._depths[expert]),
                    where=f"expert {expert}",
                    what="out of memory while it read the rows",
                    run="Try precision: bfloat16, or shorter rows",
                )
                if not all(bool(state.isfinite().all()) for one in made for state in one.states):
                    what = "its states are not finite, of a row that it reads for others"
                    allowed = "Weights that are numbers, and a precision that holds what they make"
                    raise MixmergeError(Fault(f"expert {expert}", what, allowed))
                for at in lacking:
                    self._store.put(self._key(expert, group[at]), made[at])
            say(min(start + _AT_ONCE, len(unique)), len(unique))

    def of(self, expert: str, readings: Sequence[Reading], device: torch.device) -> list[Latents]:
        """Of each reading its latents, on a device; those that the disk had no room for are made together."""
        found: dict[Reading, Latents] = {}
        for reading in dict.fromkeys(readings):
            one = self._near.get((expert, reading)) or self._stored(expert, reading)
            if one is not None:
                found[reading] = one
        lacking = [reading for reading in dict.fromkeys(readings) if reading not in found]
        made = latents(self._frozen[expert], lacking, self._depths[expert]) if lacking else []
        for reading, one in zip(lacking, made, strict=True):
            self._store.put(self._key(expert, reading), one)
            found[reading] = _moved(one, torch.device("cpu"))
        for reading, one in found.items():
            self._keep(expert, reading, one)
        return [_moved(found[reading], device) for reading in readings]

    def _keep(self, expert: str, reading: Reading, one: Latents) -> None:
        """In memory, as what was used last."""
        before = self._near.pop((expert, reading), None)
        self._nbytes += one.nbytes - (0 if before is None else before.nbytes)
        self._near[expert, reading] = one
        while self._nbytes > _KEPT and len(self._near) > 1:
            first = next(iter(self._near))
            self._nbytes -= self._near.pop(first).nbytes

    def _key(self, expert: str, reading: Reading) -> str:
        return self._store.key(self._hashes[expert], reading, self._depths[expert], self._frozen.dtype)

    def _stored(self, expert: str, reading: Reading) -> Latents | None:
        return self._store.get(self._key(expert, reading), reading)


def _moved(one: Latents, device: torch.device) -> Latents:
    states: tuple[Tensor, ...] = tuple(state.to(device) for state in one.states)
    return Latents(states, one.ends.to(device))
