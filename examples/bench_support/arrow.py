"""Arrow as PEFT runs it (``create_arrow_model``) and as a gate over a bank does, on the same adapters."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench_support.dynamic import Three, decoding, share
from mixmerge.bank.attach import Attached
from mixmerge.bank.fitting import fit_gate
from mixmerge.bank.gate import Run


class Arrows:
    """A base, and the same under both Arrows, on one set of the base's weights.

    Args:
        three: with the adapters.
        top_k: experts of a token.
    """

    def __init__(self, three: Three, *, top_k: int = 3) -> None:
        self.base, self.ours = three.base, copy.deepcopy(three.base)
        self.peft = _routed(three, top_k)
        for name, weight in self.base.named_parameters():
            share(self.ours, name, weight)
            share(self.peft.base_model.model, name, weight)
        gate = fit_gate("arrow", {"top_k": top_k}, three.bank)
        self._attached = Attached(self.ours, three.bank, gate)

    @contextmanager
    def mixture(self) -> Iterator[None]:
        with torch.inference_mode(), self._attached.running(Run()):
            yield

    def decoded(self, ids: Tensor) -> Mapping[str, Callable[[], object]]:
        """One token of each row after a prompt."""
        return {way: decoding(getattr(self, way), ids) for way in ("base", "peft", "ours")}

    def read(self, ids: Tensor) -> Mapping[str, Callable[[], object]]:
        """A prompt of each row."""
        return {way: lambda way=way: getattr(self, way)(ids) for way in ("base", "peft", "ours")}


def _routed(three: Three, top_k: int) -> Any:
    from peft import ArrowConfig, create_arrow_model

    names = list(three.bank.experts)
    with tempfile.TemporaryDirectory() as folder:
        three.peft.save_pretrained(folder, selected_adapters=names)
        places = [str(Path(folder) / name) for name in names]
        made = create_arrow_model(copy.deepcopy(three.base), places, ArrowConfig(top_k=top_k, rng_seed=0))
    return made.eval().requires_grad_(False)
