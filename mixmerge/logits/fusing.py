"""One step of fusion: logits of base, reference and experts in, fused logits and their strengths out.

Legend: N rows of logits, V entries of the base's vocabulary, W of the small models', T experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mixmerge.errors import Fault, MixmergeError
from mixmerge.logits.matching import Found, match_grid, match_joint, match_one
from mixmerge.logits.shifts import divergences, fused, nucleus, shifts_of
from mixmerge.logits.vocabulary import Shared
from mixmerge.registry import choices

Mode = Literal["static", "one", "joint", "grid"]
# Rows that are matched at once, so that memory does not grow with them; the sums of a row do not depend on the others.
_ROWS = 64
_LOGITS = 420_000  # on a CPU: more is fresh memory at every step


@dataclass(frozen=True)
class Settings:
    """How experts shift the base.

    Args:
        mode: ``static``: by ``alpha``; ``one``: matched for each token, one expert at a time; ``joint``: all at once;
            ``grid``: ``one`` as published, by trying ``points`` values.
        alpha: of all experts or by name, from -8 to 8; for ``static``. Below 0 an expert is an anti-expert.
        top_p_base: the base keeps its likeliest tokens that have this much probability together; above 0, at most 1.
        clip: nats, above 0: no shift is larger.
        damping: of ``joint``, above 0.
        points: of ``grid``, 2 or more.

    Raises:
        MixmergeError: everything above that does not hold, at once.
    """

    mode: Mode = "one"
    alpha: float | Mapping[str, float] = 1.0
    top_p_base: float | None = None
    clip: float | None = None
    damping: float = 1.0
    points: int = 20

    def __post_init__(self) -> None:
        given = self.alpha if isinstance(self.alpha, Mapping) else {"": self.alpha}
        faults = [
            Fault(f"alpha{'.' if name else ''}{name}", f"is {value}", "From -8 to 8")
            for name, value in given.items()
            if not -8 <= value <= 8
        ]
        if self.mode not in get_args(Mode):
            faults.append(Fault("mode", f"is {self.mode!r}", choices(self.mode, list(get_args(Mode)))))
        wrong = (
            (
                "top_p_base",
                self.top_p_base,
                self.top_p_base is None or 0 < self.top_p_base <= 1,
                "Above 0, at most 1",
            ),
            ("clip", self.clip, self.clip is None or self.clip > 0, "Above 0"),
            ("damping", self.damping, self.damping > 0, "Above 0"),
            ("points", self.points, self.points >= 2, "2 or more"),
        )
        faults += [Fault(name, f"is {value}", allowed) for name, value, right, allowed in wrong if not right]
        if faults:
            raise MixmergeError(faults)

    def fixed(self, experts: Sequence[str]) -> tuple[float, ...]:
        """Alphas of ``static``, in the order of the experts; one that is not named has 0.

        Raises:
            MixmergeError: an expert that there is not.
        """
        if not isinstance(self.alpha, Mapping):
            return (float(self.alpha),) * len(experts)
        faults = [
            Fault(f"alpha.{name}", f"no expert that shifts is called {name!r}", choices(name, list(experts)))
            for name in self.alpha
            if name not in experts
        ]
        if faults:
            raise MixmergeError(faults)
        return tuple(float(self.alpha.get(name, 0.0)) for name in experts)


@dataclass(frozen=True)
class Fused:
    """A step.

    Args:
        logits: ``(N, V)`` float32.
        alphas: ``(N, T)``.
        covered: ``(N,)``: of the base's probability, what lies on tokens that the small models know.
        evaluations: that the search took; 0 if there was none.
    """

    logits: Tensor
    alphas: Tensor
    covered: Tensor
    evaluations: int


def fuse(
    base: Tensor, reference: Tensor, experts: Sequence[Tensor], settings: Settings, alphas: Sequence[float]
) -> Fused:
    """Logits over one vocabulary.

    Args:
        base: ``(N, V)`` float32.
        reference: ``(N, V)`` of the small reference.
        experts: T of ``(N, V)``.
        settings: how.
        alphas: T: of ``static``.

    Returns:
        What does not depend on other rows, row by row; with all alphas 0 the base, bit for bit.
    """
    cut = base if settings.top_p_base is None else nucleus(base, settings.top_p_base)
    shifts = shifts_of(experts, reference, clip=settings.clip)
    covered = base.new_ones(len(base))
    return _shifted(
        cut, shifts, lambda: _wanted(experts, reference, shifts, settings), covered, settings, alphas
    )


def _wanted(
    experts: Sequence[Tensor], reference: Tensor, shifts: Sequence[Tensor], settings: Settings
) -> tuple[Tensor, Tensor]:
    """How far each expert is from the reference; a clipped shift does not tell."""
    return divergences(experts, reference, shifts if settings.clip is None else None)


def match(base: Tensor, shifts: Sequence[Tensor], wanted: tuple[Tensor, Tensor], settings: Settings) -> Found:
    """Strengths by the settings' mode, for ``(N, V)`` logits, T shifts and both ``(N, T)`` divergences."""
    logp = base.log_softmax(dim=-1)
    forward, backward = wanted
    if settings.mode == "grid":
        return match_grid(logp, shifts, forward, backward, points=settings.points)
    if settings.mode == "joint":
        return match_joint(logp, shifts, forward, backward, damping=settings.damping)
    return match_one(logp, shifts, forward, backward)


