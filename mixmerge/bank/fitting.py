"""Gates from experts and rows of text: which kind takes what, and the one function that fits any of them.

No expert and no base changes: what learns is the gate alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import BaseModel, ValidationError
from torch import Tensor

from mixmerge.bank.fitting_job import Encode, Job, Progress, only, without_progress
from mixmerge.bank.gate import Gate
from mixmerge.bank.gates.places import Places
from mixmerge.bank.gates.prototypes import PrototypeGate
from mixmerge.bank.records import Bank
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import LoadedExpert
from mixmerge.registry import choices, find, load, table


def gate_options(kind: str, said: Mapping[str, Any], *, where: str = "gate") -> BaseModel | None:
    """The options of a kind of gate, as a mapping says them; None for a kind that has none.

    Args:
        kind: a name in ``GATES``.
        said: key -> value.
        where: for messages.

    Raises:
        MixmergeError: no such kind; everything that is wrong with the options.
    """
    model = find("gate", kind).options
    if model is None:
        if said:
            raise MixmergeError([Fault(f"{where}.{name}", f"{kind} has no options") for name in said])
        return None
    try:
        read: BaseModel = model.model_validate(dict(said))
    except ValidationError as error:
        raise MixmergeError([_fault(one, model, where) for one in error.errors()]) from error
    return read


def fit_gate(
    kind: str,
    said: Mapping[str, Any],
    bank: Bank,
    *,
    model: LoadedExpert | None = None,
    rows: Mapping[str, Sequence[Row]] | None = None,
    given: Mapping[str, Tensor] | None = None,
    encode: Encode | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    where: str = "gate",
) -> Gate:
    """A gate for a bank, on the CPU. Same arguments, same gate; the bank and the model stay as they are.

    Args:
        kind: a name in ``GATES``.
        said: its options, as ``gate_options`` takes them.
        bank: of the experts.
        model: the base, with its tokenizer; for a gate whose ``wants`` names it.
        rows: of each expert, by its name: what it was trained for. Of ``lorahub`` and ``xlora`` all rows count, under
            any names. Answers are predicted where rows have them, else whole texts, and classes by classifiers.
        given: tensors of a router trained elsewhere, by ``SITE.NAME``.
        encode: texts to features ``(N, f)``, by the encoder that will read the queries.
        seed: of the order of the rows and of what starts at random.
        progress: called with (what, steps done, steps in all, loss; None where there is none).
        where: for messages.

    Raises:
        MixmergeError: all that is wrong with kind, options, bank or data, before anything is computed; a loss that is
            not finite.
        DependencyError: ``lorahub`` without ``nevergrad``.
    """
    options = gate_options(kind, said, where=where)
    found: type[Gate] = find("gate", kind)
    job = Job(
        bank,
        model,
        rows or {},
        given or {},
        encode,
        seed,
        without_progress if progress is None else progress,
        where,
    )
    faults = [fault for want in found.wants for fault in job.lacking(want, kind)]
    unknown = set(job.rows) - set(bank.experts) if "rows of each expert" in found.wants else set()
    faults += [
        Fault(f"{where}: rows", f"there is no expert {name!r}", choices(name, list(bank.experts)))
        for name in sorted(unknown)
    ]
    if options is not None:
        faults += found.faults(bank, options)
    if faults:
        raise MixmergeError(faults)
    if not found.fitter:
        return found.build({})
    made: Gate = load(found.fitter)(found, options, job)
    return made.cpu().eval().requires_grad_(False)


def with_expert(
    gate: Gate,
    bank: Bank,
    *,
    description: str = "",
    model: LoadedExpert | None = None,
    rows: Sequence[Row] = (),
    encode: Encode | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    where: str = "gate",
) -> Gate:
    """A gate for one expert more, which alone is fitted; for the others it is the gate it was.

    Args:
        gate: of the bank without its last expert.
        bank: with it.
        description: what the new expert is for, for ``glider``; without one its rows say it.
        model, encode, seed, progress, where: as in ``fit_gate``.
        rows: of the new expert.

    Raises:
        MixmergeError: a kind that is fitted for all experts at once, such as ``xlora`` and ``lora_mixer``; a bank of
            another number of experts; as ``fit_gate``.
    """
    if not gate.grows:
        raise MixmergeError(grows_not(gate.kind, where=where))
    count = gate.known()
    if count is not None and count + 1 != len(bank.experts):
        what = f"is of {count} experts, and the bank has {len(bank.experts)}"
        raise MixmergeError(Fault(where, what, "A bank with one expert more, the last"))
    options = getattr(gate, "said", None)
    faults = [] if options is None else gate.faults(bank, options)
    if faults:
        raise MixmergeError(faults)
    if not isinstance(gate, PrototypeGate):
        return gate.grown(bank).cpu().eval().requires_grad_(False)
    newcomer = bank.experts[-1]
    said = gate.said.model_dump()
    if "descriptions" in said:
        said["descriptions"] = {newcomer: description} if description else {}
    part = fit_gate(
        gate.kind,
        said,
        only(bank, len(bank.experts) - 1),
        model=model,
        rows={newcomer: rows} if rows else {},
        encode=encode,
        seed=seed,
        progress=progress,
        where=where,
    )
    joined: Gate = type(gate).joined(Places.of(bank), [gate, cast(PrototypeGate[Any], part)])
    return joined.cpu().eval().requires_grad_(False)


def grows_not(kind: str, *, where: str = "gate") -> Fault:
    """What a user is told who adds an expert to a gate of a kind that takes none."""
    can = sorted(name for name in table("gate") if find("gate", name).grows)
    what = f"{kind} is fitted for all its experts at once, so none can be added to it"
    run = "Name the expert in the mixture's YAML, and fit that: mixmerge fit MIXTURE.yaml OUT"
    return Fault(where, what, f"These can take more: {', '.join(can)}", run)


def _fault(error: Any, model: type[BaseModel], where: str) -> Fault:
    at = ".".join([where, *map(str, error["loc"])])
    if error["type"] == "extra_forbidden":
        known = list(model.model_fields)
        return Fault(
            at, "there is no such option", choices(str(error["loc"][-1]), known) if known else "It has none"
        )
    return Fault(at, f"is {error['input']!r}", error["msg"])
