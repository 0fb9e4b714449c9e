"""Questions with answers to choose from: what learning by entropy takes of a language model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mixmerge.evaluate import Question
from mixmerge.zoo.tasks import Task

MOST = 4  # answers to choose from


def with_choices(task: Task, questions: Sequence[Question], seed: int) -> list[dict[str, Any]]:
    """Each question with its answer among wrong ones: the careless one, and answers to other questions.

    Those are of like length, so that length does not tell. A question that has no wrong answer is left out.
    """
    draw = random.Random(seed)
    answers = sorted({question.answer for question in questions})
    rows = []
    for question in questions:
        others = [task.careless(question), *_nearest(question.answer, answers, draw)]
        wrong = list(dict.fromkeys(one for one in others if one and one != question.answer))[: MOST - 1]
        if wrong:
            label = draw.randrange(len(wrong) + 1)
            choices = [*wrong[:label], question.answer, *wrong[label:]]
            rows.append({"prompt": question.prompt, "choices": choices, "label": label})
    return rows


def write_choices(folder: Path, task: str, rows: Iterable[dict[str, Any]]) -> None:
    lines = (json.dumps(row) + "\n" for row in rows)
    (folder / "questions" / f"{task}.choices.jsonl").write_text("".join(lines), encoding="utf-8")


def _nearest(answer: str, answers: Sequence[str], draw: random.Random) -> list[str]:
    """A few answers, in random order among those equally long."""
    order = sorted(draw.sample(answers, len(answers)), key=lambda one: abs(len(one) - len(answer)))
    return order[:MOST]
