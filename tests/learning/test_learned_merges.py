"""Whole merges with learned coefficients: real tiny models that learn, replays without data, kills, and bad input."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mixmerge
from mixmerge.engine import learning as engine_learning
from mixmerge.engine.merge import merge
from mixmerge.engine.outlook import plan_with_data
from mixmerge.errors import CheckpointError, MethodError, MixmergeError, RecipeError
from mixmerge.evaluate.leaks import read_made
from mixmerge.methods.coefficients import FILE, Coefficients, read_coefficients
from mixmerge.recipe import read

Made = dict[str, Path]
WORDS = ("sun", "rain", "snow", "wind", "fog", "hail")


def texts(task: int, count: int, seed: int) -> list[tuple[str, int]]:
    """Task 0: does "s" come before "r"? Task 1: more than one "o"?"""
    generator = torch.Generator().manual_seed(seed)
    found = []
    while len(found) < count:
        picked = ["srowfh"[i] for i in torch.randint(0, 6, (8,), generator=generator).tolist()]
        if task == 0:
            if "s" in picked and "r" in picked:
                found.append(("".join(picked), int(picked.index("s") < picked.index("r"))))
        else:
            found.append(("".join(picked), int(picked.count("o") > 1)))
    return found


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Made:
    """A base and two classifiers trained from it on a task each, and unlabeled rows for both."""
    from transformers import BertConfig, BertForSequenceClassification, BertModel
    from transformers.utils import logging

    root = tmp_path_factory.mktemp("classifiers")
    config = BertConfig(
        vocab_size=280, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, num_labels=2, pad_token_id=0, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertModel(config)
    logging.disable_progress_bar()
    made: Made = {"base": root / "base"}
    base.save_pretrained(made["base"])
    tokenizer.save_pretrained(made["base"])
    for task, name in enumerate(("order", "count")):
        torch.manual_seed(task)
        model = BertForSequenceClassification.from_pretrained(made["base"], num_labels=2 + task)
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        rows = texts(task, 256, seed=task)
        inputs = tokenizer([text for text, _ in rows], return_tensors="pt", padding=True)
        labels = torch.tensor([label for _, label in rows])
        for step in range(60):
            at = slice(step % 8 * 32, step % 8 * 32 + 32)
            loss = model(
                input_ids=inputs["input_ids"][at],
                attention_mask=inputs["attention_mask"][at],
                labels=labels[at],
            ).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        made[name] = root / name
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
        rows_ = [{"text": text} for text, _ in texts(task, 64, seed=100 + task)]
        made[f"{name}.jsonl"] = write_rows(root / f"{name}.jsonl", rows_)
    return made


def recipe_of(made: Made, method: str, **parameters: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(made["base"]),
        "models": [{"model": str(made["order"])}, {"model": str(made["count"])}],
        "parameters": parameters,
        "calibration": {
            "per_expert": {"order": str(made["order.jsonl"]), "count": str(made["count.jsonl"])},
            "max_examples": 48,
            "batch_size": 16,
        },
        "seed": 5,
    }


def learned_of(folder: Path) -> Coefficients:
    return read_coefficients((folder / FILE).read_text(), where="test")


def trunk(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trunk's tensors, without the prefix of a classifier."""
    return {name.removeprefix("bert."): v for name, v in state.items() if not name.startswith("classifier")}


def mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("adamerging", {}),
        ("adamerging", {"granularity": "task", "clamp": "none"}),
        ("adamerging_plus", {}),
        ("adamerging_plus", {"scope": "tensor", "clamp": "dead"}),
    ],
)
def test_adamerging_lowers_the_entropy(
    classifiers: Made, tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    recipe = recipe_of(classifiers, method, steps=12, learning_rate=0.04, **options)
    seen: list[tuple[int, int, float]] = []
    done = merge(recipe, tmp_path / "out", learning=lambda *now: seen.append(now))
    learned = learned_of(tmp_path / "out")
    assert done.learned == learned
    assert len(learned.losses) == 12
    assert learned.losses == tuple(loss for _, _, loss in seen)
    assert mean(learned.losses[-3:]) < 0.9 * mean(learned.losses[:3])
    assert all(0 <= loss <= math.log(2) + math.log(3) for loss in learned.losses)
    assert learned.moved() > 0.01
    assert (tmp_path / "out" / engine_learning.HEAT_MAP).read_bytes()[:4] == b"\x89PNG"
    if options.get("granularity") == "task":
        assert len(set(learned.weights.values())) == 1
    # the model that was learned on is the model that was written: the weights replay to the same bytes
    replay = {**recipe, "coefficients": str(tmp_path / "out" / FILE)}
    del replay["calibration"]
    again = merge(replay, tmp_path / "again")
    assert again.learned is None
    used = read_made(tmp_path / "out").rows
    assert len(used) > 48
    assert read_made(tmp_path / "again").rows == used
    assert same_weights(tmp_path / "again", tmp_path / "out")
    # who replays coefficients may not be evaluated on what they were learned on either
    assert len(read_made(tmp_path / "out").rows) > 0
    assert read_made(tmp_path / "again").rows == read_made(tmp_path / "out").rows
    if method == "adamerging":
        plain = {**replay, "merge_method": "task_arithmetic", "parameters": {}}
        merge(plain, tmp_path / "plain")
        assert same_weights(tmp_path / "plain", tmp_path / "out")
    if options:
        return
    merge(recipe, tmp_path / "twice")
    assert (tmp_path / "twice" / FILE).read_bytes() == (tmp_path / "out" / FILE).read_bytes()


def same_weights(one: Path, other: Path) -> bool:
    return (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_the_merge_is_the_model_that_was_learned_on(
    classifiers: Made, tmp_path: Path, read_tensors: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    for method in ("adamerging", "adamerging_plus"):
        merge(recipe_of(classifiers, method, steps=3, learning_rate=0.05), tmp_path / method)
        weights = learned_of(tmp_path / method).weights
        base, *experts = (trunk(read_tensors(classifiers[name])) for name in ("base", "order", "count"))
        deltas = [{name: state[name] - base[name] for name in base} for state in experts]
        if method == "adamerging_plus":
            deltas = trimmed_by_hand(deltas, 0.2)
        merged = read_tensors(tmp_path / method)
        for name, value in base.items():
            wanted = value + sum(w * delta[name] for w, delta in zip(weights[name][0], deltas, strict=True))
            torch.testing.assert_close(merged[name], wanted, atol=1e-6, rtol=1e-5)


def trimmed_by_hand(deltas: list[dict[str, torch.Tensor]], density: float) -> list[dict[str, torch.Tensor]]:
    """The largest fifth of each whole delta, of which what has the sign of the sum."""
    kept = []
    for delta in deltas:
        flat = torch.cat([value.abs().flatten() for value in delta.values()])
        least = flat.sort(descending=True).values[int(density * flat.numel()) - 1]
        kept.append({name: torch.where(value.abs() >= least, value, 0.0) for name, value in delta.items()})
    signs = {name: torch.where(sum(one[name] for one in kept) >= 0, 1.0, -1.0) for name in kept[0]}
    return [{name: torch.where(v.sign() == signs[name], v, 0.0) for name, v in one.items()} for one in kept]


@pytest.mark.parametrize("method", ["expert_merging", "expert_merging_plus"])
def test_expert_merging_comes_nearer_to_the_experts(
    family: Any, tmp_path: Path, assert_loads: Callable[[Path], Any], method: str
) -> None:
    made = family("llama", experts=2, dtype="float32")
    data = write_rows(
        tmp_path / "rows.jsonl",
        [{"text": f"{a} and {b} and then {c}"} for a in WORDS for b in WORDS[:3] for c in WORDS[:2]],
    )
    recipe = {
        "merge_method": method,
        "base_model": str(made.base),
        "models": [{"model": str(expert)} for expert in made.experts],
        "calibration": {"data": str(data), "max_examples": 16},
        "parameters": {"steps": 15, "regulariser": 0.0},
    }
    merge(recipe, tmp_path / "out")
    learned = learned_of(tmp_path / "out")
    assert learned.start == pytest.approx((0.1, 0.1))
    assert mean(learned.losses[-3:]) < 0.9 * learned.losses[0]
    linear = [name for name in learned.weights if name not in learned.frozen]
    assert all(name.endswith("_proj.weight") for name in linear)
    assert learned.weights["model.norm.weight"] == ((0.1, 0.1),)
    assert_loads(tmp_path / "out")
    if method == "expert_merging_plus":
        counts = {len(learned.weights[name]) for name in linear}
        assert len(counts) > 1
        assert sum(len(learned.weights[name]) for name in linear) <= 2 * len(linear)
        replay = {key: value for key, value in recipe.items() if key != "calibration"}
        replay |= {
            "merge_method": "task_arithmetic",
            "parameters": {},
            "coefficients": str(tmp_path / "out" / FILE),
        }
        merge(replay, tmp_path / "again")
        assert same_weights(tmp_path / "again", tmp_path / "out")


def test_chunks_that_nobody_gets_are_said(family: Any, tmp_path: Path) -> None:
    made = family("llama", experts=2, dtype="float32")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"{a} and {b}"} for a in WORDS for b in WORDS])
    recipe = {
        "merge_method": "expert_merging_plus",
        "base_model": str(made.base),
        "models": [{"model": str(expert)} for expert in made.experts],
        "calibration": {"data": str(data), "max_examples": 8},
        "parameters": {"steps": 2, "budget": 1.0, "kappa": 0.0},
    }
    learned = merge(recipe, tmp_path / "out").learned
    assert learned is not None
    assert {len(chunks) for chunks in learned.weights.values()} == {1}
    assert any("no tensor's share of the chunks reaches 2" in said for said in learned.warnings)


