"""``mixmerge export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.route.options import Json, Overwrite
from mixmerge.cli.show import emit_json

if TYPE_CHECKING:
    from mixmerge.bank.mix import How
    from mixmerge.dynamic.exporting import Form


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A model with a bank, or what mixmerge fit made.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.", show_default=False)],
    weights: Annotated[
        str,
        typer.Option(
            "--weights", metavar="NAME=WEIGHT,...", help="Of the experts; 0 if not named.", show_default=False
        ),
    ],
    form: Annotated[str, typer.Option("--as", help="checkpoint, adapter (PEFT) or vllm.")] = "checkpoint",
    mix: Annotated[
        str,
        typer.Option(
            "--mix", help="outputs: exact; factors: A and B mixed apart, as LoraHub and one Arrow do."
        ),
    ] = "outputs",
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Where the base is, if not where the folder says.", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """A fixed mixture of a network's experts as an ordinary model or adapter."""
    from mixmerge.dynamic.exporting import export as write
    from mixmerge.dynamic.folders import parts_of

    told, chosen, how = _weights(weights), _form(form), _how(mix)
    rank = write(parts_of(folder, base=base), told, out, form=chosen, how=how, overwrite=overwrite)
    if json:
        emit_json({"path": str(out), "as": chosen, "weights": told, "rank": rank})
        return
    said = " + ".join(f"{weight:g} {name}" for name, weight in told.items())
    print(f"{out}: {chosen} of {said}" + ("" if rank is None else f", rank {rank} at most"))


def _weights(text: str) -> dict[str, float]:
    from mixmerge.errors import Fault, MixmergeError

    found: dict[str, float] = {}
    faults = []
    for part in filter(None, (one.strip() for one in text.split(","))):
        name, equals, value = part.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            equals = ""
        if not equals or not name:
            faults.append(Fault("--weights", f"has {part!r}", "NAME=WEIGHT, such as math=0.5"))
        elif name in found:
            faults.append(Fault("--weights", f"has {name!r} twice", "Each once"))
        else:
            found[name] = weight
    if faults or not found:
        raise MixmergeError(faults or Fault("--weights", "is empty", "NAME=WEIGHT,..."))
    return found


def _form(name: str) -> Form:
    from typing import get_args

    from mixmerge.dynamic.exporting import Form
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.registry import choices

    known: dict[str, Form] = {one: one for one in get_args(Form)}
    if name not in known:
        raise MixmergeError(Fault("--as", f"is {name!r}", choices(name, list(known))))
    return known[name]


def _how(name: str) -> How:
    from typing import get_args

    from mixmerge.bank.mix import How
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.registry import choices

    known: dict[str, How] = {one: one for one in get_args(How)}
    if name not in known:
        raise MixmergeError(Fault("--mix", f"is {name!r}", choices(name, list(known))))
    return known[name]
