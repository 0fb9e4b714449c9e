"""Compiled loops as they are kept between processes: made once, then loaded without numba."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mixmerge.kernels import loops, native

NORMS = """
import sys
import numpy as np
from mixmerge.kernels import loops
norms = np.empty(2)
loops.row_norms(np.array([[3, 4], [0, 2]], np.float32), np.empty(8), norms)
print(*norms, "numba" in sys.modules)
"""


def norms(**environment: str) -> list[str]:
    """Two norms and whether numba was needed, from a new process."""
    run = [sys.executable, "-c", NORMS]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def kept(root: Path) -> Path:
    (file,) = root.glob("kernels/*/lowrank.row_norms.o")
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the loop in it."""
    root = tmp_path_factory.mktemp("cache")
    assert norms(MIXMERGE_CACHE=str(root)) == ["5.0", "2.0", "True"]
    return root


def test_the_second_process_needs_no_numba(made: Path) -> None:
    assert stat.S_IMODE(kept(made).stat().st_mode) == 0o600
    assert norms(MIXMERGE_CACHE=str(made)) == ["5.0", "2.0", "False"]
    assert len(list(kept(made).parent.iterdir())) == 1, "a temporary file stayed"


def test_two_processes_make_it_at_once(tmp_path: Path) -> None:
    run, environment = [sys.executable, "-c", NORMS], os.environ | {"MIXMERGE_CACHE": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(run, text=True, env=environment, **pipes) for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [out.split()[:2] for out, _ in told] == [["5.0", "2.0"]] * 2, told
    assert len(list(kept(tmp_path).parent.iterdir())) == 1, "a temporary file stayed"
    assert norms(MIXMERGE_CACHE=str(tmp_path)) == ["5.0", "2.0", "False"]


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "others may write"])
def test_what_may_not_be_trusted_is_made_again(harm: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    file = kept(tmp_path)
    good = file.read_bytes()
    if harm == "others may write":
        file.chmod(0o666)
    else:
        flipped = bytearray(good)
        flipped[len(good) // 2] ^= 1
        file.write_bytes({"cut": good[:-100], "flipped": bytes(flipped), "empty": b""}[harm])
    assert norms(MIXMERGE_CACHE=str(tmp_path)) == ["5.0", "2.0", "True"]
    assert kept(tmp_path).read_bytes() == good
    assert norms(MIXMERGE_CACHE=str(tmp_path)) == ["5.0", "2.0", "False"]


def test_no_place_to_keep_it_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert norms(MIXMERGE_CACHE=str(tmp_path / "file")) == ["5.0", "2.0", "True"]


def test_the_key_follows_the_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = native._key()
    for name in ("native.py", "compiled/a.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    keys = {before}
    for text in ("one", "two"):
        (tmp_path / "compiled" / "a.py").write_text(text)
        native._key.cache_clear()
        keys.add(native._key())
    monkeypatch.undo()
    native._key.cache_clear()
    assert len(keys) == 3
    assert native._key() == before


@pytest.mark.parametrize(
    "values",
    [np.ones((2, 2)), np.ones(4, np.float32), np.ones((2, 4), np.float32)[:, ::2], np.ones((2, 2), np.int32)],
)
def test_arguments_are_checked(values: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"lowrank\.row_norms"):
        loops.row_norms(values, np.empty(8), np.empty(2))


def test_arguments_are_counted() -> None:
    with pytest.raises(ValueError, match="argument"):
        loops.row_norms(np.ones((2, 2), np.float32), np.empty(8))


def test_numba_still_works_beside_it(made: Path) -> None:
    """What the loops never call ends in traps; numba's own code must not meet these."""
    after = """
import numba
@numba.njit
def halves(n):
    if n < 0:
        raise ValueError(n)
    return np.arange(n) / 2
@numba.cfunc("i8(i8)")
def face(n):
    return halves(n).size
print(halves(3).sum(), face.ctypes(5))
try:
    halves(-1)
except ValueError as error:
    print(error)
"""
    run = [sys.executable, "-c", NORMS + after]
    environment = os.environ | {"MIXMERGE_CACHE": str(made)}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.split() == ["5.0", "2.0", "False", "1.5", "5", "-1"], done.stderr