def test_chunks_of_some_tensors_by_filters(classifiers: Made, tmp_path: Path, read_tensors: Any) -> None:
    """As the released code gives them: so many coefficients to the tensors whose names match."""
    chunks = [{"filter": "query", "value": 3}, {"filter": "intermediate", "value": 2}, {"value": 1}]
    learned = merge(
        recipe_of(classifiers, "expert_merging", steps=2, chunks=chunks), tmp_path / "out"
    ).learned
    assert learned is not None
    found = {name: len(each) for name, each in learned.weights.items() if name not in learned.frozen}
    assert {name: 3 if "query" in name else 2 if "intermediate" in name else 1 for name in found} == found
    assert {1, 2, 3} == set(found.values())
    again = {**recipe_of(classifiers, "expert_merging"), "coefficients": str(tmp_path / "out" / FILE)}
    del again["calibration"]
    merge(again, tmp_path / "again")
    one, two = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_language_model_with_choices(family: Any, tmp_path: Path) -> None:
    made = family("qwen3", experts=2, dtype="bfloat16")
    rows = [
        {"prompt": f"{a} or {b}? ", "choices": [a, b, "neither of them"][: 2 + number % 2], "label": 0}
        for number, (a, b) in enumerate(zip(WORDS, reversed(WORDS), strict=True))
    ]
    recipe = {
        "merge_method": "adamerging",
        "base_model": str(made.base),
        "models": [{"model": str(expert)} for expert in made.experts],
        "calibration": {"data": str(write_rows(tmp_path / "rows.jsonl", rows))},
        "parameters": {"steps": 6, "learning_rate": 0.1, "rows": 6},
    }
    merge(recipe, tmp_path / "out")
    learned = learned_of(tmp_path / "out")
    assert learned.losses[-1] < learned.losses[0]
    assert not learned.warnings
    lengthy = {"prompt": "sun? ", "choices": ["sun", "sun " * 40], "label": 0}
    more = str(write_rows(tmp_path / "more.jsonl", [*rows, lengthy]))
    packed = {"data": more, "layout": "packed", "max_tokens": 60}
    merge({**recipe, "calibration": packed, "parameters": {"steps": 1, "rows": 2}}, tmp_path / "packed")
    said = learned_of(tmp_path / "packed").warnings
    assert [one.partition(": ")[2] for one in said] == [
        "1 of 7 rows are left out: a choice does not fit in max_tokens, or is empty"
    ] * 2
    noted = read({**recipe, "calibration": packed}).warnings
    assert any("has no effect: adamerging shows a language model each choice" in one for one in noted)
    plain = write_rows(tmp_path / "plain.jsonl", [{"text": "a text without choices"}])
    with pytest.raises(RecipeError, match="none of 1 rows has two choices"):
        merge({**recipe, "calibration": {"data": str(plain)}}, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_model_without_a_head_is_refused(family: Any, tmp_path: Path) -> None:
    made = family("bert", experts=2, dtype="float32")
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a text"}])
    for method in ("adamerging", "expert_merging"):
        recipe = {
            "merge_method": method,
            "base_model": str(made.base),
            "models": [{"model": str(expert)} for expert in made.experts],
            "calibration": {"data": str(data)},
        }
        with pytest.raises(RecipeError, match="BertModel has no head"):
            merge(recipe, tmp_path / "out")


def headed(base: Path, folder: Path, tokenizer: Any, *, labels: int, seed: int, problem: str = "") -> Path:
    """The base, moved a little, with a new head of so many outputs."""
    from transformers import BertForSequenceClassification

    torch.manual_seed(seed)
    options = {"problem_type": problem} if problem else {}
    model = BertForSequenceClassification.from_pretrained(base, num_labels=labels, **options)
    for parameter in model.bert.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.classifier.weight.data *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_regressions_and_labels_of_which_many_hold(classifiers: Made, tokenizer: Any, tmp_path: Path) -> None:
    base = classifiers["base"]

    def recipe(names: tuple[str, str], method: str, **parameters: Any) -> dict[str, Any]:
        found = recipe_of(classifiers, method, steps=12, rows=16, learning_rate=0.05, **parameters)
        found["models"] = [{"model": str(tmp_path / name)} for name in names]
        data = str(classifiers["order.jsonl"])
        return {**found, "calibration": {"data": data, "max_examples": 16, "batch_size": 16}}

    for seed, name in enumerate(("one", "two")):
        headed(base, tmp_path / name, tokenizer, labels=1, seed=seed)
        many = "multi_label_classification"
        headed(base, tmp_path / f"many-{name}", tokenizer, labels=2 + seed, seed=seed, problem=many)
    for run in (plan_with_data, lambda asked: merge(asked, tmp_path / "out")):
        with pytest.raises(RecipeError) as caught:
            run(recipe(("one", "many-two"), "adamerging"))
        assert len(caught.value.faults) == 1
        assert f"{tmp_path / 'one'}: gives numbers" in str(caught.value)
    for names, method in (
        (("one", "two"), "expert_merging"),
        (("one", "two"), "learned_spectrum"),
        (("many-one", "many-two"), "adamerging"),
        (("many-one", "many-two"), "expert_merging"),
    ):
        options = {"hidden_layers": "none"} if method == "expert_merging" else {}
        learned = merge(recipe(names, method, **options), tmp_path / "out", overwrite=True).learned
        assert learned is not None
        assert 0 < learned.losses[-1] < learned.losses[0], (names, method)


@pytest.mark.parametrize("method", ["adamerging", "expert_merging_plus"])
def test_the_plan_of_experts_with_heads(classifiers: Made, method: str) -> None:
    _, outlook = plan_with_data(recipe_of(classifiers, method))
    assert outlook is not None
    assert outlook.work == "learning"
    assert all(seen.rows and seen.tokens and seen.tokens > seen.rows for seen in outlook.experts)
    assert (outlook.need.disk > 0) == (method == "expert_merging_plus")


def test_weights_no_coefficient_can_start_from(classifiers: Made) -> None:
    """One fault for all tensors, and before anything is learned."""
    with pytest.raises(RecipeError) as caught:
        plan_with_data(recipe_of(classifiers, "expert_merging", weight=1.0))
    assert len(caught.value.faults) == 1
    assert "more tensors: starts at (1.0, 1.0). Under a sigmoid" in str(caught.value)


def test_layers_that_are_aligned_are_named(classifiers: Made, tmp_path: Path) -> None:
    """A list of all layers is the word for it; a layer by itself is another loss than the last."""
    common = {"steps": 2, "logit_weight": 0.0}
    losses = {}
    for at, asked in enumerate(("all", "1, 2", "1", "last", 2)):
        merge(recipe_of(classifiers, "expert_merging", hidden_layers=asked, **common), tmp_path / str(at))
        losses[asked] = learned_of(tmp_path / str(at)).losses
    assert losses["all"] == losses["1, 2"]
    assert losses["last"] == losses[2]
    assert len({losses[asked] for asked in ("all", "1", "last")}) == 3
    for asked, said in (("1,9", "names layer 9, and the model has layers 1 to 2"), ("0", "names layer 0")):
        with pytest.raises(MixmergeError, match=f"hidden_layers: {said}"):
            plan_with_data(recipe_of(classifiers, "expert_merging", hidden_layers=asked))
    for wrong in ("first", "1,", "-1", -1):
        with pytest.raises(RecipeError, match=r"hidden_layers.* Known: all, last, none, '4,8,12'"):
            plan_with_data(recipe_of(classifiers, "expert_merging", hidden_layers=wrong))


def test_experts_that_cannot_be_told_apart(classifiers: Made, tmp_path: Path) -> None:
    recipe = recipe_of(classifiers, "adamerging", steps=2)
    recipe["models"][1]["model"] = str(tmp_path / "copy")
    recipe["calibration"] = {"data": str(classifiers["order.jsonl"])}
    (tmp_path / "copy").symlink_to(classifiers["order"])
    with pytest.raises(MethodError, match=r"copy: equals .*order in every tensor"):
        merge(recipe, tmp_path / "out")


def test_no_data(classifiers: Made, tmp_path: Path) -> None:
    recipe = recipe_of(classifiers, "adamerging")
    with pytest.raises(RecipeError, match="adamerging learns from data, and the recipe has none"):
        merge({key: value for key, value in recipe.items() if key != "calibration"}, tmp_path / "out")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(MixmergeError, match="no rows"):
        merge({**recipe, "calibration": {"data": str(tmp_path / "empty.jsonl")}}, tmp_path / "out")
    recipe["calibration"]["per_expert"].pop("count")
    with pytest.raises(RecipeError, match="count has no data"):
        merge(recipe, tmp_path / "out")


def test_values_that_are_not_finite(classifiers: Made, tmp_path: Path, clone: Callable[[Path], Path]) -> None:
    from safetensors.torch import load_file, save_file

    broken = clone(classifiers["count"])
    state = load_file(broken / "model.safetensors")
    state["bert.encoder.layer.0.output.dense.weight"][3, 4] = math.nan
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = recipe_of(classifiers, "adamerging", steps=2)
    recipe["models"][1]["model"] = str(broken)
    recipe["calibration"] = {"data": str(classifiers["order.jsonl"])}
    with pytest.raises((MethodError, CheckpointError), match=f"{broken}: holds values that are not finite"):
        merge(recipe, tmp_path / "out")


def test_coefficients_that_do_not_fit(classifiers: Made, tmp_path: Path) -> None:
    merge(recipe_of(classifiers, "adamerging", steps=1), tmp_path / "out")
    text = (tmp_path / "out" / FILE).read_text()
    replay = {
        key: value for key, value in recipe_of(classifiers, "task_arithmetic").items() if key != "calibration"
    }

    def fault(content: str, **changed: Any) -> str:
        (tmp_path / "edited.json").write_text(content)
        with pytest.raises(RecipeError) as caught:
            mixmerge.make_plan({**replay, "coefficients": str(tmp_path / "edited.json"), **changed})
        return str(caught.value)

    plain = json.loads(text)
    assert "is not JSON" in fault(text[:-40])
    assert "holds no coefficients" in fault("{}")
    assert "has coefficients of 2 experts, the recipe 1" in fault(text, models=replay["models"][:1])
    lacking = {**plain, "weights": dict(list(plain["weights"].items())[2:])}
    assert "has no coefficients for" in fault(json.dumps(lacking))
    assert "not a finite number" in fault(json.dumps({**plain, "weights": {"a": [[1.0, math.nan]]}}))
    assert "list of chunks with 2 numbers each" in fault(json.dumps({**plain, "weights": {"a": [[1.0]]}}))
    assert "whose deltas are not those of task_arithmetic" in fault(
        text.replace('"adamerging"', '"adamerging_plus"')
    )
    assert "cannot be read" in fault(text, coefficients=str(tmp_path / "none.json"))
    assert "ties takes no learned coefficients" in fault(text, merge_method="ties", parameters={"weight": 1})
    (tmp_path / "edited.json").write_text(text.replace(str(classifiers["order"]), "./other"))
    plan = mixmerge.make_plan({**replay, "coefficients": str(tmp_path / "edited.json")})
    assert any("learned for ./other" in warning for warning in plan.warnings)


def test_chunks_are_slices_of_the_row_major_tensor(
    classifiers: Made, tmp_path: Path, read_tensors: Callable[[Path], dict[str, torch.Tensor]]
) -> None:
    base, one, two = (trunk(read_tensors(classifiers[name])) for name in ("base", "order", "count"))
    name = "encoder.layer.1.intermediate.dense.weight"
    weights = dict.fromkeys(base, ((0.5, 0.25),)) | {name: ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))}
    edited = Coefficients("expert_merging_plus", ("order", "count"), weights, start=(0.1, 0.1))
    (tmp_path / "c.json").write_text(edited.to_json())
    recipe = {
        key: value for key, value in recipe_of(classifiers, "task_arithmetic").items() if key != "calibration"
    }
    merge({**recipe, "coefficients": str(tmp_path / "c.json")}, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")[name].flatten()
    edges = [0, 512, 1024, 1536]
    for start, stop, source in zip(edges[:-1], edges[1:], (base, one, two), strict=True):
        torch.testing.assert_close(merged[start:stop], source[name].flatten()[start:stop])


class _Killed(BaseException):
    """What a kill looks like from inside."""


def test_a_killed_merge_does_not_learn_again(
    classifiers: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(classifiers, "adamerging", steps=3)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))

    def killed(*_: Any, **__: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr("mixmerge.engine.merge._tensors", killed)
        with pytest.raises(_Killed):
            merge(tmp_path / "r.yaml", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def learns(*_: Any, **__: Any) -> None:
        raise AssertionError("learned again")

    with monkeypatch.context() as patch:
        patch.setattr(engine_learning, "learn_coefficients", learns)
        again = merge(tmp_path / "r.yaml", tmp_path / "out")
        assert again.learned == learned_of(tmp_path / "out")
        # other data, other coefficients: what was kept is not taken
        with monkeypatch.context() as inner:
            inner.setattr("mixmerge.engine.merge._tensors", killed)
            with pytest.raises((AssertionError, _Killed), match="learned again"):
                merge({**recipe, "seed": 6}, tmp_path / "other")
