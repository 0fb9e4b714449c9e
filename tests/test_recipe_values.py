"""The value each tensor gets: precedence, filters, gradients; mergekit's own resolver as the oracle."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from mixmerge.errors import RecipeError
from mixmerge.methods import METHODS, Method, Parameter
from mixmerge.recipe import (
    Conditional,
    ModelEntry,
    ModelRef,
    Recipe,
    canonical,
    dump,
    inputs,
    interpolate,
    layer_position,
    parse,
    read,
    resolve,
    resolve_tensor,
)

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
]


def values(text: str, *, entry: int | None, name: str = "x", position: float = 0.0) -> dict[str, Any]:
    recipe = parse(text).require()
    return resolve(recipe, METHODS[recipe.merge_method], entry=entry, name=name, position=position)


@pytest.mark.parametrize(
    ("anchors", "position", "value"),
    [
        ((), 0.5, None),
        ((3.0,), 0.7, 3.0),
        ((0.0, 1.0), 0.25, 0.25),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.0, 0.0),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.125, 0.25),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 0.5, 0.3),
        ((0.0, 0.5, 0.3, 0.7, 1.0), 1.0, 1.0),
        ((True, False), 0.99, True),
        ((True, False), 1.0, False),
        (("sum", "mean", "sum"), 0.5, "mean"),
        ((1, 2), 0.5, 1.5),
    ],
)
def test_gradients_by_hand(anchors: tuple[Any, ...], position: float, value: object) -> None:
    assert interpolate(anchors, position) == value


def test_whole_numbers_go_in_steps() -> None:
    assert [interpolate((10.0, 20.0, 40.0), at / 4, whole=True) for at in range(5)] == [10, 10, 20, 20, 40]


WHOLE = [(row, parameter) for row in METHODS.values() for parameter in row.parameters if parameter.whole]


def test_what_counts_is_a_whole_number() -> None:
    counts = {"steps", "subspace", "least", "rows", "period", "least_chunks", "rank", "chunks"}
    assert {parameter.name for _, parameter in WHOLE} == counts
    named = [
        parameter for row in METHODS.values() for parameter in row.parameters if parameter.name in counts
    ]
    assert all(parameter.whole for parameter in named)


@pytest.mark.parametrize(("row", "parameter"), WHOLE, ids=lambda one: one.name)
def test_a_fraction_is_no_count(row: Method, parameter: Parameter) -> None:
    """It was cut in silence: 2.5 steps were 2."""

    def recipe(value: object) -> dict[str, Any]:
        own = {"per_expert": {"a": "builtin:docs", "b": "builtin:code"}}
        data = {"calibration": own} if row.needs_data else {}
        return {
            "merge_method": row.name,
            "base_model": "base",
            "models": [{"model": "a"}, {"model": "b"}],
            "parameters": {parameter.name: value},
            **data,
        }

    least = max(parameter.low, 0.0)
    fault = f"parameters.{parameter.name}: {least + 0.5:g} is no whole number. {parameter.name} is "
    with pytest.raises(RecipeError) as raised:
        read(recipe(least + 0.5)).require()
    assert [str(one)[: len(fault)] for one in raised.value.faults] == [fault]
    with pytest.raises(RecipeError, match="no whole number"):
        read(recipe([{"filter": "mlp", "value": least + 1.5}, {"value": least}])).require()
    for value in (int(least), float(least), f"{least:g}"):
        assert read(recipe(value)).require().parameters[parameter.name][0].value == (least,)


def test_layer_positions() -> None:
    assert [layer_position(layer, 5) for layer in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert layer_position(0, 1) == 1.0
    assert layer_position(None, 5) == 0.0


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=9),
    st.integers(0, 63),
    st.integers(1, 63),
)
def test_gradients_are_piecewise_linear(anchors: list[float], layer: int, last: int) -> None:
    """Against exact arithmetic: the point at ``layer / last`` on the broken line through the anchors."""
    layer = min(layer, last)
    scaled = Fraction(layer, last) * (len(anchors) - 1)
    left = min(int(scaled), len(anchors) - 2)
    exact = Fraction(anchors[left]) + (scaled - left) * (
        Fraction(anchors[left + 1]) - Fraction(anchors[left])
    )
    assert interpolate(anchors, layer_position(layer, last + 1)) == pytest.approx(float(exact), abs=1e-8)


PRECEDENCE = """
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      weight:
        - {filter: q_proj, value: 0.9}
        - {filter: mlp, value: []}
        - {filter: layers, value: [0.1, 0.3]}
      density: []
  - model: base
  - {model: b, parameters: {density: {filter: '*', value: 5e-1}}}
parameters:
  weight: [{filter: up_proj, value: 2}, {value: 3}]
  density: {filter: mlp, value: 0.25}
  lambda: {filter: embed, value: 4}
