"""What each expert shows on its own rows, seen once and kept on disk: final and hidden states, not logits.

Logits over a vocabulary would take a hundred times the room; the expert's own head makes them of the final states
again, exactly.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixmerge.calibrate.objectives import Student
from mixmerge.errors import Fault, OutputError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Teachers:
    """States of the experts, float32 on disk, in a file for each expert.

    Args:
        folder: where the files are; it exists, and whoever made it removes it.
        layers: whose hidden states are kept beside the final ones.
        head: logits (N, V) of final states (N, H) by an expert's own head.
    """

    folder: Path
    layers: tuple[int, ...]
    head: Callable[[Tensor, int], Tensor]
    _places: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = field(default_factory=dict)

    def remember(self, expert: int, student: Student, numbers: Sequence[int]) -> None:
        """Run batches through the model, which holds the expert's weights, and keep what it shows.

        Raises:
            OutputError: the disk is full or refuses.
        """
        import torch

        at = 0
        try:
            with torch.no_grad(), self._file(expert).open("wb") as file:
                for number in numbers:
                    final, hidden = student.see(expert, number, self.layers)
                    places = []
                    for states in (final, *(hidden[layer] for layer in self.layers)):
                        array = states.float().cpu().contiguous().numpy()
                        self._check_room(array.nbytes)
                        file.write(array.data)
                        places.append((at, array.shape))
                        at += array.nbytes
                    self._places[expert, number] = places
        except OSError as error:
            raise OutputError(
                Fault(str(self.folder), f"the experts' states cannot be kept: {error.strerror}")
            ) from error

    @staticmethod
    def bytes_of(places: int, hidden: int, layers: int) -> int:
        """What ``remember`` writes of so many places: float32, final states and those of so many layers."""
        return 4 * places * hidden * (1 + layers)

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < 2 * needed:
            what = f"has {free / 1e6:,.0f} MB left, too little for the experts' states"
            run = "Set hidden_layers: last, or fewer max_examples or max_tokens"
            raise OutputError(Fault(str(self.folder), what, run=run))

    def _file(self, expert: int) -> Path:
        return self.folder / f"expert-{expert}.f32"

    def recall(self, expert: int, number: int) -> tuple[Tensor, dict[int, Tensor]]:
        """What the expert showed of a batch: final states (N, H), and those of the layers."""
        import torch

        found: list[Tensor] = []
        for offset, shape in self._places[expert, number]:
            mapped: Any = np.memmap(self._file(expert), np.float32, "r", offset, shape)
            found.append(torch.from_numpy(np.array(mapped)))
        return found[0], dict(zip(self.layers, found[1:], strict=True))

    def logits(self, final: Tensor, expert: int) -> Tensor:
        """Logits (N, V) by the expert's own head."""
        return self.head(final, expert)
