"""The second training of a router: by what its experts are for, and no more by whose a row is.

The identity of a row decides its head and its share in the loss, and is never shown to the gate.

Legend: N rows, B of a batch, E experts, f numbers in a feature, C classes, V tokens of a vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mixmerge.bank.attach import Attached
from mixmerge.bank.fitting_steps import learning, row_batches
from mixmerge.bank.gate import Run
from mixmerge.bank.gates.refined import Refined, TaskTraining, Tensors
from mixmerge.bank.gates.router import Router
from mixmerge.bank.own_heads import Headed
from mixmerge.bank.records import Bank
from mixmerge.data.batches import Batch, Task, context_of, tokenised
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MixmergeError

_WARM_UP, _LONGEST_STEP = 0.06, 1.0  # share of the steps; norm of a gradient
_WINDOW = 8  # batches whose rows are sorted by length: less padding

Told = Callable[[int, int, float], None]


@dataclass(frozen=True, eq=False)
class Lessons:
    """What is learned from.

    Args:
        rows: N, each with an answer or, of classifiers, a label.
        owners: whose each is.
        features: ``(N, f)``, of the prompts.
        held: ``(N,)``, those that choose the epoch and are not trained on.
        max_tokens: of a row; what is longer is cut.
    """

    rows: Sequence[Row]
    owners: Sequence[int]
    features: Tensor
    held: Tensor
    max_tokens: int = 512


@dataclass(frozen=True)
class TaskTrained:
    """What the second training found.

    Args:
        epoch: that was kept; 0: the router as it was.
        losses: on the rows held out, before training and after every epoch; none where none is held out.
        accuracies: the same as shares of right classes; none of language models.
    """

    epoch: int
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def label_faults(rows: Sequence[Row], where: str, *, classes: int | None = None) -> list[Fault]:
    """Why a classifier's loss cannot be taken on rows; empty if it can."""
    lacking = sum(row.label is None for row in rows)
    if lacking:
        what = f"{lacking} of {len(rows)} rows have no label, and gate.task learns from what is right"
        return [Fault(where, what, "A label in each row", "Add them, or leave gate.task out")]
    wrong = sorted({row.label for row in rows if row.label is not None and classes is not None}
                   - set(range(classes or 0)))  # fmt: skip
    if wrong:
        return [
            Fault(where, f"has the label {wrong[0]}", f"The expert has classes 0 to {(classes or 1) - 1}")
        ]
    return []


def balance(y: Tensor, experts: int) -> Tensor:
    """``(E,)``: what a row of each expert counts, so that all experts count alike."""
    counts = torch.bincount(y, minlength=experts).clamp_min(1)
    return len(y) / (experts * counts.float())


