"""Parts of a table that share no query, near duplicates included: what is fitted on is not what is tested on.

Q queries, P parts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.outcomes.similar import SIMILARITY, Ints, groups, text_key
from mixmerge.outcomes.table import OutcomeTable


def split(
    table: OutcomeTable,
    *,
    shares: Sequence[float] | None = None,
    test: float | None = None,
    seed: int = 0,
    similarity: float | None = SIMILARITY,
    by: str = "task",
    labels: Ints | None = None,
) -> list[Ints]:
    """Indices of each part, rising.

    Groups of queries that are the same or near stay whole, so parts are as large as they can be made, not exact. Each
    value of the column ``by`` is divided alike. Which group goes where follows from the seed and the texts: the order
    of rows changes nothing.

    Args:
        shares: of the parts, each more than 0, of any sum.
        test: instead, the share of the second of two parts, in (0, 1).
        seed: of the choice.
        similarity: from which queries are near, in (0, 1]; None keeps only the same texts together.
        by: a column of metadata; without it, or "" in it, queries are of one kind.
        labels: ``(Q,)`` groups, if they are known already (``mixmerge.outcomes.similar.groups``): for many seeds.

    Raises:
        MixmergeError: shares that are none, fewer groups than parts.
    """
    wanted = _shares(shares, test)
    if labels is None:
        labels = groups(table.queries, similarity=similarity)
    if len(labels) != len(table):
        raise MixmergeError(
            Fault("labels", f"has {len(labels)} entries", f"One for each of {len(table)} queries")
        )
    if len(set(labels.tolist())) < len(wanted):
        raise MixmergeError(
            Fault(
                "shares",
                f"makes {len(wanted)} parts",
                f"The table has {len(set(labels.tolist()))} groups of queries that are not the same or near",
            )
        )
    part = _assigned(table, labels, wanted / wanted.sum(), seed, by)
    return [np.flatnonzero(part == p).astype(np.int64) for p in range(len(wanted))]


def folds(
    table: OutcomeTable,
    k: int = 5,
    *,
    seed: int = 0,
    similarity: float | None = SIMILARITY,
    by: str = "task",
    labels: Ints | None = None,
) -> list[Ints]:
    """Indices of the queries that are tested in each of ``k`` folds; as ``split`` into equal parts.

    Raises:
        MixmergeError: k below 2, fewer groups than folds.
    """
    if k < 2:
        raise MixmergeError(Fault("k", f"is {k}", "2 folds or more"))
    return split(table, shares=[1.0] * k, seed=seed, similarity=similarity, by=by, labels=labels)


def _shares(shares: Sequence[float] | None, test: float | None) -> NDArray[np.float64]:
    if (shares is None) == (test is None):
        raise MixmergeError(
            Fault("shares", "or test: exactly one is needed", "shares=(0.8, 0.2) or test=0.2")
        )
    if test is not None and not 0 < test < 1:
        raise MixmergeError(Fault("test", f"is {test}", "More than 0, less than 1"))
    wanted = np.array([1.0 - test, test] if test is not None else shares, np.float64)
    if len(wanted) < 2 or not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise MixmergeError(Fault("shares", f"are {wanted.tolist()}", "Two or more, each more than 0"))
    return wanted


def _assigned(
    table: OutcomeTable, labels: Ints, shares: NDArray[np.float64], seed: int, by: str
) -> NDArray[np.int64]:
    """``(Q,)`` the part of each query.

    Groups go one by one, large ones first and else in an order drawn from the seed, to the part that lacks most of its
    share of their kind, relative to it; where parts lack the same, of its share of all. Parts that a group would fill
    beyond their share by more than half of itself are passed over while another is not, and none stays empty.
    """
    keys = [text_key(text) for text in table.queries]
    column = table.column(by) or ("",) * len(table)
    members: dict[int, list[int]] = {}
    for i, label in enumerate(labels.tolist()):
        members.setdefault(label, []).append(i)
    order = []
    for rows in members.values():
        kind = min(Counter(column[i] for i in rows).items(), key=lambda item: (-item[1], item[0]))[0]
        drawn = hashlib.sha256(f"{seed}\n{min(keys[i] for i in rows)}".encode()).hexdigest()
        order.append((kind, -len(rows), drawn, rows))
    part = np.zeros(len(table), np.int64)
    sizes = Counter({kind: 0 for kind, *_ in order})
    for kind, minus, _, _ in order:
        sizes[kind] -= minus
    filled = {kind: np.zeros(len(shares)) for kind in sizes}
    total = np.zeros(len(shares))
    order.sort(key=lambda one: one[1:3])
    for done, (kind, _, _, rows) in enumerate(order):
        room = shares * len(table) - total
        lacking = 1.0 - filled[kind] / (shares * sizes[kind])
        if (total == 0).sum() >= len(order) - done:
            fits = total == 0
        else:
            fits = room >= min(len(rows) / 2, room.max())
        lacking = np.where(fits, lacking, -np.inf)
        most = np.flatnonzero(lacking >= lacking.max() - 1e-9)
        to = int(most[np.argmax((room / shares)[most])])
        part[rows] = to
        filled[kind][to] += len(rows)
        total[to] += len(rows)
    return part
