"""The exact words for everything a recipe can get wrong, and for what it says in vain."""

from __future__ import annotations

import pytest

from mixmerge.methods import METHODS as TABLE
from mixmerge.recipe import parse, read

TIES = """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.5, density: 0.4}}
"""
LINEAR = "{merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 0.5}}"
KEYS = (
    "Known: base_model, calibration, coefficients, dtype, merge_method, models, out_dtype, output, parameters, seed, "
    "tuned_on."
)
METHODS = f"Known: {', '.join(sorted(TABLE))}."
NAMES = sorted({parameter.name for row in TABLE.values() for parameter in row.parameters})
OF_TIES = "Known: agg, density, lambda, normalize, rescale, scope, weight."


def faults(text: str) -> list[str]:
    parsed = parse(text)
    assert parsed.recipe is None
    return [str(fault) for fault in parsed.faults]


def ties(**extra: str) -> str:
    return TIES + "".join(f"{key}: {value}\n" for key, value in extra.items())


def with_weight(weight: str) -> str:
    return LINEAR.replace("0.5", weight)


def warnings(text: str) -> list[str]:
    parsed = parse(text)
    assert parsed.faults == ()
    return list(parsed.warnings)


TOP: dict[str, list[str]] = {
    ties(dytpe="float16"): [f"dytpe (line 7): unknown key 'dytpe'. Did you mean 'dtype'? {KEYS}"],
    ties(normalise="true"): [
        f"normalise (line 7): unknown key 'normalise'. Did you mean 'normalize' under parameters? {KEYS}"
    ],
    ties(frobnicate="1"): [f"frobnicate (line 7): unknown key 'frobnicate'. {KEYS}"],
    ties(seed="1\nseed: 2"): ["seed (line 8): the key is given twice (first in line 7)."],
    ties(dtype="fp16"): [
        "dtype (line 7): no dtype is called 'fp16'. Did you mean 'float16'? "
        "Known: bfloat16, float16, float32, float64."
    ],
    ties(out_dtype="bf16"): [
        "out_dtype (line 7): no dtype is called 'bf16'. Did you mean 'bfloat16'? "
        "Known: bfloat16, float16, float32, float64."
    ],
    ties(dtype="16"): ["dtype (line 7): expected the name of a dtype, got 16. Write it in quotes."],
    ties(seed="-1"): [
        "seed (line 7): expected a whole number, got -1. From 0 to 2^64 - 1 (18446744073709551615)."
    ],
    ties(seed="18446744073709551616"): [
        "seed (line 7): expected a whole number, got 18446744073709551616. "
        "From 0 to 2^64 - 1 (18446744073709551615)."
    ],
    ties(seed="true"): [
        "seed (line 7): expected a whole number, got true. From 0 to 2^64 - 1 (18446744073709551615)."
    ],
    ties(output="{shard_size: 5XB}"): [
        "output.shard_size (line 7): '5XB' is no size. Bytes as a whole number, or text such as 5GB or 500MB."
    ],
    ties(output="{shard_size: 0, shards: 3}"): [
        "output.shards (line 7): unknown key 'shards'. Did you mean 'shard_size'? Known: shard_size.",
        "output.shard_size (line 7): 0 is no size. Bytes as a whole number, or text such as 5GB or 500MB.",
    ],
    ties(output="5GB"): ["output (line 7): expected a mapping of output settings, got '5GB'."],
    ties(tokenizer_source="base"): [
        "tokenizer_source (line 7): tokenizer_source is not supported yet (building a merged tokenizer). "
        "Remove it, and merge experts that share one tokenizer."
    ],
    ties(tokenizer="{source: union}"): [
        "tokenizer (line 7): tokenizer is not supported yet (building a merged tokenizer). "
        "Remove it, and merge experts that share one tokenizer."
    ],
    ties(chat_template="auto"): [
        "chat_template (line 7): chat_template is not supported yet (setting a chat template). "
        "Remove it; the output keeps the template of its tokenizer."
    ],
    "{merge_method: passthrough, slices: [{sources: [{model: a, layer_range: [0, 2]}]}]}": [
        "slices (line 1): slices is not supported yet (merging ranges of layers). "
        "List whole models under models."
    ],
    "{merge_method: linear, modules: {text: {}}}": [
        "modules (line 1): modules is not supported yet (merging the parts of a model separately). "
        "List whole models under models."
    ],
    "merge_method: tie\nmodels: [{model: a}]": [
        f"merge_method (line 1): no merge method is called 'tie'. Did you mean 'ties'? {METHODS}"
    ],
    "models: [{model: a, parameters: {wieght: .inf, density: 7, t: x}}]": [
        "models[0].parameters.wieght (line 1): unknown parameter 'wieght'. Did you mean 'weight'? "
        f"Known: {', '.join(NAMES)}.",
        "models[0].parameters.t (line 1): expected a number, got 'x'.",
        f"merge_method: the recipe names no merge method. {METHODS}",
    ],
    "merge_method: linear": [
        "models: the recipe lists no models. Add models:, with a - model: PATH for each."
    ],
    "merge_method: ties\nmodels: a": [
        "models (line 2): expected a list of models, got 'a'. Write - model: PATH.",
        "base_model: ties needs a base_model. Add base_model: PATH.",
    ],
    "merge_method: linear\nparameters: {weight: 1}\nmodels:\n  - a\n  - {parameters: [1]}\n  - {model: }": [
        "models[0] (line 4): expected a mapping with model and parameters, got 'a'. Write - model: PATH.",
        "models[1] (line 5): the key model is missing. Write - model: PATH.",
        "models[1].parameters (line 5): expected a mapping of parameters, got a list.",
        "models[2] (line 6): the key model is missing. Write - model: PATH.",
    ],
    TIES.replace("density", "densty"): [
        f"models[1].parameters.densty (line 6): unknown parameter 'densty'. Did you mean 'density'? {OF_TIES}"
    ],
    TIES.replace("density", "gamma"): [
        "models[1].parameters.gamma (line 6): unknown parameter 'gamma' "
        f"(it belongs to breadcrumbs, breadcrumbs_ties). {OF_TIES}"
    ],
    "{merge_method: linear, models: [{model: a, weight: 1, bogus: 2}], parameters: {weight: 1}}": [
        "models[0].weight (line 1): unknown key 'weight'. Did you mean 'weight' under parameters? "
        "Known: model, parameters.",
        "models[0].bogus (line 1): unknown key 'bogus'. Known: model, parameters.",
    ],
}


