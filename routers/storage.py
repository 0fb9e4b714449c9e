"""A fitted router as a folder of JSON and safetensors, no pickle; ``write`` says what is in it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from mixmerge import registry
from mixmerge.errors import Fault, MixmergeError, OutputError
from mixmerge.routers.base import Router, State
from mixmerge.routers.costs import CostModel
from mixmerge.routers.trained import TrainedOn

FORMAT, VERSION = "mixmerge-router", 1
CARD, _STATE, _FEATURES = "router.json", "state.safetensors", "features.safetensors"
_TRAINED = "trained_on.safetensors"  # hashes of the queries it was fitted on


def save(router: Router, folder: Path, *, overwrite: bool) -> None:
    """Write a fitted router; the folder appears when it is whole, and takes the place of an old one by two renames.

    Raises:
        OutputError: the folder exists, or cannot be written.
        MixmergeError: the router is not fitted.
    """
    with replacing(folder, overwrite=overwrite) as new:
        write(router, new)


@contextmanager
def replacing(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """An empty folder to fill, which becomes ``folder`` when the block ends; if the block fails, nothing is changed.

    Raises:
        OutputError: the folder exists and is not to be replaced or is no router's, or nothing can be written there.
    """
    if folder.exists() and not overwrite:
        raise OutputError(
            Fault(str(folder), "exists already", run="Choose another name, or pass --overwrite")
        )
    if folder.exists() and not (folder / CARD).is_file():
        raise OutputError(
            Fault(str(folder), "is no router, so it is not replaced", run="Choose another name")
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            (partial / "new").mkdir()
            yield partial / "new"
            _flush(partial / "new")
            _place(partial / "new", folder, old=partial / "old")
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(Fault(str(folder), f"cannot be written: {error.strerror or error}")) from error


def _place(new: Path, folder: Path, *, old: Path) -> None:
    if not folder.exists():
        new.rename(folder)
        return
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors makes its files for their owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())


def write(router: Router, folder: Path) -> str:
    """The files of a fitted router, into an empty folder; returns its version.

    Raises:
        MixmergeError: it is not fitted.
    """
    state = router.state
    if state is None:
        raise MixmergeError(
            Fault(f"router {router.kind}", "is not fitted", run="Call fit with outcomes first")
        )
    save_file(_contiguous(state.arrays), folder / _STATE)
    features = router.features
    if features is not None:
        save_file(_contiguous(features.arrays()), folder / _FEATURES)
    if router.trained_on is not None:
        save_file(_contiguous(router.trained_on.arrays()), folder / _TRAINED)
    card = {
        "format": FORMAT,
        "version": VERSION,
        "kind": router.kind,
        "experts": list(router.experts),
        "options": router.options.model_dump(mode="json"),
        "seed": router.seed,
        "features": None
        if features is None
        else {"kind": features.kind, "options": features.options(), "values": features.values()},
        "costs": None if router.costs is None else router.costs.as_dict(),
        "values": dict(state.values),
    }
    card["fingerprint"] = fingerprint(card, folder)
    (folder / CARD).write_text(json.dumps(card, ensure_ascii=False), encoding="utf-8")
    return _version(card)


def _contiguous(arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def fingerprint(card: Mapping[str, Any], folder: Path) -> str:
    """SHA-256 of everything in the folder but itself."""
    stable = json.dumps(
        {k: v for k, v in card.items() if k != "fingerprint"}, sort_keys=True, ensure_ascii=False
    )
    digest = hashlib.sha256(stable.encode("utf-8"))
    for name in (_STATE, _FEATURES, _TRAINED):
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _version(card: Mapping[str, Any]) -> str:
    return str(card["fingerprint"])[:12]


def load(folder: Path) -> Router:
    """Read a router.

    Raises:
        MixmergeError: it is no router, of another version, damaged, or of a kind that is not installed.
    """
    card = _card(folder)
    row = registry.find("router", card["kind"])
    kind = registry.load(row.target)
    features = card["features"]
    try:
        made = None
        if features is not None:
            arrays = load_file(folder / _FEATURES)
            plain = registry.load(registry.table("features")[features["kind"]])(**features["options"])
            made = plain.restored(arrays, features["values"])
        router: Router = kind(card["options"], features=made, seed=card["seed"])
        router.state = State(load_file(folder / _STATE), card["values"])
        if (folder / _TRAINED).is_file():
            router.trained_on = TrainedOn.restored(load_file(folder / _TRAINED))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise MixmergeError(
            Fault(str(folder), f"is damaged: {error}", run="Fit the router again: mixmerge route fit")
        ) from error
    router.experts = tuple(card["experts"])
    router.costs = None if card["costs"] is None else CostModel.from_dict(card["costs"])
    router.version = _version(card)
    return router


def _card(folder: Path) -> dict[str, Any]:
    where = folder / CARD
    try:
        card = json.loads(where.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MixmergeError(
            Fault(
                str(folder), "is no fitted router", "A folder with router.json", "mixmerge route fit --help"
            )
        ) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MixmergeError(
            Fault(str(where), f"cannot be read: {error}", run="Fit the router again")
        ) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise MixmergeError(Fault(str(where), "is not a router's card", f"format: {FORMAT}"))
    if card.get("version") != VERSION:
        raise MixmergeError(
            Fault(
                str(where),
                f"is of version {card.get('version')}",
                f"This mixmerge reads version {VERSION}",
                "Fit the router again",
            )
        )
    if card.get("fingerprint") != fingerprint(card, folder):
        raise MixmergeError(
            Fault(str(folder), "was changed after it was fitted, or is damaged", run="Fit the router again")
        )
    return card
