"""Learned mixing coefficients: gradients by inner products, on a model that holds the merged weights.

With W = W0 + sum_t a_t D_t, the gradient of a coefficient is the inner product of the weight's gradient with the
expert's delta: dL/da_t = <dL/dW, D_t>. So autograd never sees an expert. A hook takes the products of a tensor's
gradient as soon as it is there, streaming the deltas a piece at a time, and frees it: memory is one model, one
tensor's gradient and one piece of each delta.

After a step the weights are made anew from the base and the deltas as stored, not moved by the change of the
coefficients: a delta is the difference of two stored tensors, so both read the same bytes, and this one cannot drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from mixmerge.calibrate.coefficients import CoefficientSpace, Layout
from mixmerge.calibrate.deltas import Deltas, check_experts
from mixmerge.calibrate.mixed import Mixed
from mixmerge.errors import Fault, MethodError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Progress = Callable[[int, int, float], None]


class Objective(Protocol):
    """What is minimised: the sum of the losses of a step, each a forward pass of its own."""

    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses of one step, one at a time: each is sent backward before the next is asked for."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What a person should know about what was learned, such as a collapse."""
        ...


class Held(Protocol):
    """A model whose parameters hold merged weights, made from coefficients (R, C) in the order of a layout."""

    @property
    def gradient(self) -> Tensor:
        """Where the gradient of the coefficients (R, C) is summed up, float64 on the CPU."""
        ...

    def watched(self) -> AbstractContextManager[None]:
        """While in it, what goes backward through the model adds to the gradient."""
        ...

    def build(self, values: Tensor, *, everything: bool = False) -> None:
        """Put the merged weights into the parameters; those that no step changes with ``everything`` only."""
        ...


@dataclass(frozen=True)
class Learning:
    """How coefficients are learned.

    Args:
        steps: updates of the coefficients, at least 1.
        optimiser: ``adam`` or ``adamw``; betas .9 and .999.
        learning_rate: above 0.
        weight_decay: at least 0.
        schedule: ``constant``, or ``cosine``: cosine warm restarts, down to 0 over ``period`` steps.
        period: steps between two restarts.
        clip: greatest norm of the gradient of all free coefficients; 0 for no limit.
        regulariser: times the mean distance of all free coefficients from their start.
        patience: steps in a row without a finite gradient, or with twice the loss of the start, before it stops.
        turn: steps in which every batch has been taken. Two losses are compared over these, or over ``steps`` where
            there are fewer: that of one step is also of how hard its rows are.
        seed: of whatever in the model is random.
    """

    steps: int = 500
    optimiser: Literal["adam", "adamw"] = "adam"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    period: int = 50
    clip: float = 0.0
    regulariser: float = 0.0
    patience: int = 5
    turn: int = 1
    seed: int = 0

    @property
    def window(self) -> int:
        """Steps over which losses are compared."""
        return max(1, min(self.turn, self.steps))

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * (1 + math.cos(math.pi * (step % self.period) / self.period)) / 2


@dataclass(frozen=True)
class Learned:
    """Coefficients and how they came to be; fields as in ``mixmerge.methods.coefficients.Coefficients``."""

    weights: dict[str, tuple[tuple[float, ...], ...]]
    layout: Layout
    steps: int
    kept: int
    losses: tuple[float, ...]
    skipped: int
    stopped: str
    warnings: tuple[str, ...]


