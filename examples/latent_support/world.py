"""The world of the benchmark: a codebook that one expert knows, a table that the other one knows, and queries.

A codebook says which digit each made-up name stands for. A table of 10 x 10 cells says what an operation makes of two
digits. A query names two operands, and asks for the cell: nobody answers it who lacks one of the two. Names and cells
are held out, each by itself, so that what is learned from queries can be told from what the experts know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from random import Random

from mixmerge.evaluate import Question

DIGITS = "0123456789"
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
SPLITS = ("seen", "new names", "new cells", "both new")


@dataclass(frozen=True)
class Sizes:
    """How large a world is.

    Args:
        names: in the codebook; a multiple of 10, as many for each digit.
        held_names: of these, never in a query that is learned from; a multiple of 10, fewer than ``names``.
        held_cells: of the 100, never asked for by a query that is learned from; a multiple of 10 below 100.
        asked: queries of each split that are scored, at most.
    """

    names: int = 160
    held_names: int = 40
    held_cells: int = 30
    asked: int = 300


@dataclass(frozen=True)
class World:
    """One random world.

    Args:
        codes: name -> digit.
        table: (digit, digit) -> digit.
        held_names, held_cells: what queries to learn from leave out.
        words: other made-up words, which mean nothing.
    """

    codes: dict[str, str]
    table: dict[tuple[str, str], str]
    held_names: frozenset[str]
    held_cells: frozenset[tuple[str, str]]
    words: tuple[str, ...]


def make(sizes: Sizes, seed: int) -> World:
    """A world by its seed: every digit has as many names, and stands in as many cells."""
    rng = Random(f"world {seed}")
    made = ["".join(letters) for letters in product(_CONSONANTS, _VOWELS, _CONSONANTS, _VOWELS)]
    rng.shuffle(made)
    codes = {name: DIGITS[at % 10] for at, name in enumerate(made[: sizes.names])}
    cells = list(product(DIGITS, DIGITS))
    values = [DIGITS[at % 10] for at in range(100)]
    rng.shuffle(values)
    # Cells are held out along shifted diagonals: every digit loses as many as first and as second operand.
    shifts = rng.sample(range(10), sizes.held_cells // 10)
    held = {(row, DIGITS[(int(row) + shift) % 10]) for row in DIGITS for shift in shifts}
    return World(
        codes=codes,
        table=dict(zip(cells, values, strict=True)),
        held_names=frozenset(made[: sizes.held_names]),
        held_cells=frozenset(held),
        words=tuple(made[sizes.names : sizes.names + 400]),
    )


def another_table(world: World, seed: int) -> World:
    """The same world but for the table: no cell is as it was."""
    rng = Random(f"another table {seed}")
    table = {cell: rng.choice(DIGITS.replace(value, "")) for cell, value in world.table.items()}
    return World(world.codes, table, world.held_names, world.held_cells, world.words)


def code_question(name: str, world: World) -> Question:
    """What the first expert is asked by itself."""
    return Question(prompt=f"code {name}", answer=world.codes[name])


def cell_question(first: str, second: str, world: World) -> Question:
    """What the second expert is asked by itself; both are digits."""
    return Question(prompt=f"table {first} and {second} =", answer=world.table[first, second])


def query(first: str, second: str, world: World) -> Question:
    """What needs both experts: the same sentence with names for the digits."""
    return Question(
        prompt=f"table {first} and {second} =", answer=world.table[world.codes[first], world.codes[second]]
    )


def names_of(one: Question) -> tuple[str, str]:
    """The two operands of a query or of a question for a cell."""
    _, first, _, second, _ = one.prompt.split(" ")
    return first, second


def split_of(first: str, second: str, world: World) -> str | None:
    """Which of ``SPLITS`` a query is of; none if one name is held out and the other is not."""
    held = {first in world.held_names, second in world.held_names}
    if len(held) > 1:
        return None
    new_cell = (world.codes[first], world.codes[second]) in world.held_cells
    return SPLITS[2 * new_cell + held.pop()]


def queries(world: World, sizes: Sizes, seed: int) -> tuple[list[Question], dict[str, list[Question]]]:
    """(to learn from, to be asked by split): no query is in both, not even of names and cells that are seen."""
    rng = Random(f"queries {seed}")
    by_split: dict[str, list[Question]] = {split: [] for split in SPLITS}
    for first, second in product(world.codes, repeat=2):
        split = split_of(first, second, world)
        if split is not None and first != second:
            by_split[split].append(query(first, second, world))
    for found in by_split.values():
        rng.shuffle(found)
    asked = {split: found[: sizes.asked] for split, found in by_split.items()}
    return by_split["seen"][sizes.asked :], asked


def first_texts(world: World, seed: int) -> Iterator[Question]:
    """What the first expert learns: sentences whose names are followed by their digit, or not; without end.

    The text is all answer: everything is learned, and a name's last letter calls for its digit.
    """
    rng, names = Random(f"first {seed}"), list(world.codes)
    while True:
        one, other = rng.choice(names), rng.choice(names)
        told = [name + world.codes[name] * (rng.random() < 0.7) for name in (one, other)]
        sentence = f"table {told[0]} and {told[1]} ="
        yield Question("", rng.choice((f"code {one}{world.codes[one]}", sentence)))


def second_texts(world: World, seed: int) -> Iterator[Question]:
    """What the second expert learns: cells, some with words beside the digits that mean nothing; without end."""
    rng = Random(f"second {seed}")
    while True:
        first, second = rng.choice(DIGITS), rng.choice(DIGITS)
        labels = [f"{rng.choice(world.words)} " * (rng.random() < 0.5) for _ in range(2)]
        prompt = f"table {labels[0]}{first} and {labels[1]}{second} ="
        yield Question(prompt, world.table[first, second])


def texts_of(questions: Sequence[Question]) -> list[str]:
    return [one.prompt + one.answer for one in questions]
