"""``mixmerge route ls`` and ``check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mixmerge.cli.route.options import Json, Kind, Outcomes, Prices
from mixmerge.cli.show import emit_json, table


def ls(
    folder: Annotated[
        Path | None, typer.Argument(help="List the fitted routers in it.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List the kinds of routers with their options; or, of a folder, the fitted routers in it."""
    if folder is not None:
        found = _fitted(folder)
        if json:
            emit_json(found)
            return
        columns = ("router", "kind", "features", "experts", "fitted on", "policy", "version")
        table(str(folder), columns, [tuple(_cells(one)) for one in found], text=(0, 1, 2, 3, 5, 6))
        return
    from mixmerge.routers.table import kinds

    rows = kinds()
    if json:
        emit_json({one.name: one.as_dict() for one in rows})
        return
    table(
        "routers",
        ("kind", "what it does", "options = default", "source"),
        [(one.name, one.summary(), one.shown_options(), one.row.paper) for one in rows],
        text=range(4),
    )


def _fitted(folder: Path) -> list[dict[str, Any]]:
    """The folder itself, if it is a router, and those directly in it; damaged ones with what is wrong."""
    from mixmerge.errors import Fault, MixmergeError

    if not folder.is_dir():
        raise MixmergeError(Fault(str(folder), "there is no such folder"))
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    shown = [path for path in places if (path / "router.json").is_file() and not path.name.startswith(".")]
    return [_summary(path) for path in shown]


def _summary(folder: Path) -> dict[str, Any]:
    from mixmerge.cli.route.parsing import saved_policy
    from mixmerge.errors import MixmergeError
    from mixmerge.routers.base import Router

    try:
        router = Router.load(folder)
        policy = saved_policy(folder, router)
    except MixmergeError as error:
        return {"path": str(folder), "fault": str(error)}
    return {
        "path": str(folder),
        "kind": router.kind,
        "features": None if router.features is None else router.features.kind,
        "options": router.options.model_dump(mode="json"),
        "experts": list(router.experts),
        "queries": None if router.trained_on is None else len(router.trained_on.hashes),
        "policy": None if policy is None else policy.describe(),
        "version": router.version,
    }


def _cells(one: dict[str, Any]) -> list[str]:
    if "fault" in one:
        return [one["path"], one["fault"], "", "", "", "", ""]
    return [
        one["path"],
        one["kind"],
        one["features"] or "-",
        ", ".join(one["experts"]),
        "-" if one["queries"] is None else f"{one['queries']:,}",
        one["policy"] or "-",
        one["version"],
    ]


def check(
    outcomes: Outcomes,
    train: Annotated[
        Path | None,
        typer.Option(help="Outcomes a router is fitted on: which queries are in both?", show_default=False),
    ] = None,
    prices: Prices = None,
    kind: Kind = None,
    json: Json = False,
) -> None:
    """Say what is in outcomes: coverage, ties, duplicates, experts; and leaks from a training table."""
    from mixmerge.outcomes import checks
    from mixmerge.outcomes.table import OutcomeTable

    read = OutcomeTable.read(outcomes, kind=kind, prices=prices)
    report = checks.check(read)
    leaked = None if train is None else checks.leaks(OutcomeTable.read(train, kind=kind), read)
    if json:
        emit_json({**report.as_dict(), **({} if leaked is None else {"leaks": leaked.as_dict()})})
        return
    for line in [*report.lines(), *([] if leaked is None else leaked.lines())]:
        print(line)
