"""One seed of the benchmark: its world, its files, its experts; and how a mixture is asked and scored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from merging_support.stages import stage

from latent_support.experts import FIRST, SECOND, make_first, make_second
from latent_support.world import (
    OWN,
    Sizes,
    World,
    another_table,
    exam_and_lessons,
    keeping,
    make,
    own_questions,
)
from mixmerge.evaluate import Question

UNTRAINED, OTHER = "untrained", "other-table"  # experts of controls
LONGEST = 12  # tokens of an answer, at most
Right = dict[str, list[bool]]  # split -> of each question whether the answer was right


@dataclass(frozen=True)
class Steps:
    """How long things learn."""

    first: int = 600
    second: int = 1000
    glue: int = 600
    batch: int = 32


@dataclass(frozen=True)
class Suite:
    """One seed.

    Args:
        folder: of the seed.
        seed: of world, experts and glue.
        steps: of training.
        world: what is true in it.
        exam: questions to be scored, by split, the experts' own among them.
        lessons: what glue learns from.
        made_from: what tells this seed's files from others.
    """

    folder: Path
    seed: int
    steps: Steps
    world: World
    exam: Mapping[str, Sequence[Question]]
    lessons: Sequence[Question]
    made_from: Mapping[str, Any]

    def expert(self, name: str) -> str:
        return str(self.folder / "experts" / name)


def open_suite(work: Path, seed: int, sizes: Sizes, steps: Steps) -> Suite:
    """A seed whose experts and files are there, made if they were not."""
    folder = work / f"seed{seed}"
    world = make(sizes, seed)
    exam, lessons = exam_and_lessons(world, sizes, seed)
    own = own_questions(world)
    told = {"sizes": vars(sizes), "seed": seed}
    trained = {**told, "steps": [steps.first, steps.second]}
    parts = {
        FIRST: partial(make_first, world, seed, steps.first),
        SECOND: partial(make_second, world, seed, steps.second),
        UNTRAINED: partial(make_first, world, seed + 1, 0),
        OTHER: partial(make_second, another_table(world, seed), seed + 1, steps.second),
    }
    for name, make_it in parts.items():
        stage(folder, f"experts/{name}", trained, make_it)
    codes = [one for one in own[OWN[0]] if one.prompt.split()[1] not in world.held_names]
    learned = [*lessons, *Random(f"codes {seed}").choices(codes, k=sizes.lessons // 2)]
    kept = keeping(world, sizes, seed)
    for name, some in (("lessons", lessons), ("lessons-of-both", learned), ("keep", kept)):
        stage(folder, f"{name}.jsonl", told, partial(write_rows, some))
    return Suite(folder, seed, steps, world, {**exam, **own}, lessons, {**trained, **vars(steps)})


def router(suite: Suite) -> dict[str, Any]:
    """What a mixture says of its router: it learns from outcomes."""
    return {"kind": "ridge", "outcomes": str(suite.folder / "outcomes.jsonl")}


def write_rows(questions: Sequence[Question], out: Path) -> None:
    rows = [json.dumps({"prompt": one.prompt, "answer": one.answer}) for one in questions]
    out.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")


def right(given: str, one: Question) -> bool:
    """Whether an answer is right. Of a keeper only the name is asked: what follows the colon is not judged."""
    if one.answer.endswith(":"):
        return given.startswith(one.answer)
    return given.strip() == one.answer


def ask(mixture: Mapping[str, Any] | Path, prompts: Sequence[str], expert: str | None = None) -> list[str]:
    """Greedy answers of a mixture, or of one of its experts by itself."""
    from mixmerge import Mixture
    from mixmerge.batch.records import Item

    items = [Item(str(at), prompt, expert=expert) for at, prompt in enumerate(prompts)]
    found = Mixture.load(mixture, answers=True).answer(items)
    faults = {str(one.fault) for one in found if one.fault is not None}
    if faults:
        raise RuntimeError("; ".join(sorted(faults)))
    return [one.text for one in found]


def score(suite: Suite, mixture: Mapping[str, Any] | Path, expert: str | None = None) -> dict[str, list[str]]:
    """Answers to the whole exam, by split."""
    flat = [one.prompt for some in suite.exam.values() for one in some]
    given = iter(ask(mixture, flat, expert))
    return {split: [next(given) for _ in some] for split, some in suite.exam.items()}


def judged(suite: Suite, given: Mapping[str, Sequence[str]]) -> Right:
    """Which answers are right."""
    return {
        split: [right(text, one) for text, one in zip(texts, suite.exam[split], strict=True)]
        for split, texts in given.items()
    }


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@contextmanager
def one_thread() -> Iterator[None]:
    """Models this small are slower on two threads than on one."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    finally:
        torch.set_num_threads(before)
