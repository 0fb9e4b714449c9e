"""What every gate keeps, in a real model: rows apart, one expert itself, no state that moves, saved and read again."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.bank.attach import Attached
from mixmerge.bank.fitting import fit_gate, gate_options
from mixmerge.bank.fitting_steps import task_loss
from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.gates import GATES
from mixmerge.bank.gates.choosing import standardised
from mixmerge.bank.gates.places import Places
from mixmerge.bank.gates.refined import Tensors
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.data.batches import Batch
from mixmerge.experts.loading import LoadedExpert
from mixmerge.registry import find

HIDDEN, FEATURES, TOKENS = 32, 6, 7
LINEAR = tuple(
    f"model.layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
)
TABLE, NORM, BIAS = (
    "model.embed_tokens.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.0.self_attn.q_proj.bias",
)
# kind -> options; some kinds twice
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean": ("mean", {}),
    "phatgoose": ("phatgoose", {}),
    "arrow": ("arrow", {"top_k": 2}),
    "arrow by factors": ("arrow", {"top_k": 2, "mix": "factors"}),
    "average_activation": ("average_activation", {}),
    "glider": ("glider", {}),
    "smile": ("smile", {"gate_k": 2, "top_k": 2, "others": "mean"}),
    "xlora": ("xlora", {"scope": "layer"}),
    "xlora of some": ("xlora", {"top_k": 2, "depth": 2, "size": 16}),
    "lora_mixer": ("lora_mixer", {}),
    "lorahub": ("lorahub", {}),
    "smora": ("smora", {"active": 3}),
    "flylora": ("flylora", {"active": 3}),
    "self_rank": ("self_rank", {"active": 3, "values": "softmax"}),
    "router": ("router", {"hidden": 0}),
    "router by task": ("router", {"hidden": 0, "task": {"hidden": 5}}),
    "router by task, of some": (
        "router",
        {"hidden": 0, "top_k": 2, "task": {"hidden": 5, "scope": "site", "ranks": False}},
    ),
}


@pytest.fixture(scope="module")
def base(family: Any) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family("llama_bias").base, dtype=torch.float32).eval()
    return model.requires_grad_(False)


def make_bank(base: Any, experts: int = 3) -> Bank:
    """Experts of rank 2, one of which lacks one site; with a table, a norm's gain and a bias."""
    draw = torch.Generator().manual_seed(5)
    shapes = dict(base.named_parameters())
    sites = {}
    for name in (*LINEAR, TABLE):
        o, d = shapes[name].shape
        inputs, outputs, kind = (o, d, "embedding") if name == TABLE else (d, o, "linear")
        entries: list[Entry | None] = []
        for expert in range(experts):
            a, b = torch.randn(2, inputs, generator=draw), torch.randn(2, outputs, generator=draw) * 0.1
            absent = expert == 1 and name == LINEAR[1]
            entries.append(None if absent else Entry(a.T if name == TABLE else a, b, 0.5 + expert))
        sites[name] = side_by_side(name, entries, kind=kind)  # type: ignore[arg-type]
    vectors = {name: torch.randn(experts, *shapes[name].shape, generator=draw) * 0.1 for name in (NORM, BIAS)}
    return Bank(tuple(f"e{number}" for number in range(experts)), sites, vectors)


