"""The command line: one file per command; each parses, calls one library function and prints."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from mixmerge.cli import inspect, merge, plan, recipes, zoo
from mixmerge.cli.show import fail
from mixmerge.errors import MixmergeError


class Commands(TyperGroup):
    """Prints the user's faults, one line each, and exits with 2: no traceback for what is not our bug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MixmergeError as error:
            fail(error)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            raise typer.Exit(130) from error


app = typer.Typer(
    name="mixmerge",
    help="Compose fine-tuned LLMs into one better system.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("merge")(merge.merge)
app.command("plan")(plan.plan)
app.command("inspect")(inspect.inspect)
app.add_typer(recipes.app, name="recipes")
app.add_typer(zoo.app, name="zoo")


def main() -> None:
    """Entry point of the ``mixmerge`` command."""
    app()
