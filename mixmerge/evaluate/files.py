"""Reports as files."""

from __future__ import annotations

from pathlib import Path

from mixmerge.outcomes.whole import whole_file


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: it exists and ``overwrite`` is not set, or it cannot be written.
    """
    with whole_file(path, overwrite=overwrite) as file:
        file.write(text.encode("utf-8", errors="replace"))
