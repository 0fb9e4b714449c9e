"""Gates by name. A package of yours adds one by an entry point of the group ``mixmerge.gate``."""

from __future__ import annotations

GATES: dict[str, str] = {
    "given": "mixmerge.bank.gate:RowGate",
}
