"""Embeddings made once and shared by many routers: a comparison of routers does not embed again for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query
from mixmerge.routers.features import Features, TfidfFeatures


class Shared(Features):
    """Features that are fitted already, with every embedding kept. Fitting a router leaves them as they are."""

    kind = "shared"

    def __init__(self, fitted: Features) -> None:
        self._fitted = fitted
        self._rows: dict[str, NDArray[np.float32]] = {}

    def embed(self, queries: Sequence[Query]) -> NDArray[np.float32]:
        new = list({query.text: query for query in queries if query.text not in self._rows}.values())
        if new:
            self._rows.update(zip((query.text for query in new), self._fitted.embed(new), strict=True))
        if not queries:
            return self._fitted.embed([])
        return np.stack([self._rows[query.text] for query in queries])

    def options(self) -> dict[str, Any]:
        return {}


def of_texts(texts: Sequence[str]) -> Shared:
    """The default features, fitted on the texts a router is fitted on."""
    return Shared(TfidfFeatures().fit(texts))
