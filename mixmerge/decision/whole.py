"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from mixmerge.errors import Fault, OutputError


def write_whole(path: Path, pieces: Iterable[bytes], *, overwrite: bool = False) -> int:
    """Write pieces as they come to a hidden file beside ``path``, which takes its name when all are on the disk.

    Its folder is made where it is missing. Returns how many pieces there were.

    Raises:
        OutputError: the file exists and ``overwrite`` is not set, or it cannot be written. What was there is still
            there, and nothing else. So it is with what ``pieces`` raises.
    """
    partial = path.with_name(f".{path.name[:40]}-{secrets.token_hex(4)}")
    written = 0
    check_free(path, overwrite=overwrite)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("xb")
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        for piece in pieces:
            try:
                file.write(piece)
            except OSError as error:
                raise unwritable(path, error) from error
            written += 1
        try:
            file.flush()
            os.fsync(file.fileno())
            file.close()
            check_free(path, overwrite=overwrite)
            partial.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # what is left in the buffer of half a file is of no use
            file.close()
        partial.unlink(missing_ok=True)
    return written


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where something is.

    Raises:
        OutputError: it is taken and ``overwrite`` is not set, or a folder.
    """
    if path.is_dir():
        raise OutputError(Fault(str(path), "is a folder", "The name of a file"))
    if not overwrite and (path.exists() or path.is_symlink()):
        raise OutputError(Fault(str(path), "exists already", run="Choose another name, or pass --overwrite"))


def unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(Fault(str(path), f"cannot be written: {error.strerror or error}"))


def sync_folder(folder: Path) -> None:
    """Names of new files survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
