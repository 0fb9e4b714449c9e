"""Outcomes of a zoo: real answers of tiny models, scored one by one; and the README's three commands on them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from mixmerge.cli import app
from mixmerge.errors import MixmergeError
from mixmerge.evaluate import answered, answers, exact_match, load
from mixmerge.outcomes import OutcomeTable
from mixmerge.zoo import Spec, Zoo, built_scores, copy_to, outcomes
from mixmerge.zoo.outcomes import FILE, scores_by_task

PROGRAM = [sys.executable, "-P", "-m", "mixmerge"]


@pytest.fixture
def own(zoo: Path, tmp_path: Path) -> Zoo:
    """A copy of the zoo of two experts: a small part of what the run's zoo answers, and nothing kept."""
    found = copy_to(Zoo.open(zoo), tmp_path / "own")
    (found.folder / FILE).unlink(missing_ok=True)
    return Zoo(found.folder, ("sort", "close"), found.manifest)


def test_real_answers_of_every_expert(own: Zoo) -> None:
    seen: list[tuple[str, int, int]] = []
    table = outcomes(own, limit=3, progress=lambda *step: seen.append(step))
    assert table.experts == ("sort", "close")
    assert table.ids == ("sort-0", "sort-1", "sort-2", "close-0", "close-1", "close-2")
    assert table.metadata == {"task": ("sort",) * 3 + ("close",) * 3}
    assert table.prices == {}
    assert seen == [("sort", 1, 2), ("sort", 2, 2), ("close", 1, 2), ("close", 2, 2)]
    questions = own.questions("sort")[:3] + own.questions("close")[:3]
    assert table.queries == tuple(question.prompt for question in questions)
    assert table.tokens_in is not None
    assert table.tokens_out is not None
    assert table.latency is not None
    for e, expert in enumerate(table.experts):
        answerer = load(str(own.expert(expert)))
        for q, question in enumerate(questions):
            peers = questions[:3] if q < 3 else questions[3:]
            expected = answerer.tokenizer([one.answer for one in peers], add_special_tokens=False)
            cut = max(map(len, expected["input_ids"])) + 2
            (text,) = answers(answerer, [question.prompt], max_new_tokens=cut)
            assert table.score[q, e] == exact_match(text, question.answer)
            assert table.tokens_in[q, e] == len(answerer.tokenizer(question.prompt)["input_ids"])
    assert (table.tokens_out >= 1).all()
    assert (table.latency > 0).all()
    assert not (own.folder / FILE).exists(), "only all outcomes are kept"


def test_all_of_a_zoo_are_kept_with_it(zoo: Path) -> None:
    found = Zoo.open(zoo)
    table = outcomes(found)
    assert len(table) == 100
    assert (zoo / FILE).is_file()
    built = found.manifest["right"]
    for e, expert in enumerate(table.experts):
        asked = "".join(built[expert][task] for task in found.tasks)
        assert [str(int(score)) for score in table.score[:, e]] == list(asked), "as when it was built"
    again = outcomes(found, progress=lambda *step: pytest.fail("asked again"))
    assert again.queries == table.queries
    np.testing.assert_array_equal(again.score, table.score)
    few = outcomes(found, limit=2)
    assert few.ids == tuple(f"{task}-{n}" for task in found.tasks for n in range(2))
    scores, of_build = scores_by_task(table), built_scores(found)
    assert scores.scores == {expert: of_build.scores[expert] for expert in found.tasks}
    assert (scores.own, scores.questions) == (of_build.own, of_build.questions)


def test_a_zoo_that_cannot_be_written_is_asked_all_the_same(
    own: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own.folder / FILE).mkdir()  # a file cannot be placed there, for root neither
    one = Zoo(own.folder, ("sort",), own.manifest)
    assert len(outcomes(one)) == 20
    assert (own.folder / FILE).is_dir()
    with pytest.raises(MixmergeError, match=r"--limit: is 0\. 1 or more\."):
        outcomes(one, limit=0)


def test_tokens_and_seconds_of_answers(zoo: Path) -> None:
    found = Zoo.open(zoo)
    answerer = load(str(found.base))
    prompts = [question.prompt for task in found.tasks for question in found.questions(task)[:3]]
    whole = answered(answerer, prompts, max_new_tokens=6)
    assert [one.text for one in whole] == answers(answerer, prompts, max_new_tokens=6)
    small = answered(answerer, prompts, max_new_tokens=6, batch_size=1)
    for one, other, prompt in zip(whole, small, prompts, strict=True):
        assert (one.text, one.tokens_in, one.tokens_out) == (other.text, other.tokens_in, other.tokens_out)
        assert one.tokens_in == len(answerer.tokenizer(prompt)["input_ids"])
        assert 1 <= one.tokens_out <= 6
        assert one.seconds > 0
    assert answered(answerer, [], max_new_tokens=6) == []


