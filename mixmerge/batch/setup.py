"""What a job is made of: who answers, how it is decided and composed, where it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mixmerge.aggregate import Composition
from mixmerge.batch.decided import Route
from mixmerge.batch.lines import Line
from mixmerge.batch.placing import Device
from mixmerge.batch.records import Item
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts import ExpertSet

if TYPE_CHECKING:
    from mixmerge.batch.cluster import Cluster

_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")
_MEMORY_SHARE = 0.8  # of what is free, that experts may take


class Source(Protocol):
    """Where requests come from: read once from end to end, then one by one; ``lines.Input`` is one."""

    @property
    def sha256(self) -> str:
        """What tells this input from another; known once it has been scanned."""
        ...

    def scan(self) -> Iterator[Line]: ...

    def lines(self) -> Iterator[Line]: ...

    def read(self, indices: Iterable[int]) -> list[Line]: ...


@dataclass(frozen=True)
class Listed:
    """Requests that are in memory."""

    items: tuple[Item, ...]

    @property
    def sha256(self) -> str:
        return "listed"

    def scan(self) -> Iterator[Line]:
        return self.lines()

    def lines(self) -> Iterator[Line]:
        return iter(self.read(range(len(self.items))))

    def read(self, indices: Iterable[int]) -> list[Line]:
        return [self._line(at) for at in indices]

    @cached_property
    def _first(self) -> dict[str, int]:
        return {item.id: at for at, item in reversed(list(enumerate(self.items)))}

    def _line(self, at: int) -> Line:
        item = self.items[at]
        if self._first[item.id] == at:
            return Line(at, at + 1, 0, item.id, item)
        fault = Fault(f"request {item.id}", "another one has this id", "One id for each")
        return Line(at, at + 1, 0, item.id, None, (fault,))


@dataclass(frozen=True)
class Defaults:
    """How experts generate where neither a request nor the composition says so; as in ``engines.records.Request``."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    explain: bool = False


@dataclass(frozen=True, eq=False)
class Setup:
    """What answers a job.

    Args:
        experts: that may be asked.
        composition: makes one answer of several.
        route: decides who answers.
        whole: the policy has to see all queries at once.
        defaults: of generation.
        identity: hash of the mixture: experts, router, policy, composition, defaults.
    """

    experts: ExpertSet
    composition: Composition
    route: Route
    whole: bool
    defaults: Defaults
    identity: str


@dataclass(frozen=True)
class Conditions:
    """Where and how long a job runs. Answers do not depend on it, but for ``batch_tokens``.

    Args:
        devices: at least one.
        batch_tokens: of a batch, prompts by estimate and what may be generated; 1 or more.
        deadline: seconds after which no further batch is started; None for no end.
        apart: experts on the CPU run in processes of their own too: what kills one does not kill the job.
        cluster: whose slots the devices are; None where they are this machine's.
        latents: bytes of disk for what experts leave others to read; by default half of what is free.
    """

    devices: tuple[Device, ...] = field(default_factory=lambda: (Device("cpu", free_memory()),))
    batch_tokens: int = 8192
    deadline: float | None = None
    apart: bool = False
    cluster: Cluster | None = None
    latents: int | None = None

    def __post_init__(self) -> None:
        faults = []
        if not self.devices:
            faults.append(Fault("devices", "there is none", "cpu, cuda:0, ..."))
        if self.batch_tokens < 1:
            faults.append(Fault("batch_tokens", f"is {self.batch_tokens}", "1 or more"))
        if self.latents is not None and self.latents < 1:
            faults.append(Fault("latents", f"is {self.latents} bytes", "1 or more"))
        if self.deadline is not None and not self.deadline > 0:
            faults.append(Fault("deadline", f"is {self.deadline} seconds", "More than 0"))
        if faults:
            raise MixmergeError(faults)


def devices_of(names: Sequence[str], *, memory: int | None = None) -> tuple[Device, ...]:
    """Devices by their names.

    Args:
        names: ``cpu``, ``cuda`` or ``cuda:N``, each once.
        memory: bytes that experts may take on each; by default a share of what is free there.

    Raises:
        MixmergeError: a name that is none of these or there twice, a GPU that torch does not see; all at once.
    """
    faults = [
        Fault(f"device {name}", "is no device that is known", "cpu, cuda, or cuda:N")
        for name in names
        if not _DEVICE.fullmatch(name)
    ]
    faults += [
        Fault(f"device {name}", "is named twice", "Each once")
        for name in sorted(set(names))
        if names.count(name) > 1
    ]
    gpus = [name for name in names if name.startswith("cuda")]
    if gpus and not faults:
        import torch

        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
        faults += [
            Fault(f"device {name}", f"is not there: torch sees {seen} GPUs", "cpu, or a GPU that it sees")
            for name in gpus
            if int(name.partition(":")[2] or 0) >= seen
        ]
    if faults:
        raise MixmergeError(faults)
    return tuple(Device(name, memory_of(name) if memory is None else memory) for name in names)


def memory_of(device: str) -> int:
    """Bytes that experts may take on a device: a share of what is free there."""
    if not device.startswith("cuda"):
        return free_memory()
    import torch

    free, _ = torch.cuda.mem_get_info(torch.device(device))
    return int(free * _MEMORY_SHARE)


def free_memory() -> int:
    """Bytes that experts may take of this machine's memory."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        return int(kilobytes * 1024 * _MEMORY_SHARE)
    except (OSError, StopIteration):  # not Linux
        return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _MEMORY_SHARE / 2)
