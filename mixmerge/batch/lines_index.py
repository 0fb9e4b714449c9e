"""Where the records of a job are, in a few bytes for each."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from hashlib import blake2b

_EMPTY = -1


class Index:
    """Of every record: the offset and number of its line, and a checksum.

    Names are kept as 8 bytes of a hash in a table with open addressing, so that a name that is there twice is seen
    at once; whoever has the text compares the names themselves. 28 bytes for a record and 8 to 16 of the table: the
    texts are not in memory.
    """

    def __init__(self) -> None:
        self.offsets, self.numbers, self.sums = array("q"), array("q"), array("I")
        self.earlier: dict[int, int] = {}  # record with the name of an earlier one -> that one
        self._hashes = array("Q")
        self._slots = array("i", [_EMPTY]) * 64
        self._named = 0

    def __len__(self) -> int:
        return len(self.offsets)

    def add(
        self, offset: int, number: int, checksum: int, name: str, has_name: Callable[[int], bool]
    ) -> int | None:
        """Add a record; the earlier one of the same name if there is one.

        Args:
            name: "" if it has none.
            has_name: whether an earlier record really has this name.
        """
        at = len(self)
        self.offsets.append(offset)
        self.numbers.append(number)
        self.sums.append(checksum)
        encoded = name.encode("utf-8", "surrogatepass")
        value = int.from_bytes(blake2b(encoded, digest_size=8).digest(), "little") if name else 0
        self._hashes.append(value)
        if not name:
            return None
        if 2 * self._named >= len(self._slots):
            self._grow()
        place = value & (len(self._slots) - 1)
        while (other := self._slots[place]) != _EMPTY:
            if self._hashes[other] == value and has_name(other):
                self.earlier[at] = other
                return other
            place = (place + 1) & (len(self._slots) - 1)
        self._slots[place] = at
        self._named += 1
        return None

    def _grow(self) -> None:
        held = [at for at in self._slots if at != _EMPTY]
        self._slots = array("i", [_EMPTY]) * (2 * len(self._slots))
        mask = len(self._slots) - 1
        for at in held:
            place = self._hashes[at] & mask
            while self._slots[place] != _EMPTY:
                place = (place + 1) & mask
            self._slots[place] = at
