"""``mixmerge export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.route.options import Json, Overwrite, Quiet
from mixmerge.cli.show import byte_progress, emit_json

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
        str | None,
        typer.Option(
            "--weights",
            metavar="NAME=WEIGHT,...",
            help="Of the experts, 0 if not named; by default the gate's, if no input changes them.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[str, typer.Option("--as", help="checkpoint, adapter (PEFT) or vllm.")] = "checkpoint",
    mix: Annotated[
        str | None,
        typer.Option(
            "--mix",
            help="outputs: exact, the default; factors: A and B mixed apart, the default of LoraHub's gate.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Where the base is, if not where the folder says.", show_default=False),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A fixed mixture of a network's experts as an ordinary model or adapter."""
    from mixmerge.dynamic.exporting import export as write
    from mixmerge.dynamic.exporting import mixing, own_mixture
    from mixmerge.dynamic.folders import parts_of

    told, chosen = None if weights is None else _weights(weights), _form(form)
    how, parts = None if mix is None else _how(mix), parts_of(folder, base=base)
    own = mixing(parts)
    if told is None:
        told, own = own_mixture(parts)
    with byte_progress("writing", quiet=quiet) as progress:
        rank = write(parts, told, out, form=chosen, how=how or own, overwrite=overwrite, progress=progress)
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
