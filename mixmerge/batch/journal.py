"""What a job has done so far: an append-only file that outlives the process.

One JSON object a line, ``{"crc": "8 hex digits", "data": {...}}``, where ``crc`` is the CRC-32 of the text of ``data``.
Answers of a batch are written by one call, and the line that ends the batch by the same: an answer counts only if its
batch has ended. So a batch that a kill broke off is run again whole, and its answers come out as they would have.

What is written survives a kill of the process at once. ``fsync`` is called when a batch ends more than ``SYNC_SECONDS``
after the last call, and when the journal is closed: a power cut costs that much work, and nothing else.

A line that is torn at the end is cut off. One that is damaged elsewhere is left where it is and does not count.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError, OutputError

Data = Mapping[str, Any]
FILE = "journal.jsonl"  # in a job's folder
SYNC_SECONDS = 1.0
_HEAD, _MIDDLE, _TAIL = b'{"crc": "', b'", "data": ', b"}\n"
_DATA_AT = len(_HEAD) + 8 + len(_MIDDLE)


def key_of(*parts: str | int) -> int:
    """64 bits of the hash of what names an answer."""
    text = json.dumps(parts, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def line_of(data: Data) -> bytes:
    """A line of the journal."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
    return _HEAD + b"%08x" % zlib.crc32(text) + _MIDDLE + text + _TAIL


