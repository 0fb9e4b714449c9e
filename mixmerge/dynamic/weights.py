"""Weights of a bank's experts as people say them. B rows, E experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

Named = Mapping[str, float]
Weights = Tensor | Named | Sequence[float] | Sequence[Named]
_ALLOWED = "By name, or a number for each expert, of all rows or of each"


def fixed_weights(weights: Named, experts: Sequence[str], *, where: str = "weights") -> Tensor:
    """``(E,)`` float32: of experts that are not named 0.

    Raises:
        MixmergeError: names that are none of the experts', or weights that are not finite; all at once.
    """
    faults = [
        Fault(f"{where}.{name}", "is no expert of the bank", choices(name, list(experts)))
        for name in weights
        if name not in experts
    ]
    faults += [
        Fault(f"{where}.{name}", f"is {value!r}", "A finite number")
        for name, value in weights.items()
        if not isinstance(value, int | float) or not math.isfinite(value)
    ]
    if not weights:
        faults.append(Fault(where, "there are none", f"Known: {', '.join(experts)}"))
    if faults:
        raise MixmergeError(faults)
    return torch.tensor([float(weights.get(name, 0.0)) for name in experts])


def weights_of_rows(weights: Weights, experts: Sequence[str], rows: int) -> Tensor:
    """``(B, E)`` float32.

    Args:
        weights: one mixture for all rows, by name or ``(E,)``; or one for each, named or ``(B, E)``.
        experts: names, in the bank's order.
        rows: B.

    Raises:
        MixmergeError: as ``fixed_weights``; numbers of another shape.
    """
    if not isinstance(weights, Mapping | Tensor | Sequence):
        raise MixmergeError(Fault("weights", f"are {weights!r}", _ALLOWED))
    if isinstance(weights, Mapping):
        return fixed_weights(weights, experts).expand(rows, -1)
    if not isinstance(weights, Tensor) and any(isinstance(one, Mapping) for one in weights):
        named = [one if isinstance(one, Mapping) else {} for one in weights]
        made = torch.stack(
            [fixed_weights(one, experts, where=f"weights[{at}]") for at, one in enumerate(named)]
        )
    else:
        try:
            made = torch.as_tensor(weights, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise MixmergeError(Fault("weights", f"are {weights!r}", _ALLOWED)) from error
    shape = tuple(made.shape)
    if made.dim() == 1:
        made = made.expand(rows, -1)
    if tuple(made.shape) != (rows, len(experts)):
        what = f"are of shape {shape}"
        allowed = f"({len(experts)},), or ({rows}, {len(experts)}): rows x experts"
        raise MixmergeError(Fault("weights", what, allowed))
    if not bool(made.isfinite().all()):
        raise MixmergeError(Fault("weights", "are not all finite"))
    return made
