"""The nearest of many embeddings: by faiss up to some thousands of rows, by an inverted file above.

Q queries, N stored rows, D dimensions, L lists, k neighbours.

The inverted file is searched list by list for all queries of a batch, not query by query as faiss does: products of
matrices are several times faster than the same products one by one.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.kernels import loops
from mixmerge.kernels.nearest import NONE, parts_of
from mixmerge.machine import cores
from mixmerge.routers.draws import Keys, some
from mixmerge.routers.grid import on_grid
from mixmerge.routers.screen import Screen, choose

Embedding = NDArray[np.float32]
Rows = NDArray[np.int64]
LAYOUT = ("embedding", "centres", "sizes", "basis", "heads", "tails", "slack")  # arrays of one
FLAT_ROWS = 20_000  # comparing with all of that many rows is fast enough
_LISTS = 2  # lists for each square root of the rows
_TRAINED_ON = 128  # rows for each list that its centre is found from
_ROUNDS = 10  # of k-means
_HELD_OUT = 1_000  # rows the number of probed lists is chosen on
_SPARE = 2  # candidates for each neighbour that are kept before the best are chosen
_FIRST = 4  # lists that are searched before the others
_PART = (
    16_384  # most queries that are searched together: the more of them share a list, the faster the products
)
_ROWS = 4_096  # most of them in one product: what it takes stays bounded where all ask for the same list


@dataclass(frozen=True, eq=False)
class Layout:
    """Embeddings in the order an index stores them, and what is needed to open it.

    Args:
        order: ``(N,)``: which of the rows given is at each place; those of one list are side by side.
        arrays: ``embedding`` ``(N, D)`` and ``centres`` ``(L, D)`` float16, ``sizes`` ``(L,)`` of the lists; L is 0
            if there are none. And those of a ``Screen``.
        probes: lists that are searched for a query.
        recall: share of the k nearest that they held, of rows that were kept out for this; 1 without lists.
    """

    order: Rows
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    probes: int = 0
    recall: float = 1.0


def lay_out(embedding: Embedding, keys: Keys, *, k: int, recall: float, flat_rows: int, seed: int) -> Layout:
    """How to store embeddings.

    Above ``flat_rows`` rows: ``2 sqrt(N)`` lists by spherical k-means. Then as many lists are searched as it takes
    for a recall of ``recall``, less two standard errors, on 1,000 rows that are neither stored nor trained on then.

    Args:
        embedding: ``(N, D)`` of unit length.
        keys: ``(N,)`` hashes of the texts, by which the rows to keep out are drawn.
        k: neighbours the recall is for.
        recall: in (0, 1).
        flat_rows: most rows that are all compared with.
        seed: of what is drawn.
    """
    stored, dimensions = on_grid(embedding), embedding.shape[1]
    if len(stored) <= flat_rows:
        none, empty = np.empty((0, dimensions), np.float16), np.empty(0, np.int64)
        arrays: dict[str, NDArray[Any]] = {"embedding": stored.astype(np.float16)}
        order = np.arange(len(stored))
        arrays.update({"centres": none, "sizes": empty, **Screen.none(stored).arrays(order)})
        return Layout(order, arrays)
    held = some(keys, at_most=min(_HELD_OUT, len(keys) // 10), seed=seed)
    kept = np.setdiff1d(np.arange(len(stored)), held)
    centres = _centres(stored[kept], seed=seed)
    assigned = _nearest_list(centres, stored)
    screen = choose(stored[kept], stored[held], k=k)
    without = _Lists.of(stored[kept], assigned[kept], centres, screen)
    probes, reached = _probes(without, stored[held], k=k, recall=recall)
    lists = _Lists.of(stored, assigned, centres, screen.over(stored))
    return Layout(lists.order, lists.arrays, probes, reached)


class Index:
    """Opened embeddings.

    Args:
        arrays: of a ``Layout``.
        probes: lists that are searched for a query; of no effect without lists.

    Raises:
        DependencyError: faiss is not installed, and there are no lists.
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], probes: int) -> None:
        self.rows, self.dimensions = arrays["embedding"].shape
        self.probes = probes
        self._stored = arrays["embedding"].astype(np.float32)
        self._centres = arrays["centres"].astype(np.float32)
        self._ends = np.cumsum(arrays["sizes"])
        self._screen = Screen.read(arrays)
        self._longest = int(arrays["sizes"].max(initial=0))
        if not len(self._centres):
            self._flat = _faiss().IndexFlatIP(self.dimensions)
            self._flat.add(self._stored)

    @property
    def parallel(self) -> bool:
        """It runs on one thread, so that several can search at once; without lists, faiss takes all there are."""
        return len(self._centres) > 0

    def search(self, queries: Embedding, k: int, *, probes: int | None = None) -> tuple[Embedding, Rows]:
        """Cosine and place of the ``k`` nearest, nearest first: ``(Q, k)`` each.

        Fewer where there are fewer rows; where the lists searched hold fewer than k, the last places are -1.

        Args:
            queries: ``(Q, D)`` of unit length.
            k: 1 or more.
            probes: lists to search, other than the index was opened with.

        Raises:
            MixmergeError: the queries have another dimension.
        """
        if queries.shape[1] != self.dimensions:
            raise MixmergeError(
                Fault(
                    "embedding",
                    f"has {queries.shape[1]} dimensions",
                    f"The router was fitted on {self.dimensions}",
                )
            )
        asked, k = on_grid(queries), min(k, self.rows)
        if self.parallel:
            return self._search_lists(asked, k, min(probes or self.probes, len(self._centres)))
        similarity, rows = self._flat.search(asked, k)
        return similarity, rows

    def _search_lists(self, queries: Embedding, k: int, probes: int) -> tuple[Embedding, Rows]:
        """The nearest lists first: then most rows of the others are seen at once to be none of the k nearest."""
        found, first = _Largest.none(len(queries), k), min(_FIRST, probes)
        lists = _Largest.none(len(queries), probes)
        lists.take_in(queries @ self._centres.T, 0, np.arange(len(queries)))  # (Q, L)
        chosen = parts_of(lists.sorted())[1]  # (Q, probes)
        self._visit(queries, chosen[:, :first], queries, self._stored, found.take_in)
        if first == probes:
            return parts_of(found.sorted())
        if self._screen.basis.size:
            heads, tails = self._screen.of(queries)
            look = partial(found.screen, self._screen.tails, tails, queries, self._stored)
            self._visit(queries, chosen[:, first:], heads, self._screen.heads, look)
        else:
            self._visit(queries, chosen[:, first:], queries, self._stored, found.take_in)
        return parts_of(found.sorted())

    def _visit(
        self,
        queries: Embedding,
        lists: Rows,
        asked: Embedding,
        stored: Embedding,
        take_in: Callable[[Embedding, int, Rows], None],
    ) -> None:
        """List by list, with all the queries that search it: so the products are those of matrices.

        Args:
            queries: ``(Q, D)``.
            lists: ``(Q, n)`` that each searches.
            asked, stored: ``(Q, H)`` and ``(N, H)`` that are multiplied.
            take_in: what to do with the products, the place of their first row, and their queries.
        """
        few = len(self._centres) < 1 << 16  # then numpy sorts by digits, which is fast
        flat = np.ascontiguousarray(lists, np.uint16 if few else np.uint32).ravel()
        asking = np.argsort(flat, kind="stable") // lists.shape[1]
        counts = np.bincount(flat, minlength=len(self._centres))
        most, start = min(int(counts.max()), _ROWS), 0
        gathered = np.empty((most, asked.shape[1]), np.float32)
        products = np.empty(most * self._longest, np.float32)
        for which in np.flatnonzero(counts).tolist():
            first, end = int(self._ends[which - 1]) if which else 0, int(self._ends[which])
            all_mine = asking[start : start + counts[which]]
            start += counts[which]
            for part in range(0, len(all_mine) if end > first else 0, _ROWS):
                mine = all_mine[part : part + _ROWS]
                rows = np.take(asked, mine, axis=0, out=gathered[: len(mine)], mode="clip")
                near = products[: len(mine) * (end - first)].reshape(len(mine), end - first)
                take_in(np.matmul(rows, stored[first:end].T, out=near), first, mine)


