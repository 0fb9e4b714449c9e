"""``mixmerge route ask``."""

from __future__ import annotations

import json as jsonlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixmerge.cli.batch import Revision
from mixmerge.cli.route.options import (
    AbstainBelow,
    Budget,
    Fallback,
    Json,
    Meta,
    Overwrite,
    Pay,
    PolicyText,
    Quiet,
    TopK,
)
from mixmerge.cli.route.parsing import check_free, is_mixture, policy_from, queries_from, saved_policy
from mixmerge.cli.show import emit_json, step_progress, table, warn

if TYPE_CHECKING:
    from mixmerge.decision.lines import QueryLines
    from mixmerge.decision.policies import Policy
    from mixmerge.decision.records import Decision, Query
    from mixmerge.routers.base import Progress, Router

BLOCK = 8_192  # queries decided at a time: decisions are larger than scores
_OWN = ("rule", "score", "std", "cost", "margin")  # entries of a reason that every policy gives


def ask(
    router: Annotated[
        Path,
        typer.Argument(
            metavar="ROUTER",
            help="A fitted router's or mixture's folder, a mixture's YAML or hub id.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What is asked.", show_default=False)
    ] = None,
    queries: Annotated[
        str | None,
        typer.Option(
            "-i", "--input", help="File of queries, text or JSONL; - for stdin.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Write decisions here, as JSONL.", show_default=False),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(help="JSON field of the text; text, query, prompt or question.", show_default=False),
    ] = None,
    meta: Meta = None,
    explain: Annotated[bool, typer.Option("--explain", help="Say what the scores rest on.")] = False,
    top: Annotated[int, typer.Option(min=1, help="Neighbours, skills, ... that --explain names.")] = 5,
    policy: PolicyText = None,
    top_k: TopK = None,
    budget: Budget = None,
    willingness_to_pay: Pay = None,
    fallback: Fallback = None,
    abstain_below: AbstainBelow = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
    revision: Revision = None,
) -> None:
    """Decide which expert answers a prompt, or each query of a file.

    Of a prompt, prints a decision to read, or its record with --json; of
    a file, one record on each line. Without options for the policy, it is
    the one that calibrate left with the router, else the best score.
    """
    if output is not None:
        check_free(output, overwrite=overwrite)
    asked = queries_from(prompt, queries, field=field, metadata=meta or ())

    loaded, own = _router_of(router, revision)
    chosen = policy_from(
        policy,
        top_k=top_k,
        budget=budget,
        willingness_to_pay=willingness_to_pay,
        fallback=fallback,
        abstain_below=abstain_below,
        saved=own,
    )
    if chosen.whole and len(asked) > BLOCK and not quiet:
        warn([f"{chosen} counts the draws of all queries, so all {len(asked):,} are held in memory"])
    decisions = _decided(loaded, chosen, asked, top=top if explain else None)
    if output is not None:
        _write(decisions, output, len(asked), overwrite=overwrite, json=json, quiet=quiet)
    elif prompt is not None:
        (decision,) = decisions
        emit_json(decision.as_dict()) if json else show(decision)
    else:
        # decisions that are read on the terminal are progress enough
        with step_progress(quiet=quiet or sys.stdout.isatty()) as progress:
            for decision in _counted(decisions, len(asked), progress):
                print(jsonlib.dumps(decision.as_dict(), ensure_ascii=False))


def _router_of(path: Path, revision: str | None) -> tuple[Router, Policy | None]:
    """The router, and the policy it is used with if nothing else is said."""
    from mixmerge.mixture.saving import is_fitted

    if is_mixture(path) or is_fitted(path):
        from mixmerge.mixture import Mixture

        # Nothing is sent to an endpoint here, whoever has chosen it.
        mixture = Mixture.load(path, revision=revision, trust_endpoints=True)
        return mixture.routing, mixture.policy
    from mixmerge.mixture.hub import refuse_revision
    from mixmerge.routers.base import Router

    refuse_revision(path, revision)
    router = Router.load(path)
    return router, saved_policy(path, router)