@pytest.mark.parametrize(("text", "expected"), TOP.items())
def test_keys(text: str, expected: list[str]) -> None:
    assert faults(text) == expected


VALUES: dict[str, list[str]] = {
    ".nan": ["weight is not a number (NaN)."],
    "nan": ["weight is not a number (NaN)."],
    "-.inf": ["weight is infinite, or too large for float32 arithmetic."],
    "1e39": ["weight is infinite, or too large for float32 arithmetic."],
    "yes": ["expected a number, got true."],
    "heavy": ["expected a number, got 'heavy'."],
    "~": ["weight has no value. Give it one, or remove the key."],
    "[0.1, [0.2]]": ["expected a number, got a list."],
    "[0.1, x, on]": ["expected a number, got 'x'.", "expected a number, got true."],
    "[{value: 1}, 2]": ["expected {filter: ..., value: ...} like its neighbours, got 2. Add value:."],
    "{filter: x}": ["the key value is missing. It is written {filter: ..., value: ...}."],
    "{filter: 1, value: 2}": ["expected a piece of a tensor's name, got 1. Write it in quotes."],
    "{pattern: x, value: [.nan]}": [
        "unknown key 'pattern'. Known: filter, value.",
        "weight is not a number (NaN).",
    ],
}


@pytest.mark.parametrize(("written", "expected"), VALUES.items())
def test_values(written: str, expected: list[str]) -> None:
    found = faults(with_weight(written))
    assert [fault.split(" (line 1): ")[1] for fault in found] == expected
    assert all(fault.startswith("parameters.weight") for fault in found)


