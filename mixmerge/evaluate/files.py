"""Reports as files."""

from __future__ import annotations

import os
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
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
                file.write(text)
            Path(partial).replace(path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(Fault(str(path), f"cannot be written: {error.strerror or error}")) from error
