"""Texts as features by a model of transformers.

Shapes: B texts, L tokens in the longest of a batch, h width of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mixmerge.data.batches import context_of
from mixmerge.experts.loading import LoadedExpert, check_tokenizer, load_expert

_ROWS = 32  # texts of a batch
_LONGEST = 512  # tokens of a text, if the encoder reads so many


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
        """``(B, h)``, float32."""
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
                hidden = model(**batch).last_hidden_state  # (B, L, h)
                found.append(mean_of(hidden, batch["attention_mask"].bool()))
        return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def mean_of(hidden: Tensor, mask: Tensor) -> Tensor:
    """``(B, L, h)`` and which tokens are real ``(B, L)`` to their means ``(B, h)`` in float32."""
    there = mask[..., None]
    return torch.where(there, hidden.float(), 0.0).sum(1) / there.sum(1).clamp(min=1)
