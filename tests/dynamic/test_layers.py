"""Layers that see something else than ``(B, T, d)``: tokens of all rows as one, one token of a row, heads, places."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mixmerge.bank.attach import Attached
from mixmerge.bank.fitting import fit_gate
from mixmerge.bank.gate import Gate, RowGate, Run
from mixmerge.bank.gates.router import Router, RouterOptions
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.dynamic.model import DynamicModel
from mixmerge.engines.decoding import Told
from mixmerge.errors import MixmergeError

EXPERTS = ("one", "two", "three")
SHARED: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
WIDE = {**SHARED, "intermediate_size": 48}
HEADS = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "opt": ("OPTConfig", "OPTForCausalLM", {**SHARED, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bert": ("BertConfig", "BertForSequenceClassification", {**WIDE, "num_labels": 3}),
    "roberta": ("RobertaConfig", "RobertaForSequenceClassification", {**WIDE, "num_labels": 3}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", HEADS),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", HEADS),
}
IDS = torch.randint(3, 300, (3, 7), generator=torch.Generator().manual_seed(7))


def model_of(name: str) -> Any:
    config, model, settings = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, model)(getattr(transformers, config)(**settings)).eval()


def bank_of(model: Any) -> Bank:
    """Three experts that change every parameter."""
    draw, sites, vectors = torch.Generator().manual_seed(1), {}, {}
    head = model.get_output_embeddings()
    for name, value in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if value.dim() == 1:
            vectors[name] = 0.05 * torch.randn(3, len(value), generator=draw)
            continue
        table = isinstance(module, torch.nn.Embedding)
        entries: list[Entry | None] = [
            Entry(
                0.2 * torch.randn(*((len(value), rank) if table else (rank, value.shape[1])), generator=draw),
                0.1 * torch.randn(rank, value.shape[1] if table else len(value), generator=draw),
                kind="embedding" if table else "linear",
                tied=table and head is not None and head.weight is module.weight,
            )
            for rank in (1, 3, 2)
        ]
        sites[name] = side_by_side(name, entries)
    return Bank(EXPERTS, sites, vectors)


def mask_of(name: str) -> torch.Tensor:
    """Encoders pad on the right."""
    mask = torch.ones_like(IDS)
    if "bert" in name:
        mask[1, 4:] = mask[2, 6:] = 0
    else:
        mask[1, :3] = mask[2, :1] = 0
    return mask


def gate_of(kind: str, bank: Bank) -> Gate:
    if kind != "router":
        return fit_gate(kind, {}, bank)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Router(3, 32, RouterOptions(per_token=True, hidden=0))


@pytest.mark.parametrize("name", MODELS)
def test_a_mixture_is_the_model_with_its_changes(name: str) -> None:
    """Places of OPT too, which are looked up by a mask."""
    mixed, changed, weights = model_of(name), model_of(name), torch.tensor([0.5, 0.3, 0.2])
    bank = bank_of(mixed)
    with torch.no_grad():
        for key, value in changed.named_parameters():
            value += bank.sites[key].delta(weights) if key in bank.sites else weights @ bank.vectors[key]
        attached = Attached(mixed, bank, RowGate())
        for given in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": mask_of(name)}):
            with attached.running(Run(weights.expand(3, -1))):
                found = mixed(**given).logits
            torch.testing.assert_close(found, changed(**given).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["router", "arrow"])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_itself_and_is_explained_as_itself(name: str, kind: str) -> None:
    model, mask = model_of(name), mask_of(name)
    bank = bank_of(model)
    dynamic = DynamicModel(model, None, bank, gate_of(kind, bank))
    with torch.no_grad():
        whole = dynamic(IDS, mask)
    rows = [ids[there.bool()].tolist() for ids, there in zip(IDS, mask, strict=True)]
    told = [Told(None, row, "") for row in rows]
    shown = dynamic._explained(IDS, mask, told, None)
    for at, row in enumerate(rows):
        ids = torch.tensor([row])
        with torch.no_grad():
            alone = dynamic(ids)[0]
        together = whole[at][mask[at].bool()] if whole.dim() == 3 else whole[at]
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        (own,) = dynamic._explained(ids, torch.ones_like(ids), [told[at]], None)
        assert own.sites.keys() == shown[at].sites.keys()
        for site, weights in own.sites.items():
            assert shown[at].sites[site] == pytest.approx(weights, abs=1e-4), site


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_tokens_have_weights_of_their_own_in_norms_of_heads(name: str) -> None:
    """Whichever of tokens and heads comes first, as many tokens as heads or not."""
    model = model_of(name)
    bank = bank_of(model)
    dynamic = DynamicModel(model, None, bank, gate_of("router", bank))
    with torch.no_grad():
        whole = dynamic(IDS)
        for count in (1, 2, 4):
            torch.testing.assert_close(dynamic(IDS[:, :count]), whole[:, :count], atol=1e-5, rtol=1e-5)


def test_vectors_of_another_length_are_refused() -> None:
    model = model_of("qwen3")
    name = "model.norm.weight"
    with pytest.raises(MixmergeError, match=r"is of 1 numbers, and the model's is \(32,\)"):
        Attached(model, Bank(EXPERTS, {}, {name: torch.ones(3, 1)}), RowGate())
