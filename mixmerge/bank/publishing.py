"""A folder that appears when it is whole, and takes the place of an old one by two renames."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mixmerge.errors import Fault, OutputError


def hidden(folder: Path) -> Path:
    """A new, empty, hidden folder beside one that is to be made.

    Raises:
        OutputError: nothing can be made there.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise unwritable(folder, error) from error


def check_free(folder: Path, *, overwrite: bool, of: Sequence[str], inputs: Sequence[Path] = ()) -> None:
    """Refuse a folder that exists, or whose loss would be more than what is made anew.

    Args:
        folder: to be made.
        overwrite: an old one may go.
        of: files one of which tells that the folder holds the same kind of thing.
        inputs: folders that are read.

    Raises:
        OutputError: see the message.
    """
    restore(folder)
    if not os.path.lexists(folder):
        return
    for path in inputs:
        if path.resolve().is_relative_to(folder.resolve()):
            raise OutputError(Fault(str(folder), f"{path} is read, and in it", run="Name another folder"))
    if not overwrite:
        raise OutputError(Fault(str(folder), "it exists", run="Name another folder, or overwrite it"))
    if folder.is_symlink() or not folder.is_dir() or not any((folder / name).is_file() for name in of):
        what = f"it exists and holds no {' or '.join(of)}, so it is not overwritten"
        raise OutputError(Fault(str(folder), what, run="Name another folder"))


def restore(folder: Path) -> None:
    """Undo a ``publish`` that was killed between its two renames, or finish its cleaning.

    Raises:
        OutputError: the disk refuses.
    """
    old = _aside(folder)
    try:
        if old.exists():
            if os.path.lexists(folder):
                shutil.rmtree(old)
            else:
                old.rename(folder)
    except OSError as error:
        raise unwritable(folder, error) from error


def publish(new: Path, folder: Path) -> None:
    """Put a hidden folder's files on the disk and give it its name.

    An old folder is put aside first; if this is killed before the new one has its name, ``restore`` puts it back, which
    whatever writes there next begins with.

    Raises:
        OutputError: the disk refuses.
    """
    restore(folder)
    old = _aside(folder)
    try:
        for path in sorted(new.rglob("*")):
            if path.is_file():
                path.chmod(0o644)  # safetensors makes its files for their owner alone
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        new.chmod(0o755)
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise unwritable(folder, error) from error


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.mixmerge-old")


@contextmanager
def making(
    folder: Path, *, overwrite: bool, of: Sequence[str], inputs: Sequence[Path] = ()
) -> Iterator[Path]:
    """An empty folder to fill, which gets its name when the block ends; if the block fails, nothing is changed.

    Arguments as those of ``check_free``.

    Raises:
        OutputError: as ``check_free``, or nothing can be written there.
    """
    check_free(folder, overwrite=overwrite, of=of, inputs=inputs)
    new = hidden(folder)
    try:
        yield new
        publish(new, folder)
    except OSError as error:
        raise unwritable(folder, error) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)


def unwritable(folder: Path, error: OSError) -> OutputError:
    """What a disk's refusal is to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(Fault(str(folder), "the disk is full", run="Free some space and run it again"))
    return OutputError(Fault(str(folder), f"cannot be written: {error.strerror or error}"))
