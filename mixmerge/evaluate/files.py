"""Reports as files."""

from __future__ import annotations

import tempfile
from pathlib import Path

from mixmerge.errors import Fault, OutputError


def write_text(path: Path, text: str, *, overwrite: bool) -> None:
    """Write a file, whole or not at all.

    Raises:
        OutputError: it exists and ``overwrite`` is not set, or it cannot be written.
    """
    if path.exists() and not overwrite:
        raise OutputError(Fault(str(path), "exists already", run="Choose another name, or pass --overwrite"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            partial = Path(folder) / path.name  # a file of its own would be readable by its owner alone
            partial.write_text(text, encoding="utf-8", errors="replace")
            partial.replace(path)
    except OSError as error:
        raise OutputError(Fault(str(path), f"cannot be written: {error.strerror or error}")) from error
