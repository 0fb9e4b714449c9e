"""The input of a job: read once from start to end, and record by record later, by where each begins."""

from __future__ import annotations

import hashlib
import os
import stat
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from mixmerge.batch.formats import (
    MAX_BYTES,
    Columns,
    Format,
    Parsed,
    format_of,
    parse_object,
    parse_row,
    parse_text,
)
from mixmerge.batch.formats_csv import Row, csv_rows
from mixmerge.batch.formats_openai import Names, parse_request
from mixmerge.batch.lines_index import Index
from mixmerge.batch.records import Answer, Item
from mixmerge.decision.lines import not_utf8
from mixmerge.decision.parsing import Line as Raw
from mixmerge.decision.parsing import Readable, raw_lines
from mixmerge.errors import Fault, MixmergeError

_SHOWN = 10  # faults of one line
_AGAIN = "Leave the input as it is while a job runs; start this one anew"


@dataclass(frozen=True)
class Line:
    """A record of a job's input.

    Args:
        index: from 0; empty lines are not counted.
        number: of the line it begins with, from 1.
        offset: of its first byte.
        id: ``custom_id``; ``line-N`` where there are faults and none that can be read.
        item: the request; None if there are faults.
        faults: what is wrong with it. They quote settings and names of fields, and nothing of the prompt.
        cells: of CSV; None for other formats, and where the row is none.
    """

    index: int
    number: int
    offset: int
    id: str
    item: Item | None
    faults: tuple[Fault, ...] = ()
    cells: tuple[str, ...] | None = None

    @property
    def fault(self) -> Fault | None:
        """All that is wrong, as one fault; None if nothing is."""
        if len(self.faults) < 2:
            return self.faults[0] if self.faults else None
        where = f"line {self.number}"
        return Fault(where, " ".join(str(one).removeprefix(f"{where}: ") for one in self.faults))

    def answer(self) -> Answer:
        """That of a line with faults."""
        return Answer(self.id, fault=self.fault)