"""


def test_precedence_and_filters() -> None:
    embed, mlp, attention = NAMES
    assert values(PRECEDENCE, entry=0, name=attention) == {"weight": 0.9, "density": 1.0}
    assert values(PRECEDENCE, entry=0, name="model.layers.3.norm", position=0.5)["weight"] == pytest.approx(
        0.2
    )
    # an empty value, or no match, passes the tensor on to the global level; then comes the default
    assert values(PRECEDENCE, entry=0, name=mlp) == {"weight": 2.0, "density": 0.25}
    assert values(PRECEDENCE, entry=0, name=embed) == {"weight": 3.0, "density": 1.0}
    assert values(PRECEDENCE, entry=1, name=mlp) == {"weight": 2.0, "density": 0.5}
    shared = {"scope": "tensor", "normalize": True, "agg": None, "rescale": False, "lambda": 1.0}
    assert values(PRECEDENCE, entry=None, name=mlp) == shared
    assert values(PRECEDENCE, entry=None, name=embed) == {**shared, "lambda": 4.0}


def test_filters_are_substrings_not_patterns() -> None:
    text = (
        "{merge_method: passthrough, models: [{model: a, parameters: {scale: {filter: 'l.*.x', value: 2}}}]}"
    )
    assert values(text, entry=0, name="l.1.x") == {"scale": None}
    assert values(text, entry=0, name="l.*.x.w") == {"scale": 2.0}


def test_inputs() -> None:
    recipe = parse(PRECEDENCE).require()
    assert [entry.model.path for entry in inputs(recipe)] == ["a", "b"]
    linear = "{merge_method: linear, base_model: b, models: [{model: a}], parameters: {weight: 1}}"
    recipe = parse(linear).require()
    assert inputs(recipe) == (ModelEntry(model=ModelRef("a")), ModelEntry(model=ModelRef("b")))
    recipe = parse(linear.replace("{model: a}", "{model: b}, {model: a}")).require()
    assert [entry.model.path for entry in inputs(recipe, METHODS["linear"])] == ["b", "a"]


def test_what_only_a_tensor_can_tell() -> None:
    models = "[{model: a, parameters: {weight: {filter: mlp, value: 1}}}, {model: b}]"
    weight = "{filter: m, value: [1, -2]}"
    text = f"{{merge_method: linear, base_model: c, models: {models}, parameters: {{weight: {weight}}}}}"
    recipe = parse(text).require()
    with pytest.raises(RecipeError) as caught:
        resolve_tensor(recipe, METHODS["linear"], name="head", position=0)
    assert [str(fault) for fault in caught.value.faults] == [
        f"{where}.weight: no weight for tensor head: no filter matches it. Add an entry without filter, last."
        for where in ("models[0].parameters", "models[1].parameters", "base_model")
    ]
    with pytest.raises(RecipeError, match="no weight for tensor head"):
        resolve(recipe, METHODS["linear"], entry=2, name="head", position=0)
    found = resolve_tensor(recipe, METHODS["linear"], name="mlp", position=0.0)
    assert [entry["weight"] for entry in found.entries] == [1.0, 1.0, 1.0]
    assert found.merge == {"normalize": True}
    with pytest.raises(RecipeError) as caught:  # 1 - 0.5 - 0.5
        resolve_tensor(recipe, METHODS["linear"], name="mlp", position=0.5)
    assert str(caught.value) == (
        "parameters.weight: the weights sum to zero for tensor mlp, and normalize divides by the sum. "
        "Set normalize: false."
    )


def test_aggregation_sets_normalize() -> None:
    ties = "{merge_method: ties, base_model: b, models: [{model: a}], parameters: {weight: 1, %s}}"
    assert values(ties % "agg: sum", entry=None)["normalize"] is False
    assert values(ties % "agg: mean, normalize: true", entry=None)["normalize"] is True
    late = ties % "agg: sum, normalize: {filter: mlp, value: true}"
    assert values(late, entry=None, name="norm")["normalize"] is False
    with pytest.raises(RecipeError, match=r"normalize says otherwise for tensor x\.mlp"):
        values(late, entry=None, name="x.mlp")


numbers = st.floats(0.125, 1).map(lambda value: round(value, 4)) | st.sampled_from([1, "1e-1", "5e-1"])
pieces = st.sampled_from(["mlp", "layers", "weight", "q_proj", "zzz", "*", None])


def written(scalar: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    plain = scalar | st.lists(scalar, max_size=4)
    conditional = st.builds(
        lambda word, value: {"value": value} if word is None else {"filter": word, "value": value},
        pieces,
        plain,
    )
    return plain | conditional | st.lists(conditional, min_size=1, max_size=3)


WITHOUT_DATA = sorted(name for name, row in METHODS.items() if not row.needs_data)


def recipes(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Mappings that mergekit and we both read; every level may be silent."""
    row = METHODS[method]
    kinds: dict[str, dict[str, st.SearchStrategy[Any]]] = {"merge": {}, "model": {}}
    for parameter in row.parameters:
        if parameter.kind == "choice":
            continue  # our own
        level = "merge" if parameter.per == "merge" else "model"
        kinds[level][parameter.name] = written(numbers if parameter.kind == "number" else st.booleans())
    own = st.fixed_dictionaries({}, optional=kinds["model"])
    shared = st.fixed_dictionaries({}, optional={**kinds["model"], **kinds["merge"]})
    most = min(row.inputs[1], 3)

    def build(settings: list[dict[str, Any]], top: dict[str, Any], place: int) -> dict[str, Any]:
        if place < 3:  # mostly, nothing required is missing
            needed = [parameter.name for parameter in row.parameters if parameter.default == "required"]
            top = {**dict.fromkeys(needed, 0.5), **top}
        models = [{"model": f"m{at}", "parameters": found} for at, found in enumerate(settings)]
        based = {"base_model": "m9"} if row.base == "required" else {}
        if based and place < len(models):
            models.insert(place, {"model": "m9"})
        return {"merge_method": method, "models": models, "parameters": top, **based}

    return st.builds(build, st.lists(own, min_size=1, max_size=most), shared, st.integers(0, 3))


