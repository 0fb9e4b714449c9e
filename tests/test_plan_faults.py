"""What a plan refuses: inputs that do not fit together, all at once and by their place in the YAML; tied heads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mixmerge.errors import RecipeError
from mixmerge.plan import Plan, make_plan

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SMALL: Tensors = {
    "model.embed_tokens.weight": ("BF16", (20, 8)),
    "model.layers.0.mlp.weight": ("BF16", (8, 8)),
    "model.layers.1.mlp.weight": ("BF16", (8, 8)),
    "model.norm.weight": ("BF16", (8,)),
    "lm_head.weight": ("BF16", (20, 8)),
}
HEAD = "lm_head.weight"
TIED = {name: form for name, form in SMALL.items() if name != HEAD}


@pytest.fixture
def model(hollow: Any) -> Callable[..., str]:
    """``model(name, tensors, **more)``: the path of a hollow Llama."""
    return lambda name, tensors=SMALL, **more: str(hollow(name, tensors, **(LLAMA | more)))


def linear(*models: str, **more: Any) -> dict[str, Any]:
    """Equal parts of some models."""
    entries = [{"model": path} for path in models]
    return {"merge_method": "linear", "models": entries, "parameters": {"weight": 1.0}} | more


def faults_of(recipe: Any, *, allow_tokenizer_mismatch: bool = False) -> list[str]:
    with pytest.raises(RecipeError) as error:
        make_plan(recipe, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    return [str(fault) for fault in error.value.faults]


# --- what is refused


def test_tensors_of_some_inputs_only(model: Any) -> None:
    biased = {**SMALL, **{f"model.layers.{i}.mlp.bias": ("BF16", (8,)) for i in range(7)}}
    (fault,) = faults_of(linear(model("a", biased), model("b")))
    assert fault.startswith("models[1].model: ")
    assert "lacks 7 of 12 tensors: model.layers.0.mlp.bias, " in fault
    assert "and 2 more" in fault


def test_other_vocabulary_size(model: Any) -> None:
    grown = {**SMALL, "model.embed_tokens.weight": ("BF16", (24, 8)), HEAD: ("BF16", (24, 8))}
    (fault,) = faults_of(linear(model("a"), model("b", grown)))
    assert "model.embed_tokens.weight is [24, 8], there [20, 8]; also lm_head.weight" in fault
    assert "resize_token_embeddings" in fault


def test_other_sizes(model: Any) -> None:
    wide = {name: (dtype, tuple(2 * n for n in shape)) for name, (dtype, shape) in SMALL.items()}
    (fault,) = faults_of(linear(model("a"), model("b", wide)))
    assert "5 tensors have other shapes" in fault
    assert "one size and architecture" in fault


def test_other_architecture(model: Any) -> None:
    found = faults_of(linear(model("a"), model("b", model_type="qwen3", architectures=["Qwen3ForCausalLM"])))
    assert len(found) == 2
    assert all(fault.startswith("models[1].model: ") for fault in found)
    assert "its model_type is 'qwen3', that of" in found[0]


def test_other_settings_are_warned_about(model: Any) -> None:
    a, b = model("a", rope_theta=1e4, use_cache=True), model("b", rope_theta=1e6, use_cache=False)
    (warning,) = make_plan(linear(a, b)).warnings
    assert warning == f"{b}: config rope_theta is 1000000.0, the output gets 10000.0 of {a}"


def test_tokenizers(model: Any) -> None:
    a = model("a", vocabulary=["x", "y", "z"])
    assert make_plan(linear(a, model("same", vocabulary=["x", "y", "z"]))).warnings == ()
    swapped = model("swapped", vocabulary=["y", "x", "z"])
    (fault,) = faults_of(linear(a, swapped))
    assert fault.startswith(f"models[1].model: {swapped}: its tokenizer differs from that of {a}: 2 tokens")
    assert "'x', 'y'" in fault
    assert "--allow-tokenizer-mismatch" in fault
    (warning,) = make_plan(linear(a, swapped), allow_tokenizer_mismatch=True).warnings
    assert "allowed" in warning
    (warning,) = make_plan(linear(a, model("none"))).warnings
    assert "cannot be compared" in warning


def test_a_broken_tokenizer_is_a_fault_among_others(model: Any) -> None:
    a, b = model("a", vocabulary=["x"]), model("b", vocabulary=["x"])
    (Path(b) / "tokenizer.json").write_text("{")
    (fault,) = faults_of(linear(a, b))
    assert fault.startswith(f"models[1].model: {b}")
    assert "not JSON" in fault


def test_quantised_models(model: Any) -> None:
    found = faults_of(linear(model("a"), model("b", quantization_config={"quant_method": "gptq"})))
    assert len(found) == 1
    assert found[0].startswith("models[1].model: ")
    assert "quantised (gptq)" in found[0]
    packed = {**SMALL, "model.layers.0.mlp.weight": ("F8_E4M3", (8, 8))}
    assert any(
        "dtype not supported: model.layers.0.mlp.weight (F8_E4M3)" in f
        for f in faults_of(linear(model("c", packed)))
    )


def test_integers_that_are_floats_elsewhere(model: Any) -> None:
    a, b = {**SMALL, "steps": ("I64", (1,))}, {**SMALL, "steps": ("F32", (1,))}
    (fault,) = faults_of(linear(model("a", a), model("b", b)))
    assert fault.startswith("models[1].model: ")
    assert "steps (F32, there I64)" in fault


def test_a_threshold_of_the_whole_model_is_not_there_for_float64(model: Any) -> None:
    base, a = model("base"), model("a")
    recipe = linear(a, merge_method="ties", base_model=base)
    recipe["parameters"] |= {"scope": "model"}
    assert make_plan(recipe).tasks
    (fault,) = faults_of(recipe | {"out_dtype": "float64"})
    assert fault.startswith("parameters.scope: scope: model is not there for float64")


def test_everything_wrong_is_said_at_once(model: Any, tmp_path: Path) -> None:
    """Of the recipe and of the files, each with its place in the YAML; the parameters of an unreadable model too."""
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "config.json").write_text("{}")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x40\0\0\0")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""
merge_method: tise
base_model: {model("base", vocabulary=["x", "y"])}
models:
  - model: {tmp_path / "nowhere"}
    parameters: {{weight: .nan}}
  - model: {tmp_path / "cut"}
    parameters: {{wieght: 1.0}}
  - model: {model("narrow", {**SMALL, "model.norm.weight": ("BF16", (4,))})}
  - model: {model("other", vocabulary=["y", "x"])}
dtpye: float16
"""
    )
    found = faults_of(path)
    expected = [
        ("merge_method (line 2)", "Did you mean 'ties'"),
        ("models[0].parameters.weight", "NaN"),
        ("models[0].model", "nowhere: no such folder"),
        ("models[1].parameters.wieght", "Did you mean 'weight'"),
        ("models[1].model", "ends at byte 4, inside the 8-byte header length"),
        ("models[2].model", "model.norm.weight is [4], there [8]"),
        ("models[3].model", "tokenizer differs"),
        ("dtpye (line 11)", "Did you mean 'dtype'"),
    ]
    for place, text in expected:
        assert [fault for fault in found if fault.startswith(place) and text in fault], (place, text, found)
    assert len(found) == len(expected)


