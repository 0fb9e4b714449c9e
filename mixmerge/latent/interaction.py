"""A primary that reads its peers while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mixmerge.latent.decoders import Anatomy, writing
from mixmerge.latent.glue import Glue
from mixmerge.latent.recomputing import asked_to, recomputed
from mixmerge.latent.records import View
from mixmerge.latent.sight import Ground, Sight


class Interaction:
    """A loaded model and the glue's bridges of it as a primary.

    Args:
        model: of transformers.
        glue: on the model's device. For decoding it may be in the model's type, which saves converting it each time.
        expert: the model's name in the glue.

    Raises:
        MixmergeError: the model is no decoder.
    """

    def __init__(self, model: Any, glue: Glue, expert: str) -> None:
        self.model, self.glue, self.expert = model, glue, expert
        self._anatomy = Anatomy.of(model, name=expert)
        self._levels: dict[int, list[int]] = {}
        for level, depth in enumerate(glue.primary_depths(expert)):
            self._levels.setdefault(depth, []).append(level)
        self._ground: tuple[Tensor | None, Ground] | None = None

    @contextmanager
    def running(self, view: View) -> Iterator[None]:
        """Within it the model's next forward reads ``view``; the tokens of both must be the same ones, in their order.

        A model in training mode that computes its layers again on the way back (``gradient_checkpointing_enable``) does
        so without the glue, which is run once; ``backward`` may be called within or after. No hook is left behind,
        whatever happens.
        """
        sight = Sight(self._on(view), view, null=self.glue.options.null)
        changes = {depth: self._change(levels, view, sight) for depth, levels in self._levels.items()}
        again = asked_to(list(self._anatomy.layers)) if torch.is_grad_enabled() else []
        with recomputed(again), writing(self._anatomy, changes):
            yield

    def _change(self, levels: list[int], view: View, sight: Sight) -> Callable[[Tensor], Tensor]:
        bridges = [self.glue.bridge(self.expert, level) for level in levels]

        def change(states: Tensor) -> Tensor:
            for level, bridge in zip(levels, bridges, strict=True):
                read = bridge.read(states, view.memory.keys[level], view.memory.values[level], sight)
                states = states + read
            return states

        return change

    def _on(self, view: View) -> Ground:
        """The same for all tokens of an answer, as long as memory and gates are; not kept where it has a graph."""
        kept = self._ground
        if torch.is_grad_enabled():
            return Ground.of(view.memory, view.gates)
        if kept is None or kept[1].memory is not view.memory or kept[0] is not view.gates:
            kept = self._ground = view.gates, Ground.of(view.memory, view.gates)
        return kept[1]
