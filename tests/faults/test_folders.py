"""Model folders: indexes that lead elsewhere or lie, links, configs and tokenizers that are not what they say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

NAMES = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(4)]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(folder: Path) -> Path:
    """Split a model of ``Kit`` into two shards of two tensors and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    homes = dict(zip(NAMES, (SHARDS[0], SHARDS[0], SHARDS[1], SHARDS[1]), strict=True))
    for file in SHARDS:
        save_file({name: tensors[name] for name in NAMES if homes[name] == file}, folder / file)
    write_index(folder, homes)
    return folder


def write_index(folder: Path, homes: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))


def read_index(folder: Path) -> dict[str, str]:
    homes: dict[str, str] = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return homes


@pytest.fixture
def sharded(kit: Any) -> Path:
    return shard(kit.model("sharded", 1))


@pytest.fixture
def recipe(kit: Any, sharded: Path) -> Path:
    path: Path = kit.recipe(sharded, kit.model("plain", 2))
    return path


def test_shards_are_as_good_as_one_file(kit: Any, recipe: Path, cli: Any, files_of: Any) -> None:
    assert cli("merge", recipe, kit.out).code == 0
    one = files_of(kit.out)["model.safetensors"]
    kit.recipe(kit.model("whole", 1), kit.root / "plain")
    assert cli("merge", recipe, kit.out, "--overwrite").code == 0
    assert files_of(kit.out)["model.safetensors"] == one


LEADING_OUT = [
    *(
        "../plain/model.safetensors",
        "..",
        ".",
        "",
        "/etc/passwd",
        "sub/model.safetensors",
        "./model.safetensors",
    ),
    *("a\0b", "a\nb", "\ud800", "n" * 300, "ü" * 200),
]


@pytest.mark.parametrize("target", LEADING_OUT)
def test_index_names_that_are_no_file_names(
    target: str, kit: Any, sharded: Path, recipe: Path, cli: Any
) -> None:
    write_index(sharded, {**read_index(sharded), NAMES[0]: target})
    ran = cli("merge", recipe, kit.out).refused("index.json: it names the file", "without folders is allowed")
    assert len(ran.err) < 600
    kit.clean()


@pytest.mark.parametrize("target", [7, None, ["x"], {"x": 1}])
def test_index_values_that_are_no_text(target: Any, kit: Any, sharded: Path, recipe: Path, cli: Any) -> None:
    write_index(sharded, {**read_index(sharded), NAMES[0]: target})
    cli("merge", recipe, kit.out).refused("sharded")
    kit.clean()


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "\ud800"]
)
def test_indexes_that_are_none(content: str, kit: Any, sharded: Path, recipe: Path, cli: Any) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_bytes(content.encode(errors="surrogatepass"))
    cli("merge", recipe, kit.out).refused(f"{index}: ")
    kit.clean()


def test_a_shard_that_is_missing(kit: Any, sharded: Path, recipe: Path, cli: Any) -> None:
    (sharded / SHARDS[1]).unlink()
    cli("merge", recipe, kit.out).refused(f"{sharded / SHARDS[1]}: cannot be read: No such file")
    kit.clean()


def test_an_index_that_disagrees(kit: Any, sharded: Path, recipe: Path, cli: Any) -> None:
    homes = read_index(sharded)
    write_index(sharded, {**homes, "lm_head.weight": SHARDS[0]})
    cli("merge", recipe, kit.out).refused(f"index.json: tensor 'lm_head.weight' is not in {SHARDS[0]}")
    write_index(sharded, {**homes, NAMES[0]: SHARDS[1]})
    cli("merge", recipe, kit.out).refused(f"index.json: tensor '{NAMES[0]}' is not in {SHARDS[1]}")
    kit.clean()


def test_a_tensor_in_two_shards(kit: Any, sharded: Path, recipe: Path, cli: Any) -> None:
    tensors = load_file(sharded / SHARDS[1])
    save_file({**tensors, NAMES[0]: np.zeros((16, 64), "f")}, sharded / SHARDS[1])
    cli("merge", recipe, kit.out).refused(f"{SHARDS[1]}: tensor '{NAMES[0]}' is also in {SHARDS[0]}")
    kit.clean()


