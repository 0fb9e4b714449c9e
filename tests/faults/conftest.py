"""Small checkpoints made of bytes, recipes, and ways to run the command: in this process, or in real ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parent
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *words: str, faults: int = 1) -> Ran:
        """It ended as every user's fault ends: exit code 2 and a line for each, no traceback."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        lines = [line for line in self.err.splitlines() if line and not line.startswith("warning: ")]
        assert len(lines) == faults, self.err
        assert all(line.startswith("error: ") for line in lines), self.err
        missing = [word for word in words if word not in self.err]
        assert not missing, f"{missing} not in: {self.err}"
        assert "Traceback" not in self.out + self.err
        return self

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def weights(seed: int, *, count: int = 4, rows: int = 16, columns: int = 64) -> dict[str, NDArray[Any]]:
    """``count`` float32 matrices, one a layer."""
    draw = np.random.default_rng(seed)
    return {
        f"model.layers.{layer}.mlp.up_proj.weight": draw.standard_normal((rows, columns), np.float32)
        for layer in range(count)
    }


@dataclass(frozen=True)
class Kit:
    """A folder of a test's own and what is made in it."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def partial(self) -> Path:
        return self.root / ".out.mixmerge-partial"

    @property
    def old(self) -> Path:
        return self.root / ".out.mixmerge-old"

    def model(self, name: str, tensors: Tensors | int = 0) -> Path:
        """A model folder; a number is the seed of ``weights``."""
        folder = self.root / name
        folder.mkdir()
        save_file(
            weights(tensors) if isinstance(tensors, int) else dict(tensors), folder / "model.safetensors"
        )
        (folder / "config.json").write_text(json.dumps(CONFIG))
        return folder

    def recipe(
        self,
        *models: Path | str,
        method: str = "linear",
        base: Path | str | None = None,
        each: Mapping[str, Any] | None = None,
        name: str = "recipe.yaml",
        **more: Any,
    ) -> Path:
        """A recipe of these models; ``each`` are the parameters of every one."""
        entries = [{"model": str(model), "parameters": dict(each or {"weight": 1.0})} for model in models]
        document: dict[str, Any] = {"merge_method": method, "models": entries, **more}
        if base is not None:
            document["base_model"] = str(base)
        path = self.root / name
        path.write_text(json.dumps(document))  # JSON is YAML
        return path

    def clean(self) -> None:
        """Assert that no trace of an output is left."""
        left = [path.name for path in self.root.iterdir() if path.name == "out" or ".mixmerge-" in path.name]
        assert not left, f"left behind: {left}"


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    assert folder.is_dir(), f"no folder {folder.name}"
    assert not folder.is_symlink(), f"{folder.name} is a link"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """``files_of(folder)``: every file's bytes, by name."""
    return tree


@pytest.fixture
def cli() -> Callable[..., Ran]:
    """``cli(*arguments)``: the command line in this process; an exception that is no exit fails the test."""
    from typer.testing import CliRunner

    from mixmerge.cli import app

    def run(*arguments: str | Path) -> Ran:
        result = CliRunner().invoke(app, list(map(str, arguments)))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def process(tmp_path: Path) -> Callable[..., Ran]:
    """``process(*arguments, env={})``: ``python -m mixmerge`` in a real process, started elsewhere."""

    def run(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Ran:
        command = [sys.executable, "-P", "-m", "mixmerge", *map(str, arguments)]
        ended = subprocess.run(
            command, env={**os.environ, **(env or {})}, cwd=tmp_path, capture_output=True, text=True
        )
        return Ran(ended.returncode, ended.stdout, ended.stderr)

    return run


# A step by its number, by the start of its name, or so many after the first of a name.
At = int | str | tuple[str, int]


class Killable:
    """Processes that stop or die at a chosen step: see ``killable.py``."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.server = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "killable.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(scratch / "server").open("w"),
            text=True,
            cwd=scratch,
        )
        self.logs = 0

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        reply: dict[str, Any] = json.loads(self.server.stdout.readline())
        return reply

    def flush_every(self, nbytes: int) -> None:
        self._ask({"flush": nbytes})

    def warm(self, *arguments: str | Path) -> None:
        self._ask({"arguments": list(map(str, arguments)), "here": True})

    def _start(self, arguments: tuple[str | Path, ...], at: At | None, name: str) -> dict[str, Any]:
        self.logs += 1
        folder = self.scratch / str(self.logs)
        folder.mkdir()
        point = (at, 0) if isinstance(at, str) else at
        return self._ask(
            {"arguments": list(map(str, arguments)), "folder": str(folder), "at": point, "signal": name}
        )

    def run(self, *arguments: str | Path, die_at: At | None = None) -> Ran:
        """Run to the end, or to the step where it is killed (code -9)."""
        reply = self._start(arguments, die_at, "SIGKILL")
        return Ran(reply["code"], reply["out"], reply["err"])

    def stop(self, *arguments: str | Path, at: At) -> int:
        """Start, and stop at a step; the process's id."""
        reply = self._start(arguments, at, "SIGSTOP")
        assert reply["stopped"], reply
        pid: int = reply["pid"]
        return pid

    def go_on(self, pid: int) -> Ran:
        """Let a stopped process run to its end."""
        reply = self._ask({"pid": pid})
        return Ran(reply["code"], reply["out"], reply["err"])

    @property
    def steps(self) -> list[str]:
        """The steps of the process started last."""
        return (self.scratch / str(self.logs) / "steps").read_text().splitlines()

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(timeout=30)


@pytest.fixture(scope="session")
def killable_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killable]:
    scratch = tmp_path_factory.mktemp("killable")
    server = Killable(scratch)
    kit = Kit(tmp_path_factory.mktemp("warm"))
    models = [kit.model(name, seed) for seed, name in enumerate("abc")]
    recipe = kit.recipe(*models[1:], base=models[0], method="ties", each={"weight": 1.0, "density": 0.5})
    server.warm("merge", recipe, kit.out, "--quiet")
    assert kit.out.is_dir()
    yield server
    server.close()
    shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def killable(killable_server: Killable) -> Killable:
    """Real processes that note every 8 kB in the journal: two of the tensors of ``weights``."""
    killable_server.flush_every(8_000)
    return killable_server
