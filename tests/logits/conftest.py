"""Tiny models in the roles of a fusion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mixmerge.zoo.adapters import save_adapter

TARGETS = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Roles:
    """A base, a reference of another width's family, and experts of it.

    Args:
        base, reference: model folders of one tokenizer.
        full: an expert that is a whole model.
        adapter: an expert over the reference.
    """

    base: Path
    reference: Path
    full: Path
    adapter: Path

    def entries(self) -> str:
        """The ``experts`` of a mixture's YAML."""
        return (
            f"experts:\n  big: {{model: {self.base}}}\n  small: {{model: {self.reference}}}\n"
            f"  full: {{model: {self.full}}}\n  lora: {{adapter: {self.adapter}, base: {self.reference}}}\n"
        )

    def arguments(self) -> dict[str, Any]:
        """Of an engine."""
        lora = {"model": str(self.reference), "adapter": str(self.adapter)}
        return {"reference": str(self.reference), "experts": {"full": str(self.full), "lora": lora}}


@pytest.fixture(scope="session")
def roles(family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Roles:
    """A tiny GPT-NeoX as the base, a tiny Llama and its experts."""
    base, small = family("gpt_neox", dtype="float32"), family("llama", dtype="float32")
    before, after = (load_file(one / "model.safetensors") for one in (small.base, small.experts[1]))
    deltas = {key: 8 * (after[key] - value) for key, value in before.items() if key.split(".")[-2] in TARGETS}
    adapter = tmp_path_factory.mktemp("fusion") / "lora"
    save_adapter(adapter, deltas, targets=TARGETS, rank=4)
    return Roles(base.base, small.base, small.experts[0], adapter)


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few rows with answers."""
    path = tmp_path_factory.mktemp("answers") / "rows.jsonl"
    rows = [{"prompt": f"{at} the", "answer": f" fox {at}"} for at in range(6)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path