PARAMETERS: dict[str, list[str]] = {
    ties(parameters="{density: 1.5}"): [
        "parameters.density (line 7): 1.5 is out of range. density is between 0 and 1."
    ],
    ties(parameters="{density: [0.5, -0.1]}"): [
        "parameters.density[1] (line 7): -0.1 is out of range. density is between 0 and 1."
    ],
    ties(parameters="{normalize: maybe, rescale: 2}"): [
        "parameters.normalize (line 7): expected true or false, got 'maybe'.",
        "parameters.rescale (line 7): expected true or false, got 2.",
    ],
    ties(parameters="{agg: median}"): [
        "parameters.agg (line 7): expected one of the known words, got 'median'. Known: mean, sum."
    ],
    ties(parameters="{scope: [model, tensor]}"): [
        "parameters.scope (line 7): scope may not change from tensor to tensor. "
        "Give it one value, without filter or gradient."
    ],
    ties(parameters="{scope: {filter: mlp, value: model}}"): [
        "parameters.scope (line 7): scope may not change from tensor to tensor. "
        "Give it one value, without filter or gradient."
    ],
    ties(parameters="{scope: model, density: [0.1, 0.2]}"): [
        "parameters.density (line 7): scope: model needs one density per expert. Drop filters and gradient."
    ],
    ties(parameters="{scope: model}").replace("0.4", "{filter: x, value: 0.4}"): [
        "models[1].parameters.density (line 6): scope: model needs one density per expert. "
        "Drop filters and gradient."
    ],
    ties(parameters="{agg: sum, normalize: true}"): [
        "parameters.agg (line 7): agg: sum means normalize: false, and normalize says otherwise. Drop one."
    ],
    TIES.replace("weight: 0.5, ", ""): [
        "models[1].parameters.weight (line 6): ties needs a weight for every model. "
        "Add it here or to the top-level parameters."
    ],
    TIES.replace("weight: 1.0", "weight: []"): [
        "models[0].parameters.weight (line 5): ties needs a weight for every model. "
        "Add it here or to the top-level parameters."
    ],
    TIES.replace("base_model: base", ""): ["base_model: ties needs a base_model. Add base_model: PATH."],
    TIES.replace("model: b", "model: a"): [
        "models[1] (line 6): a is listed already, as models[0]. "
        "List each model once; to count it twice, add its weights."
    ],
    "{merge_method: ties, base_model: b, models: [{model: b}]}": [
        "models (line 1): ties takes at least 1 expert besides the base_model, and there are 0."
    ],
    "{merge_method: slerp, base_model: a, models: [{model: b}, {model: c}], parameters: {t: 0}}": [
        "models (line 1): slerp takes exactly 1 expert besides the base_model, and there are 2."
    ],
    "{merge_method: slerp, models: [{model: a}, {model: b, parameters: {t: 1}}]}": [
        "base_model: slerp needs a base_model. Add base_model: PATH.",
        "parameters.t: slerp needs t (position on the arc: 0 is the base, 1 the expert). "
        "Add t to the top-level parameters.",
    ],
    "{merge_method: passthrough, base_model: b, models: [{model: a}]}": [
        "models (line 1): passthrough takes exactly 1 expert, and there are 2, the base_model among them."
    ],
    "{merge_method: linear, base_model: b, models: [{model: a, parameters: {weight: 1}}]}": [
        "base_model (line 1): an unlisted base_model is one more input of linear, and it has no weight. "
        "List it under models with a weight, or drop base_model."
    ],
    LINEAR.replace("{model: a}", "{model: a, parameters: {weight: -0.5}}"): [
        "models (line 1): the weights sum to zero, and normalize divides by the sum. Set normalize: false."
    ],
    TIES.replace("ties", "dare_linear").replace("0.5", "-1") + "parameters: {normalize: true}": [
        "models (line 4): the weights sum to zero, and normalize divides by the sum. Set normalize: false."
    ],
}


