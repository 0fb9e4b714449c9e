"""LLMRouter's nine experts: chosen by cross-validation inside its training file, then tested once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query
from mixmerge.evaluate.intervals import Comparison, paired_bootstrap
from mixmerge.evaluate.records import RoutingReport
from mixmerge.evaluate.routing import EvaluationOptions, evaluate_routers
from mixmerge.outcomes.checks import Leaks, leaks, without
from mixmerge.outcomes.reading import read
from mixmerge.outcomes.splits import folds
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.registry import find, load
from mixmerge.routers.base import Router
from mixmerge.routers.costs import CostModel
from routing_support.memo import Shared, of_texts

Floats = NDArray[np.float64]
# What cross-validation chooses from: every kind that needs no label and no language model, with its defaults, and the
# two settings that smooth more.
TRIED: dict[str, tuple[str, dict[str, float]]] = {
    "ridge": ("ridge", {}),
    "knn": ("knn", {}),
    "knn (k=100)": ("knn", {"k": 100}),
    "avengers": ("avengers", {}),
    "avengers (K=16)": ("avengers", {"clusters": 16}),
    "logistic": ("logistic", {}),
    "mlp": ("mlp", {}),
    "mf": ("mf", {}),
    "routerdc": ("routerdc", {}),
    "sw_ranking": ("sw_ranking", {}),
    "pilots": ("pilots", {}),
    "length": ("length", {}),
}


@dataclass(frozen=True)
class Fold:
    """A router in cross-validation: its mean score and its gain over the best single of each training part."""

    name: str
    score: float
    gain: Comparison


@dataclass(frozen=True)
class Found:
    """All that the page says of this data set."""

    train: OutcomeTable
    test: OutcomeTable
    clean: OutcomeTable
    leaks: Leaks
    folds: list[Fold]
    chosen: str
    reports: Mapping[str, RoutingReport]
    argmax_label: Mapping[str, float]


def study(
    data: Path, *, tried: Sequence[str], repeats: int, resamples: int, note: Callable[[str], None]
) -> Found:
    """Cross-validate, choose, test on the clean rows and on all of them."""
    folder = data / "llmrouter"
    train, test = (
        read(
            folder / f"scores_{part}.json",
            queries=folder / f"queries_{part}.jsonl",
            prices=folder / "models_candidates.json",
        )
        for part in ("train", "test")
    )
    found = leaks(train, test)
    clean = without(test, [test.ids[i] for i, _ in found.exact])
    crossed = _cross_validated(train, tried, repeats=repeats, resamples=resamples, note=note)
    chosen = max(crossed, key=lambda fold: fold.gain.difference.value).name
    note(f"chosen: {chosen}")
    features = of_texts(train.queries)
    routers = {name: _made(name, features).fit(train) for name in tried}
    sets = {f"the {len(clean)} clean test rows": clean, f"all {len(test)} test rows": test}
    reports = {
        name: evaluate_routers(
            routers, _costed(table), EvaluationOptions(resamples=resamples, allow_trained=table is test)
        )
        for name, table in sets.items()
    }
    labelled = {name: _argmax_label(features, train, table) for name, table in sets.items()}
    return Found(train, test, clean, found, crossed, chosen, reports, labelled)


def _made(name: str, features: Shared) -> Router:
    kind, options = TRIED[name]
    router: Router = load(find("router", kind).target)(options, features=features)
    return router


def _costed(table: OutcomeTable) -> OutcomeTable:
    """With costs from prices and lengths: no tokens were recorded."""
    model = CostModel.fit(table)
    return table if model is None else replace(table, cost=model.expect(table.queries))


def _cross_validated(
    train: OutcomeTable, tried: Sequence[str], *, repeats: int, resamples: int, note: Callable[[str], None]
) -> list[Fold]:
    number = len(train)
    total, alone = {name: np.zeros(number) for name in tried}, np.zeros(number)
    for repeat in range(repeats):
        for f, tested in enumerate(folds(train, 5, seed=repeat)):
            part = train.rows(np.setdiff1d(np.arange(number), tested))
            features, asked = of_texts(part.queries), [Query(train.queries[i]) for i in tested]
            single = int(np.nanmean(part.score, axis=0).argmax())
            alone[tested] += train.score[tested, single] / repeats
            for name in tried:
                choice = _made(name, features).fit(part).score(asked).mean.argmax(axis=1)
                total[name][tested] += train.score[tested, choice] / repeats
            note(f"cross-validation: repeat {repeat + 1} of {repeats}, fold {f + 1} of 5")
    return [
        Fold(
            name,
            float(values.mean()),
            paired_bootstrap(values, alone, train.queries, resamples=resamples),
        )
        for name, values in total.items()
    ]


def _argmax_label(features: Shared, train: OutcomeTable, test: OutcomeTable, *, k: int = 5) -> float:
    """Score of what the field's toolkit does: k neighbours vote by the one best-scored expert of each, the first in
    the candidates' list if several tie."""
    train, test = (table.only(list(table.prices)) for table in (train, test))
    label = train.score.argmax(axis=1)
    stored = features.embed([Query(text) for text in train.queries])
    near = np.argsort(
        -(features.embed([Query(text) for text in test.queries]) @ stored.T), axis=1, kind="stable"
    )
    votes = label[near[:, :k]]  # (Q, k)
    counts = (votes[:, :, None] == np.arange(len(train.experts))).sum(axis=1)
    return float(test.score[np.arange(len(test)), counts.argmax(axis=1)].mean())


def bars(found: Found) -> list[tuple[str, str, str, bool]]:
    """(what, figure, bar, met) of the bar for many experts."""
    best = next(fold for fold in found.folds if fold.name == found.chosen)
    gain = best.gain.difference
    figure = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
    met = gain.value >= 0.02 and gain.low > 0
    return [
        (f"LLMRouter: cross-validated gain of {best.name} over best single", figure, ">= +0.02, above 0", met)
    ]