def _decided(
    router: Router, policy: Policy, queries: tuple[Query, ...] | QueryLines, *, top: int | None
) -> Iterator[Decision]:
    """Decisions in the order of the queries, a block at a time; with ``top``, also what the scores rest on."""
    block = len(queries) if policy.whole else BLOCK
    for some, scores in router.score_blocks(queries, block=block):
        reasons = None if top is None else router.reasons(some, top=top)
        yield from policy.decide(scores, some, version=router.version, reasons=reasons)


def _counted(decisions: Iterator[Decision], number: int, progress: Progress | None) -> Iterator[Decision]:
    """The same decisions; the progress is told of every thousandth and the last."""
    for done, decision in enumerate(decisions, 1):
        if progress is not None and (done % 1000 == 0 or done == number):
            progress("deciding", done, number)
        yield decision


def _write(
    decisions: Iterator[Decision], output: Path, queries: int, *, overwrite: bool, json: bool, quiet: bool
) -> None:
    """Write them, and print to whom they went."""
    from mixmerge.decision.lines import write_decisions

    to: Counter[str] = Counter()

    def noted(given: Iterator[Decision]) -> Iterator[Decision]:
        for decision in given:
            to[decision.primary or "nobody"] += 1
            yield decision

    with step_progress(quiet=quiet) as progress:
        written = write_decisions(noted(_counted(decisions, queries, progress)), output, overwrite=overwrite)
    if json:
        emit_json({"path": str(output), "decisions": written, "primary": dict(to.most_common())})
        return
    print(output)
    rows = [(name, f"{count:,}", f"{count / written:.1%}") for name, count in to.most_common()]
    table(f"{written:,} decisions", ("primary", "queries", "share"), rows)


# --- a decision to read


def show(decision: Decision) -> None:
    """The expert, or all picks, on the first line; then why."""
    print(", ".join(pick.expert for pick in decision.picks) or "nobody")
    reason = decision.reason
    facts = [
        ("expected score", _plus_minus(reason.get("score"), reason.get("std"))),
        ("cost", "not known" if reason.get("cost") is None else f"${reason['cost']:.4g}"),
        ("margin", "-" if reason.get("margin") is None else f"{reason['margin']:.4g}"),
        ("rule", str(reason.get("rule", ""))),
        ("policy", decision.policy),
        ("router", decision.version),
    ]
    for name, value in facts:
        print(f"  {name:<15} {value}")
    print()
    primary = decision.primary
    ranked = sorted(decision.scores.items(), key=lambda item: (item[0] != primary, -item[1], item[0]))
    picked = [pick.expert for pick in decision.picks]
    rows = [(name, f"{score:.4g}", _times(picked.count(name))) for name, score in ranked]
    table("expected scores", ("expert", "score", "picked"), rows)
    for name, value in reason.items():
        if name not in _OWN:
            _show_reason(name, value)


def _plus_minus(score: float | None, std: float | None) -> str:
    if score is None:
        return "not known"
    return f"{score:.4g}" + ("" if std is None else f" ± {std:.2g}")


def _times(count: int) -> str:
    return "" if not count else "yes" if count == 1 else f"{count} times"


def _show_reason(name: str, value: Any) -> None:
    """A list of records as a table, anything else on a line."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        columns = list(dict.fromkeys(key for one in value for key in one))
        words = [
            n
            for n, key in enumerate(columns)
            if not all(isinstance(one.get(key), float | int) for one in value)
        ]
        table(name, columns, [tuple(_cell(one.get(key)) for key in columns) for one in value], text=words)
    else:
        print(f"{name}: {_cell(value)}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(one)}" for key, one in value.items())
    if isinstance(value, list):
        return ", ".join(map(_cell, value))
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