@dataclass(frozen=True, eq=False)
class _Largest:
    """The k largest similarities of each query, of those taken in.

    Args:
        keys: ``(Q, C)`` as ``mixmerge.kernels.nearest`` says, C more than k.
        counts: ``(Q,)`` places that are in use.
        least: ``(Q,)`` below it is none of the k largest.
    """

    keys: Rows
    counts: Rows
    least: Rows
    k: int

    @classmethod
    def none(cls, queries: int, k: int) -> Self:
        keys = np.full((queries, _SPARE * k + 1), NONE)
        return cls(keys, np.zeros(queries, np.int64), np.full(queries, NONE), k)

    def take_in(self, similar: Embedding, first: int, queries: Rows) -> None:
        """Similarities ``(n, m)`` of these ``(n,)`` queries to the m rows from ``first`` on."""
        loops.keep_largest(similar, first, queries, self.keys, self.counts, self.least, self.k)

    def screen(
        self,
        tails: Embedding,
        tail: Embedding,
        asked: Embedding,
        stored: Embedding,
        near: Embedding,
        first: int,
        queries: Rows,
    ) -> None:
        """Products ``(n, m)`` of heads of these ``(n,)`` queries and the m rows from ``first`` on; see ``Screen``."""
        loops.screen_largest(
            near, tails, first, queries, tail, asked, stored, self.keys, self.counts, self.least, self.k
        )

    def sorted(self) -> Rows:
        """``(Q, k)`` keys, the largest first."""
        return np.sort(self.keys, axis=1)[:, : -self.k - 1 : -1]


