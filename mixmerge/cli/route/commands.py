"""The commands of ``mixmerge route``, in the order of its help."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer
from typer.main import get_command

from mixmerge.cli.route.ask import ask
from mixmerge.cli.route.calibrate import calibrate
from mixmerge.cli.route.evaluate import evaluate
from mixmerge.cli.route.experts import add_expert, remove_expert
from mixmerge.cli.route.fit import fit
from mixmerge.cli.route.importing import import_outcomes
from mixmerge.cli.route.listing import check, ls

_COMMANDS: dict[str, Callable[..., None]] = {
    "fit": fit,
    "ask": ask,
    "eval": evaluate,
    "calibrate": calibrate,
    "add-expert": add_expert,
    "remove-expert": remove_expert,
    "ls": ls,
    "check": check,
    "import": import_outcomes,
}


def commands() -> dict[str, Any]:
    """Name -> command, as click runs them."""
    app = typer.Typer()
    for name, function in _COMMANDS.items():
        app.command(name)(function)
    made: Any = get_command(app)
    return dict(made.commands)
