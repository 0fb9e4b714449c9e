"""The primitive of a bank by hand, and a bank at work in real models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.bank.attach import Attached
from mixmerge.bank.gate import RowGate, Run
from mixmerge.bank.mix import Mix, apply, change
from mixmerge.bank.records import Bank, Entry, Site, side_by_side


def two_experts() -> Site:
    """Ranks 1 and 2: expert 0 adds 2 * x0 to output 0; expert 1 adds x1 to output 0 and 3 * x0 to output 1."""
    first = Entry(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 2.0)
    second = Entry(torch.eye(2).flip(0), torch.eye(2), torch.tensor([1.0, 3.0]))
    return side_by_side("m.weight", [first, second])


def test_by_hand_rows_tokens_and_ranks() -> None:
    site, u = two_experts(), torch.tensor([[[1.0, 10.0], [2.0, 20.0]]])  # (1, 2, 2)
    assert site.rank == 3
    assert site.owners.tolist() == [0, 1, 1]
    by_row = change(site, u, Mix(torch.tensor([[1.0, 0.5]])))
    assert by_row.tolist() == [[[2 + 5, 1.5], [4 + 10, 3.0]]]
    by_token = change(site, u, Mix(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])))
    assert by_token.tolist() == [[[2, 0], [20, 6]]]
    some = change(site, u, Mix(torch.tensor([[[0.5], [2.0]]]), torch.tensor([[[1], [0]]])))
    assert some.tolist() == [[[5, 1.5], [8, 0]]]
    ranks = change(site, u, Mix(torch.tensor([[1.0, 0.0, 1.0]]), by="rank"))
    assert ranks.tolist() == [[[2, 3], [4, 6]]]


def test_the_delta_is_what_the_change_multiplies_by() -> None:
    site, u = two_experts(), torch.randn(3, 4, 2)
    weights = torch.tensor([0.3, -1.2])
    torch.testing.assert_close(change(site, u, Mix(weights.expand(3, -1))), u @ site.delta(weights).T)


def test_factors_that_are_mixed_have_cross_terms() -> None:
    a, b = torch.randn(2, 2, 4), torch.randn(2, 2, 3)
    site = side_by_side("m", [Entry(a[0], b[0], 2.0), Entry(a[1], b[1], 0.5)])
    u, w = torch.randn(1, 5, 4), torch.tensor([0.7, 0.2])
    found = change(site, u, Mix(w[None], how="factors"))
    mixed_a = 0.7 * a[0] + 0.2 * a[1]
    mixed_b = 0.7 * 2.0 * b[0] + 0.2 * 0.5 * b[1]
    torch.testing.assert_close(found, u @ mixed_a.T @ mixed_b)


def _bank_of(model: torch.nn.Module, seed: int) -> tuple[Bank, list[dict[str, Tensor]]]:
    """Two experts that change every matrix and vector of a model, and their whole weights."""
    draw = torch.Generator().manual_seed(seed)
    sites: dict[str, Site] = {}
    vectors: dict[str, Tensor] = {}
    whole: list[dict[str, Tensor]] = [{}, {}]
    for name, value in model.named_parameters():
        if value.dim() == 1:
            vectors[name] = torch.randn(2, len(value), generator=draw) * 0.2
            changes = list(vectors[name])
        else:
            entries = []
            table = "embed" in name or "wte" in name or "wpe" in name
            turned = "attn.c_" in name or "mlp.c_" in name  # Conv1D
            for rank in (1, 3):
                o, d = value.shape if not (table or turned) else value.shape[::-1]
                a = torch.randn(d, rank, generator=draw)
                b = torch.randn(rank, o, generator=draw) * 0.05
                entries.append(Entry(a if table else a.T, b, 0.5))
            kind = "embedding" if table else "linear"
            head = model.get_output_embeddings()
            tied = table and head is not None and head.weight is value
            sites[name] = side_by_side(name, entries, kind=kind, tied=tied)  # type: ignore[arg-type, list-item]
            changes = [sites[name].delta(torch.eye(2)[expert]) for expert in range(2)]
            changes = [one.T if turned else one for one in changes]
        for expert in range(2):
            whole[expert][name] = changes[expert]
    return Bank(("one", "two"), sites, vectors), whole


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "qwen3", "gemma", "gpt_neox"])
def test_a_bank_is_each_expert_and_any_mixture_of_them(family: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family(name).base, dtype=torch.float32).eval()
    plain = copy.deepcopy(model)
    ids = torch.randint(0, model.config.vocab_size, (3, 7), generator=torch.Generator().manual_seed(0))
    bank, whole = _bank_of(model, 1)
    attached = Attached(model, bank, RowGate())
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.4, -0.3]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        with attached.running(Run(rows)):
            together = model(ids).logits
        for row, weights in enumerate(rows):
            merged = copy.deepcopy(plain)
            for key, value in merged.named_parameters():
                value += weights[0] * whole[0][key] + weights[1] * whole[1][key]
            torch.testing.assert_close(
                together[row], merged(ids[row : row + 1]).logits[0], atol=2e-4, rtol=2e-4
            )
    attached.detach()
    assert torch.equal(model(ids).logits, plain(ids).logits)


def test_apply_leaves_the_output_alone() -> None:
    site, u, y = two_experts(), torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    before = y.clone()
    torch.testing.assert_close(
        apply(site, u, y, Mix(torch.ones(2, 2))), y + change(site, u, Mix(torch.ones(2, 2)))
    )
    assert torch.equal(y, before)


def test_layers_that_see_one_vector_a_row(family: Any) -> None:
    """A pooler sees (B, d): the rows must not meet."""
    from transformers import BertModel

    model = BertModel.from_pretrained(family("bert").base, dtype=torch.float32).eval()
    bank, _ = _bank_of(model, 2)
    attached = Attached(model, bank, RowGate())
    ids, rows = torch.randint(0, model.config.vocab_size, (3, 5)), torch.rand(3, 2)
    with torch.no_grad():
        with attached.running(Run(rows)):
            together = model(ids).pooler_output
        for row in range(3):
            with attached.running(Run(rows[row : row + 1])):
                alone = model(ids[row : row + 1]).pooler_output
            torch.testing.assert_close(together[row : row + 1], alone)


def test_a_site_that_was_run_can_be_trained_through() -> None:
    site, u = two_experts(), torch.randn(1, 2, 2)
    with torch.inference_mode():
        change(site, u, Mix(torch.ones(1, 2)))
    weights = torch.ones(1, 2, requires_grad=True)
    change(site, u, Mix(weights)).sum().backward()
    assert weights.grad is not None


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_changes_the_type_of_products_and_not_what_is_mixed(family: Any, trained: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family("llama").base, dtype=torch.float32).eval()
    bank, _ = _bank_of(model, 3)
    attached = Attached(model, bank, RowGate())
    ids = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    rows = torch.tensor([[1.0, 0.0], [0.3, 0.6]], requires_grad=trained)
    with torch.set_grad_enabled(trained), attached.running(Run(rows)):
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = model(ids).logits.float()
    assert torch.nn.functional.cosine_similarity(exact, rounded, dim=-1).min() > 0.999
    if trained:
        rounded.sum().backward()
        assert rows.grad is not None


def test_factors_under_autocast_are_made_once_for_each_type(family: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family("llama").base, dtype=torch.float32).eval()
    bank, _ = _bank_of(model, 3)
    attached = Attached(model, bank, RowGate())
    site = next(iter(attached.bank.sites.values()))
    outputs = torch.zeros(1, 1, site.b.shape[1])
    assert attached.like(site, outputs) is site
    with torch.inference_mode():
        short = attached.like(site, outputs.bfloat16())
    assert (short.a.dtype, short.b.dtype, short.scale.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )
    assert not short.a.is_inference()
    assert attached.like(site, outputs.bfloat16()) is short
    half = attached.like(site, outputs.half())
    assert half.b.dtype is torch.float16
    assert attached.like(site, outputs.bfloat16()) is not short
    assert attached.like(site, outputs.double()) is site


def test_what_is_done_again_is_what_would_be_done_anew(family: Any) -> None:
    """Decoding: the same weights token after token, other rows, and weights that are changed in place."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family("llama").base, dtype=torch.float32).eval()
    bank, _ = _bank_of(model, 3)
    attached = Attached(model, bank, RowGate())
    rows = torch.tensor([[1.0, 0.0], [0.3, 0.6], [0.0, 0.0]])
    tokens = torch.tensor([[5], [6], [7]])

    def logits(weights: Tensor, ids: Tensor) -> Tensor:
        with attached.running(Run(weights)):
            found: Tensor = model(ids).logits
        return found

    def alone(weights: Tensor, ids: Tensor) -> Tensor:
        return torch.cat([logits(one[None].clone(), at[None]) for one, at in zip(weights, ids, strict=True)])

    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(logits(rows, tokens), alone(rows, tokens), atol=1e-5, rtol=1e-5)
        first = logits(rows, tokens)
        assert torch.equal(logits(rows, tokens), first)
        with attached.logged() as log:
            logits(rows, tokens)
        assert {name for name, _ in log} >= set(bank.sites)
        rows[2, 1] = 0.5
        changed = logits(rows, tokens)
        torch.testing.assert_close(changed, alone(rows, tokens), atol=1e-5, rtol=1e-5)
        assert not torch.equal(changed[2], first[2])
        torch.testing.assert_close(
            logits(rows, tokens.repeat(1, 2))[:, 0], changed[:, 0], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(logits(rows[:2], tokens[:2]), changed[:2], atol=1e-5, rtol=1e-5)
    learned = rows.clone().requires_grad_(True)
    logits(learned, tokens).sum().backward()
    assert learned.grad is not None
