"""Twin merges of real tiny models: the bank at work is the definition, and its gate knows whose inputs are whose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixmerge
from mixmerge.bank.attach import Attached
from mixmerge.bank.files import load_bank, load_gate, read_card
from mixmerge.bank.gate import RowGate, Run
from mixmerge.methods.roles import role_of
from mixmerge.methods.twin import twin

FULL = {"energy": 1.0}


def recipe_of(made: Any, parameters: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {
        "merge_method": "twin",
        "base_model": str(made.base),
        "models": [{"model": str(path)} for path in made.experts],
        "parameters": parameters,
        "gate": "none",
        **rest,
    }


def model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ids_of(model: Any, rows: int) -> Tensor:
    return torch.randint(3, model.config.vocab_size, (rows, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["llama_tied", "llama_bias", "qwen3", "gpt2", "gemma"])
def test_a_whole_bank_is_each_expert(family: Any, name: str, tmp_path: Path, assert_loads: Any) -> None:
    made = family(name, dtype="float32")
    mixmerge.merge(recipe_of(made, FULL), tmp_path / "out")
    assert_loads(tmp_path / "out")
    model, bank = model_of(tmp_path / "out"), load_bank(tmp_path / "out")
    ids = ids_of(model, 3)
    attached = Attached(model, bank, RowGate())
    with torch.no_grad(), attached.running(Run(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))):
        found = model(ids).logits
    for row, folder in enumerate([*made.experts, tmp_path / "out"]):
        wanted = model_of(folder)(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=1e-4)
