"""The parts of a dynamic network from their folders into a loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixmerge.bank.features import mean_of
from mixmerge.bank.files import load_bank
from mixmerge.bank.gate import Gate, RowGate
from mixmerge.bank.gate_files import GATE, load_gate
from mixmerge.data.batches import context_of
from mixmerge.dynamic.folders import Parts, checked_card
from mixmerge.dynamic.running import Embed, Running
from mixmerge.experts.loading import LoadedExpert, check_tokenizer, load_expert

_ROWS = 32  # texts of a batch
_LONGEST = 512  # tokens of a text, if the encoder reads so many


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
        MixmergeError: bank or gate are damaged, of another base or of another bank.
    """
    card = checked_card(parts)
    gate: Gate = RowGate()
    if (parts.bank / GATE).is_file():
        gate = load_gate(parts.bank, bank=card.hash, earlier=card.earlier, experts=card.experts)
    if gate.features == "text" and embed is None:
        told = encoder or getattr(gate, "encoder", "") or parts.encoder
        embed = None if not told else TextEncoder(str(told), device=str(model.device))
    return Running(model, tokenizer, load_bank(parts.folder), gate, embed=embed, name=str(parts.folder))


class TextEncoder:
    """Texts as features by a model of transformers: the mean of its last hidden states, of length 1.

    Args:
        model: folder or hub id of an encoder.
        device: a torch device.
    """

    def __init__(self, model: str | Path, *, device: str = "cpu") -> None:
        self._place, self._device = model, device
        self._expert: LoadedExpert | None = None

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """``(B, f)``, float32."""
        if self._expert is None:
            self._expert = load_expert(self._place, device=self._device)
            check_tokenizer(self._expert.tokenizer, str(self._place))
        model, tokenizer = self._expert.model.base_model, self._expert.tokenizer
        longest = min(_LONGEST, context_of(model.config, tokenizer))
        found = []
        with torch.inference_mode():
            for start in range(0, len(texts), _ROWS):
                some = list(texts[start : start + _ROWS])
                batch = tokenizer(
                    some, padding=True, truncation=True, max_length=longest, return_tensors="pt"
                )
                batch = batch.to(self._device)
                hidden = model(**batch).last_hidden_state
                found.append(mean_of(hidden, batch["attention_mask"].bool()))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)
