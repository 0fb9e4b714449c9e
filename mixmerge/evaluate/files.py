"""Reports as files."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.whole import whole_file


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: it exists and ``overwrite`` is not set, or it cannot be written.
    """
    with whole_file(path, overwrite=overwrite) as file:
        file.write(text.encode("utf-8", errors="replace"))


class Named(Protocol):
    """A row of a report."""

    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


def row_of(rows: Iterable[R], name: str) -> R:
    """The row of that name.

    Raises:
        MixmergeError: there is none.
    """
    known = {row.name: row for row in rows}
    if name not in known:
        raise MixmergeError(Fault("report", f"has no row {name!r}", ", ".join(known)))
    return known[name]


class Written(ABC):
    """A report that can be written as records and as a page."""

    @abstractmethod
    def records(self) -> Iterator[dict[str, Any]]:
        """What the report rests on, one plain record for each answer."""

    @abstractmethod
    def page(self, *, title: str | None = None) -> str:
        """The report with its plots as HTML that needs no other file."""

    def write_jsonl(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write ``records`` to a file, whole or not at all.

        Raises:
            OutputError: it exists, or cannot be written.
        """
        lines = (json.dumps(record, ensure_ascii=False) for record in self.records())
        write_text(Path(path), "".join(f"{line}\n" for line in lines), overwrite=overwrite)

    def write_html(self, path: str | Path, *, title: str | None = None, overwrite: bool = False) -> None:
        """Write ``page`` to a file, whole or not at all.

        Raises:
            OutputError: it exists, or cannot be written.
            DependencyError: matplotlib is not installed.
        """
        write_text(Path(path), self.page(title=title), overwrite=overwrite)
