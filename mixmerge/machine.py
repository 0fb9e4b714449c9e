"""What this machine gives: cores, and a place for what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinities


def cache_root() -> Path:
    """``$MIXMERGE_CACHE``, by default ``~/.cache/mixmerge``: trained zoos, compiled loops. It need not exist.

    Raises:
        RuntimeError: neither that variable nor a home folder is set.
    """
    return Path(os.environ.get("MIXMERGE_CACHE") or Path("~/.cache/mixmerge").expanduser())
