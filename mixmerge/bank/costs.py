"""Which executor is cheapest for a site and a decision, by what its parts cost.

The figures are of one core of a server's processor (AMD EPYC, AVX-512, float32): ``python examples/bench_dynamic.py
--constants`` measures them anew. Only their ratios matter, and those differ less than the machines do.

Legend as in ``executors``.
"""

from __future__ import annotations

from typing import Literal

import torch

from mixmerge.bank.picks import Picks, spans_of
from mixmerge.bank.records import Site

Executor = Literal["concat", "segmented", "gather"]
Product = Literal["batched", "grouped", "loop"]

CALL = 3.0  # microseconds of one operation of torch
SEGMENT = 1.6  # of one expert in a grouped product
READ = 60e3  # bytes a microsecond, of factors that are multiplied
COPY = 45e3  # of factors that are gathered
MOVE = 16e3  # of inputs that are sorted
SPREAD = 8e3  # of outputs that are added where they belong
WIDE = 45e3  # multiply-adds a microsecond, of factors side by side
THIN = 24e3  # of the factors of one expert
SORT = 15.0  # microseconds for a decision that no site has sorted yet


def costs(site: Site, picks: Picks, tokens: int) -> dict[Executor, float]:
    """Microseconds of each executor.

    Args:
        site: of the bank.
        picks: the decision.
        tokens: t.
    """
    rank, size = max(site.ranks), site.b.element_size()
    inputs, outputs = (0 if site.kind == "embedding" else site.a.shape[1]), site.b.shape[1]
    width = inputs + outputs
    spans = spans_of(site, picks)
    taken = sum(stop - start for start, stop in spans)
    n, pairs = picks.units * tokens, picks.units * picks.each
    experts = len(picks.used) if picks.used is not None else _expected(picks.experts, pairs)
    concat = 3 * CALL + 2 * CALL * len(spans) + taken * width * size / READ + n * taken * width / WIDE
    products = pairs * tokens * rank * width / THIN
    segmented = (
        6 * CALL
        + (0.0 if picks._order is not None else SORT)
        + 2 * SEGMENT * experts
        + experts * rank * width * size / READ
        + products
        + pairs * tokens * size * (inputs / MOVE + outputs / SPREAD)
    )
    own = pairs * rank * width * size
    gather = 6 * CALL + own / COPY + own / READ + (products if tokens > 1 else 0.0)
    return {"concat": concat, "segmented": segmented, "gather": gather}


def cheapest(site: Site, picks: Picks, tokens: int) -> Executor:
    """The executor to take. Arguments as those of ``costs``."""
    if site.b.device.type != "cpu":
        return _by_rule(site, picks, tokens)
    found = costs(site, picks, tokens)
    return min(found, key=found.__getitem__)


def product_for(site: Site, picks: Picks, tokens: int) -> Product:
    """How ``segmented`` multiplies: batched where making experts even costs less than finding where each ends."""
    if site.even is None:
        return "loop"
    if site.b.device.type == "cpu":
        order, width = picks.order, site.b.shape[1] + (site.a.shape[1] if site.kind == "linear" else 0)
        more = len(site.ranks) * order.longest - len(order.units)
        each = tokens * width * (site.even / THIN + site.b.element_size() / MOVE)
        if more * each < 2 * SEGMENT * len(site.ranks):
            return "batched"
    return "grouped" if can_group(site) else "loop"


def can_group(site: Site) -> bool:
    """Whether torch's grouped product takes the site's factors: equal ranks, its types, rows of whole 16 bytes."""
    if site.even is None or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    size = site.b.element_size()
    widths = (site.even, site.b.shape[1], site.a.shape[1] if site.kind == "linear" else 0)
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return site.b.dtype in kinds and all(width * size % 16 == 0 for width in widths)


def _expected(experts: int, pairs: int) -> float:
    """How many experts have some pair, of pairs drawn evenly."""
    return experts * (1 - (1 - 1 / experts) ** pairs)


def _by_rule(site: Site, picks: Picks, tokens: int) -> Executor:
    """Of other devices, where nothing was measured: calls cost more than arithmetic does."""
    width = site.a.shape[-1] if site.kind == "linear" else site.b.shape[1]
    few = picks.units * tokens <= 64
    if picks.by == "rank" or picks.how == "factors" or site.rank <= (width // 2 if few else width // 8):
        return "concat"
    return "gather" if few or tokens > 1 else "segmented"
