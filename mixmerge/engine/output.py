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
from pathlib import Path
from types import TracebackType

from mixmerge.engine.target import check_target, named, unwritten
from mixmerge.errors import Fault, MixmergeError, OutputError
from mixmerge.plan import Plan, Shard, Task

_JOURNAL = "journal.jsonl"
# Bytes written between two calls of fdatasync: what a kill can cost, and how early the disk starts.
FLUSH_BYTES = 64_000_000


class Output:
    """One output folder in the making, as a context manager.

    Args:
        plan: what will be written.
        out: the folder's final path.
        identity: names recipe, inputs and versions; a partial of another identity is thrown away.
        overwrite: replace an existing model folder at the very end.
    """

    def __init__(self, plan: Plan, out: Path, *, identity: str, overwrite: bool) -> None:
        self.plan, self.out, self._identity, self._overwrite = plan, named(out), identity, overwrite
        self.partial = self.out.parent / f".{self.out.name}.mixmerge-partial"
        self._old = self.out.parent / f".{self.out.name}.mixmerge-old"
        self.finished: set[str] = set()
        self._kept: set[str] = set()
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
        check_target(self.plan, self.out, overwrite=self._overwrite)
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._restore()
            check_target(self.plan, self.out, overwrite=self._overwrite)
            self._read_journal()
            self._open_shards()
        except OSError as error:
            self._leave(error)
            raise unwritten(self.partial, error) from error
        except OutputError as error:
            self._leave(error)
            raise
        self._flusher = threading.Thread(target=self._flush_loop, name="mixmerge-flush", daemon=True)
        self._flusher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_flusher()
        if error is None:
            self._close()
        else:
            self._leave(error)

    def _stop_flusher(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._flusher is not None:
            self._flusher.join()

    def _leave(self, error: BaseException) -> None:
        """Keep the partial if the same command can go on from it: not where an input is at fault."""
        resumable = isinstance(error, OutputError) or not isinstance(error, MixmergeError)
        with contextlib.suppress(OSError):
            if self._folder >= 0 and os.path.samestat(os.fstat(self._folder), self.partial.stat()):
                if resumable and self._flush_error is None and self._journal >= 0:
                    with contextlib.suppress(OSError):
                        self._flush()
                journal = self.partial / _JOURNAL
                content = journal.read_bytes() if journal.exists() else b""
                if not (resumable and any(_believed(content, self._identity)[:2])):
                    shutil.rmtree(self.partial)
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
            handle = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
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
        content = path.read_bytes() if path.exists() else b""
        self.finished, self._kept, length = _believed(content, self._identity)
        if not all(_is_whole(self.partial, shard) for shard in self.plan.shards):
            self.finished, self._kept = set(), set()
        if not self.finished and not self._kept:
            for entry in self.partial.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            self._check_room()
            length = path.write_bytes(_line(self._identity))
        self._journal = os.open(path, os.O_WRONLY | os.O_APPEND)
        # What a kill cut short must not be continued.
        os.ftruncate(self._journal, length)

    def _check_room(self) -> None:
        free, needed = shutil.disk_usage(self.partial).free, self.plan.room
        if free < needed:
            raise OutputError(
                Fault(
                    str(self.out.parent),
                    f"the disk has {free / 1e6:,.1f} MB free, the output needs {needed / 1e6:,.1f} MB",
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
            raise unwritten(self.partial / self.plan.shards[task.target.shard].file, error) from error
        with self._wake:
            self._bytes += size
            if self._flush_error is not None:
                raise self._flush_error

    def done(self, task: Task) -> None:
        """Note that every byte of a task's target has been written."""
        with self._wake:
            self._unflushed.append(task.target.name)
            if self._bytes >= FLUSH_BYTES:
                self._wake.notify_all()

    def _flush_loop(self) -> None:
        while True:
            with self._wake:
                while self._bytes < FLUSH_BYTES and not self._closing:
                    self._wake.wait()
                closing = self._closing
            if closing:
                return
            try:
                self._flush()
            except OSError as error:
                with self._wake:
                    self._flush_error = unwritten(self.partial, error)
                return

    def _flush(self) -> None:
        with self._wake:
            names, self._unflushed, self._bytes = self._unflushed, [], 0
        for handle in self._shards:
            os.fdatasync(handle)
        line = _line(names)
        if os.write(self._journal, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def add(self, name: str, content: str | bytes) -> None:
        """Write a small file; folders in its name are made."""
        try:
            (self.partial / name).parent.mkdir(parents=True, exist_ok=True)
            (self.partial / name).write_bytes(content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise unwritten(self.partial / name, error) from error

    def keep(self, name: str, content: bytes) -> None:
        """Write a file that took long to make, and note it in the journal: the same merge, killed, has it again."""
        self.add(name, content)
        self.vouch(name)

    def vouch(self, name: str) -> None:
        """Note that a file, and what else is in its folder, is whole."""
        try:
            folder = (self.partial / name).parent
            for path in [self.partial / name] if folder == self.partial else sorted(folder.iterdir()):
                _sync(path)
            _sync(folder)
            _sync(self.partial)
            os.write(self._journal, _line({"file": name}))
            os.fsync(self._journal)
        except OSError as error:
            raise unwritten(self.partial / name, error) from error

    def kept(self, name: str) -> bytes | None:
        """What an earlier run of the same merge kept under this name."""
        return (self.partial / name).read_bytes() if name in self._kept else None

    def has(self, name: str) -> bool:
        """Whether an earlier run of the same merge vouched for a file."""
        return name in self._kept and (self.partial / name).is_file()

    def flush(self) -> None:
        """Put every byte on the disk and note it in the journal, after the last write."""
        # The kernel reports a failed write-back once: what the other thread was told counts here too.
        self._stop_flusher()
        if self._flush_error is not None:
            raise self._flush_error
        try:
            self._flush()
        except OSError as error:
            raise unwritten(self.partial, error) from error

    def publish(self) -> None:
        """Give the finished folder its name.

        Raises:
            OutputError: the disk refuses, or the name was taken meanwhile.
        """
        check_target(self.plan, self.out, overwrite=self._overwrite)
        journal = self.partial / _JOURNAL
        try:
            for path in sorted(self.partial.rglob("*")):
                _sync(path)
            noted = journal.read_bytes()
            try:
                if self.out.exists():
                    self.out.rename(self._old)
                journal.unlink()
                _sync(self.partial)
                self.partial.rename(self.out)
            except OSError:
                with contextlib.suppress(OSError):
                    if self._old.exists():
                        self._old.rename(self.out)
                with contextlib.suppress(OSError):
                    journal.write_bytes(noted)
                raise
            _sync(self.out.parent)
            if self._old.exists():
                shutil.rmtree(self._old)
        except OSError as error:
            raise unwritten(self.out, error) from error


def _line(value: object) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _believed(journal: bytes, identity: str) -> tuple[set[str], set[str], int]:
    """The tensors and files a journal vouches for, and how many of its bytes are to be kept: of another merge, none."""
    lines = journal.split(b"\n")[:-1]  # the rest a kill cut short
    if not lines or lines[0] + b"\n" != _line(identity):
        return set(), set(), 0
    finished: set[str] = set()
    files: set[str] = set()
    length = len(lines[0]) + 1
    for line in lines[1:]:
        try:
            noted = json.loads(line)
            files.update([noted["file"]] if isinstance(noted, dict) else [])
            finished.update([] if isinstance(noted, dict) else noted)
        except (ValueError, TypeError, KeyError):  # a power cut can leave anything behind
            break
        length += len(line) + 1
    return finished, files, length


def _is_whole(folder: Path, shard: Shard) -> bool:
    path = folder / shard.file
    return path.is_file() and not path.is_symlink() and path.stat().st_size == shard.nbytes


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