@dataclass
class _Course:
    """How the loss goes: what is best so far, and whether to go on.

    Args:
        learning: how long a turn is, and what stops it.
        measure: the mean loss over a turn of coefficients that are what is learned, and no more than that.
        free: what is learned.
        best_free: a copy of it where the mean over the last turn was lowest; the start until there was one turn.
    """

    learning: Learning
    measure: Callable[[Tensor], float]
    free: Tensor
    start_free: Tensor
    best_free: Tensor
    losses: list[float] = field(default_factory=list)
    best: float = math.inf
    best_at: int = 0
    level: float = math.nan
    high: int = 0
    skipped: int = 0
    skipped_now: int = 0
    _at_start: float | None = None

    @property
    def at_start(self) -> float:
        """The mean loss of the start over a turn; measured when first asked for."""
        if self._at_start is None:
            self._at_start = self.measure(self.start_free)
        return self._at_start

    def saw(self, loss: float, step: int) -> str:
        """Note a finite loss, of the coefficients before their update; why to stop, or nothing."""
        self.losses.append(loss)
        self.level = loss if math.isnan(self.level) else 0.8 * self.level + 0.2 * loss
        window = self.learning.window
        recent = _mean(self.losses[-window:])
        if len(self.losses) == window:
            self.best = recent
        elif len(self.losses) > window and recent < self.best:
            self.best, self.best_at = recent, step
            self.best_free.copy_(self.free)
        first = self.losses[0] if self._at_start is None else self._at_start
        self.high = self.high + 1 if _doubled(self.level, first) else 0
        if self.high < self.learning.patience or not _doubled(self.level, self.at_start):
            return ""
        return f"the loss rose to twice its start and stayed there ({loss:.4g})"

    def settle(self, stopped: str, done: int) -> tuple[Tensor, int, str]:
        """What to keep: the learned coefficients, how many steps made them, and what to say of it."""
        if stopped:
            said = f"learning stopped after {done} steps: {stopped}"
        elif self.skipped_now:
            said = "the last steps were not finite"
        elif not self._may_have_risen or self.measure(self.free) <= self.at_start:
            return self.free, done, ""
        else:
            said = "the loss did not fall"
        if self.best_at and self.measure(self.best_free) > self.at_start:
            self.best_free, self.best_at = self.start_free, 0
        return self.best_free, self.best_at, f"{said}; the best coefficients are kept"

    @property
    def _may_have_risen(self) -> bool:
        """Whether a look at the losses leaves a doubt: only then is it worth to measure."""
        window = max(1, min(self.learning.window, len(self.losses) // 2))
        return self.level > self.losses[0] or _mean(self.losses[-window:]) > _mean(self.losses[:window])

    def skip(self) -> str:
        """Note a step without an update; why to stop, or nothing."""
        self.skipped += 1
        self.skipped_now += 1
        return (
            f"{self.skipped_now} steps in a row were not finite"
            if self.skipped_now >= self.learning.patience
            else ""
        )


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)


def _doubled(level: float, start: float) -> bool:
    return level > 2 * abs(start) + 1e-6


def learn(
    parameters: Mapping[str, Tensor],
    deltas: Deltas,
    objective: Objective,
    space: CoefficientSpace,
    *,
    learning: Learning,
    labels: Sequence[str] = (),
    used_rows: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> Learned:
    """Learn mixing coefficients by gradient descent on an objective.

    Source: AdaMerging (arXiv:2310.02575), for the parametrisation; the inner products are our own.

    Args:
        parameters: of the model the objective runs, by the names of the deltas. They are overwritten.
        deltas: of the experts.
        objective: what is minimised.
        space: which coefficients there are, and where they start.
        learning: how they are learned.
        labels: of the experts, for errors.
        used_rows: by name, the rows of embedding tables that the data look up, where nothing else uses the table.
        progress: called after each step with (steps done, steps in all, loss).

    Returns:
        The coefficients after the last step. After a stop, after a last step that was not finite, or where the loss
        over a turn of the batches is above that of the start over the same turn, those with the lowest mean of the
        losses of a turn, or the start where that is lower.

    Raises:
        MethodError: experts that equal the base or each other, a model that has not every tensor, no step
            with a finite gradient.
    """
    names = list(labels) or [f"expert {number + 1}" for number in range(deltas.experts)]
    lacking = [name for name in deltas.shapes if name not in parameters]
    if lacking:
        what = f"has no parameter for {len(lacking)} merged tensors: {', '.join(lacking[:5])}"
        raise MethodError(Fault("model", what))
    layout = space.layout(deltas.shapes, deltas.experts)
    check_experts(deltas, list(layout.rows), names)
    mixed = Mixed(parameters, deltas, layout, used_rows or {})
    return descend(mixed, layout, objective, space, learning=learning, progress=progress)


def descend(
    held: Held,
    layout: Layout,
    objective: Objective,
    space: CoefficientSpace,
    *,
    learning: Learning,
    progress: Progress | None = None,
) -> Learned:
    """Learn coefficients of whatever holds the merged weights; arguments, result and errors as of ``learn``.

    Args:
        held: the model that the objective runs.
        layout: of the coefficients it is made from.
        space: how they are bounded.
    """
    import torch

    torch.manual_seed(learning.seed)
    free = space.free(layout.start).requires_grad_(True)
    start = space.coefficients(free).detach().clone()
    held.build(start, everything=True)
    optimiser = _optimiser(free, learning)

    def measure(values: Tensor) -> float:
        held.build(space.coefficients(values))
        return _mean_loss(objective, learning.window)

    now = free.detach()
    course = _Course(learning, measure, now, now.clone(), now.clone())
    stopped, done = "", 0
    with held.watched():
        for step in range(learning.steps):
            loss = _backward(objective, held, step)
            stopped = _update(free, held, optimiser, course, space, learning, start, loss, step)
            if stopped:
                break
            done = step + 1
            held.build(space.coefficients(free.detach()))
            if progress is not None:
                progress(done, learning.steps, loss)
    return _finish(space, layout, course, stopped, done, objective.notes())


def _optimiser(free: Tensor, learning: Learning) -> Optimizer:
    import torch

    kind = torch.optim.Adam if learning.optimiser == "adam" else torch.optim.AdamW
    return kind([free], lr=learning.learning_rate, betas=(0.9, 0.999), weight_decay=learning.weight_decay)


def _backward(objective: Objective, held: Held, step: int) -> float:
    """The loss of a step; its gradient is in ``held.gradient``. Not a number as soon as one part is not."""
    held.gradient.zero_()
    total = 0.0
    for loss in objective.losses(step):
        total += float(loss.detach())
        if not math.isfinite(total):
            return math.nan
        loss.backward()  # type: ignore[no-untyped-call]
    return total


def _mean_loss(objective: Objective, steps: int) -> float:
    """The mean loss of the first steps, of weights that stay as they are; infinite if one is not finite."""
    import torch

    with torch.no_grad():
        total = sum(float(loss) for step in range(steps) for loss in objective.losses(step))
    return total / steps if math.isfinite(total) else math.inf


def _update(
    free: Tensor,
    held: Held,
    optimiser: Optimizer,
    course: _Course,
    space: CoefficientSpace,
    learning: Learning,
    start: Tensor,
    loss: float,
    step: int,
) -> str:
    """Take one step, if loss and gradient are finite; why to stop, or nothing."""
    import torch

    if not (math.isfinite(loss) and torch.isfinite(held.gradient).all()):
        return course.skip()
    course.skipped_now = 0
    stopped = course.saw(loss, step)
    if stopped:
        return stopped
    values = space.coefficients(free)
    distance = (values - start).abs().mean()
    optimiser.zero_grad()
    ((values * held.gradient).sum() + learning.regulariser * distance).backward()  # type: ignore[no-untyped-call]
    if learning.clip > 0:
        torch.nn.utils.clip_grad_norm_([free], learning.clip)
    for group in optimiser.param_groups:
        group["lr"] = learning.rate(step)
    optimiser.step()
    with torch.no_grad():
        space.project(free)
    return ""


def _finish(
    space: CoefficientSpace,
    layout: Layout,
    course: _Course,
    stopped: str,
    done: int,
    notes: tuple[str, ...],
) -> Learned:
    if not course.losses:
        what = "no step had a finite loss and gradient"
        raise MethodError(
            Fault("learning", what, run="Look at the rows of data, and start with smaller weights")
        )
    warnings = list(notes)
    free, kept, said = course.settle(stopped, done)
    if said:
        warnings.append(said)
    if course.skipped:
        warnings.append(f"{course.skipped} steps were skipped: their loss or gradient was not finite")
    values = space.coefficients(free).tolist()
    return Learned(
        layout.weights(values),
        layout,
        done,
        kept,
        tuple(course.losses),
        course.skipped,
        stopped,
        tuple(warnings),
    )
