"""RouteLLM's three data sets: a weak and a strong expert, and how much of the gap a router recovers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query
from mixmerge.evaluate.curves import ShareCurve, share_curve
from mixmerge.evaluate.intervals import Estimate, mean_over_repeats
from mixmerge.outcomes.reading import read
from mixmerge.outcomes.similar import groups
from mixmerge.outcomes.splits import folds, split
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.registry import find, load
from routing_support.memo import of_texts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WEAK, STRONG = "mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"
# Labels for MMLU: as many as RouteLLM's routers had.
MMLU_LABELS = 1_531
KINDS = ("length", "ridge", "knn", "avengers", "logistic", "sw_ranking", "hybrid", "mf")
SLOW, SLOW_DRAWS = ("mf",), 3  # what takes longer than all others together is drawn less often

# name -> CPT50, CPT80 (per cent), APGR: RouteLLM, arXiv 2406.18665v4, tables 1 to 3, the best training set of each.
PUBLISHED: dict[str, dict[str, tuple[float, float, float]]] = {
    "GSM8K": {
        "bert": (44.76, 79.09, 0.531),
        "causal LLM": (33.64, 63.26, 0.622),
        "matrix factorisation": (38.82, 72.62, 0.565),
        "sw ranking": (41.21, 72.20, 0.568),
    },
    "MMLU": {
        "bert": (41.30, 72.20, 0.572),
        "causal LLM": (35.49, 70.31, 0.600),
        "matrix factorisation": (35.46, 71.40, 0.597),
        "sw ranking": (35.40, 71.55, 0.603),
    },
    "MT-Bench": {
        "bert": (19.58, 34.02, 0.751),
        "causal LLM": (31.50, 48.75, 0.679),
        "matrix factorisation": (13.40, 31.31, 0.802),
        "sw ranking": (23.21, 36.04, 0.759),
    },
}


@dataclass(frozen=True)
class Line:
    """One router on one data set, over the draws."""

    name: str
    apgr: Estimate
    calls: tuple[float, float, float]  # CPT 20, 50, 80: share of strong calls, mean over draws
    draws: int
    sd: float


@dataclass(frozen=True)
class DataSet:
    """Its outcomes, and how a draw divides it into (fitted on, tested on) parts."""

    name: str
    table: OutcomeTable
    parts: Callable[[int], Iterator[tuple[Ints, Ints]]]
    how: str
    subject: bool


def data_sets(data: Path) -> list[DataSet]:
    """GSM8K in five folds, MMLU with as many labels as RouteLLM had, MT-Bench in five folds; prompts that its authors
    exclude are left out."""
    folder = data / "routellm"
    gsm = read(folder / "gsm8k_responses.csv", leave_out=folder / "gsm8k_contaminated_prompts.jsonl")
    mmlu = read(folder / "mmlu", leave_out=folder / "mmlu_contaminated_prompts.jsonl")
    bench = read(
        folder / "mt_bench_judgements.jsonl",
        queries=folder / "mt_bench_question.jsonl",
        leave_out=folder / "mt_bench_contaminated_prompts.jsonl",
    )
    return [
        DataSet("GSM8K", gsm, _in_folds(gsm), "five folds: 4/5 of the labels", subject=False),
        DataSet(
            "MMLU",
            mmlu,
            _by_labels(mmlu, MMLU_LABELS),
            f"{MMLU_LABELS:,} labels, the rest tested",
            subject=True,
        ),
        DataSet("MT-Bench", bench, _in_folds(bench), "five folds: 4/5 of the labels", subject=True),
    ]


def _in_folds(table: OutcomeTable) -> Callable[[int], Iterator[tuple[Ints, Ints]]]:
    labels = groups(table.queries)

    def parts(draw: int) -> Iterator[tuple[Ints, Ints]]:
        for tested in folds(table, 5, seed=draw, labels=labels):
            yield np.setdiff1d(np.arange(len(table)), tested), tested

    return parts


def _by_labels(table: OutcomeTable, labelled: int) -> Callable[[int], Iterator[tuple[Ints, Ints]]]:
    labels, share = groups(table.queries), min(labelled / len(table), 0.5)

    def parts(draw: int) -> Iterator[tuple[Ints, Ints]]:
        tested, fitted = split(table, test=share, seed=draw, labels=labels)
        yield fitted, tested

    return parts


def compare(given: DataSet, *, draws: int, kinds: Sequence[str], note: Callable[[str], None]) -> list[Line]:
    """Every router over the draws. A curve is made of all parts of a draw together."""
    table, number = given.table, len(given.table)
    weak, strong = (table.score[:, table.experts.index(name)] for name in (WEAK, STRONG))
    curves: dict[str, list[ShareCurve]] = {}
    for draw in range(draws):
        preferences: dict[str, Floats] = {}
        tested_all = np.zeros(number, bool)
        tried = [kind for kind in kinds if kind not in SLOW or draw < SLOW_DRAWS]
        tried += ["task_mean"] if given.subject else []
        for fitted, tested in given.parts(draw):
            tested_all[tested] = True
            for name, values in _preferences(table, fitted, tested, tried).items():
                preferences.setdefault(name, np.full(number, np.nan))[tested] = values
        preferences["random"] = np.random.default_rng(draw).random(number)
        for name, values in preferences.items():
            at = np.flatnonzero(tested_all)
            curves.setdefault(name, []).append(share_curve(values[at], weak[at], strong[at]))
        note(f"{given.name}: draw {draw + 1} of {draws}")
    return [_line(name, made) for name, made in curves.items()]


def _preferences(table: OutcomeTable, fitted: Ints, tested: Ints, kinds: Sequence[str]) -> dict[str, Floats]:
    train, features = table.rows(fitted), of_texts([table.queries[i] for i in fitted])
    asked = [
        Query(table.queries[i], id=table.ids[i], metadata={k: v[i] for k, v in table.metadata.items()})
        for i in tested
    ]
    found = {}
    for kind in kinds:
        router = load(find("router", kind).target)(features=features).fit(train)
        scores = router.score(asked)
        weak, strong = (router.experts.index(name) for name in (WEAK, STRONG))
        name = f"{kind} (told the subject)" if kind == "task_mean" else kind
        found[name] = scores.mean[:, strong] - scores.mean[:, weak]
    return found


def _line(name: str, curves: list[ShareCurve]) -> Line:
    apgr = [curve.apgr() for curve in curves]
    calls = [float(np.mean([curve.calls(part) for curve in curves])) for part in (0.2, 0.5, 0.8)]
    spread = float(np.std(apgr, ddof=1)) if len(apgr) > 1 else float("nan")
    return Line(name, mean_over_repeats(apgr), (calls[0], calls[1], calls[2]), len(curves), spread)


# What the bars are of is fixed before the figures are seen: the plainest router, and the plainest use of a label.
_BARS = (("GSM8K", "ridge", 0.62), ("MMLU", "ridge", 0.61), ("MMLU", "task_mean (told the subject)", 0.64))


def bars(found: Mapping[str, list[Line]]) -> list[tuple[str, str, str, bool]]:
    """(what, figure, bar, met) of the bars for two experts."""
    rows = []
    for data, name, bar in _BARS:
        apgr = next(line.apgr for line in found[data] if line.name == name)
        rows.append((f"{data}: APGR of {name}", f"{apgr.value:.3f}", f">= {bar}", apgr.value >= bar))
    for data, lines in found.items():
        chance = next(line for line in lines if line.name == "random")
        near = abs(chance.apgr.value - 0.5) <= 2 * chance.sd
        figure = f"{chance.apgr.value:.3f}" + (f" (sd {chance.sd:.3f})" if chance.draws > 1 else "")
        rows.append((f"{data}: random", figure, "within 2 sd of 0.5", near))
    return rows
