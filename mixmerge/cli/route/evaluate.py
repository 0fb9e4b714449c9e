"""``mixmerge route eval``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixmerge.cli.route.options import (
    AbstainBelow,
    AllowTrained,
    Budget,
    Data,
    Fallback,
    Json,
    Kind,
    OutputTokens,
    Overwrite,
    Pay,
    PolicyText,
    Prices,
    Quiet,
    Seed,
    TopK,
    Unseen,
)
from mixmerge.cli.route.parsing import check_free, policy_from, saved_policy, unseen_rows
from mixmerge.cli.show import emit_json, step_progress, warn

if TYPE_CHECKING:
    from mixmerge.decision.policies import Policy
    from mixmerge.evaluate.records import RoutingReport
    from mixmerge.routers.base import Router


def evaluate(
    routers: Annotated[
        list[Path], typer.Argument(metavar="ROUTER_DIR...", help="Fitted routers.", show_default=False)
    ],
    data: Data,
    report: Annotated[
        Path | None, typer.Option(help="Write an HTML report with plots.", show_default=False)
    ] = None,
    per_query: Annotated[
        Path | None, typer.Option(help="Write what each query got, as JSONL.", show_default=False)
    ] = None,
    policy: PolicyText = None,
    top_k: TopK = None,
    budget: Budget = None,
    willingness_to_pay: Pay = None,
    fallback: Fallback = None,
    abstain_below: AbstainBelow = None,
    saved: Annotated[bool, typer.Option("--saved", help="The one router's policy.json as policy.")] = False,
    unseen: Unseen = False,
    allow_trained: AllowTrained = False,
    perturb: Annotated[
        bool, typer.Option("--perturb", help="Count the choices that small rewordings leave as they are.")
    ] = False,
    prices: Prices = None,
    output_tokens: OutputTokens = None,
    kind: Kind = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare routers on outcomes, beside constants, chance and oracles.

    All are under one policy: the best expected score, unless options name
    another one.
    """
    from mixmerge.evaluate.routing import EvaluationOptions, evaluate_routers
    from mixmerge.outcomes.table import OutcomeTable
    from mixmerge.routers.base import Router

    for path in (report, per_query):
        if path is not None:
            check_free(path, overwrite=overwrite)
    loaded = {name: Router.load(path) for name, path in _named(routers).items()}
    chosen = policy_from(
        policy,
        top_k=top_k,
        budget=budget,
        willingness_to_pay=willingness_to_pay,
        fallback=fallback,
        abstain_below=abstain_below,
        saved=_own_policy(routers, loaded) if saved else None,
    )
    table = OutcomeTable.read(data, kind=kind, prices=prices)
    rows = unseen_rows(table, loaded, unseen=unseen, allow_trained=allow_trained)
    with step_progress(quiet=quiet) as progress:
        found = evaluate_routers(
            loaded,
            rows,
            EvaluationOptions(
                policy=chosen, seed=seed, output_tokens=output_tokens, allow_trained=allow_trained
            ),
            perturbations=_rewordings(seed) if perturb else None,
            progress=progress,
        )
    if not quiet:
        _tell(found, left=len(table) - len(rows))
    if report is not None:
        found.write_html(report, overwrite=overwrite)
    if per_query is not None:
        found.write_jsonl(per_query, overwrite=overwrite)
    if json:
        emit_json(found.as_dict())
        return
    _print(found)


def _tell(found: RoutingReport, *, left: int) -> None:
    """What may make the figures wrong, or the routers useless."""
    warn([f"{left:,} queries that were fitted on are left out"] if left else [])
    warn(found.warnings)
    warn([f"{row.name}: {warning}" for row in found.rows for warning in row.warnings])


def _print(found: RoutingReport) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(found.render(f"{len(found.ids):,} queries, policy {found.policy}"))
    for row in found.rows:
        if row.stays:
            kept = ", ".join(f"{kind} {share:.1%}" for kind, share in row.stays.items())
            print(f"{row.name}: choices that rewording leaves: {kept}")
    for note in found.notes:
        print(note)


def _named(folders: list[Path]) -> dict[str, Path]:
    """Routers by the names of their folders, or by their paths where two names are the same."""
    from mixmerge.errors import Fault, MixmergeError

    resolved = [path.resolve() for path in folders]
    twice = [str(path) for n, path in enumerate(folders) if resolved[n] in resolved[:n]]
    if twice:
        raise MixmergeError(Fault(name, "is given twice", "Each router once") for name in twice)
    names = [path.resolve().name for path in folders]
    return {
        name if names.count(name) == 1 else str(path): path for name, path in zip(names, folders, strict=True)
    }


def _rewordings(seed: int) -> dict[str, Callable[[str], str]]:
    """Every kind of small change that keeps the meaning."""
    from mixmerge.routers.perturb import PERTURBATIONS, perturb

    return {kind: partial(perturb, kind=kind, seed=seed) for kind in PERTURBATIONS}


def _own_policy(folders: list[Path], loaded: dict[str, Router]) -> Policy:
    from mixmerge.decision.files import FILE
    from mixmerge.errors import Fault, MixmergeError

    if len(folders) > 1:
        raise MixmergeError(Fault("--saved", "routers are compared under one policy", "One router"))
    policy = saved_policy(folders[0], next(iter(loaded.values())))
    if policy is None:
        run = "Write it: mixmerge route calibrate"
        raise MixmergeError(Fault("--saved", f"there is no {folders[0] / FILE}", run=run))
    return policy
