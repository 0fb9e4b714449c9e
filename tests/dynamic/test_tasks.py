"""One folder for all tasks (``task: all``): bit for bit what a merge for each task alone writes, at any time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner, Result

import mixmerge
from mixmerge import DynamicModel, Mixture, OutcomeTable, TaskModel
from mixmerge.bank.mask_files import MaskFolder, read_mask_card
from mixmerge.bank.masks import MaskedTensor
from mixmerge.dynamic.task_engine import TaskEngine
from mixmerge.engine import masks
from mixmerge.engines.contract import check_engine
from mixmerge.engines.records import Request, Scoring
from mixmerge.errors import MixmergeError, OutputError, RecipeError
from mixmerge.methods.emr import unified
from mixmerge.mixture.answering import expert_set

EXPERTS = ("expert0", "expert1", "expert2")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("emr", {}),
    ("emr", {"rescaler": "means", "lambda": [0.5, 1.5]}),
    ("tall", {}),
    ("tall", {"multi": "ties", "mask_lambda": 0.3}),
]
Family = Callable[..., Any]


def recipe_of(made: Any, method: str, task: int | str, **parameters: Any) -> dict[str, Any]:
    models = [{"model": str(path)} for path in made.experts]
    given = {"task": task, **parameters}
    return {"merge_method": method, "base_model": str(made.base), "models": models, "parameters": given}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [name for name, value in wanted.items() if not torch.equal(bits(found[name]), bits(value))]


def tensors_of(folder: Path, read_tensors: Any, task: int) -> dict[str, Tensor]:
    """All tensors of a task's model: those without masks are the base's."""
    opened, whole = MaskFolder(folder), read_tensors(folder)
    return whole | {name: opened.tensor(name, task) for name in opened.names}


@pytest.fixture(scope="module")
def merged(family: Family, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, list[Path]]:
    """Tiny Llamas, one folder for all tasks, and one for each."""
    made, place = family("llama", experts=3, dtype="float32"), tmp_path_factory.mktemp("tasks")
    mixmerge.merge(recipe_of(made, "emr", "all"), place / "all")
    for task in range(3):
        mixmerge.merge(recipe_of(made, "emr", task), place / str(task))
    return made, place / "all", [place / str(task) for task in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("method", "parameters"), VARIANTS, ids=str)
def test_every_task_is_what_its_own_merge_writes(
    family: Family, method: str, parameters: dict[str, Any], dtype: str, tmp_path: Path, read_tensors: Any
) -> None:
    made = family("llama", experts=3, dtype=dtype)
    done = mixmerge.merge(recipe_of(made, method, "all", **parameters), tmp_path / "all")
    assert differing(read_tensors(tmp_path / "all"), read_tensors(made.base)) == []
    for task in range(3):
        mixmerge.merge(recipe_of(made, method, task, **parameters), tmp_path / str(task))
        wanted = read_tensors(tmp_path / str(task))
        assert differing(tensors_of(tmp_path / "all", read_tensors, task), wanted) == []
    # The delta, a bit a task and entry, a factor a task and tensor, and a header.
    base = read_tensors(made.base)
    elements, header = sum(one.numel() for one in base.values()), 400 * len(base) + 2000
    width = 2 if dtype == "bfloat16" and method == "emr" else 4
    assert done.masks <= elements * width + 3 * (elements / 8 + 1 + 4 * len(base)) + header
    assert done.plan.masks is not None
    assert done.masks <= done.plan.masks.nbytes + header


def test_float64(family: Family, tmp_path: Path, read_tensors: Any) -> None:
    recipe = recipe_of(family("llama", experts=3, dtype="bfloat16"), "emr", "all")
    mixmerge.merge({**recipe, "out_dtype": "float64"}, tmp_path / "all")
    mixmerge.merge({**recipe, "out_dtype": "float64", "parameters": {"task": 1}}, tmp_path / "1")
    found = tensors_of(tmp_path / "all", read_tensors, 1)
    assert differing(found, read_tensors(tmp_path / "1")) == []


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_other_models(family: Family, name: str, tmp_path: Path, read_tensors: Any) -> None:
    """An encoder, whose tensors TaskModel finds under the names of its trunk; and one with transposed matrices."""
    made = family(name, experts=3)
    mixmerge.merge(recipe_of(made, "emr", "all"), tmp_path / "all")
    model = TaskModel.load(tmp_path / "all", dtype="auto")
    for task in (1, 0):
        mixmerge.merge(recipe_of(made, "emr", task), tmp_path / str(task))
        alone = type(model.model).from_pretrained(tmp_path / str(task), dtype="auto").state_dict()
        assert differing(model.task(EXPERTS[task]).state_dict(), alone) == []


def test_tasks_in_any_order_leave_no_trace(merged: Any) -> None:
    made, folder, alone = merged
    model = TaskModel.load(folder)
    kind = type(model.model)
    wanted: dict[str | None, Any] = {None: kind.from_pretrained(made.base).state_dict()}
    wanted |= {
        name: kind.from_pretrained(path).state_dict() for name, path in zip(EXPERTS, alone, strict=True)
    }
    assert model.tasks == EXPERTS
    for name in (
        None,
        "expert2",
        "expert0",
        "expert0",
        "expert1",
        None,
        "expert0",
        "expert2",
        "expert1",
        None,
    ):
        assert differing(model.task(name).state_dict(), wanted[name]) == []
    with pytest.raises(MixmergeError, match="has no task 'expert3'"):
        model.task("expert3")


def test_a_switch_that_is_cut_short_is_made_again(merged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, alone = merged
    model = TaskModel.load(folder)
    tensor, calls = MaskFolder.tensor, []

    def killed(self: MaskFolder, name: str, task: int) -> Tensor:
        calls.append(name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return tensor(self, name, task)

    monkeypatch.setattr(MaskFolder, "tensor", killed)
    with pytest.raises(KeyboardInterrupt):
        model.task("expert1")
    wanted = type(model.model).from_pretrained(alone[1]).state_dict()
    assert differing(model.task("expert1").state_dict(), wanted) == []
    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        model.task("expert2")
    base = type(model.model).from_pretrained(folder).state_dict()
    assert differing(model.task(None).state_dict(), base) == []


def test_generation_by_task(merged: Any) -> None:
    made, folder, alone = merged
    prompts = ["a b c", "one two three four", "x", "the quick brown"]
    wanted = {}
    for name, path in ((None, made.base), *zip(EXPERTS, alone, strict=True)):
        wanted[name] = TaskEngineAlone(path).texts(prompts)
    model = TaskModel.load(folder)
    for name, texts in wanted.items():
        assert model.generate(prompts, task=name, max_new_tokens=6) == texts
    names: list[str | None] = ["expert1", None, "expert2", "expert1"]
    mixed = [wanted[name][at] for at, name in enumerate(names)]
    assert model.generate(prompts, task=names, max_new_tokens=6) == mixed
    assert len({tuple(texts) for texts in wanted.values()}) == 4


class TaskEngineAlone:
    """An ordinary folder behind the ordinary engine."""

    def __init__(self, folder: Path) -> None:
        from mixmerge.engines.local import TransformersEngine

        self.engine = TransformersEngine(str(folder), dtype="float32")

    def texts(self, prompts: list[str]) -> list[str]:
        return [one.text for one in self.engine.generate([Request(p, p, 6) for p in prompts])]


def test_the_engine(merged: Any) -> None:
    _, folder, alone = merged
    engine = TaskEngine(str(folder), adapters={"code": "expert2"}, task="expert0")
    assert engine.adapters == ("code", *EXPERTS)
    first, second = (TaskEngineAlone(alone[task]).engine for task in (0, 2))
    asked = [Request("0", "a b c", 6), Request("2", "a b c", 6, adapter="code")]
    wanted = [first.generate(asked[:1])[0].text, second.generate([Request("2", "a b c", 6)])[0].text]
    assert [one.text for one in engine.generate(asked)] == wanted
    # Two streams that take turns: each token is of its own task.
    streams, told = [engine.stream(one) for one in asked], ["", ""]
    live = [0, 1]
    while live:
        for at in list(live):
            chunk = next(streams[at], None)
            if chunk is None:
                live.remove(at)
            else:
                told[at] += chunk.text
    assert told == wanted
    (score,) = engine.loglikelihood([Scoring("s", "a b", " c d", "code")])
    (other,) = second.loglikelihood([Scoring("s", "a b", " c d")])
    assert score.total == pytest.approx(other.total, abs=1e-6)
    with pytest.raises(MixmergeError, match="takes no further adapters"):
        engine.add_adapter("new", "folder")
    with pytest.raises(MixmergeError, match="has no adapter 'four'"):
        engine.generate([Request("a", "a", adapter="four")])
    engine.unload()
    assert not engine.loaded
    with pytest.raises(MixmergeError) as error:
        TaskEngine(str(folder), adapters={"code": "five"}, task="six").load()
    assert "there is no task 'five'" in str(error.value)
    assert "there is no task 'six'" in str(error.value)


def run(*arguments: object) -> Result:
    from mixmerge.cli import app

    return CliRunner().invoke(app, [str(one) for one in arguments])


def test_two_tasks_in_one_mixture(merged: Any, tmp_path: Path) -> None:
    """Experts of one folder are one unit: it is loaded once, and each request has its task's weights."""
    _, folder, alone = merged
    table = OutcomeTable(
        ids=("a", "b"), queries=("sort 3 1", "keep a b"), experts=("sort", "keep"), score=np.eye(2)
    )
    table.write(tmp_path / "outcomes.jsonl")
    (tmp_path / "mix.yaml").write_text(
        "experts:\n"
        f"  sort: {{adapter: expert0, base: {folder}}}\n  keep: {{adapter: expert2, base: {folder}}}\n"
        f"router: {{kind: knn, outcomes: {tmp_path / 'outcomes.jsonl'}, options: {{k: 1}}}}\n"
        "generate: {max_new_tokens: 6}\n"
    )
    texts = {"sort 3 1": 0, "keep a b": 2, "keep a b c": 2, "sort 3 1 2": 0}
    wanted = [TaskEngineAlone(alone[task]).texts([text])[0] for text, task in texts.items()]
    mixture = Mixture.load(tmp_path / "mix.yaml")
    assert {one.engine for one in expert_set(mixture.spec)} == {"tasks"}
    assert len(expert_set(mixture.spec).units()) == 1
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    done = run("batch", tmp_path / "mix.yaml", "-i", tmp_path / "in.txt", "-o", tmp_path / "out.jsonl", "-q")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == wanted
    for text, answer in list(zip(texts, wanted, strict=True))[:2]:
        done = run("ask", tmp_path / "mix.yaml", text, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["answer"] == answer
    mixture.save(tmp_path / "saved")
    assert [one.text for one in Mixture.load(tmp_path / "saved").answer(list(texts))] == wanted


def test_the_engine_keeps_its_promises(merged: Any) -> None:
    check_engine(lambda: TaskEngine(str(merged[1])), adapters=["expert0", "expert2"])


# What a merge is killed in: between two files of masks, which are small here.
DYING = """
import json, os, signal, sys
from mixmerge.engine import masks
from mixmerge.engine.merge import merge

masks.PART = 30_000

def gathering(what, done, total):
    if what == "masks" and done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

merge(json.loads(sys.argv[1]), sys.argv[2], gathering=gathering)
"""


def test_a_killed_merge_goes_on(
    family: Family, programs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(family("llama", experts=3, dtype="float32"), "emr", "all")
    whole, out, partial = tmp_path / "whole", tmp_path / "out", tmp_path / ".out.mixmerge-partial"
    monkeypatch.setattr(masks, "PART", 30_000)
    mixmerge.merge(recipe, whole)
    assert programs("-c", DYING, json.dumps(recipe), out, folder=tmp_path).returncode != 0
    assert not out.exists()
    kept = sorted((partial / "masks").iterdir())
    assert kept
    stamps = [path.stat().st_mtime_ns for path in kept]
    told: list[int] = []
    resumed = mixmerge.merge(recipe, out, gathering=lambda what, done, total: told.append(done))
    assert resumed.resumed == len(resumed.plan.tasks)
    assert told[0] > 1
    assert [(out / "masks" / path.name).stat().st_mtime_ns for path in kept] == stamps
    files = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == files
    assert [name for name in files if (whole / name).read_bytes() != (out / name).read_bytes()] == []
    assert not partial.exists()
    mixmerge.merge(recipe, out, overwrite=True)
    (out / "masks" / "mine").mkdir()
    with pytest.raises(OutputError, match="not a model folder and nothing else"):
        mixmerge.merge(recipe, out, overwrite=True)


def test_adapters_and_what_they_leave_alone(loras: Any, tmp_path: Path, read_tensors: Any) -> None:
    """Tensors that no expert changes take nothing."""
    models = [{"model": f"{loras.base}+{adapter}"} for adapter in loras.adapters.values()]
    recipe = {"merge_method": "emr", "base_model": str(loras.base), "models": models}
    mixmerge.merge({**recipe, "parameters": {"task": "all"}}, tmp_path / "all")
    assert read_mask_card(tmp_path / "all").tasks == ("one", "two", "three")
    opened = MaskFolder(tmp_path / "all")
    assert all(name.split(".")[-2].endswith("_proj") for name in opened.names)
    assert "model.layers.0.self_attn.k_proj.weight" not in opened.names
    for task in (2, 0):
        mixmerge.merge({**recipe, "parameters": {"task": task}}, tmp_path / str(task))
        found = tensors_of(tmp_path / "all", read_tensors, task)
        assert differing(found, read_tensors(tmp_path / str(task))) == []


def test_by_hand() -> None:
    """Two tasks: one keeps the first two entries twofold, the other the last as it is."""
    base, unified = torch.tensor([[1.0, -0.0, 2.0]]), torch.tensor([[0.5, -0.0, -3.0]])
    keep = torch.tensor([[[True, True, False]], [[False, False, True]]])
    made = MaskedTensor.of(
        unified, lambda at: keep[at], torch.tensor([2.0, 1.0]), base=base, stored=torch.float32
    )
    assert made.bits.tolist() == [[0b011], [0b100]]
    assert not made.elected
    assert made.of_task(base, 0).tolist() == [[2.0, 0.0, 2.0]]
    assert torch.signbit(made.of_task(base, 0)).tolist() == [[False, True, False]]
    assert made.of_task(base, 1).tolist() == [[1.0, 0.0, -1.0]]
    narrow = MaskedTensor.of(unified, lambda at: keep[at], torch.ones(2), base=base, stored=torch.bfloat16)
    assert narrow.elected
    assert narrow.delta.dtype == torch.bfloat16
    assert narrow.delta.tolist() == [[1.5, 0.0, -1.0]]
    wide = MaskedTensor.of(
        unified + 2**-20, lambda at: keep[at], torch.ones(2), base=base, stored=torch.bfloat16
    )
    assert not wide.elected  # bfloat16 would round it


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.tuples(*[st.floats(-8, 8, width=16)] * 3, st.booleans(), st.booleans()), max_size=20),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_packing_loses_nothing(values: list[Any], dtype: torch.dtype) -> None:
    table = torch.tensor(values or [(0.0, 0.0, 0.0, 0, 0)])
    base, experts = table[:, 0].to(dtype).float(), table[:, 1:3].to(dtype).float().T
    deltas, flags, factors = experts - base, table[:, 3:].T.bool(), torch.tensor([0.7, 1.3])
    one = unified(list(deltas), base)
    made = MaskedTensor.of(one, lambda at: flags[at], factors, base=base, stored=dtype)
    for at in range(2):
        kept = torch.where(flags[at], one, torch.zeros_like(one))
        wanted = (base + factors[at] * kept).to(dtype)
        assert torch.equal(bits(made.of_task(base.to(dtype), at)), bits(wanted))


def damaged(folder: Path, what: str) -> None:
    card, file = folder / "masks" / "masks.json", folder / "masks" / "masks-00001.safetensors"
    if what == "card":
        card.write_text(card.read_text().replace("expert1", "expert9"))
    elif what == "version":
        card.write_text(card.read_text().replace('"version": 1', '"version": 2'))
    elif what == "facts":
        card.write_text('{"format": "mixmerge-masks", "version": 1, "tasks": 3}')
    elif what == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif what == "gone":
        file.unlink()
    elif what == "bits":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    else:
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"] += 1
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("card", "was changed after it was written"),
        ("version", "is of version 2"),
        ("facts", "a fact of it is missing or wrong"),
        ("cut", "its card says"),
        ("gone", "is missing"),
        ("bits", "its hash differs"),
        ("base", "not those that the masks were made for"),
    ],
)
def test_damage_is_named(merged: Any, clone: Callable[[Path], Path], what: str, words: str) -> None:
    folder = clone(merged[1])
    damaged(folder, what)
    with pytest.raises(MixmergeError, match=words):
        TaskModel.load(folder)
    with pytest.raises(MixmergeError, match=words):
        TaskEngine(str(folder)).load()


