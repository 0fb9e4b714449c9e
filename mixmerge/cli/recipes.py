"""``mixmerge recipes``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from mixmerge.cli.show import emit_json, table
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

app = typer.Typer(
    help="List and copy the recipes and mixtures that come with mixmerge.", no_args_is_help=True
)


def _folder() -> Path:
    return Path(__file__).parent.parent / "recipes"


def _says(path: Path) -> str:
    """Its first comment."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[0].lstrip("# ").strip() if lines and lines[0].startswith("#") else ""


def _shipped() -> dict[str, Path]:
    """Recipes by name, then mixtures."""
    found = [*sorted(_folder().glob("*.yaml")), *sorted(_folder().glob("mixtures/*.yaml"))]
    return {path.stem: path for path in found}


@app.command("ls")
def list_recipes(json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """List the recipes of merges that come with mixmerge, then the mixtures."""
    says = {name: _says(path) for name, path in _shipped().items()}
    if json:
        emit_json(says)
        return
    table("recipes and mixtures", ("name", "what it shows"), list(says.items()))


@app.command("cp")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name as in ls.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="File or folder to copy to.")] = Path(),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Copy a recipe or a mixture, to edit and run it."""
    known = _shipped()
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
