"""The output folder: written in a hidden partial beside it, journaled, and renamed when it is whole.

A killed merge leaves the partial; the same merge goes on from what its journal says is on the disk. A folder
under the final name is always finished.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from mixmerge.errors import Fault, OutputError
from mixmerge.plan import Plan, Task

_JOURNAL = "journal.jsonl"
# Bytes written between two calls of fdatasync: what a power cut can cost, and how early the disk starts.
_FLUSH = 256_000_000
_SPARE = 50_000_000


def _fault(path: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            Fault(str(path), "the disk is full", run="Free some space and run the same command: it goes on")
        )
    return OutputError(Fault(str(path), f"cannot be written: {error.strerror}"))


def check_target(plan: Plan, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, or that would destroy something.

    Raises:
        OutputError: see the message.
    """
    for model in plan.models:
        for folder in filter(None, (model.path, model.adapter)):
            if folder.resolve().is_relative_to(out.resolve()):
                raise OutputError(
                    Fault(
                        str(out), f"{folder} is an input of this merge and in it", run="Name another folder"
                    )
                )
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputError(Fault(str(out), "it exists", run="Name another folder, or pass --overwrite"))
    ours = out.is_dir() and (
        not any(out.iterdir()) or (out / "config.json").exists() or (out / "mixmerge_manifest.json").exists()
    )
    if not ours or out.is_symlink():
        raise OutputError(
            Fault(
                str(out), "it exists and is not a model folder, so it is not overwritten", run="Name another"
            )
        )


class Output:
    """One output folder in the making, as a context manager.

    Args:
        plan: what will be written.
        out: the folder's final path.
        identity: names recipe, inputs and versions; a partial of another identity is thrown away.
        overwrite: replace an existing model folder at the very end.
    """

    def __init__(self, plan: Plan, out: Path, *, identity: str, overwrite: bool) -> None:
        self.plan, self.out, self._identity, self._overwrite = plan, out, identity, overwrite
        self.partial = out.parent / f".{out.name}.mixmerge-partial"
        self._old = out.parent / f".{out.name}.mixmerge-old"
        self.finished: set[str] = set()
        self._folder = -1
        self._shards: list[int] = []
        self._journal = -1
        self._unflushed: list[str] = []
        self._bytes = 0
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._closing = False
        self._flusher: threading.Thread | None = None
        self._flush_error: OutputError | None = None

    def __enter__(self) -> Output:
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._restore()
            check_target(self.plan, self.out, overwrite=self._overwrite)
            self._read_journal()
            self._open_shards()
        except OSError as error:
            self._close()
            raise _fault(self.partial, error) from error
        except OutputError:
            self._close()
            raise
        self._flusher = threading.Thread(target=self._flush_loop, name="mixmerge-flush", daemon=True)
        self._flusher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._flusher is not None:
            self._flusher.join()
        self._close()

    def _close(self) -> None:
        for handle in (*self._shards, self._journal, self._folder):
            if handle >= 0:
                os.close(handle)
        self._shards, self._journal, self._folder = [], -1, -1

    def _take_lock(self) -> None:
        # The lock is on the folder itself, so the kernel drops it with a killed process. Between making and
        # locking the folder another merge may have finished and renamed it: then it is not ours.
        while True:
            self.partial.mkdir(exist_ok=True)
            handle = os.open(self.partial, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise OutputError(
                    Fault(
                        str(self.out),
                        "another merge is writing it",
                        run="Wait for it, or name another folder",
                    )
                ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), self.partial.stat()):
                    self._folder = handle
                    return
            os.close(handle)

    def _restore(self) -> None:
        """Undo an overwrite that was killed between its two renames, or finish its cleaning."""
        if self._old.exists():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)

    def _read_journal(self) -> None:
        path = self.partial / _JOURNAL
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if lines and lines[0] == json.dumps(self._identity):
            self.finished = {name for line in lines[1:] for name in json.loads(line)}
        else:
            for entry in self.partial.iterdir():
                entry.unlink()
            self._check_room()
            path.write_text(json.dumps(self._identity) + "\n")
        self._journal = os.open(path, os.O_WRONLY | os.O_APPEND)
        # A line that a kill cut short is not believed, and must not be continued.
        os.ftruncate(self._journal, sum(len(line) + 1 for line in lines) or path.stat().st_size)

    def _check_room(self) -> None:
        free, needed = shutil.disk_usage(self.partial).free, self.plan.bytes_written + _SPARE
        if free < self.plan.bytes_written:
            raise OutputError(
                Fault(
                    str(self.out.parent),
                    f"the disk has {free / 1e9:.2f} GB free, the output needs {needed / 1e9:.2f} GB",
                    run="Free some space, or name a folder on another disk",
                )
            )

    def _open_shards(self) -> None:
        for shard in self.plan.shards:
            handle = os.open(self.partial / shard.file, os.O_RDWR | os.O_CREAT, 0o666)
            self._shards.append(handle)
            os.ftruncate(handle, shard.nbytes)
            os.pwrite(handle, shard.header, 0)

    def write(self, task: Task, start: int, data: memoryview) -> None:
        """Write ``data`` at byte ``start`` of a task's target.

        Raises:
            OutputError: the disk is full or refuses.
        """
        at, size = task.target.offset + start, len(data)
        try:
            while data:
                count = os.pwrite(self._shards[task.target.shard], data, at)
                at, data = at + count, data[count:]
        except OSError as error:
            raise _fault(self.partial / self.plan.shards[task.target.shard].file, error) from error
        with self._wake:
            self._bytes += size
            if self._flush_error is not None:
                raise self._flush_error

    def done(self, task: Task) -> None:
        """Note that every byte of a task's target has been written."""
        with self._wake:
            self._unflushed.append(task.target.name)
            if self._bytes >= _FLUSH:
                self._wake.notify_all()

    def _flush_loop(self) -> None:
        while True:
            with self._wake:
                while self._bytes < _FLUSH and not self._closing:
                    self._wake.wait()
                closing = self._closing
            if closing:
                return
            try:
                self._flush()
            except OSError as error:
                with self._wake:
                    self._flush_error = _fault(self.partial, error)
                return

    def _flush(self) -> None:
        with self._wake:
            names, self._unflushed, self._bytes = self._unflushed, [], 0
        for handle in self._shards:
            os.fdatasync(handle)
        os.write(self._journal, (json.dumps(names) + "\n").encode())

    def add(self, name: str, text: str) -> None:
        """Write a small file."""
        try:
            (self.partial / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise _fault(self.partial / name, error) from error

    def flush(self) -> None:
        """Put every written byte on the disk and note it in the journal."""
        try:
            self._flush()
        except OSError as error:
            raise _fault(self.partial, error) from error

    def publish(self) -> None:
        """Give the finished folder its name.

        Raises:
            OutputError: the disk refuses, or the name was taken meanwhile.
        """
        try:
            (self.partial / _JOURNAL).unlink()
            for path in _files(self.partial):
                _sync(path)
            _sync(self.partial)
            if self.out.exists():
                check_target(self.plan, self.out, overwrite=self._overwrite)
                self.out.rename(self._old)
            self.partial.rename(self.out)
            _sync(self.out.parent)
            if self._old.exists():
                shutil.rmtree(self._old)
        except OSError as error:
            raise _fault(self.out, error) from error


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.iterdir()) if path.is_file())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
