"""What a killed fit goes on from: one file, written whole or not at all, and a lock on its folder."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW

from mixmerge.bank.publishing import unwritable
from mixmerge.errors import Fault, OutputError

FILE, _PARTIAL, _LOCK = "state.safetensors", "state.partial", "lock"


@dataclass(frozen=True)
class Saved:
    """A fit under way.

    Args:
        tensors: by name.
        facts: JSON values.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def of(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without that."""
        return {
            name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)
        }


def write_state(folder: Path, saved: Saved, job: str) -> None:
    """Put it in the place of what was saved before.

    Args:
        folder: of the work.
        saved: it.
        job: hash of all that the fit depends on.

    Raises:
        OutputError: the disk refuses.
    """
    partial = folder / _PARTIAL
    try:
        tensors = {name: one.detach().cpu().contiguous() for name, one in saved.tensors.items()}
        save_file(tensors, partial, metadata={"job": job, "facts": json.dumps(dict(saved.facts))})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(folder / FILE)
    except (OSError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else OSError(str(error))
        raise unwritable(folder, reason) from error


def read_state(folder: Path, job: str) -> Saved | None:
    """What was saved of this job; None if nothing was, or it is damaged or of another job."""
    if not (folder / FILE).is_file():
        return None
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            told = file.metadata() or {}
            if told.get("job") != job:
                return None
            names = list(file.keys())
            return Saved({name: file.get_tensor(name) for name in names}, json.loads(told["facts"]))
    except (OSError, SafetensorError, ValueError, KeyError):
        return None


@contextmanager
def alone(folder: Path, out: Path) -> Iterator[None]:
    """Keep a folder of work to this process; the kernel lets go of it with a killed one.

    Raises:
        OutputError: another process has it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / _LOCK).open("w")
    except OSError as error:
        raise unwritable(folder, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            what = "another fit is writing it"
            raise OutputError(Fault(str(out), what, run="Wait for it, or name another folder")) from error
        yield


def optimiser_state(adam: AdamW, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The moments of every parameter that has any, by its name."""
    return {
        f"{key}:{name}": value
        for name, one in named.items()
        for key, value in adam.state.get(one, {}).items()
    }


def put_optimiser_state(adam: AdamW, named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """The opposite of ``optimiser_state``."""
    for key, value in state.items():
        kind, _, name = key.partition(":")
        one = named[name]
        adam.state[one][kind] = value.clone() if kind == "step" else value.to(one.device, one.dtype).clone()
