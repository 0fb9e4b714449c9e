"""Model references to folders on this machine: local folders first, then the Hugging Face cache, then the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mixmerge.checkpoint.hub import Snapshot, fetch_all, find, open_remote
from mixmerge.checkpoint.reader import Checkpoint, open_checkpoint
from mixmerge.errors import CheckpointError, Fault

_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")


@dataclass(frozen=True)
class Place:
    """Where a model or adapter is.

    Args:
        folder: on this machine; of a snapshot, the weights may not be in it yet.
        snapshot: which commit it is, if it came from the hub.
    """

    folder: Path
    snapshot: Snapshot | None = None


def look_up(path: str, revision: str | None, *, where: str, adapter: bool | None = None) -> Place:
    """Find a model or adapter; of a model on the hub everything but the weights is downloaded.

    Args:
        path: a local folder or a hub id (``org/name``).
        revision: branch, tag or commit on the hub.
        where: for errors.
        adapter: an adapter is wanted, which is downloaded with its weights; None takes either.

    Raises:
        CheckpointError: no such folder, or the hub cannot give it.
    """
    folder, kind = _local(path, where)
    if kind == "folder":
        if revision:
            raise CheckpointError(
                Fault(where, f"{path} is a local folder, so it has no revision {revision!r}")
            )
        return Place(folder)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or kind == "file"
    if looks_local or not _HUB_ID.fullmatch(path):
        what = "is a file, not a folder" if kind == "file" else "no such folder"
        raise CheckpointError(
            Fault(where, f"{path}: {what}", "A model folder or a hub id (org/name) is allowed")
        )
    snapshot = find(path, revision, where=where, adapter=adapter)
    return Place(snapshot.folder, snapshot)


def _local(path: str, where: str) -> tuple[Path, str]:
    """The path on this machine, and whether it is a ``folder``, a ``file`` or ``nothing``."""
    try:
        folder = Path(path).expanduser()
        return folder, "folder" if folder.is_dir() else "file" if folder.exists() else "nothing"
    except (OSError, RuntimeError) as error:  # a name that is too long; ~ of a user who does not exist
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(Fault(where, f"{path} cannot be looked up: {reason}")) from error


def open_model(place: Place, *, name: str, where: str) -> Checkpoint:
    """The config and headers of a model, read on the hub where its weights are still there.

    Raises:
        CheckpointError: as ``open_checkpoint``; or the hub cannot be reached.
    """
    if place.snapshot is not None and place.snapshot.absent:
        return open_remote(place.snapshot, where=where)
    return open_checkpoint(place.folder, name=name)


def locate(path: str, revision: str | None, *, where: str) -> Path:
    """The folder of a model or adapter, whole: what is on the hub is downloaded. Arguments as in ``look_up``."""
    place = look_up(path, revision, where=where)
    if place.snapshot is not None:
        fetch_all(place.snapshot)
    return place.folder
