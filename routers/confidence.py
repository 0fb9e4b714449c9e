"""How sure an expert was of its answer, from the log-probabilities of its tokens.

T tokens of the answer, K alternatives of each. Natural logarithms.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError

Floats = NDArray[np.float64]
Confidence = Literal["mean_logprob", "margin", "entropy"]
_ROUNDING = 1e-4  # above 0, of log-probabilities in float32 or less


def mean_logprob(logprobs: NDArray[Any]) -> float:
    """Mean log-probability of the tokens of an answer: 0 or less, 0 is certain.

    Args:
        logprobs: ``(T,)`` of the tokens that were chosen.

    Raises:
        MixmergeError: no tokens, or a value that is no log-probability; as of the next two.
    """
    return float(_checked(logprobs, dimensions=1).mean())


def margin(top: NDArray[Any]) -> float:
    """Mean difference between the log-probabilities of the two likeliest tokens: 0 or more.

    Args:
        top: ``(T, K)`` of the K likeliest tokens, 2 or more, in any order. Minus infinity stands for impossible.
    """
    best = np.sort(_checked(top, dimensions=2, possible=False), axis=1)[:, -2:]
    return float((best[:, 1] - best[:, 0]).mean())


def entropy(top: NDArray[Any]) -> float:
    """Mean entropy of the K likeliest tokens, their probabilities scaled to sum to 1: 0 to ``log K``, 0 is certain.

    Args:
        top: as of ``margin``.
    """
    values = _checked(top, dimensions=2, possible=False)
    raised = np.exp(values - values.max(axis=1, keepdims=True))
    share = raised / raised.sum(axis=1, keepdims=True)
    logs = np.log(np.where(share > 0, share, 1.0))
    return float(-(share * logs).sum(axis=1).mean())


def confidence(kind: Confidence, logprobs: NDArray[Any]) -> float:
    """One of the three as a number in 0..1 that is higher the surer the answer.

    ``mean_logprob``: its exponential, the geometric mean of the probabilities; ``margin``: ``1 - exp(-margin)``;
    ``entropy``: 1 minus its share of ``log K``. The scales are ours: thresholds differ between kinds.

    Args:
        logprobs: ``(T,)`` for ``mean_logprob``, ``(T, K)`` for the others.
    """
    if kind == "mean_logprob":
        return float(np.exp(min(mean_logprob(logprobs), 0.0)))
    if kind == "margin":
        return float(-np.expm1(-margin(logprobs)))
    return float(1.0 - entropy(logprobs) / np.log(np.shape(logprobs)[1]))


def _checked(given: NDArray[Any], *, dimensions: int, possible: bool = True) -> Floats:
    values = np.asarray(given, np.float64)
    shape = "tokens" if dimensions == 1 else "tokens x alternatives, 2 or more of these"
    if values.ndim != dimensions or not values.size or values.shape[-1] < dimensions:
        raise MixmergeError(Fault("logprobs", f"have the shape {values.shape}", shape))
    ruled_out = np.isneginf(values).sum(axis=-1)
    # Of alternatives one at least must be possible, of the tokens that were chosen all.
    hopeless = ruled_out.any() if possible else (ruled_out == values.shape[-1]).any()
    if np.isnan(values).any() or (values > _ROUNDING).any() or hopeless:
        raise MixmergeError(
            Fault("logprobs", "hold values that are no logarithms of probabilities", "0 or less")
        )
    return values
