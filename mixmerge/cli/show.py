"""What commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mixmerge.errors import MixmergeError


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


@contextmanager
def loss_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int, float], None] | None]:
    """A bar with steps, the loss and the time left on stderr, from the first step on; None when nobody is there."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    loss = TextColumn("loss {task.fields[loss]:.4g}")
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)

    def update(done: int, total: int, now: float) -> None:
        if not progress.tasks:
            progress.start()
            progress.add_task(title, total=total, loss=now)
        progress.update(progress.task_ids[0], completed=done, total=total, loss=now)
        if done == total:
            progress.stop()

    try:
        yield update
    finally:
        progress.stop()


@contextmanager
def byte_progress(title: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A bar with bytes, rate and time left on stderr; None when nobody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield update


@contextmanager
def step_progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar for each part on stderr: part, steps done, steps in all. None when nobody is there to see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Results may be printed under the bar, to a stdout that is a file: they must not be sent to the terminal.
    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bars:
        shown = {}

        def update(part: str, done: int, steps: int) -> None:
            if part not in shown:
                shown[part] = bars.add_task(part, total=steps)
            bars.update(shown[part], completed=done, total=steps)

        yield update


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: Sequence[int] = (0,)
) -> None:
    """A table on stdout; these columns are text, the others are numbers."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        shown.add_column(column, justify="left" if number in text else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(shown)
