"""Twin's router: what it learns of rows, what it is calibrated by, and that a row's weights are its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmerge.bank.attach import Attached
from mixmerge.bank.features import features_of
from mixmerge.bank.files import load_gate, save_gate
from mixmerge.bank.gate import Run
from mixmerge.bank.gates.mean import MeanGate
from mixmerge.bank.gates.router import Router, RouterOptions
from mixmerge.bank.gates.router_fit import fit_router, held_out
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.checkpoint.identity import digest
from mixmerge.data.rows import Row
from mixmerge.errors import CheckpointError, MixmergeError
from mixmerge.experts.encoding import mean_of
from mixmerge.experts.loading import load_expert

QUICK = RouterOptions(epochs=20, batch=32, learning_rate=1e-2)


def clusters(count: int, *, apart: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor, list[str]]:
    """Features of three experts around points of their own, on scales that differ by a thousand."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    points = torch.randn(3, 6, generator=draw) * apart
    features = (points[labels] + torch.randn(count, 6, generator=draw)) * torch.logspace(-2, 1, 6)
    return features, labels, [f"row {at}" for at in range(count)]


def test_rows_of_three_experts_are_told_apart() -> None:
    features, labels, keys = clusters(300)
    gate, found = fit_router(features, labels, keys, QUICK, experts=3)
    assert found.accuracy is not None
    assert found.accuracy > 0.95
    assert found.rows + found.held_out == 300
    assert 30 < found.held_out < 90
    assert sum(map(sum, found.confusion)) == found.held_out
    new, owners, _ = clusters(90)
    weights = gate.query(new)
    torch.testing.assert_close(weights.sum(1), torch.ones(90))
    assert float((weights.argmax(1) == owners).float().mean()) > 0.95
    assert gate.features == "hidden"
    assert not gate.training


def test_the_same_rows_in_any_order_give_the_same_router() -> None:
    features, labels, keys = clusters(60)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    state = torch.get_rng_state()
    one, told = fit_router(features, labels, keys, QUICK, experts=3)
    assert torch.equal(torch.get_rng_state(), state)
    other, again = fit_router(features[order], labels[order], [keys[at] for at in order], QUICK, experts=3)
    assert told == again
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@given(st.integers(0, 2**32), st.floats(0.05, 0.6))
def test_copies_of_a_row_stay_together(seed: int, share: float) -> None:
    keys = [f"row {at % 20}" for at in range(60)]
    held = held_out(keys, torch.arange(60) // 20, share=share, seed=seed, experts=3).view(3, 20)
    assert bool((held == held[0]).all())


def test_the_epoch_and_the_temperature_are_those_of_the_rows_held_out() -> None:
    features, labels, keys = clusters(240, apart=0.4)
    losses: list[float] = []
    long = RouterOptions(epochs=60, batch=32, learning_rate=2e-2, dropout=0.0, temperature="one")
    gate, found = fit_router(
        features, labels, keys, long, experts=3, progress=lambda *told: losses.append(told[2])
    )
    assert losses[found.epoch - 1] == min(losses)
    assert found.epoch < 60
    assert gate.temperature == 1.0
    warm, after = fit_router(features, labels, keys, QUICK, experts=3)
    assert warm.temperature == after.temperature != 1.0


def test_experts_with_few_rows_count_as_much() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(440, 2, generator=draw) + torch.tensor([[1.0, 0.0]] * 400 + [[-1.0, 0.0]] * 40)
    labels = torch.tensor([0] * 400 + [1] * 40)
    plain = RouterOptions(hidden=0, epochs=60, batch=512, learning_rate=5e-2, temperature="one")
    gate, _ = fit_router(features, labels, [str(at) for at in range(440)], plain, experts=2)
    middle = gate.query(torch.zeros(1, 2))[0, 0]
    assert abs(float(middle) - 0.5) < 0.2  # by their number alone it would be 0.4 off


def test_too_few_rows_hold_none_out() -> None:
    _, found = fit_router(torch.randn(2, 3), torch.tensor([0, 1]), ["a", "b"], QUICK, experts=2)
    assert (found.held_out, found.accuracy, found.temperature) in [(0, None, 1.0)]
    assert found.epoch == QUICK.epochs


def test_top_k_and_temperature_by_hand() -> None:
    gate = Router(3, 3, RouterOptions(hidden=0, top_k=2), temperature=0.5)
    with torch.no_grad():
        gate.network[0].weight.copy_(torch.eye(3))
        gate.network[0].bias.zero_()
    e = torch.tensor([2.0, 4.0]).exp()
    wanted = torch.tensor([[e[0] / e.sum(), e[1] / e.sum(), 0.0]])
    torch.testing.assert_close(gate.query(torch.tensor([[1.0, 2.0, -1.0]])), wanted)


@pytest.mark.parametrize("norm", ["batch", "layer", "none"])
def test_weights_depend_on_nothing_but_the_row(norm: Any, tmp_path: Path) -> None:
    features, labels, keys = clusters(60)
    training = RouterOptions(epochs=3, batch=16, norm=norm)
    gate, _ = fit_router(features, labels, keys, training, experts=3)
    together = gate.query(features)
    before = {name: value.clone() for name, value in gate.state_dict().items()}
    for row in (0, 17):
        torch.testing.assert_close(gate.query(features[row : row + 1])[0], together[row])
    assert all(torch.equal(before[name], value) for name, value in gate.state_dict().items())
    save_gate(tmp_path, gate, bank="the bank", experts=["a", "b", "c"])
    again = load_gate(tmp_path, bank="the bank")
    assert again.settings() == gate.settings()
    assert torch.equal(again.query(features), together)
    with pytest.raises(MixmergeError, match="another bank"):
        load_gate(tmp_path, bank="another")


def test_every_parameter_gets_a_gradient() -> None:
    gate = Router(3, 4)
    (gate.query(torch.randn(5, 4)) * torch.randn(5, 3)).sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in gate.parameters())