def data_of(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is damaged."""
    text = line[_DATA_AT : -len(_TAIL)]
    if line[:_DATA_AT] != _HEAD + b"%08x" % zlib.crc32(text) + _MIDDLE or not line.endswith(_TAIL):
        return None
    try:
        data = json.loads(text)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def line_at(file: int, offset: int) -> bytes:
    """The line of an open file that starts there."""
    found, step = b"", 4096
    while b"\n" not in found:
        more = os.pread(file, step, offset + len(found))
        if not more:
            return found
        found, step = found + more, step * 4
    return found[: found.index(b"\n") + 1]


class Journal:
    """The journal of a job, open for reading and appending; one process at a time.

    Args:
        path: of the file; made if it is not there.
        job: what the job is: a journal of another one is refused.

    Raises:
        OutputError: another process has it open, it is of another job, or the disk refuses.
    """

    def __init__(self, path: Path, *, job: Data) -> None:
        self.path, self.job = path, dict(job)
        self.damaged = 0
        self.splits: set[str] = set()
        self.events: list[dict[str, Any]] = []
        self.ended: set[str] = set()
        self._lock = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise fault_of(path, error) from error
        try:
            _claim(self._file, path)
            self._keys, self._offsets = self._read()
            self._end = os.fstat(self._file).st_size
            if not self._end:
                self._append([{"job": self.job}])
        except BaseException:
            os.close(self._file)
            raise
        self._synced = time.monotonic()

    def find(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Where the answers of these keys are; -1 where there is none."""
        if not len(self._keys):
            return np.full(len(keys), -1, np.int64)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[at] == keys, self._offsets[at], -1)

    def answer(self, offset: int) -> dict[str, Any]:
        """The answer at a place that ``find`` or ``end`` told."""
        data = data_of(line_at(self._file, offset))
        if data is None:
            raise OutputError(
                Fault(str(self.path), f"the answer at byte {offset:,} was damaged while the job ran")
            )
        return data

    def end(self, batch: str, answers: Iterable[tuple[int, Data]], done: Data) -> list[int]:
        """Write the answers of a batch, each with its key, and that it ended. Where each of them is.

        Args:
            batch: its name.
            answers: key, and what was said.
            done: what the batch took.
        """
        lines = [line_of({"key": f"{key:016x}", "batch": batch, **said}) for key, said in answers]
        last = line_of({"end": batch, "answers": len(lines), **done})
        with self._lock:
            start = self._end
            self._write(b"".join(lines) + last)
            self.ended.add(batch)
            self.events.append({"end": batch, **done})
            if time.monotonic() - self._synced >= SYNC_SECONDS:
                self._sync()
        places = np.cumsum([start, *map(len, lines)])
        return [int(place) for place in places[:-1]]

    def note(self, event: Data) -> None:
        """Write something else that happened: a load, a batch that was split."""
        with self._lock:
            self._append([event])
            self._take(dict(event))

    def remove(self) -> None:
        """Take away the folder it is in, while nobody else can open it; then close."""
        _clear(self.path.parent)
        self.close()

    def close(self) -> None:
        """Bring all to the disk; nothing if it is closed."""
        with self._lock:
            if self._file < 0:
                return
            with contextlib.suppress(OSError):
                self._sync()
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- the file

    def _read(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Keys, sorted, and places of the answers of batches that have ended; a torn end is cut off."""
        keys, offsets = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        pending: list[tuple[str, int, int]] = []  # batch, key, place: the lines of a batch follow each other
        end, seen_job = 0, False
        for offset, line in self._lines():
            if not line.endswith(b"\n"):
                break
            end = offset + len(line)
            data = data_of(line)
            if data is None:
                self.damaged += 1
            elif "job" in data:
                self._same_job(data["job"])
                seen_job = True
            elif "key" in data:
                pending.append((str(data["batch"]), int(data["key"], 16), offset))
                continue
            elif "end" in data:
                count = int(data["answers"])
                mine = pending[len(pending) - count :] if count <= len(pending) else []
                if len(mine) == count and all(batch == data["end"] for batch, _, _ in mine):
                    keys.append(np.array([key for _, key, _ in mine], np.uint64))
                    offsets.append(np.array([place for _, _, place in mine], np.int64))
                    self.ended.add(str(data["end"]))
                    self.events.append(data)
            else:
                self._take(data)
            pending.clear()
        if end and not seen_job:
            raise OutputError(
                Fault(
                    str(self.path),
                    "its first line is damaged, so it cannot be told what job it is of",
                    run="Remove the folder it is in to start again",
                )
            )
        os.ftruncate(self._file, end)
        every, places = np.concatenate(keys), np.concatenate(offsets)
        order = np.argsort(every, kind="stable")
        return every[order], places[order]

    def _same_job(self, found: Any) -> None:
        if found == self.job:
            return
        known = found if isinstance(found, dict) else {}
        other = [name for name in {**self.job, **known} if known.get(name) != self.job.get(name)]
        raise OutputError(
            Fault(
                str(self.path),
                f"belongs to a job with another {' and another '.join(sorted(other))}",
                run="Give back what has changed to go on with it, or start again with --overwrite",
            )
        )

    def _take(self, data: dict[str, Any]) -> None:
        self.events.append(data)
        if "split" in data:
            self.splits.add(str(data["split"]))

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        offset = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for line in file:
                yield offset, line
                offset += len(line)

    def _append(self, events: Iterable[Data]) -> None:
        self._write(b"".join(map(line_of, events)))

    def _write(self, text: bytes) -> None:
        """All of it, or nothing: what a full disk left behind is cut off again."""
        written = 0
        try:
            while written < len(text):
                written += os.write(self._file, memoryview(text)[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise fault_of(self.path, error) from error
        self._end += len(text)

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced = time.monotonic()


def remove(folder: Path) -> None:
    """Take away a job's folder, the journal last: as long as that is there, the job is known.

    Raises:
        OutputError: another process is at work on the job.
    """
    path = folder / FILE
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
        return
    except OSError as error:
        raise fault_of(path, error) from error
    try:
        _claim(file, path)
        _clear(folder)
    finally:
        os.close(file)


def _clear(folder: Path) -> None:
    with contextlib.suppress(OSError):
        for other in folder.iterdir():
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            elif other.name != FILE:
                other.unlink()
        (folder / FILE).unlink()
        folder.rmdir()


def _claim(file: int, path: Path) -> None:
    """Lock the open file; it is ours until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(
            Fault(str(path), "another process is at work on this job", run="Wait for it, or end it")
        ) from error
    if not os.fstat(file).st_nlink:
        raise OutputError(
            Fault(str(path), "another process has just ended this job", run="Look at its output")
        )


def fault_of(path: Path, error: OSError) -> MixmergeError:
    """What the disk refused, for people."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            Fault(str(path), "the disk is full", run="Free some space and run the same command: it goes on")
        )
    return OutputError(Fault(str(path), f"cannot be written: {error.strerror}"))