def fuse_rows(
    base: Tensor,
    reference: Tensor,
    experts: Sequence[Tensor],
    shared: Shared | None,
    settings: Settings,
    alphas: Sequence[float],
) -> Fused:
    """As ``fuse`` for any number of rows, and for small models of vocabularies of their own.

    Each small model's mass is renormalised over the tokens that all of them share with the base; elsewhere the shift is
    0, so that tokens which are not shared keep the base's logit.

    Args:
        base: ``(N, V)`` float32.
        reference: ``(N, W)``.
        experts: T of ``(N, W_t)``.
        shared: the tokens that all know; None where all columns are the same.
        settings, alphas: as of ``fuse``.
    """
    made: list[Fused] = []
    step = max(1, min(_ROWS, _LOGITS // base.shape[-1])) if base.device.type == "cpu" else _ROWS
    for start in range(0, len(base), step):
        some = slice(start, start + step)
        rows = base[some], reference[some].float(), [one[some].float() for one in experts]
        found = (
            fuse(*rows, settings, alphas) if shared is None else _on_shared(*rows, shared, settings, alphas)
        )
        made.append(found)
    if len(made) == 1:
        return made[0]
    logits, strengths, covered = (
        torch.cat([getattr(one, name) for one in made]) for name in ("logits", "alphas", "covered")
    )
    return Fused(logits, strengths, covered, made[0].evaluations)


def _on_shared(
    base: Tensor,
    reference: Tensor,
    experts: Sequence[Tensor],
    shared: Shared,
    settings: Settings,
    alphas: Sequence[float],
) -> Fused:
    """Shifts on the tokens that all small models know, spread over the base's columns."""
    columns = shared.columns
    plain, *tuned = (
        one[:, at] for one, at in zip((reference, *experts), shared.places, strict=True)
    )  # (N, C)
    covered = base.softmax(dim=-1)[:, columns].sum(dim=-1)
    cut = base if settings.top_p_base is None else nucleus(base, settings.top_p_base)
    small = shifts_of(tuned, plain, clip=settings.clip)
    shifts = [torch.zeros_like(base).index_copy_(1, columns, one) for one in small]
    return _shifted(cut, shifts, lambda: _wanted(tuned, plain, small, settings), covered, settings, alphas)


def _shifted(
    base: Tensor,
    shifts: Sequence[Tensor],
    wanted: Callable[[], tuple[Tensor, Tensor]],
    covered: Tensor,
    settings: Settings,
    alphas: Sequence[float],
) -> Fused:
    if settings.mode == "static":
        found = Found(base.new_tensor([alphas]).expand(len(base), -1), covered, 0)
    else:
        found = match(base, shifts, wanted(), settings)
    return Fused(fused(base, shifts, found.alphas), found.alphas, covered, found.evaluations)
