"""The kinds of statistics: what is added up, for which methods, and what else a row's share depends on.

A new kind is a row of ``KINDS``: ``gathering`` adds up what is of inputs of linear maps, ``fisher`` what is of
gradients. Imports no torch. n is the number of inputs of a linear map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixmerge.methods import Method

SEQUENTIAL = "gram_sequential"  # Gram matrices that need the layers merged so far
_SHOWN = ("max_tokens", "layout")


@dataclass(frozen=True)
class StatisticKind:
    """One kind.

    Args:
        name: of the kind.
        key: what definitions call its means.
        methods: ``Method.statistics`` of those that take it.
        choice: the parameter and its value by which a recipe asks for this kind, where a method knows several.
        power: numbers of a sum for n inputs, n to this power; 0: one for each entry of a tensor, and all tensors.
        settings: fields of ``Measure`` that decide a row's share.
        rows: ``any`` number in a batch, which changes nothing but the rounding; each ``alone``; or ``together``: who
            shares a batch decides its sum, so rows stay in the order given.
    """

    name: str
    key: str
    methods: tuple[str, ...]
    choice: tuple[str, str] | None = None
    power: int = 0
    settings: tuple[str, ...] = _SHOWN
    rows: Literal["any", "alone", "together"] = "any"

    @property
    def gradients(self) -> bool:
        """It is of gradients, of every parameter; else of the inputs of linear maps."""
        return self.power == 0

    def size(self, width: int) -> int:
        """Bytes of a linear map's sum, in float64."""
        return 8 * int(width**self.power)


_ROWS = (
    StatisticKind("gram", "gram", ("gram", SEQUENTIAL), power=2),
    StatisticKind("second_moment", "second_moment", ("second_moment",), power=1),
    StatisticKind(
        "fisher", "fisher", ("fisher",), ("squares", "examples"), settings=(*_SHOWN, "seed"), rows="alone"
    ),
    StatisticKind(
        "fisher_batches",
        "fisher",
        ("fisher",),
        ("squares", "batches"),
        settings=(*_SHOWN, "seed", "batch_size"),
        rows="together",
    ),
)
KINDS: Mapping[str, StatisticKind] = {row.name: row for row in _ROWS}


def kind_for(method: Method, parameters: Mapping[str, object]) -> StatisticKind:
    """The kind of statistics that a method with these parameters takes.

    Args:
        method: one with ``statistics``.
        parameters: of any of its tensors.
    """
    return next(
        kind
        for kind in KINDS.values()
        if method.statistics in kind.methods
        and (kind.choice is None or parameters[kind.choice[0]] == kind.choice[1])
    )
