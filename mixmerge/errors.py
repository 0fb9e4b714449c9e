"""Every fault a user can cause. The command line prints these as one line each and exits with 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong: ``where: what. allowed. run.``

    Args:
        where: a path in the recipe (``models[1].parameters.weight``), a file, or a command-line option.
        what: what is wrong there.
        allowed: what exists or is allowed instead.
        run: what to do or run next.
    """

    where: str
    what: str
    allowed: str = ""
    run: str = ""

    def __str__(self) -> str:
        parts = [part.rstrip(".") + "." for part in (self.what, self.allowed, self.run) if part]
        return f"{self.where}: {' '.join(parts)}"


class MixmergeError(Exception):
    """A fault of input, environment or use; anything else that is raised is a bug of ours."""

    def __init__(self, faults: Fault | Iterable[Fault]) -> None:
        self.faults: tuple[Fault, ...] = (faults,) if isinstance(faults, Fault) else tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class RecipeError(MixmergeError):
    """The recipe cannot mean what it says: typos, wrong types, inputs that do not fit together."""


class CheckpointError(MixmergeError):
    """A file of a checkpoint or adapter is missing, damaged, hostile or not supported."""


class OutputError(MixmergeError):
    """The output cannot be written: it exists, is locked, or the disk refused."""


class MethodError(MixmergeError):
    """A method got tensors or parameters it is not defined for."""


class DependencyError(MixmergeError):
    """An optional package is needed and not installed."""


class OutOfMemoryError(MixmergeError):
    """A batch is too large for the memory that is left: half of it may do."""


class StoppedError(MixmergeError):
    """A job was cancelled, its time is up, or what it runs on is gone; what it has done is kept. Exit code 3."""


class EngineDiedError(MixmergeError):
    """The process of an engine ended by itself, was killed, or was ended because it hung; its next call starts another.

    ``exit_code`` is the process's, minus the signal's number if a signal ended it; None if it never ran.
    """

    def __init__(self, faults: Fault | Iterable[Fault], *, exit_code: int | None = None) -> None:
        super().__init__(faults)
        self.exit_code = exit_code


@contextmanager
def collecting(faults: list[Fault]) -> Iterator[None]:
    """Add what is wrong with one of several things to a list, each fault once, and go on with the next.

    Args:
        faults: to be raised as one ``MixmergeError`` when all were looked at.
    """
    try:
        yield
    except MixmergeError as error:
        faults.extend(fault for fault in error.faults if fault not in faults)
