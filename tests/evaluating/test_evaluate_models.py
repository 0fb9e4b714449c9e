"""Real tiny models on tasks: scores against what transformers says, rows that were used, heads, faults."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import mixmerge
from mixmerge.errors import MixmergeError
from mixmerge.evaluate import answers, load
from mixmerge.evaluate.leaks import read_made
from mixmerge.evaluate.task_file import read_tasks

Rows = list[dict[str, Any]]
PROMPTS = ["the quick", "brown fox", "jumps over", "the lazy dog", "1 + 2 =", "2 + 1 ="]


def _write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def experts(family: Callable[..., Any]) -> Any:
    return family("llama", dtype="float32")


@pytest.fixture(scope="module")
def known(experts: Any) -> list[list[str]]:
    """What each expert answers to the prompts: its own task."""
    return [answers(load(str(one)), PROMPTS, max_new_tokens=5) for one in experts.experts]


@pytest.fixture
def tasks(tmp_path: Path, known: list[list[str]]) -> dict[str, Any]:
    rows = [
        [
            {"prompt": prompt, "answer": answer.strip().partition("\n")[0]}
            for prompt, answer in zip(PROMPTS, said, strict=True)
        ]
        for said in known
    ]
    return {
        "tasks": [
            {
                "name": f"task{number}",
                "data": _write(tmp_path / f"{number}.jsonl", some),
                "metric": "exact",
                "expert": f"expert{number}",
                "max_new_tokens": 5,
            }
            for number, some in enumerate(rows)
        ]
    }


@pytest.fixture
def merged(experts: Any, tmp_path: Path) -> Path:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(one), "parameters": {"weight": 0.5}} for one in experts.experts],
    }
    mixmerge.merge(recipe, tmp_path / "merged")
    return tmp_path / "merged"


def test_own_experts_score_fully_and_a_merge_is_compared(experts: Any, merged: Path, tasks: Any) -> None:
    report = mixmerge.evaluate_models(
        {"half": merged},
        tasks=tasks,
        experts={one.name: one for one in experts.experts},
        base=experts.base,
        resamples=200,
    )
    assert [row.name for row in report.rows] == ["half", "expert0", "expert1", "base"]
    for number in range(2):
        row = report.row(f"expert{number}")
        assert row.scores[f"task{number}"].value == 1.0
        assert row.retained[f"task{number}"].value == 1.0
    half = report.row("half")
    assert half.method == "linear"
    assert half.worst is not None
    assert half.retained_average is not None
    assert half.storage == sum(path.stat().st_size for path in merged.glob("*.safetensors"))
    assert half.speed > 0
    said = answers(load(str(merged)), PROMPTS, max_new_tokens=5)
    assert half.answers["task0"].given == tuple(said)
    assert any("fewer than 30 rows" in one for one in report.warnings)


def test_choices_are_those_of_the_model(experts: Any, tmp_path: Path) -> None:
    import torch

    model, tokenizer = (part := load(str(experts.base))).model, part.tokenizer
    rows: Rows = []
    choices = ["fox", "lazy dog over", "1"]
    for prompt in PROMPTS:
        scores = []
        start = tokenizer(prompt)["input_ids"]
        for choice in choices:
            ids = tokenizer(f"{prompt} {choice}")["input_ids"]
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
            same = next((at for at, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), len(start))
            own = [float(logprobs[at - 1, ids[at]]) for at in range(same, len(ids))]
            scores.append(sum(own) / len(own))
        rows.append({"prompt": prompt, "choices": choices, "label": scores.index(max(scores))})
    right = {"name": "right", "data": _write(tmp_path / "right.jsonl", rows), "metric": "choice"}
    off = [{**row, "label": (row["label"] + 1) % 3} for row in rows]
    wrong = {"name": "wrong", "data": _write(tmp_path / "wrong.jsonl", off), "metric": "choice"}
    report = mixmerge.evaluate_models([experts.base], tasks={"tasks": [right, wrong]}, resamples=100)
    (row,) = report.rows
    assert (row.scores["right"].value, row.scores["wrong"].value) == (1.0, 0.0)


def test_programs_of_a_model_are_run(experts: Any, tmp_path: Path) -> None:
    # What a random model writes is no program; behind a comment anything is one.
    rows = [
        {"prompt": "x = 1 #", "answer": "assert x == 1"},
        {"prompt": "x = 1 #", "answer": "assert x == 2"},
    ]
    task = {
        "name": "code",
        "data": _write(tmp_path / "code.jsonl", rows),
        "metric": "pass@1",
        "program": "continue",
        "max_new_tokens": 1,
    }
    report = mixmerge.evaluate_models([experts.base], tasks={"tasks": [task]}, resamples=100)
    given = report.rows[0].answers["code"]
    assert given.scores.tolist() == [1.0, 0.0], given.given


def test_an_adapter_is_asked_on_its_base(zoo: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    name = sorted(path.name for path in (zoo / "adapters").iterdir())[0]
    task = {
        "name": "t",
        "data": _write(tmp_path / "t.jsonl", [{"prompt": "a", "answer": "b"}]),
        "metric": "f1",
    }
    model = f"{zoo / 'base'}+{zoo / 'adapters' / name}"
    report = mixmerge.evaluate_models([model], tasks={"tasks": [task]}, resamples=100)
    (row,) = report.rows
    assert row.name == name
    weights = [*(zoo / "base").glob("*.safetensors"), *(zoo / "adapters" / name).glob("*.safetensors")]
    assert row.storage == sum(path.stat().st_size for path in weights)


def _use(folder: Path, digests: Any, **section: Any) -> None:
    path = folder / "mixmerge_manifest.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, "calibration": {"rows": digests, **section}}))


def test_rows_that_a_merge_has_used_are_refused(merged: Path, tasks: Any) -> None:
    read = read_tasks(tasks)
    used = [row.digest for row in read[0].rows[:2]]
    _use(merged, {"expert0": used})
    with pytest.raises(MixmergeError) as caught:
        mixmerge.evaluate_models([merged], tasks=tasks)
    # Both tasks ask the same prompts.
    assert [str(fault).partition(". ")[0] for fault in caught.value.faults] == [
        f"merged: was made with 2 of the 6 rows of task task{number}" for number in range(2)
    ]
    report = mixmerge.evaluate_models([merged], tasks=tasks, transductive=True, resamples=100)
    assert report.rows[0].transductive == ("task0", "task1")
    assert any(
        "merged: transductive: its merge has used 2 of the 6 rows of task0" in one for one in report.warnings
    )
    _use(merged, used, transductive=True)
    assert read_made(merged).transductive
    report = mixmerge.evaluate_models([merged], tasks=tasks, resamples=100)
    assert report.rows[0].transductive == ("task0", "task1")
    _use(merged, ["0" * 64])
    assert mixmerge.evaluate_models([merged], tasks=tasks, resamples=100).rows[0].transductive == ()


def test_rows_that_an_input_of_a_merge_has_used_are_refused(
    experts: Any, merged: Path, tasks: Any, tmp_path: Path
) -> None:
    """A merge of a merge, and one of that, have seen what the first has seen."""
    used = [row.digest for row in read_tasks(tasks)[0].rows[:2]]
    _use(merged, used)
    inner = merged
    for name in ("again", "and-again"):
        weighted = [{"model": str(one), "parameters": {"weight": 1}} for one in (inner, experts.experts[0])]
        mixmerge.merge({"merge_method": "linear", "models": weighted}, tmp_path / name)
        inner = tmp_path / name
        assert read_made(inner).rows == set(used)
        with pytest.raises(MixmergeError, match="was made with 2 of the 6 rows of task task0"):
            mixmerge.evaluate_models([inner], tasks=tasks)
        assert "Rows of data with 2 digests went into" in (inner / "README.md").read_text()
    assert not read_made(inner).transductive


def test_a_prompt_that_was_used_is_known_among_choices(merged: Path, tmp_path: Path) -> None:
    from mixmerge.data.rows import Row

    rows: Rows = [{"prompt": prompt, "choices": ["a", "b"], "label": 0} for prompt in PROMPTS]
    task = {"name": "pick", "data": _write(tmp_path / "pick.jsonl", rows), "metric": "choice"}
    _use(merged, [Row(text=PROMPTS[0]).digest])
    with pytest.raises(MixmergeError, match=f"was made with 1 of the {len(PROMPTS)} rows of task pick"):
        mixmerge.evaluate_models([merged], tasks={"tasks": [task]})


def test_choices_that_were_used_are_known_by_their_prompt(experts: Any, tmp_path: Path, tasks: Any) -> None:
    """In all that names rows: the manifest, coefficients, and what a recipe was chosen by."""
    from mixmerge.searching.scoring import TaskScorer

    rows: Rows = [{"prompt": prompt, "choices": ["a b c", "d e"], "label": 0} for prompt in PROMPTS]
    data = _write(tmp_path / "pick.jsonl", rows)
    recipe = {
        "merge_method": "adamerging",
        "base_model": str(experts.base),
        "models": [{"model": str(one)} for one in experts.experts],
        "parameters": {"steps": 1, "rows": 2},
        "calibration": {"data": data, "max_examples": 2},
    }
    mixmerge.merge(recipe, tmp_path / "learned")
    again = {key: value for key, value in recipe.items() if key != "calibration"}
    again |= {"coefficients": str(tmp_path / "learned" / "mixmerge_coefficients.json"), "parameters": {}}
    mixmerge.merge(again, tmp_path / "again")
    for name in ("learned", "again"):
        with pytest.raises(MixmergeError, match=f"{name}: was made with 2 of the 6 rows of task task0"):
            mixmerge.evaluate_models([tmp_path / name], tasks=tasks)
    (pick,) = read_tasks({"tasks": [{"name": "pick", "data": data, "metric": "choice"}]})
    chosen = TaskScorer([pick], held_out=0.4).chosen_by
    assert chosen
    _use(tmp_path / "again", list(chosen))
    with pytest.raises(MixmergeError, match="was made with"):
        mixmerge.evaluate_models([tmp_path / "again"], tasks=tasks)
    with pytest.raises(MixmergeError, match="6 of its rows are rows of task task0"):
        mixmerge.evaluate_models(
            [experts.base], tasks={"tasks": tasks["tasks"][:1]}, recommend=True, calibration=data,
            experts=experts.experts, base=experts.base,
        )  # fmt: skip


def test_rows_of_an_adapter_are_refused(zoo: Path, tmp_path: Path) -> None:
    """A mixture that was exported as an adapter has seen what its gate was fitted on."""
    from mixmerge.data.rows import Row

    adapter = tmp_path / "adapter"
    name = sorted(path.name for path in (zoo / "adapters").iterdir())[0]
    shutil.copytree(zoo / "adapters" / name, adapter)
    rows: Rows = [{"prompt": prompt, "answer": "x"} for prompt in PROMPTS]
    task = {"name": "t", "data": _write(tmp_path / "t.jsonl", rows), "metric": "exact"}
    _use(adapter, [Row(text=PROMPTS[0]).digest])
    with pytest.raises(MixmergeError, match="was made with 1 of the 6 rows of task t"):
        mixmerge.evaluate_models([f"{zoo / 'base'}+{adapter}"], tasks={"tasks": [task]})
    models = [{"model": f"{zoo / 'base'}+{adapter}"}, {"model": str(zoo / "base")}]
    mixmerge.merge(
        {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}}, tmp_path / "merged"
    )
    assert read_made(tmp_path / "merged").rows == {Row(text=PROMPTS[0]).digest}


@pytest.mark.parametrize("content", ["no json", "[]", '{"calibration": 3, "recipe": []}'])
def test_a_damaged_manifest_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / "mixmerge_manifest.json").write_text(content)
    assert read_made(tmp_path).rows == frozenset()


def test_faults(experts: Any, tasks: Any, tmp_path: Path) -> None:
    def said(**options: Any) -> str:
        with pytest.raises(MixmergeError) as caught:
            mixmerge.evaluate_models(**{"models": [experts.base], "tasks": tasks, **options})
        return str(caught.value)

    assert "models: none is given" in said(models=[])
    assert "cannot be looked up" in said(models=["x" * 5000])
    assert "model: " in said(models=[tmp_path / "none"])
    (tmp_path / "half").mkdir()
    assert "half has no config.json" in said(models=[experts.base, tmp_path / "half"])
    assert "limit: is 0" in said(limit=0)
    assert "resamples: is 5" in said(resamples=5)
    assert "its expert 'expert0' is not among the experts" in said(experts={"expert_0": experts.experts[0]})
    assert "tasks: none is given" in said(tasks=())
    assert "two are called 'base'" in said(models={"base": experts.base}, base=experts.base)
    assert "--recommend: needs the experts" in said(recommend=True)
    long = [{"id": "long", "prompt": "word " * 200, "answer": "x"}]
    task = {"name": "t", "data": _write(tmp_path / "long.jsonl", long), "metric": "exact"}
    assert "t, row long" in said(tasks={"tasks": [task]})


def test_advice_from_real_weights(experts: Any, merged: Path, tasks: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "tasks": tasks,
        "experts": {one.name: one for one in experts.experts},
        "base": experts.base,
        "resamples": 100,
        "recommend": True,
    }
    calibration = _write(tmp_path / "calibration.jsonl", [{"text": "other words"}])
    assert mixmerge.evaluate_models([merged], **options, calibration=calibration).advice
    leaked = _write(tmp_path / "leaked.jsonl", [{"text": PROMPTS[0]}])
    with pytest.raises(MixmergeError, match="1 of its rows are rows of task task0"):
        mixmerge.evaluate_models([merged], **options, calibration=leaked)


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Two classifiers of other classes on trunks that differ, and what a merge of them would be."""
    import torch
    from safetensors.torch import save_file
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    root = tmp_path_factory.mktemp("classifiers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    for seed, (name, classes) in enumerate({"mood": 2, "topic": 3}.items()):
        torch.manual_seed(seed)
        config = BertConfig(vocab_size=280, max_position_embeddings=64, num_labels=classes, **sizes)
        model = BertForSequenceClassification(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.1 * torch.randn_like(weight)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    trunks = [BertForSequenceClassification.from_pretrained(root / name).bert for name in ("mood", "topic")]
    mean = {
        name: (value + trunks[1].state_dict()[name]) / 2 if value.is_floating_point() else value
        for name, value in trunks[0].state_dict().items()
    }
    merged = BertModel(trunks[0].config)
    merged.load_state_dict(mean)
    merged.save_pretrained(root / "merged")
    tokenizer.save_pretrained(root / "merged")
    for name in ("mood", "topic"):
        kept = root / "merged" / "heads" / name
        kept.mkdir(parents=True)
        whole = BertForSequenceClassification.from_pretrained(root / name).state_dict()
        head = {key: value for key, value in whole.items() if key.startswith("classifier.")}
        save_file(head, kept / "head.safetensors", metadata={"format": "pt"})
        shutil.copy(root / name / "config.json", kept / "config.json")
    return root


def _classes(trunk: Path, head: Path, tokenizer: Any, texts: list[str]) -> list[int]:
    """By hand: the trunk's tensors in the head's model, row by row."""
    import torch
    from transformers import AutoModel, BertForSequenceClassification

    model = BertForSequenceClassification.from_pretrained(head)
    model.bert.load_state_dict(AutoModel.from_pretrained(trunk).state_dict())
    with torch.inference_mode():
        return [int(model.eval()(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in texts]


def test_the_head_comes_with_the_request(classifiers: Path, tokenizer: Any, tmp_path: Path) -> None:
    texts = [f"{first} {second}" for first in PROMPTS for second in ("a", "bcd", "the the")]
    label = {
        (trunk, head): _classes(classifiers / trunk, classifiers / head, tokenizer, texts)
        for trunk in ("merged", "mood", "topic")
        for head in ("mood", "topic")
    }
    tasks = {
        "tasks": [
            {
                "name": f"{trunk}-{head}",
                "data": _write(
                    tmp_path / f"{trunk}-{head}.jsonl",
                    [{"text": text, "label": at} for text, at in zip(texts, label[trunk, head], strict=True)],
                ),
                "metric": "accuracy",
                "head": head,
                "expert": head,
            }
            for trunk, head in label
        ]
    }
    experts = {name: classifiers / name for name in ("mood", "topic")}
    report = mixmerge.evaluate_models(
        {"merge": classifiers / "merged"}, tasks=tasks, experts=experts, resamples=100
    )
    for row in report.rows:
        trunk = "merged" if row.name == "merge" else row.name
        for head in ("mood", "topic"):
            assert row.scores[f"{trunk}-{head}"].value == 1.0, (row.name, head)
    assert min(report.row("merge").scores[f"mood-{head}"].value for head in ("mood", "topic")) < 1.0
    # Without its own heads a trunk gets the experts'.
    bare = shutil.copytree(classifiers / "merged", tmp_path / "bare", ignore=shutil.ignore_patterns("heads"))
    again = mixmerge.evaluate_models({"merge": bare}, tasks=tasks, experts=experts, resamples=100)
    for name in report.row("merge").scores:
        assert again.row("merge").scores[name].value == report.row("merge").scores[name].value


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_classifiers_have_the_type_that_is_asked_for(
    classifiers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any
) -> None:
    from mixmerge.experts import loading

    seen = []
    known = loading.load_expert

    def load(*given: Any, **more: Any) -> Any:
        found = known(*given, **more)
        seen.append(str(found.model.dtype))
        return found

    monkeypatch.setattr(loading, "load_expert", load)
    data = _write(tmp_path / "mood.jsonl", [{"text": "the", "label": 0}])
    mood = {"name": "mood", "data": data, "metric": "accuracy", "head": "mood"}
    mixmerge.evaluate_models(
        {"topic": classifiers / "topic"},
        tasks={"tasks": [mood]},
        experts={"mood": classifiers / "mood"},
        dtype=dtype,
        resamples=100,
    )
    assert set(seen) == {"torch.bfloat16" if dtype == "bfloat16" else "torch.float32"}


def test_a_model_without_numbers_is_wrong(experts: Any, classifiers: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tasks = [
        {"name": "pick", "metric": "choice", "data": "pick.jsonl"},
        {"name": "mood", "metric": "accuracy", "head": "mood", "data": "mood.jsonl"},
    ]
    rows = [{"prompt": "a", "choices": ["b", "c"], "label": 0}], [{"text": "a", "label": 0}]
    for task, some in zip(tasks, rows, strict=True):
        task["data"] = _write(tmp_path / task["data"], some)
    for task, source in zip(tasks, (experts.base, classifiers / "merged"), strict=True):
        broken = shutil.copytree(source, tmp_path / task["name"])
        path = broken / "model.safetensors"
        values = {name: value * float("nan") for name, value in load_file(path).items()}
        save_file(values, path, metadata={"format": "pt"})
        report = mixmerge.evaluate_models([broken], tasks={"tasks": [task]}, resamples=100)
        assert report.rows[0].average.value == 0.0
        assert any("1 of 1 rows count as wrong" in note for note in report.notes)


def test_what_is_missing_is_told_before_any_model_answers(
    experts: Any, merged: Path, tasks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    done: list[str] = []
    damaged = shutil.copytree(experts.experts[1], tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    def said(**options: Any) -> str:
        with pytest.raises(MixmergeError) as caught:
            mixmerge.evaluate_models([merged], **options, progress=lambda name, *_: done.append(name))
        return str(caught.value)

    asked = {"expert0": experts.experts[0], "expert1": damaged}
    assert "damaged" in said(tasks=tasks, experts=asked, base=experts.base, recommend=True)
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    data = _write(tmp_path / "r.jsonl", [{"prompt": "a", "answer": "b"}])
    rouge = {"tasks": [{"name": "r", "data": data, "metric": "rouge1"}]}
    assert "takes the package rouge-score" in said(tasks={"tasks": [*tasks["tasks"], *rouge["tasks"]]})
    assert done == []


def test_everything_that_is_wrong_is_told_at_once(experts: Any, classifiers: Path, tmp_path: Path) -> None:
    rows = {
        "bad": [{"txt": "a"}],
        "c": [{"text": "a", "label": 2}],
        "q": [{"prompt": "a", "choices": ["b", "c"], "label": 0}],
    }
    data = {name: _write(tmp_path / f"{name}.jsonl", some) for name, some in rows.items()}

    def said(tasks: Any, model: Path, **options: Any) -> list[str]:
        with pytest.raises(MixmergeError) as caught:
            mixmerge.evaluate_models({"m": model, "n": tmp_path / "nobody"}, tasks=tasks, **options)
        return [str(fault) for fault in caught.value.faults]

    bad = {"tasks": [{"name": "bad", "data": data["bad"], "metric": "choice"}]}
    missing = {"experts": {"x": str(tmp_path / "gone")}, "base": experts.base}
    found = said(bad, experts.base, **missing, recommend=True, calibration=tmp_path / "c.json", resamples=5)
    for fault, word in zip(found, ("task bad", "nobody", "gone", "c.json", "resamples: is 5"), strict=True):
        assert word in fault
    heads = [
        {"name": name, "data": data["c"], "metric": "accuracy", "head": name} for name in ("mood", "modd")
    ]
    own = {"name": "q", "data": data["q"], "metric": "choice", "expert": "x"}
    found = said({"tasks": [*heads, own]}, classifiers / "merged")
    words = ("nobody", "label 2 is none of the 2 classes", "no head 'modd'")
    for fault, word in zip(found, words, strict=True):
        assert word in fault


def test_faults_of_heads(classifiers: Path, experts: Any, tmp_path: Path) -> None:
    data = _write(tmp_path / "c.jsonl", [{"text": "a", "label": 2}])

    def said(model: Path, head: str) -> str:
        task = {"name": "c", "data": data, "metric": "accuracy", "head": head}
        with pytest.raises(MixmergeError) as caught:
            mixmerge.evaluate_models({"m": model}, tasks={"tasks": [task]}, resamples=100)
        return str(caught.value)

    assert "m has no head 'modd'. Did you mean 'mood'?" in said(classifiers / "merged", "modd")
    assert "label 2 is none of the 2 classes of the head 'mood'. 0 to 1" in said(
        classifiers / "merged", "mood"
    )
    assert "It keeps no heads, and no experts are given" in said(experts.base, "mood")


LOCAL = {
    "task": "local_words",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.slow
def test_lm_eval_runs_a_local_task(experts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'mixmerge[lm-eval]'"
    )
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    # No space is put between by us, and one is by the harness: choices of one letter are scored alike.
    rows = [
        {"prompt": prompt, "choices": ["a", "b", "c"], "label": at % 3} for at, prompt in enumerate(PROMPTS)
    ]
    data = _write(tmp_path / "words.jsonl", rows)
    folder = tmp_path / "own"
    folder.mkdir()
    task = {**LOCAL, "dataset_kwargs": {"data_files": {"test": data}}}
    (folder / "words.yaml").write_text(yaml.safe_dump(task))
    ours = {"name": "words", "data": data, "metric": "choice", "normalise": "none"}
    made: list[str] = []
    huggingface = importlib.import_module("lm_eval.models.huggingface")

    class Told(huggingface.HFLM):  # type: ignore[misc, name-defined]
        def __init__(self, *given: Any, dtype: str, **more: Any) -> None:
            made.append(dtype)
            super().__init__(*given, dtype=dtype, **more)

    monkeypatch.setattr(huggingface, "HFLM", Told)
    report = mixmerge.evaluate_models(
        {"m": experts.base},
        tasks={"tasks": [ours]},
        lm_eval=["local_words"],
        lm_eval_path=folder,
        resamples=100,
        dtype="float32",
    )
    assert made == ["float32"]
    theirs = report.harness["m"]["local_words"]["acc,none"]
    assert theirs == pytest.approx(report.rows[0].scores["words"].value), "the same rows, the same model"
    gone = _write(tmp_path / "gone.jsonl", [{"txt": "a"}])
    bad = {"tasks": [{"name": "bad", "data": gone, "metric": "choice"}]}
    with pytest.raises(MixmergeError) as caught:
        mixmerge.evaluate_models(
            {"m": tmp_path / "no"}, tasks=bad, lm_eval=["local_word"], lm_eval_path=folder
        )
    assert [one.where.partition(":")[0] for one in caught.value.faults] == ["--lm-eval", "task bad", "model"]

    # What the harness cannot do is found out after the answers to our questions, which are kept.
    task["dataset_kwargs"] = {"data_files": {"test": str(tmp_path / "nothing.jsonl")}}
    (folder / "words.yaml").write_text(yaml.safe_dump(task))
    both: dict[str, Any] = {"lm_eval": ["local_words"], "lm_eval_path": folder, "resamples": 100}
    half = mixmerge.evaluate_models({"m": experts.base}, tasks={"tasks": [ours]}, **both)
    assert half.rows[0].scores["words"] == report.rows[0].scores["words"]
    assert half.harness == {}
    assert any(one.startswith("--lm-eval: m: the harness failed: ") for one in half.warnings)
    with pytest.raises(MixmergeError, match="the harness failed"):
        mixmerge.evaluate_models({"m": experts.base}, tasks=(), **both)
    long = _write(tmp_path / "long.jsonl", [{**rows[0], "prompt": "many words " * 2000}])
    with pytest.raises(MixmergeError, match="long, row 1"):
        mixmerge.evaluate_models(
            {"m": experts.base}, tasks={"tasks": [{**ours, "name": "long", "data": long}]}, **both
        )
