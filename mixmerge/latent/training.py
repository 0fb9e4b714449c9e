"""The glue and its router learn, and everything else stays as it is.

Nothing is drawn from a state that a kill could lose: what is drawn in a step depends on the seed and its number.
Legend as in ``records``; N tokens to predict.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mixmerge.engines.shortage import within_memory
from mixmerge.errors import Fault, MixmergeError
from mixmerge.latent.curves import Look, Point, Report
from mixmerge.latent.deciding import Decided, Decider, learning
from mixmerge.latent.files import put_values, values_of
from mixmerge.latent.glue import Glue
from mixmerge.latent.losses import (
    Parts,
    answer_losses,
    balance,
    choice,
    consistency,
    departures,
    entropy,
)
from mixmerge.latent.order import number, taken
from mixmerge.latent.passes import Passes, Predicted
from mixmerge.latent.resuming import (
    Saved,
    optimiser_state,
    put_optimiser_state,
    read_state,
    write_state,
)
from mixmerge.latent.router import Routes
from mixmerge.latent.settings import TrainOptions
from mixmerge.latent.texts import Texts

Progress = Callable[[str, int, int, str], None]  # (what, done, in all, how it goes)
_ADAM, _NOW, _BEST = "adam:", "now:", "best:"
_WHERE = "compose.train"


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        experts: names, in the glue's order.
        texts: the rows.
        learn, held, keep: places of the rows to learn from, of those that judge, and of those that primaries are to
            answer as they do alone.
        options: how.
        seed: of everything that is drawn.
        device: a torch device, that the glue is on.
        work: folder for what a killed fit goes on from.
        job: hash of all that the result depends on.
    """

    experts: tuple[str, ...]
    texts: Texts
    learn: Sequence[int]
    held: Sequence[int]
    keep: Sequence[int]
    options: TrainOptions
    seed: int
    device: str
    work: Path
    job: str


@dataclass
class _Done:
    """How far it is."""

    step: int = 0
    points: list[Point] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    stale: int = 0  # looks since the best
    rows: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """As JSON values, without the best ones' tensors."""
        found = {key: value for key, value in vars(self).items() if key != "best"}
        found["points"] = [asdict(one) for one in self.points]
        found["looks"] = [asdict(one) for one in self.looks]
        return found

    @classmethod
    def of(cls, facts: Mapping[str, Any], best: dict[str, Tensor]) -> _Done:
        points = [Point(**one) for one in facts["points"]]
        looks = [Look(**one) for one in facts["looks"]]
        return cls(**{**facts, "points": points, "looks": looks, "best": best})