def test_what_has_no_tasks(family: Family, merged: Any) -> None:
    made, folder, _ = merged
    with pytest.raises(MixmergeError, match=r"has no masks of tasks.*task: all"):
        TaskModel.load(made.base)
    with pytest.raises(MixmergeError, match="TaskModel"):
        DynamicModel.load(folder)
    recipe = {**recipe_of(made, "emr", "all"), "out_dtype": "bfloat16"}
    with pytest.raises(
        RecipeError, match=r"task: all keeps the base as it is, and the output's dtype rounds it"
    ):
        mixmerge.make_plan(recipe)
    states = [load_file(path / "model.safetensors") for path in (made.base, *made.experts)]
    with pytest.raises(MixmergeError, match="is 'all'"):
        mixmerge.merge_state_dicts("emr", states[1:], base=states[0], parameters={"task": "all"})
    with pytest.raises(RecipeError, match="expected a number"):
        mixmerge.make_plan(recipe_of(made, "emr", "each"))


def test_experts_that_transformers_puts_side_by_side(
    family: Family, tmp_path: Path, read_tensors: Any
) -> None:
    """The folder holds them exactly; a model of transformers cannot be switched in place, and says so."""
    made = family("mixtral", experts=2)
    mixmerge.merge(recipe_of(made, "emr", "all"), tmp_path / "all")
    mixmerge.merge(recipe_of(made, "emr", 1), tmp_path / "1")
    found = tensors_of(tmp_path / "all", read_tensors, 1)
    assert differing(found, read_tensors(tmp_path / "1")) == []
    with pytest.raises(MixmergeError, match=r"does not hold .* as the file does"):
        TaskModel.load(tmp_path / "all")
