"""Files of embeddings made beforehand. N rows, D dimensions.

``NAME.safetensors`` holds a tensor ``embedding`` ``(N, D)``, and the ids of its rows as a JSON list in its metadata
under ``ids``. ``NAME.npy`` holds the array alone; the ids are a JSON list in ``NAME.ids.json`` beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixmerge.errors import Fault, MixmergeError

_FORMATS = ".safetensors with a tensor 'embedding' and metadata 'ids', or .npy with NAME.ids.json beside it"


@dataclass(frozen=True, eq=False)
class GivenRows:
    """``(N, D)`` floats, and the place of each id among them."""

    embedding: NDArray[Any]
    place: Mapping[str, int]

    @classmethod
    def checked(cls, where: str, ids: Sequence[str], embedding: NDArray[Any]) -> Self:
        """The rows, if they are as they should be.

        Raises:
            MixmergeError: not ``(N, D)`` finite floats, or not one id for each, each once: all at once.
        """
        faults = []
        if embedding.ndim != 2 or not embedding.size or embedding.dtype.kind != "f":
            what = f"embeddings have shape {embedding.shape} and type {embedding.dtype}"
            faults.append(Fault(where, what, "(rows, dimensions) of floats, one row or more"))
        elif len(ids) != len(embedding):
            faults.append(
                Fault(where, f"has {len(ids)} ids for {len(embedding)} rows", "One id for each row")
            )
        elif not np.isfinite(embedding).all():
            bad = ids[int(np.flatnonzero(~np.isfinite(embedding).all(axis=1))[0])]
            faults.append(Fault(where, f"the embedding of {bad!r} is not finite"))
        place = {name: row for row, name in enumerate(ids)}
        if len(place) != len(ids):
            twice = next(name for row, name in enumerate(ids) if place[name] != row)
            faults.append(Fault(where, f"the id {twice!r} is there twice", "Ids are unique"))
        if faults:
            raise MixmergeError(faults)
        return cls(embedding, place)


def read_embeddings(path: Path) -> GivenRows:
    """Read such a file.

    Raises:
        MixmergeError: it is missing, damaged, of another format, or its ids do not fit its rows.
    """
    try:
        if path.suffix == ".safetensors":
            ids, rows = _from_safetensors(path)
        elif path.suffix == ".npy":
            ids = json.loads(_ids_of(path).read_text(encoding="utf-8"))
            rows = np.load(path, allow_pickle=False)
        else:
            raise MixmergeError(Fault(str(path), "is no file of embeddings", _FORMATS))
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        raise MixmergeError(Fault(str(path), f"cannot be read: {error}", _FORMATS)) from error
    if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
        raise MixmergeError(Fault(str(path), "its ids are not a JSON list of strings", _FORMATS))
    return GivenRows.checked(str(path), ids, rows)


def write_embeddings(path: str | Path, ids: Sequence[str], embedding: NDArray[Any]) -> None:
    """Write rows and their ids to a ``.safetensors`` or ``.npy`` file.

    Raises:
        MixmergeError: another suffix, or rows and ids that do not fit.
    """
    path, rows = Path(path), np.ascontiguousarray(embedding, np.float32)
    GivenRows.checked(str(path), ids, rows)
    if path.suffix == ".safetensors":
        save_file({"embedding": rows}, path, metadata={"ids": json.dumps(list(ids), ensure_ascii=False)})
    elif path.suffix == ".npy":
        np.save(path, rows)
        _ids_of(path).write_text(json.dumps(list(ids), ensure_ascii=False), encoding="utf-8")
    else:
        raise MixmergeError(Fault(str(path), "is no file of embeddings", _FORMATS))


def _ids_of(path: Path) -> Path:
    return path.with_suffix(".ids.json")


def _from_safetensors(path: Path) -> tuple[Any, NDArray[Any]]:
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        if "embedding" not in file.keys() or "ids" not in metadata:  # noqa: SIM118 - safe_open is no mapping
            raise MixmergeError(Fault(str(path), "has no tensor 'embedding' or no metadata 'ids'", _FORMATS))
        return json.loads(metadata["ids"]), file.get_tensor("embedding")