@pytest.mark.parametrize("inside", [True, False])
def test_links(inside: bool, kit: Any, sharded: Path, recipe: Path, cli: Any) -> None:
    """Within the folder they are followed; a shard that is really a file of somewhere else is refused."""
    home = sharded / "weights.safetensors" if inside else kit.root / "elsewhere.safetensors"
    (sharded / SHARDS[0]).rename(home)
    (sharded / SHARDS[0]).symlink_to(home)
    ran = cli("merge", recipe, kit.out)
    if inside:
        assert ran.code == 0
        return
    ran.refused(f"{SHARDS[0]}: it is a link to {home}, outside the folder")
    kit.clean()


def snapshot(kit: Any, folder: Path) -> Path:
    """The folder as the hub's cache keeps it: every file a link into ``blobs``."""
    home = kit.root / "models--org--name"
    blobs, target = home / "blobs", home / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    target.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(path, blobs / f"{number:064x}")
        (target / path.name).symlink_to(f"../../blobs/{number:064x}")
    return target


def test_the_layout_of_the_hub_cache(kit: Any, sharded: Path, recipe: Path, cli: Any, files_of: Any) -> None:
    assert cli("merge", recipe, kit.out).code == 0
    weights = files_of(kit.out)["model.safetensors"]
    cached = snapshot(kit, sharded)
    kit.recipe(cached, kit.root / "plain")
    assert cli("merge", recipe, kit.out, "--overwrite").code == 0
    assert files_of(kit.out)["model.safetensors"] == weights
    # Out of the repository is out, from there too.
    (cached / SHARDS[0]).unlink()
    (cached / SHARDS[0]).symlink_to(sharded / SHARDS[0])
    cli("merge", recipe, kit.root / "other").refused(f"{SHARDS[0]}: it is a link to", "outside the folder")
    (cached / SHARDS[0]).unlink()
    (cached / SHARDS[0]).symlink_to("../../blobs/gone")
    cli("merge", recipe, kit.root / "other").refused(f"{SHARDS[0]}: cannot be read: No such file")


def test_no_weights(kit: Any, recipe: Path, sharded: Path, cli: Any) -> None:
    for path in sharded.glob("model*"):
        path.unlink()
    cli("merge", recipe, kit.out).refused(f"{sharded}: it holds no weights", "model.safetensors")
    kit.clean()


CONFIGS = {
    "not JSON": ("{", "it is not JSON"),
    "a list": ("[]", "it holds a list, not an object"),
    "deep": ("[" * 200_000, "it is not JSON"),
    "quantised": ('{"quantization_config": {"quant_method": "gptq"}}', "the weights are quantised (gptq)"),
    "quantised oddly": ('{"quantization_config": ["gptq"]}', "the weights are quantised (unknown)"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configs(kind: str, kit: Any, recipe: Path, sharded: Path, cli: Any) -> None:
    content, message = CONFIGS[kind]
    (sharded / "config.json").write_text(content)
    cli("merge", recipe, kit.out).refused(f"{sharded / 'config.json'}: {message}")
    kit.clean()


def test_a_config_that_is_merely_odd(kit: Any, recipe: Path, sharded: Path, cli: Any) -> None:
    """Not quantised after all, and a name no file system has: both go through."""
    config = json.loads((sharded / "config.json").read_text())
    odd = {**config, "quantization_config": None, "_name_or_path": "\ud800"}
    (sharded / "config.json").write_text(json.dumps(odd))
    assert cli("merge", recipe, kit.out).code == 0
    assert json.loads((kit.out / "config.json").read_text())["_name_or_path"] == "\ud800"


TOKENIZERS = [
    *('{"model": [1]}', '{"model": {"vocab": 7}}', '{"model": {"vocab": [[]]}}', "[]", "{"),
    *('{"added_tokens": [{}]}', '{"added_tokens": 7}', '{"added_tokens": ["<s>"]}'),
]


@pytest.mark.parametrize("content", TOKENIZERS)
def test_tokenizers_that_are_none(content: str, kit: Any, recipe: Path, sharded: Path, cli: Any) -> None:
    for name in ("sharded", "plain"):
        (kit.root / name / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (sharded / "tokenizer.json").write_text(content)
    cli("merge", recipe, kit.out).refused(f"{sharded / 'tokenizer.json'}: ")
    kit.clean()


@pytest.mark.parametrize(
    "path", ["~nobody-here/model", "./" + "n" * 300, "n" * 5000, "./a\0b", "recipe.yaml"]
)
def test_paths_of_no_model(path: str, kit: Any, cli: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(kit.root)
    cli("merge", kit.recipe(kit.model("one", 1), path), kit.out).refused("models[1].model")
    kit.clean()
