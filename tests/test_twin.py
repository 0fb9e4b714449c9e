"""Twin merges of real tiny models: the bank at work is the definition, and its gate knows whose inputs are whose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mixmerge
from mixmerge.bank.attach import Attached
from mixmerge.bank.features import features_of
from mixmerge.bank.files import load_bank, load_gate, read_card
from mixmerge.bank.gate import Gate, RowGate, Run
from mixmerge.bank.records import Bank
from mixmerge.data.rows import read_rows
from mixmerge.engine.outlook import plan_with_data
from mixmerge.errors import MixmergeError, OutputError, RecipeError
from mixmerge.evaluate.leaks import read_made
from mixmerge.experts.loading import load_expert, load_with_head
from mixmerge.methods.roles import role_of
from mixmerge.methods.twin import twin
from mixmerge.plan import make_plan

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers")

State = dict[str, Tensor]
FULL = {"energy": 1.0}
TRIMMED = {"weight": 1, "density": 0.5}
WORDS = {"expert0": "the quick brown fox {} jumps", "expert1": "{} + {} = {}"}


def recipe_of(made: Any, parameters: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {
        "merge_method": "twin",
        "base_model": str(made.base),
        "models": [{"model": str(path)} for path in made.experts],
        "parameters": parameters,
        "gate": "none",
        **rest,
    }


def write_rows(folder: Path, count: int = 30) -> dict[str, str]:
    """Texts of two kinds, for two experts."""
    for name, text in WORDS.items():
        rows = [{"text": text.format(number, number + 1, number * 3)} for number in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(folder / f"{name}.jsonl") for name in WORDS}


def gated(made: Any, folder: Path, **gate: Any) -> dict[str, Any]:
    rest = {"calibration": {"per_expert": write_rows(folder)}, "dtype": "float32", "seed": 3}
    settings = {"epochs": 12, "batch": 16, "learning_rate": 0.01, **gate}
    return recipe_of(made, {"rank": 2}, gate=settings, **rest)


def model_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def mixed(model: Any, bank: Bank, ids: Tensor, rows: Tensor, gate: Gate | None = None) -> Tensor:
    attached = Attached(model, bank, gate or RowGate())
    with torch.no_grad(), attached.running(Run(rows)):
        logits: Tensor = model(ids).logits
    attached.detach()
    return logits


def delta_of(bank: Bank, name: str, weights: Tensor, *, turned: bool) -> Tensor | float:
    """What a bank adds to a tensor as it is stored."""
    if name in bank.vectors:
        return weights @ bank.vectors[name].float()
    if name not in bank.sites:
        return 0.0
    delta = bank.sites[name].delta(weights)
    return delta.T if turned else delta


@pytest.mark.parametrize("name", ["llama_tied", "llama_bias", "qwen3", "gpt2"])
def test_a_whole_bank_is_each_expert(family: Any, name: str, tmp_path: Path, assert_loads: Any) -> None:
    made = family(name, dtype="float32")
    done = mixmerge.merge(recipe_of(made, FULL), tmp_path / "out")
    assert done.notes == ()
    assert_loads(tmp_path / "out")
    model, bank = model_of(tmp_path / "out"), load_bank(tmp_path / "out")
    assert bank.experts == ("expert0", "expert1")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (3, 9), generator=draw)
    found = mixed(model, bank, ids, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    for row, folder in enumerate([*made.experts, tmp_path / "out"]):
        with torch.no_grad():
            wanted = model_of(folder)(ids[row : row + 1]).logits[0]
        torch.testing.assert_close(found[row], wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype", "parameters", "shared"),
    [
        ("llama", "float32", {"rank": 3}, {}),
        ("llama", "bfloat16", {"energy": 0.7}, {"merge_method": "tsv_m"}),
        ("gpt2", "float32", {"rank": [{"filter": "mlp", "value": 5}, {"value": 2}]}, {"merge_method": "linear"}),
        ("bert", "float32", {"energy": 0.5, "tables": "shared"}, {"merge_method": "ties", "parameters": TRIMMED}),
    ],
    ids=["rank", "energy", "filters", "tables"],
)  # fmt: skip
def test_the_bank_is_the_definition(
    family: Any, tmp_path: Path, read_tensors: Any, name: str, dtype: Any, parameters: Any, shared: Any
) -> None:
    """And the shared part is, byte for byte, what the static recipe makes."""
    made = family(name, dtype=dtype)
    recipe = recipe_of(made, parameters, **({"shared": shared} if shared else {}))
    if shared.get("merge_method") == "linear":
        recipe["models"] = [{**one, "parameters": {"weight": 1}} for one in recipe["models"]]
    mixmerge.merge(recipe, tmp_path / "out")
    static = {
        "merge_method": shared.get("merge_method", "task_arithmetic"),
        "models": recipe["models"],
        "parameters": shared.get("parameters", {} if shared else {"weight": 0.3}),
    }
    if static["merge_method"] != "linear":
        static["base_model"] = str(made.base)
    mixmerge.merge(static, tmp_path / "static")
    written, experts = read_tensors(tmp_path / "out"), [read_tensors(path) for path in made.experts]
    assert all(torch.equal(value, written[key]) for key, value in read_tensors(tmp_path / "static").items())
    bank, weights = load_bank(tmp_path / "out"), torch.tensor([0.7, -0.2])
    for key, value in written.items():
        role = role_of(key, value.shape, name)
        if role == "table" and parameters.get("tables") == "shared":
            assert key not in bank.sites
            continue
        rank = parameters.get("rank")
        rank = (5 if "mlp" in key else 2) if isinstance(rank, list) else rank
        wanted = twin(
            [one[key] for one in experts], shared=value, weight=weights, rank=rank,
            energy=parameters.get("energy"), role=role,
        )  # fmt: skip
        found = value.float() + delta_of(bank, key, weights, turned=role == "transposed")
        close = 1e-6 if dtype == "float32" else 4e-3  # factors of the model's own type
        torch.testing.assert_close(found, wanted, atol=close, rtol=close)


def test_budget_and_bits(family: Any, tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    plan = make_plan(recipe_of(made, {"budget": 0.1}))
    assert plan.bank is not None
    errors = {}
    for name, parameters in {
        "budget": {"budget": 0.1},
        "bits": {"budget": 0.1, "bits": 8},
        "rank": {"rank": 4},
    }.items():
        done = mixmerge.merge(recipe_of(made, parameters), tmp_path / name)
        card, bank = read_card(tmp_path / name), load_bank(tmp_path / name)
        assert done.bank is not None
        assert done.bank.nbytes <= make_plan(recipe_of(made, parameters)).bank.nbytes + 20_000  # type: ignore[union-attr]
        if name != "rank":
            assert card.parameters <= 0.1 * 2 * plan.bank.parameters
        site = "model.layers.0.mlp.up_proj.weight"
        errors[name] = bank.sites[site].delta(torch.tensor([1.0, 0.0]))
    assert len({site.ranks for site in read_card(tmp_path / "budget").sites.values()}) > 1
    assert float((errors["bits"] - errors["budget"]).abs().max()) < 0.02 * float(errors["budget"].abs().max())


@pytest.fixture
def adapters(family: Any, tmp_path: Path, read_tensors: Any) -> tuple[Path, list[Path], list[State]]:
    """A base, two adapters of it of other ranks and targets, and PEFT's own merge of each."""
    peft = pytest.importorskip("peft")
    base = family("llama", experts=0, dtype="float32").base
    folders, whole = [], []
    settings: list[dict[str, Any]] = [
        {"r": 2, "target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_alpha": 3},
        {"r": 5, "target_modules": ["q_proj", "embed_tokens"]},
    ]
    for number, one in enumerate(settings):
        model = peft.get_peft_model(model_of(base), peft.LoraConfig(**one))
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        folder = tmp_path / f"adapter{number}"
        model.save_pretrained(folder)
        model.merge_and_unload().save_pretrained(tmp_path / f"merged{number}")
        folders.append(folder)
        whole.append(read_tensors(tmp_path / f"merged{number}"))
    return base, folders, whole


