"""Values that are not finite, in or out, and inputs that change under a running merge."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixmerge.methods import METHODS

NAME = "model.layers.1.mlp.weight"
SPARSE = {"density": 0.5}
# method -> (models beside the base, parameters of every model, merge parameters)
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "linear": (3, {"weight": 1.0}, {}),
    "slerp": (2, {}, {"t": 0.3}),
    "passthrough": (1, {}, {}),
    "task_arithmetic": (2, {"weight": 0.5}, {}),
    **{
        name: (2, {"weight": 0.5, **SPARSE}, {})
        for name in (
            "ties",
            "dare_linear",
            "dare_ties",
            "breadcrumbs",
            "breadcrumbs_ties",
            "della",
            "della_linear",
        )
    },
    "ties, whole model": (2, {"weight": 0.5, **SPARSE}, {"scope": "model"}),
    "ties, nothing kept": (2, {"weight": 0.5, "density": 0.0}, {}),
    "dare_ties, by inverse_p": (2, {"weight": 0.5, **SPARSE}, {"rescale_by": "inverse_p"}),
    "della, by inverse_p": (2, {"weight": 0.5, **SPARSE}, {"rescale_by": "inverse_p"}),
    "task_arithmetic, weight 0": (2, {"weight": 0.0}, {}),
    "magmax": (2, {}, {}),
    "pcb": (2, {}, {}),
    "tsv_m": (2, {}, {}),
    "doge_ta": (2, {}, {"steps": 2}),
}


def tensors(seed: int, *, dtype: str = "f", size: int = 300_000) -> dict[str, Any]:
    """Two tensors; the second has more than one chunk."""
    draw = np.random.default_rng(seed)
    shapes = {"model.layers.0.mlp.weight": (8, 8), NAME: (size // 100, 100)}
    return {name: draw.standard_normal(shape, "f").astype(dtype) for name, shape in shapes.items()}


def spoil(values: dict[str, Any], value: float, at: int) -> dict[str, Any]:
    values[NAME].reshape(-1)[at] = value
    return values


def recipe_of(kit: Any, case: str, folders: list[Path]) -> Path:
    _, each, whole = CASES[case]
    method = case.partition(",")[0]
    base = folders[0] if METHODS[method].base == "required" else None
    models = folders if base is None or method == "slerp" else folders[1:]
    path: Path = kit.recipe(*models, method=method, base=base, each=each or {"weight": 1.0}, parameters=whole)
    if not each:
        document = json.loads(path.read_text())
        document["models"] = [{"model": model["model"]} for model in document["models"]]
        path.write_text(json.dumps(document))
    return path


def test_every_method_with_a_kernel_has_a_case() -> None:
    """The others share one way to read: of them one that streams its inputs, and one that looks at all first."""
    cases = {case.partition(",")[0] for case in CASES}
    assert cases >= {name for name, row in METHODS.items() if row.kernel and not row.needs_data}
    assert any(METHODS[case].streams for case in cases)
    assert any(METHODS[case].sketch for case in cases)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (-np.inf, "-inf")])
def test_inputs_that_are_not_finite(case: str, value: float, shown: str, kit: Any, killable: Any) -> None:
    """Tensor, model and element are named, for the base and for the last expert; nothing is left behind."""
    count = CASES[case][0]
    if METHODS[case.partition(",")[0]].base == "required" and case != "slerp":
        count += 1
    for broken in {0, count - 1}:
        folders = []
        for number in range(count):
            values = tensors(number)
            name = f"m{number}{'-broken' if number == broken else ''}-{broken}"
            folders.append(kit.model(name, spoil(values, value, 280_007) if number == broken else values))
        ran = killable.run("merge", recipe_of(kit, case, folders), kit.out, "--quiet")
        ran.refused(f"{folders[broken]}: tensor '{NAME}' has {shown} at element 280,007", "its file is")
        kit.clean()


@pytest.mark.parametrize("flag", ["--no-kernels", "float64"])
def test_inputs_that_are_not_finite_by_torch(flag: str, kit: Any, cli: Any) -> None:
    dtype = "f8" if flag == "float64" else "f"
    options = [] if flag == "float64" else [flag]
    good, bad = tensors(0, dtype=dtype), spoil(tensors(1, dtype=dtype), np.nan, 7)
    folders = [kit.model("good", good), kit.model("bad", bad)]
    ran = cli("merge", recipe_of(kit, "linear", folders), kit.out, *options)
    ran.refused(f"{folders[1]}: tensor '{NAME}' has nan at element 7 of its data", "its file is")
    kit.clean()


@pytest.mark.parametrize("case", ["linear", "ties", "task_arithmetic"])
@pytest.mark.parametrize("options", [[], ["--no-kernels"]], ids=["kernels", "torch"])
def test_outputs_that_do_not_fit(case: str, options: list[str], kit: Any, cli: Any) -> None:
    """60,000 and 60,000 fit float16 and their sum does not; neither is an input at fault."""
    folders = [kit.model(f"m{n}", {NAME: np.full((4, 4), 3e4 * n, "e")}) for n in range(3)]
    recipe = recipe_of(kit, case, folders)
    document = json.loads(recipe.read_text())
    for model in document["models"]:
        model["parameters"] = {"weight": 1.0}
    document["parameters"] = {"normalize": False}
    recipe.write_text(json.dumps(document))
    ran = cli("merge", recipe, kit.out, *options)
    ran.refused(f"tensor '{NAME}': the merged values do not fit F16", "out_dtype")
    kit.clean()
    document["out_dtype"] = "float32"
    recipe.write_text(json.dumps(document))
    assert cli("merge", recipe, kit.out, *options).code == 0


def stopped(kit: Any, killable: Any) -> tuple[int, list[Path]]:
    """A merge of two 6 MB models that has read the headers and the fingerprints, and nothing else."""
    folders = [kit.model(f"m{number}", tensors(number, size=1_500_000)) for number in range(2)]
    recipe = recipe_of(kit, "linear", folders)
    arguments = ("merge", recipe, kit.out, "--quiet", "--threads", "1")
    return killable.stop(*arguments, at="open model.safetensors"), folders


def test_a_file_that_shrinks(kit: Any, killable: Any) -> None:
    pid, folders = stopped(kit, killable)
    shard = folders[1] / "model.safetensors"
    os.truncate(shard, 4_000_000)
    killable.go_on(pid).refused(f"{shard}: it ends at byte 4,000,000, inside tensor '{NAME}'", "changed")
    kit.clean()


def test_a_file_that_is_written_anew(kit: Any, killable: Any) -> None:
    """Of the same size, so nothing but its time tells that the tensors are of two models."""
    pid, folders = stopped(kit, killable)
    shard = folders[1] / "model.safetensors"
    shutil.copyfile(folders[0] / "model.safetensors", shard)
    killable.go_on(pid).refused(f"{shard}: it was changed during the merge", "Run the same command again")
    kit.clean()


def test_a_file_that_is_gone(kit: Any, killable: Any) -> None:
    pid, folders = stopped(kit, killable)
    shutil.rmtree(folders[1])
    shard = folders[1] / "model.safetensors"
    killable.go_on(pid).refused(f"{shard}: cannot be read at byte ", "No such file or directory")
    kit.clean()


def test_a_config_that_is_gone(kit: Any, killable: Any, cli: Any) -> None:
    """What is copied at the end is read at the end."""
    pid, folders = stopped(kit, killable)
    assert killable.go_on(pid).code == 0
    shutil.rmtree(kit.out)
    (folders[0] / "vocab.txt").write_text("a")
    pid = killable.stop("merge", kit.root / "recipe.yaml", kit.out, "--quiet", at="open config.json")
    (folders[0] / "vocab.txt").unlink()
    (folders[0] / "vocab.txt").mkdir()
    assert killable.go_on(pid).code == 0, "no file any more, so nothing to copy"
    assert not (kit.out / "vocab.txt").exists()


@pytest.mark.parametrize("case", CASES)
def test_the_same_bytes_whatever_the_threads(case: str, kit: Any, cli: Any, files_of: Any) -> None:
    """Of every file of the folder: weights, index, config, recipe, manifest and card."""
    count = CASES[case][0] + (METHODS[case.partition(",")[0]].base == "required" and case != "slerp")
    folders = [kit.model(f"m{number}", tensors(number, size=600_000)) for number in range(count)]
    recipe = recipe_of(kit, case, folders)
    document = json.loads(recipe.read_text())
    document.update(output={"shard_size": 1_000_000}, out_dtype="bfloat16", seed=5)
    recipe.write_text(json.dumps(document))
    found = []
    for threads in (1, 2, 3):
        assert cli("merge", recipe, kit.out, "--threads", threads, "--overwrite").code == 0
        found.append(files_of(kit.out))
    assert found[0] == found[1] == found[2]
    assert {"config.json", "README.md", "mixmerge_recipe.yaml", "mixmerge_manifest.json"} < found[0].keys()
    assert sum(name.endswith(".safetensors") for name in found[0]) == 2
