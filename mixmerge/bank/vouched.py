"""Cards that vouch for files: the name, size and hash of each, and one hash over all that a card says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from mixmerge.checkpoint.identity import canonical_hash, digest
from mixmerge.checkpoint.reader import read_json
from mixmerge.errors import CheckpointError, Fault


@dataclass(frozen=True)
class FileCard:
    """One file: its bytes, and their SHA-256."""

    nbytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileCard:
        """Of a file as it is."""
        return cls(path.stat().st_size, digest([path]))


@dataclass(frozen=True, kw_only=True)
class Vouched:
    """A card of files; what else it says is its own.

    ``format``, ``version``: of its JSON. ``again``: what to do where it cannot be believed.

    Args:
        files: by name.
    """

    files: Mapping[str, FileCard]

    format: ClassVar[str]
    version: ClassVar[int]
    again: ClassVar[str]

    @property
    def hash(self) -> str:
        """SHA-256 over all of it, and so over every byte of its files."""
        return canonical_hash(json.loads(json.dumps(asdict(self))))

    @property
    def nbytes(self) -> int:
        """Of its files."""
        return sum(file.nbytes for file in self.files.values())

    def text(self) -> str:
        """What is in the file."""
        whole = {"format": self.format, "version": self.version, "hash": self.hash, **asdict(self)}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path, *, what: str) -> dict[str, Any]:
        """The facts of a card's file.

        Args:
            path: it.
            what: it should be, for errors.

        Raises:
            CheckpointError: it is none, or of another version.
        """
        raw = read_json(path)
        if raw.get("format") != cls.format:
            raise CheckpointError(Fault(str(path), f"is not {what}", f"format: {cls.format}"))
        if raw.get("version") != cls.version:
            said = f"is of version {raw.get('version')!r}"
            allowed = f"This mixmerge reads version {cls.version}"
            raise CheckpointError(Fault(str(path), said, allowed, cls.again))
        return raw

    def believed(self, path: Path, told: object) -> None:
        """Refuse a card whose hash is not the one that its file tells.

        Raises:
            CheckpointError: see the message.
        """
        if self.hash != told:
            raise CheckpointError(Fault(str(path), "was changed after it was written", run=self.again))


def damaged(path: Path, again: str) -> CheckpointError:
    """What is said of a card that lacks a fact."""
    return CheckpointError(Fault(str(path), "is damaged: a fact of it is missing or wrong", run=again))


def check_size(path: Path, facts: FileCard, *, again: str) -> None:
    """Refuse a file that is missing or cut off.

    Raises:
        CheckpointError: see the message.
    """
    run = f"Copy it again, or {again[0].lower()}{again[1:]}"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(Fault(str(path), "is missing", run=run)) from error
    if size != facts.nbytes:
        what = f"has {size:,} bytes, its card says {facts.nbytes:,}"
        raise CheckpointError(Fault(str(path), what, run=run))


def check_bytes(path: Path, facts: FileCard, *, again: str) -> None:
    """Refuse a file with other bytes than its card vouches for.

    Raises:
        CheckpointError: see the message.
    """
    if digest([path]) != facts.sha256:
        what = "was changed after it was written: its hash differs"
        raise CheckpointError(Fault(str(path), what, run=again))
