"""``mixmerge route import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixmerge.cli.route.options import Json, Kind, Outcomes, Overwrite, Prices
from mixmerge.cli.route.parsing import check_free
from mixmerge.cli.show import emit_json


def import_outcomes(
    outcomes: Outcomes,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A .parquet or .jsonl file.", show_default=False)
    ],
    queries: Annotated[
        Path | None,
        typer.Option(
            help="A second file that says more of the queries: llmrouter, mtbench.", show_default=False
        ),
    ] = None,
    leave_out: Annotated[
        Path | None,
        typer.Option("--leave-out", help="JSONL of prompts that do not count.", show_default=False),
    ] = None,
    prices: Prices = None,
    kind: Kind = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Read outcomes in anybody's format, with what belongs to them, and write them as one file of ours."""
    from mixmerge.outcomes.checks import check
    from mixmerge.outcomes.table import OutcomeTable

    check_free(out, overwrite=overwrite)
    read = OutcomeTable.read(outcomes, kind=kind, prices=prices, queries=queries, leave_out=leave_out)
    read.write(out)
    report = check(read, similarity=None)
    if json:
        emit_json({"path": str(out), **report.as_dict()})
        return
    for line in report.lines():
        print(line)
    print(out)
