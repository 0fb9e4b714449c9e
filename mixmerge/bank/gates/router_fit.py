"""Training of the router: rows of each expert to a network that tells whose they are. Never sees what it is tested on.

Legend: N rows, E experts, f numbers in a feature.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixmerge.bank.features import features_of
from mixmerge.bank.fitting_job import Job
from mixmerge.bank.gates.router import Router, RouterOptions
from mixmerge.bank.gates.router_task import Lessons, balance, fit_task
from mixmerge.bank.own_heads import Headed
from mixmerge.errors import Fault, MixmergeError

# Temperatures tried on the rows held out.
_COLDEST, _HOTTEST, _TRIED = 0.05, 20.0, 241
_SMALLEST = 1e-6  # a feature that does not vary says nothing, and is not blown up

TOKENS = 16  # of each row, for a gate of tokens

Told = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Trained:
    """What training found, for the manifest.

    Args:
        rows, held_out: how many were trained on, and how many were not.
        epoch: whose network was kept, from 1.
        loss: on the rows held out, at that epoch and with the temperature; None where none was held out.
        accuracy: share of the rows held out whose expert is the likeliest; None where none was held out.
        confusion: held-out rows by their expert (outer) and the likeliest one.
        temperature: what logits are divided by.
    """

    rows: int
    held_out: int
    epoch: int
    loss: float | None
    accuracy: float | None
    confusion: tuple[tuple[int, ...], ...]
    temperature: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def router(kind: type[Router], options: RouterOptions, job: Job) -> Router:
    """What ``fitting.fit_gate`` fits a router by: the rows of each expert, as the base or a text encoder sees them."""
    rows = [(row, expert) for expert, name in enumerate(job.bank.experts) for row in job.rows[name]]
    shown = [row for row, _ in rows]
    if options.features == "text":
        texts = [row.text or row.prompt or "\n".join(content for _, content in row.messages) for row in shown]
        values, owners = job.encoded(texts), tuple(range(len(rows)))
    else:
        tokens = TOKENS if options.per_token else 0
        found = features_of(job.base, shown, tokens=tokens, layers=options.features == "layers")
        values, owners = found.values, found.rows
    labels, keys = torch.tensor([rows[at][1] for at in owners]), [rows[at][0].digest for at in owners]
    made, _ = fit_router(
        values,
        labels,
        keys,
        options,
        experts=len(job.bank.experts),
        seed=job.seed,
        progress=lambda done, total, loss: job.progress("router", done, total, loss),
    )
    if options.task is not None:
        held = held_out(keys, labels, share=options.holdout, seed=job.seed, experts=made.experts)
        lessons = Lessons([rows[at][0] for at in owners], labels.tolist(), values, held)
        fit_task(
            made, job.bank, Headed(job.base), lessons, options.task, seed=job.seed,
            progress=lambda done, total, loss: job.progress("router, by task", done, total, loss),
        )  # fmt: skip
    return made


def fit_router(
    features: Tensor,
    labels: Tensor,
    keys: Sequence[str],
    options: RouterOptions,
    *,
    experts: int,
    seed: int = 0,
    encoder: str = "",
    progress: Told | None = None,
) -> tuple[Router, Trained]:
    """Train a router on labelled features.

    Source: Twin-Merging, arXiv:2406.15479, and its released code: cross-entropy on the experts' ids, AdamW. Departures:
    experts with few rows count as much as those with many; the epoch is chosen by rows held out of the calibration
    rows, never by test rows; features are standardised; a temperature is fitted.

    Args:
        features: ``(N, f)``, of rows or of single tokens.
        labels: ``(N,)``, whose each is: 0 to E - 1.
        keys: N names of the rows they are of: what has one key is held out together, however often it comes. The order
            of the rows does not matter.
        options: of the network and its training.
        experts: E.
        seed: of the network, the order of rows, dropout, and which rows are held out.
        encoder: which model gave the features, for ``text``.
        progress: called with (epochs done, epochs in all, loss) after every epoch.

    Raises:
        MixmergeError: features that are not finite; an expert without rows.
    """
    _check(features, labels, experts)
    order = sorted(range(len(keys)), key=lambda row: (keys[row], int(labels[row]), row))
    x, y = features.detach()[order].float(), labels[order].long()
    held = held_out([keys[row] for row in order], y, share=options.holdout, seed=seed, experts=experts)
    with _alone(seed):
        gate = Router(experts, int(x.shape[1]), options, encoder=encoder)
        kept = x[~held]
        gate.mean.copy_(kept.mean(0))
        gate.deviation.copy_(kept.std(0, correction=0).clamp_min(_SMALLEST))
        epoch = _learn(gate, kept, y[~held], x[held], y[held], progress)
        if options.temperature == "held_out" and held.any():
            gate.temperature = _temperature(gate, x[held], y[held])
    return gate, _report(gate, x[held], y[held], rows=len(kept), epoch=epoch)


def _learn(
    gate: Router,
    x: Tensor,
    y: Tensor,
    x_held: Tensor,
    y_held: Tensor,
    progress: Told | None,
) -> int:
    """Train in place; the network of the best epoch stays. Returns that epoch, from 1."""
    training = gate.said
    shares, shares_held = balance(y, gate.experts), balance(y_held, gate.experts)
    optimiser = torch.optim.AdamW(
        gate.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
    )
    best, kept, state = float("inf"), training.epochs, None
    for epoch in range(1, training.epochs + 1):
        gate.train()
        loss = torch.zeros(())
        for rows in _batches(torch.randperm(len(y)), training.batch):
            loss = cross_entropy(
                gate.logits(x[rows]), y[rows], weight=shares, label_smoothing=training.label_smoothing
            )
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        gate.eval()
        found = float(loss.detach())
        if len(y_held):
            with torch.no_grad():
                found = float(cross_entropy(gate.logits(x_held), y_held, weight=shares_held))
            if found < best:
                best, kept, state = found, epoch, copy.deepcopy(gate.state_dict())
        if progress is not None:
            progress(epoch, training.epochs, found)
    if state is not None:
        gate.load_state_dict(state)
    gate.requires_grad_(False)
    return kept


def _batches(order: Tensor, size: int) -> list[Tensor]:
    """Rows of each step; a last one of a single row joins the step before, for it has no variance."""
    parts = list(torch.split(order, size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _temperature(gate: Router, x: Tensor, y: Tensor) -> float:
    """The likeliest one if each expert had one row more, of which nothing is known: no row is ever certain.

    Source: the targets of Platt, Probabilistic Outputs for Support Vector Machines, 1999, section 2.2, which keep rows
    that are all told apart from making the weights as sharp as can be.
    """
    doubt = gate.experts / (len(y) + 2 * gate.experts)
    with torch.no_grad():
        logits = gate.logits(x)
        tried = torch.logspace(
            torch.log10(torch.tensor(_COLDEST)).item(), torch.log10(torch.tensor(_HOTTEST)).item(), _TRIED
        )
        shares = balance(y, gate.experts)
        losses = torch.stack(
            [cross_entropy(logits / one, y, weight=shares, label_smoothing=doubt) for one in tried]
        )
    return float(tried[losses.argmin()])


def _report(gate: Router, x: Tensor, y: Tensor, *, rows: int, epoch: int) -> Trained:
    if not len(y):
        return Trained(rows, 0, epoch, None, None, (), gate.temperature)
    with torch.no_grad():
        logits = gate.logits(x)
    chosen = logits.argmax(-1)
    counts = torch.zeros(gate.experts, gate.experts, dtype=torch.int64)
    counts.index_put_((y, chosen), torch.ones_like(y), accumulate=True)
    return Trained(
        rows,
        len(y),
        epoch,
        float(cross_entropy(logits / gate.temperature, y, weight=balance(y, gate.experts))),
        float((chosen == y).float().mean()),
        tuple(tuple(row) for row in counts.tolist()),
        gate.temperature,
    )


def held_out(keys: Sequence[str], labels: Tensor, *, share: float, seed: int, experts: int) -> Tensor:
    """``(N,)``: which rows are not trained on, by a hash of their key; none where an expert would have none left."""
    chosen = torch.tensor([_drawn(key, seed) < share * 2**32 for key in keys])
    left = torch.bincount(labels[~chosen], minlength=experts)
    return chosen if bool((left > 0).all()) else torch.zeros(len(keys), dtype=torch.bool)


def _drawn(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"router:{seed}:{key}".encode()).digest()[:4], "big")


def _check(features: Tensor, labels: Tensor, experts: int) -> None:
    faults = []
    if not features.isfinite().all():
        faults.append(Fault("gate", "features of some rows hold NaN or Inf", run="Check the shared model"))
    counts = torch.bincount(labels.long(), minlength=experts)
    faults += [
        Fault("gate", f"expert {expert} has no rows to learn from", run="Give every expert rows of its own")
        for expert in range(experts)
        if not int(counts[expert])
    ]
    if faults:
        raise MixmergeError(faults)


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """torch with this seed and one thread, so that the same rows give the same bytes; its state is put back after."""
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(before)
