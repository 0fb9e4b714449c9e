"""Embeddings kept on disk, so that no text is embedded twice by one encoder. N texts, D dimensions.

One SQLite file for each encoder, under ``embeddings/`` of ``mixmerge.machine.cache_root()``. SQLite makes a write
whole or not at all and lets several processes share the file; a row carries a checksum, so what was damaged on disk
is computed again. It is a cache: any file may be deleted at any time, and where nothing can be stored (no home
folder, a full or read-only disk) embeddings are computed as if there were none.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmerge.machine import cache_root

Embedding = NDArray[np.float32]
LIMIT = 2 * 2**30  # bytes of one encoder's embeddings; the oldest go when there are more
_WAIT = 20.0  # seconds for another process to finish its write
_ASKED = 500  # keys in one question: SQLite takes 999 on old systems
_TABLE = """CREATE TABLE IF NOT EXISTS embedding (
    age INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, vector BLOB NOT NULL, checksum INTEGER NOT NULL)"""


@dataclass(frozen=True)
class EmbeddingCache:
    """The embeddings of one encoder.

    Args:
        path: its file, which need not exist.
        limit: bytes of vectors it may hold, 1 or more.
    """

    path: Path
    limit: int = LIMIT

    @classmethod
    def of(cls, encoder: str, *, limit: int = LIMIT) -> EmbeddingCache | None:
        """The cache of an encoder by its fingerprint; None where there is no place for one."""
        try:
            return cls(cache_root() / "embeddings" / f"{encoder[:32]}.sqlite", limit)
        except RuntimeError:
            return None

    def get(self, texts: Sequence[str], *, dimensions: int | None = None) -> dict[str, Embedding]:
        """Those of the texts that are there whole: text -> ``(D,)``. With ``dimensions``, only vectors of so many."""
        by_key = {_key(text): text for text in texts}
        keys, found = list(by_key), dict[str, Embedding]()

        def read(file: sqlite3.Connection) -> None:
            for start in range(0, len(keys), _ASKED):
                asked = keys[start : start + _ASKED]
                marks = ",".join("?" * len(asked))
                rows = file.execute(
                    f"SELECT key, vector, checksum FROM embedding WHERE key IN ({marks})", asked
                )
                for key, vector, checksum in rows:
                    row = _whole(key, vector, checksum)
                    if row is not None and dimensions in (None, len(row)):
                        found[by_key[key]] = row

        self._use(read)
        return found

    def put(self, rows: Mapping[str, Embedding]) -> None:
        """Keep these; what is over the limit goes, the oldest first."""
        entries = []
        for text, row in rows.items():
            key, vector = _key(text), np.asarray(row, "<f4").tobytes()
            entries.append((key, vector, _checksum(key, vector)))
        most = max(1, self.limit // max((len(vector) for _, vector, _ in entries), default=1))

        def write(file: sqlite3.Connection) -> None:
            file.executemany(
                "INSERT OR REPLACE INTO embedding (key, vector, checksum) VALUES (?, ?, ?)", entries
            )
            file.execute("DELETE FROM embedding WHERE age <= (SELECT max(age) FROM embedding) - ?", (most,))

        if entries:
            self._use(write)

    def _use(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Do it in one transaction, or not at all where the file cannot be used; a damaged file is deleted."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = sqlite3.connect(self.path, timeout=_WAIT)
        except (OSError, sqlite3.Error):
            return
        try:
            with file:
                file.execute(_TABLE)
                work(file)
        except sqlite3.OperationalError:  # locked for long, full or read-only: as if there were no cache
            return
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)
        finally:
            file.close()


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=20).digest()


def _checksum(key: bytes, vector: bytes) -> int:
    return zlib.crc32(vector, zlib.crc32(key))


def _whole(key: bytes, vector: object, checksum: object) -> Embedding | None:
    """The vector, if it is what was written."""
    if not isinstance(vector, bytes) or len(vector) % 4 or checksum != _checksum(key, vector):
        return None
    return np.frombuffer(vector, "<f4").astype(np.float32)
