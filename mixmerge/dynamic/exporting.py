"""Fixed mixtures of a network as ordinary folders: a checkpoint, or an adapter for PEFT or vLLM. E experts."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor

from mixmerge.bank.files import load_bank
from mixmerge.bank.mix import How
from mixmerge.dynamic.folders import Parts, checked_card
from mixmerge.dynamic.weights import Named, fixed_weights

Form = Literal["checkpoint", "adapter", "vllm"]


def export(
    parts: Parts,
    weights: Tensor | Named,
    out: Path,
    *,
    form: Form = "checkpoint",
    how: How = "outputs",
    overwrite: bool = False,
) -> int | None:
    """Write a fixed mixture.

    Args:
        parts: of the network.
        weights: ``(E,)``, or by name, 0 for those not named.
        out: the folder to make.
        form: ``checkpoint``: a model folder; ``adapter``: for PEFT; ``vllm``: for vLLM, or a refusal by name.
        how: as in ``bank.mix.Mix``.
        overwrite: replace a folder of the same kind.

    Returns:
        of an adapter its largest rank.

    Raises:
        MixmergeError: the bank is damaged or of another base; weights of other experts; the mixture has no such form.
        OutputError: the folder exists, or cannot be written.
    """
    from mixmerge.bank.fold import export_adapter, export_checkpoint

    card = checked_card(parts)
    told = weights if isinstance(weights, Tensor) else fixed_weights(weights, card.experts)
    bank = load_bank(parts.folder)
    if form == "checkpoint":
        export_checkpoint(parts.base, bank, told, out, how=how, overwrite=overwrite)
        return None
    runner: Literal["peft", "vllm"] = "vllm" if form == "vllm" else "peft"
    return export_adapter(bank, told, out, base=parts.base, how=how, runner=runner, overwrite=overwrite)
