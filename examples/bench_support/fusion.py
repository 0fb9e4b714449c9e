"""What the search for alphas takes of a decoding step: models of random weights cost what trained ones cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixmerge.logits.fusing import Fused, Mode, Settings, fuse_rows

BAR = 0.1  # of a step
MOST = 4  # evaluations
_CONTEXT = 64


@dataclass(frozen=True)
class Searched:
    """One size of batch and one mode.

    Args:
        mode: of fusion.
        experts: T.
        rows: B.
        parameters: of the base.
        base, small: milliseconds of one token of the base, and of the reference and the experts together.
        shift, search: of adding fixed shifts to the logits, and of what matching takes beyond that.
        evaluations: of each search.
    """

    mode: Mode
    experts: int
    rows: int
    parameters: int
    base: float
    small: float
    shift: float
    search: float
    evaluations: int

    @property
    def share(self) -> float:
        """Of the search, beside all else of a step."""
        return self.search / (self.base + self.small + self.shift)

    @property
    def holds(self) -> bool:
        return self.share < BAR and self.evaluations <= MOST

    def __str__(self) -> str:
        models = (
            f"base of {self.parameters / 1e6:.0f} M {self.base:.1f} ms a token, small models {self.small:.1f}"
        )
        search = f"shift {self.shift:.2f}, search {self.search:.2f} ms by {self.evaluations} evaluations"
        shares = f"{100 * self.share:.1f} % of the step, {100 * self.search / self.base:.1f} % of the base's"
        return f"{self.mode}, {self.experts} experts, {self.rows} rows: {models}, {search} = {shares}"


def fusion_rows(*, rows: tuple[int, ...] = (1, 16), rounds: int = 9, small: bool = False) -> list[Searched]:
    """Steps of a llama-style base of 100 M parameters and 50,257 tokens, with a small reference and its experts.

    Args:
        rows: sizes of batches.
        rounds: least times are taken of so many.
        small: tiny models, to see that it runs.
    """
    sizes = ((64, 2, 500), (32, 1, 500)) if small else ((640, 14, 50257), (256, 4, 50257))
    base, little = (_model(*one) for one in sizes)
    parameters = sum(one.numel() for one in base.parameters())
    found: list[Searched] = []
    for count in rows:
        steps = _Step(base, count), _Step(little, count)
        large, least = (_least(one, rounds) for one in steps)
        logits, reference = (one() for one in steps)
        draw = torch.Generator().manual_seed(1)
        experts = [reference + 0.3 * torch.randn(reference.shape, generator=draw) for _ in range(2)]
        kinds: tuple[tuple[Mode, int], ...] = (("one", 1), ("joint", 2))
        for mode, several in kinds:
            some = experts[:several]
            plain = _least(_fused(logits, reference, some, "static"), 3 * rounds)
            spent = _least(_fused(logits, reference, some, mode), 3 * rounds)
            made = _fused(logits, reference, some, mode)()
            small_models = (1 + several) * least
            found.append(
                Searched(
                    mode, several, count, parameters, large, small_models, plain, max(spent - plain, 0.0),
                    made.evaluations,
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


def _fused(base: Tensor, reference: Tensor, experts: Sequence[Tensor], mode: Mode) -> Callable[[], Fused]:
    def call() -> Fused:
        with torch.inference_mode():
            return fuse_rows(base, reference, experts, None, Settings(mode), (1.0,) * len(experts))

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