@pytest.mark.parametrize(("text", "expected"), PARAMETERS.items())
def test_parameters(text: str, expected: list[str]) -> None:
    assert faults(text) == expected


WARNINGS: dict[str, list[str]] = {
    ties(normalize="true", int8_mask="true", name="x", input_model_parameters="{}"): [
        "normalize (line 7): has no effect at the top level, here as in mergekit. Write it under parameters.",
        "int8_mask (line 8): has no effect at the top level, here as in mergekit. Remove it.",
        "name (line 9): has no effect at the top level, here as in mergekit. "
        "Only files with several documents need it.",
        "input_model_parameters (line 10): has no effect, here as in mergekit. Remove it.",
    ],
    TIES.replace("weight: 1.0", "weight: 1.0, normalize: 7, int8_mask: yes, embed_slerp: 1"): [
        "models[0].parameters.normalize (line 5): normalize has no effect under a model, here as in "
        "mergekit: it holds for all models. Move it to the top-level parameters.",
        "models[0].parameters.int8_mask (line 5): int8_mask has no effect in ties, here as in mergekit. "
        "Remove it.",
        "models[0].parameters.embed_slerp (line 5): embed_slerp has no effect in ties, here as in mergekit. "
        "Remove it.",
    ],
    TIES.replace("ties", "task_arithmetic"): [
        "models[1].parameters.density (line 6): density has no effect in task_arithmetic, here as in "
        "mergekit. Remove it."
    ],
    TIES.replace("model: a,", "model: a, layer_range: [0, 9], residual_weight: 1,"): [
        "models[0].layer_range (line 5): has no effect under models: whole models are merged. Remove it.",
        "models[0].residual_weight (line 5): has no effect, here as in mergekit. Remove it.",
    ],
    TIES + "  - {model: base, parameters: {weight: x}}": [
        "models[2].parameters.weight (line 7): weight has no effect on the base_model, here as in mergekit. "
        "Remove it."
    ],
    TIES.replace("base_model: base", "base_model: ./a/"): [
        "base_model (line 3): ./a/ and a look like one model spelled in two ways, and count as two. "
        "Spell them alike if they are the same."
    ],
    TIES.replace("model: a,", "model: {model: a, override_architecture: X},"): [
        "models[0].model.override_architecture (line 5): has no effect: the layout is derived from the "
        "tensors' names, whatever the architecture."
    ],
    with_weight("[{filter: mlp, value: 1}, {filter: mlp.up, value: 2}, {value: 3}, {filter: x, value: 4}]"): [
        "parameters.weight[1] (line 1): never used: the filter 'mlp' before it matches first.",
        "parameters.weight[3] (line 1): never used: the entry without filter before it matches first.",
    ],
}


@pytest.mark.parametrize(("text", "expected"), WARNINGS.items())
def test_warnings(text: str, expected: list[str]) -> None:
    assert warnings(text) == expected


def test_rows_that_a_recipe_was_chosen_by() -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "./a", "parameters": {"weight": 1.0}}]}
    digests = ["f" * 64, "0" * 64, "f" * 64]
    found = read({**recipe, "tuned_on": digests}).require()
    assert found.tuned_on == ("0" * 64, "f" * 64)
    assert read(found).require() == found, "nothing is lost on the way through YAML"
    for wrong in ("f" * 64, ["f" * 63], [3], {"a": 1}):
        (fault,) = read({**recipe, "tuned_on": wrong}).faults
        assert "tuned_on" in str(fault)
        assert "is no list of digests of rows" in str(fault)
