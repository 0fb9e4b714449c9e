"""What may become an output folder, who may write it, and that nothing is lost on the way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.engine.merge import merge
from mixmerge.errors import OutputError

Files = dict[str, bytes]


@pytest.fixture
def recipe(kit: Any) -> Path:
    path: Path = kit.recipe(kit.model("one", 1), kit.model("two", 2))
    return path


def everything(root: Path) -> dict[str, bytes | str]:
    """Files, folders and links below a folder; links are not followed."""
    found: dict[str, bytes | str] = {}
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in (*folders, *files)):
            name = path.relative_to(root).as_posix()
            found[name] = str(path.readlink()) if path.is_symlink() else "folder" if path.is_dir() else b""
            if path.is_file() and not path.is_symlink():
                found[name] = path.read_bytes()
    return found


def a_file(kit: Any) -> Path:
    kit.out.write_text("a thesis")
    return kit.out  # type: ignore[no-any-return]


def a_link_to_a_model(kit: Any) -> Path:
    kit.out.symlink_to(kit.model("model", 3))
    return kit.out  # type: ignore[no-any-return]


def a_link_to_nothing(kit: Any) -> Path:
    kit.out.symlink_to("nowhere")
    return kit.out  # type: ignore[no-any-return]


def a_folder_of_notes(kit: Any) -> Path:
    kit.out.mkdir()
    (kit.out / "notes.txt").write_text("a thesis")
    return kit.out  # type: ignore[no-any-return]


def a_project_with_a_config(kit: Any) -> Path:
    kit.out.mkdir()
    (kit.out / "config.json").write_text("{}")
    (kit.out / "main.py").write_text("a thesis")
    return kit.out  # type: ignore[no-any-return]


def a_trainer_output(kit: Any) -> Path:
    kit.model("out", 3)
    kit.model("out/checkpoint-500", 4)
    return kit.out  # type: ignore[no-any-return]


def an_input(kit: Any) -> Path:
    return kit.root / "one"  # type: ignore[no-any-return]


def a_link_to_an_input(kit: Any) -> Path:
    kit.out.symlink_to(kit.root / "one")
    return kit.out  # type: ignore[no-any-return]


def the_parent_of_an_input(kit: Any) -> Path:
    kit.model("out", 3)
    moved = (kit.root / "one").rename(kit.out / "one")
    kit.recipe(moved, kit.root / "two")
    return kit.out  # type: ignore[no-any-return]


def the_home_of_an_input_file(kit: Any) -> Path:
    """As in the hub's cache: the snapshot is an input, and OUT is where its files really are."""
    snapshot, blobs = kit.root / "org" / "snapshots" / "abc", kit.root / "org" / "blobs"
    snapshot.parent.mkdir(parents=True)
    (kit.root / "one").rename(snapshot)
    blobs.mkdir()
    (snapshot / "model.safetensors").rename(blobs / "model.safetensors")
    (snapshot / "model.safetensors").symlink_to("../../blobs/model.safetensors")
    (blobs / "config.json").write_text("{}")
    kit.recipe(snapshot, kit.root / "two")
    return blobs  # type: ignore[no-any-return]


REFUSED: list[tuple[Callable[[Any], Path], str]] = [
    (a_file, "not a model folder"),
    (a_link_to_a_model, "it is a link"),
    (a_link_to_nothing, "it is a link"),
    (a_folder_of_notes, "not a model folder"),
    (a_project_with_a_config, "not a model folder"),
    (a_trainer_output, "not a model folder"),
    (an_input, "is an input of this merge"),
    (a_link_to_an_input, "is an input of this merge"),
    (the_parent_of_an_input, "is an input of this merge"),
    (the_home_of_an_input_file, "is an input of this merge"),
]


