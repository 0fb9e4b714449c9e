"""Files to outcome tables: find the format, read it, add prices, leave queries out."""

from __future__ import annotations

from pathlib import Path

from mixmerge import registry
from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.checks import without
from mixmerge.outcomes.files import Faults, Place, objects
from mixmerge.outcomes.glance import Glance, Source, glance
from mixmerge.outcomes.importers import Importer
from mixmerge.outcomes.prices import read_prices
from mixmerge.outcomes.similar import normalised
from mixmerge.outcomes.table import OutcomeTable

_PROMPTS = ("eval_prompt", "query", "prompt")


def read(
    path: Path,
    *,
    kind: str | None = None,
    prices: Path | None = None,
    queries: Path | None = None,
    leave_out: Path | None = None,
) -> OutcomeTable:
    """Read outcomes.

    Args:
        path: a file, or for some formats a folder.
        kind: the format, a name of ``mixmerge.outcomes.importers.IMPORTERS``; None finds it by the content.
        prices: a list of prices (``mixmerge.outcomes.prices``); experts that the table does not have are passed over.
        queries: a file that says more of the queries, for formats that have one.
        leave_out: JSONL of queries that are not to be in the table, such as those in somebody's training data: the
            first of ``eval_prompt``, ``query`` and ``prompt`` that a line has, compared without case and spacing.

    Raises:
        MixmergeError: a file is missing, of no known format, or damaged; all its faults at once.
    """
    seen = glance(path)
    name = _kind(seen) if kind is None else kind
    row: Importer = registry.find("outcomes", name)
    if seen.folder and not row.folders:
        raise MixmergeError(Fault(str(path), "is a folder", f"{name} is read from a file"))
    if queries is not None and not row.queries:
        raise MixmergeError(Fault(str(queries), f"is not needed: {name} takes no file of queries"))
    table: OutcomeTable = registry.load(row.read)(Source(path, queries))
    if leave_out is not None:
        table = _left_out(table, leave_out)
    return table if prices is None else _priced(table, prices)


def _kind(seen: Glance) -> str:
    rows = {name: _row(given) for name, given in registry.table("outcomes").items()}
    for name, row in rows.items():
        if registry.load(row.sniff)(seen):
            return name
    columns = ", ".join(seen.columns[:8]) + (", ..." if len(seen.columns) > 8 else "")
    raise MixmergeError(
        Fault(
            str(seen.path),
            f"is of no format known here; {seen.trouble or f'it has {columns}'}",
            "; ".join(f"{name}: {row.summary}" for name, row in rows.items()),
            "Name the format with --kind, or rename columns to query, expert, score",
        )
    )


def _row(given: Importer | str) -> Importer:
    row: Importer = registry.load(given) if isinstance(given, str) else given
    return row


def _priced(table: OutcomeTable, path: Path) -> OutcomeTable:
    prices = read_prices(path)
    known = {name: price for name, price in prices.items() if name in table.experts}
    if not known:
        raise MixmergeError(
            Fault(
                str(path),
                f"has no price of {', '.join(table.experts)}",
                f"It has {', '.join(prices)}",
                "Call experts the same in both",
            )
        )
    return table.priced(known)


def _left_out(table: OutcomeTable, path: Path) -> OutcomeTable:
    faults, unwanted = Faults(path), set()
    for line, row in objects(path, faults):
        text = next((row[key] for key in _PROMPTS if isinstance(row.get(key), str)), None)
        if text is None:
            faults.add(Place(path, line), "names no query", f"One of {', '.join(_PROMPTS)}")
        else:
            unwanted.add(normalised(text))
    faults.check()
    names = [
        name for name, text in zip(table.ids, table.queries, strict=True) if normalised(text) in unwanted
    ]
    if len(names) == len(table):
        raise MixmergeError(Fault(str(path), "leaves no query of the outcomes"))
    return without(table, names)
