"""Learned coefficients of a merge: a record, its JSON text, and what of a tensor a chunk is. Imports no torch.

They are weights of experts, by tensor, chunk and expert: a chunk is a contiguous slice of the row-major tensor. Or they
are factors of the directions of a sum, by tensor and direction: then all experts share one number.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixmerge.errors import Fault, RecipeError

FILE = "mixmerge_coefficients.json"
_FORMAT = "mixmerge-coefficients-1"


@dataclass(frozen=True)
class Coefficients:
    """What was learned: for each tensor, one coefficient for each chunk and expert, or for each direction; and how.

    Args:
        method: of the recipe.
        experts: as the recipe writes them, in its order.
        weights: by tensor, C chunks of T numbers, one for each expert; of factors, one number for each direction, or
            one for all of them.
        nuclear: by tensor whose directions were learned, the sum of the singular values they had; empty where weights
            of experts were.
        start: mean coefficient of each expert before the first step; of factors, one number.
        frozen: tensors that were not learned: they have the coefficients of the start.
        seed: of the order of the data.
        steps: that were taken.
        kept: after how many of them the coefficients are these.
        losses: of each step, before its update.
        skipped: steps without an update, because a gradient or the loss was not finite.
        stopped: why before the last step; empty if it was not.
        warnings: what a person should know, one line each.
        hashes: of what they were learned from: inputs, each expert's rows in their order, and every row, so that a
            merge that uses the coefficients again is not scored on them.
    """

    method: str
    experts: tuple[str, ...]
    weights: Mapping[str, tuple[tuple[float, ...], ...]]
    nuclear: Mapping[str, float] = field(default_factory=dict)
    start: tuple[float, ...] = ()
    frozen: tuple[str, ...] = ()
    seed: int = 0
    steps: int = 0
    kept: int = 0
    losses: tuple[float, ...] = ()
    skipped: int = 0
    stopped: str = ""
    warnings: tuple[str, ...] = ()
    hashes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shared(self) -> bool:
        """Whether they are factors of directions, which all experts share."""
        return bool(self.nuclear)

    def moved(self) -> float:
        """Mean distance of a learned coefficient from its mean at the start."""
        learned = [rows for name, rows in self.weights.items() if name not in self.frozen]
        gaps = [
            abs(value - start)
            for rows in learned
            for row in rows
            for value, start in zip(row, self.start, strict=True)
        ]
        return sum(gaps) / len(gaps) if gaps else 0.0

    def to_json(self) -> str:
        """The same text for the same coefficients; a line for each tensor."""
        plain = dataclasses.asdict(self)
        weights = plain.pop("weights")
        head = json.dumps({"format": _FORMAT, **plain}, indent=1, ensure_ascii=False)
        lines = ",\n".join(
            f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(rows)}" for name, rows in weights.items()
        )
        return f'{head[:-2]},\n "weights": {{\n{lines}\n }}\n}}\n'


def bounds(elements: int, chunks: int) -> tuple[tuple[int, int], ...]:
    """(first, past the last) element of each of ``chunks`` slices whose lengths differ by one at most."""
    edges = [number * elements // chunks for number in range(chunks + 1)]
    return tuple(itertools.pairwise(edges))


def read_coefficients(text: str, *, where: str) -> Coefficients:
    """Coefficients from their JSON text.

    Args:
        text: what ``Coefficients.to_json`` gave, perhaps edited.
        where: its file, for errors.

    Raises:
        RecipeError: it is no such text; everything that is wrong, at once.
    """
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise RecipeError(Fault(where, f"is not JSON: {error}")) from error
    if not isinstance(plain, dict) or plain.get("format") != _FORMAT:
        raise RecipeError(
            Fault(where, "holds no coefficients", f"A merge that learned some writes them to {FILE}")
        )
    faults = _faults(plain, where)
    if faults:
        raise RecipeError(faults)
    known = {item.name for item in dataclasses.fields(Coefficients)} - {"weights", "hashes"}
    rest = {name: _frozen(value) for name, value in plain.items() if name in known}
    weights = {name: tuple(tuple(map(float, row)) for row in rows) for name, rows in plain["weights"].items()}
    return Coefficients(weights=weights, hashes=plain.get("hashes", {}), **rest)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _faults(plain: Mapping[str, Any], where: str) -> list[Fault]:
    faults = []
    experts, weights, frozen = plain.get("experts"), plain.get("weights"), plain.get("frozen", [])
    if not isinstance(plain.get("method"), str):
        faults.append(Fault(f"{where}: method", "is no name"))
    if not isinstance(experts, list) or not all(isinstance(one, str) for one in experts) or not experts:
        faults.append(Fault(f"{where}: experts", "is no list of names"))
        experts = []
    if not isinstance(frozen, list) or not all(isinstance(one, str) for one in frozen):
        faults.append(Fault(f"{where}: frozen", "is no list of names"))
    if not isinstance(weights, dict) or not weights:
        return [*faults, Fault(f"{where}: weights", "has no tensors")]
    nuclear = plain.get("nuclear", {})
    if not isinstance(nuclear, dict) or not all(_finite(norm) and norm >= 0 for norm in nuclear.values()):
        faults.append(Fault(f"{where}: nuclear", "is no mapping of tensors to sums of singular values"))
    width = 1 if nuclear else len(experts)
    numbers = "one number each, of a direction" if nuclear else f"{width} numbers each"
    for name, rows in weights.items():
        good = isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows)
        if not good or any(len(row) != width for row in rows):
            what = f"is not a list of chunks with {numbers}"
            faults.append(Fault(f"{where}: weights.{name}", what))
        elif not all(_finite(value) for row in rows for value in row):
            faults.append(Fault(f"{where}: weights.{name}", "holds what is not a finite number"))
    return faults


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
