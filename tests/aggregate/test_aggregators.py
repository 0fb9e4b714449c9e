"""The aggregator bench: trials of one right and two wrong answers, and who tells them apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mixmerge.aggregate.bench import Answered, best_aggregator, trials
from mixmerge.aggregate.extraction import final_text
from mixmerge.engines.callables import generator
from mixmerge.engines.local import TransformersEngine
from mixmerge.errors import MixmergeError
from mixmerge.mixture import read
from mixmerge.mixture.aggregators import bench


def _check(answer: str, reference: str) -> float:
    return float(answer == reference)


ANSWERED = [
    Answered(str(n), f"{n} + {n}?", str(2 * n), {"a": str(2 * n), "b": "x", "c": "y", "d": " " if n else "z"})
    for n in range(30)
]


def test_trials_have_one_right_answer_and_two_wrong_ones() -> None:
    made = trials(ANSWERED, _check)
    assert [sorted(one.answers) for one in made[1:]] == [
        sorted([one.reference, "x", "y"]) for one in made[1:]
    ]
    assert len({one.answers.index(one.reference) for one in made}) == 3, "the right one stands anywhere"
    shuffled = [Answered(o.id, o.question, o.reference, dict(reversed(o.answers.items()))) for o in ANSWERED]
    assert trials(shuffled[::-1], _check)[::-1] == made
    assert trials(ANSWERED, _check, seed=1) != made
    unsolved = [Answered("u", "?", "1", {"a": "2", "b": "3"}), Answered("v", "?", "1", {"a": "1", "b": "3"})]
    assert trials(unsolved, _check) == ()
    given = trials(unsolved, _check, missing="empty")
    assert [sorted(one.answers) for one in given] == [["", "2", "3"], ["", "1", "3"]]


def test_the_best_aggregator() -> None:
    def said(choose: Callable[[list[str]], str]) -> Any:
        def generate(prompts: Sequence[str], **_: Any) -> list[str]:
            answers = [
                [part.split("\n")[1] for part in prompt.split("### Answer ")[1:]] for prompt in prompts
            ]
            return [f"so many <think> x </think>\n{choose(one)}" for one in answers]

        return generate

    experts = {
        "wise": said(lambda answers: next(one for one in answers if one.isdigit())),
        "first": said(lambda answers: answers[0]),
        "also wise": said(lambda answers: next(one for one in answers if one.isdigit())),
    }
    bench = best_aggregator(experts, ANSWERED, _check)
    firsts = sum(one.answers[0] == one.reference for one in trials(ANSWERED, _check)) / 30
    assert bench.best == "also wise", "of two alike the first by name"
    assert bench.accuracy == {"also wise": 1.0, "first": firsts, "wise": 1.0}
    assert bench.error["first"] == pytest.approx((firsts * (1 - firsts) / 30) ** 0.5)
    assert (bench.trials, bench.left_out) == (30, 0)
    assert best_aggregator(dict(reversed(experts.items())), ANSWERED[::-1], _check) == bench
    assert final_text("a</think> b </think>\n c ") == "c"
    with pytest.raises(MixmergeError, match="of 1 questions none has 1 right answer and 2 wrong ones"):
        best_aggregator(experts, [Answered("u", "?", "1", {"a": "1"})], _check)
    with pytest.raises(MixmergeError, match="experts: are none"):
        best_aggregator({}, ANSWERED, _check)
    with pytest.raises(MixmergeError, match="wrong: is 0"):
        best_aggregator(experts, ANSWERED, _check, wrong=0)


def test_a_real_model_aggregates(family: Callable[..., Any]) -> None:
    engine = TransformersEngine(str(family("llama", dtype="float32").base))

    def generate(prompts: Sequence[str], **options: Any) -> list[str]:
        return generator(engine)([prompt[-40:] for prompt in prompts], **options)

    bench = best_aggregator({"tiny": generate}, ANSWERED[:3], _check, max_new_tokens=4)
    assert 0 <= bench.accuracy["tiny"] <= 1


def test_experts_of_a_mixture_are_benched_as_one_job(
    family: Callable[..., Any], clone: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Grouped, on disk and resumable, and what the functions give."""
    folders = {}
    for name, source in zip("ab", family("llama", dtype="float32").experts, strict=False):
        folders[name] = clone(source)
        config = json.loads((folders[name] / "config.json").read_text())
        (folders[name] / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    spec = read(
        {
            "experts": {name: {"model": str(folder)} for name, folder in folders.items()},
            "router": {"kind": "best_single", "outcomes": "none.jsonl"},
            "generate": {"max_new_tokens": 6, "seed": 3},
        }
    ).require()

    def check(answer: str, reference: str) -> float:  # untrained models are right where this happens to hold
        return float(answer == reference or (len(answer) > 2 and ord(answer[0]) % 2 == 0))

    told = bench(spec, ANSWERED, tmp_path / "job", check=check)
    functions = {}
    for name, folder in folders.items():
        functions[name] = generator(TransformersEngine(str(folder)))
    expected = best_aggregator(functions, ANSWERED, check, max_new_tokens=6, seed=3)
    assert told == expected
    assert len(set(told.accuracy.values())) == 2, "the check tells them apart"
    assert bench(spec, ANSWERED, tmp_path / "job", check=check) == told, "what is there is not asked again"
    with pytest.raises(MixmergeError, match="of 1 questions none"):
        bench(spec, ANSWERED[:1], tmp_path / "other", check=lambda answer, reference: 1.0)
