"""State dicts merged in memory: what is merged, copied or refused, dtypes, tied weights, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixmerge.errors import MethodError, MixmergeError
from mixmerge.kernels.philox import Draw
from mixmerge.methods import METHODS, Method
from mixmerge.methods.memory import apply, merge_state_dicts
from mixmerge.methods.roles import role_of

REQUIRED = {"weight": 0.5, "t": 0.25}


def states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [
        {
            "layer.weight": torch.randn(6, 8, generator=generator).to(dtype),
            "norm.weight": torch.randn(8, generator=generator).to(dtype),
            "steps": torch.tensor([3, 4]),
        }
        for _ in range(count)
    ]


def needed(row: Method) -> dict[str, object]:
    return {name: value for name, value in REQUIRED.items() if row.parameter(name)}


@pytest.mark.parametrize(
    "row",
    [row for row in METHODS.values() if not row.sketch and not row.needs_data],
    ids=lambda row: row.name,
)
def test_every_method_merges_each_tensor_by_its_definition(row: Method) -> None:
    base, *experts = states(1 + min(3, row.inputs[1]))
    origin = base if row.base == "required" else None
    sparse = {"density": 0.5} if row.parameter("density") else {}
    merged = merge_state_dicts(row.name, experts, base=origin, parameters=needed(row) | sparse, seed=9)
    assert list(merged) == list(base)
    assert torch.equal(merged["steps"], base["steps"])
    for name in ("layer.weight", "norm.weight"):
        tensors = [e[name] - base[name] if row.takes == "deltas" else e[name] for e in experts]
        given = {
            p.name: value if p.per == "merge" else [value] * len(experts)
            for p in row.parameters
            if (value := (needed(row) | sparse).get(p.name, p.default)) is not None
        }
        role = role_of(name, base[name].shape)
        alone = apply(row, tensors, base=base[name], parameters=given, draw=Draw(9, name), role=role)
        assert torch.equal(merged[name], alone)


@pytest.mark.parametrize("method", ["wudi", "doge_ta", "iso_cts"])
def test_conv1d_matrices_are_turned_where_the_type_says_so(method: str) -> None:
    """A GPT-2's are inputs x outputs; the same names in a Llama are not."""
    given = {"steps": 5, "lr": 0.01} if method != "iso_cts" else {"common_fraction": 0.5}
    generator = torch.Generator().manual_seed(4)
    made = [{"h.0.mlp.c_fc.weight": torch.randn(6, 9, generator=generator)} for _ in range(3)]
    turned = [{name: x.T.contiguous() for name, x in state.items()} for state in made]
    linear, conv1d, unsaid = (
        merge_state_dicts(method, states[1:], base=states[0], parameters=given, model_type=kind)
        for states, kind in ((turned, "llama"), (made, "gpt2"), (made, ""))
    )
    (merged,) = conv1d.values()
    torch.testing.assert_close(merged.T, next(iter(linear.values())), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(merged, next(iter(unsaid.values())), rtol=0, atol=1e-4)


def test_roles() -> None:
    kinds = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gpt_bigcode")
    turned = [role_of("h.0.attn.c_attn.weight", (4, 12), kind) for kind in kinds]
    assert turned == ["transposed"] * 4 + ["linear"]
    tables = (
        *(
            "wte.weight",
            "lm_head.weight",
            "tokens_embed.weight",
            "backbone.embeddings.weight",
            "shared.weight",
        ),
        *(
            "text_model.embeddings.token_embedding.weight",
            "embeddings.position_embedding.weight",
            "vocab_projector.weight",
        ),
        *(
            "encoder.rel_embeddings.weight",
            "bert.embeddings.word_embeddings.weight",
            "cls.predictions.decoder.weight",
        ),
    )
    assert [name for name in tables if role_of(name, (9, 4)) != "table"] == []
    maps = (
        "classifier.weight",
        "lm_head.dense.weight",
        "model.layers.0.mlp.up_proj.weight",
        "pooler.dense.weight",
    )
    assert [name for name in maps if role_of(name, (9, 4)) != "linear"] == []
    assert role_of("conv.weight", (9, 4, 3)) == role_of("norm.weight", (9,)) == "other"


def test_the_order_of_names_is_the_base_s() -> None:
    base, expert = states(2)
    turned = dict(reversed(expert.items()))
    assert list(merge_state_dicts("slerp", [turned], base=base, parameters={"t": 0.5})) == list(base)


def test_half_precision_is_rounded_once() -> None:
    base, *experts = states(4, torch.bfloat16)
    parameters = {"weight": 0.3}
    merged = merge_state_dicts("task_arithmetic", experts, base=base, parameters=parameters)
    wide = merge_state_dicts(
        "task_arithmetic", experts, base=base, parameters=parameters, dtype=torch.float32
    )
    name = "layer.weight"
    assert merged[name].dtype == torch.bfloat16
    assert wide[name].dtype == torch.float32
    assert torch.equal(merged[name], wide[name].bfloat16())
    by_hand = base[name].float() + 0.3 * sum(e[name].float() - base[name].float() for e in experts)
    torch.testing.assert_close(wide[name], by_hand)


def test_double_precision_stays_double() -> None:
    base, expert = ({"w": torch.tensor([value], dtype=torch.float64)} for value in (1.0, 1.0 + 1e-12))
    merged = merge_state_dicts("task_arithmetic", [expert], base=base, parameters={"weight": 1.0})
    assert merged["w"].item() == expert["w"].item()


def test_whole_model_threshold() -> None:
    base = {"b": torch.zeros(3), "a": torch.zeros(3), "n": torch.tensor([1])}
    first = base | {"b": torch.tensor([2.0, 2, 5]), "a": torch.tensor([3.0, 1, -2])}
    second = base | {"b": torch.tensor([0.0, 1, 0]), "a": torch.zeros(3)}
    merged = merge_state_dicts(
        "ties",
        [first, second],
        base=base,
        parameters={"weight": 1.0, "scope": "model", "density": 0.5},
        expert_parameters=[{}, {"density": 0.1}],
    )
    assert merged["a"].tolist() == [3, 0, -2]
    assert merged["b"].tolist() == [0, 1, 5]


def test_tied_weights_are_merged_once_and_stay_tied() -> None:
    def tied(value: float) -> dict[str, Tensor]:
        shared = torch.full((4, 4), value)
        return {"embed": shared, "other": torch.ones(16), "head": shared}

    given = {"base": tied(0.0), "parameters": {"weight": 1.0, "density": 0.5}}
    merged = merge_state_dicts("dare_linear", [tied(1.0)], **given)
    assert merged["head"] is merged["embed"]
    alone = merge_state_dicts(
        "dare_linear", [{"embed": torch.ones(4, 4)}], **(given | {"base": {"embed": torch.zeros(4, 4)}})
    )
    assert torch.equal(merged["embed"], alone["embed"])
    untied = tied(1.0) | {"head": torch.full((4, 4), 1.0)}
    assert merge_state_dicts("dare_linear", [untied], **given)["head"] is not merged["embed"]


def test_nothing_shares_storage_with_an_input() -> None:
    (state,) = states(1)
    for name, tensor in merge_state_dicts("passthrough", [state]).items():
        assert torch.equal(tensor, state[name])
        assert tensor.data_ptr() != state[name].data_ptr()


def test_a_base_that_is_not_required_is_one_more_input() -> None:
    one, two, three = ({"w": torch.tensor([value])} for value in (1.0, 2.0, 6.0))
    merged = merge_state_dicts("linear", [one, two], base=three, parameters={"weight": 1.0})
    assert merged["w"].item() == pytest.approx(3.0)
    own = [{"weight": 1.0}, {"weight": 2.0}, {"weight": 1.0}]
    assert merge_state_dicts("linear", [one, two], base=three, expert_parameters=own)["w"].item() == 2.75


def test_gradients_reach_coefficients_and_experts() -> None:
    base, *experts = states(3)
    alphas = [torch.tensor(0.3, requires_grad=True), torch.tensor(0.6, requires_grad=True)]
    experts[0]["norm.weight"].requires_grad_()
    merged = merge_state_dicts(
        "ties",
        experts,
        base=base,
        parameters={"density": 0.5, "lambda": torch.tensor(1.5), "normalize": False},
        expert_parameters=[{"weight": alpha} for alpha in alphas],
    )
    sum(tensor.float().sum() for tensor in merged.values()).backward()
    assert all(alpha.grad is not None and alpha.grad != 0 for alpha in alphas)
    assert experts[0]["norm.weight"].grad.unique().tolist() == [0.0, pytest.approx(0.45)]  # weight x lambda


@pytest.mark.parametrize(
    ("method", "parameters", "own", "message"),
    [
        (
            "ties",
            {"weigth": 1.0},
            [],
            r"parameters.weigth: ties has no parameter 'weigth'. Did you mean 'weight'",
        ),
        ("ties", {}, [], r"expert_parameters\[0\], expert_parameters\[1\]: ties needs 'weight'"),
        ("ties", {"weight": 1.0}, [{}, {"normalize": True}], r"\[1\].normalize: .* move it to parameters"),
        ("ties", {"weight": 1.0}, [{}], "1 mappings for 2 inputs. one per input"),
        ("ties", {"weight": 1.0, "density": 1.5}, [], "parameters.density: is 1.5. 0 to 1"),
        ("ties", {"weight": float("nan")}, [], "parameters.weight: is nan. a finite number"),
        ("ties", {"weight": float("inf")}, [], "a finite number"),
        ("ties", {"weight": True}, [], "parameters.weight: is True. one number"),
        ("wudi", {"steps": 2.5}, [], "parameters.steps: is 2.5. a whole number"),
        ("ties", {"weight": [1.0, 2.0]}, [], "give one per expert in expert_parameters"),
        ("ties", {"weight": 1.0, "normalize": 1}, [], "is 1. true or false"),
        ("ties", {"weight": 1.0, "scope": "layer"}, [], "parameters.scope: is 'layer'. tensor or model"),
        ("ties", {"weight": 1.0, "density": torch.tensor(0.5)}, [], "masks are constants. a plain number"),
        ("task_arithmetic", {"weight": 1.0, "density": 0.5}, [], "density: has no effect on task_arithmetic"),
        ("slerp", {}, [], "experts: slerp got 2. exactly 1.\nparameters: slerp needs 't'"),
        ("linear", {"weight": 1.0}, [{"weight": 1.0}, {"weight": -1.0}, {"weight": 0.0}], "sum to 0"),
    ],
)
def test_parameters_that_cannot_be_meant(
    method: str, parameters: dict[str, object], own: list[dict[str, object]], message: str
) -> None:
    base, *experts = states(3)
    with pytest.raises(MethodError, match=message):
        merge_state_dicts(method, experts, base=base, parameters=parameters, expert_parameters=own)


def test_none_means_not_given() -> None:
    base, *experts = states(2)
    given = {"parameters": {"weight": None}, "expert_parameters": [{"weight": 1.0, "density": None}]}
    merged = merge_state_dicts("ties", experts, base=base, **given)
    torch.testing.assert_close(merged["norm.weight"], experts[0]["norm.weight"])


def test_all_that_does_not_fit_is_named_at_once() -> None:
    base, first, second = states(3)
    del first["steps"]
    second |= {"layer.weight": torch.zeros(6, 9), "steps": torch.tensor([3, 5]), "extra": torch.zeros(2)}
    first["norm.weight"][3] = float("nan")
    with pytest.raises(MethodError) as caught:
        merge_state_dicts("ties", [first, second], base=base, parameters={"weigth": 1.0}, seed=-1)
    message = str(caught.value)
    for part in (
        "experts[0]: has no tensor 'steps', 'extra'",
        "base: has no tensor 'extra'",
        "tensor 'layer.weight': shapes differ: experts[0] (6, 8), experts[1] (6, 9), base (6, 8)",
        "tensor 'steps': is torch.int64, which is copied, never merged; and its inputs are not equal",
        "tensor 'norm.weight': has NaN or infinite values in experts[0]",
        "parameters.weigth",
        "seed: is -1",
    ):
        assert part in message


def test_other_things_that_do_not_fit() -> None:
    base, expert = states(2)
    with pytest.raises(MethodError, match="base: ties needs a base"):
        merge_state_dicts("ties", [expert], parameters={"weight": 1.0})
    with pytest.raises(MixmergeError, match=r"no method is called 'tise'\. Did you mean 'ties'"):
        merge_state_dicts("tise", [expert])
    with pytest.raises(MethodError, match="dtypes differ: experts"):
        merge_state_dicts("slerp", [expert | {"steps": torch.zeros(2)}], base=base, parameters={"t": 0.5})
    with pytest.raises(MethodError, match="float8_e4m3fn, which cannot be merged"):
        merge_state_dicts("passthrough", [{"w": torch.zeros(2).to(torch.float8_e4m3fn)}])
    with pytest.raises(MethodError, match=r"do not fit torch\.float16"):
        merge_state_dicts(
            "passthrough", [{"w": torch.tensor([6e4])}], parameters={"scale": 2}, dtype=torch.float16
        )
    with pytest.raises(MethodError, match="a floating-point dtype"):
        merge_state_dicts("passthrough", [expert], dtype=torch.int8)


def test_apply_checks_its_group() -> None:
    row, zeros = METHODS["dare_ties"], torch.zeros(2)
    with pytest.raises(MethodError) as caught:
        apply(row, [zeros, torch.zeros(3)], base=None, parameters={"weight": [1.0], "density": 0.5})
    message = str(caught.value)
    assert message.splitlines() == [
        "base: dare_ties needs a base and got none.",
        "dare_ties: shapes differ: (2,), (3,).",
        "weight: needs one value for each of 2 tensors, got [1.0].",
        "density: needs one value for each of 2 tensors, got 0.5.",
        "dare_ties: draws at random and was given no draw.",
    ]