def in_parts(work: Callable[[slice], None], size: int, *, parallel: bool) -> None:
    """Do ``work`` for slices that make up 0 to ``size``; if ``parallel``, on all cores, each with one BLAS thread."""
    step = max(1, min(_PART, math.ceil(size / cores())))
    parts = [slice(start, start + step) for start in range(0, size, step)]
    if not parallel:
        for part in parts:
            work(part)
        return
    with _blas().alone():
        if len(parts) < 2 or cores() < 2:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(cores()) as pool:
            for done in [pool.submit(work, part) for part in parts]:
                done.result()


class _Blas:
    """BLAS with one thread while anybody asks for that: for small products, several wait longer than they work."""

    def __init__(self) -> None:
        from threadpoolctl import ThreadpoolController

        self._controller, self._lock = ThreadpoolController(), threading.Lock()
        self._users, self._limit = 0, contextlib.ExitStack()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._limit.enter_context(self._controller.limit(limits=1, user_api="blas"))
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._limit.close()


@cache
def _blas() -> _Blas:
    return _Blas()


@dataclass(frozen=True, eq=False)
class _Lists:
    """Rows sorted by the list they are in."""

    order: Rows
    arrays: Mapping[str, NDArray[Any]]

    @classmethod
    def of(cls, stored: Embedding, assigned: Rows, centres: Embedding, screen: Screen) -> Self:
        order = np.argsort(assigned, kind="stable")
        return cls(
            order,
            {
                "embedding": stored[order].astype(np.float16),
                "centres": centres.astype(np.float16),
                "sizes": np.bincount(assigned, minlength=len(centres)).astype(np.int64),
                **screen.arrays(order),
            },
        )


def _centres(stored: Embedding, *, seed: int) -> Embedding:
    """``(L, D)`` by spherical k-means."""
    faiss = _faiss()
    lists = min(int(_LISTS * len(stored) ** 0.5), len(stored))
    kmeans = faiss.Kmeans(
        stored.shape[1],
        lists,
        niter=_ROUNDS,
        seed=seed % 2**31,
        spherical=True,
        max_points_per_centroid=_TRAINED_ON,
        min_points_per_centroid=1,
    )
    kmeans.train(stored)
    return on_grid(kmeans.centroids)


def _nearest_list(centres: Embedding, stored: Embedding) -> Rows:
    """``(N,)`` the list of every row."""
    flat = _faiss().IndexFlatIP(centres.shape[1])
    flat.add(centres)
    assigned: Rows = flat.search(stored, 1)[1][:, 0]
    return assigned


def _probes(lists: _Lists, queries: Embedding, *, k: int, recall: float) -> tuple[int, float]:
    """How many lists to search, and the recall that has."""
    exact = Index({**lists.arrays, "centres": lists.arrays["centres"][:0]}, 0)
    wanted = exact.search(queries, k)[0][:, -1]  # similarity of the k-th
    total, probes, index = len(lists.arrays["centres"]), 1, Index(lists.arrays, 1)
    while True:
        found = (index.search(queries, k, probes=probes)[0] >= wanted[:, None]).mean(axis=1)
        reached, error = float(found.mean()), float(found.std() / len(found) ** 0.5)
        if probes >= total or reached - 2 * error >= recall:
            return probes, reached
        probes = min(total, max(probes + 1, int(probes * 1.05)))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise DependencyError(
            Fault("nearest queries", "need faiss", run="pip install 'mixmerge[route]'")
        ) from error
    return faiss
