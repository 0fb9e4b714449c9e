"""The merge methods by name: what each takes, what it needs, and where its definition is. Imports no torch.

A row is data; the definition it names is a pure function of tensors. Adding a method is a function and a row, in
the file of rows of its family.
"""

from __future__ import annotations

from mixmerge.methods import (
    rows_dynamic,
    rows_learned,
    rows_masks,
    rows_plain,
    rows_spectral,
    rows_statistics,
)
from mixmerge.methods.records import ALL, ANY, REQUIRED, Method, Parameter, Role, Value

__all__ = ["ALL", "ANY", "METHODS", "REQUIRED", "Method", "Parameter", "Role", "Value"]

_FAMILIES = (
    rows_plain.ROWS,
    rows_masks.ROWS,
    rows_spectral.ROWS,
    rows_statistics.ROWS,
    rows_learned.ROWS,
    rows_dynamic.ROWS,
)
METHODS: dict[str, Method] = {row.name: row for rows in _FAMILIES for row in rows}
