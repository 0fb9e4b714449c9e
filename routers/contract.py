"""What every router keeps, as one function: ``check_router(MyRouter)``, for the tests of plug-ins too.

Raises AssertionError with what was broken. The outcomes are made here: three kinds of questions, one expert good at
each, noise, and some scores missing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query, Scores, queries_of
from mixmerge.outcomes.table import OutcomeTable, Price
from mixmerge.routers.base import Router

_WORDS = {
    "sums": "add subtract number plus minus total count digits sum times",
    "code": "python function loop class return import variable compile bug list",
    "verse": "poem rhyme moon river song sorrow rose verse night heart",
}


def sample(rows: int = 150, *, seed: int = 0, missing: float = 0.05) -> OutcomeTable:
    """Outcomes of four experts, one for each of three tasks and one for none; with costs, prices and ``task``."""
    rng, tasks = np.random.default_rng(seed), list(_WORDS)
    of = rng.integers(0, 3, rows)
    texts = tuple(
        f"{' '.join(rng.choice(_WORDS[tasks[t]].split(), 8))} number {i} of seed {seed}"
        for i, t in enumerate(of)
    )
    chance = np.where(np.arange(4) == of[:, None], 0.9, 0.3)
    score = (rng.random((rows, 4)) < chance).astype(np.float64)
    hidden = rng.random((rows, 4)) < missing
    hidden[:, 0] = False
    score[hidden] = np.nan
    tokens = rng.integers(10, 200, (2, rows, 4)).astype(np.float64)
    experts = ("sums", "code", "verse", "plain")
    return OutcomeTable(
        ids=tuple(f"q{seed}-{i}" for i in range(rows)),
        queries=texts,
        experts=experts,
        score=score,
        tokens_in=tokens[0],
        tokens_out=tokens[1],
        metadata={"task": tuple(tasks[t] for t in of)},
        prices={name: Price(0.1 * (i + 1), 0.4 * (i + 1), float(i + 1)) for i, name in enumerate(experts)},
    )


def check_router(make: Callable[[], Router], *, learns: bool = True, tolerance: float = 1e-6) -> None:
    """Every promise of the contract.

    Args:
        make: an unfitted router, the same each time.
        learns: it should pick better experts than chance on queries it has not seen.
        tolerance: by which scores may differ where only the order or the batch does.
    """
    table, held = sample(), queries_of(sample(60, seed=1))
    router = make().fit(table)
    scores = router.score(held)
    _finite(scores, len(held), table.experts)
    _close(scores, make().fit(table).score(held), 0.0, "fitting again with the same seed changed scores")
    _orders(make, router, table, held, scores, tolerance)
    _files(router, held, scores)
    _experts(make, router, table, held, scores, tolerance)
    assert len(router.reasons(held[:3])) == 3, "one explanation for each query"
    if learns:
        _learns(scores)


def _finite(scores: Scores, rows: int, experts: tuple[str, ...]) -> None:
    assert scores.experts == experts
    assert scores.mean.shape == scores.std.shape == (rows, len(experts)), (
        "one score for each query and expert"
    )
    assert np.isfinite(scores.mean).all(), "expected scores are finite"
    assert np.isfinite(scores.std).all(), "uncertainties are finite"
    assert (scores.std >= 0).all(), "uncertainties are not negative"
    assert scores.cost is not None, "prices were given, so costs are expected"


def _orders(
    make: Callable[[], Router],
    router: Router,
    table: OutcomeTable,
    held: list[Query],
    scores: Scores,
    tolerance: float,
) -> None:
    backwards = router.score(held[::-1])
    _close_arrays(backwards.mean[::-1], scores.mean, tolerance, "the order of queries changed scores")
    alone = np.concatenate([router.score([query]).mean for query in held[:5]])
    _close_arrays(alone, scores.mean[:5], tolerance, "what else is in the batch changed scores")
    assert len(router.score([])) == 0, "no queries, no scores"
    shuffled = tuple(reversed(table.experts))
    other = make().fit(table.only(shuffled)).score(held)
    at = [shuffled.index(name) for name in table.experts]
    _close_arrays(other.mean[:, at], scores.mean, max(tolerance, 1e-6), "the order of experts changed scores")


def _files(router: Router, held: list[Query], scores: Scores) -> None:
    with tempfile.TemporaryDirectory() as folder:
        router.save(Path(folder) / "router")
        loaded = Router.load(Path(folder) / "router")
        assert type(loaded) is type(router)
        assert loaded.experts == router.experts
        _close(loaded.score(held), scores, 0.0, "saving and loading changed scores")
        names = sorted(path.suffix for path in (Path(folder) / "router").iterdir())
        assert set(names) <= {".json", ".safetensors"}, "a router is JSON and safetensors"


def _experts(
    make: Callable[[], Router],
    router: Router,
    table: OutcomeTable,
    held: list[Query],
    scores: Scores,
    tolerance: float,
) -> None:
    if not router.independent:
        return
    fewer = make().fit(table.only(table.experts[:3]))
    _close_arrays(
        fewer.score(held).mean,
        scores.mean[:, :3],
        tolerance,
        "independent experts: another one changed scores",
    )
    twin = _with_twin(table)
    doubled = make().fit(twin).score(held)
    _close_arrays(
        doubled.mean[:, :4], scores.mean, tolerance, "a duplicate expert changed the others' scores"
    )
    _close_arrays(
        doubled.mean[:, 4], scores.mean[:, 0], tolerance, "a duplicate is not scored like its original"
    )
    if router.per_expert:
        added = fewer.add_expert(table.only(table.experts[3:]))
        assert added.experts == table.experts
        _close_arrays(
            added.score(held).mean[:, :3], scores.mean[:, :3], tolerance, "adding changed the others"
        )
        left = added.remove_expert(table.experts[3])
        _close_arrays(left.score(held).mean, scores.mean[:, :3], tolerance, "removing changed the others")


def _with_twin(table: OutcomeTable) -> OutcomeTable:
    def doubled(values: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        return None if values is None else np.concatenate([values, values[:, :1]], axis=1)

    score = doubled(table.score)
    assert score is not None
    return OutcomeTable(
        ids=table.ids,
        queries=table.queries,
        experts=(*table.experts, "twin"),
        score=score,
        tokens_in=doubled(table.tokens_in),
        tokens_out=doubled(table.tokens_out),
        metadata=table.metadata,
        prices={**table.prices, "twin": table.prices[table.experts[0]]},
    )


def _learns(scores: Scores) -> None:
    held = sample(60, seed=1, missing=0.0)
    picked = held.score[np.arange(len(held)), scores.mean.argmax(axis=1)].mean()
    assert picked > held.score.mean() + 0.15, f"picks score {picked:.2f}, chance is {held.score.mean():.2f}"


def _close(given: Scores, wanted: Scores, tolerance: float, what: str) -> None:
    assert given.experts == wanted.experts, what
    _close_arrays(given.mean, wanted.mean, tolerance, what)
    _close_arrays(given.std, wanted.std, max(tolerance, 1e-12), what)


def _close_arrays(
    given: NDArray[np.float64], wanted: NDArray[np.float64], tolerance: float, what: str
) -> None:
    assert given.shape == wanted.shape, what
    worst = float(np.abs(given - wanted).max()) if given.size else 0.0
    assert worst <= tolerance, f"{what}, by up to {worst:.2g}"
