"""The zoo's experts as a suite beside those of merge_real: five tasks on letters and digits, in minutes.

Values of a method are chosen on held-out questions that nothing else asks.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

from merging_support.entries import ENTRIES, Entry, available
from merging_support.stages import write_json
from merging_support.suites import Suite, run_experts

from mixmerge.evaluate import Question, answers, load
from mixmerge.zoo import Spec, Zoo, build

NAME = "small"
TEST, VALIDATION = slice(0, 150), slice(150, 250)  # of a task's held-out questions
ANSWER = 40  # tokens at most
STOP = ("\n",)
METHODS = ("average", "task arithmetic", "TIES, mean", "PCB", "TSV-M", "Iso-C", "RegMean")


def entries_of(suite: str) -> tuple[Entry, ...]:
    """The static merges of a suite."""
    if suite != NAME:
        return available(suite)
    return tuple(replace(entry, suites=(NAME,)) for entry in ENTRIES if entry.name in METHODS)


def asked(zoo: Zoo, task: str, split: str = "test") -> list[Question]:
    return list(zoo.questions(task)[TEST if split == "test" else VALIDATION])


def is_right(said: str, question: Question) -> bool:
    return said.strip().partition("\n")[0] == question.answer.strip()


def open_small(work: Path, zoo: Zoo | None = None) -> Suite:
    """The zoo, made or taken from its cache, its training questions as rows, and its experts scored."""
    zoo = zoo or build(Spec())
    suite = Suite(
        name=NAME,
        work=work.resolve(),
        base=zoo.base,
        experts={task: str(zoo.expert(task)) for task in zoo.tasks},
        headed={task: str(zoo.expert(task)) for task in zoo.tasks},
        data=work.resolve() / NAME / "data",
        dtype="float32",
        tries=9,
        identity={"zoo": zoo.folder.name},
        score=lambda folders, split, out: score(zoo, folders, split, out),
    )
    for task in zoo.tasks:
        (suite.data / task).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(zoo.folder / "questions" / f"{task}.train.jsonl", suite.data / task / "train.jsonl")
    run_experts(suite)
    return suite


def score(zoo: Zoo, folders: dict[str, Path], split: str, out: Path) -> None:
    """What the model of each task says to its questions."""
    model_at = cache(lambda place: load(str(place)))
    right = {}
    for task, place in folders.items():
        questions = asked(zoo, task, split)
        said = answers(model_at(place), [one.prompt for one in questions], max_new_tokens=ANSWER)
        right[task] = [is_right(text, one) for text, one in zip(said, questions, strict=True)]
    write_json(out, right)
