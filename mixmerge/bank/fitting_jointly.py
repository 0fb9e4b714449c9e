"""Gates that learn from rows of all experts at once.

Legend as in ``gate``; N real tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixmerge.bank.fitting_job import Job
from mixmerge.bank.fitting_steps import (
    Log,
    balance_loss,
    base_run,
    drawn_batches,
    entropy_of,
    learning,
    train,
)
from mixmerge.bank.gates.lora_mixer import LoraMixerGate, LoraMixerOptions
from mixmerge.bank.gates.places import Places
from mixmerge.bank.gates.ranks import strongest
from mixmerge.bank.gates.xlora import XLoraGate, XLoraOptions
from mixmerge.data.batches import Batch


def xlora(kind: type[XLoraGate], options: XLoraOptions, job: Job) -> XLoraGate:
    """Train the classifier on the task's loss over all rows, the base's pass first."""
    rows = [row for name in job.rows for row in job.rows[name]]
    width = int(job.base.model.config.get_text_config().hidden_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        gate = kind(Places.of(job.bank), options, width).to(job.base.model.device)
        with learning(job.base, job.bank, gate) as attached:
            drawn = drawn_batches(rows, job.base, options, seed=job.seed)
            batches = (batch for batch, _ in drawn)
            train(attached, job.base, batches, options, say=_say(job, kind.kind), prepare=base_run)
    return gate


def lora_mixer(kind: type[LoraMixerGate], options: LoraMixerOptions, job: Job) -> LoraMixerGate:
    """Train the routers on the task's loss and those of the routing, over rows of all experts."""
    pool = [(row, number) for number, name in enumerate(job.bank.experts) for row in job.rows[name]]
    owners = [number for _, number in pool]
    gate = kind(Places.of(job.bank), options).to(job.base.model.device)
    seen: list[tuple[int, ...]] = []  # of the step at hand

    def extra(log: Log, batch: Batch) -> Tensor:
        own = torch.tensor([owners[at] for at in seen[-1]], device=batch.input_ids.device)
        return routing_loss(log, batch.attention_mask.bool(), own, options, sites=gate.places)

    with learning(job.base, job.bank, gate) as attached:
        drawn = drawn_batches([row for row, _ in pool], job.base, options, seed=job.seed)

        def batches() -> Iterator[Batch]:
            for batch, rows in drawn:
                seen[:] = [rows]
                yield batch

        train(attached, job.base, batches(), options, say=_say(job, kind.kind), extra=extra)
    return gate


def routing_loss(log: Log, real: Tensor, own: Tensor, options: LoraMixerOptions, *, sites: Places) -> Tensor:
    """``balance * sum_e p_e f_e - entropy * H + domain * CE``, the mean over the sites.

    Args:
        log: the decisions of a pass, all experts' weights.
        real: ``(B, T)``, True for tokens that are no padding.
        own: ``(B,)``, whose rows they are.
        options: the three weights, and k.
        sites: those that decide.
    """
    losses = []
    wanted = own[:, None].expand_as(real)[real]  # (N,)
    for site, mix in log:
        if site not in sites.widths or mix.weights.shape[:-1].numel() != real.numel():
            continue
        weights = mix.weights.view(*real.shape, -1)[real]  # (N, E)
        share = strongest(weights, options.top_k) / min(options.top_k, sites.experts)
        loss = options.balance * balance_loss(weights, share) / sites.experts
        loss = loss - options.entropy * entropy_of(weights)
        if options.domain:
            right = weights.gather(-1, wanted[:, None]).clamp_min(1e-9).log()
            loss = loss - options.domain * right.mean()
        losses.append(loss)
    return torch.stack(losses).mean()


def _say(job: Job, what: str) -> Callable[[int, int, float], None]:
    def say(done: int, total: int, loss: float) -> None:
        job.progress(what, done, total, loss)

    return say
