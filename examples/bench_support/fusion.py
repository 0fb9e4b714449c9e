"""What the search for alphas takes of a decoding step: models of random weights cost what trained ones cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmerge.logits.fusing import Mode, Settings, fuse_rows

BAR = 0.1  # of a step of the base alone
_CONTEXT = 64


@dataclass(frozen=True)
class Searched:
    """One size of batch and one mode.

    Args:
        mode: of fusion.
        rows: B.
        parameters: of the base.
        base, small: milliseconds of one token of the base, and of the reference and the expert together.
        shift, search: of adding a fixed shift to the logits, and of what matching takes beyond that.
        evaluations: of the search.
    """

    mode: Mode
    rows: int
    parameters: int
    base: float
    small: float
    shift: float
    search: float
    evaluations: int

    @property
    def share(self) -> float:
        """Of the search, beside a step of the base alone: that of the small models is left out."""
        return self.search / self.base

    def __str__(self) -> str:
        return (
            f"{self.mode}, {self.rows} rows: base of {self.parameters / 1e6:.0f} M {self.base:.1f} ms a token, small "
            f"models {self.small:.1f}, shift {self.shift:.2f}, search {self.search:.2f} ms = "
            f"{100 * self.share:.1f} % of the base's step, {self.evaluations} evaluations"
        )


def fusion_rows(*, rows: tuple[int, ...] = (1, 16), rounds: int = 9, small: bool = False) -> list[Searched]:
    """Steps of a llama-style base of 100 M parameters and 50,257 tokens, with a reference and one expert of it.

    Args:
        rows: sizes of batches.
        rounds: least times are taken of so many.
        small: tiny models, to see that it runs.
    """
    sizes = ((64, 2, 500), (32, 1, 500)) if small else ((640, 14, 50257), (256, 4, 50257))
    base, little = (_model(*one) for one in sizes)
    found: list[Searched] = []
    for count in rows:
        logits = {name: _Step(one, count) for name, one in (("base", base), ("small", little))}
        times = {name: _least(one, rounds) for name, one in logits.items()}
        large, reference = (one() for one in logits.values())
        expert = reference + 0.3 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(1))
        plain = _least(_fused(large, reference, expert, "static"), rounds)
        for mode in ("one", "joint"):
            call = _fused(large, reference, expert, mode)
            made = fuse_rows(large, reference, [expert], None, Settings(mode), (1.0,))
            spent = _least(call, rounds)
            parameters = sum(one.numel() for one in base.parameters())
            found.append(
                Searched(
                    mode, count, parameters, times["base"], 2 * times["small"], plain,
                    max(spent - plain, 0.0), made.evaluations,
                )
            )  # fmt: skip
    return found


def _model(width: int, layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
        num_attention_heads=width // 32, max_position_embeddings=256, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class _Step:
    """One token of a batch after a context; keys and values are cut to the context again."""

    def __init__(self, model: Any, rows: int) -> None:
        from transformers import DynamicCache

        self._model, self._cache = model, DynamicCache(config=model.config)
        self._ids = torch.ones(rows, 1, dtype=torch.long)
        with torch.inference_mode():
            context = torch.ones(rows, _CONTEXT, dtype=torch.long)
            model(input_ids=context, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def __call__(self) -> Tensor:
        with torch.inference_mode():
            out = self._model(input_ids=self._ids, past_key_values=self._cache, use_cache=True)
            self._cache.crop(-1)
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _fused(base: Tensor, reference: Tensor, expert: Tensor, mode: Mode) -> Callable[[], object]:
    def call() -> object:
        with torch.inference_mode():
            return fuse_rows(base, reference, [expert], None, Settings(mode), (1.0,))

    return call


def _least(call: Callable[[], object], rounds: int) -> float:
    """Milliseconds of processor time, the least of the rounds: other work on the machine only adds to them."""
    call()
    found = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        found.append(1000 * (time.process_time() - start))
    return min(found)
