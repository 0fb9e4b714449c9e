"""Which requests share a batch. N requests."""

from __future__ import annotations

from collections.abc import Sequence


def batches(
    texts: Sequence[Sequence[int]], extra: Sequence[int], *, budget: int, rows: int = 256
) -> list[list[int]]:
    """Places of the requests, batch by batch: texts of like length together, shortest first.

    A batch costs its rows times the longest text and the largest extra in it. Texts of one length are ordered by
    their tokens, so the batches of a set of requests do not depend on their order.

    Args:
        texts: tokens, N.
        extra: what each row takes beside its text, such as the tokens it may generate, N.
        budget: tokens of a batch, 1 or more; a request above it is alone in one.
        rows: at most so many in a batch, 1 or more.
    """
    order = sorted(range(len(texts)), key=lambda at: (len(texts[at]), extra[at], texts[at]))
    return packed([len(text) for text in texts], extra, order, budget=budget, rows=rows)


def packed(
    lengths: Sequence[int], extra: Sequence[int], order: Sequence[int], *, budget: int, rows: int
) -> list[list[int]]:
    """The same, of texts that are known by their lengths and come in an order of ascending length."""
    made: list[list[int]] = []
    largest = 0
    for at in order:
        longest = lengths[at]
        larger = max(largest, extra[at])
        full = made and (len(made[-1]) == rows or (len(made[-1]) + 1) * max(1, longest + larger) > budget)
        if not made or full:
            made.append([])
            larger = extra[at]
        largest = larger
        made[-1].append(at)
    return made