class Input:
    """The requests of a file. Made by ``Input.open``, then read once by ``scan``.

    Attributes:
        format: ``openai``, ``jsonl``, ``csv`` or ``text``.
        mixture: its name.
        columns: names of a CSV file's columns; empty for other formats.
        index: where the records are.
    """

    def __init__(
        self, path: Path, *, format: Format, field: str | None, names: Names, called: str, most: int
    ) -> None:
        self.path, self.format, self.field, self.called = path, format, field, called
        self.mixture = names.mixture
        self.index = Index()
        self._names, self._most = names, most
        self._sha256 = ""
        self._columns: Columns | None = None
        with self._opened() as file:
            self._stamp = _stamp(os.fstat(file.fileno()))
            if format == "csv":
                first = next(csv_rows(raw_lines(file, most=most), most=most), None)
                self._columns = _header(first, called, field)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        format: str | None = None,
        field: str | None = None,
        experts: Collection[str],
        mixture_name: str,
        name: str | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Input:
        """A file of requests; nothing of it is read yet but its first lines.

        Args:
            path: of a file; what is not one, such as standard input, is copied to one before.
            format: ``openai``, ``jsonl``, ``csv`` or ``text``; None to tell by the name and the first lines.
            field: of JSONL or CSV that holds the text, where it has another name than the usual ones.
            experts: names that ``body.model`` may have to bypass the router.
            mixture_name: the name that it has to be routed.
            name: what errors call the file; by default its path.
            max_bytes: of one record; a longer one is a fault.

        Raises:
            MixmergeError: the file cannot be read, is empty, of no format that is read, or has no column of texts.
        """
        path = Path(path)
        called = str(path) if name is None else name
        with _readable(path, called):
            found = format_of(path, format, called=called)
        if field is not None and found in ("openai", "text"):
            raise MixmergeError(Fault("field", f"is {field!r}, and {found} has no fields to choose from"))
        names = Names(mixture_name, tuple(experts))
        return cls(path, format=found, field=field, names=names, called=called, most=max_bytes)

    def __len__(self) -> int:
        """How many records were scanned."""
        return len(self.index)

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self._columns is None else self._columns.names

    @property
    def sha256(self) -> str:
        """Of the whole file, as hex digits; there when ``scan`` has come to its end."""
        if not self._sha256:
            raise ValueError("the job is not scanned yet")
        return self._sha256

    def scan(self) -> Iterator[Line]:
        """Every record that is not blank, in order. A record with faults does not keep the others from being read.

        The second record of a ``custom_id`` has a fault, and so has every later one.

        Raises:
            MixmergeError: at the end: the file has no record, or it changed while it was read.
        """
        self.index, self._sha256 = Index(), ""
        with self._opened() as opened:
            file = _Hashed(opened)
            for row, parsed in self._records(file, number=1, offset=0, header=True):
                yield self._added(row, parsed)
            after = os.fstat(opened.fileno())
        if not self._stamp == _stamp(after) == self._stamp_now() or file.size != after.st_size:
            raise MixmergeError(Fault(self.called, "changed while it was read", run=_AGAIN))
        if not self.index:
            raise MixmergeError(Fault(self.called, "holds no request", "At least one line that is not empty"))
        self._sha256 = file.hash.hexdigest()

    def read(self, indices: Iterable[int]) -> list[Line]:
        """Records by their index, as ``scan`` gave them.

        Raises:
            MixmergeError: the file cannot be read, or it is no longer what was scanned.
        """
        with self._opened() as file:
            return [self._read(file, at) for at in indices]

    def lines(self) -> Iterator[Line]:
        """All records once more, in order.

        Raises:
            MixmergeError: as ``read``.
        """
        with self._opened() as file:
            found = self._records(file, number=1, offset=0, header=True)
            for at in range(len(self)):
                yield self._again(at, *next(found, (None, None)))

    def _records(
        self, file: Readable, *, number: int, offset: int, header: bool
    ) -> Iterator[tuple[Row, Parsed]]:
        lines = raw_lines(file, most=self._most, number=number, offset=offset)
        if self._columns is None:
            for line in lines:
                row = Row(line.number, line.offset, line.data, None)
                if line.too_long:
                    yield row, Parsed.wrong(f"has more than {self._most:,} bytes")
                elif (parsed := self._parsed(line)) is not None:
                    yield row, parsed
            return
        rows = csv_rows(lines, most=self._most)
        if header:
            next(rows, None)
        for row in rows:
            yield self._parsed_row(row, self._columns)

    def _parsed(self, line: Raw) -> Parsed | None:
        """None if it is blank."""
        try:
            text = line.text()
        except UnicodeDecodeError as error:
            return Parsed("", None, (not_utf8("", error),))
        if not text.strip():
            return None
        if self.format == "openai":
            return parse_request(text, self._names)
        if self.format == "text":
            return parse_text(text, number=line.number)
        return parse_object(text, number=line.number, field=self.field)

    def _parsed_row(self, row: Row, columns: Columns) -> tuple[Row, Parsed]:
        if row.cells is None:
            return row, Parsed.wrong(row.problem)
        try:
            row.data.decode("utf-8")
        except UnicodeDecodeError as error:
            return replace(row, cells=None), Parsed("", None, (not_utf8("", error),))
        parsed = parse_row(row.cells, columns, number=row.number)
        return (row if len(row.cells) == len(columns.names) else replace(row, cells=None)), parsed

    def _added(self, row: Row, parsed: Parsed) -> Line:
        name = self._name(row, parsed)
        # lines of text have their numbers for names, and a name that is made up for a fault is nobody's
        known = "" if self.format == "text" or not (parsed.id or parsed.item) else name
        at, checksum = len(self.index), zlib.crc32(row.data)
        self.index.add(
            row.offset, row.number, checksum, known, lambda other: self.read([other])[0].id == name
        )
        return self._line(at, row, parsed)

    def _name(self, row: Row, parsed: Parsed) -> str:
        if parsed.item is not None:
            return parsed.item.id
        return parsed.id or f"line-{row.number}"

    def _line(self, at: int, row: Row, parsed: Parsed) -> Line:
        where, faults = f"line {row.number}", parsed.faults
        if at in self.index.earlier:
            first = self.index.numbers[self.index.earlier[at]]
            field = "custom_id" if self.format == "openai" else "id"
            what = f"is {self._name(row, parsed)[:100]!r}, as that of line {first} is"
            faults = (*faults, Fault(field, what, "Each has another"))
        if len(faults) > _SHOWN:
            faults = (*faults[:_SHOWN], Fault("", f"and {len(faults) - _SHOWN:,} more faults"))
        moved = tuple(
            Fault(": ".join(filter(None, (where, one.where))), one.what[:500], one.allowed[:500], one.run)
            for one in faults
        )
        item = None if faults else parsed.item
        return Line(at, row.number, row.offset, self._name(row, parsed), item, moved, row.cells)

    def _read(self, file: BinaryIO, at: int) -> Line:
        file.seek(self.index.offsets[at])
        found = self._records(
            file, number=self.index.numbers[at], offset=self.index.offsets[at], header=False
        )
        return self._again(at, *next(found, (None, None)))

    def _again(self, at: int, row: Row | None, parsed: Parsed | None) -> Line:
        if row is None or parsed is None or zlib.crc32(row.data) != self.index.sums[at]:
            raise self._changed(at)
        return self._line(at, row, parsed)

    def _changed(self, at: int) -> MixmergeError:
        where = f"{self.called}, line {self.index.numbers[at]}"
        return MixmergeError(Fault(where, "has changed since the job was read", run=_AGAIN))

    def _stamp_now(self) -> tuple[int, ...]:
        try:
            return _stamp(self.path.stat())
        except OSError:
            return ()

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with _readable(self.path, self.called):
            file = self.path.open("rb")
        try:
            with file:
                yield file
        except OSError as error:
            raise _unreadable(self.called, error) from error


class _Hashed:
    """Hashes what is read of a file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0

    def readline(self, size: int, /) -> bytes:
        data = self.file.readline(size)
        self.hash.update(data)
        self.size += len(data)
        return data


@contextmanager
def _readable(path: Path, called: str) -> Iterator[None]:
    """Faults of the system as the user's.

    Raises:
        MixmergeError: the file is not there, no regular file, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise MixmergeError(Fault(called, "is no file", "A file that can be read again"))
        yield
    except (OSError, ValueError) as error:
        raise _unreadable(called, error) from error


def _unreadable(called: str, error: OSError | ValueError) -> MixmergeError:
    return MixmergeError(Fault(called, f"cannot be read: {getattr(error, 'strerror', None) or error}"))


def _stamp(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _header(first: Row | None, called: str, field: str | None) -> Columns:
    if first is None:
        raise MixmergeError(
            Fault(called, "holds no request", "A row of column names, and one for each request")
        )
    where = f"{called}, line {first.number}"
    if first.cells is None:
        raise MixmergeError(Fault(where, first.problem))
    try:
        first.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MixmergeError(not_utf8(where, error)) from error
    return Columns.of(first.cells, where=where, field=field)
