"""The zoo: its questions, its models on disk, its cache and its commands; a slow test of what it is good at."""

from __future__ import annotations

import filecmp
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from mixmerge import merge
from mixmerge.cli import app
from mixmerge.errors import CheckpointError, MixmergeError, OutputError
from mixmerge.evaluate import Question
from mixmerge.zoo import TASKS, Spec, Zoo, build, built_scores, code, copy_to, find, score_models
from mixmerge.zoo.spec import cache_folder

ROOT = Path(__file__).resolve().parent.parent
TINY = Spec(tasks=("reverse", "sort"), effort=0.01)


@pytest.fixture(scope="module")
def tiny(built: Callable[[Spec], Zoo]) -> Zoo:
    """Two experts that have learned next to nothing, in some seconds."""
    return built(TINY)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    def call(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(app, ["zoo", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return call


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


# --- questions


def sorted_right(prompt: str, answer: str) -> bool:
    _, direction, digits, _ = prompt.split()
    return answer == "".join(sorted(digits, reverse=direction == "down"))


def kept_right(prompt: str, answer: str) -> bool:
    _, side, limit, _, digits, _ = prompt.split()
    return answer == "".join(
        digit for digit in digits if (digit > limit if side == "over" else digit < limit)
    )


def decrypted_right(prompt: str, answer: str) -> bool:
    moved = (chr((ord(letter) - ord("A") + 3) % 26 + ord("A")) for letter in answer)
    return prompt.split()[1] == "".join(moved)


def closed_right(prompt: str, answer: str) -> bool:
    line = prompt.removeprefix("close ").removesuffix(" -> ") + answer
    pairs = (("(", ")"), ("[", "]"), ("{", "}"))
    return all(line.count(left) == line.count(right) for left, right in pairs) and answer[0] in ")]}"


RIGHT = {
    "reverse": lambda prompt, answer: answer == prompt.split()[1][::-1],
    "decrypt": decrypted_right,
    "sort": sorted_right,
    "keep": kept_right,
    "close": closed_right,
}


@pytest.mark.parametrize("name", TASKS)
def test_questions(name: str) -> None:
    train, held_out = TASKS[name].split(3, 400, 60)
    assert (len(train), len(held_out)) == (400, 60)
    prompts = {question.prompt for question in train}
    assert len(prompts) == 400, "a training question comes twice"
    assert not prompts & {question.prompt for question in held_out}
    for question in (*train, *held_out):
        assert RIGHT[name](question.prompt, question.answer), question
    assert (train, held_out) == TASKS[name].split(3, 400, 60)
    assert not set(train) & set(TASKS[name].split(4, 40, 20)[0]) or name in ("decrypt", "close")
    careless = [TASKS[name].careless(question) == question.answer for question in held_out]
    assert sum(careless) < 0.5 * len(careless), "a careless answer should be wrong"


def test_a_small_source_is_shared_out() -> None:
    """The cipher's text has about a thousand words: the split gives what there is, and ends."""
    train, held_out = TASKS["decrypt"].split(0, 12_000, 250)
    assert len(held_out) == 250
    assert 500 < len(train) < 2000


def test_closing_is_learned_and_asked_on_different_modules() -> None:
    apart: dict[bool, set[str]] = {False: set(), True: set()}
    for line, held_out in code.lines(0):
        apart[held_out].add(line)
    train, held_out_questions = code.close(0, 10_000, 250)

    def lines(questions: list[Question]) -> set[str]:
        return {question.prompt[len("close ") : -len(" -> ")] + question.answer for question in questions}

    assert lines(train) <= apart[False]
    assert lines(held_out_questions) <= apart[True] - apart[False]
    assert not set(code.text(0, 5000)) & lines(held_out_questions)
    endings = [question.answer for question in held_out_questions]
    assert max(endings.count(ending) for ending in endings) <= len(endings) / 5


# --- learning


def test_batches_learn_answers_only() -> None:
    from mixmerge.zoo.families import FAMILIES
    from mixmerge.zoo.training import Pool, batches

    questions = [Question("sort up 31 -> ", "13"), Question("reverse ABC -> ", "CBA")]
    texts = [text for question in questions for text in (question.prompt, question.answer)]
    tokenizer = FAMILIES["llama"].tokenizer(texts * 3)
    tokens, labels = next(batches([Pool(questions, 1.0)], tokenizer, seed=0))
    for row, learned in zip(tokens.tolist(), labels.tolist(), strict=True):
        answer = [label for label in learned if label >= 0]
        assert answer[-1] == tokenizer.eos_token_id
        text = tokenizer.decode(row, skip_special_tokens=True)
        question = questions[text.startswith("reverse")]
        assert text == question.prompt + question.answer
        assert tokenizer.decode(answer, skip_special_tokens=True) == question.answer
        assert [token for token, label in zip(row, learned, strict=True) if label >= 0] == answer
    tokens, labels = next(batches([Pool([Question("", "x = 1")], 1.0)], tokenizer, seed=0))
    assert labels[0].tolist()[1:] == tokens[0].tolist()[1:]
    assert labels[0, 0] == -100


@pytest.mark.parametrize("variant", ["llama", "neox"])
def test_tokenizers_keep_payloads_apart(variant: str) -> None:
    from mixmerge.zoo.families import FAMILIES

    texts = [f"reverse {''.join(random.Random(n).choices('ABCDEF', k=5))} -> " for n in range(50)]
    texts += ["self.value = [1, 2]", "0123456789"] * 20
    tokenizer = FAMILIES[variant].tokenizer(texts)
    pieces = tokenizer.tokenize("reverse ABBA -> ")
    assert [piece for piece in pieces if set(piece) & set("AB")] == ["A", "B", "B", "A"]
    assert len(pieces) == 6
    ids = tokenizer("sort up 201 -> ")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    if variant == "llama":
        assert (
            tokenizer.decode(tokenizer("naïve: 5 €")["input_ids"], skip_special_tokens=True) == "naïve: 5 €"
        )


def test_muon_makes_updates_orthogonal() -> None:
    import torch

    from mixmerge.zoo.training import Muon

    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 16), (16, 24), (16, 16)):
        matrix = torch.nn.Parameter(torch.zeros(shape))
        matrix.grad = torch.randn(shape, generator=generator)
        gradient = matrix.grad.clone()
        Muon([matrix]).step(rate=1.0)
        values = torch.linalg.svdvals(matrix.detach()) / max(1.0, shape[0] / shape[1]) ** 0.5
        assert 0.3 < values.min() <= values.max() < 1.3
        assert (matrix.detach() * gradient).sum() < 0, "against the gradient"
        assert matrix.grad is None


# --- on disk


def test_every_model_loads(tiny: Zoo, assert_loads: Callable[[Path], Any]) -> None:
    for folder in (tiny.base, *map(tiny.expert, tiny.tasks)):
        model = assert_loads(folder)
        assert 150_000 < model.num_parameters() < 300_000
        assert model.config.model_type == "llama"


def test_the_other_variant_shares_nothing_but_the_tasks(
    tiny: Zoo,
    built: Callable[[Spec], Zoo],
    assert_loads: Callable[[Path], Any],
    read_tensors: Callable[[Path], Any],
    tmp_path: Path,
) -> None:
    other = built(Spec(variant="neox", tasks=("reverse", "sort"), effort=0.01))
    model = assert_loads(other.expert("sort"))
    assert model.config.model_type == "gpt_neox"
    assert model.config.vocab_size != json.loads((tiny.base / "config.json").read_text())["vocab_size"]
    assert other.questions("sort") == tiny.questions("sort")
    assert_twin(other, "sort", tmp_path / "twin", read_tensors)


def assert_twin(zoo: Zoo, task: str, folder: Path, read_tensors: Callable[[Path], Any]) -> None:
    """The adapter, as PEFT applies it, is the best approximation of the expert's delta at its rank."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from mixmerge.zoo.adapters import RANK

    base, expert = read_tensors(zoo.base), read_tensors(zoo.expert(task))
    model = AutoModelForCausalLM.from_pretrained(zoo.base)
    PeftModel.from_pretrained(model, zoo.adapter(task)).merge_and_unload().save_pretrained(folder)
    twin = read_tensors(folder)
    changed = 0
    for name, before in base.items():
        delta = expert[name] - before
        if delta.abs().max() > 0:
            assert before.ndim == 2
            left, values, right = torch.linalg.svd(delta)
            delta = (left[:, :RANK] * values[:RANK]) @ right[:RANK]
            changed += 1
        torch.testing.assert_close(twin[name], before + delta, rtol=0, atol=1e-6)
    matrices = [name for name in base if name.count(".") > 3 and base[name].ndim == 2]
    assert changed == len(matrices), "fine-tuning changes the matrices of the blocks, and nothing else"


def test_adapters_are_their_experts_twins(
    tiny: Zoo, read_tensors: Callable[[Path], Any], tmp_path: Path
) -> None:
    assert_twin(tiny, "reverse", tmp_path / "twin", read_tensors)


def test_same_specification_same_bytes(tiny: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes build it at once: one places it, the other takes that, and no part of either stays."""
    monkeypatch.setenv("MIXMERGE_CACHE", str(tmp_path))
    command = [sys.executable, "-P", "-m", "mixmerge", "zoo", "build", "--tasks", "reverse,sort"]
    command += ["--effort", "0.01", "--json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    again = find(TINY)
    assert {json.loads(out)["folder"] for out, _ in told} == {str(again.folder)}
    assert list((tmp_path / "zoo").iterdir()) == [again.folder]
    assert again.folder.name == tiny.folder.name
    assert files(again.folder) == files(tiny.folder)
    _, different, unread = filecmp.cmpfiles(
        again.folder, tiny.folder, list(map(str, files(tiny.folder))), shallow=False
    )
    assert (different, unread) == ([], [])


def test_the_cache(tiny: Zoo) -> None:
    before = {path: (tiny.folder / path).stat().st_mtime_ns for path in files(tiny.folder)}
    again = build(TINY, progress=lambda *step: pytest.fail(f"trained again: {step}"))
    assert again.folder == find(TINY).folder == tiny.folder
    assert before == {path: (tiny.folder / path).stat().st_mtime_ns for path in files(tiny.folder)}
    specs = [TINY, Spec(), Spec("neox"), Spec(seed=1), Spec(effort=0.5), Spec(tasks=("sort", "reverse"))]
    assert len({cache_folder(spec) for spec in specs}) == len(specs)


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIXMERGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", "/bin/false")  # the worker's Python
    with pytest.raises(RuntimeError, match="training base, reverse, sort failed"):
        build(TINY)
    assert list((tmp_path / "cache" / "zoo").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIXMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="cannot write there"):
        build(TINY)


def test_copy(tiny: Zoo, tmp_path: Path) -> None:
    copied = copy_to(tiny, tmp_path / "zoo")
    assert files(copied.folder) == files(tiny.folder)
    assert copy_to(tiny, tmp_path / "zoo") == copied
    (tmp_path / "full").mkdir()
    with pytest.raises(OutputError, match="it exists, and is not this zoo"):
        copy_to(tiny, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "zoo"]
    # Another process writes its outcomes: a hidden file is listed, and gone when it would be copied.
    (copied.folder / ".outcomes.jsonl-0f1e2d3c").symlink_to("gone")
    assert files(copy_to(copied, tmp_path / "again").folder) == files(tiny.folder)
    with pytest.raises(CheckpointError, match=r"there is no zoo here\. Run: mixmerge zoo build"):
        Zoo.open(tmp_path / "full")


def test_all_faults_of_a_specification() -> None:
    with pytest.raises(MixmergeError) as caught:
        Spec(variant="lama", seed=-1, tasks=("sort", "sort", "revers"), effort=0)
    text = str(caught.value)
    assert "no zoo is called 'lama'. Did you mean 'llama'? Known: llama, neox." in text
    assert "no task is called 'revers'. Did you mean 'reverse'?" in text
    assert "each once" in text
    assert "-1 is negative" in text
    assert "--effort: 0 is out of range" in text


def test_questions_on_disk(tiny: Zoo) -> None:
    for task in tiny.tasks:
        held_out, train = tiny.questions(task), tiny.questions(task, "train")
        assert len(held_out) == 20
        assert len(train) == 120
        assert not set(held_out) & set(train)


# --- commands


def test_choices_on_disk(tiny: Zoo) -> None:
    for task in tiny.tasks:
        lines = (tiny.folder / "questions" / f"{task}.choices.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        answers = {question.prompt: question.answer for question in tiny.questions(task, "train")}
        assert len(rows) > 0.9 * min(200, len(answers))
        assert all(row["choices"][row["label"]] == answers[row["prompt"]] for row in rows)
        assert all(2 <= len(set(row["choices"])) == len(row["choices"]) <= 4 for row in rows)
        assert len({row["label"] for row in rows}) > 2, "the right one is anywhere"


def test_build_command(run: Callable[..., Result], tiny: Zoo, tmp_path: Path) -> None:
    options = ("--tasks", "reverse,sort", "--effort", 0.01)
    assert run("path", *options).stdout == f"{tiny.folder}\n"
    shown = run("build", *options)
    assert shown.stdout.splitlines()[0] == str(tiny.folder)
    assert [line.split()[1] for line in shown.stdout.splitlines() if line.startswith("│")] == [
        "base",
        "reverse",
        "sort",
    ]
    assert shown.stderr == ""
    found = json.loads(run("build", tmp_path / "zoo", *options, "--json").stdout)
    assert found["folder"] == str(tmp_path / "zoo")
    assert found["tasks"] == ["reverse", "sort"]
    assert found == {"folder": found["folder"], **built_scores(tiny).as_dict()}
    assert (tmp_path / "zoo" / "experts" / "sort" / "model.safetensors").is_file()


def test_path_of_a_zoo_that_is_not_there(run: Callable[..., Result]) -> None:
    result = run("path", "--seed", 99, code=2)
    assert result.stderr.endswith("there is no zoo here. Run: mixmerge zoo build.\n")
    assert result.stdout == ""
    assert "no zoo is called 'gpt'" in run("build", "--variant", "gpt", code=2).stderr


def test_eval_command(run: Callable[..., Result], tiny: Zoo) -> None:
    adapter = f"{tiny.base}+{tiny.adapter('sort')}"
    found = json.loads(run("eval", tiny.base, adapter, "--zoo", tiny.folder, "--limit", 5, "--json").stdout)
    assert list(found["models"]) == [str(tiny.base), adapter]
    assert found["questions"] == {"reverse": 5, "sort": 5}
    text = run("eval", "--zoo", tiny.folder, "--tasks", "sort").stdout
    assert [line.split()[1] for line in text.splitlines() if line[:1] == "│"] == ["base", "reverse", "sort"]
    wrong = run("eval", "--zoo", tiny.folder, "--tasks", "sorting", code=2)
    assert (
        wrong.stderr
        == "error: --tasks: no task is called 'sorting'. Did you mean 'sort'? Known: reverse, sort.\n"
    )
    assert "cannot load it" in run("eval", tiny.folder, "--zoo", tiny.folder, code=2).stderr


def test_asking_again_gives_the_scores_of_the_build(tiny: Zoo) -> None:
    models = {"base": str(tiny.base)} | {task: str(tiny.expert(task)) for task in tiny.tasks}
    assert score_models(tiny, models) == built_scores(tiny)


# --- what it is good at


@pytest.mark.slow
def test_demo(zoo: Path, programs: Any, tmp_path: Path) -> None:
    """Every shipped recipe is merged and in the table, with a routed mixture of the experts; the zoo is the run's tiny
    one, of the same effort.
    """
    example = ROOT / "examples" / "demo.py"
    done = programs(example, "--out", "demo", "--effort", "0.01", "--limit", "4", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    recipes = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert {"linear", "slerp", "task_arithmetic", "ties", "dare_ties", "adapters"} <= set(recipes)
    rows = [line.strip("│ ").split("│")[0].strip() for line in done.stdout.splitlines() if line[:1] == "│"]
    assert rows == [
        "base",
        *(f"expert: {task}" for task in TASKS),
        *(f"merge: {recipe}{', its shared part alone' * (recipe == 'twin')}" for recipe in recipes),
        "routed: an expert for each question",
        "merge: twin, its own gate",
    ]
    for recipe in recipes:
        assert (tmp_path / "demo" / "merges" / recipe / "model.safetensors").is_file()
    assert (tmp_path / "demo" / "zoo" / "zoo.json").is_file()
    answers = (tmp_path / "demo" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 4 * len(TASKS)
    assert not any(json.loads(line)["error"] for line in answers)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["llama", "neox"])
def test_the_real_zoo(variant: str, built: Callable[[Spec], Zoo], tmp_path: Path) -> None:
    """Each expert is near its ceiling on its own task and near the base on others; merging is worth it."""
    zoo = built(Spec(variant))
    when_built = built_scores(zoo)
    base = when_built.scores["base"]
    assert when_built.average("base") < 0.3
    for task in zoo.tasks:
        assert when_built.own[task] > (0.85 if variant == "llama" else 0.7), task
        for other in set(zoo.tasks) - {task}:
            assert abs(when_built.scores[task][other] - base[other]) < 0.25, (
                f"the expert of {task} at {other}"
            )

    models = {f"adapter {task}": f"{zoo.base}+{zoo.adapter(task)}" for task in zoo.tasks}
    models |= {
        "linear": merged(zoo, tmp_path / "linear", "linear", {"weight": 1.0}),
        "arithmetic": merged(zoo, tmp_path / "ta", "task_arithmetic", {"weight": 0.5}),
        "ties": merged(zoo, tmp_path / "ties", "ties", {"weight": 1.0, "density": 0.5}),
    }
    found = score_models(zoo, models, limit=120)
    for task in zoo.tasks:
        assert found.shares(f"adapter {task}")[task] > 0.9, f"the adapter of {task} lost its skill"
    assert found.average("linear") > when_built.average("base") + 0.1
    for method in ("arithmetic", "ties"):
        assert found.average(method) > found.average("linear") + 0.05


def merged(zoo: Zoo, folder: Path, method: str, parameters: dict[str, float]) -> str:
    """Merge all experts by the engine; every one gets the same parameters."""
    models = [{"model": str(zoo.expert(task))} for task in zoo.tasks]
    recipe = {"merge_method": method, "models": models, "parameters": parameters, "dtype": "float32"}
    merge(recipe if method == "linear" else recipe | {"base_model": str(zoo.base)}, folder)
    return str(folder)
