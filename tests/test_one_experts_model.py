"""Merges that make one expert's model, of classifiers whose heads differ: the folder is a classifier with its head."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import mixmerge
from mixmerge.cli import app
from mixmerge.errors import RecipeError
from mixmerge.experts.loading import heads_of, load_expert, load_with_head
from mixmerge.plan import make_plan
from mixmerge.plan.report import as_json

State = dict[str, torch.Tensor]
CLASSES = {"two": 2, "three": 3, "five": 5}
ONE = {"doge_ta": {"part": 1, "steps": 3}, "emr": {"task": 1}, "tall": {"task": 1}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, bert: Any) -> Path:
    """A trunk, a language model of it, classifiers of 2, 3 and 5 classes, and rows of text."""
    root = tmp_path_factory.mktemp("one")
    bert(root / "base", "BertModel", seed=0)
    bert(root / "masked", "BertForMaskedLM", seed=1)
    for seed, (name, count) in enumerate(CLASSES.items(), 2):
        names = {number: f"{name}-{number}" for number in range(count)}
        more: dict[str, Any] = {"problem_type": "multi_label_classification"} if name == "three" else {}
        bert(
            root / name, "BertForSequenceClassification", seed=seed, num_labels=count,
            id2label=names, label2id={label: at for at, label in names.items()}, **more,
        )  # fmt: skip
    for name, text in {"rows": "some text", "asked": "another one"}.items():
        rows = [{"text": f"{text} {number}", "label": number % 2} for number in range(8)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def recipe(root: Path, method: str, parameters: dict[str, Any], *, base: str = "base") -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": str(root / base),
        "models": [{"model": str(root / name)} for name in CLASSES],
        "parameters": parameters,
        "dtype": "float32",
    }


def logits(
    model: Any, folder: Path, texts: Sequence[str] = ("some text", "and some more of it")
) -> torch.Tensor:
    from transformers import AutoTokenizer

    given = AutoTokenizer.from_pretrained(folder)(list(texts), return_tensors="pt", padding=True)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(given["input_ids"], given["attention_mask"]).logits
    return found


@pytest.mark.parametrize("base", ["base", "masked"])
@pytest.mark.parametrize("method", list(ONE))
def test_the_folder_is_a_classifier_with_that_experts_head(
    made: Path, tmp_path: Path, method: str, base: str, read_tensors: Callable[[Path], State]
) -> None:
    """By hand: the trunk merged in memory, and everything else of the model the expert's own."""
    from transformers import AutoModelForSequenceClassification

    written = recipe(made, method, ONE[method], base=base)
    mixmerge.merge(written, tmp_path / "out")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert found.config.num_labels == 3
    assert found.config.id2label == {number: f"three-{number}" for number in range(3)}
    assert found.config.problem_type == "multi_label_classification"
    own = load_expert(made / "three").model
    trunks = [
        {name.removeprefix("bert."): value for name, value in read_tensors(made / one).items()}
        for one in (base, *CLASSES)
    ]
    shared = [name for name in trunks[0] if all(name in trunk for trunk in trunks)]
    start, *experts = ({name: trunk[name] for name in shared} for trunk in trunks)
    merged = mixmerge.merge_state_dicts(method, experts, base=start, parameters=ONE[method])
    assert any(not torch.equal(merged[name], start[name]) for name in shared)
    own.bert.load_state_dict(merged, strict=False)
    assert ("pooler.dense.weight" in merged) is (base == "base")
    assert torch.allclose(logits(found, tmp_path / "out"), logits(own, tmp_path / "out"), atol=1e-6)
    assert not torch.allclose(
        logits(own, made / "three"), logits(load_expert(made / "three").model, made / "three")
    )
    assert heads_of(tmp_path / "out") == ("five", "three", "two")
    assert load_with_head(tmp_path / "out", "five").model.config.num_labels == 5


def test_every_tensor_is_accounted_for_and_said(made: Path, tmp_path: Path) -> None:
    given = recipe(made, "doge_ta", ONE["doge_ta"], base="masked")
    plan = make_plan(given)
    gone = [(drop.model, drop.name) for drop in plan.dropped]
    kept = sum(len(task.sources) + (task.base is not None) for task in plan.tasks)
    assert kept + len(set(gone)) == sum(len(model.tensors) for model in plan.models)
    copied = {task.target.name for task in plan.tasks if task.copied}
    assert copied == {
        f"{one}.{kind}" for one in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")
    }
    said = as_json(plan, threads=1)
    assert said["config_and_head_from"] == str(made / "three")
    assert said["tokenizer_from"] == str(made / "masked")
    (tmp_path / "r.yaml").write_text(json.dumps(given))
    shown = CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml")])
    assert "config and head" in shown.stdout, shown.stderr
    mixmerge.merge(given, tmp_path / "out")
    assert f"Config and head are those of `{made / 'three'}`" in (tmp_path / "out" / "README.md").read_text()
    assert make_plan(recipe(made, "doge_ta", {"part": 0, "steps": 3}, base="masked")).hash != plan.hash


