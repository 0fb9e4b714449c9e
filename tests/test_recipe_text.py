"""Recipe text that is no recipe: bad YAML, hostile YAML, files, references, mappings. Nothing raises."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from mixmerge.errors import RecipeError
from mixmerge.recipe import ModelRef, Recipe, dump, parse, read

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.5, density: 0.4}}
"""
LINEAR = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 0.5}}"
OF_TIES = "Known: agg, density, lambda, normalize, rescale, scope, weight."


def faults(text: str) -> list[str]:
    parsed = parse(text)
    assert parsed.recipe is None
    return [str(fault) for fault in parsed.faults]


SYNTAX: dict[str, list[str]] = {
    "": ["recipe: the recipe is empty. It needs merge_method and models."],
    "# nothing\n---\n": ["recipe: the recipe is empty. It needs merge_method and models."],
    "- a": ["recipe: a recipe is a mapping, got a list. It needs merge_method and models."],
    "a: b: c": ["recipe (line 1, column 5): not valid YAML: mapping values are not allowed in this context."],
    "a:\n\tb: 1": [
        "recipe (line 2, column 1): not valid YAML: found character that cannot start any token. "
        "YAML is indented with spaces, not tabs."
    ],
    "a: [1, 2": ["recipe (line 2, column 1): not valid YAML: did not find expected ',' or ']'."],
    "a: \x07": ["recipe: not valid YAML: control characters are not allowed."],
    "a: \ud800": ["recipe: the recipe is not valid Unicode text."],
    f"{LINEAR}\n---\na: b": [
        "recipe (line 2): files with several YAML documents (mergekit-multi) are not supported yet. "
        "Merge one after the other, by their output folders."
    ],
    "a: *b": ["recipe (line 1): alias '*b' refers to nothing defined before it."],
    "a: &a [*a]": ["recipe (line 1): alias '*a' refers to nothing defined before it."],
    "[" * 1_000_000: ["recipe (line 1): the recipe has too many levels of nesting. At most 32."],
    "a: &x [1]\n" + "b: &x [*x]\n" * 40: [
        "recipe (line 31): the recipe has too many levels of nesting. At most 32."
    ],
    " " * 10_000_001: ["recipe: the recipe has too many characters. At most 10,000,000."],
    f"{LINEAR[:-1]}, <<: [1], 1: 2, [a]: 3}}": [
        "recipe (line 1): a key must be text, got 1. Write it in quotes.",
        "recipe (line 1): a key must be text, got a list. Write it in quotes.",
        "recipe (line 1): << needs a mapping to merge in.",
    ],
    f"{LINEAR[:-1]}, seed: 0b_, dtype: !!bool maybe}}": [
        "recipe (line 1): '0b_' is not a value of type int.",
        "recipe (line 1): 'maybe' is not a value of type bool.",
        "dtype (line 1): no dtype is called 'maybe'. Known: bfloat16, float16, float32, float64.",
        "seed (line 1): expected a whole number, got '0b_'. From 0 to 2^64 - 1 (18446744073709551615).",
    ],
}


@pytest.mark.parametrize(("text", "expected"), SYNTAX.items(), ids=[repr(text[:20]) for text in SYNTAX])
def test_syntax(text: str, expected: list[str]) -> None:
    assert faults(text) == expected


def test_tags_are_refused_and_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    text = f"{LINEAR[:-1]}, dtype: !!python/object/apply:os.mkdir ['{mark}'], seed: !local 3}}"
    found = faults(text)
    assert found[:2] == [
        "recipe (line 1): the YAML tag '!!python/object/apply:os.mkdir' is not allowed. Plain values only.",
        "recipe (line 1): the YAML tag '!local' is not allowed. Plain values only.",
    ]
    assert not mark.exists()


def test_alias_bomb_is_refused_at_once() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    started = time.process_time()  # whatever else the machine does
    assert faults("\n".join(lines)) == [
        "recipe (line 6): the recipe has too many values, aliases expanded. At most 200,000."
    ]
    assert time.process_time() - started < 1


def test_at_most_a_hundred_faults_are_listed() -> None:
    found = faults("\n".join(f"key{n}: {n}" for n in range(2_000)))
    assert len(found) == 101
    assert found[-1].endswith("more faults are not shown.")


REFS: list[tuple[Any, list[str]]] = [
    ("a+b+c", [": 'a+b+c' has more than one +"]),
    ("a@b@c", [": 'a@b@c' has more than one @"]),
    ("a@", [": 'a@' has an empty part"]),
    ("'+b'", [": '' has an empty part"]),
    ("' a'", [": ' a' has spaces at an end"]),
    ("''", [": '' has an empty part"]),
    ("3", [": expected a model folder or hub id, got 3. Write it in quotes"]),
    ("[a]", [": expected a model folder or hub id, got a list"]),
    ('"a\\nb"', [": expected a model folder or hub id, got text with control characters"]),
    ("{path: a}", [".path (line 1): unknown key 'path'", ": the key model is missing"]),
    ("{model: {}}", [".model (line 1): the key path is missing"]),
    (
        "{model: {path: a, revison: b}}",
        [".model.revison (line 1): unknown key 'revison'. Did you mean 'revision'?"],
    ),
    (
        "{model: {path: a, revision: 1}}",
        [".model.revision (line 1): expected text, got 1. Write it in quotes"],
    ),
    ("{model: {path: ' '}}", [".model.path (line 1): ' ' is empty or has spaces at an end"]),
    ("{model: a, lora: b@c@d}", [".lora (line 1): 'b@c@d' has more than one @"]),
    ("{model: a, lora: 1}", [".lora (line 1): expected a path or {path: ..., revision: ...}, got 1"]),
]


