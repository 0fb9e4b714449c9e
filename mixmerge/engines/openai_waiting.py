"""How long to wait before a server is asked again. All times are in seconds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|[smhd]))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_EPOCH = 1e9  # a number above it is a time, not a span: thirty years


def backoff(attempt: int, *, base: float, most: float, uniform: float) -> float:
    """A random part of a bound that doubles with every attempt ("full jitter").

    Source: Brooker, Exponential Backoff And Jitter (AWS Architecture Blog, 2015).

    Args:
        attempt: how many have failed before this one, 0 or more.
        base: the first bound, above 0.
        most: no bound is larger.
        uniform: a number in [0, 1).
    """
    return uniform * min(most, base * 2.0 ** min(attempt, 60))  # the power of a large attempt is no float


def asked_wait(headers: Mapping[str, str], now: float) -> float | None:
    """How long the server asks to wait; None if it does not say, or says what cannot be read.

    ``retry-after-ms`` comes first, then ``retry-after`` (seconds or a date), then the longest ``x-ratelimit-reset-*``
    of a limit that is used up (``x-ratelimit-remaining-*`` is 0 or not there).

    Args:
        headers: of the response; names in lower case.
        now: seconds since 1970, for dates.
    """
    milliseconds = _number(headers.get("retry-after-ms", ""))
    if milliseconds is not None:
        return milliseconds / 1000
    after = headers.get("retry-after", "")
    wait = _number(after)
    if wait is None:
        wait = _until(after, now)
    if wait is not None:
        return wait
    resets = []
    for name, value in headers.items():
        if name.startswith("x-ratelimit-reset"):
            remaining = headers.get(name.replace("reset", "remaining"), "0")
            span = read_span(value, now)
            if span is not None and not (_number(remaining) or 0) > 0:
                resets.append(span)
    return max(resets, default=None)


def read_span(text: str, now: float) -> float | None:
    """``1.5``, ``20ms``, ``6m0s`` or seconds since 1970 as a span from now on; None for anything else."""
    number = _number(text)
    if number is not None:
        return max(0.0, number - now) if number > _EPOCH else number
    text = text.strip().lower()
    if not _SPAN.fullmatch(text):
        return None
    return sum(float(amount) * _UNITS[unit] for amount, unit in _PART.findall(text))


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None


def _until(text: str, now: float) -> float | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, date.timestamp() - now)
