"""Models of the Hugging Face hub without a network: what is in the cache works, what is not is said at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def home(kit: Any) -> Path:
    path: Path = kit.root / "huggingface"
    return path


@pytest.fixture
def cached(home: Path) -> Callable[..., Path]:
    """``cached(folder, name)``: put a model into the cache as the hub's client does."""

    def put(folder: Path, name: str, *, ref: str = "main") -> Path:
        root = home / "hub" / ("models--" + name.replace("/", "--"))
        snapshot = root / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (root / "blobs").mkdir()
        (root / "refs").mkdir()
        (root / "refs" / ref).write_text(COMMIT)
        for number, path in enumerate(sorted(folder.iterdir())):
            blob = root / "blobs" / f"{number:040x}"
            shutil.copyfile(path, blob)
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        return snapshot

    return put


def test_from_the_cache(kit: Any, home: Path, cached: Any, process: Any, files_of: Any) -> None:
    """A name, a branch and a commit; the result is that of the same models in folders."""
    offline = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    folders = [kit.model(name, seed) for seed, name in enumerate(("a", "b", "c"))]
    cached(folders[0], "org/one")
    cached(folders[1], "gpt2", ref="v2")
    cached(folders[2], "org/three")
    recipe = kit.recipe("org/one", "gpt2@v2", f"org/three@{COMMIT}")
    ran = process("merge", recipe, kit.out, "--json", env=offline)
    assert ran.json()["tensors"] == 4
    of_hub = files_of(kit.out)
    models = [entry["model"] for entry in json.loads(of_hub["mixmerge_manifest.json"])["inputs"]]
    assert models == ["org/one", "gpt2@v2", f"org/three@{COMMIT}"]
    kit.recipe(*folders)
    assert process("merge", recipe, kit.out, "--overwrite", env=offline).code == 0
    assert files_of(kit.out)["model.safetensors"] == of_hub["model.safetensors"]


def test_what_is_not_in_the_cache(kit: Any, home: Path, cached: Any, process: Any) -> None:
    """All at once: never downloaded, another branch, half downloaded, no name the hub could have."""
    snapshot = cached(kit.model("half", 1), "org/half")
    (snapshot / "model.safetensors").unlink()
    cached(kit.model("one", 2), "org/one")
    recipe = kit.recipe("org/nowhere", "org/one@v9", "org/half", "org/--", "org/one")
    ran = process("merge", recipe, kit.out, env={"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"})
    ran.refused("org/nowhere is neither a folder here nor", "hf download org/nowhere", faults=4)
    lines = ran.err.splitlines()
    assert ["models[0]" in lines[0], "models[1]" in lines[1], "models[2]" in lines[2]] == [True] * 3
    assert "it holds no weights" in lines[2]
    assert "org/-- cannot be had from the hub" in lines[3]
    kit.clean()
