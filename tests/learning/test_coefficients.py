"""Which coefficients are free, their JSON and their picture; chunks by importance."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mixmerge.calibrate.coefficients import CoefficientSpace, heat_map, place
from mixmerge.calibrate.objectives import chunk_counts
from mixmerge.errors import MethodError, RecipeError
from mixmerge.methods.coefficients import Coefficients, bounds, read_coefficients

SHAPES = {"a.0.weight": (4, 3), "a.1.weight": (2,), "norm": (5,)}


def test_one_row_for_each_tensor_chunk_or_for_all() -> None:
    by_tensor = CoefficientSpace(start=(0.1, 0.2), frozen=("norm",)).layout(SHAPES, 2)
    assert by_tensor.rows == {"a.0.weight": (0,), "a.1.weight": (1,)}
    assert by_tensor.start == ((0.1, 0.2), (0.1, 0.2))
    assert by_tensor.fixed == {"norm": (0.1, 0.2)}
    by_expert = CoefficientSpace(granularity="expert").layout(SHAPES, 2)
    assert set(by_expert.rows.values()) == {(0,)}
    by_chunk = CoefficientSpace(granularity="chunk", chunks={"a.0.weight": 3, "a.1.weight": 9}).layout(
        SHAPES, 1
    )
    assert by_chunk.rows == {"a.0.weight": (0, 1, 2), "a.1.weight": (3, 4), "norm": (5,)}
    assert by_chunk.weights([[float(n)] for n in range(6)])["a.1.weight"] == ((3.0,), (4.0,))


def test_chunks_cover_a_tensor_in_slices_of_nearly_equal_length() -> None:
    assert bounds(7, 3) == ((0, 2), (2, 4), (4, 7))
    assert bounds(4, 1) == ((0, 4),)


def test_transforms_start_where_they_are_told() -> None:
    for space in (
        CoefficientSpace(start=(0.25, 0.75)),
        CoefficientSpace(transform="sigmoid", start=(0.25, 0.75)),
    ):
        layout = space.layout(SHAPES, 2)
        found = space.coefficients(space.free(layout.start))
        torch.testing.assert_close(found, torch.tensor([[0.25, 0.75]] * 3, dtype=torch.float64))
    free = torch.tensor([[-0.5, 1.5]], dtype=torch.float64)
    CoefficientSpace().project(free)
    assert free.tolist() == [[0.0, 1.0]]


def test_starts_that_are_not_possible() -> None:
    with pytest.raises(MethodError, match="Under a sigmoid, coefficients are between 0 and 1"):
        CoefficientSpace(transform="sigmoid", start=0.0).layout(SHAPES, 2)
    with pytest.raises(MethodError, match=r"and \d more tensors: starts at .* out of bounds") as caught:
        CoefficientSpace(start=1.5).layout(SHAPES, 2)
    assert len(caught.value.faults) == 1
    CoefficientSpace(start=1.5, clamp="none").layout(SHAPES, 2)
    with pytest.raises(MethodError, match="an expert has one coefficient for all"):
        CoefficientSpace(granularity="expert", start={"a": [0.1], "b": [0.2]}).layout(
            {"a": (2,), "b": (2,)}, 1
        )
    with pytest.raises(MethodError, match="no tensor has coefficients that are learned"):
        CoefficientSpace(frozen=("*",)).layout(SHAPES, 2)
    with pytest.raises(MethodError, match="has 3 numbers for 2 experts"):
        CoefficientSpace(start=(1.0, 1.0, 1.0)).layout(SHAPES, 2)


def sample(experts: int = 3, layers: int = 12) -> Coefficients:
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")
    kinds = (*kinds, "mlp.down_proj", "input_layernorm")
    weights = {"model.embed_tokens.weight": ((0.3,) * experts,)}
    for layer in range(layers):
        for number, kind in enumerate(kinds):
            wave = tuple(0.5 + 0.5 * math.sin(layer / 3 + number + expert) for expert in range(experts))
            weights[f"model.layers.{layer}.{kind}.weight"] = (wave, tuple(0.9 * value for value in wave))
    names = tuple(f"./experts/expert{number}" for number in range(experts))
    frozen = tuple(name for name in weights if "norm" in name or "embed" in name)
    return Coefficients(
        "adamerging", names, weights, start=(0.3,) * experts, frozen=frozen, losses=(1.0, 0.5)
    )


def test_json_round_trips_to_the_last_bit(tmp_path: Path) -> None:
    before = dataclasses.replace(sample(), hashes={"rows": {"./a": "00"}}, warnings=("one",), stopped="why")
    again = read_coefficients(before.to_json(), where="file")
    assert again == before
    assert again.to_json() == before.to_json()
    with pytest.raises(RecipeError) as caught:
        read_coefficients('{"format": "mixmerge-coefficients-1", "frozen": 3, "weights": {}}', where="file")
    assert [str(fault).split(":")[1].strip().rstrip(".") for fault in caught.value.faults] == [
        "method", "experts", "frozen", "weights",
    ]  # fmt: skip


def test_how_far_coefficients_moved() -> None:
    one = Coefficients("m", ("a",), {"x": ((0.5,), (0.1,)), "y": ((9.0,),)}, start=(0.3,), frozen=("y",))
    assert one.moved() == pytest.approx(0.2)


def test_the_heat_map_is_drawn_for_any_layout() -> None:
    import io

    from matplotlib import image

    for coefficients in (
        sample(),
        sample(9, 2),
        Coefficients("m", ("a",), {"w": ((0.3,),)}, start=(0.3,)),
        Coefficients(
            "m", ("a", "b"), {f"odd{n}.weight": ((n / 50, 0.5),) for n in range(40)}, start=(0.3, 0.3)
        ),
    ):
        picture = heat_map(coefficients)
        pixels = image.imread(io.BytesIO(picture))
        assert pixels.shape[0] > 100
        assert pixels[..., :3].std() > 0.05
        assert heat_map(coefficients) == picture


def test_places() -> None:
    assert place("model.layers.3.mlp.up_proj.weight") == (3, "up_proj")
    assert place("encoder.layer.11.attention.self.query.bias") == (11, "query.bias")
    assert place("model.norm.weight") == (None, "norm")


def test_chunks_by_importance_by_hand() -> None:
    norms = {"a": [6.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 0.0]}
    weights = {"a": [[0.5, 9.0]], "b": [[1.0, -2.0]], "c": [[1.0, 1.0]]}
    # importance: a 3, b 3, c 0; a budget of 2 x 3 tensors
    assert chunk_counts(norms, weights, budget=2.0) == {"a": 3, "b": 3, "c": 1}
    assert chunk_counts(norms, weights, budget=2.0, least=0)["c"] == 0
    uneven = {"a": [[1.0, 0.0]], "b": [[1.0, 1.0]], "c": [[1.0, 1.0]]}  # 6 and 2
    assert chunk_counts(norms, uneven, budget=8 / 3) == {"a": 6, "b": 2, "c": 1}
    assert chunk_counts(norms, uneven, budget=8 / 3, kappa=0.0, least=0)["c"] == 2
    assert chunk_counts(norms, uneven, budget=10 / 3, kappa=2.0) == {"a": 9, "b": 1, "c": 1}
    with pytest.raises(MethodError, match="is 0 for every tensor"):
        chunk_counts({"a": [0.0]}, {"a": [[1.0]]})