@pytest.mark.parametrize("shared", [{}, {"shared": {"merge_method": "ties", "parameters": {"weight": 1.0}}}])
def test_adapters_stay_exact(adapters: Any, tmp_path: Path, read_tensors: Any, shared: Any) -> None:
    """Where the shared part is a weighted sum, they also stay as thin as they are: no tensor of another is touched."""
    base, folders, whole = adapters
    recipe = {
        "merge_method": "twin",
        "base_model": str(base),
        "models": [{"model": f"{base}+{folder}"} for folder in folders],
        "parameters": FULL,
        "gate": "none",
        **shared,
    }
    mixmerge.merge(recipe, tmp_path / "out")
    bank, written = load_bank(tmp_path / "out"), read_tensors(tmp_path / "out")
    assert bank.experts == ("adapter0", "adapter1")
    for expert, state in enumerate(whole):
        one = torch.eye(2)[expert]
        for name, value in state.items():
            found = written[name] + delta_of(bank, name, one, turned=False)
            torch.testing.assert_close(found, value, atol=2e-6, rtol=1e-5)
    if shared:
        return
    assert not bank.vectors
    changed = {name for state in whole for name in state if not torch.equal(state[name], whole[0][name])}
    assert set(bank.sites) >= changed
    ranks = {name.split(".")[-2]: site.ranks for name, site in bank.sites.items()}
    assert ranks == {"q_proj": (7, 7), "up_proj": (2, 2), "embed_tokens": (5, 5)}


