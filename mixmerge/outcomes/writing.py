"""Outcome tables to files."""

from __future__ import annotations

from pathlib import Path

from mixmerge.outcomes.table import OutcomeTable


def write(table: OutcomeTable, path: Path) -> None:
    raise NotImplementedError
