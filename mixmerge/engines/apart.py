"""What engines have in common that answer outside of this process."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mixmerge.engines.base import Engine
from mixmerge.engines.process_wire import chunk_of, fault_of, generation_of, likelihood_of, make_engine
from mixmerge.engines.records import Chunk, Generation, Likelihood, Request, Scoring
from mixmerge.errors import Fault, MixmergeError


class ApartEngine(Engine):
    """An engine of the table that runs elsewhere; a subclass says where, and how it is asked.

    Args:
        kind: a name in the table of engines, or ``module:Class``; it must be importable here too.
        arguments: of that engine, by name; JSON values.
        name: what errors call it; the engine inside gets it as well.
        start_timeout: seconds until it must have started, above 0.
        timeout: seconds that it may be silent while it has something to do, above 0; None for any time.
        grace: seconds that it has to end by itself; 0 or more.

    Raises:
        MixmergeError: there is no such engine, or it refuses its arguments, or they are no JSON values.
    """

    def __init__(
        self,
        kind: str,
        arguments: Mapping[str, Any] | None,
        *,
        name: str,
        start_timeout: float,
        timeout: float | None,
        grace: float,
    ) -> None:
        super().__init__(name)
        _refuse_times(name, start_timeout=start_timeout, timeout=timeout, grace=grace)
        self.kind, self.arguments = kind, _as_json(arguments or {}, name)
        self.start_timeout, self.timeout, self.grace = start_timeout, timeout, grace
        # Never loaded: it refuses wrong arguments at once, and says what it can without being started.
        self._twin = make_engine(kind, self.arguments, name)
        self.capabilities = self._twin.capabilities  # type: ignore[misc]  # each kind has its own
        self.batch_exact = self._twin.batch_exact  # type: ignore[misc]

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._twin.adapters

    def memory(self) -> int | None:
        found: int | None = self._ask("memory") if self.loaded else self._twin.memory()
        return found

    def prepare(self, requests: Sequence[Request]) -> None:
        self._ask("prepare", [asdict(request) for request in requests])

    def check(self, requests: Sequence[Request]) -> list[Fault | None]:
        return [fault_of(one) for one in self._ask("check", [asdict(request) for request in requests])]

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        return [
            generation_of(one) for one in self._ask("generate", [asdict(request) for request in requests])
        ]

    def generate_each(self, requests: Sequence[Request]) -> list[Generation | Fault]:
        given = self._ask("generate_each", [asdict(request) for request in requests])
        return [Fault(**one["fault"]) if "fault" in one else generation_of(one) for one in given]

    def stream(self, request: Request) -> Iterator[Chunk]:
        if "stream" not in self.capabilities:
            raise self._cannot("stream")
        return (chunk_of(one) for one in self._pieces("stream", asdict(request)))

    def loglikelihood(self, scorings: Sequence[Scoring]) -> list[Likelihood]:
        return [likelihood_of(one) for one in self._ask("loglikelihood", [asdict(one) for one in scorings])]

    @abstractmethod
    def _ask(self, what: str, given: Any = None) -> Any:
        """What the engine gives to a call, as JSON values; raises what it raised."""

    @abstractmethod
    def _pieces(self, what: str, given: Any) -> Iterator[Any]:
        """What it gives piece by piece, likewise."""


def _as_json(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    faults, found = [], {}
    for key, value in arguments.items():
        try:
            found[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError) as error:
            faults.append(
                Fault(f"engine {name}: {key}", f"cannot go to another process: {error}", "JSON values")
            )
    if faults:
        raise MixmergeError(faults)
    return found


def _refuse_times(name: str, *, start_timeout: float, timeout: float | None, grace: float) -> None:
    wrong = [
        (not start_timeout > 0, "start_timeout", start_timeout, "Seconds above 0"),
        (timeout is not None and not timeout > 0, "timeout", timeout, "Seconds above 0, or None"),
        (not grace >= 0, "grace", grace, "Seconds, 0 or more"),
    ]
    faults = [
        Fault(f"engine {name}: {key}", f"is {value!r}", allowed) for bad, key, value, allowed in wrong if bad
    ]
    if faults:
        raise MixmergeError(faults)
