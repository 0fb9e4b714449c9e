"""What a plan says of the memory of merging by a definition: not less than is measured, and not four times as much."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixmerge.methods import METHODS
from mixmerge.methods.footprint import Sizes, held, tsv_m, unknown, wudi
from mixmerge.methods.records import Method
from mixmerge.plan import make_plan, peak_memory
from mixmerge.registry import load

SHAPE, EXPERTS = (512, 768), 4
CASES: list[tuple[str, dict[str, Any]]] = [
    ("tsv_m", {}),
    ("tsv_m", {"tolerance": 0.0}),
    ("iso_c", {}),
    ("iso_cts", {}),
    ("iso_cts", {"tolerance": 0.0}),
    ("wudi", {"steps": 2}),
    ("wudi", {"solver": "closed"}),
    ("doge_ta", {"steps": 2}),
    ("pcb", {}),
    ("pcb", {"inter": "pairwise"}),
    ("pcb", {"inter": "softmax"}),
    ("emr", {"task": 0}),
    ("tall", {"task": 0, "multi": "ties"}),
    ("consensus", {}),
    ("magmax", {}),
]
# Statistics of each expert, by name: the shape of one.
GIVEN = {
    "fisher": ("fisher", SHAPE),
    "regmean": ("gram", (SHAPE[1],) * 2),
    "activation_ties": ("second_moment", SHAPE[1:]),
}
THIN = ("tsv_m", "iso_c", "iso_cts", "wudi", "doge_ta", "learned_spectrum")

# One process for all: torch is loaded once, and every case is measured in a fork of its own.
PROGRAM = """
import gc, json, os, sys, tempfile, threading, time
from pathlib import Path
import torch
import mixmerge.engine.plain, mixmerge.methods.memory
from mixmerge.engine.merge import run
from mixmerge.methods import METHODS
from mixmerge.methods.footprint import Sizes, held
from mixmerge.methods.lowrank import LowRank
from mixmerge.plan import make_plan, peak_memory
from mixmerge.registry import load

torch.set_num_threads(1)
torch.linalg.eigh(torch.eye(8, dtype=torch.float64))
torch.optim.Adam([torch.zeros(2)], fused=True)
for method in METHODS.values():
    load(method.function)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

