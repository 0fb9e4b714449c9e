"""Embeddings that others made: by a model of sentence-transformers, or beforehand. Q queries, N rows, D dimensions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mixmerge.decision.records import Query
from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.routers.cache import EmbeddingCache
from mixmerge.routers.embedding_files import GivenRows, read_embeddings
from mixmerge.routers.features import Embedding, Features, unit

_READ = 100_000  # characters of a query: more than any encoder's window, and no query is too long to be cut
_STEP = 1024  # texts embedded between two writes to the cache
_SHOWN = 5  # faults of as many queries are told
_NOT_THE_MODEL = ("onnx", "openvino", ".git", ".cache")


class SentenceFeatures(Features):
    """Embeddings by any model of sentence-transformers, each made once and kept on disk.

    A text is cut at the model's own window. Embeddings agree across batches to about 1e-6; from the cache they are
    the same to the bit. ``HF_HUB_OFFLINE`` is respected, and code from a model's repository is never run.

    Args:
        model: a folder or hub id.
        revision: branch, tag or commit of a hub id.
        prefix: put before every text, as some models want (``"query: "``).
        batch: texts of like length embedded together, 1 or more.
        cache: keep embeddings on disk (``mixmerge.routers.cache``).
    """

    kind = "sentence"

    def __init__(
        self,
        *,
        model: str = "sentence-transformers/all-MiniLM-L6-v2",
        revision: str | None = None,
        prefix: str = "",
        batch: int = 64,
        cache: bool = True,
    ) -> None:
        if batch < 1:
            raise MixmergeError(Fault("features sentence.batch", f"is {batch}", "1 or more"))
        self.model, self.revision, self.prefix = model, revision, prefix
        self.batch, self.cache = batch, cache
        self._fitted: dict[str, Any] = {}  # fingerprint and dimensions
        self._source: tuple[str, str | None, str] | None = None  # path or id, commit, fingerprint
        self._encoder: Any = None

    def fit(self, texts: Sequence[str]) -> Self:
        """One that knows which model it is."""
        made = type(self)(**self.options())
        made._source, made._encoder = self._source, self._encoder
        first = made.embed([Query(text) for text in texts[:1]])
        made._fitted = {"fingerprint": made._located()[2], "dimensions": first.shape[1]}
        return made

    def embed(self, queries: Sequence[Query]) -> Embedding:
        """``(Q, D)`` rows of unit length.

        Raises:
            MixmergeError: the model does not load, or is not the one this was fitted with.
            DependencyError: sentence-transformers is not installed, and a text is not in the cache.
        """
        dimensions = self._fitted.get("dimensions")
        if not queries:
            return np.empty((0, dimensions or 0), np.float32)
        fingerprint = self._located()[2]
        if self._fitted and self._fitted["fingerprint"] != fingerprint:
            raise MixmergeError(
                Fault(
                    f"features sentence.model {self.model}",
                    "is not the model the router was fitted with: its files changed",
                    run="Fit the router again, or bring the model back",
                )
            )
        texts = [self.prefix + query.text[:_READ] for query in queries]
        kept = EmbeddingCache.of(fingerprint) if self.cache else None
        rows = {} if kept is None else kept.get(list(dict.fromkeys(texts)), dimensions=dimensions)
        # By length, so that texts of a batch are of like length; then by text: no matter the order of the queries.
        missing = sorted(set(texts) - rows.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(missing), _STEP):
            step = missing[start : start + _STEP]
            new = dict(zip(step, self._encode(step), strict=True))
            rows.update(new)
            if kept is not None:
                kept.put(new)
        return np.stack([rows[text] for text in texts])

    def options(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "revision": self.revision,
            "prefix": self.prefix,
            "batch": self.batch,
            "cache": self.cache,
        }

    def values(self) -> dict[str, Any]:
        return self._fitted

    def restored(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Self:
        made = type(self)(**self.options())
        made._fitted = dict(values)
        return made

    def _located(self) -> tuple[str, str | None, str]:
        if self._source is None:
            self._source = _locate(self.model, self.revision)
        return self._source

    def _encode(self, texts: list[str]) -> Embedding:
        if self._encoder is None:
            path, commit, _ = self._located()
            self._encoder = _load(path, commit, shown=self.model)
        rows = self._encoder.encode(
            texts, batch_size=self.batch, show_progress_bar=False, convert_to_numpy=True
        )
        if not np.isfinite(rows).all():
            raise MixmergeError(
                Fault(f"features sentence.model {self.model}", "gives embeddings that are not finite")
            )
        return unit(rows)


def _locate(model: str, revision: str | None) -> tuple[str, str | None, str]:
    """Path or hub id, commit, and a fingerprint of the model: of its files, or of the commit."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder), None, _hash_of(folder)
    where = f"features sentence.model {model}"
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise DependencyError(
            Fault(where, "a hub id needs huggingface-hub", run="pip install 'mixmerge[embed]'")
        ) from error
    reason: Exception | None = None
    for name in ("modules.json", "config.json"):
        try:
            found = Path(hf_hub_download(model, name, revision=revision))
        except (OSError, ValueError) as error:
            reason = reason or error
            continue
        commit = found.parent.name
        return model, commit, hashlib.sha256(f"{model}@{commit}".encode()).hexdigest()
    first = str(reason).strip().splitlines()[0] if str(reason).strip() else type(reason).__name__
    raise MixmergeError(
        Fault(
            where,
            f"is no folder, and cannot be had from the hub: {first}",
            "A folder of a sentence-transformers model, or a hub id",
            "Or use the features that need no download: tfidf",
        )
    )


