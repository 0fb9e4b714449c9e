"""Files to outcome tables."""

from __future__ import annotations

from pathlib import Path

from mixmerge.outcomes.table import OutcomeTable


def read(path: Path, *, kind: str | None, prices: Path | None) -> OutcomeTable:
    raise NotImplementedError