def test_what_a_bank_cannot_hold_is_said(family: Any, hollow: Any, tmp_path: Path) -> None:
    """Experts of a layer, which the model keeps as one tensor, and tensors of three dimensions."""
    made = family("mixtral", dtype="float32")
    plan, outlook = plan_with_data(recipe_of(made, {"rank": 4}))
    assert outlook is None
    assert plan.bank is not None
    assert any(
        "tensors stay as in the shared model (no tensor of the model's layers): model.layers.0" in warning
        for warning in plan.warnings
    )
    done = mixmerge.merge(recipe_of(made, {"rank": 4}), tmp_path / "out")
    assert done.plan.bank is not None
    assert set(load_bank(tmp_path / "out").sites) == {site.name for site in done.plan.bank.sites}
    tensors = {"layers.0.up.weight": ("F32", (8, 4)), "layers.0.experts": ("F32", (2, 4, 4))}
    folders = [hollow(name, tensors) for name in ("base", "a", "b")]
    written = {**recipe_of(made, {"rank": 2}), "base_model": str(folders[0])}
    plan = make_plan({**written, "models": [{"model": str(folder)} for folder in folders[1:]]})
    assert plan.warnings == ("bank: 1 tensor stays as in the shared model (3 dimensions): layers.0.experts",)


