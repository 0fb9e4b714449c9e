"""From an expert of a mixture to the engine that runs it; nothing is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mixmerge.batch.opening import open_engine, size_of
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.openai import OpenAIEngine
from mixmerge.engines.process import ProcessEngine
from mixmerge.engines.vllm import VllmEngine
from mixmerge.errors import MixmergeError
from mixmerge.experts import Expert


def test_options_of_vllm_and_of_its_process() -> None:
    options = {"python": sys.executable, "start_timeout": 300, "revision": "v1", "max_model_len": 512}
    engine = open_engine([Expert("math", "org/math", engine="vllm", options=options)], device="cpu")
    assert isinstance(engine, VllmEngine)
    assert (engine.python, engine.start_timeout) == (sys.executable, 300)
    assert engine.arguments["revision"] == "v1"
    assert engine.arguments["options"]["max_model_len"] == 512
    with pytest.raises(
        MixmergeError, match=r"engine math: enforce_eagr: is no option\. Did you mean 'enforce_eager'"
    ):
        open_engine([Expert("math", "org/math", engine="vllm", options={"enforce_eagr": True})], device="cpu")


def test_adapters_of_a_base_are_one_engine() -> None:
    unit = [Expert("a", "base", adapter="one"), Expert("b", "base", adapter="two")]
    engine = open_engine(unit, device="cpu")
    assert isinstance(engine, TransformersEngine)
    assert engine.adapters == ("a", "b")
    assert engine.name == "base"


def test_options_of_an_endpoint() -> None:
    options: dict[str, Any] = {
        "concurrency": 3,
        "omit": ["seed"],
        "max_tokens_field": "max_completion_tokens",
    }
    expert = Expert("big", "gpt", endpoint="http://localhost:1/v1", engine="openai", options=options)
    engine = open_engine([expert], device="cuda:0")  # whatever the device, nothing is loaded there
    assert isinstance(engine, OpenAIEngine)
    assert (engine.model, engine.concurrency) == ("gpt", 3)


def test_apart_is_a_process_of_its_own() -> None:
    engine = open_engine([Expert("a", "folder", options={"dtype": "float32"})], device="cpu", apart=True)
    assert isinstance(engine, ProcessEngine)
    assert (engine.kind, engine.arguments["device"]) == ("transformers", "cpu")
    assert not engine.loaded


def test_glue_and_merged_adapters_take_memory_too(tmp_path: Path) -> None:
    """Of an interaction: the expert in the type it is loaded in, its adapter, and the glue as it is."""
    sizes = {"glue": 5, "one": 100, "other": 40, "adapter": 6}
    for name, count in sizes.items():
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(count)}, tmp_path / name / "model.safetensors")
    places = {
        "one": {"model": str(tmp_path / "one")},
        "tuned": {"model": str(tmp_path / "other"), "adapter": str(tmp_path / "adapter")},
        "hub": {"model": "org/model", "adapter": "org/adapter"},
    }

    def size(dtype: str, expert: str | None) -> int:
        options = {"experts": places, "dtype": dtype, **({} if expert is None else {"expert": expert})}
        return size_of([Expert("a", str(tmp_path / "glue"), engine="latent", options=options)])

    assert size("auto", "one") == 4 * (5 + 100)
    assert size("bfloat16", "tuned") == 4 * 5 + 2 * (40 + 6)
    assert size("auto", "hub") == 4 * 5
    assert size("auto", None) == 4 * (5 + 100 + 40 + 6), "where peers read along all are in memory"
