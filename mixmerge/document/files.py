"""The text of a document's file."""

from __future__ import annotations

from pathlib import Path

from mixmerge.document.report import Report
from mixmerge.document.tree import MAX_BYTES


def read_file(path: Path, *, name: str, report: Report) -> str | None:
    """The text of a file, or None when it cannot be had (the report says why).

    Args:
        path: UTF-8, at most ``MAX_BYTES``.
        name: what to call it in messages.
        report: gets the fault.
    """
    noun = report.kind.noun
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or "not a file name"
        hint = f"{noun}.parse reads YAML text" if "\n" in str(path) else ""
        report.fault(name, f"cannot read the {noun}: {problem}", run=hint)
        return None
    if len(data) > MAX_BYTES:
        report.fault(name, f"the {noun} is too large", f"At most {MAX_BYTES:,} bytes")
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        report.fault(name, f"the {noun} is not UTF-8 text (byte {error.start})", run="Save it as UTF-8")
        return None
