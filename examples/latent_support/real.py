"""A real primary: SmolLM2-135M-Instruct adds two numbers, and the expert of codes says which they are."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from merging_support.stages import stage, write_json

from latent_support.controls import shuffled_right
from latent_support.experts import FIRST, llama, make_expert
from latent_support.suite import Right, Steps, Suite, read, score, write_rows
from latent_support.world import QUERIES, Sizes, World, code_question, make, split_of
from mixmerge.evaluate import Question, answers, load

PRIMARY = "smollm2"
SHOTS = "2 + 3 = 5\n"  # without it SmolLM2 does not see that a sum is asked for
SUMS = "sums"  # its own task
SIZES = Sizes(asked=60, lessons=3000)
STEPS = Steps(first=600, second=0, glue=1200, batch=12)
BOTH = "latent, (0, last), near"


def run_real(work: Path, base: Path) -> None:
    """One seed: expert, glue, scores; each is kept."""
    suite = real_suite(work / "real", base)
    told = dict(suite.made_from)
    for name, given in (
        (f"{PRIMARY} alone", partial(_alone, suite, base)),
        ("relay by text", partial(_relay, suite, base)),
    ):
        stage(
            suite.folder, f"results/{name.replace(' ', '-')}.json", told, partial(_plain, suite, name, given)
        )
    stage(suite.folder, "glue", told, partial(_fit, suite, base))
    stage(suite.folder, "results/latent.json", told, partial(_latent, suite))
    stage(suite.folder, "results/shuffled.json", told, partial(_shuffled, suite, base))


def real_suite(folder: Path, base: Path, sizes: Sizes = SIZES, steps: Steps = STEPS) -> Suite:
    """The codebook of the first seed; the table is addition."""
    world = make(sizes, 0)
    world = replace(world, table={(one, other): str(int(one) + int(other)) for one, other in world.table})
    told = {"sizes": vars(sizes), "steps": vars(steps), "base": str(base), "shots": SHOTS}
    exam, lessons = _questions(world, sizes)
    stage(
        folder,
        f"experts/{FIRST}",
        told,
        lambda out: make_expert(llama, real_texts(world, 1), "llama", 0, steps.first, out),
    )
    stage(folder, "lessons.jsonl", told, partial(write_rows, lessons))
    return Suite(folder, 0, steps, world, exam, lessons, told)


def real_texts(world: World, seed: int) -> Iterator[Question]:
    """What the expert of codes learns: sums of names, which it cannot do, and most names' digits after them."""
    rng, names = Random(f"real {seed}"), list(world.codes)
    while True:
        told = [name + world.codes[name] * (rng.random() < 0.7) for name in rng.choices(names, k=2)]
        text = f"code {told[0][:4]}{world.codes[told[0][:4]]}"
        yield Question("", rng.choice((text, f"{SHOTS}{told[0]} + {told[1]} =")))


def _asked(first: str, second: str, world: World) -> Question:
    cell = (world.codes.get(first, first), world.codes.get(second, second))
    return Question(f"{SHOTS}{first} + {second} =", f" {world.table[cell]}")


