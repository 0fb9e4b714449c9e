"""Who is active and who answers, for the rows that the glue learns from.

Legend as in ``records``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixmerge.latent.router import Encode, HashedText, LatentRouter, Routed, Routes, routed_text
from mixmerge.latent.texts import Example

_ROWS = 256  # texts that are encoded together


@dataclass(frozen=True, eq=False)
class Decided:
    """What is decided for the rows of a step.

    Args:
        primary: of each row, who answers: a number of an expert.
        active: of each row, who is active, the primary among them, rising.
        gates: ``(B, M)``, 0 of who is not active; on the CPU.
        routes: of a router that learns: with gradients.
    """

    primary: tuple[int, ...]
    active: tuple[tuple[int, ...], ...]
    gates: Tensor
    routes: Routes | None = None

    def peers(self, row: int) -> tuple[int, ...]:
        return tuple(one for one in self.active[row] if one != self.primary[row])

    def columns(self, rows: Sequence[int], gates: Tensor) -> Tensor:
        """``(rows, K)`` gates as a view takes them: the primary's, its peers', 0 where there are fewer.

        Args:
            rows: places in the step.
            gates: ``(B, M)``, of this decision.
        """
        orders = [(self.primary[row], *self.peers(row)) for row in rows]
        longest = max(map(len, orders))
        at = torch.tensor([[*one, *[one[0]] * (longest - len(one))] for one in orders], device=gates.device)
        there = torch.tensor([[number < len(one) for number in range(longest)] for one in orders])
        taken = gates[list(rows)].gather(1, at)
        return torch.where(there.to(gates.device), taken, torch.zeros_like(taken))

    def groups(self, most: int) -> list[tuple[int, list[int]]]:
        """(primary, places of rows): rows of one primary, those of one active set side by side, at most so many."""
        found: list[tuple[int, list[int]]] = []
        for primary in sorted(set(self.primary)):
            rows = [row for row, one in enumerate(self.primary) if one == primary]
            rows.sort(key=lambda row: self.active[row])
            found += [(primary, rows[start : start + most]) for start in range(0, len(rows), most)]
        return found


class Decider:
    """Decisions for examples.

    Args:
        experts: names, M.
        given: of each example what was decided before; None: ``router`` decides.
        router: that learns, on the CPU.
        encode: texts to features, for the router.
        examples: of ``given`` and of the decisions.
    """

    def __init__(
        self,
        experts: Sequence[str],
        examples: Sequence[Example],
        *,
        given: Sequence[Routed] | None = None,
        router: LatentRouter | None = None,
        encode: Encode | None = None,
    ) -> None:
        self._names, self._given, self.router = tuple(experts), given, router
        self._texts = [routed_text(one.prompt) for one in examples]
        self._encode, self._features = encode, None
        if encode is not None and not isinstance(encode, HashedText):  # of which each text is cheap, and wide
            starts = range(0, len(self._texts), _ROWS)
            self._features = torch.cat([encode(self._texts[at : at + _ROWS]).cpu() for at in starts])

    @property
    def noise(self) -> float:
        """Of the router while it learns; 0 without one."""
        return 0.0 if self.router is None else self.router.options.noise

    def decide(
        self,
        rows: Sequence[int],
        *,
        draw: torch.Generator | None = None,
        primary: Sequence[int] | None = None,
    ) -> Decided:
        """Decide.

        Args:
            rows: places of the examples.
            draw: of the router's noise; None: there is none.
            primary: who answers each row, where that was decided before.
        """
        if self.router is None or self._encode is None:
            return self._told(rows)
        features = (
            self._encode([self._texts[row] for row in rows])
            if self._features is None
            else self._features[list(rows)]
        )
        forced = None if primary is None else torch.tensor(primary)
        routes = self.router(features, draw=draw, primary=forced)
        active = tuple(tuple(one) for one in routes.active.tolist())
        return Decided(tuple(routes.primary.tolist()), active, routes.gates, routes)

    def _told(self, rows: Sequence[int]) -> Decided:
        place = {name: at for at, name in enumerate(self._names)}
        gates = torch.zeros(len(rows), len(self._names))
        primary, active = [], []
        for at, row in enumerate(rows):
            one = (self._given or ())[row]
            primary.append(place[one.primary])
            active.append(tuple(sorted(place[name] for name in one.gates)))
            for name, gate in one.gates.items():
                gates[at, place[name]] = gate
        return Decided(tuple(primary), tuple(active), gates)


@contextmanager
def learning(glue: nn.Module, decider: Decider, seed: int) -> Iterator[None]:
    """Glue and router in training mode, what is drawn within by the seed; all is as before afterwards."""
    parts = [one for one in (glue, decider.router) if one is not None]
    devices = [
        str(one) for one in {parameter.device for parameter in glue.parameters()} if one.type == "cuda"
    ]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for one in parts:
            one.train()
        try:
            yield
        finally:
            for one in parts:
                one.eval()
