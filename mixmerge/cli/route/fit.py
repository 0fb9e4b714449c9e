"""``mixmerge route fit``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.route.options import Json, Kind, Outcomes, Overwrite, Prices, Quiet, Seed
from mixmerge.cli.route.parsing import check_free, features_from, parse_options
from mixmerge.cli.show import emit_json, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from mixmerge.evaluate.intervals import Estimate
    from mixmerge.evaluate.records import RoutingReport
    from mixmerge.outcomes.table import OutcomeTable
    from mixmerge.routers.base import Router


def fit(
    outcomes: Outcomes,
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    router: Annotated[str, typer.Option(help="Kind of router; route ls lists them.")] = "knn",
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="NAME=VALUE", help="Of the router; again for more.", show_default=False
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="tfidf, sentence:MODEL, given:FILE, or KIND:NAME=VALUE,...", show_default=False),
    ] = None,
    prices: Prices = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Print the score on such a share of the queries, not fitted on.", show_default=False
        ),
    ] = None,
    seed: Seed = 0,
    kind: Kind = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a router on outcomes and save it as a folder.

    With --holdout, a router is first fitted on the rest and asked the
    queries held out; the one that is saved is fitted on all.
    """
    from mixmerge import registry
    from mixmerge.errors import Fault, MixmergeError, OutputError
    from mixmerge.outcomes.table import OutcomeTable

    row = registry.find("router", router)
    check_free(out, overwrite=overwrite)
    if out.exists() and not (out / "router.json").is_file():
        raise OutputError(Fault(str(out), "is no router, so it is not replaced", run="Choose another name"))
    if holdout is not None and not 0 < holdout < 1:
        raise MixmergeError(Fault("--holdout", f"is {holdout:g}", "More than 0, less than 1"))
    options, embed = parse_options(option or []), features_from(features)

    def make() -> Router:
        made: Router = registry.load(row.target)(options, features=embed, seed=seed)
        return made

    unfitted = make()  # options that are wrong show before the outcomes are read
    if features is not None and unfitted.features is None:
        raise MixmergeError(Fault("--features", f"{router} does not embed queries", run="Leave it out"))
    table = OutcomeTable.read(outcomes, kind=kind, prices=prices)
    if not quiet:
        warn(_warnings(table))
        if row.reference:
            warn([f"{router} looks at the outcomes of what it is asked: for evaluation only"])
    report = None if holdout is None else _held_out(make, table, share=holdout, seed=seed)
    fitted = unfitted.fit(table)
    fitted.save(out, overwrite=overwrite)
    found = {
        "path": str(out),
        "kind": router,
        "experts": list(fitted.experts),
        "queries": len(table),
        "version": type(fitted).load(out).version,
        "holdout": None if report is None else report.as_dict(),
    }
    if json:
        emit_json(found)
        return
    print(f"{out}: {router}, fitted on {len(table):,} queries x {len(fitted.experts)} experts")
    if report is not None:
        _print_held_out(report, len(table))


def _warnings(table: OutcomeTable) -> list[str]:
    """What the table's report warns of; near duplicates are looked for by ``route check``."""
    from mixmerge.outcomes.checks import check

    mark = "warning: "
    lines = check(table, similarity=None).lines()
    return [line.removeprefix(mark) for line in lines if line.startswith(mark)]


def _held_out(make: Callable[[], Router], table: OutcomeTable, *, share: float, seed: int) -> RoutingReport:
    """How a router that is fitted on the rest does on such a share of the queries."""
    from mixmerge.evaluate.routing import evaluate_routers
    from mixmerge.outcomes.splits import split

    train, test = (table.rows(part) for part in split(table, test=share, seed=seed))
    return evaluate_routers({"router": make().fit(train)}, test, seed=seed)


def _print_held_out(report: RoutingReport, queries: int) -> None:
    row = report.row("router")
    score, over = row.score, row.over_best
    print(f"held out {row.scored:,} queries: mean score {_spread(score)}")
    for other in report.rows:
        if other.name.startswith("best single: ") and over is not None:
            print(f"  {other.name} {_spread(other.score)}, so {_spread(over.difference, sign='+')}")
    print(f"  best expert on each query {score.value + row.regret:.3f}")
    print(f"  by a router fitted on the rest; the saved one is fitted on all {queries:,} queries")
    warn(row.warnings)


def _spread(of: Estimate, *, sign: str = "") -> str:
    return f"{of.value:{sign}.3f} [{of.low:{sign}.3f}, {of.high:{sign}.3f}]"
