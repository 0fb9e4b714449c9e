"""The parts of a dynamic network from their folders into a loaded model."""

from __future__ import annotations

from typing import Any

from mixmerge.bank.files import load_bank
from mixmerge.bank.gate import Gate, RowGate
from mixmerge.dynamic.folders import Parts, checked_card, gate_of
from mixmerge.dynamic.running import Embed, Running
from mixmerge.experts.encoding import TextEncoder


def running(
    parts: Parts, model: Any, tokenizer: Any, *, embed: Embed | None = None, encoder: str | None = None
) -> Running:
    """A network at work in its base.

    Args:
        parts: its folders.
        model: the base, loaded.
        tokenizer: of it.
        embed: texts to features, for a gate of texts.
        encoder: folder or hub id of a text encoder, in place of it; by default the one that gate or mixture name.

    Raises:
        MixmergeError: bank or gate are damaged, of another base or of another bank; the gate is gone.
    """
    card = checked_card(parts)
    gate: Gate = gate_of(parts, card) or RowGate()
    if gate.features == "text" and embed is None:
        told = encoder or getattr(gate, "encoder", "") or parts.encoder
        embed = None if not told else TextEncoder(str(told), device=str(model.device))
    return Running(model, tokenizer, load_bank(parts.folder), gate, embed=embed, name=str(parts.folder))