@pytest.mark.parametrize(("make", "why"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refused_even_with_overwrite(
    make: Callable[[Any], Path], why: str, kit: Any, recipe: Path, cli: Any
) -> None:
    out = make(kit)
    before = everything(kit.root)
    cli("merge", recipe, out).refused(out.name)
    cli("merge", recipe, out, "--overwrite").refused(out.name, why)
    assert everything(kit.root) == before


@pytest.mark.parametrize("name", [".", "../here", "..", "../../../there", "/"])
def test_the_folder_it_runs_in_is_refused(
    name: str, kit: Any, recipe: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, its parents, and these under other names; even where all are model folders."""
    here = kit.root / "there" / "above" / "here"
    for folder in (kit.root / "there", kit.root / "there" / "above", here):
        kit.model(folder.relative_to(kit.root).as_posix(), 3)
    monkeypatch.chdir(here)
    before = everything(kit.root)
    cli("merge", recipe, name).refused("it exists" if name != "/" else "is an input of this merge")
    cli("merge", recipe, name, "--overwrite").refused("not overwritten" if name != "/" else "is an input")
    assert everything(kit.root) == before


@pytest.mark.parametrize("make", ["model", "empty"])
def test_existing_needs_overwrite(make: str, kit: Any, recipe: Path, cli: Any, files_of: Any) -> None:
    if make == "model":
        kit.model("out", 3)
        (kit.out / "left.txt").write_text("of the old model")
    else:
        kit.out.mkdir()
    before = everything(kit.root)
    cli("merge", recipe, kit.out).refused("out: it exists", "--overwrite")
    assert everything(kit.root) == before
    assert cli("merge", recipe, kit.out, "--overwrite").code == 0
    files = files_of(kit.out)
    assert "mixmerge_manifest.json" in files
    assert "left.txt" not in files
    assert not kit.old.exists()
    assert not kit.partial.exists()
    assert cli("merge", recipe, kit.out, "--overwrite").code == 0
    assert files_of(kit.out) == files


@pytest.mark.parametrize("name", ["out", "out/", "./out", "new/../out", "a/b/out", "with space/ö"])
def test_names_of_one_folder(name: str, kit: Any, recipe: Path, cli: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(kit.root)
    (kit.root / "new").mkdir()
    assert cli("merge", recipe, name).code == 0
    assert (kit.root / name / "model.safetensors").is_file()
    assert not [path for path in kit.root.rglob("*") if ".mixmerge-" in path.name]


def test_places_that_cannot_be_written(kit: Any, recipe: Path, cli: Any) -> None:
    (kit.root / "file").write_text("")
    before = everything(kit.root)
    cli("merge", recipe, kit.root / "file" / "out").refused("file: it is a file")
    cli("merge", recipe, kit.root / ("o" * 250)).refused("File name too long")
    cli("merge", recipe, kit.root / ("o" * 300)).refused("File name too long")
    assert everything(kit.root) == before


def test_a_partial_that_is_a_link_is_not_followed(kit: Any, recipe: Path, cli: Any) -> None:
    treasure = kit.root / "treasure"
    treasure.mkdir()
    (treasure / "thesis.txt").write_text("years")
    kit.partial.symlink_to(treasure)
    before = everything(kit.root)
    cli("merge", recipe, kit.out).refused(kit.partial.name)
    assert everything(kit.root) == before


def test_a_failing_overwrite_leaves_the_old_folder(
    kit: Any, recipe: Path, cli: Any, killable: Any, files_of: Any
) -> None:
    kit.model("out", 3)
    before = files_of(kit.out)
    broken = {"model.layers.0.mlp.up_proj.weight": np.full((16, 64), np.nan, np.float32)}
    nan = kit.model("nan", broken)
    path = kit.recipe(nan, nan, name="nan.yaml")
    cli("merge", path, kit.out, "--overwrite").refused("nan")
    assert files_of(kit.out) == before
    pid = killable.stop("merge", recipe, kit.out, "--overwrite", "--quiet", at="os.rename")
    assert files_of(kit.out) == before, "untouched until the very end"
    assert killable.go_on(pid).code == 0
    assert files_of(kit.out) != before
    shutil.rmtree(kit.out)
    kit.clean()


def test_a_rename_that_fails_puts_the_old_folder_back(
    kit: Any, recipe: Path, killable: Any, files_of: Any
) -> None:
    """Between the two renames somebody takes the name."""
    kit.model("out", 3)
    before = files_of(kit.out)
    arguments = ("merge", recipe, kit.out, "--overwrite", "--quiet", "--json")
    pid = killable.stop(*arguments, at="os.rename .out.mixmerge-partial")
    kit.out.write_text("quick")
    killable.go_on(pid).refused("out: cannot be written")
    assert kit.out.read_text() == "quick"
    assert files_of(kit.old) == before
    kit.out.unlink()
    assert killable.run(*arguments).json()["resumed"] == 4
    assert not kit.old.exists()


def test_a_name_taken_meanwhile(kit: Any, recipe: Path, killable: Any, files_of: Any) -> None:
    arguments = ("merge", recipe, kit.out, "--quiet", "--json")
    pid = killable.stop(*arguments, at="open config.json")
    kit.out.mkdir()
    (kit.out / "notes.txt").write_text("a thesis")
    killable.go_on(pid).refused("out: it exists")
    assert files_of(kit.out) == {"notes.txt": b"a thesis"}
    shutil.rmtree(kit.out)
    assert killable.run(*arguments).json()["resumed"] == 4


def test_two_merges_into_one_folder(kit: Any, recipe: Path, process: Any, killable: Any, cli: Any) -> None:
    """Two real processes: while one is in the middle, the other is refused and disturbs nothing."""
    other = kit.recipe(
        kit.root / "two", kit.root / "one", method="ties", base=kit.root / "one", name="o.yaml"
    )
    pid = killable.stop("merge", recipe, kit.out, "--quiet", "--json", at="fdatasync")
    before = everything(kit.root)
    link = kit.root / "link"
    link.symlink_to(kit.root)
    process("merge", recipe, kit.out).refused("out: another merge is writing it")
    cli("merge", other, link / "out", "--overwrite").refused("out: another merge is writing it")
    link.unlink()
    assert everything(kit.root) == before
    assert killable.go_on(pid).json()["resumed"] == 0
    assert json.loads((kit.out / "mixmerge_manifest.json").read_text())["method"] == "linear"
    shutil.rmtree(kit.out)
    kit.clean()


def test_a_killed_merge_leaves_no_lock(kit: Any, recipe: Path, killable: Any, cli: Any) -> None:
    assert killable.run("merge", recipe, kit.out, "--quiet", die_at="fdatasync").code == -9
    assert kit.partial.is_dir()
    assert cli("merge", recipe, kit.out).code == 0


def test_the_python_function_raises_the_same(kit: Any, recipe: Path) -> None:
    kit.out.mkdir()
    with pytest.raises(OutputError, match="it exists"):
        merge(recipe, kit.out)
    assert merge(recipe, kit.out, overwrite=True).path == kit.out
