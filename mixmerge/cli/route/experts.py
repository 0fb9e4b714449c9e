"""``mixmerge route add-expert`` and ``remove-expert``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.route.options import Data, Json, Kind, Overwrite, Prices, Quiet, RouterDir
from mixmerge.cli.route.parsing import check_free
from mixmerge.cli.show import emit_json, warn

if TYPE_CHECKING:
    from mixmerge.routers.base import Router

Out = Annotated[
    Path | None,
    typer.Option("--out", help="Write another folder; else ROUTER_DIR changes.", show_default=False),
]


def add_expert(
    router: RouterDir,
    data: Data,
    expert: Annotated[
        list[str], typer.Option("--expert", help="Name in the table; again for more.", show_default=False)
    ],
    out: Out = None,
    prices: Prices = None,
    kind: Kind = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add an expert by its outcomes, without fitting the others again.

    Not every kind of router can.
    """
    from mixmerge.outcomes.table import OutcomeTable
    from mixmerge.routers.base import Router

    if out is not None:
        check_free(out, overwrite=overwrite)
    _check_mixture(router, out)
    found = Router.load(router)
    found.add_expert(OutcomeTable.read(data, kind=kind, prices=prices).only(expert))
    _save(found, router, out, overwrite=overwrite, json=json, quiet=quiet)


def remove_expert(
    router: RouterDir,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The expert.", show_default=False)],
    out: Out = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove an expert, without fitting the others again.

    Not every kind of router can.
    """
    from mixmerge.routers.base import Router

    if out is not None:
        check_free(out, overwrite=overwrite)
    _check_mixture(router, out)
    _save(Router.load(router).remove_expert(name), router, out, overwrite=overwrite, json=json, quiet=quiet)


def _check_mixture(folder: Path, out: Path | None) -> None:
    """Refuse to change the router of a mixture under the experts that its YAML names."""
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.mixture.saving import FILE, is_fitted

    if out is None and is_fitted(folder):
        what = f"is a fitted mixture: {FILE} names its experts too"
        run = "Fit the changed mixture: mixmerge route fit MIXTURE.yaml; or pass --out for a router alone"
        raise MixmergeError(Fault(str(folder), what, run=run))


def _save(
    router: Router, folder: Path, out: Path | None, *, overwrite: bool, json: bool, quiet: bool
) -> None:
    from mixmerge.decision.files import FILE

    target = out or folder
    lost = (target / FILE).exists()
    router.save(target, overwrite=overwrite or out is None)
    if lost and not quiet:
        warn([f"{target / FILE} was for the experts before, and is gone: calibrate again"])
    if json:
        emit_json({"path": str(target), "experts": list(router.experts)})
    else:
        print(f"{target}: {len(router.experts)} experts: {', '.join(router.experts)}")
