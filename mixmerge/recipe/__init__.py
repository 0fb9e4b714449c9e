"""Merge recipes: strict reading of the YAML, one canonical form, and the values it gives each tensor.

``parse`` and ``read`` turn YAML into a ``Recipe`` and collect every fault of it, each with its path and
line. The format is mergekit's (``models:`` form) plus ``seed``, ``output`` and a few parameters of our own.
Imports no torch.
"""

from __future__ import annotations

from mixmerge.recipe.calibration import Calibration
from mixmerge.recipe.reading import parse, read
from mixmerge.recipe.references import ModelRef
from mixmerge.recipe.resolving import (
    TensorValues,
    chosen_expert,
    interpolate,
    layer_position,
    resolve,
    resolve_tensor,
)
from mixmerge.recipe.schema import (
    Conditional,
    ModelEntry,
    Output,
    Parsed,
    Recipe,
    Setting,
    canonical,
    dump,
    inputs,
)

__all__ = [
    "Calibration",
    "Conditional",
    "ModelEntry",
    "ModelRef",
    "Output",
    "Parsed",
    "Recipe",
    "Setting",
    "TensorValues",
    "canonical",
    "chosen_expert",
    "dump",
    "inputs",
    "interpolate",
    "layer_position",
    "parse",
    "read",
    "resolve",
    "resolve_tensor",
]
