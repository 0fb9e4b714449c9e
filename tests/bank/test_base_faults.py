"""Adapters of another base are told by the values of its tensors, in whatever type it is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mixmerge.bank.adapters import base_faults


def model(folder: Path, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return folder


def adapter_of(folder: Path, base: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    return folder


def values(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"wide": torch.randn(40, 50, generator=draw), "thin": torch.randn(7, generator=draw)}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16])
def test_types_do_not_matter_and_values_do(tmp_path: Path, stored: torch.dtype, used: torch.dtype) -> None:
    base = model(tmp_path / "base", {name: one.to(used) for name, one in values(0).items()})
    same = model(tmp_path / "same", {name: one.to(stored) for name, one in values(0).items()})
    other = model(tmp_path / "other", {name: one.to(stored) for name, one in values(1).items()})
    assert base_faults({"one": adapter_of(tmp_path / "one", same)}, base) == []
    (fault,) = base_faults({"two": adapter_of(tmp_path / "two", other)}, base)
    assert f"was trained on {other}, whose weights are not those of {base}" in fault.what


def test_a_base_that_cannot_be_compared_is_said(tmp_path: Path) -> None:
    base = model(tmp_path / "base", values(0))
    other = model(tmp_path / "other", {"wide": torch.zeros(3, 3), "deep": torch.zeros(2)})
    (fault,) = base_faults({"one": adapter_of(tmp_path / "one", other)}, base)
    assert f"was trained on {other}, which has no tensor to compare with those of {base}" in fault.what
