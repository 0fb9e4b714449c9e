"""What commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from mixmerge.errors import MixmergeError

if TYPE_CHECKING:
    from rich.progress import ProgressColumn


def fail(error: MixmergeError) -> None:
    """Every fault on a line of its own."""
    for fault in error.faults:
        print(f"error: {fault}", file=sys.stderr)


def warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def emit_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def size(count: float) -> str:
    """Bytes for people: ``1.50 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


class _Bar:
    """One bar on stderr that is there from the first news to the last, so that stages can come one after the other."""

    def __init__(self, columns: Sequence[ProgressColumn]) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._lock = threading.Lock()  # news may come from several threads

    def show(self, done: int, total: int, fields: Mapping[str, Any]) -> None:
        progress = self._progress
        with self._lock:
            if not progress.tasks:
                progress.add_task("", total=total, **fields)
            progress.start()
            progress.update(progress.task_ids[0], completed=done, total=total, **fields)
            if done == total:
                progress.stop()

    def stop(self) -> None:
        self._progress.stop()


@contextmanager
def _bar(columns: Callable[[], Sequence[ProgressColumn]], *, quiet: bool) -> Iterator[_Bar | None]:
    """None when nobody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bar = _Bar(columns())
    try:
        yield bar
    finally:
        bar.stop()


@contextmanager
def loss_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int, float], None] | None]:
    """A bar with steps, the loss and the time left on stderr, from the first step on; None when nobody is there."""

    def columns() -> list[ProgressColumn]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        loss = TextColumn("loss {task.fields[loss]:.4g}")
        return [TextColumn(title), BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn()]

    with _bar(columns, quiet=quiet) as bar:
        yield None if bar is None else lambda done, total, loss: bar.show(done, total, {"loss": loss})


@contextmanager
def part_progress(title: str, *, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar over all parts on stderr, with the one under way, from the first news on; None when nobody is there."""

    def columns() -> list[ProgressColumn]:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

        part = TextColumn("{task.fields[part]}", markup=False)
        return [TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), part]

    with _bar(columns, quiet=quiet) as bar:
        yield None if bar is None else lambda part, done, total: bar.show(done, total, {"part": part})


@contextmanager
def byte_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, rate and time left on stderr, from the first byte on; None when nobody is there to see it."""

    def columns() -> list[ProgressColumn]:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        rate = TransferSpeedColumn()
        return [TextColumn(title), BarColumn(), DownloadColumn(), rate, TimeRemainingColumn()]

    with _bar(columns, quiet=quiet) as bar:
        yield None if bar is None else lambda done, total: bar.show(done, total, {})


class StepProgress(Protocol):
    """What ``step_progress`` gives: told (part, steps done, steps in all), and how it goes."""

    def __call__(self, part: str, done: int, steps: int, note: str = "", /) -> None: ...


@contextmanager
def step_progress(*, quiet: bool) -> Iterator[StepProgress | None]:
    """A bar for each part on stderr: part, steps done, steps in all, a note. None when nobody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}", markup=False))
    # Results may be printed under the bar, to a stdout that is a file: they must not be sent to the terminal.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bars:
        shown = {}

        def update(part: str, done: int, steps: int, note: str = "", /) -> None:
            if part not in shown:
                shown[part] = bars.add_task(part, total=steps, note=note)
            bars.update(shown[part], completed=done, total=steps, note=note)

        yield update


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Sequence[int] = (0,),
    to_stderr: bool = False,
) -> None:
    """A table on stdout, or on stderr; these columns are text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number in text else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console(stderr=to_stderr)
    if not console.is_terminal:
        console = Console(stderr=to_stderr, width=200)
    console.print(shown)
