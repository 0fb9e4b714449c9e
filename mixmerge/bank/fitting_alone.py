"""Gates of which each expert's part is fitted on its own rows, without the others.

Legend as in ``gate``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mixmerge.bank.fitting_job import Job, only
from mixmerge.bank.fitting_steps import drawn_batches, learning, masked_run, row_batches, train
from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.gates.average_activation import AverageActivationGate, AverageActivationOptions
from mixmerge.bank.gates.choosing import standardised
from mixmerge.bank.gates.glider import GliderGate, GliderOptions
from mixmerge.bank.gates.phatgoose import PhatgooseGate, PhatgooseOptions
from mixmerge.bank.gates.places import PerSite, Places, SiteGate, SiteOptions
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank
from mixmerge.data.rows import Row


class _Opening(SiteGate[SiteOptions]):
    """``sigmoid(v . u)`` of one expert at each site: how PHATGOOSE's vectors are trained."""

    kind = "phatgoose"

    def __init__(self, places: Places) -> None:
        super().__init__(places, SiteOptions())
        self.v = PerSite({site: torch.zeros(width) for site, width in places.widths.items()}, learned=True)

    def decide(self, site: str, u: Tensor, run: Run) -> Mix:
        return Mix(torch.sigmoid(u.float() @ self.v[site])[..., None])


class _Listening(Gate):
    """One expert at work; adds up the inputs of every linear site over real tokens, in float64."""

    kind = "average_activation"

    def __init__(self, places: Places, device: torch.device) -> None:
        super().__init__()
        self.places = places
        self.sums = {
            site: torch.zeros(width, dtype=torch.float64, device=device)
            for site, width in places.widths.items()
        }
        self.tokens = dict.fromkeys(self.sums, 0)

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        if site in self.sums and run.mask is not None:
            real = run.mask.flatten()
            seen = u.flatten(0, -2)  # (B * T, d); (B, d) of a pooler
            self.sums[site] += (seen[real] if len(seen) == len(real) else seen).double().sum(0)
            self.tokens[site] += int(real.sum()) if len(seen) == len(real) else len(seen)
        return Mix(torch.ones(len(u), 1, device=u.device))


def opening_vectors(job: Job, expert: int, options: PhatgooseOptions) -> dict[str, Tensor]:
    """``v_e`` of each site of one expert: ``y = W u + sigmoid(v . u) s B A u``, v from 0, all else frozen."""
    name, alone = job.bank.experts[expert], only(job.bank, expert)
    gate = _Opening(Places.of(alone)).to(job.base.model.device)
    with learning(job.base, alone, gate) as attached:
        drawn = drawn_batches(job.rows[name], job.base, options, seed=job.seed)
        batches = (batch for batch, _ in drawn)

        def say(done: int, total: int, loss: float) -> None:
            job.progress(name, done, total, loss)

        train(attached, job.base, batches, options, say=say)
    return {site: gate.v[site].detach().cpu() for site in gate.v}


def phatgoose(kind: type[PhatgooseGate], options: PhatgooseOptions, job: Job) -> PhatgooseGate:
    """Train ``v_e`` of every expert, one after the other."""
    parts = []
    for expert in range(len(job.bank.experts)):
        part = kind(Places.of(only(job.bank, expert)), options)
        _fill(part.prototypes, opening_vectors(job, expert, options))
        parts.append(part)
    return kind.joined(Places.of(job.bank), parts)


def glider(kind: type[GliderGate], options: GliderOptions, job: Job) -> GliderGate:
    """PHATGOOSE's vectors, and features of what each expert is for."""
    parts = []
    for expert, name in enumerate(job.bank.experts):
        texts = (
            [options.descriptions[name]] if name in options.descriptions else _shown(job.rows[name], options)
        )
        purpose = torch.nn.functional.normalize(job.encoded(texts), dim=-1).mean(0, keepdim=True)  # (1, f)
        part = kind(Places.of(only(job.bank, expert)), options, purpose.shape[1])
        _fill(part.prototypes, opening_vectors(job, expert, options))
        part.purposes.copy_(purpose)
        parts.append(part)
    return kind.joined(Places.of(job.bank), parts)


def average_activation(
    kind: type[AverageActivationGate], options: AverageActivationOptions, job: Job
) -> AverageActivationGate:
    """One pass over rows of every expert, with it alone on."""
    parts = []
    for expert in range(len(job.bank.experts)):
        alone = only(job.bank, expert)
        part = kind(Places.of(alone), options)
        means = _means(job, alone, options)
        with torch.no_grad():
            for site, mean in means.items():
                part.prototypes[site].copy_(mean)
        parts.append(part)
    return kind.joined(Places.of(job.bank), parts)


def _means(job: Job, alone: Bank, options: AverageActivationOptions) -> dict[str, Tensor]:
    (name,) = alone.experts
    rows = job.rows[name][: options.samples]
    batches = row_batches(rows, job.base, batch_size=options.batch_size, max_tokens=options.max_tokens)
    gate = _Listening(Places.of(alone), job.base.model.device)
    with learning(job.base, alone, gate) as attached, torch.no_grad():
        for done, batch in enumerate(batches, 1):
            with attached.running(masked_run(attached, batch)):
                job.base.model(**batch.inputs())
            job.progress(name, done, len(batches), None)
    return {site: (total / max(1, gate.tokens[site])).float().cpu() for site, total in gate.sums.items()}


def _fill(prototypes: PerSite, vectors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for site, vector in vectors.items():
            prototypes[site].copy_(standardised(vector[None]))


def _shown(rows: Sequence[Row], options: GliderOptions) -> list[str]:
    """What a router would see of the first rows: no answers."""
    return [
        row.prompt or row.text or "\n".join(content for _, content in row.messages)
        for row in rows[: options.samples]
    ]
