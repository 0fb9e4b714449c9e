"""What a method must know of the whole model before it merges one tensor, gathered in passes over all tensors.

A pass looks at every tensor group by itself and gives arrays that are added up over the tensors, in the order of
the output: histograms, counts, sums. So nothing of the size of the model is ever held.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mixmerge.methods.records import Role

Totals = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Group:
    """One tensor of every input, as the method takes them.

    Args:
        tensors: the experts or their deltas, ``S`` each, in recipe order; indexing may read them from disk.
        base: ``S``, where the method requires one.
        role: what the tensor is for.
        parameters: the method's values for this tensor, by their names in a recipe.
    """

    tensors: Sequence[Tensor]
    base: Tensor | None
    role: Role
    parameters: Mapping[str, Any]


class Sketch(Protocol):
    """Passes over the model; ``State`` is whatever the definition takes as ``sketch``."""

    def passes(self) -> int:
        """How many passes there are."""
        ...

    def observe(self, number: int, group: Group, state: Any) -> Totals:
        """What this tensor group adds to the totals of a pass."""
        ...

    def settle(self, number: int, totals: Totals, state: Any) -> Any:
        """The state after a pass, from its totals and the state before (None at first)."""
        ...


def add(one: Totals, other: Totals) -> Totals:
    """The sums of two groups' arrays; names that only one has keep their values."""
    both = {name: one[name] + other[name] for name in one.keys() & other.keys()}
    alone = {name: value for name, value in {**other, **one}.items() if name not in both}
    return {name: np.asarray(value) for name, value in {**alone, **both}.items()}
