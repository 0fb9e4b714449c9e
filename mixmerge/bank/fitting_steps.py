"""Steps of learning that all trained gates share: batches, losses, the optimiser.

Shapes: B rows, T tokens, E experts, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from mixmerge.bank.attach import Attached
from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.gates.places import TrainingOptions
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank
from mixmerge.data.batches import Batch, Task, context_of, make_batches, tokenised
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import LoadedExpert

Log = list[tuple[str, Mix]]
Extra = Callable[[Log, Batch], Tensor]
Prepare = Callable[[Attached, Batch], Run]


def task_loss(expert: LoadedExpert, batch: Batch) -> Tensor:
    """Cross-entropy of what a batch is to say, the mean over its tokens or, of a classifier, over its rows."""
    kept = {} if expert.kind == "classifier" else {"use_cache": False}
    logits: Tensor = expert.model(**batch.inputs(), **kept).logits
    if expert.kind == "classifier":
        if batch.labels is None:
            raise MixmergeError(
                Fault(expert.name, "is a classifier, and rows have no label", "A label in each row")
            )
        return torch.nn.functional.cross_entropy(logits.float(), batch.labels)
    wanted = batch.loss_mask[:, 1:]
    told: Tensor = logits[:, :-1][wanted].float()  # (tokens to predict, V)
    return torch.nn.functional.cross_entropy(told, batch.input_ids[:, 1:][wanted])


def balance_loss(weights: Tensor, chosen: Tensor) -> Tensor:
    """``E * sum_e f_e p_e``: 1 where all experts get the same, E where one gets all.

    Source: Switch Transformer (Fedus et al., 2022), section 2.2.

    Args:
        weights: ``(N, E)``; p_e is the mean of an expert's.
        chosen: ``(N, E)``, the share of a token's choices that an expert has; f_e is its mean, and no gradient flows
            through it.
    """
    return weights.shape[-1] * (chosen.detach().mean(0) * weights.mean(0)).sum()


def entropy_of(weights: Tensor) -> Tensor:
    """The mean entropy of ``(N, E)`` weights that add up to 1, in nats: 0 to log E."""
    # An expert that is not there has a weight of exactly 0, whose logarithm has no gradient.
    return -(weights * weights.clamp_min(1e-9).log()).sum(-1).mean()


def row_batches(
    rows: Sequence[Row], expert: LoadedExpert, *, batch_size: int, max_tokens: int
) -> tuple[Batch, ...]:
    """All rows once, in their order, on the model's device."""
    most = min(max_tokens, context_of(expert.model.config, expert.tokenizer))
    task: Task = "classifier" if expert.kind == "classifier" else "causal"
    made = make_batches(rows, expert.tokenizer, task=task, max_tokens=most, batch_size=batch_size)
    return tuple(batch.to(str(expert.model.device)) for batch in made)


def drawn_batches(
    rows: Sequence[Row], expert: LoadedExpert, options: TrainingOptions, *, seed: int
) -> Iterator[tuple[Batch, tuple[int, ...]]]:
    """Batches without end, and of each row in one its index in ``rows``. Every epoch has an order of its own.

    Raises:
        MixmergeError: no row has something to learn from.
    """
    draw = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(rows), generator=draw).tolist()[: options.steps * options.batch_size]
    task: Task = "classifier" if expert.kind == "classifier" else "causal"
    most = min(options.max_tokens, context_of(expert.model.config, expert.tokenizer))
    lines = tokenised([rows[at] for at in first], expert.tokenizer, task=task, max_tokens=most)
    usable = [first[line.row] for line in lines if task == "classifier" or line.answer_from < len(line.ids)]
    if not usable:
        what = f"none of {len(first)} rows has a token to predict within {most} tokens"
        raise MixmergeError(Fault(expert.name, what, "Longer texts, or shorter prompts"))
    waiting: list[int] = []
    while True:
        while len(waiting) < options.batch_size:
            waiting += [usable[at] for at in torch.randperm(len(usable), generator=draw).tolist()]
        taken, waiting = waiting[: options.batch_size], waiting[options.batch_size :]
        (batch,) = row_batches(
            [rows[at] for at in taken], expert, batch_size=options.batch_size, max_tokens=most
        )
        yield batch, tuple(taken[at] for at in batch.rows)


@contextmanager
def learning(expert: LoadedExpert, bank: Bank, gate: Gate) -> Iterator[Attached]:
    """A bank and a gate on a model that is frozen meanwhile and in evaluation mode; all is as before afterwards."""
    wanted = [one for one in expert.model.parameters() if one.requires_grad]
    training = expert.model.training
    attached = Attached(expert.model.eval().requires_grad_(False), bank, gate)
    try:
        yield attached
    finally:
        attached.detach()
        expert.model.train(training)
        for one in wanted:
            one.requires_grad_(True)


def masked_run(attached: Attached, batch: Batch) -> Run:
    """A run for gates that need no more than the inputs."""
    return Run(mask=batch.attention_mask.bool())


def base_run(attached: Attached, batch: Batch) -> Run:
    """A run with the base's last hidden states."""
    with torch.no_grad(), attached.running(None):
        trunk = cast(torch.nn.Module, attached.model.base_model)
        hidden = trunk(**batch.inputs()).last_hidden_state
    return Run(hidden=hidden, mask=batch.attention_mask.bool())


def train(
    attached: Attached,
    expert: LoadedExpert,
    batches: Iterator[Batch],
    options: TrainingOptions,
    *,
    say: Callable[[int, int, float], None],
    prepare: Prepare = masked_run,
    extra: Extra | None = None,
) -> None:
    """Train the attached gate's parameters.

    Args:
        attached: from ``learning``.
        expert: the base.
        batches: one for each step.
        options: steps, rate and warm-up.
        say: called with (steps done, steps in all, loss of the task).
        prepare: what the gate is told of a batch.
        extra: is added to the loss: of the gate's decisions in this step.

    Raises:
        MixmergeError: a loss that is not finite.
    """
    gate = attached.gate.train()
    adam = torch.optim.AdamW(gate.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    rising = max(1, math.floor(options.steps * options.warm_up))
    for step in range(options.steps):
        batch = next(batches)
        with attached.running(prepare(attached, batch)), attached.logged() as log:
            task = task_loss(expert, batch)
            loss = task if extra is None else task + extra(log, batch)
        if not math.isfinite(float(loss.detach())):
            what = f"the loss of step {step + 1} is {float(loss.detach())}"
            raise MixmergeError(
                Fault(f"gate {gate.kind}", what, "A finite one", "Try a smaller learning_rate")
            )
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for group in adam.param_groups:
            group["lr"] = options.learning_rate * min(1.0, (step + 1) / rising)
        adam.step()
        say(step + 1, options.steps, float(task.detach()))
    gate.eval()
