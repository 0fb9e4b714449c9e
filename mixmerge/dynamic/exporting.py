"""Fixed mixtures of a network as ordinary folders: a checkpoint, or an adapter for PEFT or vLLM. E experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from mixmerge.bank.files import load_bank
from mixmerge.bank.mix import How
from mixmerge.dynamic.folders import Parts, checked_card, gate_of
from mixmerge.dynamic.weights import Named, fixed_weights
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

Form = Literal["checkpoint", "adapter", "vllm"]


def own_mixture(parts: Parts) -> tuple[dict[str, float], How]:
    """The weights that a network's gate gives every token, by expert, and how they mix.

    Raises:
        MixmergeError: bank or gate are damaged, or of another base; its gate has no weights of its own, or they depend
            on the input.
    """
    card = checked_card(parts)
    gate = gate_of(parts, card)
    kind, found = ("given", None) if gate is None else (gate.kind, gate.fixed())
    if found is None:
        what = f"are not said, and the gate {kind} has none that are the same for every input"
        run = "Say them: --weights NAME=WEIGHT,..."
        raise MixmergeError(Fault("weights", what, f"Experts: {', '.join(card.experts)}", run))
    weights, how = found
    return dict(zip(card.experts, weights.tolist(), strict=True)), how


def check_form(form: str, how: str | None) -> None:
    """Refuse what is no form and no way to mix.

    Raises:
        MixmergeError: both at once.
    """
    asked = (("form", form, get_args(Form)), ("how", how, get_args(How)))
    faults = [
        Fault(name, f"is {value!r}", choices(str(value), list(known)))
        for name, value, known in asked
        if value is not None and value not in known
    ]
    if faults:
        raise MixmergeError(faults)


def mixing(parts: Parts) -> How:
    """How weights that are said for a network mix: as its gate's where those are constants, else as outputs.

    Raises:
        MixmergeError: as ``own_mixture``, of bank and gate.
    """
    gate = gate_of(parts, checked_card(parts))
    own = None if gate is None else gate.fixed()
    return "outputs" if own is None else own[1]


def export(
    parts: Parts,
    weights: Tensor | Named,
    out: Path,
    *,
    form: Form = "checkpoint",
    how: How = "outputs",
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int | None:
    """Write a fixed mixture.

    Args:
        parts: of the network.
        weights: ``(E,)``, or by name, 0 for those not named.
        out: the folder to make.
        form: ``checkpoint``: a model folder; ``adapter``: for PEFT; ``vllm``: for vLLM, or a refusal by name.
        how: as in ``bank.mix.Mix``.
        overwrite: replace a folder of the same kind.
        progress: of a checkpoint, told bytes written, and of how many.

    Returns:
        of an adapter its largest rank.

    Raises:
        MixmergeError: no such form or way to mix; the bank is damaged or of another base; weights of other experts; the
            mixture has no such form.
        OutputError: the folder exists, or cannot be written.
    """
    from mixmerge.bank.fold import export_adapter, export_checkpoint

    check_form(form, how)
    card = checked_card(parts)
    told = weights if isinstance(weights, Tensor) else fixed_weights(weights, card.experts)
    bank = load_bank(parts.folder)
    if form == "checkpoint":
        export_checkpoint(
            parts.base, bank, told, out,
            how=how, network=parts.folder, overwrite=overwrite, progress=progress,
        )  # fmt: skip
        return None
    runner: Literal["peft", "vllm"] = "vllm" if form == "vllm" else "peft"
    return export_adapter(
        bank, told, out, base=parts.base, how=how, runner=runner, network=parts.folder, overwrite=overwrite
    )
