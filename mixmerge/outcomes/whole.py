"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mixmerge.errors import Fault, OutputError


@contextmanager
def whole_file(path: Path, *, overwrite: bool = True, make_folder: bool = True) -> Iterator[BinaryIO]:
    """A file to write, which appears, or takes the place of an old one, when the block ends without an error.

    Args:
        path: of the file.
        overwrite: an old one may be replaced.
        make_folder: its folder is made where it is missing.

    Raises:
        OutputError: it exists and is not to be replaced, or it cannot be written. What was there is still there, and
            nothing else. So it is with what the block raises.
    """
    check_free(path, overwrite=overwrite)
    partial = path.with_name(f".{path.name[:40]}-{secrets.token_hex(4)}")
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            check_free(path, overwrite=overwrite)
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def write_whole(path: Path, pieces: Iterable[bytes], *, overwrite: bool = False) -> int:
    """Write pieces as they come to a ``whole_file``. Returns how many there were.

    Raises:
        OutputError: as ``whole_file``; what ``pieces`` raises comes as it is.
    """
    written, theirs = 0, iter(pieces)
    fault: OSError | None = None
    try:
        with whole_file(path, overwrite=overwrite) as file:
            while True:
                try:
                    piece = next(theirs)
                except StopIteration:
                    break
                except OSError as error:
                    fault = error
                    raise
                file.write(piece)
                written += 1
    except OutputError:
        if fault is not None:
            raise fault from None
        raise
    return written


def check_free(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where something is, or where no file can be made.

    Raises:
        OutputError: it is taken and ``overwrite`` is not set, or a folder; its folder cannot be made or written to.
    """
    try:
        if path.is_dir():
            raise OutputError(Fault(str(path), "is a folder", "The name of a file"))
        if not overwrite and (path.exists() or path.is_symlink()):
            raise OutputError(
                Fault(str(path), "exists already", run="Choose another name, or pass --overwrite")
            )
        folder = next(one for one in path.absolute().parents if one.exists())
    except OSError as error:
        raise unwritable(path, error) from error
    if not folder.is_dir():
        raise OutputError(Fault(str(path), f"cannot be written: {folder} is no folder"))
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(Fault(str(path), f"cannot be written: no right to write in {folder}"))


def unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(Fault(str(path), f"cannot be written: {error.strerror or error}"))


def sync_folder(folder: Path) -> None:
    """Names of new files survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
