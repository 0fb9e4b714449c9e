"""YAML documents as trees of nodes that know their lines, and the list of everything wrong with one.

What recipes and mixtures are read with. Imports no torch.
"""

from __future__ import annotations

from mixmerge.document.files import read_file
from mixmerge.document.report import (
    Data,
    Kind,
    Node,
    Report,
    Scalar,
    given,
    number,
    read_mapping,
    read_text,
    show,
    unknown_keys,
)
from mixmerge.document.tree import MAX_BYTES, from_data, load, to_data

__all__ = [
    "MAX_BYTES",
    "Data",
    "Kind",
    "Node",
    "Report",
    "Scalar",
    "from_data",
    "given",
    "load",
    "number",
    "read_file",
    "read_mapping",
    "read_text",
    "show",
    "to_data",
    "unknown_keys",
]