def test_bad_features_and_experts_without_rows() -> None:
    with pytest.raises(MixmergeError) as caught:
        fit_router(torch.full((2, 3), torch.nan), torch.tensor([0, 0]), ["a", "b"], QUICK, experts=2)
    assert [str(fault) for fault in caught.value.faults] == [
        "gate: features of some rows hold NaN or Inf. Check the shared model.",
        "gate: expert 1 has no rows to learn from. Give every expert rows of its own.",
    ]


def test_features_leave_padding_and_answers_out(family: Any) -> None:
    model = load_expert(family("llama", experts=0, dtype="float32").base)
    rows = [Row(prompt="one two three four five", answer=" six"), Row(prompt="1 + 2 = ", answer="3")]
    together = features_of(model, rows, batch_size=2)
    assert sorted(together.rows) == [0, 1]
    for place, at in enumerate(together.rows):
        alone = features_of(model, [Row(prompt=rows[at].prompt)])
        torch.testing.assert_close(alone.values[0], together.values[place], atol=1e-5, rtol=1e-5)
    hidden, mask = torch.tensor([[[1.0], [3.0], [torch.nan]]]), torch.tensor([[True, True, False]])
    assert mean_of(hidden, mask).tolist() == [[2.0]]
    tokens = features_of(model, rows, tokens=4)
    assert sorted(set(tokens.rows)) == [0, 1]
    assert tokens.rows.count(0) == 4
    deep = features_of(model, rows, batch_size=2, layers=True)
    width = together.values.shape[1]
    assert deep.values.shape[1] == width * (model.model.config.num_hidden_layers + 1)
    torch.testing.assert_close(deep.values[:, -width:], together.values)
    unit = features_of(model, rows, unit=True)
    torch.testing.assert_close(unit.values.norm(dim=1), torch.ones(2))


