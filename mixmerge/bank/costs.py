"""Which executor is cheapest for a site and a decision, by what its parts cost.

The figures are of one core of a server's processor (AMD EPYC, AVX-512, float32), between what ``python
examples/bench_dynamic.py --constants`` measures when caches are warm and what the same takes inside a model. Only their
ratios matter, and those differ less than the machines do.

Legend as in ``executors``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from mixmerge.bank.picks import Picks, spans_of
from mixmerge.bank.records import Site

Executor = Literal["concat", "segmented", "gather"]
Product = Literal["compiled", "batched", "grouped", "loop"]

CALL = 2.0  # microseconds of one operation of torch
SEGMENT = 1.6  # of one expert in a grouped product
READ = 50e3  # bytes a microsecond, of factors that are multiplied
COPY = 45e3  # of factors that are gathered
MOVE = 25e3  # of inputs that are sorted
SPREAD = 15e3  # of outputs that are added where they belong
WIDE = 45e3  # multiply-adds a microsecond, of factors side by side
THIN = 24e3  # of the factors of one expert
COMPILED = 45e3  # of the compiled loop, on one core
# Of bfloat16, where the processor multiplies it: wide products gain, small ones do not.
SHORT_WIDE = 140e3
SHORT_THIN = 55e3
SHORT_ROW = 6e3  # multiply-adds a microsecond, of one token with the factors of its own
SHORT_SEGMENT = 10.0
FEW = 256  # pairs that the compiled loop takes where there are more cores
SORT = 12.0  # microseconds for a decision that no site has sorted yet


def costs(site: Site, picks: Picks, tokens: int) -> dict[Executor, float]:
    """Microseconds of each executor.

    Args:
        site: of the bank.
        picks: the decision.
        tokens: t.
    """
    rank, size, threads = max(site.ranks), site.b.element_size(), torch.get_num_threads()
    inputs, outputs = (0 if site.kind == "embedding" else site.a.shape[1]), site.b.shape[1]
    width = inputs + outputs
    spans = spans_of(site, picks)
    taken = sum(stop - start for start, stop in spans)
    short = site.b.dtype is torch.bfloat16
    wide, thin, segment = (SHORT_WIDE, SHORT_THIN, SHORT_SEGMENT) if short else (WIDE, THIN, SEGMENT)
    n, pairs = picks.units * tokens, picks.units * picks.each
    experts = len(picks.used) if picks.used is not None else _expected(picks.experts, pairs)
    read, multiplied = experts * rank * width * size / READ, pairs * tokens * rank * width
    sort = 0.0 if picks._order is not None else SORT
    concat = (
        3 * CALL + 2 * CALL * len(spans) + taken * width * size / READ + n * taken * width / (wide * threads)
    )
    segmented = 6 * CALL + sort + 2 * segment * experts + read + multiplied / (thin * threads)
    segmented += pairs * tokens * size * (inputs / MOVE + outputs / SPREAD)
    if can_compile(site, picks, tokens):
        segmented = min(segmented, 4 * CALL + sort + read + multiplied / COMPILED)
    own = pairs * rank * width * size
    gather = 6 * CALL + own / COPY + own / READ
    if tokens > 1 or short:
        gather += multiplied / ((thin if tokens > 1 else SHORT_ROW) * threads)
    if _copies_too_much(site, picks, tokens):
        gather = math.inf
    return {"concat": concat, "segmented": segmented, "gather": gather}


def cheapest(site: Site, picks: Picks, tokens: int) -> Executor:
    """The executor to take. Arguments as those of ``costs``."""
    if site.b.device.type != "cpu":
        return _by_rule(site, picks, tokens)
    found = costs(site, picks, tokens)
    return min(found, key=found.__getitem__)


def product_for(site: Site, picks: Picks, tokens: int, *, compiled: bool = True) -> Product:
    """How ``segmented`` multiplies: batched where making experts even costs less than finding where each ends.

    Args:
        site, picks, tokens: as in ``costs``.
        compiled: whether it may be the compiled loop.
    """
    if compiled and can_compile(site, picks, tokens):
        return "compiled"
    if site.even is None:
        return "loop"
    if site.b.device.type == "cpu":
        order, width = picks.order, site.b.shape[1] + (site.a.shape[1] if site.kind == "linear" else 0)
        more = len(site.ranks) * order.longest - len(order.units)
        each = tokens * width * (site.even / THIN + site.b.element_size() / MOVE)
        if more * each < 2 * SEGMENT * len(site.ranks):
            return "batched"
    return "grouped" if can_group(site) else "loop"


def can_compile(site: Site, picks: Picks, tokens: int) -> bool:
    """Whether the compiled loop takes it: float32 on a processor, tokens and outputs, nothing to learn of."""
    plain = site.kind == "linear" and site.b.dtype is torch.float32 and site.b.device.type == "cpu"
    few = torch.get_num_threads() == 1 or picks.units * picks.each <= FEW
    return plain and few and tokens == 1 and picks.how == "outputs" and not torch.is_grad_enabled()


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
    if _copies_too_much(site, picks, tokens):
        return "segmented"
    return "gather" if few or tokens > 1 else "segmented"


def _copies_too_much(site: Site, picks: Picks, tokens: int) -> bool:
    """Whether the factors that ``gather`` copies would be far larger than the bank's and the inputs."""
    return picks.units * picks.each * max(site.ranks) > 2 * max(site.rank, picks.units * tokens)