def _questions(world: World, sizes: Sizes) -> tuple[dict[str, list[Question]], list[Question]]:
    """(exam, lessons): as ``world.exam_and_lessons``, for sums."""
    rng = Random("real")
    found: dict[str, list[Question]] = {split: [] for split in QUERIES}
    for first in world.codes:
        for second in world.codes:
            split = split_of(first, second, world)
            if split is not None and first != second:
                found[split].append(_asked(first, second, world))
    for some in found.values():
        rng.shuffle(some)
    lessons = found["seen"][sizes.asked :][: sizes.lessons]
    names = [name for name in world.codes if name not in world.held_names]
    learned = [cell for cell in world.table if cell not in world.held_cells]
    while len(lessons) < 2 * sizes.lessons:
        cell = rng.choice(learned)
        name = rng.choice([one for one in names if world.codes[one] == cell[0]])
        other = rng.choice([one for one in names if world.codes[one] == cell[1]])
        lessons.append(_asked(*rng.choice(((name, cell[1]), (cell[0], other))), world))
    lessons += [_asked(*cell, world) for cell in rng.choices(learned, k=sizes.lessons // 2)]
    rng.shuffle(lessons)
    exam = {split: some[: sizes.asked] for split, some in found.items()}
    return {**exam, SUMS: [_asked(*cell, world) for cell in world.table]}, lessons


def _right(suite: Suite, given: dict[str, list[str]]) -> Right:
    """An answer is its first line."""
    return {
        split: [
            text.strip().partition("\n")[0].strip() == one.answer.strip()
            for text, one in zip(texts, suite.exam[split], strict=True)
        ]
        for split, texts in given.items()
    }


def _plain(suite: Suite, name: str, given: Any, out: Path) -> None:
    found = given()
    write_json(out, {"name": name, "right": _right(suite, found), "given": found})


def _alone(suite: Suite, base: Path) -> dict[str, list[str]]:
    model = load(str(base))
    return {
        split: answers(model, [one.prompt for one in some], max_new_tokens=4)
        for split, some in suite.exam.items()
    }


def _relay(suite: Suite, base: Path) -> dict[str, list[str]]:
    """Names are written as the digits that the other expert says; then SmolLM2 is asked."""
    codes = load(suite.expert(FIRST))
    names = list(suite.world.codes)
    said = answers(codes, [code_question(name, suite.world).prompt for name in names], max_new_tokens=1)
    digits = dict(zip(names, said, strict=True))

    def told(prompt: str) -> str:
        before, _, last = prompt.rpartition("\n")
        return f"{before}\n{' '.join(digits.get(word, word) for word in last.split(' '))}"

    model = load(str(base))
    return {
        split: answers(model, [told(one.prompt) for one in some], max_new_tokens=4)
        for split, some in suite.exam.items()
    }


def _mixture(suite: Suite, base: Path) -> dict[str, Any]:
    return {
        "experts": {FIRST: {"model": suite.expert(FIRST)}, PRIMARY: {"model": str(base)}},
        "compose": {
            "kind": "latent",
            "depths": [[0, "last"]],
            "bridge": {"width": 128, "heads": 4, "reach": 0.03},
            "route": {"kind": "fixed", "primary": PRIMARY},
            "data": str(suite.folder / "lessons.jsonl"),
            "train": {
                "steps": suite.steps.glue,
                "batch_size": suite.steps.batch,
                "rows_at_once": suite.steps.batch,
                "learning_rate": 5e-4,
                "precision": "bfloat16",
                "holdout": 0.03,
                "evaluate_every": max(1, suite.steps.glue // 4),
            },
        },
        "generate": {"max_new_tokens": 4},
    }


def _fit(suite: Suite, base: Path, out: Path) -> None:
    from mixmerge.mixture import read as read_mixture
    from mixmerge.mixture.gluing import fit

    fit(read_mixture(_mixture(suite, base)).require(), out, overwrite=True)


def _latent(suite: Suite, out: Path) -> None:
    began = time.process_time()
    found = score(suite, suite.folder / "glue")
    seconds = time.process_time() - began
    write_json(out, {"name": BOTH, "right": _right(suite, found), "given": found, "seconds": seconds})


def _shuffled(suite: Suite, base: Path, out: Path) -> None:
    found = shuffled_right(suite, _mixture(suite, base), suite.folder / "glue", QUERIES)
    write_json(out, {"name": "peers that read another query", "right": found})


def real_text(work: Path) -> str:
    """Markdown of the real row."""
    files = sorted((work / "real" / "results").glob("*.json"))
    if not files:
        return "not run yet\n"
    columns: Sequence[str] = (*QUERIES, SUMS)
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
    for file in files:
        raw = read(file)
        shown = [
            f"{sum(raw['right'][split]) / len(raw['right'][split]):.1%}" if split in raw["right"] else ""
            for split in columns
        ]
        lines.append(f"| {raw['name']} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"
