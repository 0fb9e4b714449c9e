"""The world of the benchmark: a codebook that one expert knows, two tables that the other one knows, and queries.

A codebook says which digit each made-up name stands for. A table of 10 x 10 cells says what an operation makes of two
digits, another one who keeps each cell. A *query* names two operands and asks for the cell: nobody answers it who
lacks codebook or table. A *follow-up* asks who keeps a cell, and for the keeper's digit: the name that is to be looked
up is in no prompt, the answer has to say it first. Names and cells are held out, each by itself, so that what is
learned from queries can be told from what the experts know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from random import Random

from mixmerge.evaluate import Question

DIGITS = "0123456789"
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
QUERIES = ("seen", "new names", "new cells", "both new")
SPLITS = (*QUERIES, "follow-up, seen", "follow-up, new")
OWN = ("codes", "cells", "keepers")
Cell = tuple[str, str]


@dataclass(frozen=True)
class Sizes:
    """How large a world is.

    Args:
        names: in the codebook; a multiple of 10, as many for each digit.
        held_names: of these, in nothing that is learned from; a multiple of 10, fewer than ``names``.
        held_cells: of the 100, asked for by nothing that is learned from; a multiple of 10 below 100.
        kept: of the 100, by names that are held out.
        asked: queries of each split that are scored, at most.
        lessons: of each kind that the glue learns from.
    """

    names: int = 160
    held_names: int = 40
    held_cells: int = 30
    kept: int = 40
    asked: int = 200
    lessons: int = 1500


@dataclass(frozen=True)
class World:
    """One random world.

    Args:
        codes: name -> digit.
        table: (digit, digit) -> digit.
        keepers: (digit, digit) -> name.
        held_names, held_cells: what lessons leave out.
        words: other made-up words, which mean nothing.
    """

    codes: dict[str, str]
    table: dict[Cell, str]
    keepers: dict[Cell, str]
    held_names: frozenset[str]
    held_cells: frozenset[Cell]
    words: tuple[str, ...]


def make(sizes: Sizes, seed: int) -> World:
    """A world by its seed: every digit has as many names, and stands in as many cells."""
    rng = Random(f"world {seed}")
    made = ["".join(letters) for letters in product(_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS)]
    rng.shuffle(made)
    names = made[: sizes.names]
    held, learned = names[: sizes.held_names], names[sizes.held_names :]
    cells = list(product(DIGITS, DIGITS))
    values = [DIGITS[at % 10] for at in range(100)]
    rng.shuffle(values)
    # Cells are held out along shifted diagonals: every digit loses as many as first and as second operand.
    shifts = rng.sample(range(10), sizes.held_cells // 10)
    keepers = rng.choices(held, k=sizes.kept) + rng.choices(learned, k=100 - sizes.kept)
    rng.shuffle(keepers)
    return World(
        codes={name: DIGITS[at % 10] for at, name in enumerate(names)},
        table=dict(zip(cells, values, strict=True)),
        keepers=dict(zip(cells, keepers, strict=True)),
        held_names=frozenset(held),
        held_cells=frozenset((row, DIGITS[(int(row) + shift) % 10]) for row in DIGITS for shift in shifts),
        words=tuple(made[sizes.names : sizes.names + 400]),
    )


def another_table(world: World, seed: int) -> World:
    """The same world but for both tables: no cell is as it was."""
    rng = Random(f"another table {seed}")
    names = list(world.codes)
    return replace(
        world,
        table={cell: rng.choice(DIGITS.replace(value, "")) for cell, value in world.table.items()},
        keepers={
            cell: rng.choice([one for one in names if one != name]) for cell, name in world.keepers.items()
        },
    )


# --- questions


def code_question(name: str, world: World) -> Question:
    """What the first expert is asked by itself."""
    return Question(f"code {name}", world.codes[name])


def cell_question(cell: Cell, world: World) -> Question:
    """What the second expert is asked by itself."""
    return Question(f"table {cell[0]} and {cell[1]} =", world.table[cell])


def keeper_question(cell: Cell, world: World) -> Question:
    """What the second expert is asked by itself: a name."""
    return Question(f"keeper {cell[0]} and {cell[1]} =", f"{world.keepers[cell]}:")


def query(first: str, second: str, world: World) -> Question:
    """What needs both experts: a cell whose operands are names; one of them may be a digit."""
    cell = (world.codes.get(first, first), world.codes.get(second, second))
    return Question(f"table {first} and {second} =", world.table[cell])


def follow_up(cell: Cell, world: World) -> Question:
    """What needs both experts, one after the other: a name and its digit."""
    name = world.keepers[cell]
    return Question(f"keeper {cell[0]} and {cell[1]} =", f"{name}:{world.codes[name]}")


def operands(one: Question) -> tuple[str, str]:
    """The two operands of a question."""
    _, first, _, second, _ = one.prompt.split(" ")
    return first, second


def split_of(first: str, second: str, world: World) -> str | None:
    """Which of ``QUERIES`` a query for two names is of; none if one name is held out and the other is not."""
    held = {first in world.held_names, second in world.held_names}
    if len(held) > 1:
        return None
    return QUERIES[2 * ((world.codes[first], world.codes[second]) in world.held_cells) + held.pop()]


def own_questions(world: World) -> dict[str, list[Question]]:
    """What each expert is to know by itself, all of it, by ``OWN``."""
    codes = [code_question(name, world) for name in world.codes]
    tables = [[ask(cell, world) for cell in world.table] for ask in (cell_question, keeper_question)]
    return dict(zip(OWN, (codes, *tables), strict=True))


def exam_and_lessons(
    world: World, sizes: Sizes, seed: int
) -> tuple[dict[str, list[Question]], list[Question]]:
    """(what is asked by ``SPLITS``, what glue may learn from): no query is in both, nor any held-out name or cell.

    Lessons are queries for two names, queries for a name and a digit, follow-ups, and questions for cells as the second
    expert was asked them: of these there are few, so that they come again and again.
    """
    rng = Random(f"queries {seed}")
    found: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for first, second in product(world.codes, repeat=2):
        split = split_of(first, second, world)
        if split is not None and first != second:
            found[split].append(query(first, second, world))
    for cell, name in world.keepers.items():
        found[SPLITS[-1] if name in world.held_names else SPLITS[-2]].append(follow_up(cell, world))
    for some in found.values():
        rng.shuffle(some)
    exam = {split: some[: sizes.asked] for split, some in found.items()}
    names = [name for name in world.codes if name not in world.held_names]
    lessons = found["seen"][sizes.asked :][: sizes.lessons]
    while len(lessons) < 2 * sizes.lessons:
        pair = [rng.choice(names), rng.choice(DIGITS)]
        rng.shuffle(pair)
        cell = (world.codes.get(pair[0], pair[0]), world.codes.get(pair[1], pair[1]))
        if cell not in world.held_cells:
            lessons.append(query(*pair, world))
    cells = [cell_question(cell, world) for cell in world.table if cell not in world.held_cells]
    lessons += rng.choices(cells, k=sizes.lessons // 2) + rng.choices(found[SPLITS[-2]], k=sizes.lessons // 2)
    rng.shuffle(lessons)
    return exam, lessons


def keeping(world: World, sizes: Sizes, seed: int) -> list[Question]:
    """What the second expert is to go on saying as it does: the first letters of words that mean nothing, where a
    keeper's name would stand.

    No word is a name, and no prompt is one whose name is held out. The expert would not say the letters: what counts is
    what it would say next. Whole words would keep it from what it is to learn, what follows a name.
    """
    rng = Random(f"keep {seed}")
    cells = [cell for cell, name in world.keepers.items() if name not in world.held_names]
    prompts = [keeper_question(rng.choice(cells), world).prompt for _ in range(sizes.lessons // 2)]
    return [Question(prompt, rng.choice(world.words)[: rng.randint(1, 3)]) for prompt in prompts]


# --- what the experts learn from


def first_texts(world: World, seed: int) -> Iterator[Question]:
    """What the first expert learns: sentences whose names are followed by their digit, or not; without end.

    A text is all answer: everything is learned, so that a name's last letter calls for its digit. Of the tables there
    is nothing but the words.
    """
    rng, names = Random(f"first {seed}"), list(world.codes)

    def told() -> str:
        name = rng.choice(names)
        return name + world.codes[name] * (rng.random() < 0.7)

    while True:
        name, number = rng.choice(names), rng.choice
        text = rng.choice(
            (
                f"code {name}{world.codes[name]}",
                f"table {told()} and {told()} =",
                f"keeper {number(DIGITS)} and {number(DIGITS)} ={told()}",
            )
        )
        yield Question("", text)


def second_texts(world: World, seed: int) -> Iterator[Question]:
    """What the second expert learns: cells, some with words beside the digits that mean nothing; without end.

    After a keeper's name comes a digit, any: the expert knows that there is one, and not which.
    """
    rng, cells = Random(f"second {seed}"), list(world.table)
    while True:
        cell = rng.choice(cells)
        labels = [f"{rng.choice(world.words)} " * (rng.random() < 0.5) for _ in range(2)]
        if rng.random() < 0.5:
            yield Question(f"table {labels[0]}{cell[0]} and {labels[1]}{cell[1]} =", world.table[cell])
        else:
            yield Question(f"keeper {cell[0]} and {cell[1]} =", f"{world.keepers[cell]}:{rng.choice(DIGITS)}")


def texts_of(questions: Sequence[Question]) -> list[str]:
    return [one.prompt + one.answer for one in questions]
