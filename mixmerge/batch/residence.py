"""What is in a device's memory: units are loaded once, stay while there is room, and leave the longest unused first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from mixmerge.engines.base import Engine
from mixmerge.errors import EngineDiedError, Fault, MixmergeError

RETRIES = 2  # of a load whose process died
Loaded = Callable[[str, float], None]  # (unit, seconds)


@dataclass
class _Held:
    engine: Engine
    bytes: int
    pinned: bool
    users: int = 0
    used: float = 0.0
    ready: threading.Event = field(default_factory=threading.Event)
    error: MixmergeError | None = None


class Residence:
    """The units of one device. Several threads may ask.

    Args:
        memory: bytes they may take together.
        open_engine: an engine of a unit, not loaded.
        size: bytes of a unit; 0 if that is not known.
        pinned: whether a unit stays once it is loaded.
        loaded: told of every load.
    """

    def __init__(
        self,
        memory: int,
        *,
        open_engine: Callable[[str], Engine],
        size: Callable[[str], int],
        pinned: Callable[[str], bool],
        loaded: Loaded,
    ) -> None:
        self.memory = memory
        self._open, self._size, self._pinned, self._loaded = open_engine, size, pinned, loaded
        self._held: dict[str, _Held] = {}
        self._free = threading.Condition()

    @property
    def units(self) -> frozenset[str]:
        """What is loaded, or being loaded."""
        with self._free:
            return frozenset(self._held)

    @contextmanager
    def use(self, unit: str) -> Iterator[Engine]:
        """A loaded engine, which stays loaded until the block is left.

        Raises:
            MixmergeError: it cannot be loaded, or never fits.
        """
        held = self._take(unit, wait=True)
        assert held is not None  # it waits
        try:
            held.ready.wait()
            if held.error is not None:
                raise held.error
            yield held.engine
        finally:
            with self._free:
                held.users -= 1
                held.used = time.monotonic()
                if held.error is not None and self._held.get(unit) is held:
                    del self._held[unit]
                self._free.notify_all()

    def prepare(self, unit: str) -> None:
        """Load a unit ahead, if there is room beside what is in use; else nothing. Faults wait for ``use``."""
        held = self._take(unit, wait=False)
        if held is None:
            return
        with self._free:
            held.users -= 1
            held.used = time.monotonic()
            self._free.notify_all()

    def close(self) -> None:
        """Unload everything."""
        with self._free:
            held, self._held = list(self._held.values()), {}
        for one in held:
            one.engine.unload()

    def _take(self, unit: str, *, wait: bool) -> _Held | None:
        """Reserve the unit, and load it if nobody has."""
        size = self._size(unit)
        with self._free:
            while (held := self._held.get(unit)) is None:
                if self._make_room(size):
                    held = _Held(self._open(unit), size, self._pinned(unit))
                    self._held[unit] = held
                    held.users += 1
                    break
                if not wait:
                    return None
                if not any(one.users for one in self._held.values()):
                    raise MixmergeError(
                        Fault(
                            unit,
                            f"takes {size / 1e9:,.2f} GB, and what is pinned leaves less",
                            run="Pin fewer",
                        )
                    )
                self._free.wait()
            else:
                held.users += 1
                return held
        self._load(unit, held)
        return held

    def _make_room(self, size: int) -> bool:
        """Unload what has not been used for longest, until it fits; nothing if it never would."""
        taken = sum(one.bytes for one in self._held.values())
        idle = [name for name, one in self._held.items() if not one.users and not one.pinned]
        if taken + size > self.memory and taken + size - sum(self._held[n].bytes for n in idle) > self.memory:
            return False
        for name in sorted(idle, key=lambda name: self._held[name].used):
            if taken + size <= self.memory:
                break
            gone = self._held.pop(name)
            gone.engine.unload()
            taken -= gone.bytes
        return True

    def _load(self, unit: str, held: _Held) -> None:
        start = time.perf_counter()
        try:
            _load_engine(held.engine)
        except MixmergeError as error:
            held.error = error
        else:
            self._loaded(unit, time.perf_counter() - start)
        finally:
            held.ready.set()


def _load_engine(engine: Engine) -> None:
    """Load it; a process that died under it, which says nothing about the expert, is started again."""
    for _ in range(RETRIES):
        try:
            engine.load()
            return
        except EngineDiedError:
            continue
    engine.load()
