"""The command line: one file per command or group of them; each parses, calls one library function and prints."""

from __future__ import annotations

import gc
from typing import Any

import typer
from typer.core import TyperGroup

import mixmerge.cli.ask as ask_command
import mixmerge.cli.batch as batch_command
import mixmerge.cli.eval as eval_command
import mixmerge.cli.export as export_command
import mixmerge.cli.fit as fit_command
import mixmerge.cli.inspect as inspect_command
import mixmerge.cli.merge as merge_command
import mixmerge.cli.plan as plan_command
import mixmerge.cli.profile as profile_command
import mixmerge.cli.recipes as recipes_commands
import mixmerge.cli.route as route_commands
import mixmerge.cli.search as search_command
import mixmerge.cli.zoo as zoo_commands
from mixmerge.cli.show import fail
from mixmerge.errors import MixmergeError, StoppedError

_OBJECTS = 100_000  # new objects before the collector looks


class Commands(TyperGroup):
    """Prints the user's faults, one line each, and exits with 2: no traceback for what is not our bug.

    A job whose time is up exits with 3, one that was interrupted with 130: the same command goes on with it.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MixmergeError as error:
            fail(error)
            raise typer.Exit(3 if isinstance(error, StoppedError) else 2) from error
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
app.command("merge")(merge_command.merge)
app.command("plan")(plan_command.plan)
app.command("inspect")(inspect_command.inspect)
app.command("profile", cls=batch_command.WithRay)(profile_command.profile)
app.command("eval")(eval_command.evaluate)
app.command("search")(search_command.search)
app.command("fit")(fit_command.fit)
app.command("export")(export_command.export)
app.command("batch", cls=batch_command.WithRay)(batch_command.batch)
app.command("ask")(ask_command.ask)
app.add_typer(recipes_commands.app, name="recipes")
app.add_typer(zoo_commands.app, name="zoo")
app.add_typer(route_commands.app, name="route")


def main() -> None:
    """Entry point of the ``mixmerge`` command."""
    # Imports are most of a short command, and make many objects that live on: the collector would look at
    # these again and again.
    gc.set_threshold(_OBJECTS)
    app()