def test_heads_are_kept_and_the_trunk_is_banked(family: Any, tmp_path: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForSequenceClassification

    base = family("bert", experts=0, dtype="float32").base
    experts = []
    for number, classes in enumerate((2, 3)):
        torch.manual_seed(number)
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
        with torch.no_grad():
            for value in model.parameters():
                value.add_(0.02 * torch.randn(value.shape))
        experts.append(tmp_path / f"of{classes}")
        model.save_pretrained(experts[-1])
        tokenizer.save_pretrained(experts[-1])
    recipe = {
        "merge_method": "twin", "base_model": str(base), "parameters": FULL, "gate": "none",
        "models": [{"model": str(folder)} for folder in experts],
    }  # fmt: skip
    mixmerge.merge(recipe, tmp_path / "out")
    bank, ids = load_bank(tmp_path / "out"), torch.randint(5, 270, (2, 7))
    assert sorted(path.name for path in (tmp_path / "out" / "heads").iterdir()) == sorted(bank.experts)
    for number, name in enumerate(bank.experts):
        model = load_with_head(tmp_path / "out", name).model
        found = mixed(model, bank, ids, torch.eye(2)[[number, number]])
        with torch.no_grad():
            wanted = load_expert(experts[number]).model(ids).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_gate_tells_inputs_apart_and_rows_are_named(family: Any, tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    done = mixmerge.merge(gated(made, tmp_path), tmp_path / "out")
    assert done.bank is not None
    assert done.bank.gate is not None
    manifest = json.loads((tmp_path / "out" / "mixmerge_manifest.json").read_text())
    assert manifest["method"] == "twin"
    assert manifest["bank"]["gate"]["accuracy"] == done.bank.gate["accuracy"]
    rows = [row for name in WORDS for row in read_rows(tmp_path / f"{name}.jsonl")]
    assert read_made(tmp_path / "out").rows == {row.digest for row in rows}
    said = (tmp_path / "out" / "README.md").read_text()
    assert "## Bank" in said
    assert "expert0.jsonl" in said
    model, bank = load_expert(tmp_path / "out"), load_bank(tmp_path / "out")
    gate = load_gate(tmp_path / "out" / "bank", bank=read_card(tmp_path / "out").hash)
    new = [*read_rows(_new(tmp_path, WORDS["expert0"])), *read_rows(_new(tmp_path, WORDS["expert1"]))]
    shown = features_of(model, new)
    weights = gate.query(shown.values)
    owners = torch.tensor([row // 10 for row in shown.rows])
    assert float((weights.argmax(1) == owners).float().mean()) > 0.9
    ids = torch.randint(5, 270, (4, 6), generator=torch.Generator().manual_seed(2))
    together = mixed(model.model, bank, ids, weights[:4], gate)
    for row in (0, 3):
        alone = mixed(model.model, bank, ids[row : row + 1], weights[row : row + 1], gate)
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def _new(folder: Path, text: str) -> Path:
    path = folder / "new.jsonl"
    lines = [json.dumps({"text": text.format(n, n + 7, n * 5)}) + "\n" for n in range(100, 110)]
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize("gate", [{"epochs": 2, "batch": 8}, "none"])
def test_a_shared_part_may_need_data(family: Any, tmp_path: Path, read_tensors: Any, gate: Any) -> None:
    made = family("llama", dtype="float32")
    recipe = {**gated(made, tmp_path), "shared": {"merge_method": "regmean"}, "gate": gate}
    _, outlook = plan_with_data(recipe)
    assert outlook is not None
    assert outlook.work == "gathering"
    done = mixmerge.merge(recipe, tmp_path / "out")
    static = {key: recipe[key] for key in ("models", "calibration", "dtype", "seed")}
    mixmerge.merge({**static, "merge_method": "regmean"}, tmp_path / "static")
    written = read_tensors(tmp_path / "out")
    assert all(torch.equal(value, written[key]) for key, value in read_tensors(tmp_path / "static").items())
    assert done.bank is not None
    assert (done.bank.gate is None) == (gate == "none")
    assert (tmp_path / "out" / "bank" / "gate.json").is_file() == (gate != "none")


def test_features_of_texts_and_of_tokens(family: Any, tmp_path: Path) -> None:
    made = family("llama", dtype="float32")
    encoder = family("bert", experts=0, dtype="float32").base
    text = gated(made, tmp_path, features="text", encoder=str(encoder), hidden=1)
    mixmerge.merge(text, tmp_path / "text")
    gate: Any = load_gate(tmp_path / "text" / "bank", bank=read_card(tmp_path / "text").hash)
    assert (gate.features, gate.encoder, gate.inputs) == ("text", str(encoder), 32)
    mixmerge.merge(gated(made, tmp_path, per_token=True), tmp_path / "tokens")
    gate = load_gate(tmp_path / "tokens" / "bank", bank=read_card(tmp_path / "tokens").hash)
    assert gate.second_pass


# What a merge is killed in: the bank's progress, the epochs of the gate, and the steps of its second training.
DYING = """
import json, os, signal, sys
from mixmerge.engine.merge import merge

recipe, out, at = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def gathering(what, done, total):
    if what == at == "bank" and done == total // 2:
        die()

told = []

def learning(done, total, loss):
    told.append(done)
    if len(told) == {"gate": 2, "task": 14}.get(at):
        die()

merge(recipe, out, gathering=gathering, learning=learning)
"""


@pytest.mark.parametrize("at", ["bank", "gate", "task"])
def test_a_killed_merge_goes_on(family: Any, programs: Any, tmp_path: Path, at: str) -> None:
    second = {"task": {"epochs": 1, "batch": 8}} if at == "task" else {}
    recipe = gated(family("llama", dtype="float32"), tmp_path, **second)
    whole, out = tmp_path / "whole", tmp_path / "out"
    mixmerge.merge(recipe, whole)
    done = programs("-c", DYING, json.dumps(recipe), out, at, folder=tmp_path)
    assert done.returncode != 0
    assert not out.exists()
    partial = tmp_path / ".out.mixmerge-partial"
    assert (partial / "bank" / "bank.json").is_file() == (at != "bank")
    told: list[str] = []
    resumed = mixmerge.merge(recipe, out, gathering=lambda what, *_: told.append(what))
    assert resumed.resumed == len(resumed.plan.tasks)
    assert ("bank" in told) == (at == "bank")
    files = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == files
    assert [name for name in files if (whole / name).read_bytes() != (out / name).read_bytes()] == []
    assert not partial.exists()


def test_overwriting_takes_a_bank_and_nothing_else(family: Any, tmp_path: Path) -> None:
    recipe = recipe_of(family("llama", dtype="float32"), {"rank": 1})
    mixmerge.merge(recipe, tmp_path / "out")
    mixmerge.merge(recipe, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "bank" / "mine").mkdir()
    with pytest.raises(OutputError, match="not a model folder and nothing else"):
        mixmerge.merge(recipe, tmp_path / "out", overwrite=True)


Change = Callable[[dict[str, Any]], Any]
WRONG: dict[str, tuple[Change, list[str]]] = {
    "shared": (
        lambda r: r.update(shared={"merge_method": "tsv", "parameters": {"weigth": 1}}),
        ["no merge method is called 'tsv'. Did you mean 'tsv_m'?", "unknown parameter 'weigth'"],
    ),
    "twice": (lambda r: r.update(shared={"merge_method": "twin"}), ["twin is not static"]),
    "shared needs data": (
        lambda r: r.update(shared={"merge_method": "regmean"}),
        ["twin learns from data, and the recipe has none"],
    ),
    "no rows": (lambda r: r.update(gate={}), ["twin learns from data, and the recipe has none"]),
    "rank 0": (lambda r: r.update(parameters={"rank": 0}), ["0 is out of range. rank is at least 1"]),
    "half a rank": (
        lambda r: r.update(parameters={"rank": 1.5}),
        ["1.5 is no whole number. rank is at least 1"],
    ),
    "rank": (
        lambda r: r.update(parameters={"rank": 49}),
        ["parameters.rank: is 49, and no matrix has more than 32 rows or columns. 1 to 32"],
    ),
    "energy": (
        lambda r: r.update(parameters={"energy": 1.5, "bits": 7}),
        ["1.5 is out of range", "7 is out of range"],
    ),
    "no energy": (lambda r: r.update(parameters={"energy": 0}), ["0 is out of range. energy is above 0"]),
    "both": (
        lambda r: r.update(parameters={"rank": 2, "energy": 0.5}),
        ["rank and energy are given, and each says how large the parts are"],
    ),
    "budget": (
        lambda r: r.update(parameters={"budget": 0.001}),
        ["biases and gains of norms, which are kept whole, take"],
    ),
    "bits": (lambda r: r.update(parameters={"bits": 12}), ["parameters.bits: is 12. 8, 16, 32"]),
    "one": (lambda r: r["models"].pop(), ["twin takes at least 2 experts besides the base_model"]),
    "no base": (lambda r: r.pop("base_model"), ["twin needs a base_model"]),
    "gate": (
        lambda r: r.update(gate={"hidden": 9, "features": "text", "widht": 2}),
        ["gate.hidden: expected a number less than or equal to 8", "unknown key 'widht'"],
    ),
    "encoder": (lambda r: r.update(gate={"features": "text"}), ["features: text needs an encoder"]),
    "words": (lambda r: r.update(gate="soft"), ["expected the settings of a gate, got 'soft'"]),
    "other methods": (
        lambda r: r.update(merge_method="linear", shared={}, gate="none", parameters={"weight": 1}),
        ["shared is for methods that leave a bank", "gate is for methods that leave a bank"],
    ),
    "coefficients": (lambda r: r.update(coefficients="c.json"), ["twin takes no learned coefficients"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_a_weight_is_read(family: Any, case: str) -> None:
    change, words = WRONG[case]
    recipe = recipe_of(family("llama", dtype="float32"), {"rank": 2})
    change(recipe)
    with pytest.raises(RecipeError) as caught:
        make_plan(recipe)
    said = [str(fault) for fault in caught.value.faults]
    for word in words:
        assert any(word in fault for fault in said), said


def test_rows_that_teach_no_gate_are_refused(family: Any, tmp_path: Path) -> None:
    recipe = gated(family("llama", dtype="float32"), tmp_path)
    paths = recipe["calibration"]["per_expert"]
    recipe["calibration"] = {"data": paths["expert0"]}
    with pytest.raises(RecipeError, match="have the same rows, and the gate learns whose rows are whose"):
        make_plan(recipe)
    shutil.copy(paths["expert0"], tmp_path / "copy.jsonl")
    recipe["calibration"] = {"per_expert": {**paths, "expert1": str(tmp_path / "copy.jsonl")}}
    with pytest.raises(RecipeError, match="every row is of several experts"):
        plan_with_data(recipe)
    recipe["calibration"] = {"per_expert": {**paths, "expert1": str(tmp_path / "absent.jsonl")}}
    with pytest.raises(MixmergeError, match=r"absent\.jsonl"):
        plan_with_data(recipe)


def test_the_outlook_says_rows_bytes_and_memory(family: Any, tmp_path: Path) -> None:
    from mixmerge.plan import as_json

    plan, outlook = plan_with_data(gated(family("llama", dtype="float32"), tmp_path))
    assert outlook is not None
    assert [(seen.rows, seen.tokens is not None) for seen in outlook.experts] == [(30, True), (30, True)]
    assert set(outlook.need.memory) == {"the shared model", "a batch", "features", "the gate"}
    report = as_json(plan, threads=1)
    assert report["method"] == "twin"
    assert report["bank"]["shared"] == "task_arithmetic"
    assert 0 < report["bank"]["bytes_at_most"] < report["bank"]["bytes_of_experts"]
    done = mixmerge.merge(gated(family("llama", dtype="float32"), tmp_path), tmp_path / "out")
    assert done.bank is not None
    factors = sum(path.stat().st_size for path in (tmp_path / "out" / "bank").glob("factors*"))
    assert factors <= report["bank"]["bytes_at_most"] + 10_000  # names and offsets


def test_a_recipe_is_read_back_as_it_was(family: Any) -> None:
    from mixmerge.recipe import canonical, dump, parse, read

    recipe = recipe_of(family("llama", dtype="float32"), {"energy": 0.9, "bits": 8}, seed=4)
    recipe["models"][0]["parameters"] = {"weight": 0.1}
    for gate in ("none", {"hidden": 1, "learning_rate": "1e-3", "top_k": 1, "task": {"rank_rate": "1e-3"}}):
        rows = {"calibration": {"per_expert": {"expert0": "a.jsonl", "expert1": "b.jsonl"}}}
        made = read({**recipe, "gate": gate, **(rows if gate != "none" else {})}).require()
        again = parse(dump(made)).require()
        assert canonical(again) == canonical(made)
        assert again == made