def test_a_filter_that_leaves_a_tensor_without_a_value(model: Any) -> None:
    recipe = linear(model("a"))
    recipe["parameters"] = {"weight": [{"filter": "mlp", "value": 1.0}]}
    found = faults_of(recipe)
    assert len(found) == 3
    assert all(fault.startswith("models[0].parameters.weight: no weight for tensor") for fault in found)


# --- tied heads


def heads(plan: Plan) -> dict[str, list[str]]:
    """What each head and embedding of the output is made of."""
    return {
        task.target.name: [
            source.tensor.name for source in (*task.sources, *([task.base] if task.base else []))
        ]
        for task in plan.tasks
        if task.target.name in (HEAD, "model.embed_tokens.weight")
    }


@pytest.mark.parametrize("flag", [True, None])
@pytest.mark.parametrize("donor_is_tied", [True, False])
def test_tied_and_untied_give_untied(model: Any, flag: bool | None, donor_is_tied: bool) -> None:
    tied, untied = model("tied", TIED, tie_word_embeddings=flag), model("untied")
    plan = make_plan(linear(tied, untied) if donor_is_tied else linear(untied, tied))
    stand_in = ["model.embed_tokens.weight", HEAD]
    assert heads(plan)[HEAD] == (stand_in if donor_is_tied else stand_in[::-1])
    assert plan.config["tie_word_embeddings"] is False


