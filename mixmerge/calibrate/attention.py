"""Which kernel of torch's attention is quickest to learn with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

LONGEST = 128  # tokens up to which the plain form is quicker, forward and backward, of 16-bit floats on a CPU


def quick_attention(model: Any, tokens: int) -> AbstractContextManager[Any]:
    """A context for a forward pass whose gradients are wanted.

    On a CPU the backward pass of torch's fused attention is slow in 16 bits: of short rows both passes take about twice
    as long as the plain form's. Of long ones the plain form's matrix of scores costs more.
    ``examples/bench_learn.py --attention`` times both.

    Args:
        model: of transformers, on its device.
        tokens: of the longest row.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    half = model.dtype in (torch.bfloat16, torch.float16)
    if model.device.type == "cpu" and half and tokens <= LONGEST:
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
