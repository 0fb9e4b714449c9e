"""``mixmerge route fit``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.batch import Revision, TrustEndpoints
from mixmerge.cli.route.options import Json, Kind, Overwrite, Prices, Quiet
from mixmerge.cli.route.parsing import check_free, features_from, is_mixture, parse_options
from mixmerge.cli.show import emit_json, step_progress, warn

if TYPE_CHECKING:
    from collections.abc import Callable

    from mixmerge.evaluate.intervals import Estimate
    from mixmerge.evaluate.records import RoutingReport
    from mixmerge.outcomes.table import OutcomeTable
    from mixmerge.routers.base import Progress, Router


def fit(
    outcomes: Annotated[
        Path,
        typer.Argument(
            metavar="OUTCOMES", help="A table of outcomes, or a mixture's YAML or hub id.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder to make.", show_default=False)],
    router: Annotated[
        str | None,
        typer.Option(help="Kind of router, knn by default; route ls lists them.", show_default=False),
    ] = None,
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
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of everything random, 0 by default.", show_default=False)
    ] = None,
    kind: Kind = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    revision: Revision = None,
    trust_endpoints: TrustEndpoints = False,
) -> None:
    """Fit a router on outcomes and save it as a folder.

    With --holdout, a router is first fitted on the rest and asked the
    queries held out; the one that is saved is fitted on all.

    Of a mixture, fits the router it declares and saves the mixture: a
    folder that ask takes like any router's.
    """
    _check(out, holdout, overwrite=overwrite)
    if is_mixture(outcomes):
        given: dict[str, object] = {"--router": router, "--option": option, "--features": features}
        given |= {"--prices": prices, "--seed": seed, "--kind": kind}
        task = _of_mixture(
            outcomes, given, holdout=holdout, revision=revision, trust_endpoints=trust_endpoints
        )
    else:
        if revision is not None:
            from mixmerge.mixture.hub import refuse_revision

            refuse_revision(outcomes, revision)
        task = _of_outcomes(
            outcomes, router or "knn", option or [], features, prices=prices, seed=seed or 0, kind=kind
        )
    _run(task, out, holdout, overwrite=overwrite, json=json, quiet=quiet)


def _run(task: _Task, out: Path, holdout: float | None, *, overwrite: bool, json: bool, quiet: bool) -> None:
    table = task.table
    if not quiet and table is not None:
        warn([*_warnings(table), *task.warnings])
    report = None
    with step_progress(quiet=quiet) as progress:
        if holdout is not None and table is not None:
            report = _held_out(task.make, table, share=holdout, seed=task.seed, progress=progress)
        fitted = task.make() if table is None else task.make().fit(table, progress=progress)
    task.save(fitted, out, overwrite)
    _say(fitted, out, report, queries=_count(fitted, table), json=json)


def _check(out: Path, holdout: float | None, *, overwrite: bool) -> None:
    from mixmerge.errors import Fault, MixmergeError, OutputError

    check_free(out, overwrite=overwrite)
    if out.exists() and not (out / "router.json").is_file():
        raise OutputError(Fault(str(out), "is no router, so it is not replaced", run="Choose another name"))
    if holdout is not None and not 0 < holdout < 1:
        raise MixmergeError(Fault("--holdout", f"is {holdout:g}", "More than 0, less than 1"))


@dataclass(frozen=True)
class _Task:
    """What is to be fitted.

    Args:
        make: the router, not fitted; or fitted, if there is no table.
        table: to fit on; None where a mixture has a fitted router.
        save: writes the fitted router, or the mixture around it: router, folder, overwrite.
        seed: of everything random.
        warnings: about the kind of router.
    """

    make: Callable[[], Router]
    table: OutcomeTable | None
    save: Callable[[Router, Path, bool], None]
    seed: int = 0
    warnings: tuple[str, ...] = ()


def _of_outcomes(
    outcomes: Path,
    router: str,
    option: list[str],
    features: str | None,
    *,
    prices: Path | None,
    seed: int,
    kind: str | None,
) -> _Task:
    from mixmerge import registry
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.outcomes.table import OutcomeTable

    row = registry.find("router", router)
    options, embed = parse_options(option), features_from(features)

    def make() -> Router:
        made: Router = registry.load(row.target)(options, features=embed, seed=seed)
        return made

    if make().features is None and features is not None:  # wrong options show before the outcomes are read
        raise MixmergeError(Fault("--features", f"{router} does not embed queries", run="Leave it out"))
    looks = f"{router} looks at the outcomes of what it is asked: for evaluation only"
    return _Task(
        make,
        OutcomeTable.read(outcomes, kind=kind, prices=prices),
        lambda fitted, out, overwrite: fitted.save(out, overwrite=overwrite),
        seed,
        (looks,) if row.reference else (),
    )


def _of_mixture(
    path: Path,
    given: dict[str, object],
    *,
    holdout: float | None,
    revision: str | None,
    trust_endpoints: bool,
) -> _Task:
    """What the mixture declares; ``given`` are the options that it stands in place of."""
    from mixmerge.errors import Fault, MixmergeError
    from mixmerge.mixture.fitting import outcomes_of, unfitted
    from mixmerge.mixture.hub import spec_from
    from mixmerge.mixture.wiring import Mixture

    faults = [
        Fault(name, "a mixture says this itself", run=f"Leave it out, or change {path}")
        for name, value in given.items()
        if value is not None
    ]
    if faults:
        raise MixmergeError(faults)
    spec = spec_from(path, revision=revision, trust_endpoints=trust_endpoints)

    def save(fitted: Router, out: Path, overwrite: bool) -> None:
        Mixture.of(spec, fitted).save(out, overwrite=overwrite)

    if spec.routed.folder is not None:
        if holdout is not None:
            what = f"the router in {spec.routed.folder} is fitted already"
            raise MixmergeError(Fault("--holdout", what, run="Leave it out, or name kind and outcomes"))
        return _Task(lambda: Mixture.load(spec).routing, None, save)
    return _Task(lambda: unfitted(spec), outcomes_of(spec), save, spec.routed.seed)


def _count(fitted: Router, table: OutcomeTable | None) -> int:
    if table is not None:
        return len(table)
    return 0 if fitted.trained_on is None else len(fitted.trained_on.hashes)


def _say(fitted: Router, out: Path, report: RoutingReport | None, *, queries: int, json: bool) -> None:
    from mixmerge.routers.storage import load

    if json:
        emit_json(
            {
                "path": str(out),
                "kind": fitted.kind,
                "experts": list(fitted.experts),
                "queries": queries,
                "version": load(out).version,
                "holdout": None if report is None else report.as_dict(),
            }
        )
        return
    print(f"{out}: {fitted.kind}, fitted on {queries:,} queries x {len(fitted.experts)} experts")
    if report is not None:
        _print_held_out(report, queries)


def _warnings(table: OutcomeTable) -> list[str]:
    """What the table's report warns of; near duplicates are looked for by ``route check``."""
    from mixmerge.outcomes.checks import check

    mark = "warning: "
    lines = check(table, similarity=None).lines()
    return [line.removeprefix(mark) for line in lines if line.startswith(mark)]


def _held_out(
    make: Callable[[], Router], table: OutcomeTable, *, share: float, seed: int, progress: Progress | None
) -> RoutingReport:
    """How a router that is fitted on the rest does on such a share of the queries."""
    from mixmerge.evaluate.routing import EvaluationOptions, evaluate_routers
    from mixmerge.outcomes.splits import split

    def tell(part: str, done: int, steps: int) -> None:
        if progress is not None:
            progress(f"held out: {part}", done, steps)

    train, test = (table.rows(part) for part in split(table, test=share, seed=seed))
    router = make().fit(train, progress=tell)
    return evaluate_routers({"router": router}, test, EvaluationOptions(seed=seed), progress=tell)


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
