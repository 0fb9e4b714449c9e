"""The primary's pass over rows and their answers, with its peers' latents to read.

Legend as in ``records``; N tokens to predict, V entries of vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from mixmerge.data.batches import padding
from mixmerge.engines.decoding import accepted, right_padded
from mixmerge.latent.decoders import Anatomy
from mixmerge.latent.frozen import Frozen, Remembered
from mixmerge.latent.glue import Glue
from mixmerge.latent.interaction import Interaction
from mixmerge.latent.recomputing import recomputed
from mixmerge.latent.records import Latents, Memory, Mode, Reading, View, upto_of
from mixmerge.latent.texts import Texts


@dataclass(frozen=True, eq=False)
class Predicted:
    """What a primary makes of rows' answers.

    Args:
        logits: ``(N, V)``, row after row.
        wanted: ``(N,)``.
        counts: tokens of each row.
    """

    logits: Tensor
    wanted: Tensor
    counts: tuple[int, ...]

    def of(self, rows: Sequence[int]) -> Tensor:
        """The logits of these rows."""
        parts = torch.split(self.logits, list(self.counts))
        return torch.cat([parts[at] for at in rows])


class Passes:
    """Passes of primaries.

    Args:
        frozen: the experts.
        remembered: their latents.
        glue: on the device.
        texts: the rows.
        mode, chunk: how peers follow an answer.
        checkpointing: layers are computed again on the way back.
    """

    def __init__(
        self,
        frozen: Frozen,
        remembered: Remembered,
        glue: Glue,
        texts: Texts,
        *,
        mode: Mode,
        chunk: int,
        checkpointing: bool,
    ) -> None:
        self._frozen, self._remembered, self._glue, self._texts = frozen, remembered, glue, texts
        self._mode, self._chunk, self._checkpointing = mode, chunk, checkpointing

    def predict(
        self, primary: str, rows: Sequence[int], peers: Sequence[Sequence[str]], gates: Tensor | None
    ) -> Predicted:
        """Logits of the rows' answers.

        Args:
            primary: who answers.
            rows: places of the examples.
            peers: of each row, who is read.
            gates: ``(B, K)``, the primary's first; None: all alike.
        """
        readings = [self._texts.primary(primary, row) for row in rows]
        model = self._frozen[primary].model
        memory = self._memory(primary, rows, peers, model.device)
        view = View(memory, gates, *self._places(readings, model.device))
        with ExitStack() as stack:
            stack.enter_context(Interaction(model, self._glue, primary).running(view))
            if self._checkpointing and torch.is_grad_enabled():
                stack.enter_context(recomputed(list(Anatomy.of(model).layers)))
            return self._answers(primary, readings)

    def alone(self, primary: str, rows: Sequence[int]) -> Predicted:
        """Logits of the rows' answers by the primary as it is, which reads nobody."""
        return self._answers(primary, [self._texts.primary(primary, row) for row in rows])

    def _answers(self, primary: str, readings: Sequence[Reading]) -> Predicted:
        expert = self._frozen[primary]
        model, device = expert.model, expert.model.device
        pad = padding(expert.tokenizer)
        ids, mask = right_padded([one.ids for one in readings], pad=pad, device=device)  # (B, T)
        length, first = ids.shape[1], min(one.answer_from for one in readings)
        keep = length - first + 1
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False, "logits_to_keep": keep}
        takes = accepted(model)
        out = model(**{name: value for name, value in given.items() if name in takes})
        logits = out.logits[:, -keep:]  # (B, keep, V); place j predicts token length - keep + j + 1
        told, wanted = [], []
        for at, one in enumerate(readings):
            start = one.answer_from - 1 - (length - keep)
            count = len(one.ids) - one.answer_from
            told.append(logits[at, start : start + count])
            wanted.append(ids[at, one.answer_from : len(one.ids)])
        counts = tuple(len(one) for one in wanted)
        return Predicted(torch.cat(told), torch.cat(wanted), counts)

    def _memory(
        self, primary: str, rows: Sequence[int], peers: Sequence[Sequence[str]], device: torch.device
    ) -> Memory:
        readers: dict[str, list[int]] = {}  # peer -> places of the rows that read it
        for at, names in enumerate(peers):
            for name in names:
                readers.setdefault(name, []).append(at)
        found: dict[tuple[str, int], Latents] = {}
        for name, places in readers.items():
            readings = [self._texts.peer(name, rows[at], primary) for at in places]
            given = self._remembered.of(name, readings, device)
            found |= {(name, at): one for at, one in zip(places, given, strict=True)}
        read = [[(name, found[name, at]) for name in names] for at, names in enumerate(peers)]
        return self._glue.memory(primary, read, dtype=self._frozen[primary].model.dtype)

    def _places(self, readings: Sequence[Reading], device: torch.device) -> tuple[Tensor, Tensor]:
        """``seen`` and ``upto``, each ``(B, T)``."""
        upto = [upto_of(one, self._mode, self._chunk) for one in readings]
        seen = [one.seen for one in readings]
        first, second = (right_padded(one, pad=0, device=device)[0] for one in (seen, upto))
        return first, second
