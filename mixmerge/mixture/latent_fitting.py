"""A glue on its way into a folder: ``mixmerge fit`` of a mixture whose experts read each other.

The folder has the glue's card and values, how it learned, ``mixture.yaml``, which names the experts, and a manifest,
which names the rows. Experts are not in it or changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mixmerge.aggregate.latent import gates_of
from mixmerge.bank.publishing import check_free, making
from mixmerge.data.rows import Row, read_rows, sample_rows
from mixmerge.decision.records import Query
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.latent.files import LatentCard
from mixmerge.latent.fitting import Asked, Trained, prepare, train, working
from mixmerge.latent.router import Routed, routed_text
from mixmerge.latent.settings import HASHED, RouteOptions
from mixmerge.latent.texts import Example
from mixmerge.mixture.answering import expert_set, fingerprint_of
from mixmerge.mixture.fitting import outcomes_of, same_experts, unfitted
from mixmerge.mixture.latent import CHUNK, LatentOptions
from mixmerge.mixture.saving import anchored, owned_in, save_router, save_whole
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.mixture.wholes import Fitted, Fitting
from mixmerge.mixture.wiring import Mixture
from mixmerge.routers.base import Router

_WHERE = "compose"
_MOST = 10  # rows that are named


def fit_latent(spec: MixtureSpec, out: Path, how: Fitting) -> Fitted:
    """Fit the glue between a mixture's experts; as ``mixture.gluing.fit``.

    What a killed fit goes on from, and the peers' latents, are in a hidden folder beside ``out`` until it is done.
    """
    told = LatentOptions.model_validate(spec.compose.options)
    if told.folder is not None:
        what = f"the glue in {told.folder} is fitted already"
        raise MixmergeError(Fault("compose.folder", what, run="Name data and train to fit another"))
    # A YAML of this name alone, beside whatever else, is a person's own.
    owned = owned_in(out)
    check_free(out, overwrite=how.overwrite, of=owned)
    faults: list[Fault] = []
    rows, keep = (_rows(told, sources, faults) for sources in (told.sources, told.kept))
    mixture: Mixture | None = None
    if spec.router is not None:
        with collecting(faults):
            mixture = Mixture.of(spec, _router(spec))
    asked = _asked(spec, told, rows, keep, mixture, how.device)
    with collecting(faults):
        ready = prepare(asked)
    if faults:
        raise MixmergeError(faults)
    work = out.absolute().parent / f".{out.name}.fit"
    inputs = [one for pair in ready.places.values() for one in pair if one is not None]
    with working(work, out):
        trained = train(ready, work, progress=how.progress)
        with making(out, overwrite=how.overwrite, of=owned, inputs=inputs) as new:
            card = trained.write(new)
            if mixture is not None:
                save_router(mixture, new)
            save_whole(spec, new, _kept(told))
        shutil.rmtree(work, ignore_errors=True)
    facts = {**_facts(card), **trained.report.facts()}
    return Fitted(out, "glue", card.mode, card.names, facts, _notes(card, trained, len(keep)))


def _rows(told: LatentOptions, sources: Sequence[str], faults: list[Fault]) -> tuple[Row, ...]:
    found: list[Row] = []
    for source in sources:
        with collecting(faults):
            rows = read_rows(source, split=told.split)
            found += rows if told.samples is None else sample_rows(rows, told.samples, seed=told.seed)
    return tuple(found)


def _router(spec: MixtureSpec) -> Router:
    """The mixture's own, from its folder or fitted on its outcomes."""
    folder = spec.routed.folder
    if folder is None:
        return unfitted(spec).fit(outcomes_of(spec))
    router = Router.load(folder)
    same_experts(tuple(spec.experts), router.experts, f"the router in {folder}")
    return router


def _asked(
    spec: MixtureSpec,
    told: LatentOptions,
    rows: tuple[Row, ...],
    keep: tuple[Row, ...],
    mixture: Mixture | None,
    device: str,
) -> Asked:
    route: RouteOptions | None = told.route
    if spec.router is not None:
        route = None
    elif told.route.kind == "learned":
        k = min(told.route.k, len(spec.experts))
        encoder = told.route.encoder if told.route.encoder == HASHED else anchored(told.route.encoder)
        route = told.route.model_copy(update={"k": k, "encoder": encoder})
    return Asked(
        experts=expert_set(spec).experts,
        rows=rows,
        mode=told.mode,
        chunk=(told.chunk or CHUNK) if told.mode == "chunked" else 1,
        depths=told.places,
        bridge=told.bridge,
        route=route,
        too_long=told.too_long,
        train=told.train,
        keep=keep,
        decide=None if mixture is None else _Decisions(mixture),
        decided_by="" if mixture is None else _decided_by(mixture),
        seed=told.seed,
        device=device,
    )


def _decided_by(mixture: Mixture) -> str:
    return f"{fingerprint_of(mixture.routing)} {mixture.policy.model_dump_json()}"


class _Decisions:
    """What a mixture's own router and policy decide; the weights of the picks are the gates, as shares of 1.

    Args:
        mixture: with a router.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __call__(self, examples: Sequence[Example]) -> list[Routed]:
        queries = [Query(routed_text(one.prompt), id=str(at)) for at, one in enumerate(examples)]
        decisions = self._mixture.route(queries)
        nobody = [at for at, one in enumerate(decisions, 1) if one.primary is None]
        if nobody:
            shown = ", ".join(map(str, nobody[:_MOST])) + (", ..." if len(nobody) > _MOST else "")
            what = f"the policy picks nobody for {len(nobody):,} rows ({shown}; those of keep count on from data)"
            raise MixmergeError(Fault(_WHERE, what, run="Give the policy a fallback, or leave them out"))
        found = [Routed(str(one.primary), gates_of(one), {}) for one in decisions]
        if all(len(one.gates) == 1 for one in found):
            what = "the policy picks one expert for every row, so nobody is read"
            raise MixmergeError(
                Fault("policy", what, "One that picks several", "policy: {kind: top_k, k: 2}")
            )
        return found


def _kept(told: LatentOptions) -> dict[str, Any]:
    """What the YAML of the fitted folder still says."""
    kept: dict[str, Any] = {}
    if told.route.encoder != HASHED:
        kept["encoder"] = anchored(told.route.encoder)
    if told.dtype != "auto":
        kept["dtype"] = told.dtype
    return kept


def _facts(card: LatentCard) -> dict[str, Any]:
    return {"parameters": card.parameters, "bytes": card.nbytes, "hash": card.hash}


def _notes(card: LatentCard, trained: Trained, keep: int) -> tuple[str, ...]:
    report, facts = trained.report, trained.report.facts()
    lines = [
        f"{card.parameters:,} numbers, trained for {report.steps:,} steps on {report.rows:,} rows"
        f"{', stopped early' if report.stopped_early else ''}: {report.rows_per_second:,.1f} rows/s"
    ]
    if report.held_out:
        lines.append(
            f"{report.held_out:,} rows held out: {facts['start_per_byte']:.4g} nats per byte of the answers "
            f"before, {facts['best_per_byte']:.4g} after step {report.best:,}; "
            f"the same primaries, reading nobody, {report.alone:.4g}"
        )
    away = report.points[-1].keep
    if away is not None:
        lines.append(
            f"{trained.kept:,} rows to keep: in the last step {away:.4g} nats per token from the primaries alone"
        )
    if keep > trained.kept:
        lines.append(f"{keep - trained.kept:,} rows to keep are held out among the lessons, and took no part")
    return tuple(lines)
