"""A gate as two files, ``gate.json`` and ``gate.safetensors``: its settings, its tensors, and the bank it is for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmerge import registry
from mixmerge.bank.gate import Gate
from mixmerge.bank.publishing import unwritable
from mixmerge.checkpoint.identity import digest
from mixmerge.checkpoint.reader import read_json
from mixmerge.errors import CheckpointError, Fault, MixmergeError

GATE, GATE_STATE = "gate.json", "gate.safetensors"
_FORMAT, _VERSION = "mixmerge-gate", 1
_REFIT = "Fit the gate again"
# What settings raise that no gate has written.
_DAMAGED = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError)


def save_gate(folder: Path, gate: Gate, *, bank: str, experts: Sequence[str] = ()) -> None:
    """Write a gate into a folder, as ``gate.json`` and ``gate.safetensors``; one that is there is replaced.

    Args:
        folder: is made.
        gate: of a kind in ``GATES``.
        bank: hash of the bank it is for (``BankCard.hash``), or of whatever stands for one.
        experts: that it knows, in the bank's order.

    Raises:
        MixmergeError: a value of it is not finite.
        OutputError: the disk refuses.
    """
    state = {name: one.detach().cpu().clone().contiguous() for name, one in gate.state_dict().items()}
    wrong = sorted(
        name for name, one in state.items() if one.is_floating_point() and not one.isfinite().all()
    )
    if wrong:
        raise MixmergeError(
            Fault(f"gate {gate.kind}", f"{wrong[0]} holds NaN or Inf", run="Fit it at a lower rate")
        )
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / GATE).unlink(missing_ok=True)  # until both files are there it is no gate
        partial = folder / f".{GATE_STATE}"
        save_file(state, partial)
        partial.chmod(0o644)
        card = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": gate.kind,
            "settings": gate.settings(),
            "bank": bank,
            "experts": list(experts),
            "sha256": digest([partial]),
        }
        partial.replace(folder / GATE_STATE)
        written = folder / f".{GATE}"
        written.write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        written.replace(folder / GATE)
    except OSError as error:
        raise unwritable(folder / GATE, error) from error


def load_gate(
    folder: Path, *, bank: str, earlier: Sequence[str] = (), experts: Sequence[str] | None = None
) -> Gate:
    """Read a gate, in evaluation mode.

    Args:
        folder: that has ``gate.json``.
        bank: hash of the bank it is to be used with.
        earlier: hashes of the banks that this one only adds experts to (``BankCard.earlier``): a gate for one of those
            is taken if it is ``open_to_new``.
        experts: of the bank: those the gate knows must come first among them, in their order.

    Raises:
        CheckpointError: there is none; it is damaged, was changed, or is of another version.
        MixmergeError: no gate is of that kind; it is for another bank, or other experts.
    """
    path = Path(folder) / GATE
    if not path.is_file():
        raise CheckpointError(Fault(str(folder), "holds no gate", f"A folder with {GATE}", "mixmerge fit"))
    card = _gate_card(path)
    kind: type[Gate] = registry.find("gate", card["kind"])
    if card["bank"] != bank and not (kind.open_to_new and card["bank"] in earlier):
        allowed = f"This one is for {card['bank'][:12]}, the bank is {bank[:12]}"
        if card["bank"] in earlier:
            allowed = f"Experts were added to its bank, of which a gate {card['kind']} knows nothing"
        raise MixmergeError(Fault(str(path), "is a gate for another bank", allowed, _REFIT))
    known = card["experts"]
    if experts is not None and known and list(experts)[: len(known)] != known:
        what = f"knows the experts {', '.join(known)}, the bank has {', '.join(experts)}"
        raise MixmergeError(Fault(str(path), what, "The same, in the same order", _REFIT))
    state = _gate_state(Path(folder) / GATE_STATE, card["sha256"])
    try:
        with torch.device("meta"):  # settings may ask for more memory than there is
            wanted = {name: one.shape for name, one in kind.build(card["settings"]).state_dict().items()}
        if wanted != {name: one.shape for name, one in state.items()}:
            raise ValueError(f"its settings are of other tensors than {GATE_STATE} has")
        gate = kind.build(card["settings"])
        gate.load_state_dict(state)
    except _DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(Fault(str(path), f"is damaged: {reason}", run=_REFIT)) from error
    return gate.eval()


def _gate_card(path: Path) -> dict[str, Any]:
    card = read_json(path)
    if card.get("format") != _FORMAT:
        raise CheckpointError(Fault(str(path), "is not a gate's card", f"format: {_FORMAT}"))
    if card.get("version") != _VERSION:
        what = f"is of version {card.get('version')!r}"
        raise CheckpointError(Fault(str(path), what, f"This mixmerge reads version {_VERSION}", _REFIT))
    types = {"kind": str, "settings": dict, "bank": str, "experts": list, "sha256": str}
    wrong = sorted(name for name, kind in types.items() if not isinstance(card.get(name), kind))
    if wrong:
        raise CheckpointError(Fault(str(path), f"is damaged: {wrong[0]} is missing or wrong", run=_REFIT))
    return card


def _gate_state(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(Fault(str(path), "is missing", run=_REFIT))
    if digest([path]) != sha256:
        raise CheckpointError(
            Fault(str(path), "was changed after it was written: its hash differs", run=_REFIT)
        )
    try:
        state: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(Fault(str(path), f"is damaged: {error}", run=_REFIT)) from error
    wrong = sorted(
        name for name, one in state.items() if one.is_floating_point() and not one.isfinite().all()
    )
    if wrong:
        raise CheckpointError(Fault(str(path), f"{wrong[0]} holds NaN or Inf", run=_REFIT))
    return state
