"""How the zoo learns: length-sorted batches of questions, one base loop, one expert loop. One thread, seeded."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmerge.evaluate import Question

Row = tuple[list[int], list[int]]  # tokens read, tokens learned
Batch = tuple[Tensor, Tensor]  # tokens and labels, both (rows, length); label -100 is not learned
Report = Callable[[int, int], None]  # (steps done, steps in all)
_ROWS = 32
_BUCKET = 16  # batches that are sorted by length together: less padding
_NOT_LEARNED = -100


@dataclass(frozen=True)
class Pool:
    """Questions to draw from, in shuffled rounds, with the share of every batch they are.

    A prompt is read, its answer is learned, and so is ending there; of an empty prompt all is learned.
    """

    questions: Sequence[Question]
    share: float


def batches(pools: Sequence[Pool], tokenizer: Any, *, seed: int) -> Iterator[Batch]:
    """Batches without end; a batch mixes the pools by their shares."""
    rng = random.Random(seed)
    rounds = [_rounds(pool.questions, random.Random(rng.random())) for pool in pools]
    shares = [pool.share for pool in pools]
    while True:
        drawn = rng.choices(range(len(pools)), shares, k=_ROWS * _BUCKET)
        rows = _rows([next(rounds[pool]) for pool in drawn], tokenizer)
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        bucket = [rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS)]
        rng.shuffle(bucket)
        yield from map(_batch, bucket)


def _rows(questions: Sequence[Question], tokenizer: Any) -> list[Row]:
    read = tokenizer([question.prompt for question in questions])["input_ids"]
    learned = tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
    return [(prompt, [*answer, tokenizer.eos_token_id]) for prompt, answer in zip(read, learned, strict=True)]


def _rounds(questions: Sequence[Question], rng: random.Random) -> Iterator[Question]:
    order = list(range(len(questions)))
    while True:
        rng.shuffle(order)
        yield from (questions[index] for index in order)


def _batch(rows: Sequence[Row]) -> Batch:
    """Padding goes to the right, where a causal model cannot look: no attention mask is needed."""
    length = max(len(read) + len(learned) for read, learned in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full((len(rows), length), _NOT_LEARNED)
    for number, (read, learned) in enumerate(rows):
        end = len(read) + len(learned)
        tokens[number, :end] = torch.tensor(read + learned)
        labels[number, len(read) : end] = torch.tensor(learned)
    return tokens, labels


def _backward(model: Any, batch: Batch) -> None:
    tokens, labels = batch
    logits = model(input_ids=tokens, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_NOT_LEARNED
    )
    torch.autograd.backward(loss)


def _pace(step: int, steps: int) -> float:
    """Factor on the learning rate: up for 20 steps, then down to 0 on a line."""
    return min(1.0, (step + 1) / 20) * (1 - step / steps)


def block_matrices(model: Any, targets: Sequence[str]) -> dict[str, torch.nn.Parameter]:
    """The weights of the modules that are called so."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.endswith(".weight") and name.split(".")[-2] in targets
    }


def train_base(
    model: Any, phases: Sequence[tuple[int, Iterable[Batch]]], *, targets: Sequence[str], report: Report
) -> None:
    """Train every parameter: Muon for the matrices of the blocks, AdamW for the rest.

    Args:
        model: changed in place.
        phases: how many steps on which batches, one after the other.
        targets: names of the modules whose weights are the matrices of the blocks.
        report: called after every step.
    """
    matrices = list(block_matrices(model, targets).values())
    inside = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    muon = Muon(matrices)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    steps = sum(count for count, _ in phases)
    stream = itertools.chain.from_iterable(itertools.islice(data, count) for count, data in phases)
    for step, batch in enumerate(stream):
        _backward(model, batch)
        pace = _pace(step, steps)
        muon.step(rate=0.012 * pace)
        _adam_step(adam, rate=3e-3 * pace)
        report(step + 1, steps)


def train_expert(
    model: Any, data: Iterable[Batch], *, steps: int, targets: Sequence[str], report: Report
) -> None:
    """Train the matrices of the blocks by AdamW; embeddings, norms and biases stay the base's.

    Frozen embeddings keep the vocabularies of all experts the same, and all of a delta fits an adapter. The
    learning rate is low: deltas stay small beside the base's weights, so that they add up when merged.
    """
    model.requires_grad_(False)
    trained = list(block_matrices(model, targets).values())
    for parameter in trained:
        parameter.requires_grad_(True)
    adam = torch.optim.AdamW(trained, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for step, batch in enumerate(itertools.islice(data, steps)):
        _backward(model, batch)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        _adam_step(adam, rate=7e-4 * _pace(step, steps))
        report(step + 1, steps)


def _adam_step(adam: torch.optim.AdamW, *, rate: float) -> None:
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
    adam.zero_grad()


class Muon:
    """Momentum whose updates are made orthogonal: such small transformers learn in half of AdamW's steps.

    Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with its
    Newton-Schulz coefficients. Matrices of one shape are handled as one batch.

    Args:
        matrices: parameters of two dimensions.
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter]) -> None:
        groups: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            groups.setdefault(matrix.shape, []).append(matrix)
        self._groups = list(groups.values())
        self._momenta = [torch.zeros(len(group), *group[0].shape) for group in self._groups]

    @torch.no_grad()
    def step(self, *, rate: float, momentum: float = 0.9) -> None:
        """Update from the gradients, and clear them."""
        for group, average in zip(self._groups, self._momenta, strict=True):
            gradient = torch.stack([matrix.grad for matrix in group if matrix.grad is not None])
            average.lerp_(gradient, 1 - momentum)
            update = _orthogonal(gradient.lerp(average, momentum))
            rows, columns = group[0].shape
            scale = rate * max(1.0, rows / columns) ** 0.5
            for matrix, change in zip(group, update, strict=True):
                matrix.sub_(change, alpha=scale)
                matrix.grad = None


def _orthogonal(matrices: Tensor) -> Tensor:
    """(batch, rows, columns): singular values moved to about 1 by five Newton-Schulz steps."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x
