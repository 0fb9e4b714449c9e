"""One mixture for all rows in the model's own weights, what biases and gains get, and the bench of it all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixmerge.bank.attach import Attached
from mixmerge.bank.gate import Gate, RowGate, Run
from mixmerge.bank.mix import Mix, dense
from mixmerge.bank.picks import picks_of
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.bank.vectors import mixed_vectors


def _bank_of(model: Any) -> Bank:
    """Two experts at each matrix and vector."""
    draw, sites, vectors = torch.Generator().manual_seed(3), {}, {}
    head = model.get_output_embeddings()
    for name, value in model.named_parameters():
        if value.dim() == 1:
            vectors[name] = torch.randn(2, len(value), generator=draw) * 0.1
            continue
        table = "embed" in name or "wte" in name or "wpe" in name
        turned = "attn.c_" in name or "mlp.c_" in name
        o, d = value.shape[::-1] if table or turned else value.shape
        entries: list[Entry | None] = []
        for rank in (2, 3):
            a = torch.randn((d, rank) if table else (rank, d), generator=draw)
            entries.append(Entry(a, torch.randn(rank, o, generator=draw) * 0.02, 0.5))
        tied = table and head.weight is value
        sites[name] = side_by_side(name, entries, kind="embedding" if table else "linear", tied=tied)
    return Bank(("one", "two"), sites, vectors)


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_a_mixture_for_all_rows_is_folded_and_taken_out_again(family: Any, name: str) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family(name).base, dtype=torch.float32).eval()
    held = dict(model.named_parameters())
    bytes_before = {key: value.clone() for key, value in held.items()}
    attached = Attached(model, _bank_of(model), RowGate())
    ids, weights = torch.randint(0, model.config.vocab_size, (2, 5)), torch.tensor([0.7, -0.2])
    with torch.no_grad():
        with attached.running(Run(weights.expand(2, -1))):
            wanted = model(ids).logits
        with attached.folded(weights):
            found = model(ids).logits
            assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=2e-4)
    after = dict(model.named_parameters())
    assert all(after[key] is held[key] and torch.equal(held[key], bytes_before[key]) for key in held)


def test_vectors_of_rows_and_tokens() -> None:
    deltas = torch.randn(5, 7)
    entries = torch.rand(3, 4, 5).argsort(-1)[..., :2]
    for mix in (
        Mix(torch.rand(3, 5)),
        Mix(torch.eye(5)[:3]),
        Mix(torch.zeros(3, 5)),
        Mix(torch.rand(3, 4, 5)),
        Mix(torch.rand(3, 2), entries[:, 0]),
        Mix(torch.rand(3, 4, 2), entries),
    ):
        wanted = dense(mix, 5) @ deltas
        found = mixed_vectors(deltas, picks_of(mix, 5)).view_as(wanted)
        torch.testing.assert_close(found, wanted)
    weights = torch.rand(12, 2, dtype=torch.float64, requires_grad=True)

    def of(weights: torch.Tensor) -> torch.Tensor:
        return mixed_vectors(deltas.double(), picks_of(Mix(weights.view(3, 4, 2), entries), 5))

    assert torch.autograd.gradcheck(of, (weights,))


class _Odd(Gate):
    """A token's own id says whose it is."""

    kind = "odd"

    def mix(self, site: str, u: torch.Tensor, run: Run) -> Mix:
        assert run.rows is not None
        own = run.rows.long()[..., None]  # (B, T, 1)
        return Mix(torch.ones(own.shape), own)


def test_tokens_of_one_row_get_their_own_vectors(family: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family("gpt2").base, dtype=torch.float32).eval()
    name = next(key for key, _ in model.named_parameters() if key.endswith("ln_f.weight"))
    bias = name.replace("weight", "bias")
    width = model.config.hidden_size
    bank = Bank(("one", "two"), {}, {name: torch.randn(2, width), bias: torch.randn(2, width)})
    attached = Attached(model, bank, _Odd())
    ids, own = torch.randint(0, 50, (1, 4)), torch.tensor([[0, 1, 1, 0]])
    with torch.no_grad():
        with attached.running(Run(own)):
            found = model(ids).logits
        for expert in (0, 1):
            with attached.folded(torch.eye(2)[expert]):
                alone = model(ids).logits
            torch.testing.assert_close(found[own == expert], alone[own == expert], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_the_bench_runs(programs: Any, tmp_path: Path) -> None:
    bench = Path(__file__).parents[2] / "examples" / "bench_dynamic.py"
    done = programs(bench, "--small", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for said in ("(PEFT - base) / (ours - base)", "merging a row at a time", "folded / merged", "backward"):
        assert said in done.stdout
    assert "largest tensor / (tokens x experts x width)" in done.stdout
    for said in ("model in autocast", "model in bfloat16", "Arrow over 4 adapters", "2 threads: model"):
        assert said in done.stdout