def _hash_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(_files(folder)):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        inner = path.relative_to(folder)
        if path.is_file() and path.suffix != ".md" and not set(inner.parts) & set(_NOT_THE_MODEL):
            yield path


def _load(path: str, commit: str | None, *, shown: str) -> Any:
    where = f"features sentence.model {shown}"
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise DependencyError(
            Fault(where, "needs sentence-transformers", run="pip install 'mixmerge[embed]'")
        ) from error
    from safetensors import SafetensorError

    try:
        return SentenceTransformer(path, revision=commit, trust_remote_code=False).float().eval()
    except (OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise MixmergeError(
            Fault(where, f"cannot load it: {reason[0]}", "A model of sentence-transformers")
        ) from error


class GivenFeatures(Features):
    """Embeddings made beforehand: those that queries bring along, else those of a file by the query's id.

    Fitting takes a file, or rows given to ``of``; what is asked later may bring its own. Rows are scaled to length 1.

    Args:
        path: a ``.safetensors`` or ``.npy`` file (``mixmerge.routers.embedding_files``).
    """

    kind = "given"

    def __init__(self, *, path: str | None = None) -> None:
        self.path = path
        self._dimensions: int | None = None
        self._rows: GivenRows | None = None

    @classmethod
    def of(cls, ids: Sequence[str], embedding: NDArray[Any]) -> Self:
        """From ``(N, D)`` rows in memory and the ids of their queries; they are not saved with a router.

        Raises:
            MixmergeError: as many ids as rows are wanted, each once, and finite numbers.
        """
        made = cls()
        made._rows = GivenRows.checked("embeddings", ids, np.asarray(embedding))
        return made

    def fit(self, texts: Sequence[str]) -> Self:
        rows = self._read()
        if rows is None:
            raise MixmergeError(
                Fault(
                    "features given",
                    "need the embeddings of the outcomes' queries",
                    run="Pass path=FILE, or GivenFeatures.of(ids, embedding)",
                )
            )
        made = type(self)(**self.options())
        made._rows, made._dimensions = rows, rows.embedding.shape[1]
        return made

    def embed(self, queries: Sequence[Query]) -> Embedding:
        if self._dimensions is None:
            raise MixmergeError(Fault("features given", "are not fitted", run="Call fit first"))
        faults: list[Fault] = []
        rows = np.zeros((len(queries), self._dimensions), np.float32)
        for row, query in zip(rows, queries, strict=True):
            fault = self._take(query, row)
            if fault is not None:
                faults.append(fault)
        if faults:
            more = len(faults) - _SHOWN
            ending = [Fault("queries", f"and {more:,} more like these")] if more > 0 else []
            raise MixmergeError([*faults[:_SHOWN], *ending])
        return unit(rows)

    def _take(self, query: Query, row: Embedding) -> Fault | None:
        """Write the query's embedding into ``row``, or say why there is none."""
        where, wanted = f"query {query.id}", f"{self._dimensions} finite numbers"
        if query.embedding is not None:
            values = np.asarray(query.embedding)
            if values.shape != row.shape:
                return Fault(where, f"its embedding has shape {values.shape}", wanted)
            if not np.isfinite(values).all():
                return Fault(where, "its embedding is not finite", wanted)
            row[:] = values
            return None
        known = self._read()
        at = None if known is None else known.place.get(query.id)
        if known is None or at is None:
            of = "" if self.path is None else f", and {self.path} has none of that id"
            return Fault(where, f"brings no embedding{of}", wanted)
        values = known.embedding[at]
        if values.shape != row.shape:
            return Fault(f"{self.path}: {where}", f"its embedding has shape {values.shape}", wanted)
        row[:] = values
        return None

    def _read(self) -> GivenRows | None:
        if self._rows is None and self.path is not None:
            self._rows = read_embeddings(Path(self.path))
        return self._rows

    def options(self) -> dict[str, Any]:
        return {"path": self.path}

    def values(self) -> dict[str, Any]:
        return {"dimensions": self._dimensions}

    def restored(self, arrays: Mapping[str, NDArray[Any]], values: Mapping[str, Any]) -> Self:
        made = type(self)(**self.options())
        made._dimensions = values["dimensions"]
        return made
