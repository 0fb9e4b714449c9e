"""Changes of matrices as factors: truncated by rank or energy, and how a number of parameters is shared out.

Legend: a linear map's delta is ``(o, d)``, a table's ``(V, o)``; k the smaller side, r ranks that are kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mixmerge.bank.leading import leading
from mixmerge.bank.records import Entry, Kind
from mixmerge.errors import Fault, MixmergeError

# Singular values below this share of the largest are float32's rounding, not directions.
_NOISE = 1e-7
_BLOCK = 1 << 22  # entries that are taken to float64 at a time


def low_rank(
    delta: Tensor | Entry,
    *,
    rank: int | None = None,
    energy: float | None = None,
    kind: Kind = "linear",
    tied: bool = False,
    where: str = "delta",
) -> Entry:
    """The best approximation of a change at some rank: its truncated singular value decomposition.

    The ``a`` of a linear map are its right singular vectors, ``b`` the left ones, ``scale`` the singular values,
    largest first. Of a table, ``a`` are the left ones. Of each pair, the largest entry of the right is positive.

    Where few ranks of a large matrix are wanted they are found without the others (``leading``); the error is then
    within 1 % of the least there is.

    Source: Eckart and Young, 1936; Lu et al., Twin-Merging, arXiv:2406.15479, section 3.2 (a rank for every matrix).

    Args:
        delta: ``(o, d)``; of a table ``(V, o)``. An ``Entry`` is never multiplied out: QR of its factors, and the
            decomposition of the small core between them.
        rank: at most so many, 1 or more.
        energy: over 0 to 1: as few as hold this share of the sum of squared singular values. With ``rank`` too, the
            fewer of both; with neither, all that are no rounding (below 1e-7 of the largest).
        kind, tied: of the entry; ignored where ``delta`` is one.
        where: for errors.

    Returns:
        an entry in float32; of rank 0 if nothing changes.

    Raises:
        MixmergeError: rank or energy out of range; a value that is not finite.
    """
    check_size(rank, energy, where)
    if isinstance(delta, Entry):
        kind, tied = delta.kind, delta.tied
        left, values, right = _of_product(delta, where)
        total = None
    else:
        left, values, right, total = _of_matrix(delta, where, count=rank)
    kept = _kept(values, rank, energy, total)
    left, values, right = left[:, :kept], values[:kept], right[:, :kept]
    if kept:
        signs = right.gather(0, right.abs().argmax(0, keepdim=True)).sign()  # (1, r)
        left, right = left * signs, right * signs
    a, b = (left, right.T) if kind == "embedding" else (right.T, left.T)
    return Entry(a.float().contiguous(), b.float().contiguous(), values.float(), kind, tied)


def spectrum(delta: Tensor | Entry, *, where: str = "delta") -> Tensor:
    """All singular values that are no rounding, largest first, in float64.

    Raises:
        MixmergeError: a value that is not finite.
    """
    return _of_product(delta, where)[1] if isinstance(delta, Entry) else _of_matrix(delta, where)[1]


def allocate(
    spectra: Mapping[str, Sequence[Tensor]],
    shapes: Mapping[str, tuple[int, int]],
    *,
    budget: int,
    by_expert: bool = False,
) -> dict[str, list[int]]:
    """The ranks that keep most energy for a number of parameters.

    Each rank of each expert at each site has a gain, its squared singular value, and a price, the sum of the site's
    sides; the best gains for their price are bought until no more fit. Of equal ones the first by site, then by
    expert, is taken.

    Args:
        spectra: site -> singular values of every expert there, largest first.
        shapes: site -> its two sides.
        budget: numbers in all factors, 1 or more.
        by_expert: a gain is a share of all energy of that expert, so that none goes short for having moved less.

    Returns:
        site -> a rank for every expert; 0 where none was bought.

    Raises:
        MixmergeError: the budget is not a number of at least 1.
    """
    if budget < 1:
        raise MixmergeError(Fault("budget", f"is {budget}", "A number of parameters of at least 1"))
    names = sorted(spectra)
    ranks = {name: [0] * len(spectra[name]) for name in spectra}
    totals = _totals(spectra) if by_expert else None
    gains, owners = [], []
    for number, name in enumerate(names):
        price = sum(shapes[name])
        for expert, values in enumerate(spectra[name]):
            gain = values.double().square() / (price if totals is None else price * totals[expert])
            gains.append(gain)
            owners.append(torch.tensor([number, expert]).expand(len(gain), 2))
    if not gains:
        return ranks
    gain, owner = torch.cat(gains), torch.cat(owners)
    least = min(sum(shapes[name]) for name in names)
    for number, expert in owner[torch.argsort(gain, descending=True, stable=True)].tolist():
        price = sum(shapes[names[number]])
        if price <= budget:
            ranks[names[number]][expert] += 1
            budget -= price
        if budget < least:
            break
    return ranks


def check_size(rank: int | None, energy: float | None, where: str) -> None:
    """Raise unless rank and energy, where given, are in their ranges.

    Raises:
        MixmergeError: both faults at once.
    """
    faults = []
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        faults.append(Fault(where, f"rank is {rank!r}", "A whole number of at least 1"))
    if energy is not None and not 0 < energy <= 1:
        faults.append(Fault(where, f"energy is {energy!r}", "A share over 0, up to 1"))
    if faults:
        raise MixmergeError(faults)


def scaled(entry: Entry, factor: float | Tensor = 1.0) -> Entry:
    """The same change times a factor, its scale in float32 and ``(r,)``."""
    scale = torch.as_tensor(entry.scale, dtype=torch.float32).expand(entry.rank)
    return replace(entry, scale=(scale * factor).contiguous())


def _totals(spectra: Mapping[str, Sequence[Tensor]]) -> list[float]:
    count = max(map(len, spectra.values()), default=0)
    sums = [
        math.fsum(float(values[expert].double().square().sum()) for values in spectra.values())
        for expert in range(count)
    ]
    return [total or 1.0 for total in sums]


def _kept(values: Tensor, rank: int | None, energy: float | None, total: float | None) -> int:
    kept = len(values)
    if energy is not None and energy < 1 and kept:
        held = values.square().cumsum(0)
        whole = float(held[-1]) if total is None else total
        kept = min(kept, 1 + int((held < whole * (energy - 1e-12)).sum()))
    return kept if rank is None else min(kept, rank)


def _of_matrix(
    delta: Tensor, where: str, *, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor, float | None]:
    """``(m, k)``, ``(k,)``, ``(n, k)`` by the smaller Gram matrix in float64, which is of float32 values as accurate.

    Its eigenvectors are orthonormal to float64, so what is kept of a delta is its projection on them, to float32. Where
    ``count`` of them are enough, maybe just those, and the energy of all.
    """
    delta = delta.detach()
    _refuse_infinite(delta, where)
    turned = delta.shape[0] > delta.shape[1]
    thin = delta.T if turned else delta  # (k, n)
    found = None if count is None else leading(thin, count)
    if found is not None:
        near, values, far, total = found
        kept = _directions(values)
        near, values, far = near[:, :kept].float(), values[:kept], far[:, :kept].float()
        return (far, values, near, total) if turned else (near, values, far, total)
    gram = torch.zeros(len(thin), len(thin), dtype=torch.float64)
    step = max(1, _BLOCK // max(1, len(thin)))
    for start in range(0, thin.shape[1], step):
        part = thin[:, start : start + step].double()
        gram.addmm_(part, part.T)
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp_min(0).sqrt()
    shown = _directions(values)
    near = vectors.flip(1)[:, :shown]  # (k, r)
    far = (thin.T.float() @ near.float()) / values[:shown].float()  # (n, r)
    near = near.float()
    return (far, values[:shown], near, None) if turned else (near, values[:shown], far, None)


def _of_product(entry: Entry, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_of_matrix``, of factors: QR of both, and the singular values of the ``(r, r)`` between them."""
    for part in (entry.a, entry.b, torch.as_tensor(entry.scale)):
        _refuse_infinite(part, where)
    a, b = entry.a.detach().double(), scaled(entry).scale.double()[:, None] * entry.b.detach().double()  # type: ignore[union-attr]
    left, right = (a, b.T) if entry.kind == "embedding" else (b.T, a.T)  # (m, r), (n, r)
    if not entry.rank:
        return left, left.new_zeros(0), right
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    count = _directions(values)
    return q_left @ u[:, :count], values[:count], q_right @ v[:count].T


def _directions(values: Tensor) -> int:
    return int((values > values[0] * _NOISE).sum()) if len(values) else 0


def _refuse_infinite(value: Tensor, where: str) -> None:
    if not value.isfinite().all():
        raise MixmergeError(Fault(where, "holds NaN or Inf", run="Use an earlier checkpoint of that expert"))
