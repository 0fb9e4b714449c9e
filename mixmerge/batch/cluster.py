"""The machines of a Ray cluster as devices of a job: ``ray:0``, ``ray:1``, ...

A slot is a GPU with a share of its machine's CPUs, or some CPUs where no machine has a GPU. Ray holds it for the job
until the job ends. Ray also finds the machines, starts the processes and says when one is gone; placing, order and
journal are the job's own, in the process that runs it.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from mixmerge.batch.placing import Device
from mixmerge.batch.setup import free_memory, memory_of
from mixmerge.engines.ray import Slot, imported
from mixmerge.errors import Fault, MixmergeError
from mixmerge.machine import cores

LOCAL = "local"
CPUS = 4
STORE = 200_000_000  # bytes of shared memory for Ray's objects on a local cluster: texts are small
WAIT, KNOCK = 60.0, 10.0  # seconds for slots, and for a cluster to say that it is there


@dataclass(frozen=True, eq=False)
class Cluster:
    """Slots that are held, until it is closed.

    Args:
        slots: at least one.
        own: it was started or joined here, and is left when it is closed.
    """

    slots: tuple[Slot, ...]
    own: bool

    @classmethod
    def open(
        cls,
        address: str = LOCAL,
        *,
        cpus: int = CPUS,
        memory: int | None = None,
        local_cpus: int | None = None,
        wait: float = WAIT,
    ) -> Cluster:
        """Start a cluster on this machine, or join one, and take its slots.

        Where this process is in a cluster already, that one is used, and stays when this is closed.

        Args:
            address: ``local`` to start one, which Ray guards by a token; ``auto`` for the one that this machine is
                part of; ``host:port`` of its head.
            cpus: of a slot, where no machine has a GPU; 1 or more. A machine with fewer is one slot.
            memory: bytes that experts may take in a slot; None: what its machine has free, shared by its slots.
            local_cpus: that a cluster started here has; None for those of this machine.
            wait: seconds for slots that others use; then those that are free are taken. Above 0.

        Raises:
            DependencyError: Ray is not installed.
            MixmergeError: no cluster answers; no slot is free; its machines cannot run this mixmerge.
        """
        _refuse(address, cpus, local_cpus, wait)
        ray = imported()
        if ":" in address:
            _knock(address)
        own = not ray.is_initialized()
        if own:
            _connect(ray, address, local_cpus)
        else:
            _same(ray, address)
        try:
            slots = _slots(ray, bundles(ray.nodes(), cpus), wait)
            return cls(_measured(ray, slots, memory), own)
        except BaseException:
            if own:
                ray.shutdown()
            raise

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(Device(slot.name, slot.memory) for slot in self.slots)

    def slot(self, name: str) -> Slot:
        """The slot of a device.

        Raises:
            MixmergeError: it is not of this cluster.
        """
        for slot in self.slots:
            if slot.name == name:
                return slot
        known = ", ".join(slot.name for slot in self.slots)
        raise MixmergeError(Fault(f"device {name}", "is not of the cluster", f"Known: {known}"))

    def close(self) -> None:
        """Give the slots back; nothing if the cluster is gone."""
        ray = imported()
        if not ray.is_initialized():
            return
        for slot in self.slots:
            ray.util.remove_placement_group(slot.group)
        if self.own:
            ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def bundles(nodes: Sequence[Mapping[str, Any]], cpus: int) -> list[dict[str, int]]:
    """What each slot holds, of all a cluster's machines: a GPU each if there are any, else CPUs.

    Args:
        nodes: as Ray lists them.
        cpus: of a slot without a GPU; at most so many beside a GPU.
    """
    alive = [one["Resources"] for one in nodes if one["Alive"]]
    found: list[dict[str, int]] = []
    with_gpu = [one for one in alive if one.get("GPU", 0) >= 1]
    for one in with_gpu:
        gpus = int(one["GPU"])
        beside = min(cpus, int(one.get("CPU", 0)) // gpus)
        found += [{"GPU": 1, **({"CPU": beside} if beside else {})}] * gpus
    for one in [] if with_gpu else alive:
        whole = int(one.get("CPU", 0))
        if whole:
            found += [{"CPU": min(cpus, whole)}] * max(1, whole // cpus)
    return found


def _refuse(address: str, cpus: int, local_cpus: int | None, wait: float) -> None:
    faults = []
    if address.startswith("ray://"):
        allowed = "auto on a machine of the cluster, or host:port of its head; local to start one"
        faults.append(Fault("--ray", f"{address}: Ray Client is not supported", allowed))
    if cpus < 1:
        faults.append(Fault("--ray-cpus", f"is {cpus}", "1 or more"))
    if local_cpus is not None and local_cpus < 1:
        faults.append(Fault("local_cpus", f"is {local_cpus}", "1 or more"))
    if not wait > 0:
        faults.append(Fault("wait", f"is {wait} seconds", "More than 0"))
    if faults:
        raise MixmergeError(faults)


def _connect(ray: Any, address: str, local_cpus: int | None) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address == LOCAL:
            with _without_statistics():
                ray.init(
                    address=LOCAL,
                    num_cpus=local_cpus or cores(),
                    include_dashboard=False,
                    object_store_memory=STORE,
                    **quiet,
                )
        else:
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _silent(address, error) from error


def _silent(address: str, error: Exception) -> MixmergeError:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    what = "does not start" if address == LOCAL else f"no cluster answers at {address}"
    run = "" if address == LOCAL else "Start one with: ray start --head"
    return MixmergeError(Fault("--ray", f"{what}: {said}", run=run))


def _same(ray: Any, address: str) -> None:
    """Refuse another cluster than the one that this process is in."""
    joined = ray.get_runtime_context().gcs_address
    if ":" in address and address != joined:
        what = f"{address}: this process is in the cluster at {joined} already"
        raise MixmergeError(Fault("--ray", what, "auto", "Call ray.shutdown() to leave it"))


def _knock(address: str) -> None:
    """Refuse in seconds an address where nobody is: Ray tries for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _silent(address, error) from error


