"""A mixture that is the same for every row, folded into a model's own weights: it then costs nothing a token.

Legend as in ``records``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mixmerge.bank.records import Bank

Place = tuple[nn.Module, str]


@contextmanager
def folded(places: Mapping[str, list[Place]], bank: Bank, weights: Tensor) -> Iterator[None]:
    """Within it, modules have changed weights beside the kept ones; after it the very tensors they had before.

    Args:
        places: of each tensor of the bank, the modules and attributes that hold it.
        bank: on the device of the model.
        weights: ``(E,)``.
    """
    before = [
        (module, attribute, getattr(module, attribute))
        for held in places.values()
        for module, attribute in held
    ]
    made = {name: _changed(held[0], bank, name, weights) for name, held in places.items()}
    try:
        for name, held in places.items():
            for module, attribute in held:
                setattr(module, attribute, made[name])
        yield
    finally:
        for module, attribute, kept in before:
            setattr(module, attribute, kept)


@torch.no_grad()
def _changed(place: Place, bank: Bank, name: str, weights: Tensor) -> nn.Parameter:
    """The base's tensor and its mixed change, summed in float32 and rounded once."""
    kept: Tensor = getattr(*place)
    if name in bank.sites:
        site = bank.sites[name]
        delta = site.delta(weights.to(site.scale))
        delta = delta.T if _turned(place[0]) else delta
    else:
        deltas = bank.vectors[name].float()
        delta = weights.to(deltas) @ deltas
    return nn.Parameter((kept.float() + delta).to(kept.dtype), requires_grad=False)


def _turned(module: nn.Module) -> bool:
    """Whether a layer holds its matrix as inputs x outputs."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
