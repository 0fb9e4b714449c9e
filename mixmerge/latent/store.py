"""Latents on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.errors import Fault, OutputError
from mixmerge.latent.records import Latents, Reading

_SUFFIX = ".latents"
_UNFINISHED = ".new-"
_ABANDONED = 3600.0  # seconds after which nobody writes a file any more
_DIGEST = 32  # bytes behind the tensors, of all before them
_LOOKS = 16  # at what others have put there, while as much as the limit is put


class Store:
    """A folder of latents, for training again and for jobs that run peers first.

    A file is named by all that its states follow from, and ends with a hash of itself: what is damaged, cut or under a
    wrong name is not there. Several processes may use one folder.

    Args:
        folder: made when something is put there.
        limit: bytes, 1 or more; beyond them what was not used for longest goes. None: half of what the disk has for it.
    """

    def __init__(self, folder: Path, *, limit: int | None = None) -> None:
        self.folder, self._limit = Path(folder), limit
        self._most = limit or 0  # bytes, when the folder was last looked at
        self._total: int | None = None
        self._new = 0  # bytes put since then

    def key(self, expert: str, reading: Reading, depths: Sequence[int | Literal["last"]], dtype: str) -> str:
        """Where a reading's latents are: 64 hex digits.

        Args:
            expert: the expert's hash.
            reading: of that expert.
            depths: of each level.
            dtype: of the states, such as ``bfloat16``.
        """
        return canonical_hash([1, expert, list(reading.ids), list(depths), dtype])

    def has(self, key: str) -> bool:
        """Whether there is a file of them, which may be damaged."""
        return self._path(key).is_file()

    def get(self, key: str, reading: Reading) -> Latents | None:
        """On the CPU. None if they are not there, or the file is damaged (it is removed then)."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if data[-_DIGEST:] == _digest(key, data[:-_DIGEST]):
            with contextlib.suppress(SafetensorError, KeyError, ValueError):
                found = _unpacked(data[:-_DIGEST], reading)
                with contextlib.suppress(OSError):  # another process may have removed it
                    os.utime(path)
                return found
        self._remove(path)
        return None

    @property
    def room(self) -> int:
        """Bytes of all that it keeps, at most."""
        if self._total is None:
            self._look()
        return self._most

    def nbytes(self, keys: Collection[str]) -> int:
        """What these take, as far as they are there."""
        found = 0
        for key in set(keys):
            with contextlib.suppress(OSError):
                found += self._path(key).stat().st_size
        return found

    def put(self, key: str, latents: Latents, *, beside: Collection[str] = ()) -> None:
        """Keep them; whole or not at all.

        Args:
            key: as ``key`` gives it.
            latents: what is kept, whatever the limit.
            beside: keys of others that make no room for them.

        Raises:
            OutputError: the disk refuses.
        """
        path = self._path(key)
        data = _packed(latents)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, new = tempfile.mkstemp(prefix=_UNFINISHED, dir=path.parent)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                    file.write(_digest(key, data))
                Path(new).replace(path)
            except BaseException:
                Path(new).unlink(missing_ok=True)
                raise
        except OSError as error:
            what = f"cannot be written: {error.strerror or error}"
            raise OutputError(
                Fault(str(self.folder), what, run="Free some space, or name another folder")
            ) from error
        if self._total is not None:
            self._total += len(data) + _DIGEST
            self._new += len(data) + _DIGEST
        self._bound({str(path), *(str(self._path(one)) for one in beside)})

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}{_SUFFIX}"

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            if self._total is not None:
                self._total -= size

    def _bound(self, kept: Collection[str]) -> None:
        """Remove what was not used for longest, down to nine tenths of the limit, so that it is not done each time."""
        if self._total is not None and self._total <= self._most and self._new <= self._most // _LOOKS:
            return
        files, total = self._look()
        if total <= self._most:
            return
        for _, path, size in files:
            if total <= self._most * 9 // 10:
                return
            if path not in kept:
                self._remove(Path(path))
                total -= size

    def _look(self) -> tuple[list[tuple[int, str, int]], int]:
        """When each file was used last, its name and bytes, longest ago first; and bytes of all."""
        for one in self.folder.glob(f"*/{_UNFINISHED}*"):  # of a process that was killed
            with contextlib.suppress(OSError):
                if time.time() - one.stat().st_mtime > _ABANDONED:
                    one.unlink()
        files = []
        for one in self.folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(OSError):
                state = one.stat()
                files.append((state.st_mtime_ns, str(one), state.st_size))
        self._total, self._new = sum(size for _, _, size in files), 0
        if self._limit is None:
            self._most = max(1, (self._free() + self._total) // 2)
        return sorted(files), self._total

    def _free(self) -> int:
        """Bytes of the disk, whether the folder is there or will be."""
        place = self.folder.absolute()
        there = next((one for one in (place, *place.parents) if one.is_dir()), Path(place.anchor))
        return shutil.disk_usage(there).free


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST, key=bytes.fromhex(key)).digest()


def _packed(latents: Latents) -> bytes:
    """Each state once, though levels may share it, and which of them each level has."""
    once = {id(one): one for one in latents.states}
    names = {key: str(number) for number, key in enumerate(once)}
    tensors = {names[key]: one.detach().contiguous().cpu() for key, one in once.items()}
    tensors["levels"] = torch.tensor([int(names[id(one)]) for one in latents.states])
    packed: bytes = save(tensors)
    return packed


def _unpacked(data: bytes, reading: Reading) -> Latents:
    tensors = load(data)
    levels = tensors["levels"].tolist()
    ends = torch.tensor(reading.ends, dtype=torch.int64)
    states = tuple(tensors[str(level)] for level in levels)
    if any(len(one) != len(ends) for one in states):
        raise ValueError("another text's")
    return Latents(states, ends)
