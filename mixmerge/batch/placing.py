"""Which device runs which group, in what order: longest processing time first.

Source: Graham, Bounds on Multiprocessing Timing Anomalies (SIAM J. Applied Mathematics 17, 1969).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixmerge.batch.ordering import ordered
from mixmerge.batch.plan import Group
from mixmerge.errors import Fault, MixmergeError

LOAD_RATE = 1e9  # bytes a second that a load is expected to take
TOKEN_WORK = 2e-11  # seconds a token and byte of weights, where the prompt's tokens count a tenth
REMOTE = "remote"


@dataclass(frozen=True)
class Device:
    """Where experts run.

    Args:
        name: a torch device such as ``cpu`` or ``cuda:0``.
        memory: bytes that experts may take there.
    """

    name: str
    memory: int


@dataclass(frozen=True, eq=False)
class Placement:
    """What a device does, in this order.

    Args:
        device: ``REMOTE`` for what endpoints answer.
        groups: in the order they run.
        seconds: expected, loads and generation; a rough number, good to compare groups by.
    """

    device: str
    groups: tuple[Group, ...]
    seconds: float


def load_seconds(group: Group) -> float:
    return 0.0 if group.remote else group.bytes / LOAD_RATE


def seconds(group: Group) -> float:
    """Expected seconds of a group: its load, and its tokens by the size of its weights."""
    return load_seconds(group) + (group.new + 0.1 * group.prompt) * max(group.bytes, 1_000_000) * TOKEN_WORK


def place(
    groups: Sequence[Group], devices: Sequence[Device], *, loaded: frozenset[str] = frozenset()
) -> list[Placement]:
    """Groups on devices: the longest first, each to the device that is free first and has room for it.

    A group that alone takes longer than its share of all devices is divided, if that saves more than another load.
    A device starts with what is loaded there already, then goes from the longest to the shortest. Where groups read
    what others offer, every device keeps to one order of all of them, so that none waits for what waits for it.

    Args:
        groups: of a stage; those of endpoints are placed apart.
        devices: at least one.
        loaded: units that are in memory.

    Raises:
        MixmergeError: an expert is larger than every device; all of them at once.
    """
    local = [group for group in groups if not group.remote]
    _refuse(local, devices)
    queues: list[list[Group]] = [[] for _ in devices]
    busy = [0.0] * len(devices)
    parts = [part for group in local for part in _parts(group, local, len(devices))]
    for group in sorted(parts, key=lambda one: (-seconds(one), one.unit)):
        able = [at for at, device in enumerate(devices) if device.memory >= group.bytes]
        # A part of a unit that the device has already costs no other load there.
        best = min(able, key=lambda at: (busy[at] + _costs(group, queues[at]), at))
        busy[best] += _costs(group, queues[best])
        queues[best] = _joined(queues[best], group)
    first = _first(local, loaded)
    placed = [
        Placement(device.name, tuple(sorted(queue, key=first)), time)
        for device, queue, time in zip(devices, queues, busy, strict=True)
        if queue
    ]
    remote = tuple(group for group in groups if group.remote)
    return [*placed, Placement(REMOTE, remote, 0.0)] if remote else placed


def _first(groups: Sequence[Group], loaded: frozenset[str]) -> Callable[[Group], int]:
    """What a device's groups are sorted by."""
    if not any(group.reads for group in groups):
        return lambda one: int(one.unit not in loaded)
    places = {(one.unit, one.reads): at for at, one in enumerate(ordered(groups, seconds))}
    return lambda one: places[one.unit, one.reads]


def _costs(group: Group, queue: Sequence[Group]) -> float:
    there = any(one.unit == group.unit for one in queue)
    return seconds(group) - (load_seconds(group) if there else 0.0)


def _joined(queue: list[Group], group: Group) -> list[Group]:
    """The queue with the group: parts of one group on one device are whole again."""
    for at, one in enumerate(queue):
        if (one.unit, one.reads) == (group.unit, group.reads):
            whole = replace(
                one,
                batches=(*one.batches, *group.batches),
                prompt=one.prompt + group.prompt,
                new=one.new + group.new,
            )
            return [*queue[:at], whole, *queue[at + 1 :]]
    return [*queue, group]


def _parts(group: Group, groups: Sequence[Group], devices: int) -> list[Group]:
    share = sum(seconds(one) for one in groups) / devices
    work = seconds(group) - load_seconds(group)
    count = min(devices, len(group.batches), math.ceil(seconds(group) / share) if share > 0 else 1)
    if count < 2 or work / count + load_seconds(group) >= work:
        return [group]
    chosen = np.array_split(np.arange(len(group.batches)), count)
    tokens = group.calls
    made = []
    for part in chosen:
        batches = tuple(group.batches[at] for at in part)
        calls = sum(len(batch.calls) for batch in batches)
        made.append(
            replace(
                group,
                batches=batches,
                prompt=group.prompt * calls // tokens,
                new=group.new * calls // tokens,
            )
        )
    return made


def _refuse(groups: Sequence[Group], devices: Sequence[Device]) -> None:
    most = max(device.memory for device in devices)
    faults = [
        Fault(
            f"experts {', '.join(one.name for one in group.experts)}",
            f"take {group.bytes / 1e9:,.2f} GB, and the largest device has {most / 1e9:,.2f} GB for experts",
            "An expert that fits into one device",
            "Raise --memory if there is more, or name a larger device",
        )
        for group in groups
        if group.bytes > most
    ]
    if faults:
        raise MixmergeError(faults)
