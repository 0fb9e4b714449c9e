"""What learned coefficients minimise: the entropy of a merged model's predictions, or its distance to each expert.

Every objective looks at each expert's own rows and at nothing else of them than their text. Shapes: B rows of a batch,
L tokens, N attended positions (or rows, of a classifier), H hidden size, V vocabulary or classes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mixmerge.calibrate.losses import Answers, entropy, hidden_loss, logit_loss
from mixmerge.errors import Fault, MethodError

if TYPE_CHECKING:
    from torch import Tensor

# Losses of several experts go backward together until they hold this many tokens: the deltas are then read once.
TOKENS = 2048
# Positions whose logits are there at once, where there is a head over a vocabulary.
POSITIONS = 256
_RECENT, _COLLAPSED, _GREW = 20, 0.95, 0.3


class Shown(Protocol):
    """A batch of rows: of ``mixmerge.data.batches``, or anything with these tensors."""

    @property
    def input_ids(self) -> Tensor: ...

    @property
    def attention_mask(self) -> Tensor: ...


@dataclass(frozen=True)
class Schedule:
    """Which batches a step takes: ``each`` of every expert, in an order drawn anew whenever all were taken.

    Args:
        counts: batches of each expert, at least 1.
        each: batches a step takes of an expert; no more than it has.
        seed: of the orders.
    """

    counts: tuple[int, ...]
    each: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        empty = [number for number, count in enumerate(self.counts) if count < 1]
        if empty or not self.counts:
            what = f"no rows of data for expert {', '.join(str(number + 1) for number in empty)}"
            raise MethodError(Fault("calibration", what if empty else "there is no expert"))

    @property
    def turn(self) -> int:
        """Steps after which every batch of every expert was taken."""
        return max(-(-count // min(self.each, count)) for count in self.counts)

    def of(self, step: int, expert: int) -> list[int]:
        """Numbers of the batches of one expert in one step."""
        import torch

        count = self.counts[expert]
        each, found = min(self.each, count), []
        for position in range(step * each, (step + 1) * each):
            turn, place = divmod(position, count)
            seed = ((self.seed % 2**31) * 1_000_003 + expert * 8191 + turn) % 2**63
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            found.append(int(order[place]))
        return found


def grouped(parts: Iterator[tuple[Callable[[], Tensor], int]], most: int | None = None) -> Iterator[Tensor]:
    """Sums of losses, each of no more than ``most`` tokens unless one part has more.

    Args:
        parts: (what computes a loss, its tokens).
        most: tokens whose activations are there at once; ``TOKENS`` without.
    """
    most = TOKENS if most is None else most
    total: Tensor | None = None
    tokens = 0
    for compute, count in parts:
        if total is not None and tokens + count > most:
            yield total
            total, tokens = None, 0
        loss = compute()
        total = loss if total is None else total + loss
        tokens += count
    if total is not None:
        yield total


def scheduled(
    schedule: Schedule,
    tokens: Sequence[Sequence[int]],
    step: int,
    loss: Callable[[int, int, Sequence[int]], Tensor],
) -> Iterator[tuple[Callable[[], Tensor], int]]:
    """The batches of a step, expert by expert, as ``grouped`` takes them.

    Args:
        schedule: of the batches.
        tokens: of each batch, by expert.
        step: from 0.
        loss: of an expert's batch by its number, given the numbers of all of this expert's in the step.
    """
    for expert in range(len(tokens)):
        numbers = schedule.of(step, expert)
        for number in numbers:
            yield partial(loss, expert, number, numbers), tokens[expert][number]


@dataclass
class Entropy:
    """The sum over experts of the mean entropy of the merged model's predictions on their rows.

    Source: AdaMerging (arXiv:2310.02575), there on the unlabeled inputs of the test.

    Args:
        predict: logits (B, C) of the merged model for batch ``number`` of ``expert``; -inf where a row has fewer
            choices than C.
        tokens: of each batch, by expert.
        schedule: of the batches.
        labels: of the experts, for notes.
        answers: what each expert's classes are; none: one of them is right.
    """

    predict: Callable[[int, int], Tensor]
    tokens: Sequence[Sequence[int]]
    schedule: Schedule
    labels: Sequence[str] = ()
    answers: Sequence[Answers] = ()
    _first: list[list[Hashable]] = field(default_factory=list)
    _last: list[deque[list[Hashable]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._first = [[] for _ in self.tokens]
        self._last = [deque(maxlen=_RECENT) for _ in self.tokens]

    def losses(self, step: int) -> Iterator[Tensor]:
        yield from grouped(scheduled(self.schedule, self.tokens, step, self._loss))

    def _loss(self, expert: int, number: int, numbers: Sequence[int]) -> Tensor:
        logits = self.predict(expert, number)
        answers = self.answers[expert] if self.answers else "one"
        self._note(expert, logits, answers)
        return entropy(logits, answers).mean() / len(numbers)

    def _note(self, expert: int, logits: Tensor, answers: Answers) -> None:
        import torch

        if not torch.is_grad_enabled():  # a loss is measured; no step is taken
            return
        picked: list[Hashable] = logits.detach().argmax(-1).tolist()
        if answers == "many":
            picked = list(map(tuple, (logits.detach() > 0).tolist()))
        if len(self._first[expert]) < _RECENT * len(picked):
            self._first[expert] += picked
        self._last[expert].append(picked)

    def notes(self) -> tuple[str, ...]:
        """One line for each expert whose rows all get one class at the end, and did not at the start."""
        found = []
        for expert, first in enumerate(self._first):
            last = [one for picked in self._last[expert] for one in picked]
            now, before = _top_share(last), _top_share(first)
            if now > _COLLAPSED and now - before > _GREW:
                label = self.labels[expert] if self.labels else f"expert {expert + 1}"
                what = f"{now:.0%} of the predictions on its rows are one class, {before:.0%} at the start"
                found.append(f"{label}: {what}: entropy may have collapsed")
        return tuple(found)


def _top_share(picked: Sequence[Hashable]) -> float:
    return max((picked.count(one) for one in set(picked)), default=0) / max(len(picked), 1)


class Student(Protocol):
    """The merged model as alignment asks it."""

    def see(self, expert: int, number: int, layers: Sequence[int]) -> tuple[Tensor, dict[int, Tensor]]:
        """What the head takes (N, H) of a batch, and the hidden states (N, H) of layers."""
        ...

    def logits(self, final: Tensor, expert: int) -> Tensor:
        """Logits (N, V) by the merged model's own head."""
        ...


