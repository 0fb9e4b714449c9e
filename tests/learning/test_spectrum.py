"""The learned spectrum: gradients of factors against autograd, and whole merges that learn, replay and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixmerge.calibrate.coefficients import heat_map
from mixmerge.calibrate.spectrum import Stretched, directions_of
from mixmerge.engine import learning as engine_learning
from mixmerge.engine.merge import merge
from mixmerge.engine.outlook import plan_with_data
from mixmerge.errors import MethodError, MixmergeError
from mixmerge.evaluate.leaks import read_made
from mixmerge.methods.coefficients import FILE, Coefficients, read_coefficients
from mixmerge.methods.lowrank import LowRank
from mixmerge.methods.records import Role
from mixmerge.methods.sketch import Group
from mixmerge.methods.spectrum import learned_spectrum

NAME = "learned_spectrum"
WORDS = ("sun", "rain", "snow", "wind", "fog", "hail")
ROLES: dict[str, Role] = {
    "wide": "linear",
    "turned": "transposed",
    "stack": "other",
    "thin": "linear",
    "bias": "other",
}


class Maps(nn.Module):
    """A map of each kind, of six inputs."""

    def __init__(self, base: dict[str, Tensor]) -> None:
        super().__init__()
        self.all = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in base.items()})

    def loss(self) -> Tensor:
        x = torch.linspace(-1, 1, 12).reshape(2, 6)
        x = (x @ self.all["wide"].mT + self.all["bias"]).tanh() @ self.all["turned"]
        x = sum((x @ each.mT).tanh() @ each for each in self.all["stack"]) @ self.all["thin"].mT
        return (x - 1).square().mean()


def groups(seed: int = 0) -> dict[str, Group]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return 0.4 * torch.randn(shape, generator=generator)

    shapes = {"wide": (4, 6), "turned": (4, 6), "stack": (2, 3, 6), "thin": (5, 6), "bias": (4,)}
    given = {"weight": [1.0, 0.5], "lambda": 1.3, "tables": "mean", "tolerance": None}
    found = {}
    for name, shape in shapes.items():
        deltas: list[Any] = [draw(*shape), draw(*shape)]
        if name == "thin":
            deltas = [LowRank(draw(5, 1), draw(1, 6)) for _ in range(2)]
        found[name] = Group(deltas, draw(*shape), ROLES[name], given)
    return found


def merged_by_hand(group: Group, factors: Tensor | None) -> Tensor:
    """Through ``torch.linalg.svd``, so that autograd sees the factors."""
    dense = [delta.b @ delta.a if isinstance(delta, LowRank) else delta for delta in group.tensors]
    summed, base = dense[0] + 0.5 * dense[1], group.base
    assert base is not None
    if factors is None:
        return base + 1.3 * summed / 2
    parts, at = [], 0
    for one in summed if summed.ndim == 3 else [summed]:
        rank = int(torch.linalg.matrix_rank(one))
        u, s, vt = torch.linalg.svd(one, full_matrices=False)
        parts.append((u[:, :rank] * (s[:rank].mean() * factors[at : at + rank])) @ vt[:rank])
        at += rank
    assert at == len(factors)
    return base + 1.3 * (torch.stack(parts) if summed.ndim == 3 else parts[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_of_factors_is_that_of_the_merge(dtype: torch.dtype) -> None:
    made = groups()
    base = {name: group.base for name, group in made.items() if group.base is not None}
    model = Maps(base).to(dtype)
    known = dict(model.all.items())
    found = {name: directions_of(group, dtype) for name, group in made.items() if name != "bias"}
    held = Stretched(known, found, made.__getitem__)
    counts = {name: len(rows) for name, rows in held.layout.rows.items()}
    assert counts == {"wide": 4, "turned": 4, "stack": 6, "thin": 2}
    generator = torch.Generator().manual_seed(1)
    values = 1 + 0.3 * torch.randn(sum(counts.values()), 1, generator=generator, dtype=torch.float64)
    factors = values.float()[:, 0].requires_grad_(True)
    whole = Maps(base)
    wanted, at = {}, 0
    for name, group in made.items():
        count = counts.get(name, 0)
        wanted[name] = merged_by_hand(group, factors[at : at + count] if count else None)
        at += count
    loss = torch.func.functional_call(
        _Loss(whole), {f"maps.all.{name}": value for name, value in wanted.items()}, ()
    )
    loss.backward()
    held.build(values, everything=True)
    exact = dtype == torch.float32
    for name, value in wanted.items():
        torch.testing.assert_close(known[name].float(), value.detach(), rtol=0, atol=1e-5 if exact else 3e-2)
    with held.watched():
        assert not known["bias"].requires_grad
        mine = model.loss() if exact else _Loss(model).in_float()
        mine.backward()
        assert all(value.grad is None for value in model.parameters())
    assert factors.grad is not None
    gap = (held.gradient[:, 0] - factors.grad).abs().max()
    assert gap <= (1e-5 if exact else 0.1) * factors.grad.abs().max()
    assert all(value.requires_grad for value in model.parameters())


class _Loss(nn.Module):
    def __init__(self, maps: Maps) -> None:
        super().__init__()
        self.maps = maps

    def forward(self) -> Tensor:
        return self.maps.loss()

    def in_float(self) -> Tensor:
        """The same of parameters of 16 bits, whose gradients are of 16 bits too."""
        wide = {f"maps.all.{name}": value.float() for name, value in self.maps.all.items()}
        found: Tensor = torch.func.functional_call(self, wide, ())
        return found


def test_what_is_built_is_what_the_definition_merges() -> None:
    made = groups()
    model = Maps({name: group.base for name, group in made.items() if group.base is not None})
    found = {name: directions_of(group, torch.float32) for name, group in made.items() if name != "bias"}
    held = Stretched(dict(model.all.items()), found, made.__getitem__)
    values = torch.linspace(0.1, 2, len(held.layout.start), dtype=torch.float64)[:, None]
    held.build(values, everything=True)
    weights = held.layout.weights(values.tolist())
    for name, group in made.items():
        assert group.base is not None
        wanted = learned_spectrum(
            group.tensors, base=group.base, weight=[1.0, 0.5], lambda_=1.3, role=group.role,
            factors=[row[0] for row in weights[name]], nuclear=held.layout.nuclear.get(name, 0.0),
        )  # fmt: skip
        torch.testing.assert_close(model.all[name].detach(), wanted, rtol=1e-6, atol=1e-6)


def rows_of(folder: Path, count: int = 24) -> Path:
    lines = [f"{a} and {b} and then {c}" for a in WORDS for b in WORDS[:3] for c in WORDS[:2]]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:count]))
    return path


def recipe_of(made: Any, folder: Path, method: str = NAME, **parameters: Any) -> dict[str, Any]:
    written = {
        "merge_method": method,
        "base_model": str(made.base),
        "models": [{"model": str(expert)} for expert in made.experts],
        "parameters": parameters,
        "dtype": "float32",
        "seed": 5,
    }
    if method == NAME:
        written["calibration"] = {"data": str(rows_of(folder)), "max_examples": 24, "max_tokens": 24}
    return written


def replay_of(recipe: dict[str, Any], file: Path, **changed: Any) -> dict[str, Any]:
    plain = {key: value for key, value in recipe.items() if key != "calibration"}
    return {**plain, "coefficients": str(file), **changed}


def learned_of(folder: Path) -> Coefficients:
    return read_coefficients((folder / FILE).read_text(), where="test")


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "tables", "precision"),
    [
        ("llama", "mean", "float32"),
        ("gpt2", "mean", "bfloat16"),
        ("llama_tied", "spectral", "float32"),
    ],
)
def test_a_merge_that_learns(
    family: Any,
    tmp_path: Path,
    assert_loads: Callable[[Path], Any],
    name: str,
    tables: str,
    precision: str,
) -> None:
    made = family(name, experts=2, dtype="float32")
    options = {"rows": 24, "steps": 8, "learning_rate": 0.1, "tables": tables, "precision": precision}
    recipe = recipe_of(made, tmp_path, **options, **{"lambda": 2.0})
    seen: list[tuple[int, int, float]] = []
    done = merge(recipe, tmp_path / "out", learning=lambda *now: seen.append(now))
    learned = learned_of(tmp_path / "out")
    assert done.learned == learned
    assert learned.losses == tuple(loss for _, _, loss in seen)
    assert learned.losses[-1] < 0.9 * learned.losses[0]
    assert (learned.start, learned.shared) == ((1.0,), True)
    assert learned.moved() > 0.01
    assert_loads(tmp_path / "out")
    free = {key for key in learned.weights if key not in learned.frozen}
    assert free == learned.nuclear.keys()
    assert all(len(learned.weights[key]) > 1 for key in free)
    assert all(learned.weights[key] == ((1.0,),) for key in learned.frozen)
    assert any("embed" in key or "wte" in key for key in free) == (tables == "spectral")
    assert (tmp_path / "out" / engine_learning.HEAT_MAP).read_bytes()[:4] == b"\x89PNG"
    # the same bytes without data, and the rows are known to whoever evaluates either
    merge(replay_of(recipe, tmp_path / "out" / FILE), tmp_path / "again")
    assert same_weights(tmp_path / "again", tmp_path / "out")
    used = read_made(tmp_path / "out").rows
    assert len(used) >= 24
    assert read_made(tmp_path / "again").rows == used
    if name == "llama":
        merge(recipe, tmp_path / "twice")
        assert (tmp_path / "twice" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


@pytest.mark.parametrize("learn", ["all", "linear"])
def test_without_a_movement_it_is_iso_c(family: Any, tmp_path: Path, learn: str) -> None:
    made = family("llama", experts=2, dtype="bfloat16")
    given = {"weight": 0.7, "lambda": 1.5, "tables": "spectral"}
    still = recipe_of(made, tmp_path, steps=1, learning_rate=0.0, learn=learn, **given)
    learned = merge(still, tmp_path / "still").learned
    merge(recipe_of(made, tmp_path, "iso_c", **given), tmp_path / "iso")
    assert same_weights(tmp_path / "still", tmp_path / "iso")
    assert learned is not None
    assert ("lm_head.weight" in learned.frozen) == (learn == "linear")


def test_a_regulariser_holds_the_factors(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    moved = []
    for strength in (0.0, 1e3):
        options = {"steps": 4, "rows": 24, "learning_rate": 0.05, "regulariser": strength}
        done = merge(recipe_of(made, tmp_path, **options), tmp_path / f"{strength}")
        assert done.learned is not None
        moved.append(done.learned.moved())
    assert moved[1] < 0.9 * moved[0]


def test_adapters_have_as_many_directions_as_ranks(family: Any, tmp_path: Path) -> None:
    import peft
    import transformers

    base = family("llama", experts=0, dtype="float32").base
    adapters = []
    for seed in range(2):
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, parameter in sorted(adapted.named_parameters()):
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / f"adapter{seed}")
        adapters.append(f"{base}+{tmp_path / f'adapter{seed}'}")
    recipe = recipe_of(type("Made", (), {"base": base, "experts": adapters}), tmp_path, steps=6)
    plan, outlook = plan_with_data(recipe)
    assert outlook is not None
    shapes = [
        task.target.shape
        for task in plan.tasks
        if "q_proj" in task.target.name or "down_proj" in task.target.name
    ]
    rest = [
        task.target.shape for task in plan.tasks
        if "proj" in task.target.name and not ("q_proj" in task.target.name or "down_proj" in task.target.name)
    ]  # fmt: skip
    assert outlook.need.memory["directions"] >= 4 * 6 * sum(map(sum, shapes))
    learned = merge(recipe, tmp_path / "out").learned
    assert learned is not None
    assert learned.losses[-1] < learned.losses[0]
    assert len(learned.nuclear) == len(shapes)
    assert len(rest) == 10
    assert {len(learned.weights[name]) for name in learned.nuclear} == {6}
    merge(replay_of(recipe, tmp_path / "out" / FILE), tmp_path / "again")
    assert same_weights(tmp_path / "again", tmp_path / "out")


def test_the_experts_of_a_layer_have_directions_of_their_own(
    tmp_path: Path, tokenizer: Any, assert_loads: Callable[[Path], Any]
) -> None:
    """Stacks of matrices, inputs x outputs: factors of each, one behind the other."""
    from types import SimpleNamespace

    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, intermediate_size=24, max_position_embeddings=64, pad_token_id=0,
        num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(1)
    model = GptOssForCausalLM(config).float()
    for name in ("base", "expert0", "expert1"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn_like(parameter)
    made = SimpleNamespace(base=tmp_path / "base", experts=[tmp_path / "expert0", tmp_path / "expert1"])
    recipe = recipe_of(made, tmp_path, rows=24, steps=3, learning_rate=0.1)
    learned = merge(recipe, tmp_path / "out").learned
    assert learned is not None
    assert learned.losses[-1] < learned.losses[0]
    stacks = {
        key: rows for key, rows in learned.weights.items() if key.endswith(("down_proj", "gate_up_proj"))
    }
    assert [len(rows) for rows in stacks.values()] == [4 * 16] * 4
    assert all(abs(row[0] - 1) > 1e-3 for rows in stacks.values() for row in rows[:1])
    assert_loads(tmp_path / "out")
    merge(replay_of(recipe, tmp_path / "out" / FILE), tmp_path / "again")
    assert same_weights(tmp_path / "again", tmp_path / "out")


def test_the_plan_says_what_the_directions_take(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    for precision, width in (("float32", 4), ("bfloat16", 2)):
        plan, outlook = plan_with_data(recipe_of(made, tmp_path, precision=precision))
        assert outlook is not None
        shapes = [task.target.shape for task in plan.tasks if task.target.name.endswith("_proj.weight")]
        assert outlook.need.memory["directions"] == width * sum((m + n) * min(m, n) for m, n in shapes)
        assert outlook.need.memory["a decomposition"] > 0
    assert outlook.need.disk > 0
    _, other = plan_with_data({**recipe_of(made, tmp_path), "merge_method": "expert_merging"})
    assert other is not None
    assert "directions" not in other.need.memory


def test_experts_that_cannot_be_told_apart(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    recipe = recipe_of(made, tmp_path, steps=1)
    recipe["models"][1]["model"] = str(tmp_path / "copy")
    (tmp_path / "copy").symlink_to(made.experts[0])
    with pytest.raises(MethodError, match=r"copy: equals .* in every tensor that is learned"):
        merge(recipe, tmp_path / "out")
    with pytest.raises(MethodError, match="learn: no matrix has directions that are learned"):
        merge(recipe_of(made, tmp_path, learn="none"), tmp_path / "out")
    for work in (plan_with_data, lambda written: merge(written, tmp_path / "out")):
        with pytest.raises(MixmergeError, match="logit_weight: is 0 and no hidden states are aligned"):
            work(recipe_of(made, tmp_path, logit_weight=0))
    assert not (tmp_path / "out").exists()


def test_factors_that_do_not_fit(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    recipe = recipe_of(made, tmp_path, steps=1)
    merge(recipe, tmp_path / "out")
    text, edited = (tmp_path / "out" / FILE).read_text(), tmp_path / "edited.json"
    plain = json.loads(text)
    name = "model.layers.0.mlp.up_proj.weight"

    def fault(content: dict[str, Any], **changed: Any) -> str:
        edited.write_text(json.dumps(content))
        with pytest.raises(MixmergeError) as caught:
            merge(replay_of(recipe, edited, **changed), tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
        return str(caught.value)

    def factors(found: list[list[float]], of: str = name) -> dict[str, Any]:
        return {**plain, "weights": {**plain["weights"], of: found}}

    assert len(plain["weights"][name]) == 32
    assert f"tensor '{name}': factors: are 31 for 32 directions" in fault(factors([[1.0]] * 31))
    assert f"weights.{name}: has factors of 33 directions, and the tensor has at most 32" in fault(
        factors([[1.0]] * 33)
    )
    assert "norm.weight: has factors of 2 directions" in fault(factors([[1.0]] * 2, "model.norm.weight"))
    assert "is not a list of chunks with one number each, of a direction" in fault(factors([[1.0, 2.0]]))
    assert "nuclear: is no mapping" in fault({**plain, "nuclear": [1.0]})
    assert "nuclear: is no mapping" in fault({**plain, "nuclear": {name: -1.0}})
    assert "were learned for a sum of nuclear norm" in fault(plain, parameters={"weight": 0.5})
    assert "has coefficients of 2 experts, the recipe 1" in fault(plain, models=recipe["models"][:1])
    assert f"which task_arithmetic does not take. Set merge_method: {NAME}" in fault(
        plain, merge_method="task_arithmetic", parameters={}
    )
    weights = {key: [[0.5, 0.5]] for key in plain["weights"]}
    other = {**plain, "method": "expert_merging", "weights": weights, "nuclear": {}}
    assert f"has weights of experts, learned by expert_merging, which {NAME} does not take" in fault(other)
    # one number is one for all directions, and lambda is free
    edited.write_text(json.dumps(factors([[0.0]])))
    merge(replay_of(recipe, edited, parameters={"lambda": 3.0}), tmp_path / "free")
    from safetensors.torch import load_file

    base, free = (
        load_file(made.base / "model.safetensors"),
        load_file(tmp_path / "free" / "model.safetensors"),
    )
    assert [key for key in base if torch.equal(base[key], free[key])] == [name]


def test_the_picture_has_one_panel() -> None:
    weights = {"layers.0.q.weight": ((0.5,), (2.0,)), "norm.weight": ((1.0,),)}
    found = Coefficients(
        NAME, ("a", "b"), weights, nuclear={"layers.0.q.weight": 3.0}, start=(1.0,), frozen=("norm.weight",)
    )
    assert read_coefficients(found.to_json(), where="test") == found
    assert found.moved() == pytest.approx(0.75)
    other = {name: tuple(row * 2 for row in rows) for name, rows in weights.items()}
    two = Coefficients("expert_merging", ("a", "b"), other, start=(1.0, 1.0), frozen=("norm.weight",))
    one_panel, two_panels = (int.from_bytes(heat_map(each)[16:20]) for each in (found, two))
    assert one_panel < two_panels
