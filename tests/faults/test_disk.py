"""A real small disk (tmpfs) that is full at the start, in the middle, or for good."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

DISK = 400_000  # bytes; the merges write 131,000


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted tmpfs; needs root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "mixmerge-test", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no tmpfs can be mounted here: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def recipe(kit: Any, disk: Path) -> Path:
    """Merges 8 tensors of 16 kB from another disk."""
    draw = np.random.default_rng(0)
    models = [
        kit.model(name, {f"model.layers.{n}.weight": draw.standard_normal((64, 64), "f") for n in range(8)})
        for name in ("one", "two")
    ]
    path: Path = kit.recipe(*models)
    return path


def fill(disk: Path, *, leave: int = 0) -> Path:
    """A file that takes all the room but ``leave`` bytes."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(b"\0" * 4096)
        size = max(0, file.tell() - leave)
        file.truncate(size)
    return path


def left(disk: Path) -> list[str]:
    return sorted(path.name for path in disk.iterdir() if path.name != "filler")


def test_too_small_from_the_start(kit: Any, disk: Path, recipe: Path, cli: Any) -> None:
    filler = fill(disk, leave=100_000)
    cli("merge", recipe, disk / "out").refused(f"{disk}: the disk has 0.1 MB free, the output needs 0.1 MB")
    assert left(disk) == []
    filler.unlink()
    assert cli("merge", recipe, disk / "out").code == 0


def test_full_before_the_first_byte(disk: Path, recipe: Path, killable: Any) -> None:
    """The room is taken after it was looked for."""
    pid = killable.stop("merge", recipe, disk / "out", "--quiet", at="open model.safetensors")
    fill(disk)
    killable.go_on(pid).refused("out.mixmerge-partial: the disk is full", "run the same command")
    assert left(disk) == [], "nothing to go on from, so nothing is kept"


@pytest.mark.parametrize("notes", [20_000, 10**9])
def test_full_in_the_middle(
    notes: int, kit: Any, disk: Path, recipe: Path, killable: Any, files_of: Any
) -> None:
    """A real ENOSPC; after freeing space the same command goes on, and the bytes are the same."""
    killable.flush_every(notes)
    arguments = ("merge", recipe, disk / "out", "--quiet", "--json", "--threads", "1")
    assert killable.run(*arguments).json()["resumed"] == 0
    whole = files_of(disk / "out")
    shutil.rmtree(disk / "out")
    pid = killable.stop(*arguments, at="pwrite 6")  # the header and four tensors are written
    filler = fill(disk, leave=4096)
    killable.go_on(pid).refused("model.safetensors: the disk is full", "run the same command: it goes on")
    assert left(disk) == [".out.mixmerge-partial"]
    killable.run(*arguments).refused("the disk is full")
    assert left(disk) == [".out.mixmerge-partial"]
    filler.unlink()
    assert killable.run(*arguments).json()["resumed"] >= 3
    assert files_of(disk / "out") == whole
    assert left(disk) == ["out"]


def test_full_at_the_end(disk: Path, recipe: Path, killable: Any, files_of: Any) -> None:
    """No room for the small files; nothing of the work is lost, and an old folder stays."""
    arguments = ("merge", recipe, disk / "out", "--quiet", "--json", "--overwrite")
    assert killable.run(*arguments).code == 0
    before = files_of(disk / "out")
    pid = killable.stop(*arguments, at="open config.json")
    filler = fill(disk)
    killable.go_on(pid).refused("config.json: the disk is full")
    assert files_of(disk / "out") == before
    filler.unlink()
    assert killable.run(*arguments).json()["resumed"] == 8
    assert files_of(disk / "out") == before
    assert left(disk) == ["out"]


def test_a_mount_point_is_not_replaced(disk: Path, recipe: Path, cli: Any) -> None:
    """It could not be, and that shows before any work is done."""
    cli("merge", recipe, disk, "--overwrite").refused("disk: it exists", "another disk is mounted on it")
    assert disk.is_mount()
    assert left(disk) == []


def test_read_only(disk: Path, recipe: Path, cli: Any) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    cli("merge", recipe, disk / "out").refused("cannot be written: Read-only file system")
    assert left(disk) == []


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB that can keep 2 MB: what is written looks fine until it has to reach the medium."""
    medium, folder = tmp_path / "medium", tmp_path / "failing"
    medium.mkdir()
    folder.mkdir()
    image = medium / "image"
    commands = [
        ["mount", "-t", "tmpfs", "-o", "size=2m", "mixmerge-test", str(medium)],
        ["truncate", "--size", "16M", str(image)],
        ["mkfs.ext4", "-q", "-O", "^has_journal", str(image)],
        ["mount", "-o", "loop", str(image), str(folder)],
    ]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no loop device can be mounted here: {getattr(error, 'stderr', error)}")
    finally:
        mounted = [path for path in (folder, medium) if path.is_mount()]
        if folder not in mounted:
            for path in mounted:
                subprocess.run(["umount", "--lazy", str(path)], check=True)
    yield folder
    for path in (folder, medium):
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("notes", [1_000_000, 10**9])
def test_a_disk_that_fails_when_it_writes_back(notes: int, kit: Any, failing: Path, killable: Any) -> None:
    """Every write succeeds and a sync, by one thread or the other, does not: nothing is published."""
    draw = np.random.default_rng(0)
    tensors = {f"model.layers.{n}.weight": draw.standard_normal((4096, 64), "f") for n in range(8)}
    recipe = kit.recipe(kit.model("one", tensors), kit.model("two", tensors))
    killable.flush_every(notes)
    ran = killable.run("merge", recipe, failing / "out", "--quiet").refused(".out.mixmerge-partial: ")
    assert "cannot be written: Input/output error" in ran.err or "the disk is full" in ran.err
    assert not (failing / "out").exists()
