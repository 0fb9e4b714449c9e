"""What the tests of banks share: adapters that PEFT has made and answered with, and a bank at work in a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOKENS = [[3, 17, 41, 5, 99, 200], [7, 7, 250, 1, 30, 12]]

Trained = Callable[..., tuple[Path, Path, Any]]


@pytest.fixture(scope="session")
def trained(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """``trained(family, config, seed=0)``: base, an adapter on it, and the logits that PEFT gives with it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    made: dict[str, tuple[Path, Path, Any]] = {}

    def make(name: str, config: dict[str, Any], seed: int = 0) -> tuple[Path, Path, Any]:
        key = json.dumps([name, config, seed])
        if key not in made:
            base = family(name, dtype="float32").base
            folder = tmp_path_factory.mktemp("adapter")
            model = AutoModelForCausalLM.from_pretrained(base)
            adapted = peft.get_peft_model(model, peft.LoraConfig(**json.loads(json.dumps(config)))).eval()
            draw = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for one, value in sorted(adapted.named_parameters()):
                    if value.requires_grad or "lora_" in one:
                        value += 0.1 * torch.randn(value.shape, generator=draw)
                logits = adapted(torch.tensor(TOKENS)).logits
            adapted.save_pretrained(folder)
            made[key] = base, folder, logits
        return made[key]

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[..., Any]:
    """``logits_of(base, bank, rows)``: of ``TOKENS``, each with its own weights of the experts."""

    def run(base: Path, bank: Any, rows: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from mixmerge.bank.attach import Attached
        from mixmerge.bank.gate import RowGate, Run

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        attached = Attached(model, bank, RowGate())
        with torch.no_grad(), attached.running(Run(rows)):
            return model(torch.tensor(TOKENS)).logits

    return run
