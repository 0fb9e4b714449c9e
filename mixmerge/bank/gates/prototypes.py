"""Gates that score a site's inputs by tensors of each expert, fitted for one expert without the others.

Legend as in ``gate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

from mixmerge.bank.gate import Run
from mixmerge.bank.gates.places import PerSite, Places, Said, SiteGate
from mixmerge.bank.mix import Mix


class PrototypeGate(SiteGate[Said]):
    """Scores of all experts by what is kept of each, ``prototypes[site]`` of ``(E, ...)``; the best k are taken.

    One expert's part never depends on the others, so gates of single experts join to the gate of all, and later ones
    can be added.
    """

    grows = True
    learned: ClassVar[bool] = False

    def __init__(self, places: Places, options: Said) -> None:
        super().__init__(places, options)
        empty = {site: torch.zeros(places.experts, *self.shape(site)) for site in places.widths}
        self.prototypes = PerSite(empty, learned=self.learned)

    def shape(self, site: str) -> tuple[int, ...]:
        """Of what is kept of one expert at a site."""
        return (self.places.widths[site],)

    def scores(self, site: str, u: Tensor, run: Run) -> Tensor:
        """``(..., E)`` of inputs ``(..., d)``."""
        raise NotImplementedError

    def pick(self, scores: Tensor, absent: Tensor | None) -> Mix:
        """The weights that scores ``(..., E)`` give."""
        raise NotImplementedError

    def decide(self, site: str, u: Tensor, run: Run) -> Mix:
        return self.pick(self.scores(site, u, run), self.absent.get(site))

    @classmethod
    def joined(cls, places: Places, parts: Sequence[Self]) -> Self:
        """One gate of gates with the same options: their experts one after the other.

        Args:
            places: of the bank of all these experts.
            parts: one or more, of the same kind.
        """
        whole = cls.like(places, parts)
        with torch.no_grad():
            for site in places.widths:
                pieces = [
                    one.prototypes[site]
                    if site in one.prototypes
                    else torch.zeros(one.places.experts, *whole.shape(site))
                    for one in parts
                ]
                whole.prototypes[site].copy_(torch.cat([piece.cpu() for piece in pieces]))
        return whole

    @classmethod
    def like(cls, places: Places, parts: Sequence[Self]) -> Self:
        """An empty gate of other places with the options of these."""
        return cls(places, parts[0].said)