class Trainer:
    """A fit under way.

    Args:
        task: what is learned.
        glue: on the task's device; is trained.
        decider: whose router, if it has one, is trained with it.
        passes: of the primaries.
    """

    def __init__(self, task: Task, glue: Glue, decider: Decider, passes: Passes) -> None:
        self._task, self._glue, self._decider, self._passes = task, glue, decider, passes
        self._options = task.options
        named = {f"glue.{name}": one for name, one in glue.named_parameters()}
        if decider.router is not None:
            named |= {f"router.{name}": one for name, one in decider.router.named_parameters()}
        self._named = named
        decayed = [one for one in named.values() if one.dim() > 1]
        plain = [one for one in named.values() if one.dim() <= 1]
        self._adam = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self._options.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self._options.learning_rate,
        )
        self._done = _Done()
        self._saved_at = time.monotonic()

    def run(self, progress: Progress) -> Report:
        """Learn to the end, from where a killed run was; the best values are then in glue and router.

        Args:
            progress: told the loss and the throughput.

        Raises:
            MixmergeError: a loss or gradient that is not finite; memory that does not suffice.
        """
        self._go_on()
        done, options = self._done, self._options
        if not done.looks and self._task.held:
            self._look(progress)
        while done.step < options.steps and not self._out_of_patience():
            start = time.monotonic()
            point = within_memory(
                self._step,
                where=_WHERE,
                what="out of memory in a step",
                run="Give it fewer rows_at_once, or checkpointing: true",
            )
            done.points.append(point)
            done.step += 1
            done.seconds += time.monotonic() - start
            rate = f"loss {point.lm:.4g}, {done.rows / max(done.seconds, 1e-9):,.1f} rows/s"
            progress("learning", done.step, options.steps, rate)
            if self._task.held and (done.step % options.looks_every == 0 or done.step == options.steps):
                self._look(progress)
            self._keep()
        alone = None
        if self._task.held:
            put_values(done.best, self._glue, self._decider.router)
            alone = self._judge(alone=True).per_byte
        seconds = max(done.seconds, 1e-9)
        return Report(
            steps=done.step,
            stopped_early=done.step < options.steps,
            best=done.best_step if self._task.held else done.step,
            points=tuple(done.points),
            looks=tuple(done.looks),
            alone=alone,
            rows=len(self._task.learn),
            held_out=len(self._task.held),
            seconds=done.seconds,
            rows_per_second=done.rows / seconds,
            tokens_per_second=done.tokens / seconds,
        )

    def _out_of_patience(self) -> bool:
        patience = self._options.patience
        return patience is not None and self._done.stale >= patience

    # --- one step

    def _step(self) -> Point:
        """The optimiser's next step."""
        done, options, weights = self._done, self._options, self._options.weights
        task = self._task
        rows = taken(task.learn, size=options.batch_size, step=done.step, seed=task.seed)
        draw = torch.Generator().manual_seed(number(task.seed, "noise", done.step))
        self._adam.zero_grad()
        with learning(self._glue, self._decider, number(task.seed, "dropout", done.step)):
            first = self._decider.decide(rows, draw=draw)
            second = None
            if first.routes is not None and weights.consistency:
                second = self._decider.decide(rows, draw=draw, primary=first.primary)
            both = [one for one in (first, second) if one is not None]
            leaves = [_leaf(one, self._task.device) for one in both]
            tokens = sum(self._tokens(first.primary[at], row) for at, row in enumerate(rows))
            lm, agreement = 0.0, 0.0
            charged = torch.zeros(len(rows))  # nats of each answer
            for primary, places in first.groups(options.rows_at_once):
                part = self._group(primary, places, rows, first, second, leaves, charged)
                parts = Parts(part[0] / tokens, consistency=part[1] / tokens if second is not None else None)
                parts.total(weights).backward()  # type: ignore[no-untyped-call]
                lm += float(part[0].detach()) / tokens
                agreement += float(part[1].detach()) / tokens
            point = Point(done.step + 1, lm)
            if first.routes is not None:
                spread, even = self._route(first.routes, [one.gates for one in both], leaves, charged)
                agreed = None if second is None else agreement
                point = replace(point, entropy=spread, balance=even, consistency=agreed)
            point = replace(point, keep=self._stay())
        if not math.isfinite(point.lm + (point.keep or 0.0)):
            raise MixmergeError(_not_finite(f"the loss of step {point.step}", done.step))
        self._update()
        done.rows += len(rows)
        done.tokens += sum(
            len(self._task.texts.primary(self._name(first.primary[at]), row).ids)
            for at, row in enumerate(rows)
        )
        return point

    def _stay(self) -> float | None:
        """How far primaries are, on rows to keep, from what they say alone; its gradient, by the glue, is added."""
        task, options, step = self._task, self._options, self._done.step
        rows = taken(task.keep, size=options.kept_rows, step=step, seed=task.seed, what="keep")
        if not rows:
            return None
        draw = torch.Generator().manual_seed(number(task.seed, "keep noise", step))
        decided = self._decider.decide(rows, draw=draw)
        gates = decided.gates.detach().to(task.device)
        tokens = sum(self._tokens(decided.primary[at], row) for at, row in enumerate(rows))
        total = 0.0
        for primary, places in decided.groups(options.rows_at_once):
            told = self._predict(primary, places, rows, decided, gates)
            with torch.no_grad():
                alone = self._passes.alone(self._name(primary), [rows[place] for place in places])
            away = departures(told.logits, alone.logits).sum() / tokens
            (options.weights.keep * away).backward()  # type: ignore[no-untyped-call]
            total += float(away.detach())
        return total

    def _group(
        self,
        primary: int,
        places: Sequence[int],
        rows: Sequence[int],
        first: Decided,
        second: Decided | None,
        leaves: Sequence[Tensor],
        charged: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Sums over the tokens of rows with one primary: of their cross-entropy, of the routings' disagreement. What
        each row's answer cost goes to ``charged``."""
        told = self._predict(primary, places, rows, first, leaves[0])
        each = answer_losses(told.logits, told.wanted)
        costs = [
            float(one)
            for one in torch.stack([part.sum() for part in torch.split(each.detach(), list(told.counts))])
        ]
        charged[list(places)] = torch.tensor(costs)
        loss = each.sum()
        nothing = torch.zeros((), device=loss.device)
        if second is None:
            return loss, nothing
        # Of rows whose peers are the same both times the divergence is 0.
        other = [at for at, place in enumerate(places) if first.active[place] != second.active[place]]
        if not other:
            return loss, nothing
        again = self._predict(primary, [places[at] for at in other], rows, second, leaves[1])
        return loss, consistency(told.of(other), again.logits)

    def _predict(
        self, primary: int, places: Sequence[int], rows: Sequence[int], decided: Decided, gates: Tensor
    ) -> Predicted:
        names = [[self._name(one) for one in decided.peers(place)] for place in places]
        columns = decided.columns(places, gates)
        return self._passes.predict(self._name(primary), [rows[place] for place in places], names, columns)

    def _route(
        self, routes: Routes, gates: Sequence[Tensor], leaves: Sequence[Tensor], charged: Tensor
    ) -> tuple[float, float]:
        """The way back through the router: of the answers' loss by gates and by who answers; and of its own terms,
        which are given."""
        spread, even = entropy(routes.scores), balance(routes.scores, routes.active)
        own = Parts(torch.zeros(()), spread, even).total(self._options.weights)
        noise = self._decider.noise
        if routes.answers is not None and noise > 0:
            drawn = choice(routes.answers, routes.primary, charged, noise=noise)
            own = own + self._options.weights.lm * drawn
        ends: list[Tensor] = [own]
        grads: list[Tensor | None] = [None]
        for one, leaf in zip(gates, leaves, strict=True):
            if leaf.grad is not None:
                ends.append(one)
                grads.append(leaf.grad.to(one))
        torch.autograd.backward(ends, grads)  # type: ignore[arg-type]
        return float(spread.detach()), float(even.detach())

    def _update(self) -> None:
        options, step = self._options, self._done.step
        norm = nn.utils.clip_grad_norm_(list(self._named.values()), options.clip)
        if not bool(norm.isfinite()):
            raise MixmergeError(_not_finite(f"the gradient of step {step + 1}", step))
        for group in self._adam.param_groups:
            group["lr"] = options.learning_rate * schedule(step, options)
        self._adam.step()

    def _name(self, expert: int) -> str:
        return self._task.experts[expert]

    def _tokens(self, primary: int, row: int) -> int:
        """Of an answer, as its primary says it."""
        reading = self._task.texts.primary(self._name(primary), row)
        return len(reading.ids) - reading.answer_from

    # --- what is held out

    def _judge(self, *, alone: bool = False) -> Look:
        """The rows that are held out, by the routing without noise; ``alone``: by its primaries, which read nobody."""
        held = self._task.held
        examples = self._task.texts.examples
        with torch.no_grad():
            decided = self._decider.decide(held)
            total = 0.0
            for primary, places in decided.groups(self._options.rows_at_once):
                if alone:
                    told = self._passes.alone(self._name(primary), [held[place] for place in places])
                else:
                    told = self._predict(primary, places, held, decided, decided.gates.to(self._task.device))
                total += float(answer_losses(told.logits, told.wanted).sum())
        size = sum(len(examples[row].answer.encode()) for row in held)
        tokens = sum(self._tokens(decided.primary[at], row) for at, row in enumerate(held))
        return Look(self._done.step, total / size, total / tokens)

    def _look(self, progress: Progress) -> None:
        done = self._done
        found = self._judge()
        if not math.isfinite(found.per_byte):
            what = f"the loss of the rows held out, after step {found.step},"
            raise MixmergeError(_not_finite(what, found.step))
        least = min((one.per_byte for one in done.looks), default=math.inf)
        done.looks.append(found)
        done.stale += 1
        if found.per_byte < least:
            done.best, done.best_step, done.stale = self._values(), found.step, 0
        best = min(found.per_byte, least)
        note = f"held out: {found.per_byte:.4g} nats/byte, best {best:.4g}"
        progress("held out", done.step, self._options.steps, note)

    # --- going on

    def _values(self) -> dict[str, Tensor]:
        return values_of(self._glue, self._decider.router)

    def _keep(self) -> None:
        options, now = self._options, time.monotonic()
        if self._done.step % options.save_steps and now - self._saved_at < options.save_seconds:
            return
        tensors = {f"{_NOW}{name}": one for name, one in self._values().items()}
        tensors |= {f"{_BEST}{name}": one for name, one in self._done.best.items()}
        tensors |= {f"{_ADAM}{name}": one for name, one in optimiser_state(self._adam, self._named).items()}
        write_state(self._task.work, Saved(tensors, self._done.facts()), self._task.job)
        self._saved_at = now

    def _go_on(self) -> None:
        saved = read_state(self._task.work, self._task.job)
        if saved is None:
            return
        put_values(saved.of(_NOW), self._glue, self._decider.router)
        put_optimiser_state(self._adam, self._named, saved.of(_ADAM))
        self._done = _Done.of(saved.facts, saved.of(_BEST))


def schedule(step: int, options: TrainOptions) -> float:
    """Share of the learning rate in a step, from 0: it rises in a line, then falls along half a cosine to 0."""
    rising = math.ceil(options.warm_up * options.steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, options.steps - rising)))


def _leaf(decided: Decided, device: str) -> Tensor:
    """Gates that gather the gradient of all groups, so that the way back through the router is gone once."""
    leaf = decided.gates.detach().to(device)
    return leaf.requires_grad_() if decided.routes is not None else leaf


def _not_finite(what: str, learned: int) -> Fault:
    run = (
        "Try a smaller learning_rate" if learned else "Look at the primaries' weights, and train's precision"
    )
    return Fault(_WHERE, f"{what} is not finite", run=run)
