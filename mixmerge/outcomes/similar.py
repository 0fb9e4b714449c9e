"""Which queries are the same, or nearly: what may not be on both sides of a split.

N texts, F features (runs of characters), S dimensions of a sketch.
Two texts are the same if they are so without case, spacing and Unicode's compatibility forms. They are near if the
cosine of their TF-IDF vectors of ``RUN`` characters each is at least ``similarity``. All results depend on the set of
texts alone, not on their order.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import DependencyError, Fault, MixmergeError

Ints = NDArray[np.int64]
SIMILARITY = 0.9
RUN = 5  # characters of a feature
MOST = 10_000  # characters of a text that are compared: of a longer one, the first and the last half as many
_SKETCH = 512
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits mixed: hashes of different runs hardly ever meet
_ROUNDING = 1e-6  # of cosines in float32
# A sketch errs by about 0.01 on a cosine near 0.9, so pairs this far below are looked at exactly.
_SLACK = 0.1
_BLOCK = 1024  # texts that are compared with all others at a time, or fewer
_PAIRS = 2**24  # entries of a block of sketched cosines: 64 MB
_ENTRIES = 4_000_000  # of the rows that are compared exactly at a time: 48 MB each side


def normalised(text: str) -> str:
    """The text without case, spacing and compatibility forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> str:
    """SHA-256 of the normalised text, in hex."""
    return hashlib.sha256(normalised(text).encode("utf-8", "surrogatepass")).hexdigest()


def groups(texts: Sequence[str], *, similarity: float | None = SIMILARITY) -> Ints:
    """``(N,)`` the group of each text: texts that are the same or near are in one, and so are those near to these.

    Args:
        similarity: from which two texts are near, in (0, 1]; None for the same texts only.

    Groups are numbered by the smallest key of their texts.

    Raises:
        MixmergeError: a similarity that is none.
    """
    keys = [text_key(text) for text in texts]
    unique, at = np.unique(np.array(keys, dtype="U64"), return_inverse=True)
    labels = np.arange(len(unique), dtype=np.int64)
    if similarity is not None and len(unique) > 1:
        chosen = {key: normalised(text) for key, text in zip(keys, texts, strict=True)}
        labels = _linked(Vectors.of([chosen[str(key)] for key in unique]), _checked(similarity))
    # keys are sorted, so the first text of a component has its smallest key
    return np.asarray(np.unique(labels, return_inverse=True)[1][at.reshape(-1)], np.int64)


def near(
    left: Sequence[str], right: Sequence[str], *, similarity: float = SIMILARITY
) -> tuple[Ints, NDArray[np.float64]]:
    """For each text of ``left`` the most similar of ``right``, if near: its index, or -1, and the cosine.

    The same text has cosine 1. Where two are as similar, the one with the smaller key.

    Raises:
        MixmergeError: a similarity that is none.
    """
    floor = _checked(similarity)
    best, cosine = np.full(len(left), -1, np.int64), np.zeros(len(left))
    if not left or not right:
        return best, cosine
    ours, theirs = _first_of(left), _first_of(right)
    keys = sorted({*ours, *theirs})
    texts = [normalised(left[ours[key]] if key in ours else right[theirs[key]]) for key in keys]
    vectors = Vectors.of(texts)
    of_ours = np.array([i for i, key in enumerate(keys) if key in ours], np.int64)
    of_theirs = np.array([i for i, key in enumerate(keys) if key in theirs], np.int64)
    found: dict[str, tuple[float, int]] = {}
    for i, j in vectors.candidates(of_ours, of_theirs, floor - _SLACK):
        exact = vectors.cosines(i, j)
        close = exact >= floor
        for a, b, value in zip(i[close].tolist(), j[close].tolist(), exact[close].tolist(), strict=True):
            before = found.get(keys[a], (0.0, 0))
            if (value, -b) > (before[0], -before[1]):
                found[keys[a]] = (value, b)
    found |= {key: (1.0, n) for n, key in enumerate(keys) if key in ours and key in theirs}
    for n, text in enumerate(left):
        if (pair := found.get(text_key(text))) is not None:
            cosine[n], best[n] = pair[0], theirs[keys[pair[1]]]
    return best, cosine