@budget(max_examples=60, deadline=None)
@given(st.sampled_from(WITHOUT_DATA).flatmap(recipes))
def test_dump_round_trips(mapping: dict[str, Any]) -> None:
    recipe = read(mapping).recipe
    assume(recipe is not None)
    assert recipe is not None
    assert parse(dump(recipe)).recipe == recipe
    assert read(canonical(recipe)).recipe == recipe
    assert dump(parse(dump(recipe)).require()) == dump(recipe)


any_text = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=9).filter(
    lambda word: word == word.strip()
)
any_value = st.floats(-3e38, 3e38, width=64)
conditionals = st.builds(
    Conditional, any_text.filter(lambda word: word != "*"), st.lists(any_value, max_size=3).map(tuple)
)


@budget(max_examples=100, deadline=None)
@given(
    any_text,
    st.none() | any_text,
    st.none() | any_text,
    st.lists(conditionals, max_size=3),
    any_value,
    st.integers(0, 2**64 - 1),
)
def test_any_text_and_number_round_trips(
    path: str, revision: str | None, lora: str | None, filtered: list[Conditional], scale: float, seed: int
) -> None:
    recipe = Recipe(
        merge_method="passthrough",
        models=(
            ModelEntry(
                model=ModelRef(path, revision, lora),
                parameters={"scale": (*filtered, Conditional(None, (scale,)))},
            ),
        ),
        out_dtype="float64",
        seed=seed,
    )
    again = parse(dump(recipe))
    assert again.faults == ()
    assert again.recipe == recipe


@pytest.fixture(scope="module")
def oracle() -> Any:
    """mergekit 0.1.5's values for one tensor, through its public configuration and resolver."""
    pytest.importorskip("mergekit")
    from mergekit.config import ConfigReader, InputSliceDefinition, MergeConfiguration, OutputSliceDefinition
    from mergekit.merge_methods.registry import get
    from mergekit.parameter_resolver import resolve_parameters

    def ask(
        mapping: dict[str, Any], name: str, position: float
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        config = MergeConfiguration.model_validate(mapping)
        sources = [
            InputSliceDefinition(model=entry.model, layer_range=(0, 4), parameters=entry.parameters)
            for entry in config.models
        ]
        if config.base_model and all(source.model != config.base_model for source in sources):
            sources.append(InputSliceDefinition(model=config.base_model, layer_range=(0, 4)))
        reader = ConfigReader(config=config, t=position, slice_out=OutputSliceDefinition(sources=sources))
        shared, each = resolve_parameters(
            get(mapping["merge_method"]).spec,
            tensor_name=name,
            inputs={source.model: name for source in sources},
            sources=reader.parameter_sources,
            base_model=config.base_model,
            t=position,
        )
        return shared, [found for model, found in each.items() if model != config.base_model]

    return ask


@budget(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(name for name, row in METHODS.items() if row.kernel and not row.learner)).flatmap(
        recipes
    ),
    st.sampled_from(NAMES),
    st.sampled_from([0.0, 0.2, 1 / 3, 0.5, 0.9, 1.0]),
)
def test_values_agree_with_mergekit(oracle: Any, mapping: dict[str, Any], name: str, position: float) -> None:
    parsed = read(mapping)
    try:
        shared, each = oracle(mapping, name, position)
    except RuntimeError:  # its "Missing required parameter ..."
        with pytest.raises(RecipeError, match=r"needs a?|no \w+ for tensor"):
            resolve_tensor(parsed.require(), METHODS[mapping["merge_method"]], name=name, position=position)
        return
    assert parsed.faults == ()
    recipe = parsed.require()
    found = resolve_tensor(recipe, METHODS[recipe.merge_method], name=name, position=position)
    ours = {"scope", "agg", "rescale_by"}
    assert {key: found.merge[key] for key in found.merge if key not in ours} == {
        key: shared[key] for key in shared if key in found.merge
    }
    assert [dict(entry) for entry in found.entries] == [
        {key: entry[key] for key in entry if key in found.entries[0]} for entry in each
    ]
    assert [type(value) for value in found.merge.values() if value is not None] == [
        type(shared.get(key, value)) for key, value in found.merge.items() if value is not None
    ]
