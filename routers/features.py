"""Texts to embeddings. Q queries, D dimensions, V terms.

Every kind gives float32 rows of unit length, each a function of its own query alone.
"""

from __future__ import annotations

import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query
from mixmerge.errors import DependencyError, Fault, MixmergeError

Embedding = NDArray[np.float32]
_TOKEN = r"(?u)\b\w+\b"
_SHAPE = 4  # further dimensions: length, numbers, lines, other scripts


class Features(ABC):
    """What turns queries into embeddings. ``kind`` and ``options()`` make it again; ``arrays()`` is what it learned."""

    kind: ClassVar[str]

    def fit(self, texts: Sequence[str]) -> Features:
        """One fitted on these texts; itself if there is nothing to fit."""
        return self

    @abstractmethod
    def embed(self, queries: Sequence[Query]) -> Embedding:
        """``(Q, D)`` rows of unit length.

        Raises:
            MixmergeError: a query has no embedding, or one of another dimension.
        """

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """JSON values that ``__init__`` takes by keyword."""

    def values(self) -> dict[str, Any]:
        """What was fitted, as JSON values."""
        return {}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What was fitted, as arrays."""
        return {}

    def restored(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Features:
        """One that was fitted before."""
        return self


def unit(rows: NDArray[Any]) -> Embedding:
    """Rows of length 1; rows of zeros stay."""
    length = np.linalg.norm(rows, axis=-1, keepdims=True)
    return np.asarray(rows / np.where(length > 0, length, 1.0), np.float32)


class TfidfFeatures(Features):
    """TF-IDF of words and pairs of words, projected by a truncated SVD; and the shape of the text.

    Fitting takes scikit-learn (extra ``route``). Embedding does not: importing that takes longer than an answer.

    Args:
        dimensions: of the projection, 1 or more; less where there are not as many texts or terms.
        terms: the most frequent that are used.
        shape: weight of the shape (length, numbers, lines, other scripts) beside the words, 0 or more.
        seed: of the SVD.
    """

    kind = "tfidf"

    def __init__(
        self, *, dimensions: int = 256, terms: int = 20_000, shape: float = 0.3, seed: int = 0
    ) -> None:
        faults = [
            Fault(f"features tfidf.{name}", f"is {value}", f"{least} or more")
            for name, value, least in (
                ("dimensions", dimensions, 1),
                ("terms", terms, 1),
                ("shape", shape, 0),
            )
            if not value >= least
        ]
        if faults:
            raise MixmergeError(faults)
        self.dimensions, self.terms, self.shape, self.seed = dimensions, terms, shape, seed
        self._vocabulary: dict[str, int] = {}
        self._arrays: dict[str, NDArray[Any]] = {}

    def fit(self, texts: Sequence[str]) -> Self:
        """One fitted on these texts.

        Raises:
            MixmergeError: the texts hold no words.
            DependencyError: scikit-learn is not installed.
        """
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.utils.extmath import randomized_svd
        except ImportError as error:
            raise DependencyError(
                Fault("features tfidf", "fitting needs scikit-learn", run="pip install 'mixmerge[route]'")
            ) from error
        vectorizer = TfidfVectorizer(
            sublinear_tf=True,
            ngram_range=(1, 2),
            token_pattern=_TOKEN,
            max_features=self.terms,
            min_df=2 if len(texts) > 50 else 1,
        )
        try:
            counted = vectorizer.fit_transform(texts)  # (Q, V)
        except ValueError as error:
            raise MixmergeError(
                Fault(
                    "features tfidf",
                    f"the queries hold no words: {error}",
                    run="Use another kind of features",
                )
            ) from error
        rank = min(self.dimensions, *counted.shape)
        _, _, components = randomized_svd(counted, rank, n_iter=4, random_state=self.seed)  # (D, V)
        shapes = _shapes(texts)
        made = type(self)(**self.options())
        made._vocabulary = {term: int(place) for term, place in vectorizer.vocabulary_.items()}
        made._arrays = {
            "idf": vectorizer.idf_.astype(np.float64),
            "components": np.ascontiguousarray(components.T, np.float32),  # (V, D): a term is a row
            "center": shapes.mean(axis=0),
            "scale": np.maximum(shapes.std(axis=0), 1e-6),
        }
        return made

    def embed(self, queries: Sequence[Query]) -> Embedding:
        if not self._arrays:
            raise MixmergeError(Fault("features tfidf", "are not fitted", run="Call fit first"))
        texts = [query.text for query in queries]
        words = np.zeros((len(texts), self._arrays["components"].shape[1]), np.float32)  # (Q, D)
        for row, text in zip(words, texts, strict=True):
            self._project(text, row)
        shapes = np.clip((_shapes(texts) - self._arrays["center"]) / self._arrays["scale"], -3, 3)
        return unit(np.concatenate([unit(words), self.shape * shapes / _SHAPE**0.5], axis=1))

    def _project(self, text: str, row: Embedding) -> None:
        """Write the projected TF-IDF of a text into ``(D,)`` ``row``, up to its length."""
        words = re.findall(_TOKEN, text.lower())
        known = self._vocabulary
        places = Counter(known[word] for word in words if word in known)
        places.update(known[pair] for a, b in pairwise(words) if (pair := f"{a} {b}") in known)
        if not places:
            return
        at = sorted(places)  # one order of the sum, whatever the order of the words
        count = np.array([places[place] for place in at], np.float64)
        weight = (1 + np.log(count)) * self._arrays["idf"][at]
        row[:] = weight.astype(np.float32) @ self._arrays["components"][at]

    def options(self) -> dict[str, Any]:
        return {"dimensions": self.dimensions, "terms": self.terms, "shape": self.shape, "seed": self.seed}

    def values(self) -> dict[str, Any]:
        return {"vocabulary": sorted(self._vocabulary, key=self._vocabulary.__getitem__)}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return self._arrays

    def restored(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Self:
        made = type(self)(**self.options())
        made._vocabulary = {term: place for place, term in enumerate(values["vocabulary"])}
        made._arrays = dict(arrays)
        return made


class CharacterFeatures(Features):
    """Pieces of words, 2 to 4 characters, counted in hashed places; for short texts such as the names of skills.

    Words of one stem are near each other; there is nothing to fit or download.

    Args:
        dimensions: places, 16 or more.
    """

    kind = "characters"

    def __init__(self, *, dimensions: int = 1024) -> None:
        if dimensions < 16:
            raise MixmergeError(Fault("features characters.dimensions", f"is {dimensions}", "16 or more"))
        self.dimensions = dimensions

    def embed(self, queries: Sequence[Query]) -> Embedding:
        rows = np.zeros((len(queries), self.dimensions), np.float32)
        for row, query in zip(rows, queries, strict=True):
            for word in re.findall(_TOKEN, query.text.lower()):
                marked = f" {word} "
                for n in (2, 3, 4):
                    for start in range(len(marked) - n + 1):
                        hashed = zlib.crc32(marked[start : start + n].encode())
                        row[(hashed >> 1) % self.dimensions] += 1 if hashed & 1 else -1
        return unit(rows)

    def options(self) -> dict[str, Any]:
        return {"dimensions": self.dimensions}


def _shapes(texts: Sequence[str]) -> NDArray[np.float64]:
    """``(Q, 4)``: logarithms of the counts of characters, digits, lines and characters beyond ASCII."""
    rows = [
        (
            len(text),
            sum(map(str.isdigit, text)),
            text.count("\n"),
            0 if text.isascii() else sum(ord(c) > 127 for c in text),
        )
        for text in texts
    ]
    return np.log1p(np.array(rows, np.float64).reshape(-1, _SHAPE))


FEATURES: dict[str, str] = {
    "tfidf": "mixmerge.routers.features:TfidfFeatures",
    "characters": "mixmerge.routers.features:CharacterFeatures",
    "sentence": "mixmerge.routers.embedders:SentenceFeatures",
    "given": "mixmerge.routers.embedders:GivenFeatures",
}
