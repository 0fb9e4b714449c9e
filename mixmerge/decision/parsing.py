"""Lines of files and the JSON in them, as strictly as they can be read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

_BOM = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Readable(Protocol):
    def readline(self, size: int, /) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file as it is stored.

    Args:
        number: from 1.
        offset: of its first byte.
        data: with its end; the first ``most + 1`` bytes of one that is too long.
        too_long: it has more than ``most`` bytes.
    """

    number: int
    offset: int
    data: bytes
    too_long: bool = False

    def text(self, *, errors: str = "strict") -> str:
        """Without a byte order mark at the start of the file, and with its end.

        Raises:
            UnicodeDecodeError: it is not UTF-8.
        """
        return (self.data.removeprefix(_BOM) if self.offset == 0 else self.data).decode("utf-8", errors)


def raw_lines(file: Readable, *, most: int, number: int = 1, offset: int = 0) -> Iterator[Line]:
    """Every line of an open file; of those with more than ``most`` bytes the beginning.

    Args:
        most: bytes of a line.
        number, offset: of the first line.
    """
    while data := file.readline(most + 1):
        size, too_long = len(data), len(data) > most
        rest = data
        while too_long and rest and not rest.endswith(b"\n"):
            rest = file.readline(most)
            size += len(rest)
        yield Line(number, offset, data, too_long)
        number, offset = number + 1, offset + size


def parse_json(text: str) -> Any:
    """A JSON value: its numbers are finite, its keys there once, its texts valid Unicode.

    Raises:
        ValueError: it is none; the message quotes none of its values.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant, parse_float=_finite)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from error
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a surrogate pair") from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(str(error).split(";")[0]) from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping from pairs; ValueError for a key that is there twice."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the key {name[:60]!r} is there twice")
        found[name] = value
    return found


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is no number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is too large")
    return value