def make_gate(kind: str, options: dict[str, Any], bank: Bank) -> Gate:
    """A gate with something to say: from the factors, or any values."""
    found: Any = find("gate", kind)
    said: Any = gate_options(kind, options)
    if kind in ("mean", "arrow", "smile", "self_rank"):
        return fit_gate(kind, options, bank)
    places = Places.of(bank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        sizes = {"glider": [FEATURES], "xlora": [HIDDEN]}.get(kind, [])
        gate: Gate
        if kind == "router":
            of = Tensors.of(bank, said.task.scope) if said.task else None
            gate = found(len(bank.experts), FEATURES, said, tensors=of)
        else:
            gate = found(len(bank.experts), said) if kind == "lorahub" else found(places, said, *sizes)
        with torch.no_grad():
            for name, value in gate.state_dict().items():
                drawn = torch.randn(value.shape) * (0.3 if "bias" in name else 1.0)
                drawn = drawn.abs() + 0.1 if name == "deviation" else drawn
                value.copy_(standardised(drawn) if kind in ("phatgoose", "glider") else drawn)
    return gate.eval().requires_grad_(False)


def run_of(base: Any, gate: Gate, ids: Tensor, mask: Tensor, places: Tensor, features: Tensor) -> Run:
    hidden = None
    if gate.second_pass:
        hidden = base.model(ids, attention_mask=mask, position_ids=places).last_hidden_state
    return Run(gate.query(features) if gate.features else None, hidden, mask.bool())


def logits(
    base: Any, bank: Bank, gate: Gate, rows: Sequence[Sequence[int]], features: Tensor
) -> list[Tensor]:
    """Of each row, in one batch, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        run = run_of(base, gate, ids, mask, places, features)
        attached = Attached(base, bank, gate)
        with attached.running(run):
            found = base(ids, attention_mask=mask, position_ids=places).logits
        attached.detach()
    return [one[longest - len(row) :] for one, row in zip(found, rows, strict=True)]


def drawn_rows(count: int = 4) -> tuple[list[list[int]], Tensor]:
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 280, (count, TOKENS), generator=draw).tolist()
    return [row[: TOKENS - 2 * (number % 3)] for number, row in enumerate(ids)], torch.randn(
        count, FEATURES, generator=draw
    )


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_every_gate_is_held_to_this() -> None:
    assert {kind for kind, _ in KINDS.values()} == set(GATES) - {"given"}


@pytest.mark.parametrize("name", list(KINDS))
def test_a_row_is_itself_whatever_it_shares_a_batch_with(base: Any, name: str) -> None:
    kind, options = KINDS[name]
    bank = make_bank(base)
    gate = make_gate(kind, options, bank)
    before = {key: value.clone() for key, value in gate.state_dict().items()}
    rows, features = drawn_rows()
    together = logits(base, bank, gate, rows, features)
    order = [2, 0, 3, 1]
    turned = logits(base, bank, gate, [rows[at] for at in order], features[order])
    for at, row in enumerate(rows):
        (alone,) = logits(base, bank, gate, [row], features[at : at + 1])
        close(together[at], alone)
        close(turned[order.index(at)], alone)
    assert all(torch.equal(value, before[key]) for key, value in gate.state_dict().items())


@pytest.mark.parametrize("name", list(KINDS))
def test_no_token_looks_ahead(base: Any, name: str) -> None:
    kind, options = KINDS[name]
    bank = make_bank(base)
    gate = make_gate(kind, options, bank)
    rows, features = drawn_rows(1)
    (whole,) = logits(base, bank, gate, rows, features)
    (start,) = logits(base, bank, gate, [rows[0][:4]], features)
    close(start, whole[:4])


@pytest.mark.parametrize(
    "name", [name for name in KINDS if name.split()[0] not in ("smora", "lorahub") and "by task" not in name]
)
def test_one_expert_alone_is_that_expert(base: Any, name: str) -> None:
    kind, options = KINDS[name]
    bank = make_bank(base, experts=1)
    # Ranks that their own factors choose: all of them.
    chosen = {"flylora": {"active": 2}, "self_rank": {"active": 2}}.get(kind, options)
    rows, features = drawn_rows(1)
    (found,) = logits(base, bank, make_gate(kind, chosen, bank), rows, features)
    merged = copy.deepcopy(base)
    with torch.no_grad():
        for key, value in merged.named_parameters():
            if key in bank.sites:
                value += bank.sites[key].delta(torch.ones(1))
            elif key in bank.vectors:
                value += bank.vectors[key][0]
        close(found, merged(torch.tensor(rows)).logits[0])


@pytest.mark.parametrize("name", list(KINDS))
def test_a_gate_that_is_saved_and_read_again_says_the_same(base: Any, name: str) -> None:
    kind, options = KINDS[name]
    bank = make_bank(base)
    gate = make_gate(kind, options, bank)
    written = json.loads(json.dumps(gate.settings()))
    again = find("gate", kind).build(written)
    again.load_state_dict({key: value.clone() for key, value in gate.state_dict().items()})
    assert again.settings() == gate.settings()
    rows, features = drawn_rows(2)
    for one, other in zip(
        logits(base, bank, gate, rows, features),
        logits(base, bank, again.eval(), rows, features),
        strict=True,
    ):
        assert torch.equal(one, other)


def turned_bank(bank: Bank, order: list[int]) -> Bank:
    sites = {
        name: side_by_side(
            name,
            [site.entry(expert) if site.ranks[expert] else None for expert in order],
            kind=site.kind,
        )
        for name, site in bank.sites.items()
    }
    vectors = {name: one[order] for name, one in bank.vectors.items()}
    return Bank(tuple(bank.experts[expert] for expert in order), sites, vectors)


def turned_value(kind: str, key: str, value: Tensor, bank: Bank, order: list[int]) -> Tensor:
    if kind in ("smora", "flylora"):
        site = bank.sites[key.split(".", 1)[1].replace("/", ".")]
        ranks = [rank for expert in order for rank in range(site.bounds[expert], site.bounds[expert + 1])]
        return value[ranks]
    if kind == "router":
        if key.startswith("refined.factors"):
            site = bank.sites[key.rpartition(".")[2].replace("/", ".")]
            return torch.cat([value[site.bounds[one] : site.bounds[one + 1]] for one in order])
        if key.startswith("refined.network.0"):
            return value[:, order] if value.dim() == 2 else value
        by_expert = key.startswith(("network", "refined.network.2"))
        return value.unflatten(0, (-1, 3))[:, order].flatten(0, 1) if by_expert else value
    if kind == "xlora":
        last = value.shape[0] % 3 == 0  # (G * E, ...); the layer before has 16 outputs
        return value.unflatten(0, (-1, 3))[:, order].flatten(0, 1) if last else value
    return value[order]


@pytest.mark.parametrize("name", list(KINDS))
def test_the_order_of_experts_does_not_matter(base: Any, name: str) -> None:
    kind, options = KINDS[name]
    bank, order = make_bank(base), [2, 0, 1]
    other = turned_bank(bank, order)
    gate = make_gate(kind, options, bank)
    again = make_gate(kind, options, other)
    state = {key: turned_value(kind, key, value, bank, order) for key, value in gate.state_dict().items()}
    if kind in ("arrow", "smile"):
        assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    again.load_state_dict(state)
    rows, features = drawn_rows(2)
    for one, two in zip(
        logits(base, bank, gate, rows, features), logits(base, other, again, rows, features), strict=True
    ):
        close(one, two)


@pytest.mark.parametrize("name", ["xlora", "xlora of some", "lora_mixer", "router", "router by task"])
def test_every_parameter_learns_from_the_task(base: Any, name: str) -> None:
    kind, options = KINDS[name]
    bank = make_bank(base)
    gate = make_gate(kind, options, bank).requires_grad_(True).train()
    rows, features = drawn_rows(1)
    ids, mask = torch.tensor(rows), torch.ones(1, TOKENS, dtype=torch.int64)
    loss_mask = mask.bool().clone()
    loss_mask[:, 0] = False
    run = run_of(base, gate, ids, mask, mask.cumsum(-1) - 1, features)
    attached = Attached(base, bank, gate)
    with attached.running(run):
        loss = task_loss(LoadedExpert(base, None, "causal", "base"), Batch(ids, mask, loss_mask, None, (0,)))
    loss.backward()
    attached.detach()
    for key, value in gate.named_parameters():
        assert value.grad is not None, key
        assert value.grad.abs().sum() > 0, key
