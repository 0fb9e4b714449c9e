"""The other side of a ``RayEngine``: what runs in a Ray actor's process.

Calls are those of ``worker``, and so are their answers, as JSON values. Nothing is raised here: what Ray sees raised
it may write into its logs, with the prompts in it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mixmerge
from mixmerge.engines.base import Engine
from mixmerge.engines.process_wire import make_engine, raised
from mixmerge.engines.worker import ANSWERS, PIECES
from mixmerge.errors import CheckpointError, Fault, MixmergeError

Told = dict[str, Any]  # {"gives": ...} or {"raises": ...}, and "loaded"


class Hosted:
    """An engine in an actor.

    Args:
        threads: that its arithmetic may use; None for as many as its libraries like.
    """

    def __init__(self, threads: int | None) -> None:
        if threads is not None:  # before torch is loaded, which reads it then
            os.environ["OMP_NUM_THREADS"] = str(threads)
        self._engine: Engine | None = None

    def open(self, kind: str, arguments: Mapping[str, Any], name: str, folders: Sequence[str]) -> Told:
        """Make the engine; gives the process and the machine it is in."""

        def make() -> Told:
            missing = [folder for folder in folders if not Path(folder).is_dir()]
            if missing:
                raise CheckpointError([_unseen(folder, name) for folder in missing])
            self._engine = make_engine(kind, arguments, name)
            return {"pid": os.getpid(), "machine": socket.gethostname(), "version": mixmerge.__version__}

        return self._told(make)

    def call(self, what: str, given: Any) -> Told:
        """One call and its answer."""
        return self._told(lambda: self._do(what, given))

    def pieces(self, what: str, given: Any) -> Iterator[Told]:
        """What a call gives piece by piece, then its end."""
        try:
            for piece in PIECES[what](self._made(), given):
                yield {"piece": piece}
        except Exception as error:  # noqa: BLE001  the caller raises it on its side
            yield {"raises": raised(error)}
            return
        yield {"gives": None}

    def _do(self, what: str, given: Any) -> Any:
        engine = self._made()
        if what == "unload":
            return engine.unload()
        return ANSWERS[what](engine, given)

    def _made(self) -> Engine:
        if self._engine is None:
            raise MixmergeError(Fault("worker", "was called before it was opened"))
        return self._engine

    def _told(self, work: Callable[[], Any]) -> Told:
        try:
            told = {"gives": work()}
        except Exception as error:  # noqa: BLE001  the caller raises it on its side
            told = {"raises": raised(error)}
        return {**told, "loaded": self._engine is not None and self._engine.loaded}


def _unseen(folder: str, name: str) -> Fault:
    return Fault(
        f"engine {name}",
        f"{folder} is not there on the cluster's machine {socket.gethostname()}",
        "A folder that all machines see under the same path, or a hub id",
        "Put it on a file system that they share",
    )
