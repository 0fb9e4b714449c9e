"""Biases and gains of a mixture: what each unit gets of them, gathered and summed.

Legend as in ``picks``; n length of a vector.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from mixmerge.bank.picks import Picks


def mixed_vectors(deltas: Tensor, picks: Picks) -> Tensor:
    """``sum_e w_e * delta_e`` of each unit: ``(m, n)``.

    Args:
        deltas: ``(E, n)``.
        picks: the decision, by expert.
    """
    weights, entries = picks.weights.to(deltas.dtype), picks.entries
    if entries is None:
        return weights @ deltas
    if not picks.each:
        return deltas.new_zeros(picks.units, deltas.shape[1])
    found: Tensor = nn.functional.embedding_bag(entries, deltas, per_sample_weights=weights, mode="sum")
    return found


class Slope:
    """How a norm's output grows with its gain: its output for a gain of 1 less that for 0, since some add 1 to it.

    Args:
        module: linear in its gain.
    """

    def __init__(self, module: nn.Module) -> None:
        self._up, self._down = _with(module, 1.0), _with(module, 0.0)
        # One of the two says it alone: a gain of 0 gives 0; or, where 1 is added to it, just the slope.
        self._plain = not bool(self._down(_probe(module)).any())

    def __call__(self, u: Tensor) -> Tensor:
        slope: Tensor = self._up(u) if self._plain else self._up(u) - self._down(u)
        return slope


def _with(module: nn.Module, gain: float) -> nn.Module:
    made = copy.deepcopy(module)
    made._forward_hooks.clear()
    for name, value in made.named_parameters():
        nn.init.constant_(value, gain if name == "weight" else 0.0)
    return made.requires_grad_(False)


def _probe(module: nn.Module) -> Tensor:
    weight = next(module.parameters())
    return torch.linspace(1, 2, weight.shape[-1], dtype=weight.dtype, device=weight.device)[None, None]