@dataclass(frozen=True, eq=False)
class Vectors:
    """TF-IDF of texts and its sketch.

    Args:
        exact: ``(N, F)`` sparse rows of length 1: (1 + log count) * (1 + log((1 + N) / (1 + texts that have it))).
        sketch: ``(N, S)`` float32 rows of length 1: each feature added to one dimension, with a sign; both from its
            hash: the count sketch of Charikar, Chen and Farach-Colton (2002), Finding frequent items in data streams.
    """

    exact: Any
    sketch: NDArray[np.float32]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Vectors:
        """Vectors of normalised texts."""
        try:
            from scipy.sparse import csr_array
        except ImportError as error:
            raise DependencyError(
                Fault("similar queries", "need scipy to be found", run="pip install 'mixmerge[route]'")
            ) from error
        starts, features, counts = _counted(texts)
        names, columns, spread = np.unique(features, return_inverse=True, return_counts=True)
        idf = 1.0 + np.log((1.0 + len(texts)) / (1.0 + spread))
        weights = (1.0 + np.log(counts)) * idf[columns]
        weights /= np.repeat(np.sqrt(np.add.reduceat(weights**2, starts[:-1])), np.diff(starts))
        weights = weights.astype(np.float32)
        exact = csr_array((weights, columns.astype(np.int32), starts), shape=(len(texts), len(names)))
        mixed = _mixed(features.view(np.uint64) + np.uint64(1))
        signs = np.where(mixed >> np.uint64(63), 1.0, -1.0)
        dense = csr_array(
            (weights * signs, (mixed % np.uint64(_SKETCH)).astype(np.int32), starts),
            shape=(len(texts), _SKETCH),
        ).toarray()
        norm = np.linalg.norm(dense, axis=1, keepdims=True)
        return cls(exact, (dense / np.where(norm > 0, norm, 1.0)).astype(np.float32))

    def candidates(self, left: Ints, right: Ints, floor: float) -> Iterator[tuple[Ints, Ints]]:
        """Pairs, block by block, whose sketches have a cosine of at least ``floor``."""
        block = max(1, _PAIRS // max(len(right), 1))
        others = self.sketch[right].T
        for start in range(0, len(left), block):
            i, j = np.nonzero(self.sketch[left[start : start + block]] @ others >= floor)
            yield left[start + i], right[j]

    def cosines(self, left: Ints, right: Ints) -> NDArray[np.float64]:
        """The exact cosine of each pair."""
        mean = max(1, self.exact.nnz // self.exact.shape[0])
        block, found = max(1, _ENTRIES // mean), [np.empty(0)]
        for start in range(0, len(left), block):
            rows, others = self.exact[left[start : start + block]], self.exact[right[start : start + block]]
            found.append(np.asarray(rows.multiply(others).sum(axis=1, dtype=np.float64)).reshape(-1))
        return np.concatenate(found)


def _linked(vectors: Vectors, floor: float) -> Ints:
    """``(N,)`` the smallest text of each one's connected component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = np.arange(vectors.exact.shape[0], dtype=np.int64)
    labels = rows.copy()
    pairs = (
        vectors.candidates(rows[start : start + _BLOCK], rows[start:], floor - _SLACK)
        for start in range(0, len(rows), _BLOCK)
    )
    for i, j in chain.from_iterable(pairs):
        new = (i < j) & (labels[i] != labels[j])  # what is linked already needs no exact cosine
        i, j = i[new], j[new]
        close = vectors.cosines(i, j) >= floor
        if not close.any():
            continue
        edges = (np.ones(int(close.sum()), np.int8), (labels[i[close]], labels[j[close]]))
        _, part = connected_components(coo_array(edges, shape=(len(rows), len(rows))), directed=False)
        merged = part[labels]
        first = np.full(int(part.max()) + 1, len(rows), np.int64)
        np.minimum.at(first, merged, rows)
        labels = first[merged]
    return labels


def _counted(texts: Sequence[str]) -> tuple[Ints, Ints, Ints]:
    """Where each text's features start, their hashes and counts, text by text and each text's sorted."""
    starts, features, counts = [0], [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for text in texts:
        found, count = np.unique(_hashes(text), return_counts=True)
        starts.append(starts[-1] + len(found))
        features.append(found)
        counts.append(count)
    return np.array(starts, np.int64), np.concatenate(features), np.concatenate(counts)


def _hashes(text: str) -> Ints:
    """Of every run of ``RUN`` characters, of the text with a space at both ends; of a shorter text, its own."""
    if len(text) > MOST:
        text = text[: MOST // 2] + text[-(MOST // 2) :]
    padded = f" {text} "
    codes = np.frombuffer(padded.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    run = min(RUN, len(codes))
    ends = len(codes) - run + 1
    total = np.zeros(ends, np.uint64)
    for k in range(run):
        total = total * _FACTOR + codes[k : k + ends] + np.uint64(1)
    return _mixed(total).view(np.int64)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits that spreads them: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _first_of(texts: Sequence[str]) -> dict[str, int]:
    """Key of each text -> its first index."""
    first: dict[str, int] = {}
    for i, text in enumerate(texts):
        first.setdefault(text_key(text), i)
    return first


def _checked(similarity: float) -> float:
    if not 0.0 < similarity <= 1.0:
        raise MixmergeError(Fault("similarity", f"is {similarity}", "More than 0, at most 1"))
    return similarity - _ROUNDING
