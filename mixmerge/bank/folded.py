"""A mixture that is the same for every row, folded into a model's own weights: it then costs nothing a token.

Legend as in ``records``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixmerge.bank.mix import How, crossed
from mixmerge.bank.records import Bank, Site, side_by_side

Place = tuple[nn.Module, str]


class Folded:
    """The changed tensors of one mixture. They are made at the first ``held``, and live as long as this.

    Args:
        places: of each tensor of the bank, the modules and attributes that hold it.
        bank: on the device of the model.
        weights: ``(E,)``.
        how: as in ``mix.Mix``.
    """

    def __init__(
        self, places: Mapping[str, Sequence[Place]], bank: Bank, weights: Tensor, how: How = "outputs"
    ) -> None:
        self._places, self._bank = places, bank
        self.weights, self.how = weights, how
        self._made: dict[str, nn.Parameter] = {}

    @property
    def exact(self) -> bool:
        """Whether nothing is lost: shorter types round a change away that is small beside the weight it is added to."""
        return all(
            isinstance(value, nn.Parameter) and value.dtype in (torch.float32, torch.float64)
            for held in self._places.values()
            for value in (getattr(*place) for place in held)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the changed tensors, beside those they stand for."""
        kept: list[Tensor] = [getattr(*held[0]) for held in self._places.values()]
        return sum(int(one.numel() * one.element_size()) for one in kept)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within it modules have the changed tensors; after it the very ones they had before, whatever happens."""
        if not self._made:
            self._made = {
                name: _changed(held[0], self._bank, name, self.weights, self.how)
                for name, held in self._places.items()
            }
        before = [(*place, getattr(*place)) for held in self._places.values() for place in held]
        try:
            for name, held in self._places.items():
                for module, attribute in held:
                    setattr(module, attribute, self._made[name])
            yield
        finally:
            for module, attribute, kept in before:
                setattr(module, attribute, kept)


@torch.inference_mode(False)
@torch.no_grad()
def _changed(place: Place, bank: Bank, name: str, weights: Tensor, how: How) -> nn.Parameter:
    """The base's tensor and its mixed change, summed in float32 and rounded once."""
    kept: Tensor = getattr(*place)
    if name in bank.sites:
        delta = _delta(bank.sites[name], weights, how)
        delta = delta.T if _turned(place[0]) else delta
    else:
        deltas = bank.vectors[name].float()
        delta = weights.to(deltas) @ deltas
    return nn.Parameter((kept.float() + delta).to(kept.dtype), requires_grad=False)


def _delta(site: Site, weights: Tensor, how: How) -> Tensor:
    if how == "outputs":
        return site.delta(weights.to(site.scale))
    mixed = side_by_side(site.name, [crossed(site, weights)])
    return mixed.to(site.b.device, torch.float32).delta(torch.ones(1, device=site.b.device))


def _turned(module: nn.Module) -> bool:
    """Whether a layer holds its matrix as inputs x outputs."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
