"""The attention that learning uses, on models and rows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mixmerge.calibrate.attention import LONGEST, quick_attention


def gradients(model: Any, ids: torch.Tensor, mask: torch.Tensor, *, quick: bool) -> dict[str, torch.Tensor]:
    model.zero_grad()
    if quick:
        with quick_attention(model, ids.shape[1]):
            out = model(input_ids=ids, attention_mask=mask, labels=ids)
    else:
        out = model(input_ids=ids, attention_mask=mask, labels=ids)
    out.loss.backward()
    return {name: value.grad.float() for name, value in model.named_parameters()}


def test_gradients_are_those_of_the_fused_kernel(family: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(family("llama").base, dtype=torch.bfloat16)
    ids = torch.arange(2 * 12).reshape(2, 12) % model.config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    plain, quick = (gradients(model, ids, mask, quick=quick) for quick in (False, True))
    for name, value in plain.items():
        assert (quick[name] - value).norm() <= 0.05 * max(1e-3, float(value.norm())), name


def test_only_short_rows_of_halves_on_a_cpu_take_the_plain_form(family: Any) -> None:
    from contextlib import nullcontext

    def plain(dtype: torch.dtype, tokens: int, device: str = "cpu") -> bool:
        model = AutoModelForCausalLM.from_pretrained(family("llama", dtype="float32").base, dtype=dtype)
        return not isinstance(quick_attention(model.to(device), tokens), nullcontext)

    assert plain(torch.bfloat16, LONGEST)
    assert not plain(torch.bfloat16, LONGEST + 1)
    assert not plain(torch.float32, 8)
    assert not plain(torch.bfloat16, 8, "meta")
