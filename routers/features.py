"""Texts to embeddings. Q queries, D dimensions, V terms.

Every kind gives float32 rows of unit length, each a function of its own query alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query
from mixmerge.errors import Fault, MixmergeError

Embedding = NDArray[np.float32]
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
        self.dimensions, self.terms, self.shape, self.seed = dimensions, terms, shape, seed
        self._vectorizer: Any = None
        self._arrays: dict[str, NDArray[Any]] = {}

    def fit(self, texts: Sequence[str]) -> Self:
        from sklearn.utils.extmath import randomized_svd

        made = type(self)(**self.options())
        vectorizer = made._vectorizer_of(min_df=2 if len(texts) > 50 else 1)
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
        made._vectorizer = vectorizer
        made._arrays = {
            "idf": vectorizer.idf_.astype(np.float64),
            "components": np.ascontiguousarray(components, np.float32),
            "center": shapes.mean(axis=0),
            "scale": np.maximum(shapes.std(axis=0), 1e-6),
        }
        return made

    def embed(self, queries: Sequence[Query]) -> Embedding:
        if self._vectorizer is None:
            raise MixmergeError(Fault("features tfidf", "are not fitted", run="Call fit first"))
        texts = [query.text for query in queries]
        if not texts:
            return np.empty((0, len(self._arrays["components"]) + _SHAPE), np.float32)
        words = unit(self._vectorizer.transform(texts) @ self._arrays["components"].T)  # (Q, D)
        shapes = np.clip((_shapes(texts) - self._arrays["center"]) / self._arrays["scale"], -3, 3)
        return unit(np.concatenate([words, self.shape * shapes / _SHAPE**0.5], axis=1))

    def options(self) -> dict[str, Any]:
        return {"dimensions": self.dimensions, "terms": self.terms, "shape": self.shape, "seed": self.seed}

    def values(self) -> dict[str, Any]:
        by_place = sorted(self._vectorizer.vocabulary_.items(), key=lambda item: item[1])
        return {"vocabulary": [term for term, _ in by_place]}

    def arrays(self) -> dict[str, NDArray[Any]]:
        return self._arrays

    def restored(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Self:
        made = type(self)(**self.options())
        vocabulary = {term: place for place, term in enumerate(values["vocabulary"])}
        made._vectorizer = made._vectorizer_of(vocabulary=vocabulary)
        made._vectorizer.idf_ = arrays["idf"]
        made._arrays = dict(arrays)
        return made

    def _vectorizer_of(self, *, vocabulary: dict[str, int] | None = None, min_df: int = 1) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(
            sublinear_tf=True,
            ngram_range=(1, 2),
            token_pattern=r"(?u)\b\w+\b",
            max_features=self.terms if vocabulary is None else None,
            min_df=min_df,
            vocabulary=vocabulary,
        )


def _shapes(texts: Sequence[str]) -> NDArray[np.float64]:
    """``(Q, 4)``: logarithms of the counts of characters, digits, lines and characters beyond ASCII."""
    rows = [
        (len(text), sum(c.isdigit() for c in text), text.count("\n"), sum(ord(c) > 127 for c in text))
        for text in texts
    ]
    return np.log1p(np.array(rows, np.float64).reshape(-1, _SHAPE))


FEATURES: dict[str, str] = {
    "tfidf": "mixmerge.routers.features:TfidfFeatures",
}