def fit_task(
    gate: Router,
    bank: Bank,
    headed: Headed,
    lessons: Lessons,
    options: TaskTraining,
    *,
    seed: int = 0,
    progress: Told | None = None,
) -> TaskTrained:
    """Train what ``Refined`` adds to a router's weights by the loss of the experts' tasks. The router itself stays.

    Every row's loss is that of its own expert's head, or of its answer; rows of all experts go through the mixture the
    gate gives them. Experts with few rows count as much as those with many, long answers as much as short ones.
    AdamW, gradients of norm 1 at most. The epoch of the least loss on the rows held out is kept; where that is before
    the first, the router stays as it was.

    Args:
        gate: trained; is changed.
        bank: on whose factors it decides; they are frozen.
        headed: the base.
        lessons: what is learned from.
        options: of the training.
        seed: of the network and the order of rows.
        progress: called with (steps done, steps in all, loss) after every step.

    Raises:
        MixmergeError: rows without labels or answers; a loss that is not finite.
    """
    course = _Course(gate, bank, headed, lessons, options, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        refined = gate.refine(Tensors.of(bank, options.scope)).to(course.device)
        found = course.train(refined, progress)
    if found.epoch == 0:
        gate.refined = None
    gate.cpu().eval().requires_grad_(False)
    return found


class _Course:
    """Rows and model of a training."""

    def __init__(
        self,
        gate: Router,
        bank: Bank,
        headed: Headed,
        lessons: Lessons,
        options: TaskTraining,
        seed: int,
    ) -> None:
        self.gate, self.bank, self.headed, self.lessons, self.said = gate, bank, headed, lessons, options
        expert = headed.expert
        self.classifies, self.device = expert.kind == "classifier", str(expert.model.device)
        self._draw = torch.Generator().manual_seed(seed)
        faults = label_faults(lessons.rows, expert.name) if self.classifies else []
        if expert.kind == "other":
            faults = [Fault(expert.name, "has no loss to learn from", "A language model or a classifier")]
        if faults:
            raise MixmergeError(faults)
        self._most = min(lessons.max_tokens, context_of(expert.model.config, expert.tokenizer))
        task: Task = "classifier" if self.classifies else "causal"
        lines = tokenised(lessons.rows, expert.tokenizer, task=task, max_tokens=self._most)
        self._lengths = {
            line.row: len(line.ids) for line in lines if self.classifies or line.answer_from < len(line.ids)
        }
        usable = torch.tensor(sorted(self._lengths))
        held = lessons.held[usable] if len(usable) else lessons.held[:0]
        self.taught, self.held = usable[~held].tolist(), usable[held].tolist()
        if not self.taught:
            what = f"none of {len(lessons.rows)} rows has a token to predict within {self._most} tokens"
            raise MixmergeError(Fault(expert.name, what, "Longer texts, or shorter prompts"))
        owners = torch.tensor(lessons.owners)
        self._shares = {
            True: balance(owners[self.taught], gate.experts),
            False: balance(owners[self.held], gate.experts) if self.held else None,
        }

    def train(self, refined: Refined, progress: Told | None) -> TaskTrained:
        """Train in place; what was best stays."""
        self.gate.to(self.device).requires_grad_(False)
        refined.requires_grad_(True)
        groups = [
            {"params": list(refined.network.parameters()), "lr": self.said.learning_rate},
            {"params": list(refined.factors.parameters()), "lr": self.said.rank_rate, "weight_decay": 0.0},
        ]
        adam = torch.optim.AdamW(
            [one for one in groups if one["params"]], weight_decay=self.said.weight_decay
        )
        each = math.ceil(len(self.taught) / self.said.batch)
        steps = each * self.said.epochs
        rates = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _rate(step, steps))
        losses: list[float] = []
        accuracies: list[float] = []
        best, kept = 0, copy.deepcopy(refined.state_dict())
        with learning(self.headed.expert, self.bank, self.gate) as attached:
            self._check(attached, losses, accuracies)
            for epoch in range(1, self.said.epochs + 1):
                for number, rows in enumerate(self._drawn(), 1):
                    loss = self._step(attached, rows, adam, refined)
                    rates.step()
                    if progress is not None:
                        progress((epoch - 1) * each + number, steps, loss)
                self._check(attached, losses, accuracies)
                if not losses or losses[-1] < min(losses[:-1]):
                    best, kept = epoch, copy.deepcopy(refined.state_dict())
                elif epoch - best >= self.said.patience:
                    break
        refined.load_state_dict(kept)
        return TaskTrained(best, tuple(losses), tuple(accuracies))

    def _step(
        self, attached: Attached, rows: list[int], adam: torch.optim.Optimizer, refined: Refined
    ) -> float:
        losses, _, at = self._answered(attached, rows, smoothing=self.said.label_smoothing)
        loss = (losses * self._weights(at, taught=True)).mean()
        if not math.isfinite(float(loss.detach())):
            run = "Try a smaller gate.task.learning_rate"
            raise MixmergeError(
                Fault("gate.task", f"the loss is {float(loss.detach())}", "A finite one", run)
            )
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(refined.parameters(), _LONGEST_STEP)
        adam.step()
        return float(loss.detach())

    @torch.no_grad()
    def _check(self, attached: Attached, losses: list[float], accuracies: list[float]) -> None:
        """Loss, and of classifiers accuracy, on the rows held out."""
        if not self.held:
            return
        order = sorted(self.held, key=lambda row: (self._lengths[row], row))
        loss, right = 0.0, 0.0
        for start in range(0, len(order), self.said.batch):
            found, correct, at = self._answered(attached, order[start : start + self.said.batch])
            share = self._weights(at, taught=False)
            loss += float((found * share).sum())
            right += 0.0 if correct is None else float((correct * share).sum())
        losses.append(loss / len(order))
        if self.classifies:
            accuracies.append(right / len(order))

    def _answered(
        self, attached: Attached, rows: list[int], *, smoothing: float = 0.0
    ) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """``(B,)`` losses, of classifiers ``(B,)`` whether the class is right, and which rows they are of."""
        lessons, expert = self.lessons, self.headed.expert
        some = [lessons.rows[at] for at in rows]
        (batch,) = row_batches(some, expert, batch_size=len(some), max_tokens=self._most)
        at = tuple(rows[place] for place in batch.rows)
        model = self.headed.of([lessons.owners[row] for row in at]).model
        query = self.gate.query(lessons.features[list(at)].to(self.device))
        with attached.running(Run(query, mask=batch.attention_mask.bool())):
            kept = {} if self.classifies else {"use_cache": False}
            logits: Tensor = model(**batch.inputs(), **kept).logits.float()
        if batch.labels is None or not self.classifies:
            return _of_tokens(logits, batch, smoothing), None, at
        return _of_classes(logits, batch.labels, smoothing), (logits.argmax(-1) == batch.labels).float(), at

    def _weights(self, rows: Sequence[int], *, taught: bool) -> Tensor:
        """``(B,)``: what each row counts."""
        shares = self._shares[taught]
        owners = [self.lessons.owners[row] for row in rows]
        return torch.ones(len(owners)) if shares is None else shares[owners].to(self.device)

    def _drawn(self) -> Iterator[list[int]]:
        """The rows of every step of an epoch: in an order of its own, those of like length together."""
        order = [self.taught[at] for at in torch.randperm(len(self.taught), generator=self._draw).tolist()]
        size, batches = self.said.batch, []
        for start in range(0, len(order), _WINDOW * size):
            window = sorted(order[start : start + _WINDOW * size], key=self._lengths.__getitem__)
            batches += [window[first : first + size] for first in range(0, len(window), size)]
        for at in torch.randperm(len(batches), generator=self._draw).tolist():
            yield batches[at]


def _rate(step: int, steps: int) -> float:
    """The share of the full rate: rising evenly, then as a cosine to 0."""
    return min((step + 1) / max(1.0, _WARM_UP * steps), 0.5 * (1 + math.cos(math.pi * step / steps)))


def _of_classes(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """``(B, C)`` to ``(B,)``: cross-entropy; smoothing spreads over the classes that a row's expert has."""
    logs = logits.log_softmax(-1)
    right = -logs.gather(-1, labels[:, None])[:, 0]
    if not smoothing:
        return right
    there = logits.isfinite()
    alike = -torch.where(there, logs, 0.0).sum(-1) / there.sum(-1)
    return (1 - smoothing) * right + smoothing * alike


def _of_tokens(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """``(B, T, V)`` to ``(B,)``: the mean over what each row is to say."""
    wanted = batch.loss_mask[:, 1:]
    told = cross_entropy(
        logits[:, :-1][wanted], batch.input_ids[:, 1:][wanted], reduction="none", label_smoothing=smoothing
    )
    sums = told.new_zeros(len(wanted)).index_add(0, wanted.nonzero()[:, 0], told)
    return sums / wanted.sum(-1).clamp(min=1)
