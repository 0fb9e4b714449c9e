"""Memory that runs out, told in one way."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

from mixmerge.errors import Fault, OutOfMemoryError

T = TypeVar("T")
_SAID = ("allocate memory", "bad_alloc", "out of memory")  # by torch's CPU allocator, by C++, by CUDA


def is_shortage(error: BaseException) -> bool:
    """Whether it says that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    return any(one in text for one in _SAID)


def within_memory(work: Callable[[], T], *, where: str, what: str, run: str) -> T:
    """What ``work`` gives.

    Args:
        work: anything; what it has made is let go before the error is raised.
        where, what, run: of the fault.

    Raises:
        OutOfMemoryError: it ran out of memory.
    """
    try:
        return work()
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_shortage(error):
            raise
        reason = (str(error).strip().splitlines() or ["no memory left"])[0]
    # Out of the handler: an error that knew the other one would keep its frames, and all tensors in them.
    gc.collect()
    raise OutOfMemoryError(Fault(where, f"{what}: {reason}", run=run))
