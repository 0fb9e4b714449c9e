"""An engine as a plain function, for parts that may not know engines, such as routers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mixmerge.engines.base import Engine
from mixmerge.engines.records import Message, Request, Scoring


class Generate(Protocol):
    """Prompts to texts, one for each; every prompt has its own seed."""

    def __call__(
        self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[str]: ...


class Loglikelihood(Protocol):
    """Log-probabilities of continuations after prompts, one for each pair."""

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> list[float]: ...


def generator(engine: Engine, *, stop: tuple[str, ...] = ()) -> Generate:
    """What the engine answers to prompts, each as a user's turn of a chat."""

    def generate(
        prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[str]:
        requests = [
            Request(
                id=str(at),
                prompt=(Message("user", prompt),),
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                stop=stop,
                seed=seed,
            )
            for at, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        return [one.text for one in engine.generate(requests)]

    return generate


def likelihoods(engine: Engine) -> Loglikelihood:
    """How likely the engine finds continuations."""

    def loglikelihood(prompts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        scorings = [
            Scoring(str(at), prompt, continuation)
            for at, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True))
        ]
        return [one.total for one in engine.loglikelihood(scorings)]

    return loglikelihood
