"""Fusion as its user has it: a mixture's YAML, ``mixmerge ask``, ``batch`` and ``fit``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from mixmerge import Mixture
from mixmerge.batch.records import Item, Settings
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Message, Request
from mixmerge.errors import MixmergeError
from mixmerge.evaluate.models import evaluate_models
from mixmerge.logits.engine import FusionEngine
from mixmerge.mixture.fusion_fitting import best_of

TEXTS = ("a b c", "the quick brown fox", "1 + 2")
COMPOSE = "compose: {kind: logits, base: big, reference: small, mode: joint}\n"
GENERATE = "generate: {max_new_tokens: 5}\n"


def run(*arguments: object) -> Result:
    from mixmerge.cli import app

    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture
def mix(roles: Any, tmp_path: Path) -> Path:
    path = tmp_path / "mix.yaml"
    path.write_text(roles.entries() + COMPOSE + GENERATE)
    return path


def test_answers_by_each_way_are_the_same(mix: Path, roles: Any, tmp_path: Path) -> None:
    answers = Mixture.load(mix).answer(list(TEXTS))
    assert {one.expert for one in answers} == {"mixture"}
    engine = FusionEngine(str(roles.base), mode="joint", **roles.arguments())
    direct = engine.generate([Request(text, (Message("user", text),), 5) for text in TEXTS])
    assert [one.text for one in answers] == [one.text for one in direct]
    lines = [{"id": f"r{at}", "prompt": text} for at, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    plan = json.loads(run("batch", mix, "-i", tmp_path / "in.jsonl", "--plan", "--json").stdout)
    assert plan["loads"] == 1
    assert plan["groups"][0]["bytes"] == pytest.approx(engine.memory(), rel=0.02)
    done = run(
        "batch", mix, "-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--explain", "-q", "--json"
    )
    assert done.exit_code == 0, done.output
    assert sum(one["times"] for one in json.loads(done.stdout)["loads"]) == 1
    given = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in given[:3]] == [one.text for one in answers]
    weights = given[0]["reason"]["weights"]
    assert weights["experts"] == ["full", "lora"]
    assert all(len(step) == 2 for step in weights["steps"])
    named = [Item(name, (Message("user", TEXTS[1]),), name) for name in ("big", "small", "lora")]
    alone = Mixture.load(mix).answer(named)
    assert [one.expert for one in alone] == ["big", "small", "lora"]
    bank = {"lora": str(roles.adapter)}
    big, small = TransformersEngine(str(roles.base)), TransformersEngine(str(roles.reference), adapters=bank)
    asked = Request("r", (Message("user", TEXTS[1]),), 5)
    expected = [*big.generate([asked]), *small.generate([asked, replace(asked, adapter="lora")])]
    assert [one.text for one in alone] == [one.text for one in expected]


def test_ask_says_the_strengths(mix: Path) -> None:
    done = run("ask", mix, TEXTS[1], "--explain")
    assert done.exit_code == 0, done.output
    for word in (
        "answered by mixture",
        "policy logits",
        "weights of the experts",
        "token",
        "full",
        "lora",
        "all",
    ):
        assert word in done.stderr
    alone = json.loads(run("ask", mix, TEXTS[1], "--expert", "lora", "--json").stdout)
    assert alone["expert"] == "lora"
    with pytest.raises(MixmergeError, match="the experts shift the logits of one base"):
        Mixture.load(mix).route(["a"])


@pytest.mark.parametrize("score", ["loss", "exact"])
def test_the_best_alpha_becomes_a_folder(roles: Any, answers: Path, tmp_path: Path, score: str) -> None:
    compose = (
        f"{{kind: logits, base: big, reference: small, mode: static, data: {answers}, alphas: [0, 0.5, 1], "
    )
    (tmp_path / "mix.yaml").write_text(
        roles.entries() + f"compose: {compose}score: {score}, clip: 5}}\n" + GENERATE
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "fit", "--quiet")
    assert done.exit_code == 0, done.output
    assert "static fusion of full, lora" in done.stdout
    card = json.loads((tmp_path / "fit" / "fusion.json").read_text())
    assert list(card["scores"]) == ["0", "0.5", "1"]
    assert card["alpha"] == best_of({float(a): s for a, s in card["scores"].items()}, least=score == "loss")
    written = yaml.safe_load((tmp_path / "fit" / "mixture.yaml").read_text())
    assert written["compose"] == {
        "kind": "logits", "folder": ".", "base": "big", "reference": "small", "clip": 5.0, "mode": "static",
        "alpha": card["alpha"],
    }  # fmt: skip
    assert len(list((tmp_path / "fit").glob("vocabulary-*.safetensors"))) == 3
    fitted = Mixture.load(tmp_path / "fit").answer([TEXTS[1]])[0]
    same = (
        roles.entries()
        + f"compose: {{kind: logits, base: big, reference: small, mode: static, clip: 5, alpha: {card['alpha']}}}\n"
    )
    (tmp_path / "same.yaml").write_text(same + GENERATE)
    assert fitted.text == Mixture.load(tmp_path / "same.yaml").answer([TEXTS[1]])[0].text
    again = run("fit", tmp_path / "mix.yaml", tmp_path / "fit")
    assert (again.exit_code, "it exists" in again.stderr) == (2, True)
    assert "is fitted already" in run("fit", tmp_path / "fit", tmp_path / "other").stderr
    assert run("fit", tmp_path / "mix.yaml", tmp_path / "fit", "--overwrite", "-q").exit_code == 0


def test_a_fitted_folder_is_of_its_experts(roles: Any, answers: Path, clone: Any, tmp_path: Path) -> None:
    full = clone(roles.full)
    entries = roles.entries().replace(str(roles.full), str(full))
    compose = f"compose: {{kind: logits, base: big, reference: small, mode: static, data: {answers}, alphas: [1]}}\n"
    (tmp_path / "mix.yaml").write_text(entries + compose)
    assert run("fit", tmp_path / "mix.yaml", tmp_path / "fit", "-q").exit_code == 0
    text = (tmp_path / "fit" / "mixture.yaml").read_text()
    (tmp_path / "fit" / "mixture.yaml").write_text(
        text.replace("  full:", "  other:").replace("- full", "- other")
    )
    with pytest.raises(MixmergeError, match="was fitted with"):
        Mixture.load(tmp_path / "fit")
    (tmp_path / "fit" / "mixture.yaml").write_text(text)
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with pytest.raises(MixmergeError, match=r"experts\.full: has changed since"):
        Mixture.load(tmp_path / "fit", answers=True)
    (tmp_path / "fit" / "fusion.json").write_text("{}")
    with pytest.raises(MixmergeError, match="holds no fusion"):
        Mixture.load(tmp_path / "fit")


def test_there_is_nothing_to_fit_without_data(mix: Path, tmp_path: Path) -> None:
    done = run("fit", mix, tmp_path / "fit")
    assert done.exit_code == 2
    assert "nothing to fit: a fusion answers as it is" in done.stderr
    assert not (tmp_path / "fit").exists()


def test_rows_without_answers(roles: Any, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"prompt": "a", "answer": "b"}\n')
    compose = (
        f"compose: {{kind: logits, base: big, reference: small, mode: static, data: {tmp_path}/rows.jsonl}}\n"
    )
    (tmp_path / "mix.yaml").write_text(roles.entries() + compose)
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "fit")
    assert (done.exit_code, "1 of 2 rows have no prompt and answer" in done.stderr) == (2, True)
    assert not (tmp_path / "fit").exists()


WRONG = {
    "base: bigg, reference: small": "the mixture has no expert 'bigg'. Did you mean 'big'",
    "base: big, reference: smal": "the mixture has no expert 'smal'",
    "base: big, reference: big": "big is the base",
    "reference: small": "the key base is missing",
    "base: big, reference: small, experts: [big]": "big is the base, and shifts nothing",
    "base: big, reference: small, experts: [small, full]": "small is the reference, and shifts nothing",
    "base: big, reference: small, experts: [nobody]": "the mixture has no expert 'nobody'",
    "base: big, reference: small, experts: [full]": "lora of the experts has no part in it",
    "base: big, reference: small, experts: [full, full, lora]": "named twice",
    "base: big, reference: small, mode: static, alpha: 9": "less than or equal to 8",
    "base: big, reference: small, mode: static, alpha: {fulll: 1.0}": "Did you mean 'full'",
    "base: big, reference: small, mode: one, alpha: 0.5": "mode one finds it anew",
    "base: big, reference: small, mode: static, damping: 2.0": "damping (line 6): has no effect on mode static",
    "base: big, reference: small, mode: static, data: x.jsonl, alpha: 1": "has no effect: data picks it",
    "base: big, reference: small, mode: static, data: x.jsonl, seed: 1": "has no effect without samples",
    "base: big, reference: small, mode: two": "expected 'static', 'one', 'joint' or 'grid'",
    "base: big, reference: small, top_p_base: 1.5": "a number less than or equal to 1",
    "base: big, reference: small, clip: 0": "a number greater than 0",
    "base: big, reference: small, data: x.jsonl": "data picks a fixed alpha, and mode one has none",
    "base: big, reference: small, alphas: [1]": "has no effect without data",
    "base: big, reference: small, folder: x, data: y": "has no effect on a fitted mixture",
    "base: big, reference: small, gate: {}": "unknown key 'gate'",
}


@pytest.mark.parametrize("options", WRONG)
def test_what_is_wrong_is_said_before_a_file_is_opened(options: str, tmp_path: Path) -> None:
    experts = "experts:\n" + "".join(
        f"  {one}: {{model: x/{one}}}\n" for one in ("big", "small", "full", "lora")
    )
    (tmp_path / "mix.yaml").write_text(experts + f"compose: {{kind: logits, {options}}}\n")
    done = run("ask", tmp_path / "mix.yaml", "hello")
    assert done.exit_code == 2
    assert WRONG[options] in done.stderr
    assert "compose" in done.stderr


def test_all_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        "experts:\n  big: {model: x/big, options: {dtype: float32}}\n"
        "  far: {endpoint: 'http://localhost:1/v1', model: m}\n  mixture: {model: x/m, engine: vllm}\n"
        "router: {kind: knn, outcomes: o.jsonl}\npolicy: {kind: argmax}\n"
        "compose: {kind: logits, base: big, reference: far, experts: [big, far, mixture]}\n"
    )
    done = run("ask", tmp_path / "mix.yaml", "hello")
    assert done.exit_code == 2
    for words in (
        "options has no effect on a part of a network",
        "an expert behind an endpoint cannot be part",
        "is what all experts as one are called",
        "vllm cannot run a network",
        "router (line 5): has no effect: the experts shift the logits of one base",
        "policy (line 6): has no effect",
        "big is the base, and shifts nothing",
        "far is the reference, and shifts nothing",
    ):
        assert words in done.stderr, words


UNREAD = {
    "base: bigg, reference: small, mode: two, damping: 2.0, clip: 0": (
        ("no expert 'bigg'", "expected 'static', 'one'", "a number greater than 0"),
        ("damping (line 6)",),
    ),
    "base: 3, reference: smal, experts: [full, full]": (
        ("no expert 'smal'", "named twice", "compose.base"),
        ("key base is missing", "no part in it"),
    ),
    "base: big, reference: [x], experts: [full], mode: static, alpha: {nobody: 1.0}": (
        ("compose.reference",),
        ("key reference is missing", "no part in it", "called 'nobody'"),
    ),
    "base: big, reference: big, data: 3, samples: 0, seed: 1": (
        ("big is the base", "compose.data", "compose.samples"),
        ("without data", "without samples"),
    ),
    "base: big, reference: small, mode: static, data: x, alpha: 9, samples: 0, seed: 1": (
        ("data picks it", "less than or equal to 8", "compose.samples"),
        ("without samples",),
    ),
    "base: big, reference: small, folder: 3, data: y, mode: one, alpha: 0.5, gates: 1": (
        ("compose.folder", "mode one finds it anew", "unknown key 'gates'"),
        ("fitted mixture", "has none"),
    ),
}


@pytest.mark.parametrize("options", UNREAD)
def test_a_key_that_is_wrong_hides_no_other_and_is_not_called_missing(options: str, tmp_path: Path) -> None:
    experts = "experts:\n" + "".join(
        f"  {one}: {{model: x/{one}}}\n" for one in ("big", "small", "full", "lora")
    )
    (tmp_path / "mix.yaml").write_text(experts + f"compose: {{kind: logits, {options}}}\n")
    told = run("ask", tmp_path / "mix.yaml", "hello").stderr
    for words in UNREAD[options][0]:
        assert words in told, told
    for words in UNREAD[options][1]:
        assert words not in told, told


def test_the_engine_of_a_whole_is_none_of_an_expert(tmp_path: Path) -> None:
    experts = "experts:\n  a: {model: x, engine: fusion, options: {experts: {b: y}}}\n  b: {model: x, engine: latent}\n"
    (tmp_path / "mix.yaml").write_text(experts + "router: {kind: knn, outcomes: o.jsonl}\n")
    done = run("batch", tmp_path / "mix.yaml", "-i", tmp_path / "in.jsonl", "--plan")
    assert done.exit_code == 2
    assert "fusion runs several experts as one, not one of them. compose: {kind: logits, ...}" in done.stderr
    assert "latent runs several experts as one" in done.stderr


def test_experts_that_are_not_there(tmp_path: Path) -> None:
    experts = "experts:\n" + "".join(f"  {one}: {{model: ./{one}}}\n" for one in ("big", "small", "full"))
    (tmp_path / "mix.yaml").write_text(experts + "compose: {kind: logits, base: big, reference: small}\n")
    done = run("ask", tmp_path / "mix.yaml", "hello")
    assert done.exit_code == 2
    assert done.stderr.count("no such folder") == 3


def test_an_alpha_that_is_not_picked_yet(roles: Any, answers: Path, tmp_path: Path) -> None:
    compose = f"compose: {{kind: logits, base: big, reference: small, mode: static, data: {answers}}}\n"
    (tmp_path / "mix.yaml").write_text(roles.entries() + compose)
    done = run("ask", tmp_path / "mix.yaml", "hello")
    assert done.exit_code == 2
    assert "is not picked yet" in done.stderr
    assert "mixmerge fit MIXTURE.yaml OUT" in done.stderr


def test_answers_that_the_base_was_cut_of_have_no_loss(roles: Any, answers: Path, tmp_path: Path) -> None:
    told = f"base: big, reference: small, mode: static, data: {answers}, top_p_base: 0.01"
    compose = f"compose: {{kind: logits, {told}}}\n"
    (tmp_path / "mix.yaml").write_text(roles.entries() + compose)
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "fit", "-q")
    assert done.exit_code == 2
    assert "compose.score: the answers of 6 of 6 rows have no probability at all" in done.stderr
    assert not (tmp_path / "fit").exists()


def test_eval_scores_what_a_mixture_says(mix: Path, roles: Any, answers: Path, tmp_path: Path) -> None:
    """As ``batch`` answers, beside models; rows that an expert has seen are refused as a merge's are."""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    items = [
        Item(f"r{at}", row["prompt"], settings=Settings(3, temperature=0.0)) for at, row in enumerate(rows)
    ]
    said = [one.text for one in Mixture.load(mix).answer(items)]
    right = [
        {**row, "answer": text.strip().partition("\n")[0] or "?"}
        for row, text in zip(rows, said, strict=True)
    ]
    (tmp_path / "right.jsonl").write_text("".join(json.dumps(row) + "\n" for row in right))
    task = {"name": "t", "data": str(tmp_path / "right.jsonl"), "metric": "exact", "max_new_tokens": 3}
    report = evaluate_models({"fused": mix, "big": roles.base}, tasks={"tasks": [task]}, resamples=100)
    row = report.row("fused")
    assert row.scores["t"].value == pytest.approx(np.mean([one["answer"] != "?" for one in right]))
    assert list(row.answers["t"].given) == said
    assert row.storage == sum(
        path.stat().st_size
        for folder in {roles.base, roles.reference, roles.full, roles.adapter}
        for path in folder.rglob("*.safetensors")
    )
    assert any("Mixtures, whose experts answer as one" in note and "fused" in note for note in report.notes)
    done = run(
        "eval", mix, "--task", answers, "--metric", "f1", "--resamples", 100, "--limit", 2, "--json", "-q"
    )
    assert done.exit_code == 0, done.output


