"""Gates fitted on real models: what learns, what stays, who is chosen, what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mixmerge.bank.attach import Attached
from mixmerge.bank.fitting import fit_gate, gate_options, with_expert
from mixmerge.bank.fitting_job import only
from mixmerge.bank.fitting_steps import drawn_batches, row_batches, task_loss
from mixmerge.bank.gate import Gate, RowGate, Run
from mixmerge.bank.gates.phatgoose import PhatgooseOptions
from mixmerge.bank.mix import dense
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.data.rows import Row
from mixmerge.errors import MixmergeError
from mixmerge.experts.loading import LoadedExpert, load_expert

TARGETS = ("q_proj", "o_proj", "down_proj")
QUICK = {"steps": 40, "batch_size": 4, "learning_rate": 0.02}
WORDS = ("quick", "brown", "fox", "jumps", "lazy", "dog")


def letters(count: int, start: int = 0) -> list[Row]:
    return [
        Row(prompt=f"the {WORDS[at % 6]} {WORDS[at // 6 % 6]}", answer=" over over")
        for at in range(start, start + count)
    ]


def digits(count: int, start: int = 0) -> list[Row]:
    return [
        Row(prompt=f"{at} + {3 * at % 17} = {at}", answer=" 7 7 7")
        for at in range(start + 100, start + 100 + count)
    ]


@pytest.fixture(scope="module")
def base(family: Any) -> LoadedExpert:
    return load_expert(family("llama").base)


def trained(base: LoadedExpert, rows: Sequence[Row], seed: int) -> dict[str, Entry]:
    """An adapter of rank 4 that has learned what rows say."""
    peft = pytest.importorskip("peft")
    import copy

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(base.model), config)
        adam = torch.optim.Adam([one for one in model.parameters() if one.requires_grad], lr=1e-2)
        (batch,) = row_batches(rows[:8], base, batch_size=8, max_tokens=64)
        for _ in range(60):
            loss = task_loss(LoadedExpert(model, base.tokenizer, "causal", "adapter"), batch)
            adam.zero_grad()
            loss.backward()
            adam.step()
    parts = {name: value.detach() for name, value in model.named_parameters() if "lora_" in name}
    found = {}
    for name, a in parts.items():
        if "lora_A" in name:
            site = name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
            found[site] = Entry(a, parts[name.replace("lora_A", "lora_B")].T.contiguous(), 2.0)
    return found


@pytest.fixture(scope="module")
def bank(base: LoadedExpert) -> Bank:
    """Two experts: the first knows what comes after words, the second what comes after sums."""
    parts = [trained(base, letters(8), 0), trained(base, digits(8), 1)]
    return Bank(
        ("words", "sums"), {site: side_by_side(site, [one[site] for one in parts]) for site in parts[0]}, {}
    )


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return {"words": letters(8), "sums": digits(8)}


def checksum(base: LoadedExpert, bank: Bank) -> str:
    found = hashlib.sha256()
    tensors = [*base.model.state_dict().values()]
    tensors += [part for site in bank.sites.values() for part in (site.a, site.b, site.scale)]
    for one in tensors:
        found.update(one.contiguous().numpy().tobytes())
    return found.hexdigest()


def encode(texts: Sequence[str]) -> Tensor:
    """Features of texts: how many of their characters are digits, and how many letters."""
    return torch.tensor(
        [[sum(map(str.isdigit, text)), sum(map(str.isalpha, text))] for text in texts]
    ).float()


def shares(base: LoadedExpert, bank: Bank, gate: Gate, rows: Sequence[Row]) -> Tensor:
    """``(E,)``: the mean weight of each expert over real tokens and sites."""
    attached, found = Attached(base.model, bank, gate), []
    texts = [row.prompt for row in rows]
    for batch in row_batches(rows, base, batch_size=len(rows), max_tokens=64):
        mask = batch.attention_mask.bool()
        with torch.no_grad():
            hidden = base.model.model(**batch.inputs()).last_hidden_state if gate.second_pass else None
            query = gate.query(encode(texts)) if gate.features else None
            with attached.running(Run(query, hidden, mask)), attached.logged() as log:
                base.model(**batch.inputs())
        found += [dense(mix, len(bank.experts)).expand(*mask.shape, -1)[mask].mean(0) for _, mix in log]
    attached.detach()
    return torch.stack(found).mean(0)


class Losses(dict[str, list[float]]):
    def __call__(self, what: str, done: int, total: int, loss: float | None) -> None:
        assert 1 <= done <= total
        if loss is not None:
            self.setdefault(what, []).append(loss)


def fitted(
    kind: str,
    base: LoadedExpert,
    bank: Bank,
    rows: Mapping[str, Sequence[Row]],
    said: dict[str, Any],
    seed: int = 0,
) -> tuple[Gate, Losses]:
    losses = Losses()
    gate = fit_gate(kind, said, bank, model=base, rows=rows, encode=encode, seed=seed, progress=losses)
    return gate, losses


LEARNED = {
    "phatgoose": QUICK,
    "glider": QUICK,
    "average_activation": {"score": "standardised"},
    "xlora": QUICK,
    "lora_mixer": {**QUICK, "domain": 0.5},
}


@pytest.mark.parametrize("kind", list(LEARNED))
def test_the_right_expert_is_chosen_and_nobody_else_changed(
    base: LoadedExpert, bank: Bank, rows: dict[str, list[Row]], kind: str
) -> None:
    before = checksum(base, bank)
    gate, losses = fitted(kind, base, bank, rows, LEARNED[kind])
    assert checksum(base, bank) == before
    assert not any(one.requires_grad or one.grad is not None for one in base.model.parameters())
    assert not any(one.requires_grad for one in gate.parameters())
    words, sums = shares(base, bank, gate, letters(8, 20)), shares(base, bank, gate, digits(8, 20))
    assert words[0] > sums[0]
    assert words.argmax() == 0
    assert sums.argmax() == 1
    for curve in losses.values():
        assert sum(curve[-5:]) < sum(curve[:5])
    again, _ = fitted(kind, base, bank, rows, LEARNED[kind])
    state = gate.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())


def test_lorahub_finds_the_expert_of_a_task(base: LoadedExpert, bank: Bank) -> None:
    pytest.importorskip("nevergrad")
    said = {"budget": 40, "how": "factors"}
    few = letters(5)
    gate, losses = fitted("lorahub", base, bank, {"": few}, said)
    (batch,) = row_batches(few, base, batch_size=5, max_tokens=64)
    with torch.no_grad():
        alone, found = float(task_loss(base, batch)), []
        for one, run in ((gate, Run()), (RowGate(), Run(torch.tensor([[1.0, 0.0]] * 5)))):
            attached = Attached(base.model, bank, one)
            with attached.running(run):
                found.append(float(task_loss(base, batch)))
            attached.detach()
    assert len(losses["lorahub"]) == 40
    mixed, expert = found
    assert expert < alone - 0.5
    assert mixed < expert + 0.05
    assert gate.weights.abs().max() <= 1.5
    assert gate.weights[0] > gate.weights[1]
    again, _ = fitted("lorahub", base, bank, {"": few}, said)
    assert torch.equal(gate.weights, again.weights)


@pytest.mark.parametrize("kind", ["phatgoose", "average_activation", "arrow", "smile", "mean", "glider"])
def test_a_new_expert_alone_is_fitted(
    base: LoadedExpert, bank: Bank, rows: dict[str, list[Row]], kind: str
) -> None:
    said = {"steps": 2, "batch_size": 2} if kind in ("phatgoose", "glider") else {}
    first = fit_gate(kind, said, only(bank, 0), model=base, rows={"words": rows["words"]}, encode=encode)
    whole = fit_gate(kind, said, bank, model=base, rows=rows, encode=encode)
    grown = with_expert(first, bank, model=base, rows=rows["sums"], encode=encode)
    assert grown.settings() == whole.settings()
    state = whole.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in grown.state_dict().items())
    with pytest.raises(MixmergeError, match="one expert more"):
        with_expert(whole, bank, model=base, rows=rows["sums"], encode=encode)


@pytest.mark.parametrize("kind", ["xlora", "lora_mixer"])
def test_a_gate_of_all_experts_takes_no_new_one(
    base: LoadedExpert, bank: Bank, rows: dict[str, list[Row]], kind: str
) -> None:
    gate = fit_gate(kind, {"steps": 1}, only(bank, 0), model=base, rows={"words": rows["words"]})
    with pytest.raises(MixmergeError, match=r"for all its experts at once.*phatgoose"):
        with_expert(gate, bank, model=base, rows=rows["sums"])


def test_answers_alone_are_learned_from_and_short_rows_are_left_out(base: LoadedExpert) -> None:
    rows = [
        Row(prompt="the fox", answer=" dog"),
        Row(text="x" * 60 + " end"),
        Row(prompt="lazy " * 40, answer="dog"),
    ]
    options = PhatgooseOptions(steps=3, batch_size=2, max_tokens=20)
    drawn = drawn_batches(rows, base, options, seed=0)
    for _ in range(3):
        batch, taken = next(drawn)
        assert set(taken) <= {0, 1}  # the prompt of the last leaves no room for an answer
        answered = batch.loss_mask[taken.index(0)] if 0 in taken else None
        if answered is not None:
            assert int(answered.sum()) < 5
    with pytest.raises(MixmergeError, match="none of 1 rows has a token to predict"):
        next(drawn_batches(rows[2:], base, options, seed=0))


def test_a_classifier_is_learned_by_its_classes(family: Any, tmp_path: Any) -> None:
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    source = family("bert").base
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(AutoConfig.from_pretrained(source, num_labels=2))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path)
    base = load_expert(tmp_path)
    draw = torch.Generator().manual_seed(0)
    names = ("bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.weight", "classifier.weight")
    shapes = {name: dict(base.model.named_parameters())[name].shape for name in names}

    def entry(name: str) -> Entry:
        o, d = shapes[name]
        return Entry(torch.randn(2, d, generator=draw), torch.randn(2, o, generator=draw) * 0.2)

    bank = Bank(("a", "b"), {name: side_by_side(name, [entry(name), entry(name)]) for name in names}, {})
    rows = {
        "a": [Row(text=f"dog {at}", label=at % 2) for at in range(6)],
        "b": [Row(text="fox", label=1)] * 3,
    }
    for kind in ("phatgoose", "average_activation", "xlora", "lora_mixer"):
        said = {} if kind == "average_activation" else {"steps": 2, "batch_size": 3}
        gate = fit_gate(kind, said, bank, model=base, rows=rows)
        assert all(value.isfinite().all() for value in gate.state_dict().values())
    bare = {"a": [Row(text="dog")], "b": [Row(text="fox")]}
    with pytest.raises(MixmergeError, match="rows have no label"):
        fit_gate("phatgoose", {"steps": 1}, bank, model=base, rows=bare)


def test_what_is_missing_is_said_at_once(base: LoadedExpert, bank: Bank, rows: dict[str, list[Row]]) -> None:
    with pytest.raises(MixmergeError) as caught:
        fit_gate(
            "glider",
            {"descriptions": {"word": "w"}},
            bank,
            rows={"words": rows["words"], "sum": rows["sums"]},
        )
    said = str(caught.value)
    for part in (
        "the base at hand",
        "'sums' has none",
        "text encoder",
        "no expert 'sum'",
        "Did you mean 'words'",
    ):
        assert part in said
    mute = LoadedExpert(base.model, None, "causal", "the base")
    with pytest.raises(MixmergeError, match="the base: has no tokenizer"):
        fit_gate("phatgoose", {}, bank, model=mute, rows=rows)
    with pytest.raises(MixmergeError, match="learns from rows, and there are none"):
        fit_gate("xlora", {}, bank, model=base, rows={})
    with pytest.raises(MixmergeError, match="router trained elsewhere"):
        fit_gate("smora", {}, bank)


def test_options_that_are_wrong_are_said_at_once() -> None:
    with pytest.raises(MixmergeError) as caught:
        gate_options("arrow", {"topk": 2, "temperature": 0.0, "mix": "both"}, where="compose.gate")
    said = str(caught.value)
    assert "compose.gate.topk: there is no such option. Did you mean 'top_k'?" in said
    assert "compose.gate.temperature: is 0.0" in said
    assert "compose.gate.mix: is 'both'" in said
    with pytest.raises(MixmergeError, match=r"no gate is called 'arow'.*Did you mean 'arrow'"):
        gate_options("arow", {})
    with pytest.raises(MixmergeError, match="given has no options"):
        gate_options("given", {"top_k": 2})
    assert gate_options("given", {}) is None


def test_factors_of_unequal_ranks_are_not_mixed(base: LoadedExpert) -> None:
    site = "model.layers.0.mlp.down_proj.weight"
    entries: list[Entry | None] = [Entry(torch.ones(rank, 48), torch.ones(rank, 32)) for rank in (1, 2)]
    bank = Bank(("a", "b"), {site: side_by_side(site, entries)}, {})
    with pytest.raises(
        MixmergeError, match=r"gate\.mix: is factors, and at 1 sites the ranks differ: \[1, 2\]"
    ):
        fit_gate("arrow", {"mix": "factors"}, bank)
    with pytest.raises(MixmergeError, match=r"gate\.how: is factors"):
        fit_gate("lorahub", {}, bank, model=base, rows={"": letters(2)})


def test_a_router_of_another_adapter_is_refused(bank: Bank) -> None:
    site = next(iter(bank.sites))
    given = {f"{site}.router": torch.zeros(3, 3), "nowhere.router": torch.zeros(1)}
    with pytest.raises(MixmergeError) as caught:
        fit_gate("smora", {}, bank, given=given)
    said = str(caught.value)
    assert "is (3, 3), and the bank needs (8, 32)" in said
    assert "nowhere.router: there is no such place" in said
    assert "sites have no router" in said


def test_a_loss_that_is_no_number_ends_it_and_leaves_the_model_as_it_was(
    base: LoadedExpert, bank: Bank
) -> None:
    site, *others = bank.sites.values()
    broken = side_by_side(site.name, [Entry(site.entry(0).a * torch.inf, site.entry(0).b), site.entry(1)])
    bad = Bank(bank.experts, {site.name: broken, **{one.name: one for one in others}}, {})
    with pytest.raises(MixmergeError, match="the loss of step 1 is nan"):
        fit_gate("phatgoose", QUICK, bad, model=base, rows={"words": letters(4), "sums": digits(4)})
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        alone = base.model(ids).logits
    attached = Attached(base.model, bank, RowGate())
    attached.detach()
    assert alone.isfinite().all()
    assert not any(module._forward_hooks for module in base.model.modules())
