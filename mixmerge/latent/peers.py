"""What peers leave of texts: their states, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from mixmerge.engines.batching import batches
from mixmerge.engines.decoding import accepted, right_padded
from mixmerge.latent.decoders import Anatomy, reading
from mixmerge.latent.records import Latents, Reading


class Peer(Protocol):
    """A loaded expert, such as ``experts.loading.LoadedExpert`` or ``engines.loading.Loaded``."""

    @property
    def model(self) -> Any: ...


def latents(
    expert: Peer,
    readings: Sequence[Reading],
    depths: Sequence[int | Literal["last"]],
    *,
    batch_tokens: int = 8192,
) -> list[Latents]:
    """Of each reading its states at the depths, on the model's device and in its type; no gradients.

    Texts of like length share a batch, padded on the right, where nothing looks: what a row gets does not depend on the
    others, but for rounding. The head is not run.

    Args:
        expert: whose model is run.
        readings: of this expert.
        depths: of each level, as ``Level.peer``; the same depth twice is the same tensor.
        batch_tokens: of a batch, 1 or more.
    """
    anatomy = Anatomy.of(expert.model)
    found: dict[int, Latents] = {}
    for batch in batches([one.ids for one in readings], [0] * len(readings), budget=batch_tokens):
        states = _states(anatomy, [readings[at].ids for at in batch], depths, expert.model.device)
        for row, at in enumerate(batch):
            ends = torch.tensor(readings[at].ends, dtype=torch.int64)
            own = {depth: one[row, : len(ends)].clone() for depth, one in states.items()}
            found[at] = Latents(tuple(own[depth] for depth in depths), ends.to(expert.model.device))
    return [found[at] for at in range(len(readings))]


def _states(
    anatomy: Anatomy, texts: Sequence[Sequence[int]], depths: Sequence[int | Literal["last"]], device: Any
) -> dict[int | Literal["last"], Tensor]:
    ids, mask = right_padded(texts, pad=0, device=device)
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": torch.arange(ids.shape[1], device=device).expand(len(texts), -1),
        "use_cache": False,
    }
    takes = accepted(anatomy.trunk)
    # Not inference mode: its tensors could not be part of a graph, and training reads latents.
    with torch.no_grad(), reading(anatomy, depths) as found:
        anatomy.trunk(**{name: value for name, value in given.items() if name in takes})
        return dict(found)
