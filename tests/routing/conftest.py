"""Fixtures of the tests of ``mixmerge route``: an empty folder, outcomes and a router fitted on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mixmerge.cli import app
from mixmerge.routers.base import Router
from mixmerge.routers.contract import sample


@pytest.fixture
def route(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """``route(*arguments, code=0, stdin=None)``: a command in an empty folder; its exit code is checked."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0, stdin: str | bytes | None = None) -> Any:
        result = CliRunner().invoke(app, ["route", *map(str, arguments)], input=stdin)
        assert result.exit_code == code, (result.stdout, result.stderr, result.exception)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return call


@pytest.fixture
def fault(route: Callable[..., Any]) -> Callable[..., str]:
    """``fault(*arguments, stdin=None)``: the one fault of a command that prints nothing else."""

    def call(*arguments: object, stdin: str | bytes | None = None) -> str:
        result = route(*arguments, code=2, stdin=stdin)
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        return str(line.removeprefix("error: "))

    return call


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``a.jsonl``, ``b.jsonl`` of other queries, and ``router`` fitted on the first; not to be changed."""
    folder = tmp_path_factory.mktemp("fitted")
    sample(200).write(folder / "a.jsonl")
    sample(120, seed=1).write(folder / "b.jsonl")
    result = CliRunner().invoke(
        app, ["route", "fit", str(folder / "a.jsonl"), "--out", str(folder / "router")]
    )
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def mine(fitted: Path, tmp_path: Path) -> Path:
    """A copy of the router that the test may change."""
    Router.load(fitted / "router").save(tmp_path / "mine")
    return tmp_path / "mine"
