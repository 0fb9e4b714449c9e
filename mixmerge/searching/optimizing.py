"""Asking for values and telling what they were worth: Nevergrad behind a few lines. Nothing here knows of models."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from mixmerge.errors import DependencyError, Fault
from mixmerge.searching.space import Settings, Slot, Value

_NAMES = {"cma": "CMA", "ngopt": "NGOpt", "random": "RandomSearch"}


class Asker:
    """Candidates one after the other, each told before the next: the same ones for the same seed and scores.

    Args:
        found: what is searched.
        settings: how.
        start: the first candidate, by slot name, of values that the slots may take.

    Raises:
        DependencyError: nevergrad is not installed.
    """

    def __init__(self, found: Sequence[Slot], settings: Settings, start: Mapping[str, Value]) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the packages that it tries to import
                import nevergrad
        except ImportError as error:
            run = "Run: pip install 'mixmerge[search]'"
            raise DependencyError(Fault("search", "needs nevergrad", run=run)) from error
        self._start: dict[str, Value] | None = {slot.name: start[slot.name] for slot in found}
        space = nevergrad.p.Dict(
            **{slot.name: _parameter(nevergrad, slot, start[slot.name]) for slot in found}
        )
        space.random_state.seed(settings.seed)
        made = nevergrad.optimizers.registry[_NAMES[settings.optimizer]]
        self._optimizer: Any = made(parametrization=space, budget=settings.budget, num_workers=1)

    def ask(self) -> dict[str, Value]:
        """The next candidate: the start first."""
        if self._start is not None:
            self._asked = self._optimizer.parametrization.spawn_child(new_value=self._start)
            self._start = None
        else:
            self._asked = self._optimizer.ask()
        return dict(self._asked.value)

    def tell(self, worth: float) -> None:
        """What the candidate asked last was worth; more is better."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CMA-ES on one value, told on each call
            self._optimizer.tell(self._asked, -worth)


def _parameter(nevergrad: Any, slot: Slot, first: Value) -> Any:
    one = slot.dimension
    if one.choices is not None:
        return nevergrad.p.Choice(list(one.choices))
    if one.log:
        return nevergrad.p.Log(init=first, lower=one.low, upper=one.high)
    return nevergrad.p.Scalar(init=first, lower=one.low, upper=one.high)
