"""Options of a network that are none are said with what there is, before anything is loaded or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixmerge.dynamic.model import DynamicModel
from mixmerge.errors import MixmergeError
from mixmerge.experts.loading import load_expert


@pytest.fixture(scope="module")
def net(loras: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from mixmerge.cli import app

    folder = tmp_path_factory.mktemp("options")
    (folder / "mix.yaml").write_text(loras.entries() + "compose: {kind: adapters, gate: {kind: mean}}\n")
    done = CliRunner().invoke(app, ["fit", str(folder / "mix.yaml"), str(folder / "net"), "-q"])
    assert done.exit_code == 0, done.output
    return folder / "net"


def test_forms_and_ways_to_mix(net: Path, tmp_path: Path) -> None:
    model = DynamicModel.load(net)
    with pytest.raises(MixmergeError) as error:
        model.export({"one": 1.0}, tmp_path / "out", form="chekpoint", how="output")  # type: ignore[arg-type]
    said = str(error.value)
    assert "form: is 'chekpoint'. Did you mean 'checkpoint'?" in said
    assert "how: is 'output'. Did you mean 'outputs'?" in said
    assert not (tmp_path / "out").exists()


def test_types(net: Path, loras: Any) -> None:
    for load in (DynamicModel.load, load_expert):
        with pytest.raises(MixmergeError, match=r"dtype: is 'float8'\..*bfloat16"):
            load(net if load is not load_expert else loras.base, dtype="float8")