def test_the_end_of_an_answer_counts_and_padding_does_not(zoo: Path) -> None:
    """Of two answers in a batch, one ends after its first token."""
    import torch

    found = Zoo.open(zoo)
    answerer = load(str(found.base))
    end = answerer.tokenizer.eos_token_id
    fixed = torch.tensor([[5, end, end, end], [5, 6, 7, 8]])

    class Fixed:
        device = "cpu"

        def generate(self, *, input_ids: Any, **rest: Any) -> Any:
            return torch.cat([input_ids, fixed[: len(input_ids)]], dim=1)

    made = answered(type(answerer)(Fixed(), answerer.tokenizer), ["a", "bb"], max_new_tokens=4)
    assert [one.tokens_out for one in made] == [2, 4]


# --- the command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["zoo", "outcomes", *map(str, arguments)])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    return call


def test_command(run: Callable[..., Any], zoo: Path, tmp_path: Path) -> None:
    shown = run("o.jsonl", "--zoo", zoo, "--limit", 4)
    assert shown.stdout.splitlines()[0] == "o.jsonl"
    assert [line.split()[1] for line in shown.stdout.splitlines() if line[:1] == "│"] == list(
        Zoo.open(zoo).tasks
    )
    table = OutcomeTable.read(tmp_path / "o.jsonl")
    assert len(table) == 20
    assert table.tokens_out is not None
    found = json.loads(run("o.parquet", "--zoo", zoo, "--limit", 4, "--json").stdout)
    assert found["path"] == "o.parquet"
    assert found["questions"] == dict.fromkeys(table.metadata["task"], 4)
    again = OutcomeTable.read(tmp_path / "o.parquet")
    np.testing.assert_array_equal(again.score, table.score)
    kept = run("--zoo", zoo, "--json")
    assert json.loads(kept.stdout)["path"] == str(zoo / FILE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["o.jsonl", "--zoo", "."], "there is no zoo here. Run: mixmerge zoo build."),
        (["o.csv", "--zoo", "ZOO", "--limit", "1"], "has the ending '.csv'. .parquet or .jsonl."),
        (["--limit", "3", "--zoo", "ZOO"], "--limit: only all outcomes stay with the zoo. Name a FILE too."),
        (
            ["taken.jsonl", "--zoo", "ZOO"],
            "taken.jsonl: exists already. Name another file, or pass --overwrite.",
        ),
        (["o.jsonl", "--zoo", "ZOO", "--limit", "0"], "Invalid value for '--limit'"),
    ],
)
def test_faults_of_the_command(
    run: Callable[..., Any], zoo: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "taken.jsonl").touch()
    result = run(*(str(zoo) if one == "ZOO" else one for one in arguments), code=2)
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken.jsonl"]


# --- from the zoo to a decision


@pytest.mark.slow
def test_three_commands_on_a_zoo_that_has_learned(
    built: Callable[[Spec], Zoo], programs: Any, tmp_path: Path
) -> None:
    """As real processes: outcomes, fit, ask; the router sends a question to the expert that can answer it.

    The zoo is the one that tests/test_zoo.py builds, so that the suite trains it once.
    """
    spec = Spec()
    zoo = built(spec).folder

    def mixmerge(*arguments: str) -> str:
        done: subprocess.CompletedProcess[str] = programs("-P", "-m", "mixmerge", *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return done.stdout

    mixmerge("zoo", "outcomes", "outcomes.jsonl", "--zoo", str(zoo))
    table, right = OutcomeTable.read(tmp_path / "outcomes.jsonl"), Zoo.open(zoo).manifest["right"]
    for e, expert in enumerate(table.experts):
        as_built = "".join(right[expert][task] for task in spec.tasks)
        assert "".join(str(int(score)) for score in table.score[:, e]) == as_built
    fitted = json.loads(
        mixmerge("route", "fit", "outcomes.jsonl", "--out", "router", "--holdout", "0.2", "--json")
    )
    router = next(row for row in fitted["holdout"]["rows"] if row["name"] == "router")
    assert router["score"]["value"] > 0.9
    assert router["over_best"]["difference"]["low"] > 0.2
    for task in spec.tasks[:2]:
        question = Zoo.open(zoo).questions(task)[0].prompt
        assert mixmerge("route", "ask", "router", question, "--explain").splitlines()[0] == task