def test_a_tied_base_of_an_untied_expert(model: Any) -> None:
    tied, untied = model("tied", TIED, tie_word_embeddings=True), model("untied")
    plan = make_plan(linear(untied, merge_method="task_arithmetic", base_model=tied))
    assert heads(plan)[HEAD] == [HEAD, "model.embed_tokens.weight"]
    assert plan.config["tie_word_embeddings"] is False


def test_tied_stays_tied_and_a_stored_copy_is_dropped(model: Any) -> None:
    lean = model("lean", TIED, tie_word_embeddings=True)
    full = model("full", SMALL, tie_word_embeddings=True)
    plan = make_plan(linear(lean, full))
    assert HEAD not in heads(plan)
    assert [(drop.model, drop.name) for drop in plan.dropped] == [(1, HEAD)]
    assert plan.dropped[0].reason == "tied to model.embed_tokens.weight by its config"
    assert plan.config["tie_word_embeddings"] is True


def test_a_copy_that_its_config_ties_is_not_what_the_model_computes(model: Any) -> None:
    """A loader told to tie never looks at the stored head, so its embedding is merged."""
    full, untied = model("full", SMALL, tie_word_embeddings=True), model("untied")
    plan = make_plan(linear(full, untied))
    assert heads(plan)[HEAD] == ["model.embed_tokens.weight", HEAD]
    assert [(drop.model, drop.name) for drop in plan.dropped] == [(0, HEAD)]
    assert plan.config["tie_word_embeddings"] is False


def test_untied_everywhere_stays_as_it_is(model: Any) -> None:
    plan = make_plan(linear(model("a"), model("b")))
    assert heads(plan)[HEAD] == [HEAD, HEAD]
    assert plan.config == LLAMA | {"dtype": "bfloat16"}
    silent = make_plan(linear(model("c", tie_word_embeddings=None)))  # the architecture decides
    assert silent.config["tie_word_embeddings"] is None


def test_other_tensors_that_loaders_tie(model: Any) -> None:
    """What old checkpoints store twice: taken from its partner where it is stored once."""
    lean: Tensors = {"shared.weight": ("BF16", (20, 8)), "encoder.block.0.w": ("BF16", (8,))}
    full = {
        **lean,
        "encoder.embed_tokens.weight": ("BF16", (20, 8)),
        "decoder.embed_tokens.weight": ("BF16", (20, 8)),
    }
    plan = make_plan(
        linear(model("a", lean, tie_word_embeddings=None), model("b", full, tie_word_embeddings=None))
    )
    made = {task.target.name: [source.tensor.name for source in task.sources] for task in plan.tasks}
    for name in full.keys() - lean.keys():
        assert made[name] == ["shared.weight", name]
    assert plan.config["tie_word_embeddings"] is None


def test_an_untied_model_without_its_head_is_not_whole(model: Any) -> None:
    (fault,) = faults_of(linear(model("a"), model("b", TIED)))
    assert "models[1].model" in fault
    assert "lacks 1 of 5 tensors: lm_head.weight" in fault