@contextmanager
def _without_statistics() -> Iterator[None]:
    """What is started in the block sends none to Ray's makers, unless the user has said otherwise."""
    name = "RAY_USAGE_STATS_ENABLED"
    if name in os.environ:
        yield
        return
    os.environ[name] = "0"
    try:
        yield
    finally:
        del os.environ[name]


def _slots(ray: Any, wanted: Sequence[Mapping[str, int]], wait: float) -> list[Slot]:
    """Those that are free within ``wait`` seconds."""
    groups = [ray.util.placement_group([dict(bundle)]) for bundle in wanted]
    end, slots = time.monotonic() + wait, list[Slot]()
    for group, bundle in zip(groups, wanted, strict=True):
        if group.wait(timeout_seconds=max(0.1, end - time.monotonic())):
            slots.append(Slot(f"ray:{len(slots)}", group, bundle.get("CPU", 0), "GPU" in bundle))
        else:
            ray.util.remove_placement_group(group)
    if not slots:
        there = f"has no CPU or GPU that is free within {wait:g} s" if wanted else "has no CPU and no GPU"
        raise MixmergeError(Fault("--ray", f"the cluster {there}", run="See: ray status"))
    return slots


def _measured(ray: Any, slots: Sequence[Slot], memory: int | None) -> tuple[Slot, ...]:
    """The slots with where they are, and what experts may take there."""
    try:
        found = ray.get([ray.remote(look).options(**slot.options()).remote(slot.gpu) for slot in slots])
    except ray.exceptions.RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise MixmergeError(
            Fault(
                "--ray",
                f"the cluster's machines cannot run mixmerge: {lines[-1] if lines else type(error).__name__}",
                "The same Python, mixmerge and its extras on all machines",
            )
        ) from error
    here = Counter(machine for machine, _ in found)
    return tuple(
        replace(
            slot,
            machine=machine,
            memory=memory if memory is not None else free // (1 if slot.gpu else here[machine]),
        )
        for slot, (machine, free) in zip(slots, found, strict=True)
    )


def look(gpu: bool) -> tuple[str, int]:
    """The name of this machine, and bytes that experts may take of its memory, or of its first visible GPU's."""
    return socket.gethostname(), memory_of("cuda:0") if gpu else free_memory()
