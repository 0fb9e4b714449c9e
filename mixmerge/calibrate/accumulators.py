"""Statistics of calibration data: sums over tokens or examples, so they can be saved, added up and extended.

Shapes: n is the number of inputs of a linear map, S the shape of a tensor.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.errors import Fault, MixmergeError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, FACTS = "statistics.safetensors", "statistics.json"
_VERSION = 1


@dataclass(frozen=True)
class Facts:
    """What sums are of: two with the same facts, but for the rows, may be added up.

    Args:
        kind: of ``KINDS``. ``gram``: x xᵀ of the inputs of a linear map, (n, n). ``second_moment``: its diagonal, (n,).
            ``fisher``: squares of the gradient of one example's log-likelihood, S; ``fisher_batches``: of a batch's.
        model: fingerprint of the model that was run.
        settings: what else decides a row's share: how rows are cut, drawn labels.
        rows: digests of the rows, sorted.
        counts: of each sum, the tokens (of gradients, the examples) it is over.
        same: tensors that share the sum of another, as the three projections of attention do: they see one input.
    """

    kind: str
    model: str
    settings: Mapping[str, Any]
    rows: tuple[str, ...]
    counts: Mapping[str, int]
    same: Mapping[str, str]

    def sum_of(self, name: str) -> str | None:
        """The name a tensor's sum goes by, or None if it has none."""
        shared = self.same.get(name, name)
        return shared if self.counts.get(shared) else None


@dataclass(frozen=True)
class Statistics:
    """Sums in memory, by the name of the tensor they are for."""

    facts: Facts
    sums: Mapping[str, Tensor]

    def mean(self, name: str) -> Tensor | None:
        """The mean over tokens or examples, or None where nothing was seen."""
        found = self.facts.sum_of(name)
        return None if found is None else self.sums[found] / self.facts.counts[found]


def added(one: Statistics, other: Statistics) -> Statistics:
    """The statistics of the rows of both, as if all had been gathered in one pass.

    Raises:
        MixmergeError: they are of other models, kinds or settings, or have rows in common.
    """
    mine, theirs = one.facts, other.facts
    faults = []
    for what in ("kind", "model", "settings", "same"):
        a, b = getattr(mine, what), getattr(theirs, what)
        if a != b:
            faults.append(
                Fault("statistics", f"{what} differs: {a} and {b}", "Statistics of one model, made alike")
            )
    twice = set(mine.rows) & set(theirs.rows)
    if twice:
        what = f"{len(twice)} rows are in both, {min(twice)[:12]} for one, and would count twice"
        faults.append(Fault("statistics", what, run="Gather the new rows alone"))
    if faults:
        raise MixmergeError(faults)
    names = sorted(one.sums.keys() | other.sums.keys())
    sums = {
        name: one.sums[name] + other.sums[name]
        if name in one.sums and name in other.sums
        else (one.sums if name in one.sums else other.sums)[name]
        for name in names
    }
    counts = {name: mine.counts.get(name, 0) + theirs.counts.get(name, 0) for name in names}
    rows = tuple(sorted({*mine.rows, *theirs.rows}))
    return Statistics(Facts(mine.kind, mine.model, mine.settings, rows, counts, mine.same), sums)


def save_statistics(statistics: Statistics, folder: Path) -> None:
    """Write a folder that appears when it is whole: safetensors, and JSON with the facts and the weights' hash.

    Raises:
        MixmergeError: the disk refuses.
    """
    from safetensors.torch import save_file

    partial = folder.with_name(folder.name + ".partial")
    facts = statistics.facts
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({name: value.contiguous() for name, value in statistics.sums.items()}, partial / WEIGHTS)
        written = {
            "version": _VERSION,
            "kind": facts.kind,
            "model": facts.model,
            "settings": dict(facts.settings),
            "rows": list(facts.rows),
            "counts": dict(facts.counts),
            "same": dict(facts.same),
            "sha256": _digest(partial / WEIGHTS),
        }
        (partial / FACTS).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        partial.replace(folder)
    except OSError as error:
        raise MixmergeError(Fault(str(folder), f"cannot be written: {error.strerror or error}")) from error


def read_facts(folder: Path) -> Facts:
    """The facts of saved statistics, once their weights are known to be the ones they were saved with.

    Raises:
        MixmergeError: there are none, or they are damaged.
    """
    try:
        raw = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        whole = raw["version"] == _VERSION and raw["sha256"] == _digest(folder / WEIGHTS)
        facts = Facts(
            raw["kind"], raw["model"], raw["settings"], tuple(raw["rows"]), raw["counts"], raw["same"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MixmergeError(Fault(str(folder), f"holds no statistics that can be read: {error}")) from error
    if not whole:
        raise MixmergeError(
            Fault(str(folder), "its statistics are damaged", run="Remove it, and gather again")
        )
    return facts


def load_statistics(folder: Path) -> Statistics:
    """Saved statistics, brought into memory.

    Raises:
        MixmergeError: as ``read_facts``.
    """
    from safetensors.torch import load_file

    facts = read_facts(folder)
    return Statistics(facts, load_file(folder / WEIGHTS))


def saved_mean(folder: Path, facts: Facts, name: str) -> Tensor | None:
    """One mean of saved statistics, without reading the rest."""
    from safetensors import safe_open

    found = facts.sum_of(name)
    if found is None:
        return None
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        mean: Tensor = file.get_tensor(found) / facts.counts[found]
    return mean


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
