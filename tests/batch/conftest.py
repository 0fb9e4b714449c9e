"""Files of requests, as people have them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mixmerge.batch.lines import Input
from mixmerge.outcomes.table import OutcomeTable

ROOT = Path(__file__).parents[2]
STANDINS = (Path(__file__).parent / "standins", ROOT / "tests" / "engines" / "standins")


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Input]:
    """A job of a file with the given content; its experts are ``math`` and ``code``."""

    def make(
        content: str | bytes, name: str = "job.jsonl", *, called: str | None = None, **options: Any
    ) -> Input:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return Input.open(path, experts=("math", "code"), mixture_name="mix", name=called or name, **options)

    return make


# Imports what a job needs once, then makes a process for each command: their start would be most of the time.
STARTER = """
import json, os, resource, signal, sys, traceback
from mixmerge import cli
from mixmerge.mixture import Mixture, batching
import mixmerge.aggregate.synthesis, mixmerge.routers.constants, mixmerge.engines.process, rich.table
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        for stream, number, how in (
            ("in", 0, os.O_RDONLY),
            ("out", 1, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            ("err", 2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(asked[stream], how), number)
        if asked["largest"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["largest"], asked["largest"]))
        code = 0
        try:
            sys.argv = ["mixmerge", *asked["arguments"]]
            cli.main()
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: its exit code, minus the number of the signal that ended it, and what it wrote."""

    code: int
    out: str
    err: str


class Commands:
    """``mixmerge`` commands in processes of their own, one at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        path = os.pathsep.join(map(str, (ROOT, STANDINS[0])))
        self._starter = subprocess.Popen(
            [sys.executable, "-P", "-c", STARTER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def begin(self, *arguments: object, stdin: bytes = b"", largest: int = 0) -> int:
        """Start a command; its process.

        Args:
            largest: bytes of a file that it can write; 0 for any.
        """
        (self._folder / "in").write_bytes(stdin)
        asked = {name: str(self._folder / name) for name in ("in", "out", "err")}
        asked |= {"arguments": [str(one) for one in arguments], "largest": largest}  # type: ignore[dict-item]
        assert self._starter.stdin is not None
        print(json.dumps(asked), file=self._starter.stdin, flush=True)
        return int(self._said())

    def end(self) -> Ended:
        """What came of the command that was begun."""
        code = int(self._said())
        out, err = ((self._folder / name).read_text(errors="replace") for name in ("out", "err"))
        return Ended(code, out, err)

    def __call__(self, *arguments: object, code: int = 0, stdin: bytes = b"", largest: int = 0) -> Ended:
        """A command from start to end; its exit code is checked."""
        self.begin(*arguments, stdin=stdin, largest=largest)
        ended = self.end()
        assert ended.code == code, ended
        return ended

    def close(self) -> None:
        self._starter.communicate()

    def _said(self) -> str:
        assert self._starter.stdout is not None
        return self._starter.stdout.readline()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()


@dataclass(frozen=True)
class Case:
    """A mixture and a file of requests for it."""

    mixture: Path
    requests: Path
    folder: Path


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Case]:
    """``case(experts, requests, **sections)``: files of a mixture, whose router prefers its experts in their order.

    Args of the callable:
        experts: name -> what the YAML says of it.
        requests: lines of the input; texts, or JSON values.
        sections: of the YAML: policy, compose, generate.
    """

    def make(
        experts: Mapping[str, Any], requests: Sequence[Any], *, name: str = "case", **sections: Any
    ) -> Case:
        folder = tmp_path / name
        folder.mkdir()
        names = tuple(experts)
        score = np.tile(np.linspace(0.9, 0.1, len(names)), (4, 1))
        OutcomeTable(ids=tuple("abcd"), queries=tuple("abcd"), experts=names, score=np.round(score, 3)).write(
            folder / "outcomes.jsonl"
        )
        router = {"kind": "best_single", "outcomes": str(folder / "outcomes.jsonl")}
        mixture = folder / "mix.yaml"
        mixture.write_text(
            yaml.safe_dump({"experts": dict(experts), "router": router, **sections}, sort_keys=False)
        )
        lines = [one if isinstance(one, str) else json.dumps(one) for one in requests]
        (folder / "requests.jsonl").write_text(
            "".join(f"{line}\n" for line in lines), errors="surrogateescape"
        )
        return Case(mixture, folder / "requests.jsonl", folder)

    return make


TOKEN = secrets.token_hex(16)  # one for a process: Ray keeps the first it is told


@pytest.fixture(scope="module")
def session() -> Iterator[Path]:
    """A Ray cluster of this machine with two CPUs, and the folder where it logs. Its processes see the stand-ins."""
    ray = pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="r")
    with pytest.MonkeyPatch.context() as patch:
        for one in STANDINS:
            patch.syspath_prepend(str(one))
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, [*STANDINS, ROOT])))
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)  # or Ray would write one into the user's home
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv(
            "RAY_worker_niceness", "0"
        )  # by default any other test would have a worker wait for minutes
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=200_000_000,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=folder,
        )
        yield Path(folder)
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_commands(session: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands that know the token of the cluster."""
    made = Commands(tmp_path_factory.mktemp("commands"))
    yield made
    made.close()
