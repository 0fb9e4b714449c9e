"""Query-level routers live here, imported as ``mixmerge.routers``."""

from __future__ import annotations

if __name__ != "mixmerge.routers":
    raise ImportError("import mixmerge.routers, not routers")