@pytest.mark.parametrize(("written", "expected"), REFS)
def test_faulty_references(written: str, expected: list[str]) -> None:
    found = faults(f"{{models: [{{model: {written}}}], merge_method: linear, parameters: {{weight: 1}}}}")
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        place = "" if start.startswith(".") else " (line 1)"
        assert line.startswith(f"models[0].model{place}{start}")


@pytest.mark.parametrize(
    ("written", "ref"),
    [
        ("a", ModelRef("a")),
        ("a@v1+b@v2", ModelRef("a", "v1", "b", "v2")),
        ("2024-05-01", ModelRef("2024-05-01")),
        ("{model: a@v1, lora: b}", ModelRef("a", "v1", "b")),
        ("{model: {path: x+y@z, revision: r}, lora: {path: 'q@'}}", ModelRef("x+y@z", "r", "q@")),
        ("{model: {path: a, revision: }, lora: }", ModelRef("a")),
    ],
)
def test_references_round_trip(written: str, ref: ModelRef) -> None:
    recipe = parse(f"merge_method: passthrough\nmodels: [{{model: {written}}}]").require()
    assert recipe.models[0].model == ref
    assert parse(dump(recipe)).require() == recipe
    assert str(ModelRef("a", "v1", "b", "v2")) == "a@v1+b@v2"


def test_refs_are_given_even_with_faults() -> None:
    parsed = parse(
        "base_model: b@1\nmerge_method: nope\nmodels: [{model: x}, {model: 'a@@'}, {model: {model: y}}]"
    )
    assert parsed.recipe is None
    assert parsed.refs == (
        ("base_model", ModelRef("b", "1")),
        ("models[0].model", ModelRef("x")),
        ("models[2].model", ModelRef("y")),
    )
    with pytest.raises(RecipeError, match="no merge method is called 'nope'"):
        parsed.require()


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + TIES.encode())
    parsed = read(file)
    assert parsed.faults == ()
    assert parsed.text.removeprefix("\ufeff") == TIES
    assert read(str(file)) == parsed
    file.write_bytes(b"a: \xff")
    assert [str(fault) for fault in read(file).faults] == [
        f"{file}: the recipe is not UTF-8 text (byte 3). Save it as UTF-8."
    ]
    file.write_text("a: b: c")
    assert str(read(file).faults[0]).startswith(f"{file} (line 1, column 5): not valid YAML")
    with file.open("wb") as stream:
        stream.truncate(10_000_001)
    assert [fault.what for fault in read(file).faults] == ["the recipe is too large"]
    assert [str(fault) for fault in read(tmp_path).faults] == [
        f"{tmp_path}: cannot read the recipe: Is a directory."
    ]
    assert "No such file" in str(read(tmp_path / "none.yaml").faults[0])
    assert str(read(TIES).faults[0]).endswith("recipe.parse reads YAML text.")
    assert read("a\0b").faults[0].what == "cannot read the recipe: not a file name"


def test_mappings() -> None:
    mapping = {
        "merge_method": "ties",
        "base_model": Path("base"),
        "models": ({"model": ModelRef("a+b"), "parameters": {"weight": 1}}, {"model": "c"}),
        "parameters": {"weight": 0.5, "densty": 1},
        "seed": 10**400,
        "dtype": object(),
        3: 4,
    }
    assert [str(fault) for fault in read(mapping).faults] == [
        "seed: a number of hundreds of digits cannot stand in a recipe. "
        "Text, numbers, lists and mappings can.",
        "dtype: a object cannot stand in a recipe. Text, numbers, lists and mappings can.",
        "recipe: a key must be text, got 3.",
        f"parameters.densty: unknown parameter 'densty'. Did you mean 'density'? {OF_TIES}",
    ]
    good = {key: mapping[key] for key in ("merge_method", "base_model", "models")} | {
        "parameters": {"weight": 0.5}
    }
    parsed = read(good)
    recipe = parsed.require()
    assert recipe.models[0].model == ModelRef("a+b")
    assert parse(parsed.text).recipe == recipe == read(recipe).recipe
    good["parameters"] = {"weight": np.float32(0.5), "normalize": np.bool_(True)}
    assert read(good).require().parameters["normalize"][0].value == (True,)
    nested: dict[str, Any] = {}
    nested["parameters"] = nested
    assert "too many levels of nesting" in str(read(nested).faults[0])


def test_recipes_are_frozen_and_closed() -> None:
    recipe = parse(TIES).require()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3  # type: ignore[misc]
    with pytest.raises(ValueError, match="sede"):
        Recipe(merge_method="ties", models=(), sede=1)  # type: ignore[call-arg]


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["models", "model", "parameters", "weight", "value", "filter", "merge_method", "lora", "x"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@budget(max_examples=80, deadline=None)
@given(
    junk,
    st.dictionaries(
        st.sampled_from(["models", "base_model", "parameters", "dtype", "output", "seed", "a b"]), junk
    ),
)
def test_no_mapping_raises(parameters: Any, more: dict[str, Any]) -> None:
    parsed = read({"merge_method": "ties", "parameters": parameters, **more})
    assert (parsed.recipe is None) == bool(parsed.faults)


@budget(max_examples=80, deadline=None)
@given(st.text(max_size=60) | st.text("ab:-[]{}&*!<>'\"?|#%@`, \n1", max_size=60))
def test_no_text_raises(text: str) -> None:
    parsed = parse(text)
    assert (parsed.recipe is None) == bool(parsed.faults)


def test_reading_is_light() -> None:
    code = (
        "import sys, mixmerge.recipe\nmixmerge.recipe.parse('a: 1')\n"
        "print(*{'torch', 'numpy', 'numba', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
