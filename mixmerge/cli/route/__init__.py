"""``mixmerge route``: routers by themselves, from outcomes to decisions."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

_HELP = """Decide which expert answers a query, from outcomes: what every expert scored on past queries.

\b
mixmerge zoo outcomes outcomes.jsonl      # outcomes to try it on
mixmerge route fit outcomes.jsonl --out router --holdout 0.2
mixmerge route ask router "sort up 3142 -> " --explain
mixmerge route ask router -i queries.txt -o decisions.jsonl

\b
mixmerge route check yours.csv            # is your table good to fit on?
mixmerge route eval router other --data new.csv --report report.html
mixmerge route calibrate router --data new.csv --min-score 0.9
"""


class _Commands(TyperGroup):
    """Made when one of them is wanted: ``mixmerge --help`` names the group alone, and has no time for more."""

    def list_commands(self, ctx: Any) -> list[str]:
        self._fill()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        self._fill()
        return super().get_command(ctx, cmd_name)

    def _fill(self) -> None:
        if not self.commands:
            from mixmerge.cli.route.commands import commands

            self.commands.update(commands())


app = typer.Typer(help=_HELP, cls=_Commands, no_args_is_help=True)
