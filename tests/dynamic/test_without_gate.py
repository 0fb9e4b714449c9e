"""A network that lost its gate, or was fitted with one that says nothing, is no base in disguise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixmerge.bank.files import read_card
from mixmerge.bank.gate import RowGate
from mixmerge.bank.gate_files import save_gate
from mixmerge.cli import app
from mixmerge.dynamic.engine import DynamicEngine
from mixmerge.dynamic.model import DynamicModel
from mixmerge.engines.records import Request
from mixmerge.errors import MixmergeError


def fit(loras: Any, folder: Path, gate: str) -> Any:
    path = folder / "mix.yaml"
    path.write_text(loras.entries() + f"compose: {{kind: adapters, gate: {gate}}}\n")
    return CliRunner().invoke(app, ["fit", str(path), str(folder / "net"), "-q"])


def test_a_gate_that_is_gone_is_missed(loras: Any, tmp_path: Path) -> None:
    assert fit(loras, tmp_path, "{kind: mean}").exit_code == 0
    net = tmp_path / "net"
    (net / "bank" / "gate.json").unlink()
    for ask in (
        lambda: DynamicModel.load(net),
        lambda: DynamicEngine(str(net)).load(),
        lambda: DynamicModel.load(net).export(None, tmp_path / "out"),
    ):
        with pytest.raises(MixmergeError, match=r"gate\.json: is missing") as error:
            ask()
        assert "mixmerge fit MIXTURE.yaml OUT" in str(error.value)
    whole = tmp_path / "twin"  # a merge leaves what its gate's training found
    shutil.copytree(loras.base, whole)
    shutil.copytree(net / "bank", whole / "bank")
    (whole / "bank" / "training.json").write_text("{}")
    with pytest.raises(MixmergeError, match=r"mixmerge merge RECIPE\.yaml OUT"):
        DynamicModel.load(whole)
    for name in ("training.json", "gate.safetensors"):
        (whole / "bank" / name).unlink()
    assert isinstance(DynamicModel.load(whole).gate, RowGate)


def test_a_gate_that_says_nothing_is_not_fitted(loras: Any, tmp_path: Path) -> None:
    done = fit(loras, tmp_path, "{kind: given}")
    assert done.exit_code == 2
    assert "every answer would be the base's" in " ".join(done.stderr.split())
    assert not (tmp_path / "net").exists()


def test_a_network_with_such_a_gate_answers_who_names_an_expert(loras: Any, tmp_path: Path) -> None:
    assert fit(loras, tmp_path, "{kind: mean}").exit_code == 0
    net = tmp_path / "net"
    card = read_card(net)
    save_gate(net / "bank", RowGate(), bank=card.hash, experts=card.experts)
    engine = DynamicEngine(str(net))
    assert engine.generate([Request("a", "a b c", 2, adapter="one")])[0].tokens_out == 2
    with pytest.raises(MixmergeError, match=r"names no expert, and the gate of .* has no weights of its own"):
        engine.generate([Request("a", "a b c", 2)])
    fixed = DynamicEngine(str(net), weights={"one": 1.0})
    assert fixed.generate([Request("a", "a b c", 2)])[0].tokens_out == 2
