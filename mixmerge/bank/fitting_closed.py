"""Gates that are computed from the experts alone, or are given.

Legend as in ``gate``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixmerge.bank.fitting_job import Job
from mixmerge.bank.gates.arrow import ArrowGate, ArrowOptions
from mixmerge.bank.gates.mean import MeanGate
from mixmerge.bank.gates.places import Options, PerSite, Places, SiteGate, SiteOptions
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.gates.smile import SmileGate, SmileOptions
from mixmerge.bank.records import Entry
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices


def right_vectors(entry: Entry, count: int) -> Tensor:
    """The first right singular vectors of ``scale * b.T @ a``, from its factors.

    Args:
        entry: of a linear site, r 1 or more.
        count: n, 1 or more.

    Returns:
        ``(n, d)``, rows of 0 beyond the rank; each of a sign that depends on nothing but the change: its largest entry
        is above 0.
    """
    a, b = entry.a.double().cpu(), entry.b.double().cpu()
    scale = torch.as_tensor(entry.scale).double().cpu().expand(entry.rank)
    inner_q, inner_r = torch.linalg.qr(a.T)  # (d, r), (r, r)
    _, outer_r = torch.linalg.qr(b.T)
    _, values, right = torch.linalg.svd((outer_r * scale) @ inner_r.T)
    rank = int((values > values[0] * 1e-12).sum()) if float(values[0]) > 0 else 0
    found = (right[:rank] @ inner_q.T)[:count]  # (up to n, d)
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))
    made = torch.zeros(count, a.shape[1], dtype=torch.float64)
    made[: len(found)] = found * largest.sign()
    return made.float()


def arrow(kind: type[ArrowGate], options: ArrowOptions, job: Job) -> ArrowGate:
    """The first right singular vector of every change."""
    gate = kind(Places.of(job.bank), options)
    _directions(gate, job, 1)
    return gate


def smile(kind: type[SmileGate], options: SmileOptions, job: Job) -> SmileGate:
    """The first right singular vectors of every change."""
    gate = kind(Places.of(job.bank), options)
    _directions(gate, job, options.gate_k)
    return gate


def mean(kind: type[MeanGate], options: Options, job: Job) -> MeanGate:
    """For as many experts as there are."""
    return kind(len(job.bank.experts))


def given_ranks(kind: type[SiteGate[SiteOptions]], options: SiteOptions, job: Job) -> SiteGate[SiteOptions]:
    """A gate of ranks with the tensors of a router trained elsewhere.

    Raises:
        MixmergeError: tensors that it has no place for, of another shape, or not finite; sites without a router.
    """
    gate = kind(Places.of(job.bank), options)
    holders = {name: one for name, one in gate.named_children() if isinstance(one, PerSite) and one.saved}
    slots = {f"{site}.{name}": holder[site] for name, holder in holders.items() for site in holder}
    faults = []
    for name, tensor in job.given.items():
        at = f"{job.where}: {name}"
        if name not in slots:
            faults.append(Fault(at, "there is no such place", choices(name, list(slots)[:12])))
        elif tensor.shape != slots[name].shape:
            what = f"is {tuple(tensor.shape)}, and the bank needs {tuple(slots[name].shape)}"
            faults.append(Fault(at, what, "The router of this bank's adapter"))
        elif not tensor.isfinite().all():
            faults.append(Fault(at, "is not finite"))
    lacking = [name for name in slots if name.endswith(".router") and name not in job.given]
    if lacking and job.given:
        faults.append(Fault(job.where, f"{len(lacking)} sites have no router, {lacking[0]} for one"))
    if faults:
        raise MixmergeError(faults)
    for name, tensor in job.given.items():
        slots[name].copy_(tensor)
    return gate


def _directions(gate: PrototypeGate, job: Job, count: int) -> None:  # type: ignore[type-arg]
    with torch.no_grad():
        for done, site in enumerate(gate.places.widths, 1):
            for expert, rank in enumerate(gate.places.ranks[site]):
                if rank:
                    vectors = right_vectors(job.bank.sites[site].entry(expert), count)
                    place = gate.prototypes[site][expert]
                    place.copy_(vectors.view_as(place))
            job.progress(gate.kind, done, len(gate.places.widths), None)
