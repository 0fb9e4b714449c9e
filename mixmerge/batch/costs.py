"""What a job took, expert by expert, read from its journal: so a job that was killed between is told whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mixmerge.experts import ExpertSet


@dataclass(frozen=True)
class ExpertCost:
    """What one expert took.

    Args:
        expert: its name.
        answers: generations.
        tokens_in, tokens_out: of their prompts and of what was generated.
        seconds: of its batches; of a batch of several experts its share by tokens.
        cost: dollars by its price; None if it has none.
    """

    expert: str
    answers: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    cost: float | None = None

    @property
    def rate(self) -> float:
        """Generated tokens a second."""
        return self.tokens_out / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True)
class Load:
    """How often a unit was loaded, and how long that took."""

    unit: str
    device: str
    times: int
    seconds: float


@dataclass(frozen=True)
class Report:
    """What a job took.

    Args:
        experts: those that answered, in the order of the set.
        loads: by unit and device.
        naive_loads: that answering the requests one by one would have taken, with one unit in memory.
        requests, answered, failed: of the input; failed ones have an error record.
        splits: batches that were too large and were divided.
    """

    experts: tuple[ExpertCost, ...]
    loads: tuple[Load, ...]
    naive_loads: int
    requests: int
    answered: int
    failed: int
    splits: int

    @property
    def load_seconds(self) -> float:
        return sum(one.seconds for one in self.loads)

    @property
    def cost(self) -> float | None:
        """Dollars of all; None if any expert that answered has no price."""
        costs = [one.cost for one in self.experts]
        return None if any(one is None for one in costs) else sum(one for one in costs if one is not None)

    def as_dict(self) -> dict[str, Any]:
        experts = [{**asdict(one), "tokens_per_second": one.rate} for one in self.experts]
        return {**asdict(self), "experts": experts, "load_seconds": self.load_seconds, "cost": self.cost}


def report(
    events: Iterable[Mapping[str, Any]],
    experts: ExpertSet,
    *,
    naive_loads: int,
    requests: int,
    failed: int,
) -> Report:
    """Sum up the events of a journal."""
    counts = {name: [0, 0, 0] for name in experts.names}
    seconds = dict.fromkeys(experts.names, 0.0)
    loads: dict[tuple[str, str], list[float]] = {}
    splits = 0
    for event in events:
        if "end" in event:
            mine: Mapping[str, list[int]] = event["experts"]
            whole = sum(numbers[2] + 1 for numbers in mine.values())
            for name, numbers in mine.items():
                counts[name] = [a + b for a, b in zip(counts[name], numbers, strict=True)]
                seconds[name] += event["seconds"] * (numbers[2] + 1) / whole
        elif "load" in event:
            loads.setdefault((event["load"], event["device"]), []).append(event["seconds"])
        elif "split" in event:
            splits += 1
    told = []
    for name, (answers, tokens_in, tokens_out) in counts.items():
        if not answers:
            continue
        price = experts[name].price
        cost = None if price is None else (tokens_in * price.input + tokens_out * price.output) / 1e6
        told.append(ExpertCost(name, answers, tokens_in, tokens_out, seconds[name], cost))
    return Report(
        tuple(told),
        tuple(Load(unit, device, len(times), sum(times)) for (unit, device), times in loads.items()),
        naive_loads,
        requests,
        requests - failed,
        failed,
        splits,
    )