def test_a_head_of_an_adapter_in_another_dtype(
    made: Path, tmp_path: Path, read_tensors: Callable[[Path], State]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    with torch.random.fork_rng():
        torch.manual_seed(9)
        whole = BertForSequenceClassification.from_pretrained(made / "three")
        options = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        adapted = get_peft_model(whole, options)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        adapted.save_pretrained(tmp_path / "adapter")
    written = recipe(made, "emr", {"task": 1})
    written["models"][1] = {"model": f"{made / 'three'}+{tmp_path / 'adapter'}"}
    mixmerge.merge({**written, "dtype": "float32", "out_dtype": "bfloat16"}, tmp_path / "out")
    wanted = load_expert(made / "three", adapter=tmp_path / "adapter").model.state_dict()
    found = read_tensors(tmp_path / "out")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(found[name], wanted[name].bfloat16())
        assert not torch.equal(found[name], read_tensors(made / "three")[name].bfloat16())
    assert {value.dtype for value in found.values()} == {torch.bfloat16}


def test_no_owner_without_one_expert_or_where_heads_are_alike(
    made: Path, tmp_path: Path, bert: Any, read_tensors: Callable[[Path], State]
) -> None:
    assert make_plan(recipe(made, "doge_ta", {"steps": 3})).owner is None
    assert make_plan(recipe(made, "emr", {"task": "all"})).owner is None
    for seed, name in enumerate(("base", *CLASSES), 10):
        bert(tmp_path / name, "BertForSequenceClassification", seed=seed)
    alike = recipe(tmp_path, "doge_ta", {"part": 1, "steps": 3})
    plan = make_plan(alike)
    assert plan.owner is None
    assert not any(task.copied for task in plan.tasks)
    mixmerge.merge(alike, tmp_path / "out")
    base, *experts = (read_tensors(tmp_path / name) for name in ("base", *CLASSES))
    expected = mixmerge.merge_state_dicts("doge_ta", experts, base=base, parameters={"part": 1, "steps": 3})
    assert torch.equal(read_tensors(tmp_path / "out")["classifier.weight"], expected["classifier.weight"])
    with pytest.raises(RecipeError, match=r"parameters.part.*is 3, and experts have positions 0 to 2"):
        make_plan(recipe(made, "doge_ta", {"part": 3}))


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.stdout, result.stderr, result.exception)
    return result


@pytest.mark.parametrize("scaled", [False, True])
def test_doge_am_of_classifiers_is_two_steps(
    made: Path, tmp_path: Path, scaled: bool, read_tensors: Callable[[Path], State]
) -> None:
    """By the CLI: a part of each expert, then coefficients learned over the parts; 1.0 of scaled ones is DOGE-TA."""
    places = [tmp_path / f"part{at}" for at in range(3)]
    for at, place in enumerate(places):
        (tmp_path / "part.yaml").write_text(
            json.dumps(recipe(made, "doge_ta", {"part": at, "scaled": scaled, "steps": 3}))
        )
        run("merge", tmp_path / "part.yaml", place)
    second = recipe(made, "adamerging", {"weight": 1.0 if scaled else 0.3, "steps": 2, "rows": 4})
    second["models"] = [{"model": str(place)} for place in places]
    second["calibration"] = {"data": str(made / "rows.jsonl")}
    (tmp_path / "am.yaml").write_text(json.dumps(second))
    run("merge", tmp_path / "am.yaml", tmp_path / "out")
    assert heads_of(tmp_path / "out") == ("part0", "part1", "part2")
    own = read_tensors(made / "three")
    for name, value in load_with_head(tmp_path / "out", "part1").model.state_dict().items():
        if name.startswith("classifier"):
            assert torch.equal(value, own[name])
    learned = json.loads((tmp_path / "out" / "mixmerge_coefficients.json").read_text())["weights"]
    start = second["parameters"]["weight"]
    assert any(value != start for chunks in learned.values() for row in chunks for value in row)
    shown = run(
        *(
            "eval",
            tmp_path / "out",
            "--task",
            made / "asked.jsonl",
            "--metric",
            "accuracy",
            "--head",
            "part1",
        ),
        *("--experts", f"part1={places[1]}", "--resamples", 100, "--json"),
    )
    (score,) = (
        row["scores"]["asked"]["value"] for row in json.loads(shown.stdout)["rows"] if row["name"] == "part1"
    )
    rows = [json.loads(line) for line in (made / "asked.jsonl").read_text().splitlines()]
    picks = logits(load_expert(places[1]).model, places[1], [row["text"] for row in rows]).argmax(1)
    assert score == sum(pick == row["label"] for pick, row in zip(picks.tolist(), rows, strict=True)) / 8
    if not scaled:
        return
    mixmerge.merge(recipe(made, "doge_ta", {"steps": 3}), tmp_path / "ta")
    still = {**second, "parameters": {**second["parameters"], "learning_rate": 0.0}}
    mixmerge.merge(still, tmp_path / "still")
    plain = {key: value for key, value in second.items() if key != "calibration"}
    mixmerge.merge(
        {**plain, "merge_method": "task_arithmetic", "parameters": {"weight": 1.0}}, tmp_path / "plain"
    )
    whole = read_tensors(tmp_path / "ta")
    for folder in ("still", "plain"):
        found = read_tensors(tmp_path / folder)
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)
