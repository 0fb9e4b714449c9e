"""The block ``calibration:``: its canonical form, and the exact words for what can be wrong with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mixmerge.document import Kind, Report, load
from mixmerge.methods import METHODS
from mixmerge.recipe import Calibration, ModelRef, dump, parse
from mixmerge.recipe.calibration import read_calibration

LEARNS = replace(METHODS["linear"], name="learns", statistics="anything")
EXPERTS = [ModelRef("./experts/math"), ModelRef("org/code"), ModelRef("base", adapter="adapters/tutor")]


def block(text: str, *, experts: list[ModelRef] | None = EXPERTS) -> tuple[Calibration | None, list[str]]:
    report = Report(Kind("recipe", needs=""))
    root = load(text, name="recipe", report=report)
    top = root.value if root and isinstance(root.value, dict) else {}
    found = read_calibration(top, LEARNS, experts, report)
    return found, [str(fault) for fault in report.faults("recipe")]


def test_defaults_and_canonical_form() -> None:
    found, faults = block("calibration: {data: rows.jsonl}")
    assert (found, faults) == (Calibration(data="rows.jsonl"), [])
    assert found is not None
    assert found.canonical() == {
        "data": "rows.jsonl",
        "max_examples": 256,
        "max_tokens": 512,
        "layout": "padded",
        "batch_size": 8,
        "transductive": False,
    }


def test_experts_by_reference_and_by_last_part() -> None:
    text = (
        "calibration: {per_expert: {./experts/math: m.jsonl, code: c.jsonl, tutor: builtin:docs},"
        " max_examples: 5, max_tokens: 64, split: dev, layout: packed, batch_size: 2, transductive: true}"
    )
    found, faults = block(text)
    assert faults == []
    assert found is not None
    assert [found.source(expert) for expert in EXPERTS] == ["m.jsonl", "c.jsonl", "builtin:docs"]
    assert list(found.canonical()["per_expert"]) == ["./experts/math", "base+adapters/tutor", "org/code"]
    assert (found.layout, found.split, found.transductive, found.batch_size) == ("packed", "dev", True, 2)
    found, faults = block("calibration: {data: all.jsonl, per_expert: {code: c.jsonl}}")
    assert faults == []
    assert found is not None
    assert [found.source(expert) for expert in EXPERTS] == ["all.jsonl", "c.jsonl", "all.jsonl"]


DATA = "A file of rows, a data set of the hub, or builtin:NAME."
KNOWN = "Known: batch_size, data, layout, max_examples, max_tokens, per_expert, split, transductive."
NAMES = "Known: ./experts/math, base+adapters/tutor, org/code."
WRONG: dict[str, list[str]] = {
    "seed: 1": [
        f"calibration: learns learns from data, and the recipe has none. {DATA} Add calibration: {{data: PATH}}."
    ],
    "calibration: rows.jsonl": [
        "calibration (line 1): expected a mapping of where the data is, and how much of it to use, "
        "got 'rows.jsonl'."
    ],
    "calibration: {}": [
        f"calibration (line 1): names no data. {DATA} Add data: PATH, or per_expert: {{EXPERT: PATH}}."
    ],
    "calibration: {data: a, max_example: 3}": [
        f"calibration.max_example (line 1): unknown key 'max_example'. Did you mean 'max_examples'? {KNOWN}"
    ],
    "calibration: {data: a, max_examples: 0, max_tokens: 1, batch_size: 2.5}": [
        "calibration.max_examples (line 1): expected a whole number, got 0. From 1 to 10,000,000.",
        "calibration.max_tokens (line 1): expected a whole number, got 1. From 2 to 1,000,000.",
        "calibration.batch_size (line 1): expected a whole number, got 2.5. From 1 to 10,000.",
    ],
    "calibration: {data: a, layout: pack}": [
        "calibration.layout (line 1): no layout is called 'pack'. Did you mean 'packed'? "
        "Known: packed, padded."
    ],
    "calibration: {data: a, transductive: maybe}": [
        "calibration.transductive (line 1): expected true or false, got 'maybe'."
    ],
    "calibration: {data: 3, split: ''}": [
        "calibration.data (line 1): expected a file of rows, a data set of the hub, or builtin:NAME, got 3. "
        "Write it in quotes.",
        "calibration.split (line 1): is empty. The name of a split, such as train.",
    ],
    "calibration: {data: a, per_expert: {cod: c}}": [
        f"calibration.per_expert.cod (line 1): no expert is called 'cod'. {NAMES}"
    ],
    "calibration: {per_expert: {code: c, org/code: d, math: m}}": [
        "calibration.per_expert.org/code (line 1): the data of org/code is given twice. Keep one of the two.",
        "calibration.per_expert (line 1): base+adapters/tutor has no data, and learns needs some of every "
        "expert. Add it to per_expert, or add data: PATH for the rest.",
    ],
}


@pytest.mark.parametrize("text", WRONG)
def test_faults(text: str) -> None:
    assert block(text)[1] == WRONG[text]


def test_two_experts_with_one_last_part() -> None:
    experts = [ModelRef("a/code"), ModelRef("b/code")]
    _, faults = block("calibration: {data: x, per_expert: {code: c}}", experts=experts)
    assert faults == [
        "calibration.per_expert.code (line 1): 'code' may be a/code or b/code. "
        "Name the expert as the recipe writes it."
    ]


def test_one_expert_twice_is_one_expert() -> None:
    made, faults = block("calibration: {per_expert: {code: c}}", experts=[ModelRef("a/code")] * 2)
    assert (made and made.per_expert, faults) == ({"a/code": "c"}, [])


def test_a_method_without_data_drops_the_block_and_says_so() -> None:
    text = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}, calibration: {data: c}}"
    parsed = parse(text)
    assert parsed.warnings == ("calibration (line 1): has no effect: linear uses no data. Remove it.",)
    assert parsed.require().calibration is None
    assert "calibration" not in dump(parsed.require())
