"""Reading recipes: what is accepted and what it becomes, and the exact words for everything that is not."""

from __future__ import annotations

import pytest

from mixmerge.recipe import (
    Conditional,
    ModelEntry,
    ModelRef,
    Output,
    Parsed,
    Recipe,
    canonical,
    dump,
    parse,
)

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.5, density: 0.4}}
"""
LINEAR = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 0.5}}"


def only(value: float | bool | str) -> tuple[Conditional, ...]:
    return (Conditional(None, (value,)),)


def fine(text: str) -> Parsed:
    parsed = parse(text)
    assert parsed.faults == ()
    assert parsed.text == text
    return parsed


def ties(**extra: str) -> str:
    return TIES + "".join(f"{key}: {value}\n" for key, value in extra.items())


def with_weight(weight: str) -> str:
    return LINEAR.replace("0.5", weight)


def test_canonical_form() -> None:
    recipe = fine(
        TIES + "dtype: torch.float16\nparameters: {lambda: 1e-1, normalize: off}\nseed: 7"
    ).require()
    assert recipe == Recipe(
        merge_method="ties",
        base_model=ModelRef("base"),
        models=(
            ModelEntry(model=ModelRef("a"), parameters={"weight": only(1.0)}),
            ModelEntry(model=ModelRef("b"), parameters={"density": only(0.4), "weight": only(0.5)}),
        ),
        parameters={"lambda": only(0.1), "normalize": only(False)},
        dtype="float16",
        seed=7,
        output=Output(shard_size=5_000_000_000),
    )
    assert canonical(recipe) == {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 1.0}},
            {"model": "b", "parameters": {"density": 0.4, "weight": 0.5}},
        ],
        "parameters": {"lambda": 0.1, "normalize": False},
        "dtype": "float16",
        "seed": 7,
        "output": {"shard_size": 5_000_000_000},
    }


def test_every_spelling_has_the_same_dump() -> None:
    one = "parameters: {weight: [1, 0.5], normalize: yes, }\n"
    two = "parameters: {normalize: 1, weight: [{filter: '*', value: ['1e0', 5.0e-1]}]}\nseed: 0\ndtype: ~\n"
    head = "merge_method: linear\nmodels: [{model: a, parameters: }, {model: {model: {path: b}}}]\n"
    first, second = fine(head + one).require(), fine(head + two).require()
    assert first == second
    assert dump(first) == dump(second)
    assert dump(first) == (
        "merge_method: linear\nmodels:\n- {model: a}\n- {model: b}\nparameters:\n  normalize: true\n"
        "  weight: [1.0, 0.5]\nseed: 0\noutput: {shard_size: 5000000000}\n"
    )


MERGEKIT_STYLE = {
    "ties, weights and densities as gradients, a filtered weight, base not listed": """
models:
  - model: org/maths-13b
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: org/code-13b
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: org/chat-13b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base-13b
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "ties without normalising": """
models:
  - {model: org/a, parameters: {density: 0.5, weight: 0.5}}
  - {model: org/b, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: org/base
parameters:
  normalize: false
  int8_mask: true
dtype: float16
""",
    "linear, no base": """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
    "slerp over models, base listed, filters with gradients": """
models: [{model: a}, {model: b}]
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: bfloat16
""",
    "a single conditional, not in a list; anchors and merge keys": """
merge_method: dare_ties
base_model: &base ./base@v1
models:
  - model: *base
  - &expert
    model: ./a+./lora@main
    parameters: &same {weight: {filter: '*', value: 0.4}, density: 5e-1}
  - <<: *expert
    model: ./b
  - {model: ./c, parameters: {<<: *same, weight: 1}}
parameters: {}
""",
    "passthrough": "{merge_method: passthrough, models: [{model: a}], base_model: a}",
}


@pytest.mark.parametrize("text", MERGEKIT_STYLE.values(), ids=MERGEKIT_STYLE)
def test_mergekit_recipes(text: str) -> None:
    parsed = fine(text)
    recipe = parsed.require()
    assert parse(dump(recipe)).require() == recipe
    assert all("int8_mask has no effect" in warning for warning in parsed.warnings)
    assert len(parsed.warnings) == text.count("int8_mask")


def test_merge_keys_and_aliases_mean_what_yaml_says() -> None:
    recipe = fine(MERGEKIT_STYLE["a single conditional, not in a list; anchors and merge keys"]).require()
    assert recipe.models[0].model == recipe.base_model == ModelRef("./base", "v1")
    assert recipe.models[1].model == ModelRef("./a", None, "./lora", "main")
    assert recipe.models[2].parameters == recipe.models[1].parameters
    assert recipe.models[3].parameters == {"weight": only(1.0), "density": only(0.5)}


@pytest.mark.parametrize(
    "text",
    [
        with_weight("[1, -1]"),  # zero in the middle layers only: said when a tensor is resolved
        with_weight("{filter: mlp, value: 1}"),  # a tensor may be left without: said when it is resolved
        "{merge_method: linear, models: [{model: a}], parameters: {weight: 0, normalize: no}}",
        TIES.replace("0.5", "-1"),  # the divisor of an election is not the plain sum
        ties(parameters="{agg: mean, normalize: true, scope: model, density: 0.5}"),
        ties(parameters="{agg: sum, lambda: -3, density: 0}"),
        ties(slices="", modules="{}", tokenizer="~", output="", parameters=""),
        ties(seed="18446744073709551615", output="{shard_size: 1.5GiB}", out_dtype="float64"),
    ],
)
def test_accepted(text: str) -> None:
    recipe = fine(text).require()
    assert parse(dump(recipe)).require() == recipe


def test_dropped_parameters_are_not_in_the_recipe() -> None:
    recipe = fine(TIES.replace("weight: 1.0", "weight: 1.0, normalize: 7, int8_mask: yes")).require()
    assert recipe.models[0].parameters == {"weight": only(1.0)}


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("5GB", 5 * 10**9),
        ("5B", 5 * 10**9),
        ("200M", 2 * 10**8),
        ("'1.5 GiB'", 1610612736),
        ("7", 7),
        ("2kb", 2000),
    ],
)
def test_shard_size(written: str, size: int) -> None:
    assert fine(ties(output=f"{{shard_size: {written}}}")).require().output == Output(shard_size=size)
