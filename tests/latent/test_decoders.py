"""Where states are read and added to, in six families; and which depths there are."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from mixmerge.errors import MixmergeError
from mixmerge.latent.decoders import Anatomy, reading, shape_of, writing
from mixmerge.latent.records import Level, levels_of

FAMILIES = ("llama", "qwen3", "gemma", "gpt2", "gpt_neox", "opt")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.mark.parametrize("architecture", FAMILIES)
def test_states_are_those_that_transformers_gives(experts: Mapping[str, Any], architecture: str) -> None:
    model = experts[architecture].model
    shape = shape_of(model, name="a", hash="h")
    layers = model.config.num_hidden_layers
    assert (shape.width, shape.layers, shape.vocabulary) == (model.config.hidden_size, layers, 512)
    places = [*range(layers + 1), "last"]
    with torch.no_grad(), reading(model, places) as found:
        whole = model(input_ids=IDS, output_hidden_states=True)
    assert list(found) == places
    for depth in range(layers):  # transformers' last one is after the norm
        assert torch.equal(found[depth], whole.hidden_states[depth])
        assert found[depth].shape == (1, 5, shape.width_at(depth))
    assert found["last"].shape[-1] == shape.width_at("last")
    head = model.get_output_embeddings()
    assert torch.equal(head(found["last"]), whole.logits)


def test_the_last_state_of_opt_may_have_another_width(experts: Mapping[str, Any]) -> None:
    shape = shape_of(experts["opt"].model, name="a", hash="h")
    assert (shape.width, shape.width_at("last"), shape.width_at(5)) == (16, 20, 16)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_what_is_added_somewhere_goes_on_from_there(experts: Mapping[str, Any], architecture: str) -> None:
    model = experts[architecture].model
    with torch.no_grad():
        before = model(input_ids=IDS, output_hidden_states=True)
        for depth in (0, 1, model.config.num_hidden_layers - 1):
            with writing(model, {depth: lambda states: states + 0}):
                assert torch.equal(model(input_ids=IDS).logits, before.logits)
            with writing(model, {depth: lambda states: states + 1}), reading(model, [depth, "last"]) as found:
                assert not torch.allclose(model(input_ids=IDS).logits, before.logits)
            # who reads at the same place after who writes sees what was written
            assert torch.allclose(found[depth], before.hidden_states[depth] + 1, atol=1e-5)
        assert torch.equal(model(input_ids=IDS).logits, before.logits)


def test_no_hook_is_left_after_an_error(experts: Mapping[str, Any]) -> None:
    model = experts["llama"].model

    def fails(states: torch.Tensor) -> torch.Tensor:
        raise ValueError("here")

    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with (
            pytest.raises(ValueError, match="here"),
            writing(model, {0: fails, 1: fails}),
            reading(model, [1]),
        ):
            model(input_ids=IDS)
        assert torch.equal(model(input_ids=IDS).logits, before)
    with pytest.raises(IndexError), writing(model, {0: fails, 99: fails}):
        pass


def test_what_is_no_decoder_with_a_head_is_refused(experts: Mapping[str, Any]) -> None:
    with pytest.raises(MixmergeError, match=r"expert a: LlamaModel has no list of layers"):
        Anatomy.of(experts["llama"].model.model, name="a")


def test_a_model_that_names_itself_its_decoder_is_looked_into() -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=16, intermediate_size_mlp=16, num_local_experts=2, pad_token_id=0,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    found = Anatomy.of(model, name="a")
    assert found.trunk is model.model
    assert found.layers is model.model.layers


def test_what_keeps_no_keys_and_values_is_refused_before_anything_learns() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=2, state_size=4))
    with pytest.raises(
        MixmergeError, match=r"expert m: mamba keeps no keys and values\. A transformer decoder"
    ):
        shape_of(model, name="m", hash="h")


def test_a_list_inside_a_layer_is_not_the_layers(experts: Mapping[str, Any]) -> None:
    model = copy.deepcopy(experts["llama"].model)
    layers = model.model.layers
    layers[0].experts = torch.nn.ModuleList(copy.deepcopy(layers[1]) for _ in range(5))
    assert Anatomy.of(model).layers is layers


def test_uniform_depths_are_shares_of_either_experts_layers() -> None:
    assert levels_of(4, 12, 8) == (Level(3, 2), Level(6, 4), Level(9, 6))
    assert levels_of(4, 30, 2) == (Level(7, 0), Level(15, 1), Level(22, 1))
    assert levels_of(4, 2, 2) == (Level(0, 0), Level(1, 1), Level(1, 1))


def test_depths_may_be_numbers_shares_and_the_last_state() -> None:
    assert levels_of(((0, "last"),), 3, 5) == (Level(0, "last"),)
    assert levels_of(((2, 5), (0.5, 0.5), (0.0, 1.0), (0, 0)), 4, 5) == (
        *(Level(2, 5), Level(2, 2), Level(0, 5), Level(0, 0)),
    )


@pytest.mark.parametrize(
    ("depths", "said"),
    [
        (1, r"depths: is 1\. 2 or more"),
        ((), r"depths: has no pair"),
        ((("last", 0),), r"depths\[0\]\[0\]: is last, and a primary has 3 layers\. 0 to 2, or a share"),
        (((3, 0),), r"depths\[0\]\[0\]: is 3"),
        (((1.0, 0),), r"depths\[0\]\[0\]: is 1.0"),
        (((-1, 0),), r"depths\[0\]\[0\]: is -1"),
        (((0, 6),), r"depths\[0\]\[1\]: is 6, and a peer has 5 layers\. 0 to 5"),
        (((0, 1.5),), r"depths\[0\]\[1\]: is 1.5"),
        (((0, True),), r"depths\[0\]\[1\]: is True"),
        (((0, 0), (7, 9)), r"depths\[1\]\[0\]: is 7.*\n.*depths\[1\]\[1\]: is 9"),
    ],
)
def test_depths_that_are_not_there_are_refused_all_at_once(depths: Any, said: str) -> None:
    with pytest.raises(MixmergeError, match=said):
        levels_of(depths, 3, 5)


def test_a_glue_names_the_expert_whose_layers_are_too_few(table: Callable[..., Any]) -> None:
    with pytest.raises(MixmergeError) as caught:
        table(["llama", "gemma"], depths=((2, 3),))
    assert [str(fault).split(".")[0] for fault in caught.value.faults] == [
        "depths[0][0]: is 2, and gemma has 2 layers",
        "depths[0][1]: is 3, and gemma has 2 layers",
    ]
    glue = table(["llama", "gemma"], depths=((2, 2),), primary="llama").glue  # gemma never reads
    assert (glue.primary_depths("llama"), glue.peer_depths("gemma")) == ((2,), (2,))
    with pytest.raises(MixmergeError, match="primary: no expert is called 'nobody'"):
        table(["llama"], primary="nobody")
    with pytest.raises(MixmergeError, match="experts: llama is there twice"):
        table(["llama", "llama"])
