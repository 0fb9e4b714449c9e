"""An engine of a plug-in, which says what it was asked, takes its time, and wants memory for every request."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path

from mixmerge.engines.base import Engine
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.records import Generation, Request

ROW = 100 << 20  # bytes that a request takes


class Hungry(Engine):
    """Args: ``delay``: seconds of a batch and of a load; ``rows``: whose memory the process has, 0 for any."""

    def __init__(
        self, model: str, *, name: str, device: str = "cpu", delay: float = 0.0, rows: int = 0
    ) -> None:
        super().__init__(name)
        self._echo, self.delay, self.rows = EchoEngine(name, delay=delay), delay, rows

    @property
    def loaded(self) -> bool:
        return self._echo.loaded

    def load(self) -> None:
        time.sleep(self.delay)
        self._echo.load()
        if self.rows:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + self.rows * ROW + ROW // 2
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

    def unload(self) -> None:
        self._echo.unload()

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        if not self.loaded:
            self.load()
        taken = [bytearray(ROW) for _ in requests] if self.rows else []
        made = self._echo.generate(requests)
        taken.clear()
        return made
