"""Any engine in a Ray actor, on whichever machine of a cluster its slot is."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mixmerge
from mixmerge.engines.apart import ApartEngine
from mixmerge.engines.process_wire import error_of
from mixmerge.engines.ray_actor import Hosted
from mixmerge.errors import EngineDiedError, Fault, MixmergeError, OutOfMemoryError, StoppedError

SHARE = (
    0.001  # of a slot's GPU that an actor is counted with: what fits into its memory is for the caller to say
)


@dataclass(frozen=True, eq=False)
class Slot:
    """A part of a cluster that is held for us: a placement group of one bundle.

    Args:
        name: ``ray:0``, ``ray:1``, ...
        group: Ray's placement group.
        cpus: that it holds.
        gpu: it holds a GPU.
        memory: bytes that experts may take there.
        machine: where it was when it was taken.
    """

    name: str
    group: Any
    cpus: int
    gpu: bool
    memory: int = 0
    machine: str = ""

    def options(self) -> dict[str, Any]:
        """Of Ray's tasks and actors, so that they run there."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=0)
        return {"num_cpus": 0, "num_gpus": SHARE if self.gpu else 0, "scheduling_strategy": strategy}


class RayEngine(ApartEngine):
    """An engine that answers in a Ray actor, started when it is needed and killed by ``unload``.

    What the engine raises is raised here, as ``ProcessEngine`` says. If the actor's process ends, its machine is lost
    or it hangs, calls in flight raise EngineDiedError; the next call starts a new actor. Prompts go to the actor and
    texts come back as values of its calls: in no log, no name and no error of Ray's. A stream that is left early is
    generated to its end there. Actors end with the process that started them. Needs the extra ``ray``.

    Args:
        kind: a name in the table of engines, or ``module:Class``; it must be importable here and there.
        arguments: of that engine, by name; JSON values.
        name: what errors call it; the engine inside gets it as well.
        slot: where it runs; several engines may be in one.
        folders: that it reads, as absolute paths; refused with a word where the slot's machine does not have them.
        start_timeout: seconds until the actor must have started; above 0. Loading the expert is not in it.
        timeout: seconds that a call may take, above 0; then it counts as hung. None for any time.
        grace: seconds that the engine has to unload before the actor is killed; 0 or more.

    Raises:
        MixmergeError: there is no such engine, or it refuses its arguments, or they are no JSON values.
    """

    def __init__(
        self,
        kind: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        name: str,
        slot: Slot,
        folders: Sequence[str] = (),
        start_timeout: float = 120.0,
        timeout: float | None = None,
        grace: float = 10.0,
    ) -> None:
        super().__init__(
            kind, arguments, name=name, start_timeout=start_timeout, timeout=timeout, grace=grace
        )
        self.slot, self.folders = slot, tuple(folders)
        self.load_seconds = 0.0
        self._actor: Any = None
        self._about: dict[str, Any] = {}
        self._loaded = False
        self._starting = threading.Lock()

    @property
    def loaded(self) -> bool:
        return self._actor is not None and self._loaded

    @property
    def pid(self) -> int | None:
        """The actor's process, on ``machine``; None if there is none."""
        return self._about["pid"] if self._actor is not None else None

    @property
    def machine(self) -> str | None:
        """The name of the machine the actor is on; None if there is none."""
        return self._about["machine"] if self._actor is not None else None

    def load(self) -> None:
        if not self.loaded:
            start = time.perf_counter()
            self._ask("load")
            self.load_seconds = time.perf_counter() - start

    def unload(self) -> None:
        """Kill the actor."""
        import ray
        from ray.exceptions import RayError

        with self._starting:
            actor, self._actor, self._loaded = self._actor, None, False
        if actor is None or not ray.is_initialized():
            return
        with contextlib.suppress(RayError):  # first, so that the device's memory is free when this returns
            ray.get(actor.call.remote("unload", None), timeout=self.grace)
        ray.kill(actor)

    def _ask(self, what: str, given: Any = None) -> Any:
        actor = self._started()
        told = self._get(actor, actor.call.remote(what, given), what, self.timeout)
        self._loaded = bool(told["loaded"])
        return self._given(told)

    def _pieces(self, what: str, given: Any) -> Iterator[Any]:
        actor = self._started()
        for one in actor.pieces.options(num_returns="streaming").remote(what, given):
            told = self._get(actor, one, what, self.timeout)
            if "piece" not in told:
                self._given(told)
                self._loaded = True
                return
            yield told["piece"]

    def _given(self, told: Mapping[str, Any]) -> Any:
        if "raises" in told:
            raise error_of(told["raises"], self.name)
        return told["gives"]

    def _get(self, actor: Any, reference: Any, what: str, timeout: float | None) -> Any:
        """The value of a call.

        Raises:
            EngineDiedError: it will never come.
            OutOfMemoryError: Ray ended the process because its machine's memory ran out.
        """
        import ray
        from ray import exceptions

        try:
            return ray.get(reference, timeout=timeout)
        except exceptions.GetTimeoutError as error:
            self._drop(actor)
            said = f"{what} took longer than {timeout:g} s, so its Ray worker was killed"
            raise EngineDiedError(Fault(f"engine {self.name}", said)) from error
        except exceptions.OutOfMemoryError as error:
            self._drop(actor)
            run = "Give it fewer requests at once"
            raise OutOfMemoryError(Fault(f"engine {self.name}", "out of memory", run=run)) from error
        except exceptions.RayError as error:
            self._drop(actor)
            said = f"its Ray worker on {self.slot.name} ended: {_first_line(error)}"
            raise EngineDiedError(Fault(f"engine {self.name}", said)) from error

    def _drop(self, actor: Any) -> None:
        import ray
        from ray.exceptions import RayError

        with self._starting:
            if self._actor is actor:
                self._actor, self._loaded = None, False
        with contextlib.suppress(RayError):
            ray.kill(actor)

    def _started(self) -> Any:
        ray = imported()
        with self._starting:
            if self._actor is not None:
                return self._actor
            threads = None if self.slot.gpu else self.slot.cpus
            actor = ray.remote(Hosted).options(**self.slot.options()).remote(threads)
            try:
                told = ray.get(
                    actor.open.remote(self.kind, self.arguments, self.name, self.folders),
                    timeout=self.start_timeout,
                )
                about = self._given(told)
                _same_version(about, self.name)
            except ray.exceptions.GetTimeoutError as error:
                ray.kill(actor)
                raise _lost(self.slot, self.start_timeout) from error
            except ray.exceptions.RayError as error:
                said = f"its Ray worker on {self.slot.name} did not start: {_first_line(error)}"
                raise EngineDiedError(Fault(f"engine {self.name}", said)) from error
            except MixmergeError:
                ray.kill(actor)
                raise
            self._about, self._actor = about, actor
            return actor


def imported() -> Any:
    """Ray.

    Raises:
        DependencyError: it is not installed.
    """
    from mixmerge.errors import DependencyError

    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise DependencyError(
            Fault("ray", "is not installed", run="Run: pip install 'mixmerge[ray]'")
        ) from error
    return ray


def _same_version(about: Mapping[str, Any], name: str) -> None:
    if about["version"] != mixmerge.__version__:
        what = f"mixmerge is {about['version']} on {about['machine']}, and {mixmerge.__version__} here"
        raise MixmergeError(Fault(f"engine {name}", what, "The same version on all machines"))


def _lost(slot: Slot, seconds: float) -> StoppedError:
    return StoppedError(
        Fault(
            slot.name,
            f"started no worker within {seconds:g} s: its machine is lost, and no other has room for it",
            run="Run the same command: it goes on with the machines that are there",
        )
    )


def _first_line(error: BaseException) -> str:
    """Of what Ray says: the rest are its stacks and identifiers."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[0][:300] if said else type(error).__name__