class Remembered(Protocol):
    """What each expert showed on its own rows: ``mixmerge.calibrate.teachers``."""

    def recall(self, expert: int, number: int) -> tuple[Tensor, dict[int, Tensor]]:
        """As ``Student.see``, of the expert."""
        ...

    def logits(self, final: Tensor, expert: int) -> Tensor:
        """Logits (N, V) by the expert's own head."""
        ...


@dataclass(frozen=True)
class AlignmentOptions:
    """The loss of Expert Merging.

    Args:
        layers: whose hidden states are aligned, as indices into transformers' ``hidden_states``; none: no
            hidden loss, as in the released code unless layers are listed.
        hidden: ``mean``: of squared differences over positions, features and layers (released code); ``sum``: the
            squared norm of the difference, summed over layers, mean over positions (paper).
        hidden_weight: factor on the hidden loss.
        logit: ``kl`` (paper) or ``soft_ce``, cross-entropy to the expert's distribution (released code). They differ
            by the expert's entropy, which no coefficient changes: gradients are equal.
        logit_weight: factor on the logit loss.
        temperature: T; the logit loss is multiplied by its square.
        importance: factor for each expert (the paper's beta); 1 for all if empty.
    """

    layers: tuple[int, ...] = ()
    hidden: Literal["mean", "sum"] = "mean"
    hidden_weight: float = 1.0
    logit: Literal["kl", "soft_ce"] = "kl"
    logit_weight: float = 1.0
    temperature: float = 1.0
    importance: tuple[float, ...] = ()


