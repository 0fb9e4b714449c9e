"""Decisions of a job, kept in a file beside its journal: made once, read by row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mixmerge.batch.journal import data_of, fault_of, line_at, line_of
from mixmerge.batch.plan import Integers
from mixmerge.batch.records import Item
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.errors import MixmergeError

BLOCK = 4_096  # requests that are decided at a time
Route = Callable[[Sequence[Query]], Sequence[Decision]]


class Decided:
    """Decisions in a file, one line for each row that has one.

    Args:
        path: of the file.
        rows: of the job.
    """

    def __init__(self, path: Path, rows: int) -> None:
        self._path = path
        self._offsets: Integers = np.full(rows, -1, np.int64)
        self.faults: dict[int, str] = {}

    def make(
        self, items: Iterable[tuple[int, Item]], route: Route, *, whole: bool, progress: Callable[[int], None]
    ) -> None:
        """Decide every request that names no expert, unless the file is there and complete.

        Args:
            items: rows and their requests.
            route: decisions of queries.
            whole: the policy has to see all queries at once.
            progress: told how many more are decided.
        """
        if self._read():
            return
        partial = self._path.with_suffix(".partial")
        try:
            with partial.open("wb") as file:
                place = 0
                left = iter(items)
                while block := list(islice(left, None if whole else BLOCK)):
                    for row, data in self._decide(block, route):
                        self._offsets[row] = place
                        place += file.write(line_of({"row": row, **data}))
                    progress(len(block))
                file.write(line_of({"complete": int((self._offsets >= 0).sum())}))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self._path)
        except OSError as error:
            raise fault_of(partial, error) from error

    def of(self, row: int) -> Decision | None:
        """Who answers a request; None if nobody could be asked about it."""
        offset = int(self._offsets[row])
        if offset < 0:
            return None
        data = data_of(line_at(self._file, offset))
        return None if data is None or "decision" not in data else _decision(data["decision"])

    @cached_property
    def _file(self) -> int:
        return os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if "_file" in self.__dict__:
            os.close(self.__dict__.pop("_file"))

    def _decide(
        self, block: Sequence[tuple[int, Item]], route: Route
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        asked: list[tuple[int, Query]] = []
        for row, item in block:
            if item.expert is not None:
                yield row, {"decision": named(item).as_dict()}
                continue
            try:
                asked.append((row, Query(item.text, id=item.id, metadata=item.metadata)))
            except MixmergeError as error:
                self.faults[row] = str(error.faults[0])
                yield row, {"fault": self.faults[row]}
        decisions = route([query for _, query in asked]) if asked else []
        for (row, _), decision in zip(asked, decisions, strict=True):
            yield row, {"decision": decision.as_dict()}

    def _read(self) -> bool:
        """Whether the file is there, whole and without damage."""
        if not self._path.exists():
            return False
        place, count = 0, 0
        with self._path.open("rb") as file:
            for line in file:
                data = data_of(line)
                if data is None:
                    break
                if "complete" in data:
                    if data["complete"] == count:
                        return True
                    break
                self._offsets[data["row"]] = place
                if "fault" in data:
                    self.faults[data["row"]] = data["fault"]
                place, count = place + len(line), count + 1
        self._offsets[:] = -1
        self.faults.clear()
        return False


def named(item: Item) -> Decision:
    """The decision of a request that names its expert."""
    expert = str(item.expert)
    return Decision(item.id, (Pick(expert),), expert, {}, "named", {"rule": "the request names it"}, "")


def _decision(data: dict[str, Any]) -> Decision:
    picks = tuple(Pick(**pick) for pick in data["picks"])
    return Decision(**{**data, "picks": picks})
