"""The trials of a search on disk: one line each, so that a search that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import Fault, OutputError
from mixmerge.searching.space import Value


@dataclass(frozen=True)
class Trial:
    """One candidate and what came of it.

    Args:
        number: from 0, which is the recipe as it was.
        values: by slot name; none of the recipe as it was where it is no point of the space.
        scores: mean score of each task, in [0, 1]; empty if the merge failed.
        worth: what was maximised; of a failed merge the lowest there is.
        seconds: of merge and evaluation.
        fault: why it failed, or nothing.
    """

    number: int
    values: Mapping[str, Value]
    scores: Mapping[str, float]
    worth: float
    seconds: float
    fault: str = ""


class Journal:
    """Trials of one search, appended and synced one by one; a torn last line is cut off.

    Args:
        path: of the file.
        identity: hash of recipe, space and tasks.

    Raises:
        OutputError: it belongs to another search, or it cannot be written.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.trials: list[Trial] = []
        whole = 0
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise OutputError(Fault(str(path), f"cannot be read: {error.strerror}")) from error
        for line in data.splitlines(keepends=True):
            record = _record(line)
            if record is None:
                break
            if whole == 0 and record.get("search") != identity:
                what = "it holds the trials of another recipe, space or set of tasks, or of other weights or rows"
                raise OutputError(Fault(str(path), what, run="Name a new folder, or pass --overwrite"))
            if whole:
                self.trials.append(Trial(**record))
            whole += len(line)
        torn = data[whole:]
        if b"\n" in torn:
            number = data[:whole].count(b"\n") + 1
            run = "Name a new folder, or pass --overwrite"
            raise OutputError(Fault(str(path), f"line {number} holds no trial", run=run))
        if torn:
            os.truncate(path, whole)
        if not whole:
            self._append({"search": identity})

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self._append(asdict(trial))
        self.trials.append(trial)

    def _append(self, record: dict[str, Any]) -> None:
        try:
            with self.path.open("ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(Fault(str(self.path), f"cannot be written: {error.strerror}")) from error


def _record(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