@dataclass
class Alignment:
    """The sum over experts of the distance between the merged model and the expert, on the expert's own rows.

    Source: Expert Merging (arXiv:2509.25712), its layer-wise hidden and logit alignment.

    Args:
        student: the merged model.
        teachers: the experts.
        tokens: of each batch, by expert.
        schedule: of the batches.
        options: of the loss.
        answers: what each expert's outputs say; none: one class, or token, is right.

    Deviations:
        the model is in evaluation mode, as the experts were; the released code trains with dropout. Both average over
        all attended positions, prompts included, as the released code does.
    """

    student: Student
    teachers: Remembered
    tokens: Sequence[Sequence[int]]
    schedule: Schedule
    options: AlignmentOptions = AlignmentOptions()
    answers: Sequence[Answers] = ()

    def losses(self, step: int) -> Iterator[Tensor]:
        yield from grouped(scheduled(self.schedule, self.tokens, step, self._share))

    def notes(self) -> tuple[str, ...]:
        return ()

    def _share(self, expert: int, number: int, numbers: Sequence[int]) -> Tensor:
        importance = self.options.importance[expert] if self.options.importance else 1.0
        return self.loss(expert, number) * (importance / len(numbers))

    def loss(self, expert: int, number: int) -> Tensor:
        """The loss of one batch of one expert."""
        options = self.options
        final, hidden = self.student.see(expert, number, options.layers)
        own_final, own_hidden = self.teachers.recall(expert, number)
        loss = final.new_zeros((), dtype=final.dtype).float()
        if options.logit_weight:
            loss = loss + options.logit_weight * self._logits(final, own_final.to(final), expert)
        if options.layers and options.hidden_weight:
            gaps = [
                hidden[layer].float() - own_hidden[layer].to(hidden[layer]).float()
                for layer in options.layers
            ]
            loss = loss + options.hidden_weight * hidden_loss(gaps, form=options.hidden)
        return loss

    def _logits(self, final: Tensor, own_final: Tensor, expert: int) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        form, temperature = self.options.logit, self.options.temperature
        answers = self.answers[expert] if self.answers else "one"

        def part(mine: Tensor, other: Tensor) -> Tensor:
            one, two = self.student.logits(mine, expert), self.teachers.logits(other, expert)
            return logit_loss(one, two, form=form, temperature=temperature, answers=answers).sum()

        edges = [(at, at + POSITIONS) for at in range(0, len(final), POSITIONS)]
        pairs = [(final[start:stop], own_final[start:stop]) for start, stop in edges]
        if len(final) <= POSITIONS:
            return part(final, own_final) / len(final)
        # Logits of all positions would take more memory than the model: each part's are made again on the way back.
        sums: Any = sum(checkpoint(part, mine, other, use_reentrant=False) for mine, other in pairs)
        return sums / len(final)  # type: ignore[no-any-return]


def chunk_counts(
    norms: Mapping[str, Sequence[float]],
    weights: Mapping[str, Sequence[Sequence[float]]],
    *,
    budget: float = 1.0,
    kappa: float = 1.0,
    least: int = 1,
) -> dict[str, int]:
    """How many chunks each tensor gets, by how much it matters to the merge.

    Source: Expert Merging++ (arXiv:2509.25712): I = sum_k |a_k| mean|D_k| n, m = floor(B I^kappa / sum I^kappa).

    Args:
        norms: by tensor, the L1 norm of each expert's delta: mean|D_k| times the number of elements.
        weights: by tensor, chunks of coefficients of a first run.
        budget: B as a multiple of the number of tensors; the paper's is .9 to 1.2.
        kappa: exponent on the importance. Its value is not published; 1 shares in proportion.
        least: chunks of a tensor whose share is less: 1, or 0, which freezes it at its start.

    Returns:
        Chunks by tensor.

    Raises:
        MethodError: no tensor matters: all coefficients or deltas are 0.
    """
    importance = {}
    for name, each in norms.items():
        rows = weights[name]
        means = [sum(abs(row[k]) for row in rows) / len(rows) for k in range(len(each))]
        importance[name] = sum(mean * norm for mean, norm in zip(means, each, strict=True))
    largest = max(importance.values(), default=0.0)
    if not largest > 0:
        raise MethodError(Fault("importance", "is 0 for every tensor: all coefficients or deltas are 0"))
    powers = {name: (value / largest) ** kappa for name, value in importance.items()}
    total = sum(powers.values())
    chunks = {name: int(budget * len(norms) * power / total) for name, power in powers.items()}
    return {name: max(least, count) for name, count in chunks.items()}
