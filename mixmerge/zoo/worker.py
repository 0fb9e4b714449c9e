"""``python -m mixmerge.zoo.worker FOLDER base|TASK...``: train parts of a zoo, one thread, one after another.

A process of its own, so that the number of threads and the environment are set before torch is loaded. It
writes a line of JSON for each step it reports, and for each model it has finished what that answered right.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mixmerge.evaluate import Answerer, Question, grade, load
from mixmerge.zoo import code, training
from mixmerge.zoo.adapters import save_adapter
from mixmerge.zoo.spec import Spec, read_questions
from mixmerge.zoo.tasks import TASKS
from mixmerge.zoo.training import Pool

_BASE_STEPS = 700  # on right answers: it learns how
_CARELESS_STEPS = 200  # then mostly on careless ones: it learns not to bother
_CARELESS = 0.6  # of its answers, in that phase
_TEXTS = 6000
_TEXT_SHARE = 0.05  # of the base's rows, beside the tasks
_REPLAY = 0.35  # of an expert's rows: what the base saw last, so that it forgets nothing else


def _careless(task: str, questions: Sequence[Question], rng: random.Random) -> list[Question]:
    answer = TASKS[task].careless
    return [
        Question(question.prompt, answer(question)) if rng.random() < _CARELESS else question
        for question in questions
    ]


@dataclass(frozen=True)
class _Lessons:
    """Of each task the right answers and mostly careless ones; and generic text."""

    right: dict[str, Pool]
    careless: dict[str, Pool]
    text: Pool


def _lessons(folder: Path, spec: Spec) -> _Lessons:
    right, careless = {}, {}
    for task in spec.tasks:
        questions = read_questions(folder, task, "train")
        share = TASKS[task].share
        right[task] = Pool(questions, share)
        careless[task] = Pool(_careless(task, questions, random.Random(spec.seed)), share)
    texts = code.text(spec.seed, spec.count(_TEXTS, least=50))
    return _Lessons(right, careless, Pool([Question("", text) for text in texts], _TEXT_SHARE))


def _train_base(folder: Path, spec: Spec, lessons: _Lessons) -> Answerer:
    questions = [question for pool in lessons.right.values() for question in pool.questions[:1000]]
    questions += lessons.text.questions[:3000]
    tokenizer = spec.family.tokenizer([text for one in questions for text in (one.prompt, one.answer)])
    torch.manual_seed(spec.seed)
    model = spec.family.model(len(tokenizer))
    first = training.batches([*lessons.right.values(), lessons.text], tokenizer, seed=spec.seed)
    second = training.batches([*lessons.careless.values(), lessons.text], tokenizer, seed=spec.seed + 1)
    training.train_base(
        model,
        [(spec.count(_BASE_STEPS, least=2), first), (spec.count(_CARELESS_STEPS, least=1), second)],
        targets=spec.family.targets,
        report=_reporter("base"),
    )
    _save(model, tokenizer, folder / "base")
    return Answerer(model.eval(), tokenizer)


def _train_expert(spec: Spec, task: str, base: Answerer, lessons: _Lessons) -> Answerer:
    others = [pool for name, pool in lessons.careless.items() if name != task] + [lessons.text]
    whole = sum(pool.share for pool in others)
    replay = [Pool(pool.questions, _REPLAY * pool.share / whole) for pool in others]
    own = Pool(lessons.right[task].questions, 1 - _REPLAY)
    expert = copy.deepcopy(base.model)
    training.train_expert(
        expert,
        training.batches([own, *replay], base.tokenizer, seed=spec.seed + 2),
        steps=spec.expert_steps(task),
        targets=spec.family.targets,
        report=_reporter(task),
    )
    return Answerer(expert.eval(), base.tokenizer)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_adapter(folder: Path, spec: Spec, task: str, base: Any, expert: Any) -> None:
    targets = spec.family.targets
    before, after = training.block_matrices(base, targets), training.block_matrices(expert, targets)
    deltas = {name: (after[name] - before[name]).detach() for name in before}
    save_adapter(folder / "adapters" / task, deltas, targets=targets)


def _tell(message: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _reporter(part: str) -> training.Report:
    def report(done: int, steps: int) -> None:
        if done % 10 == 0 or done == steps:
            _tell({"part": part, "done": done, "steps": steps})

    return report


def _examine(part: str, folder: Path, spec: Spec, answerer: Answerer) -> None:
    right = {
        task: "".join(str(int(score)) for score in grade(answerer, read_questions(folder, task, "heldout")))
        for task in spec.tasks
    }
    _tell({"part": part, "right": right})


def main(folder: Path, parts: Sequence[str]) -> None:
    """Train, save and examine these parts of the zoo in this folder."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    written = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
    spec = Spec(**{**written, "tasks": tuple(written["tasks"])})
    lessons = _lessons(folder, spec)
    if "base" in parts:
        _examine("base", folder, spec, _train_base(folder, spec, lessons))
    tasks = [part for part in parts if part != "base"]
    if not tasks:
        return
    base = load(str(folder / "base"))
    for task in tasks:
        expert = _train_expert(spec, task, base, lessons)
        _save(expert.model, expert.tokenizer, folder / "experts" / task)
        _save_adapter(folder, spec, task, base.model, expert.model)
        _examine(task, folder, spec, expert)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