def measured(work):
    reader, writer = os.pipe()
    if os.fork() == 0:
        try:
            gc.collect()
            before = peak = anonymous()
            going = True

            def watch():
                nonlocal peak
                while going:
                    peak = max(peak, anonymous())
                    time.sleep(0.0005)

            thread = threading.Thread(target=watch)
            thread.start()
            said = work()
            going = False
            thread.join()
            os.write(writer, json.dumps([before, peak, said]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        found = json.load(told)
    os.wait()
    return found

def merged(recipe):
    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(recipe)
        run(plan, Path(folder) / "out", threads=1)
        return peak_memory(plan, threads=1)

def applied(name, shape, experts, statistic, ranks):
    row, many = METHODS[name], range(experts)
    tensors = [torch.randn(shape) for _ in many]
    if ranks:
        tensors = [LowRank(torch.randn(shape[0], ranks), torch.randn(ranks, shape[1])) for _ in many]
    parameters = {"steps": 2} if row.parameter("steps") else {}
    if row.parameter("weight"):
        parameters["weight"] = [1.0] * experts
    statistics = None
    if statistic:
        kind, size = statistic
        gram = kind == "gram"
        statistics = {kind: [(torch.eye(size[0], dtype=torch.float64) if gram else torch.rand(size)) for _ in many]}
    base = torch.zeros(shape) if row.base == "required" else None
    torch.isfinite(load("mixmerge.methods.memory:apply")(
        row, tensors, base=base, parameters=parameters, role="linear", statistics=statistics
    )).all()
    return 4 * held(row, Sizes(shape, "linear", experts, parameters, (ranks,) * experts if ranks else ()))

asked = json.loads(sys.argv[1])
recipes = [measured(lambda: merged(recipe)) for recipe in asked["recipes"]]
print(json.dumps([recipes, [measured(lambda: applied(*case)) for case in asked["applied"]]]))
"""


def models(folder: Path) -> list[str]:
    """A base and its experts: three matrices each."""
    import torch
    from safetensors.torch import save_file

    for number in range(EXPERTS + 1):
        (folder / f"m{number}").mkdir()
        drawn = torch.Generator().manual_seed(number)
        save_file(
            {
                f"model.layers.{layer}.mlp.up_proj.weight": torch.randn(SHAPE, generator=drawn).bfloat16()
                for layer in range(3)
            },
            str(folder / f"m{number}" / "model.safetensors"),
        )
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 3}
        (folder / f"m{number}" / "config.json").write_text(json.dumps(config))
    return [str(folder / f"m{number}") for number in range(EXPERTS + 1)]


def recipe(paths: list[str], method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": paths[0],
        "models": [{"model": path} for path in paths[1:]],
        "parameters": parameters,
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_the_memory_is_what_is_said(tmp_path: Path) -> None:
    paths = models(tmp_path)
    applied = [(name, SHAPE, EXPERTS, given, 0) for name, given in GIVEN.items()]
    applied += [(name, SHAPE, EXPERTS, None, 4) for name in THIN]  # type: ignore[misc]
    asked = {"recipes": [recipe(paths, name, **given) for name, given in CASES], "applied": applied}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, json.dumps(asked)],
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    merged, by_hand = json.loads(done.stdout)
    matrix = 4 * SHAPE[0] * SHAPE[1]
    for case, (before, peak, said) in zip(CASES, merged, strict=True):
        assert peak <= said <= 4 * peak, case
        # Of what is above the interpreter's, too: the buffers of kernels, which are not touched here, not counted.
        added = said - peak_memory(make_plan(recipe(paths, "ties", weight=1.0, density=1.0)), threads=1)
        assert peak - before <= added + 50_000_000, case
        assert added - 50_000_000 <= 4 * (peak - before), case
    for case, (before, peak, said) in zip(applied, by_hand, strict=True):
        assert peak - before <= 2 * said + matrix, case
        assert said <= 4 * (peak - before) + matrix, case


@pytest.mark.parametrize("row", METHODS.values(), ids=lambda row: row.name)
def test_what_has_no_kernel_says_what_it_holds(row: Method) -> None:
    assert row.kernel or row.footprint or row.bank  # a bank is planned by itself
    if row.footprint:
        shapes: list[tuple[int, ...]] = [(), (0, 4), (7,), (5, 9), (3, 5, 9)]
        sizes = [Sizes(shape, "linear", 3, {}) for shape in shapes]
        found = [held(row, each) for each in sizes]
        assert all(count >= 6 * each.elements for count, each in zip(found, sizes, strict=True))
        assert load(row.footprint) is not unknown or row.name in ("adamerging_plus", "expert_merging_plus")


def test_by_hand() -> None:
    """Two experts of 4 x 4: two triplets each, all stacks 4 x 4; S and C, a decomposition of S, products."""
    sizes = Sizes((4, 4), "linear", 2, {"solver": "closed"})
    assert tsv_m(sizes) == 2 * 8 * 4 + (16 + 5 * 16 + 8 * 16 + 16)
    assert wudi(sizes) == 2 * 16 + 3 * 16 + 8 * 16 + 5 * 16
    assert tsv_m(Sizes((4, 4), "table", 2, {})) == 2 * 16
    wide, turned = Sizes((2, 8), "linear", 2, {}), Sizes((8, 2), "transposed", 2, {})
    assert wudi(wide) == wudi(turned) > wudi(Sizes((8, 2), "linear", 2, {}))
    thin = Sizes((64, 64), "linear", 2, {}, (2, 2))
    assert wudi(thin) < wudi(Sizes((64, 64), "linear", 2, {}))


def test_threads_and_float64_take_more(tmp_path: Path) -> None:
    paths = models(tmp_path)
    plan = make_plan(recipe(paths, "tsv_m"))
    one, two = (peak_memory(plan, threads=threads) for threads in (1, 2))
    assert one < two < 2 * one
    assert peak_memory(plan, threads=3) - two < two - one + 1
    assert peak_memory(make_plan(recipe(paths, "ties", weight=1.0, density=1.0)), threads=1) < one
    wide = make_plan({**recipe(paths, "tsv_m"), "out_dtype": "float64"})
    assert peak_memory(wide, threads=1) > one
