"""A primary that reads its peers while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mixmerge.latent.glue import Glue
from mixmerge.latent.records import View


class Interaction:
    """A loaded model and the glue's bridges of it as a primary.

    Args:
        model: of transformers.
        glue: on the model's device.
        expert: the model's name in the glue.
    """

    def __init__(self, model: Any, glue: Glue, expert: str) -> None:
        self.model, self.glue, self.expert = model, glue, expert

    @contextmanager
    def running(self, view: View) -> Iterator[None]:
        """Within it the model's next forward reads ``view``. With gradient checkpointing call ``backward`` in it too:
        layers run again then. No hook is left behind, whatever happens.
        """
        raise NotImplementedError
        yield
