"""Whole merges by the fused kernels equal the plain definitions to the last bit: every method, variant, dtype."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mixmerge.checkpoint.files import opened
from mixmerge.engine import worker
from mixmerge.engine.merge import _tensors
from mixmerge.errors import CheckpointError
from mixmerge.methods import METHODS
from mixmerge.methods.memory import merge_state_dicts
from mixmerge.plan import Plan, Task, make_plan

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
DTYPES = ("bfloat16", "float16", "float32")
FUSED = [name for name, row in METHODS.items() if row.kernel and not row.needs_data]
State = dict[str, Tensor]

# Shapes around the blocks of 4096 and the chunks of 5000 that these tests use; rows of one, odd rows.
SHAPES: dict[str, tuple[int, ...]] = {
    "number": (),
    "one": (1,),
    "seven": (7,),
    "block_and_one": (4097,),
    "column": (300, 1),
    "row": (1, 300),
    "odd": (131, 53),
    "cube": (3, 5, 67),
    "empty": (0, 3),
    "tied": (53, 75),
    "equal": (20, 40),
    "tiny": (97,),
    "from_nothing": (5, 6),
    "nothing": (8,),
}


def base_state(shapes: Mapping[str, tuple[int, ...]]) -> State:
    generator = torch.Generator().manual_seed(0)
    scale = {"tiny": 2e-6, "from_nothing": 0.0, "nothing": 0.0}
    return {name: scale.get(name, 1.0) * torch.randn(s, generator=generator) for name, s in shapes.items()}


def expert_state(base: State, seed: int) -> State:
    """Near the base; in ``tied`` by quarters, in ``equal`` and ``nothing`` not at all, in ``tiny`` by subnormals."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, tensor in base.items():
        noise = 0.1 * torch.randn(tensor.shape, generator=generator)
        if name == "tied":
            noise = torch.round(noise * 20) / 4
        state[name] = tensor + noise * {"equal": 0.0, "nothing": 0.0, "tiny": 1e-6}.get(name, 1.0)
    return state


def write(folder: Path, state: State) -> State:
    """A model folder with just these tensors."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "none", "architectures": ["None"]}))
    return state


class Memory:
    """Where a merge writes when no disk is wanted."""

    def __init__(self, plan: Plan) -> None:
        self.finished: set[str] = set()
        self._data = {task.target.name: bytearray(task.target.nbytes) for task in plan.tasks}
        self._targets = {task.target.name: task.target for task in plan.tasks}

    def write(self, task: Task, start: int, data: memoryview) -> None:
        self._data[task.target.name][start : start + len(data)] = data

    def done(self, task: Task) -> None:
        self.finished.add(task.target.name)

    def state(self) -> State:
        return {
            name: torch.frombuffer(self._data[name], dtype=TORCH[target.dtype]).reshape(target.shape)
            if target.nbytes
            else torch.empty(target.shape, dtype=TORCH[target.dtype])
            for name, target in self._targets.items()
        }


def run(plan: Plan, *, fused: bool, threads: int = 2) -> State:
    """The engine's passes over all tensors of a plan."""
    output: Any = Memory(plan)
    with opened() as files:
        _tensors(plan, output, files, fused=fused, device="cpu", threads=threads, progress=None)
    assert output.finished == {task.target.name for task in plan.tasks}
    state: State = output.state()
    return state


def differing(first: State, second: State) -> list[str]:
    """Names whose values are not the same to the last bit; 0 and -0 count as one."""
    assert first.keys() == second.keys()
    return [
        name
        for name, tensor in first.items()
        if tensor.dtype != second[name].dtype or not torch.equal(tensor, second[name])
    ]


PER_EXPERT = {
    "weight": [0.5, 0.3, -0.4],
    "density": [0.2, 0.5, 0.9],
    "gamma": [0.01, 0.1, 0.3],
    "epsilon": [0.1, 0.3, 0.15],
    "scale": [0.7],
}
_FLAGS = (True, False)
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(("linear", {"normalize": flag}) for flag in _FLAGS),
    *(("slerp", {"t": t}) for t in (0.0, 0.3, 1.0, 1.4)),
    ("passthrough", {}),
    *(("task_arithmetic", {"normalize": flag, "lambda": 0.7}) for flag in _FLAGS),
    *(
        ("ties", {"normalize": n, "rescale": r, "scope": scope})
        for n, r, scope in itertools.product(_FLAGS, _FLAGS, ("tensor", "model"))
    ),
    ("ties", {"agg": "sum", "lambda": 1.3}),
    *(
        (f"breadcrumbs{ties}", {"normalize": n, "rescale": r})
        for ties, n, r in itertools.product(("", "_ties"), _FLAGS, _FLAGS)
    ),
    *(
        (name, {"normalize": n, **rescale})
        for name, n, rescale in itertools.product(
            ("dare_linear", "dare_ties", "della", "della_linear"),
            _FLAGS,
            ({"rescale": False}, {"rescale_by": "l1"}, {"rescale_by": "inverse_p"}),
        )
    ),
]


