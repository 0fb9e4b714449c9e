"""What a ``ProcessEngine`` and its worker say to each other: a JSON object a line, in ASCII.

The worker begins with ``{"protocol": VERSION, "id": 0}``. A call is ``{"id", "call", "given"}``; its answer is any
number of ``{"id", "piece"}``, then ``{"id", "gives"}`` or ``{"id", "raises"}``. Calls are answered one by one, in
their order. ``{"id", "call": "cancel"}`` says that no more pieces of a call are wanted, ``{"call": "end"}`` that
nothing is. Nothing is pickled: neither side can make the other run code.
"""

from __future__ import annotations

import inspect
import json
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mixmerge import errors
from mixmerge.engines.base import Engine
from mixmerge.engines.records import Chunk, Generation, Likelihood, Message, Request, Scoring
from mixmerge.engines.shortage import is_shortage
from mixmerge.errors import Fault, MixmergeError, OutOfMemoryError
from mixmerge.registry import choices, find, load

VERSION = 1
LONGEST = 1 << 30  # bytes of a line; more is no answer, but a worker gone wild


class WorkerError(RuntimeError):
    """Something in a worker raised what is no fault of a user: a bug, with the worker's traceback."""


def line_of(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


def message_of(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is not of the protocol."""
    try:
        message = json.loads(line)
    except ValueError:
        return None
    whole = line.endswith(b"\n") and isinstance(message, dict) and isinstance(message.get("id"), int)
    return message if whole else None


def arguments_taken(kind: str) -> frozenset[str]:
    """What an engine of the table, or of ``module:Class``, can be made with.

    Raises:
        MixmergeError: there is no such engine.
    """
    return frozenset(inspect.signature(_class_of(kind)).parameters)


def _class_of(kind: str) -> Any:
    return load(kind) if ":" in kind else find("engine", kind)


def make_engine(kind: str, arguments: Mapping[str, Any], name: str) -> Engine:
    """An engine of the table, or of ``module:Class``, not loaded.

    Raises:
        MixmergeError: there is none, or it does not take the arguments.
    """
    made = _class_of(kind)
    known = {one.name: one for one in inspect.signature(made).parameters.values()}
    given = {"name": name, **arguments} if "name" in known else dict(arguments)
    where = f"engine {name}"
    faults = [
        Fault(f"{where}: {one}", f"{kind} has no such argument", choices(one, list(known)))
        for one in given
        if one not in known
    ]
    faults += [
        Fault(f"{where}: {one.name}", f"is missing: {kind} needs it")
        for one in known.values()
        if one.default is one.empty and one.name not in given
    ]
    if faults:
        raise MixmergeError(faults)
    engine = made(**given)
    if not isinstance(engine, Engine):
        raise MixmergeError(
            Fault(where, f"{kind} is no engine", "A subclass of mixmerge.engines.base.Engine")
        )
    return engine


# --- records


def request_of(data: Mapping[str, Any]) -> Request:
    prompt = data["prompt"]
    turns = prompt if isinstance(prompt, str) else tuple(Message(**turn) for turn in prompt)
    return Request(**{**data, "prompt": turns, "stop": tuple(data["stop"]), "reads": _reads(data)})


def scoring_of(data: Mapping[str, Any]) -> Scoring:
    return Scoring(**{**data, "reads": _reads(data)})


def _reads(data: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    return tuple((name, gate) for name, gate in data["reads"])


def generation_of(data: Mapping[str, Any]) -> Generation:
    logprobs = data["logprobs"]
    return Generation(**{**data, "logprobs": None if logprobs is None else tuple(logprobs)})


def chunk_of(data: Mapping[str, Any]) -> Chunk:
    whole = data["generation"]
    return Chunk(data["text"], None if whole is None else generation_of(whole))


def likelihood_of(data: Mapping[str, Any]) -> Likelihood:
    return Likelihood(**{**data, "logprobs": tuple(data["logprobs"])})


def fault_of(data: Mapping[str, str] | None) -> Fault | None:
    return None if data is None else Fault(**data)


# --- errors


def raised(error: Exception) -> dict[str, Any]:
    """An error as JSON values: a user's fault, memory that ran out, or a bug."""
    if isinstance(error, MixmergeError):
        return {"kind": type(error).__name__, "faults": [asdict(fault) for fault in error.faults]}
    if is_shortage(error):
        return {"kind": "memory", "text": str(error) or "no memory left"}
    return {"kind": "bug", "text": "".join(traceback.format_exception(error))}


def error_of(data: Mapping[str, Any], name: str) -> Exception:
    """The error that was raised in the worker; memory that ran out is OutOfMemoryError, whatever raised it there."""
    if data["kind"] == "memory":
        run = "Give it fewer requests at once"
        return OutOfMemoryError(Fault(f"engine {name}", f"out of memory: {data['text']}", run=run))
    if data["kind"] == "bug":
        return WorkerError(f"engine {name}: its worker raised:\n{data['text']}")
    kind = getattr(errors, data["kind"], MixmergeError)  # a plug-in's own kind is not known here
    return kind([Fault(**fault) for fault in data["faults"]])  # type: ignore[no-any-return]
