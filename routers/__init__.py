"""Query-level routers: which expert would answer a query how well. Imported as ``mixmerge.routers``.

``ROUTERS`` is the table of their names; a package of yours adds one by an entry point of the group
``mixmerge.router`` that gives such a row, and tests it with ``mixmerge.routers.contract``.
"""

from __future__ import annotations

from dataclasses import dataclass

if __name__ != "mixmerge.routers":
    raise ImportError("import mixmerge.routers, not routers")


@dataclass(frozen=True)
class RouterRow:
    """One router.

    Args:
        target: ``module:Class`` of a ``mixmerge.routers.base.Router``.
        summary: what it does, in a line.
        paper: where it is from; "" for textbook methods.
        reference: it looks at the outcomes of the very queries it scores (oracles): for evaluation only.
    """

    target: str
    summary: str
    paper: str = ""
    reference: bool = False


ROUTERS: dict[str, RouterRow] = {
    "knn": RouterRow(
        "mixmerge.routers.nearest:NearestRouter",
        "mean score of the nearest queries, shrunk to the expert's mean",
    ),
}
