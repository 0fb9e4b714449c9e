"""LoraHub's search: weights of experts by what mixtures of them make of a few rows, without gradients."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from mixmerge.bank.fitting_job import Job
from mixmerge.bank.fitting_steps import learning, row_batches, task_loss
from mixmerge.bank.gate import Run
from mixmerge.bank.gates.lorahub import LorahubGate, LorahubOptions
from mixmerge.errors import DependencyError, Fault, MixmergeError


def lorahub(kind: type[LorahubGate], options: LorahubOptions, job: Job) -> LorahubGate:
    """Ask Nevergrad's NGOpt for weights, from 0, and tell it ``loss + l1 * mean |w|``; the best it recommends are kept.

    With ``how: factors`` the loss has no gradient at 0, so that only a search without one gets away from there.

    Raises:
        DependencyError: no ``nevergrad``.
        MixmergeError: no weights with a finite loss.
    """
    optimizer = _optimizer(len(job.bank.experts), options, job.seed)
    rows = [row for name in job.rows for row in job.rows[name]][: options.samples]
    batches = row_batches(rows, job.base, batch_size=options.batch_size, max_tokens=options.max_tokens)
    # A batch counts by its answers: the mean over all tokens does not depend on how rows are batched.
    sizes = [
        len(one.rows) if job.base.kind == "classifier" else int(one.loss_mask[:, 1:].sum()) for one in batches
    ]
    if not sum(sizes):
        what = f"none of {len(rows)} rows has a token to predict within {options.max_tokens} tokens"
        raise MixmergeError(Fault(job.where, what, "Longer texts, or shorter prompts"))
    gate = kind(len(job.bank.experts), options).to(job.base.model.device)
    finite = False
    with learning(job.base, job.bank, gate) as attached, torch.no_grad():
        for done in range(1, options.budget + 1):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the optimisers that NGOpt turns to
                asked = optimizer.ask()
            gate.weights.copy_(torch.as_tensor(asked.value, dtype=torch.float32))
            with attached.running(Run()):
                losses = [
                    float(task_loss(job.base, one)) * size
                    for one, size in zip(batches, sizes, strict=True)
                    if size
                ]
            loss = sum(losses) / sum(sizes)
            finite = finite or math.isfinite(loss)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                whole = loss + options.l1 * float(gate.weights.abs().mean())
                optimizer.tell(asked, whole if math.isfinite(whole) else 1e9)
            job.progress(kind.kind, done, options.budget, loss)
        gate.weights.copy_(torch.as_tensor(optimizer.provide_recommendation().value, dtype=torch.float32))
    if not finite:
        raise MixmergeError(Fault(job.where, f"none of {options.budget} mixtures had a finite loss"))
    return gate


def _optimizer(experts: int, options: LorahubOptions, seed: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that it tries to import
            import nevergrad
    except ImportError as error:
        run = "Run: pip install 'mixmerge[search]'"
        raise DependencyError(Fault("gate lorahub", "needs nevergrad", run=run)) from error
    space = nevergrad.p.Array(init=[0.0] * experts).set_bounds(-options.bound, options.bound)
    space.random_state.seed(seed)
    return nevergrad.optimizers.registry["NGOpt"](parametrization=space, budget=options.budget, num_workers=1)