def test_a_gate_of_tokens_sees_no_later_ones(family: Any) -> None:
    model = load_expert(family("llama", experts=0, dtype="float32").base).model
    name = "model.layers.0.mlp.up_proj.weight"
    o, d = model.get_parameter(name).shape
    draw = torch.Generator().manual_seed(0)
    entries: list[Entry | None] = [
        Entry(torch.randn(2, d, generator=draw), torch.randn(2, o, generator=draw)) for _ in range(2)
    ]
    gate = Router(2, 32, RouterOptions(per_token=True, hidden=1))
    assert gate.second_pass
    assert gate.features == ""
    attached = Attached(model, Bank(("a", "b"), {name: side_by_side(name, entries)}, {}), gate)
    ids = torch.randint(3, 270, (2, 8), generator=draw)

    def answered(ids: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = model.base_model(ids).last_hidden_state
            with attached.running(Run(hidden=hidden)), attached.logged() as log:
                logits: Tensor = model(ids).logits
        assert log[0][1].weights.shape == (*ids.shape, 2)
        return logits

    whole = answered(ids)
    torch.testing.assert_close(answered(ids[:, :5]), whole[:, :5], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answered(ids[1:]), whole[1:], atol=1e-5, rtol=1e-5)


def test_a_damaged_gate_is_refused(tmp_path: Path) -> None:
    save_gate(tmp_path, Router(2, 3), bank="b")
    file = tmp_path / "gate.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"gate\.safetensors"):
        load_gate(tmp_path, bank="b")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"inputs": 10**7}, "its settings are of other tensors than gate.safetensors has"),
        ({"options": []}, "is damaged"),
        ({"inputs": float("inf")}, "is damaged"),
        ({"options": {"width": 1e-9, "hidden": -1}}, "is damaged"),
    ],
)
def test_settings_that_no_gate_has_written(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    """Nothing of the size they say is made."""
    save_gate(tmp_path, Router(2, 3), bank="b")
    card = json.loads((tmp_path / "gate.json").read_text())
    card["settings"] |= settings
    (tmp_path / "gate.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match=words):
        load_gate(tmp_path, bank="b")


def test_places_that_no_gate_has_written(tmp_path: Path) -> None:
    save_gate(tmp_path, MeanGate(2), bank="b")
    card = json.loads((tmp_path / "gate.json").read_text())
    for places in ({"experts": 2, "sites": []}, {"experts": 2, "sites": {"w": [3]}}):
        card |= {"kind": "arrow", "settings": {"places": places, "options": {}}}
        (tmp_path / "gate.json").write_text(json.dumps(card))
        with pytest.raises(CheckpointError, match="is damaged"):
            load_gate(tmp_path, bank="b")


def test_a_gate_with_nan_is_refused(tmp_path: Path) -> None:
    save_gate(tmp_path, Router(2, 3), bank="b")
    state = load_file(tmp_path / "gate.safetensors")
    state["mean"][0] = float("nan")
    save_file(state, tmp_path / "gate.safetensors")
    card = json.loads((tmp_path / "gate.json").read_text())
    card["sha256"] = digest([tmp_path / "gate.safetensors"])
    (tmp_path / "gate.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="mean holds NaN or Inf"):
        load_gate(tmp_path, bank="b")


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"features": "text"}])
def test_a_router_is_fitted_as_other_gates_are(family: Any, options: dict[str, Any]) -> None:
    from mixmerge.bank.fitting import fit_gate

    model = load_expert(family("llama", experts=0, dtype="float32").base)
    name = "model.layers.0.mlp.up_proj.weight"
    o, d = model.model.get_parameter(name).shape
    entries: list[Entry | None] = [Entry(torch.randn(2, d), torch.randn(2, o)) for _ in range(2)]
    bank = Bank(("words", "sums"), {name: side_by_side(name, entries)}, {})
    rows = {
        "words": [Row(text=f"the quick brown fox {number} jumps") for number in range(20)],
        "sums": [Row(prompt=f"{number} + {number} = ", answer="?") for number in range(20)],
    }

    def encode(texts: Any) -> Tensor:
        return torch.tensor([[float(len(text)), text.count("+")] for text in texts])

    said = {"epochs": 12, "batch": 8, "learning_rate": 0.02, **options}
    gate: Any = fit_gate("router", said, bank, model=model, rows=rows, encode=encode)
    assert gate.second_pass == (options == {"per_token": True})
    if options == {"features": "text"}:
        assert gate.query(encode(["7 + 7 = "])).argmax() == 1
    with pytest.raises(MixmergeError, match="the expert 'sums' has none"):
        fit_gate("router", said, bank, model=model, rows={"words": rows["words"]}, encode=encode)
