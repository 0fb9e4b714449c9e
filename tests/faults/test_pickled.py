"""``.bin`` files: read in place through torch's weights-only loader, so nothing in them ever runs."""

from __future__ import annotations

import io
import os
import pickle
import random
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixmerge.checkpoint.header import DTYPE_BYTES
from mixmerge.checkpoint.pickled import read_bin_header
from mixmerge.errors import CheckpointError


def as_bin(folder: Path, state: Any = None, **options: Any) -> Path:
    """Turn a model of ``Kit`` into a ``.bin`` model, or give it another state."""
    state = load_file(folder / "model.safetensors") if state is None else state
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin", **options)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_merges_as_safetensors_do(kit: Any, cli: Any, files_of: Any) -> None:
    """Also where tensors share a storage, start in its middle, or are parameters."""
    one, two = kit.model("one", 1), kit.model("two", 2)
    assert cli("merge", kit.recipe(one, two), kit.out).code == 0
    weights = files_of(kit.out)["model.safetensors"]
    state = load_file(two / "model.safetensors")
    names = list(state)
    shared = torch.cat([state[names[0]], state[names[1]]])
    state[names[0]], state[names[1]] = shared[:16], shared[16:]
    state[names[2]] = torch.nn.Parameter(state[names[2]])
    as_bin(one)
    as_bin(two, state)
    assert cli("merge", kit.root / "recipe.yaml", kit.out, "--overwrite").code == 0
    assert files_of(kit.out)["model.safetensors"] == weights


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def archive(path: Path, payload: bytes) -> None:
    """A file as torch.save makes it, with a pickle of our own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr("pytorch_model/data.pkl", payload)
        file.writestr("pytorch_model/version", "3\n")


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch tells of old pickles
@pytest.mark.parametrize("kind", ["value", "key", "whole", "legacy", "bare pickle", "numpy"])
def test_a_pickle_that_runs_code_never_does(kind: str, kit: Any, cli: Any, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    bad, evil = kit.model("bad", 1), Evil(proof)
    weights = bad / "pytorch_model.bin"
    if kind in ("value", "legacy"):
        state = {"a.weight": torch.zeros(2), "b": evil}
        as_bin(bad, state, _use_new_zipfile_serialization=kind == "value")
    elif kind == "numpy":
        as_bin(bad, {"a.weight": np.array([evil], dtype=object)})
    else:
        as_bin(bad, {})
        payload = pickle.dumps(evil if kind != "key" else [evil, {"a": 1}])
        if kind == "bare pickle":
            weights.write_bytes(payload)
        else:
            archive(weights, payload)
    recipe = kit.recipe(kit.model("good", 2), bad)
    cli("merge", recipe, kit.out).refused(f"{weights}: ", "Save the model again with safe_serialization")
    assert not proof.exists()
    kit.clean()
    if kind in ("value", "legacy"):  # the payload is live: torch's own unrestricted loader runs it
        torch.load(weights, weights_only=False)
        assert proof.is_dir()


def test_legacy_files_are_refused(kit: Any, cli: Any) -> None:
    bad = as_bin(kit.model("bad", 1), _use_new_zipfile_serialization=False)
    recipe = kit.recipe(bad, kit.model("good", 2))
    cli("merge", recipe, kit.out).refused(
        "bin: it is not a zip archive", "before torch 1.6", "safe_serialization"
    )
    kit.clean()


ODD = {
    "a list": ([torch.zeros(2)], "it holds a list, not a state dict"),
    "nested": ({"state_dict": {"a": torch.zeros(2)}}, "entry 'state_dict' is not a tensor"),
    "a number": ({"a": torch.zeros(2), "step": 7}, "entry 'step' is not a tensor"),
    "transposed": ({"a": torch.zeros(2, 3).T}, "cannot be read in place"),
    "complex": ({"a": torch.zeros(2, dtype=torch.complex64)}, "cannot be read in place"),
    "sparse": ({"a": torch.eye(3).to_sparse()}, "tensor 'a' is torch.sparse_coo, not dense"),
    "on meta": ({"a": torch.zeros(2, device="meta")}, "cannot be read in place"),
    "not text": ({"\ud800": torch.zeros(2)}, "is not a tensor"),
}


@pytest.mark.parametrize("kind", ODD)
def test_states_that_are_not_dense_tensors(kind: str, kit: Any, cli: Any) -> None:
    state, message = ODD[kind]
    bad = as_bin(kit.model("bad", 1), state)
    cli("merge", kit.recipe(bad, kit.model("good", 2)), kit.out).refused(
        f"{bad}/pytorch_model.bin: ", message
    )
    kit.clean()


def test_compressed_records_are_refused(tmp_path: Path) -> None:
    stored, squeezed = tmp_path / "a.bin", tmp_path / "b.bin"
    torch.save({"a": torch.zeros(1000)}, stored)
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(CheckpointError, match="compressed"):
        read_bin_header(squeezed)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_in_any_way(tmp_path: Path) -> None:
    """A file with random bytes changed, or cut: refused, or every tensor is inside the file."""
    buffer = io.BytesIO()
    torch.save({"a.weight": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(4).bfloat16()}, buffer)
    good, path = buffer.getvalue(), tmp_path / "model.bin"
    draw, refused = random.Random(0), 0
    for _ in range(400):
        content = bytearray(good)
        for _ in range(draw.choice([1, 1, 2, 8])):
            content[draw.randrange(len(good))] = draw.choice([0, 255, draw.randrange(256)])
        if draw.random() < 0.1:
            del content[draw.randrange(len(good)) :]
        path.write_bytes(content)
        try:
            tensors = read_bin_header(path)
        except CheckpointError:
            refused += 1
            continue
        for tensor in tensors.values():
            assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(content)
            assert tensor.nbytes == tensor.elements * DTYPE_BYTES[tensor.dtype]
    assert 100 < refused < 400


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_buffers_that_are_not_merged(suffix: str, kit: Any, cli: Any, read_tensors: Any) -> None:
    """Integers and booleans: the same in all inputs, they are copied; if two differ, that is said."""
    ids = torch.arange(2**21 + 3)  # more than one piece, and the difference is in the last
    other = torch.cat([ids[:-1], torch.tensor([0])])
    mask = torch.tensor([True, False, True])
    for name, buffer in (("one", ids), ("two", ids), ("three", other)):
        state = {"w": torch.ones(4), "position_ids": buffer, "mask": mask, "none": torch.zeros(0, 3)}
        folder = kit.model(name, {key: value.numpy() for key, value in state.items()})
        if suffix == "bin":
            as_bin(folder, state)
    assert cli("merge", kit.recipe(kit.root / "one", kit.root / "two"), kit.out).code == 0
    written = read_tensors(kit.out)
    assert torch.equal(written["position_ids"], ids)
    assert torch.equal(written["mask"], mask)
    assert written["none"].shape == (0, 3)
    recipe = kit.recipe(kit.root / "one", kit.root / "two", kit.root / "three")
    ran = cli("merge", recipe, kit.root / "else").refused(
        "tensor 'position_ids': it holds I64", "three differ in it"
    )
    assert "one and" in ran.err
    assert not list(kit.root.glob("*else*"))