def test_eval_refuses_what_a_mixture_cannot_be_asked(mix: Path, answers: Path, tmp_path: Path) -> None:
    (tmp_path / "choices.jsonl").write_text('{"prompt": "a", "choices": ["b", "c"], "label": 0}\n')
    done = run("eval", mix, "--task", tmp_path / "choices.jsonl", "--metric", "choice")
    assert done.exit_code == 2
    assert "mix.yaml is a mixture, which generates; choice asks how likely each choice is" in done.stderr
    assert "exact, f1, rouge1" in done.stderr
    done = run("eval", mix, "--base", mix, "--task", answers, "--metric", "exact")
    assert (done.exit_code, "base base: " in done.stderr) == (2, True)
    routed = tmp_path / "routed.yaml"
    routed.write_text(mix.read_text().partition("compose:")[0] + "router: {kind: knn, outcomes: o.jsonl}\n")
    done = run("eval", routed, "--task", answers, "--metric", "exact")
    assert done.exit_code == 2
    assert f"{routed} is a mixture of several models that answer one by one" in done.stderr
    assert f"mixmerge batch {routed} -i" in done.stderr


def test_best_alpha() -> None:
    assert best_of({0.0: 2.0, 1.0: 1.0, 2.0: 1.5}, least=True) == 1.0
    assert best_of({0.5: 1.0, 1.5: 1.0, 2.0: 1.0}, least=True) == 0.5  # as near to 1 as 1.5, and smaller
    assert best_of({0.0: 0.2, 2.0: 0.4}, least=False) == 2.0
