"""What the examples on the zoo have in common: where it lies, and its questions as files of a batch job."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixmerge.evaluate import Question
from mixmerge.zoo import Zoo, copy_to

Questions = Mapping[str, Sequence[Question]]  # by task


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def place(zoo: Zoo, target: Path) -> None:
    """Make the zoo appear at ``target``: a link, or a copy where links are not allowed."""
    if target.is_symlink():
        target.unlink()
    with contextlib.suppress(OSError):
        target.symlink_to(zoo.folder.resolve(), target_is_directory=True)
        return
    copy_to(zoo, target)


def named(questions: Questions) -> dict[str, Question]:
    """Every question by its id, ``TASK-NUMBER``; the tasks take turns, as they would where many people ask."""
    rows = [(n, f"{task}-{n}", one) for task, some in questions.items() for n, one in enumerate(some)]
    return {name: one for _, name, one in sorted(rows, key=lambda row: row[0])}


def write_questions(path: Path, questions: Questions, *, answers: bool) -> None:
    """JSONL with ``id`` and ``prompt``, and the right ``answer`` for those who may see it."""
    with path.open("w", encoding="utf-8") as file:
        for name, one in named(questions).items():
            told = {"answer": one.answer} if answers else {}
            file.write(json.dumps({"id": name, "prompt": one.prompt, **told}) + "\n")


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Id -> record, of a batch job's output; its ``answer`` is "" where there is none."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["id"]: line | {"answer": line["answer"] or ""} for line in lines}