def recipe_of(method: str, shared: Mapping[str, Any], folder: Path, experts: int) -> dict[str, Any]:
    """The recipe of a variant, with a value of its own for each expert."""
    row = METHODS[method]
    own = [p.name for p in row.parameters if p.name in PER_EXPERT and p.name not in shared]
    count = min(experts, row.inputs[1])
    models = [
        {"model": str(folder / f"expert{i}"), "parameters": {name: PER_EXPERT[name][i] for name in own}}
        for i in range(count)
    ]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": models,
        "parameters": dict(shared),
        "seed": 11,
    }
    return recipe | ({"base_model": str(folder / "base")} if row.base == "required" else {})


def in_memory(method: str, shared: Mapping[str, Any], states: Mapping[str, State], recipe: Any) -> State:
    """The same recipe by ``merge_state_dicts``."""
    return merge_state_dicts(
        method,
        [states[Path(entry["model"]).name] for entry in recipe["models"]],
        base=states["base"] if "base_model" in recipe else None,
        parameters=shared,
        expert_parameters=[entry["parameters"] for entry in recipe["models"]],
        seed=recipe["seed"],
    )


Made = tuple[Path, dict[str, State]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Made]:
    """``models(dtype, ...)``: a base and three experts on disk and in memory; one dtype, or one for each."""
    made: dict[tuple[str, ...], Made] = {}

    def make(*dtypes: str) -> Made:
        if dtypes not in made:
            folder, base = tmp_path_factory.mktemp("models"), base_state(SHAPES)
            states = {"base": base} | {f"expert{i}": expert_state(base, i + 1) for i in range(3)}
            each = dict(zip(states, dtypes * 4 if len(dtypes) == 1 else dtypes, strict=True))
            for name, state in states.items():
                states[name] = {key: x.to(getattr(torch, each[name])) for key, x in state.items()}
                write(folder / name, states[name])
            made[dtypes] = folder, states
        return made[dtypes]

    return make


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 5000 elements, which no block and few rows divide."""
    monkeypatch.setattr(worker, "CHUNK", 5000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "shared"), VARIANTS, ids=str)
def test_every_variant(models: Any, method: str, shared: dict[str, Any], dtype: str) -> None:
    folder, states = models(dtype)
    recipe = recipe_of(method, shared, folder, 3)
    plan = make_plan(recipe)
    fused = run(plan, fused=True)
    assert differing(fused, in_memory(method, shared, states, recipe)) == []
    if dtype == "bfloat16":
        assert differing(fused, run(plan, fused=False)) == []
    if method not in ("passthrough", "slerp"):
        assert not torch.equal(fused["odd"], states["base"]["odd"])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("method", FUSED)
@pytest.mark.parametrize("asked", [{}, {"out_dtype": "float16"}, {"dtype": "bfloat16"}], ids=str)
def test_inputs_of_several_dtypes(models: Any, method: str, asked: dict[str, str]) -> None:
    folder, _ = models("float32", "bfloat16", "float16", "bfloat16")
    recipe = recipe_of(method, {"t": 0.4} if method == "slerp" else {}, folder, 3) | asked
    plan = make_plan(recipe)
    fused = run(plan, fused=True)
    assert differing(fused, run(plan, fused=False)) == []
    assert {str(x.dtype) for x in fused.values()} <= {f"torch.{d}" for d in (*asked.values(), *DTYPES)}


@pytest.mark.parametrize("asked", [{}, {"out_dtype": "float64"}], ids=str)
@pytest.mark.parametrize("method", FUSED)
def test_float64(models: Any, method: str, asked: dict[str, str]) -> None:
    dtype = "float32" if asked else "float64"
    folder, states = models(dtype)
    shared = {"t": 0.4} if method == "slerp" else {}
    recipe = recipe_of(method, shared, folder, 3)
    fused = run(make_plan(recipe | asked), fused=True)
    wide = {name: {key: x.double() for key, x in state.items()} for name, state in states.items()}
    assert differing(fused, in_memory(method, shared, wide, recipe)) == []


EDGES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("ties", {"density": d, "rescale": True, "scope": s})
        for d in (0.0, 1.0, 1e-6)
        for s in ("tensor", "model")
    ),
    *(
        ("breadcrumbs", {"density": d, "gamma": g})
        for d, g in ((0.0, 0.1), (1.0, 0.5), (1e-6, 0.0), (0.3, 1.0))
    ),
    *(("task_arithmetic", {"weight": w, "normalize": n}) for w, n in ((0.0, False), (-2.0, True))),
    *(("della", {"weight": w, "density": 0.7}) for w in (0.0, -1.0)),
    ("ties", {"weight": 1.0, "lambda": 0.0}),
    ("ties", {"weight": -1.0, "density": 0.5}),
    *(("dare_ties", {"density": d, "rescale_by": by}) for d in (0.0, 1.0) for by in ("l1", "inverse_p")),
    *(
        ("della", {"density": d, "epsilon": e, "rescale_by": by})
        for d, e in ((0.0, 0.5), (1.0, 0.15), (0.9, 0.5), (0.5, 0.5), (0.5, 0.0))
        for by in ("l1", "inverse_p")
    ),
]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("method", "shared"), EDGES, ids=str)
def test_edges_of_parameters(models: Any, method: str, shared: dict[str, Any]) -> None:
    folder, states = models("float16")
    recipe = recipe_of(method, shared, folder, 3)
    fused = run(make_plan(recipe), fused=True)
    assert differing(fused, in_memory(method, shared, states, recipe)) == []
    if 0 in (shared.get("density"), shared.get("lambda"), shared.get("weight")):
        assert differing(fused, states["base"]) == []


def test_a_threshold_of_the_whole_model_through_ties(tmp_path: Path) -> None:
    """Quarters everywhere, so the last entries that are kept are tied across tensors."""
    shapes = {"b": (70, 90), "a": (9000,), "c.one": (), "c": (33,)}
    base = {name: torch.zeros(shape) for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)
    experts = [
        {name: torch.randint(-2, 3, shape, generator=generator).float() / 4 for name, shape in shapes.items()}
        for _ in range(2)
    ]
    states = {"base": write(tmp_path / "base", base)}
    states |= {f"expert{i}": write(tmp_path / f"expert{i}", expert) for i, expert in enumerate(experts)}
    for density in (0.1, 0.3, 0.45, 0.9):
        shared = {"scope": "model", "density": density, "agg": "sum"}
        recipe = recipe_of("ties", shared, tmp_path, 2)
        fused = run(make_plan(recipe), fused=True)
        assert differing(fused, in_memory("ties", shared, states, recipe)) == []


LARGE: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("slerp", {"t": 0.3}),
    ("ties", {"rescale": True}),
    ("ties", {"scope": "model"}),
    ("breadcrumbs_ties", {}),
    ("dare_ties", {}),
    ("della", {}),
    ("della_linear", {"rescale_by": "inverse_p"}),
]


def test_real_chunks_and_any_number_of_threads(tmp_path: Path) -> None:
    """Two and a half chunks of the real size, rows that no block divides; and one long vector."""
    base = base_state({"matrix": (601, 999), "vector": (300_001,)})
    states = {"base": {name: x.bfloat16() for name, x in base.items()}}
    states |= {f"expert{i}": {n: x.bfloat16() for n, x in expert_state(base, i).items()} for i in range(2)}
    for name, state in states.items():
        write(tmp_path / name, state)
    for method, shared in LARGE:
        recipe = recipe_of(method, shared, tmp_path, 2)
        plan = make_plan(recipe)
        fused = run(plan, fused=True, threads=3)
        assert differing(fused, in_memory(method, shared, states, recipe)) == []
        assert differing(fused, run(plan, fused=True, threads=1)) == []


# --- what must not be written


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("dtype", "bad"), [("bfloat16", float("nan")), ("float16", float("inf")), ("float32", -float("inf"))]
)
@pytest.mark.parametrize("method", FUSED)
def test_inputs_that_are_not_finite(tmp_path: Path, method: str, dtype: str, bad: float, fused: bool) -> None:
    for name in ("base", "expert0", "expert1"):
        state = {"a": torch.ones(40, 50), "b": torch.ones(9000)}
        if name == "expert0":
            state["b"][8123] = bad
        write(tmp_path / name, {key: x.to(getattr(torch, dtype)) for key, x in state.items()})
    recipe = recipe_of(method, {"t": 0.5} if method == "slerp" else {}, tmp_path, 2)
    with pytest.raises(CheckpointError) as error:
        run(make_plan(recipe), fused=fused)
    (fault,) = error.value.faults
    assert "'b' has" in fault.what
    assert str(tmp_path / "expert0") in str(fault)
    assert "at element 8,123 of its data" in fault.what


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_linear"])
def test_a_delta_that_does_not_fit(tmp_path: Path, method: str, fused: bool) -> None:
    """Both inputs are finite, their difference is Inf."""
    write(tmp_path / "base", {"a": torch.full((3, 50), -3e38)})
    write(tmp_path / "expert0", {"a": torch.full((3, 50), 3e38)})
    with pytest.raises(CheckpointError, match="tensor 'a': the merged values do not fit F32"):
        run(make_plan(recipe_of(method, {}, tmp_path, 1)), fused=fused)


@pytest.mark.parametrize("fused", [True, False])
def test_results_that_do_not_fit(tmp_path: Path, fused: bool) -> None:
    write(tmp_path / "expert0", {"a": torch.full((9000,), 60_000.0)})
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "expert0")}], "dtype": "float16"}
    fine = run(make_plan(recipe | {"parameters": {"weight": 1.0}}), fused=fused)
    assert fine["a"].dtype == torch.float16
    bad = make_plan(recipe | {"parameters": {"weight": 2.0, "normalize": False}})
    with pytest.raises(CheckpointError, match=r"tensor 'a': the merged values do not fit F16.*out_dtype"):
        run(bad, fused=fused)
