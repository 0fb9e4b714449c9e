"""Experts as low-rank adapters: the truncated SVD of their deltas, in the files PEFT reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK = 16


def factors(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of a delta at this rank, as a product.

    Args:
        delta: ``(outputs, inputs)``.
        rank: 1 or more; more than the delta has changes nothing.

    Returns:
        ``a`` of ``(rank, inputs)`` and ``b`` of ``(outputs, rank)``: the delta is about ``b @ a``.
    """
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def save_adapter(
    folder: Path, deltas: Mapping[str, Tensor], *, targets: tuple[str, ...], rank: int = RANK
) -> None:
    """Write deltas as a LoRA adapter of scale 1.

    Args:
        folder: is made.
        deltas: name of a module's weight in the base -> its change, ``(outputs, inputs)``.
        targets: names of the modules, as PEFT matches them.
        rank: of every module.
    """
    tensors = {}
    for name, delta in deltas.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = factors(delta, rank)
        tensors[f"{module}.lora_A.weight"] = a.contiguous()
        tensors[f"{module}.lora_B.weight"] = b.contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # wherever the zoo lies: PeftModel.from_pretrained(base, folder)
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": list(targets),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
