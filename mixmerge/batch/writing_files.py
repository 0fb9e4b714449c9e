"""Files of answers: whole and in the order of the input, or line by line as answers come."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from mixmerge.batch.lines import Line
from mixmerge.batch.records import Answer
from mixmerge.batch.writing import Form
from mixmerge.decision.whole import check_free, sync_folder, unwritable, write_whole
from mixmerge.errors import Fault, OutputError


def write_ordered(
    path: str | Path, answers: Iterable[tuple[Line, Answer]], *, form: Form, overwrite: bool = False
) -> int:
    """Write answers in the order they are given; the file appears when all are on the disk. Returns how many.

    Args:
        answers: streamed, one at a time in memory; ``Input.lines`` has the lines in the input's order.

    Raises:
        OutputError: the file exists and ``overwrite`` is not set, or it cannot be written; nothing half-written is
            left, and what was there still is.
    """

    def pieces() -> Iterator[bytes]:
        if form.header:
            yield form.header
        for line, answer in answers:
            yield form.record(line, answer)

    return write_whole(Path(path), pieces(), overwrite=overwrite) - bool(form.header)


class Unordered:
    """An output that grows as answers come; each line of the input is answered once.

    An answer is given to the system when ``write`` returns, and is on the disk after ``sync`` or ``close``: a kill
    costs nothing, a loss of power the last lines, which a run that resumes writes again.

    Args:
        path: made if it is missing.
        form: of the job; the job is scanned.
        resume: go on with what an earlier run of this job has written. A last line that was cut off is dropped.
        overwrite: of what is there, if it is not resumed.

    Raises:
        OutputError: the file exists and neither is set, is not of this job, or cannot be written.
    """

    def __init__(
        self, path: str | Path, form: Form, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        self.path, self.form = Path(path), form
        self._done: set[int] = set()
        check_free(self.path, overwrite=overwrite or resume)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.exists()
            self._size = 0 if new or not resume else self._whole()
            flags = os.O_RDWR | os.O_CREAT | (os.O_EXCL if new else 0)
            self._file = os.fdopen(os.open(self.path, flags, 0o666), "r+b", buffering=0)
        except OSError as error:
            raise unwritable(self.path, error) from error
        try:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            if not self._size and form.header:
                self._append(form.header)
            if new:
                sync_folder(self.path.parent)
        except (OSError, OutputError) as error:
            self._file.close()
            if isinstance(error, OutputError):
                raise
            raise unwritable(self.path, error) from error

    def __len__(self) -> int:
        """How many lines are answered."""
        return len(self._done)

    def __contains__(self, line: Line) -> bool:
        return line.number in self._done

    def write(self, line: Line, answer: Answer) -> bool:
        """Write an answer, unless the line has one; whether it was written.

        Raises:
            OutputError: it cannot be written; the file ends with the answer before.
        """
        if line.number in self._done:
            return False
        self._append(self.form.record(line, answer))
        self._done.add(line.number)
        return True

    def sync(self) -> None:
        """Bring all answers to the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def close(self) -> None:
        if not self._file.closed:
            try:
                self.sync()
            finally:
                self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, data: bytes) -> None:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            self._file.truncate(self._size)
            self._file.seek(self._size)
            raise unwritable(self.path, error) from error
        self._size += len(data)

    def _whole(self) -> int:
        """Bytes of the whole records that are there, whose lines are noted as done."""
        size, header = 0, self.form.header
        with self.path.open("rb") as file:
            if header:
                first = file.read(len(header))
                if first != header:
                    if header.startswith(first):
                        return 0
                    raise self._not_ours(1)
                size = len(header)
            for number, (record, whole) in enumerate(_records(file, rows=bool(header)), start=1):
                if not whole and self.form.may_begin(record):
                    break
                answered = self.form.number_of(record) if whole else None
                if answered is None or answered in self._done:
                    raise self._not_ours(number)
                self._done.add(answered)
                size += len(record)
        return size

    def _not_ours(self, number: int) -> OutputError:
        what = f"its record {number:,} is no answer of this job that is there once"
        return OutputError(Fault(str(self.path), what, run="Choose another name, or pass --overwrite"))


def _records(file: Iterable[bytes], *, rows: bool) -> Iterator[tuple[bytes, bool]]:
    """Records, and whether they have an end; the last one may be cut off. Rows are as we write them: with quotes in
    pairs."""
    held: list[bytes] = []
    quotes = 0
    for line in file:
        held.append(line)
        quotes += line.count(b'"') if rows else 0
        if line.endswith(b"\n") and quotes % 2 == 0:
            yield b"".join(held), True
            held.clear()
            quotes = 0
    if held:
        yield b"".join(held), False
