"""Records of a CSV file, and where each begins: they may span lines."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mixmerge.decision.parsing import Line


@dataclass(frozen=True)
class Row:
    """A record.

    Args:
        number, offset: of the line it begins with.
        data: of all its lines; of the first one only if it is no record.
        cells: None if it is no record; bytes that are not UTF-8 are surrogates in them.
        problem: why it is no record.
    """

    number: int
    offset: int
    data: bytes
    cells: tuple[str, ...] | None
    problem: str = ""


class _TooLong(Exception):  # noqa: N818
    """Never leaves this file."""


def csv_rows(lines: Iterator[Line], *, most: int) -> Iterator[Row]:
    """Every record that is not empty. After a line that begins none, the next line is tried.

    Args:
        most: bytes of a record.
    """
    again: deque[Line] = deque()  # read in search of the end of a record that was none

    def texts(taken: list[Line]) -> Iterator[str]:
        size = 0
        while line := again.popleft() if again else next(lines, None):
            taken.append(line)
            size += len(line.data)
            if line.too_long or size > most:
                raise _TooLong
            yield line.text(errors="surrogateescape")

    while True:
        taken: list[Line] = []
        try:
            cells = _next(texts(taken), most)
            problem = ""
        except StopIteration:
            return
        except csv.Error as error:
            cells, problem = None, f"is no row of CSV: {error}"
        except _TooLong:
            cells, problem = None, f"has more than {most:,} bytes, or a quote that is not closed"
        first = taken[0]
        if cells is None:
            again.extendleft(reversed(taken[1:]))
            yield Row(first.number, first.offset, first.data, None, problem)
        elif cells:
            yield Row(first.number, first.offset, b"".join(line.data for line in taken), tuple(cells))


def _next(texts: Iterator[str], most: int) -> list[str]:
    # The limit of a cell is the csv module's own and 131,072 characters by default: prompts are longer. It is put
    # back at once, for whoever else reads CSV in this process.
    before = csv.field_size_limit(most)
    try:
        return next(csv.reader(texts, strict=True))
    finally:
        csv.field_size_limit(before)
