"""``kill -9`` at every step of a merge: nothing is left, or a partial that the same command goes on with."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.engine.merge import merge as merge_here

TENSORS = 8
KILLED = -signal.SIGKILL
Files = dict[str, bytes]


def layers(seed: int, *, rows: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    shape = (rows, 64)
    return {f"model.layers.{n}.mlp.weight": draw.standard_normal(shape, np.float32) for n in range(TENSORS)}


def command(kit: Any, *options: str, weight: float = 1.0, rows: int = 16) -> list[str]:
    """A merge of three models into two shards, of 8 tensors of 4 kB; each weight has a recipe of its own."""
    folders = {name: kit.root / name for name in ("base", "one", "two")}
    for seed, (name, folder) in enumerate(folders.items()):
        if not folder.exists():
            kit.model(name, layers(seed, rows=rows))
    recipe = kit.recipe(
        *(folders["one"], folders["two"]),
        base=folders["base"],
        method="ties",
        each={"weight": weight, "density": 0.5},
        name=f"{weight}.yaml",
        output={"shard_size": TENSORS // 2 * rows * 64 * 4},
    )
    return ["merge", str(recipe), str(kit.out), "--quiet", "--json", "--threads", "1", *options]


@pytest.fixture
def whole(kit: Any, killable: Any, files_of: Callable[[Path], Files]) -> Files:
    """What an uninterrupted merge writes; its steps are ``killable.steps``."""
    assert killable.run(*command(kit)).json()["resumed"] == 0
    files = files_of(kit.out)
    assert {"model-00001-of-00002.safetensors", "config.json", "mixmerge_manifest.json"} < files.keys()
    shutil.rmtree(kit.out)
    kit.clean()
    return files


def published(steps: list[str]) -> bool:
    """Whether a killed process, whose last step was not made, had given the folder its name."""
    return any(step.startswith("os.rename .out.mixmerge-partial") for step in steps[:-1])


LATE = "open config.json"  # from here on, a merge takes the same steps every time
KINDS = "os.mkdir open os.truncate pwrite write fdatasync fsync os.remove os.rename"


@pytest.mark.slow
def test_at_every_step(kit: Any, killable: Any, whole: Files, files_of: Any) -> None:
    merge, steps = command(kit), killable.steps
    assert {step.split()[0] for step in steps} == set(KINDS.split())
    late = steps.index(LATE)
    places = [*range(1, late + 1), *((LATE, after) for after in range(len(steps) - late))]
    resumed = []
    for at in places:
        assert killable.run(*merge, die_at=at).code == KILLED, at
        place = f"{at}, {killable.steps[-1]}"
        if not published(killable.steps):
            assert not kit.out.exists(), f"a folder is there after a kill at {place}"
            resumed.append(killable.run(*merge).json()["resumed"])
        assert files_of(kit.out) == whole, f"differs after a kill at {place}"
        shutil.rmtree(kit.out)
        kit.clean()
    assert len(resumed) >= 30
    assert sum(count > 0 for count in resumed) >= 12
    assert max(resumed) == TENSORS


@pytest.mark.slow
def test_overwriting_at_every_late_step(kit: Any, killable: Any, whole: Files, files_of: Any) -> None:
    merge = command(kit, "--overwrite")
    shutil.copytree(kit.root / "one", kit.out)
    before = files_of(kit.out)
    assert killable.run(*merge).code == 0
    first = killable.steps.index(LATE)
    seen = set()
    for after in range(len(killable.steps) - first):
        shutil.rmtree(kit.out)
        shutil.copytree(kit.root / "one", kit.out)
        assert killable.run(*merge, die_at=(LATE, after)).code == KILLED
        place = killable.steps[-1]
        where = kit.out if kit.out.exists() else kit.old
        files = files_of(where)
        assert files == (whole if published(killable.steps) else before), f"lost by a kill at {place}"
        seen.add((where.name, files == whole))
        assert killable.run(*merge).code == 0, place
        assert files_of(kit.out) == whole, f"differs after a kill at {place}"
        assert not kit.partial.exists()
        assert not kit.old.exists()
    assert seen == {("out", False), (kit.old.name, False), ("out", True)}


def test_killed_between_the_renames(kit: Any, killable: Any, whole: Files, files_of: Any) -> None:
    """The next merge puts the old folder back before it does anything else."""
    shutil.copytree(kit.root / "one", kit.out)
    before = files_of(kit.out)
    killed = killable.run(*command(kit, "--overwrite"), die_at="os.rename .out.mixmerge-partial")
    assert killed.code == KILLED
    assert not kit.out.exists()
    assert files_of(kit.old) == before
    killable.run(*command(kit)).refused("out: it exists")
    assert files_of(kit.out) == before
    assert killable.run(*command(kit, "--overwrite")).code == 0
    assert files_of(kit.out) == whole
    shutil.rmtree(kit.out)
    kit.clean()


def kill_late(kit: Any, killable: Any, merge: list[str]) -> None:
    """Leave a partial whose journal vouches for every tensor."""
    assert killable.run(*merge, die_at=LATE).code == KILLED
    lines = (kit.partial / "journal.jsonl").read_text().splitlines()
    assert len({name for line in lines[1:] for name in json.loads(line)}) == TENSORS


def test_other_recipes_are_not_resumed(kit: Any, killable: Any, whole: Files, files_of: Any) -> None:
    merge, other = command(kit), command(kit, weight=0.5)
    kill_late(kit, killable, merge)
    assert killable.run(*other).json()["resumed"] == 0
    half = files_of(kit.out)
    assert half.keys() == whole.keys()
    assert half != whole
    shutil.rmtree(kit.out)
    # The journal of one recipe does not shine through that of the next.
    kill_late(kit, killable, merge)
    kill_late(kit, killable, other)
    assert killable.run(*other).json()["resumed"] == TENSORS
    assert files_of(kit.out) == half
    shutil.rmtree(kit.out)
    kit.clean()


def test_other_inputs_are_not_resumed(kit: Any, killable: Any, whole: Files, files_of: Any) -> None:
    merge, shard = command(kit), kit.root / "two" / "model.safetensors"
    kill_late(kit, killable, merge)
    os.utime(shard, ns=(0, 0))
    assert killable.run(*merge).json()["resumed"] == 0
    assert files_of(kit.out) == whole
    shutil.rmtree(kit.out)

    kill_late(kit, killable, merge)
    content = bytearray(shard.read_bytes())
    content[-4095] ^= 0x40  # the size and the time stay as they are
    shard.write_bytes(content)
    os.utime(shard, ns=(0, 0))
    assert killable.run(*merge).json()["resumed"] == 0
    assert files_of(kit.out)["mixmerge_manifest.json"] != whole["mixmerge_manifest.json"]
    shutil.rmtree(kit.out)
    kit.clean()


def damaged(partial: Path) -> Iterator[str]:
    """Spoil a partial in one way after another."""
    journal = partial / "journal.jsonl"
    # One tensor a line, as a slow disk would have it: how many go together is the writers' timing.
    head, *lines = journal.read_text().splitlines()
    names = [name for line in lines for name in json.loads(line)]
    noted = "".join(f"{line}\n" for line in (head, *(json.dumps([name]) for name in names))).encode()
    for cut in (0, 1, 40, len(noted) // 2, len(noted) - 2, len(noted) - 1):
        journal.write_bytes(noted[:cut])
        yield f"journal cut at byte {cut}"
    for tail in (b"\0" * 99, b'["model.layers.0', b"\xff\xfe\n", b"7\n", b"\0\n[]\n"):
        journal.write_bytes(noted + tail)
        yield f"journal followed by {tail!r}"
    journal.unlink()
    yield "no journal"
    shard = next(partial.glob("model-00002*"))
    shard.unlink()
    yield "no second shard"
    with shard.open("r+b") as file:
        file.truncate(100)
    yield "second shard too short"
    with shard.open("r+b") as file:
        file.write(b"\xff" * 64)
    yield "header overwritten"
    (partial / "left").write_text("by hand")
    journal.write_text("")
    yield "a file of another kind"


def test_damaged_partials(kit: Any, killable: Any, whole: Files, files_of: Any, tmp_path: Path) -> None:
    """Whatever a power cut left in a partial, the result is the same."""
    merge = command(kit)
    kill_late(kit, killable, merge)
    kept = Path(shutil.copytree(kit.partial, tmp_path / "kept"))
    resumed = []
    for way in damaged(kit.partial):
        result = merge_here(merge[1], kit.out, threads=1)
        assert files_of(kit.out) == whole, way
        resumed.append(result.resumed)
        shutil.rmtree(kit.out)
        shutil.copytree(kept, kit.partial)
    assert {0, TENSORS} < set(resumed)


def test_ctrl_c_loses_nothing(kit: Any, killable: Any, whole: Files, files_of: Any) -> None:
    killable.flush_every(10**9)  # nothing is in the journal before
    merge = command(kit)
    pid = killable.stop(*merge, at="pwrite 6")
    assert (kit.partial / "journal.jsonl").read_bytes().count(b"\n") == 1
    os.kill(pid, signal.SIGINT)
    assert killable.go_on(pid).code == 130
    assert not kit.out.exists()
    assert killable.run(*merge).json()["resumed"] >= 1
    assert files_of(kit.out) == whole


LAUNCH = """
import sys
import mixmerge.engine.output as output
output.FLUSH_BYTES = 2_000_000
from mixmerge.cli import main
main()
"""


def moments(kit: Any) -> Iterator[tuple[str, Callable[[], bool], float]]:
    """When to kill: (name, what has to be there, seconds after that)."""
    journal = kit.partial / "journal.jsonl"

    def noted(lines: int) -> bool:
        try:
            return journal.read_bytes().count(b"\n") > lines
        except FileNotFoundError:  # not yet, or no more
            return False

    for delay in (0.0, 0.1, 0.3, 0.6):
        yield "start", lambda: True, delay
    for delay in (0.0, 0.03, 0.1):
        yield "partial", kit.partial.exists, delay
    for lines in (0, 1, 2, 4, 6):
        yield "journal", functools.partial(noted, lines), 0.001 * lines
    for name in ("config.json", "README.md"):
        yield name, (kit.partial / name).exists, 0.0


@pytest.mark.slow
def test_python_m_mixmerge_killed_from_outside(kit: Any, killable: Any, files_of: Any) -> None:
    """Processes of their own, killed by another one at times that are not known beforehand."""
    merge = command(kit, rows=8192)  # 8 tensors of 2 MB
    killable.flush_every(2_000_000)
    assert killable.run(*merge).code == 0
    whole = files_of(kit.out)
    shutil.rmtree(kit.out)
    plain = [sys.executable, "-P", "-m", "mixmerge", *merge]
    noting = [sys.executable, "-P", "-c", LAUNCH, *merge]
    killed, resumed = 0, []
    for name, there, delay in moments(kit):
        arguments = plain if name in ("start", "partial") else noting
        running = subprocess.Popen(arguments, cwd=kit.root, stdout=subprocess.DEVNULL)
        while not there() and running.poll() is None:
            time.sleep(0.0005)
        time.sleep(delay)
        running.kill()
        killed += running.wait() == KILLED
        if not kit.out.exists():
            resumed.append(killable.run(*merge).json()["resumed"])
        assert files_of(kit.out) == whole, f"differs after a kill {delay} s after {name}"
        shutil.rmtree(kit.out)
        kit.clean()
    assert killed >= 8
    assert any(resumed), resumed
