"""``examples/latent_codebook.py`` in small: its world, its splits, its table by hand, and a seed end to end."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parent.parent / "examples")


def test_nothing_held_out_is_in_the_lessons() -> None:
    from latent_support.world import QUERIES, SPLITS, Sizes, exam_and_lessons, make, operands

    sizes = Sizes()
    world = make(sizes, 3)
    exam, lessons = exam_and_lessons(world, sizes, 3)
    assert make(sizes, 3) == world != make(sizes, 4)
    assert len(lessons) == 3 * sizes.lessons
    asked = {one.prompt for split in QUERIES for one in exam[split]}
    asked |= {one.prompt for one in exam[SPLITS[-1]]}
    assert not asked & {one.prompt for one in lessons}
    for one in lessons:
        first, second = operands(one)
        assert not {first, second, one.answer[:4]} & world.held_names
        if one.prompt.startswith("table"):
            cell = (world.codes.get(first, first), world.codes.get(second, second))
            assert cell not in world.held_cells
            assert one.answer == world.table[cell]
    for one in exam["both new"]:
        assert set(operands(one)) <= world.held_names
        assert tuple(world.codes[name] for name in operands(one)) in world.held_cells
    assert all(one.answer[:4] in world.held_names for one in exam["follow-up, new"])


def test_what_is_to_be_kept_says_nothing_of_what_is_asked() -> None:
    from latent_support.world import SPLITS, Sizes, exam_and_lessons, keeping, make

    sizes = Sizes()
    world = make(sizes, 3)
    exam, _ = exam_and_lessons(world, sizes, 3)
    kept = keeping(world, sizes, 3)
    assert len(kept) == sizes.lessons // 2
    assert not {one.prompt for one in exam[SPLITS[-1]]} & {one.prompt for one in kept}
    starts = {word[:count] for word in world.words for count in (1, 2, 3)}
    assert {one.answer for one in kept} <= starts
    assert {len(one.answer) for one in kept} == {1, 2, 3}, "no name is ever whole"


def test_every_digit_has_as_many_names_and_loses_as_many_cells() -> None:
    from collections import Counter

    from latent_support.world import Sizes, another_table, make

    world = make(Sizes(), 0)
    assert set(Counter(world.codes.values()).values()) == {16}
    assert set(Counter(world.table.values()).values()) == {10}
    for place in (0, 1):
        assert set(Counter(cell[place] for cell in world.held_cells).values()) == {3}
    other = another_table(world, 0)
    assert not any(other.table[cell] == value for cell, value in world.table.items())
    assert other.codes == world.codes


def test_no_expert_is_told_what_the_other_knows() -> None:
    from latent_support.world import Sizes, first_texts, make, second_texts

    world = make(Sizes(), 0)
    tables = [one.answer for one in islice(first_texts(world, 0), 300) if one.answer.startswith("table")]
    assert tables
    assert all(text.endswith(" =") for text in tables)
    told: dict[str, set[str]] = {}
    for one in islice(second_texts(world, 0), 6000):
        words = set(one.prompt.split())
        assert not words & world.codes.keys()
        if one.prompt.startswith("keeper"):
            name, _, digit = one.answer.partition(":")
            told.setdefault(name, set()).add(digit)
    assert max(map(len, told.values())) == 10  # any digit


def test_an_answer_is_right() -> None:
    from latent_support.suite import right

    from mixmerge.evaluate import Question

    assert right("7", Question("table", "7"))
    assert not right("71", Question("table", "7"))
    assert right("kobu:3", Question("keeper", "kobu:"))
    assert not right("kobo:3", Question("keeper", "kobu:"))


def test_a_shuffle_leaves_nothing_in_place() -> None:
    from latent_support.controls import _moved

    moved = _moved(20, 1)
    assert sorted(moved) == list(range(20))
    assert all(at != place for at, place in enumerate(moved))


def test_the_table_and_the_bar_by_hand(tmp_path: Path) -> None:
    from latent_support.page import report_text, write_table
    from latent_support.world import OWN, SPLITS, Sizes, exam_and_lessons, make, own_questions

    sizes = Sizes(asked=40)
    world = make(sizes, 0)
    exam, _ = exam_and_lessons(world, sizes, 0)
    counts = {split: len(some) for split, some in {**exam, **own_questions(world)}.items()}

    def put(name: str, share: float, own: float, *, control: bool) -> None:
        right = {
            split: [at < (own if split in OWN else share) * count for at in range(count)]
            for split, count in counts.items()
        }
        folder = tmp_path / "seed0" / "results"
        folder.mkdir(parents=True, exist_ok=True)
        made = {"name": name, "control": control, "right": right}
        (folder / f"{name}.json").write_text(json.dumps(made))

    put("routing", 0.1, 1.0, control=True)
    put("latent, good", 0.5, 1.0, control=False)
    put("latent, poor", 0.25, 0.9, control=False)
    text = report_text(tmp_path, ["routing"], sizes)
    assert "Best control on queries whose names and cells are new: routing, 10.0%" in text
    good, poor = (line for line in text.splitlines() if line.startswith("- latent"))
    assert good.startswith("- latent, good: +40.0 points")
    assert ": met; own tasks kept" in good
    assert ": NOT met; own tasks NOT all kept" in poor
    shown = report_text(tmp_path, ["routing"], sizes, ablations=["latent, poor"])
    assert "| latent, poor |" in shown
    assert [line for line in shown.splitlines() if line.startswith("- latent")] == [good]
    write_table(tmp_path)
    kept = json.loads((tmp_path / "table.json").read_text())
    assert kept["latent, good"]["mean"][SPLITS[3]] == 0.5
    assert report_text(tmp_path / "nothing", [], sizes) == "not run yet\n"


@pytest.mark.slow
def test_a_seed_end_to_end_in_small(tmp_path: Path) -> None:
    from latent_support.controls import run_controls
    from latent_support.page import report_text
    from latent_support.plain import PLAIN, make_outcomes, run_plain
    from latent_support.rows import ROUTER, Row, glue_parameters, run_row
    from latent_support.suite import Steps, open_suite
    from latent_support.world import Sizes

    pytest.importorskip("peft")
    sizes = Sizes(names=20, held_names=10, held_cells=20, kept=20, asked=6, lessons=30)
    suite = open_suite(tmp_path, 0, sizes, Steps(first=2, second=2, glue=2, batch=4))
    make_outcomes(suite)
    rows = (
        Row("latent, one"),
        Row("latent, two", mode="lockstep", longer=1.5, keep=True),
        Row("latent, three", route=ROUTER),
    )
    for row in rows:
        run_row(suite, row)
    told = json.loads((tmp_path / "seed0" / "glue" / "latent-two" / "training.json").read_text())
    assert (told["steps"], told["points"][0]["keep"]) == (3, 0.0)
    run_plain(suite, lora=lambda: glue_parameters(suite, rows[0]))
    run_controls(suite, shuffled=rows[0], unmasked=rows[0])
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("results/*.json")}
    assert len(before) == len(rows) + len(PLAIN) + 2
    run_row(suite, rows[0])  # what is there stays
    assert {file: file.stat().st_mtime_ns for file in before} == before
    text = report_text(tmp_path, [*PLAIN, *(row.name for row in rows)], sizes)
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines()[2:6]] == list(PLAIN[:4])
