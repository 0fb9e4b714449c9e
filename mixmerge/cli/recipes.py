"""``mixmerge recipes``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mixmerge.cli.show import emit_json, table
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

app = typer.Typer(help="List and copy the recipes that come with mixmerge.", no_args_is_help=True)


def _folder() -> Path:
    return Path(__file__).parent.parent / "recipes"


def _says(path: Path) -> str:
    """The first comment of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ").strip() if lines and lines[0].startswith("#") else ""


@app.command("ls")
def list_recipes(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the recipes that come with mixmerge."""
    found = sorted(_folder().glob("*.yaml"))
    if json:
        emit_json({path.stem: _says(path) for path in found})
        return
    table("recipes", ("name", "what it shows"), [(path.stem, _says(path)) for path in found])


@app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name as in ls.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="File or folder to copy to.")] = Path(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe, to edit and run it."""
    known = {path.stem: path for path in _folder().glob("*.yaml")}
    source = known.get(name.removesuffix(".yaml"))
    if source is None:
        raise MixmergeError(Fault("recipes", f"none is called {name!r}", choices(name, list(known))))
    to = target / source.name if target.is_dir() else target
    if to.exists() and not overwrite:
        raise MixmergeError(Fault(str(to), "it exists", run="Name another file, or pass --overwrite"))
    if not to.parent.is_dir():
        raise MixmergeError(Fault(str(to.parent), "no such folder"))
    shutil.copyfile(source, to)
    print(to)
