"""In what order groups run where some read what others offer: offers first, and a unit's two groups side by side.

Legend: U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mixmerge.batch.plan import Group

Relation = NDArray[np.bool_]


def ordered(groups: Sequence[Group], cost: Callable[[Group], float]) -> list[Group]:
    """Groups so that what is read has been offered before; the costliest first where nothing else decides.

    Units that do not read each other in a circle follow one another, each with both of its groups: one load is enough
    for each, whatever fits. Of those that do, all offer first, and then read in the reverse order: what is loaded
    when the last one has offered reads first, and none is loaded more than twice.

    Args:
        groups: of a stage; at most two of a unit, of which one ``reads``.
        cost: of a group, such as its seconds.
    """
    units = list(dict.fromkeys(group.unit for group in groups))
    whole = {unit: sum(cost(one) for one in groups if one.unit == unit) for unit in units}
    reached = _reach(units, groups)
    # Who is reached by fewer comes first: whoever reads it, and is not read by it, is reached by more.
    before = dict(zip(units, reached.sum(axis=0).tolist(), strict=True))
    circles = {unit: _circle(units, reached, at) for at, unit in enumerate(units)}
    found: list[Group] = []
    done: set[str] = set()
    for unit in sorted(units, key=lambda one: (before[one], -whole[circles[one][0]], circles[one][0])):
        if unit in done:
            continue
        circle = sorted(circles[unit], key=lambda one: (-whole[one], one))
        done.update(circle)
        found += [one for name in circle for one in groups if one.unit == name and not one.reads]
        found += [one for name in reversed(circle) for one in groups if one.unit == name and one.reads]
    return found


def loads(units: Sequence[str], sizes: Sequence[int], memory: int) -> int:
    """How often units are loaded that are used in this order, where what was not used for longest makes room.

    Args:
        units: used one after the other.
        sizes: bytes of each.
        memory: bytes that there are.
    """
    held: dict[str, int] = {}
    count = 0
    for unit, size in zip(units, sizes, strict=True):
        if unit in held:
            held[unit] = held.pop(unit)
            continue
        while held and sum(held.values()) + size > memory:
            held.pop(next(iter(held)))
        held[unit] = size
        count += 1
    return count


def _reach(units: Sequence[str], groups: Sequence[Group]) -> Relation:
    """``(U, U)``: whether the first one's latents reach the second, through others too; each reaches itself."""
    places = {unit: at for at, unit in enumerate(units)}
    found: Relation = np.zeros((len(units), len(units)), np.bool_)
    for group in groups:
        for unit in group.after:
            if unit in places and unit != group.unit:
                found[places[unit], places[group.unit]] = True
    for at in range(len(units)):  # Warshall
        found |= found[:, at, None] & found[None, at]
    return np.asarray(found | np.eye(len(units), dtype=np.bool_))


def _circle(units: Sequence[str], reached: Relation, at: int) -> list[str]:
    """Units that a unit reaches and that reach it, with itself."""
    mutual = reached[at] & reached[:, at]
    return [unit for place, unit in enumerate(units) if mutual[place]]
