"""A constant gate at work: layers hold its mixture while rows without a name are answered, and at no other time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixmerge.bank.attach import Attached
from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.gates.lorahub import LorahubGate, LorahubOptions
from mixmerge.bank.gates.mean import MeanGate
from mixmerge.bank.records import Bank, Entry, side_by_side
from mixmerge.dynamic.engine import DynamicEngine
from mixmerge.dynamic.model import DynamicModel
from mixmerge.engines.records import Request, Scoring

TEXTS = ["a b c", "one two three four five six", "x"]
WEIGHTS = torch.tensor([0.9, -0.4, 0.6])


def lorahub(how: str) -> LorahubGate:
    gate = LorahubGate(3, LorahubOptions.model_validate({"how": how}))
    gate.weights.copy_(WEIGHTS)
    return gate


@pytest.fixture
def network(family: Callable[..., Any]) -> Callable[..., DynamicModel]:
    """``network(gate, dtype)``: three experts of equal ranks at every matrix, and at the gains of norms."""

    def make(gate: Gate, dtype: torch.dtype = torch.float32) -> DynamicModel:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = family("llama").base
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        draw, sites, vectors = torch.Generator().manual_seed(1), {}, {}
        for name, value in model.named_parameters():
            if value.dim() == 1:
                vectors[name] = 0.1 * torch.randn(3, len(value), generator=draw)
                continue
            table = "embed" in name
            o, d = value.shape[::-1] if table else value.shape
            entries: list[Entry | None] = []
            for _ in range(3):
                a = torch.randn((d, 2) if table else (2, d), generator=draw)
                entries.append(Entry(a, torch.randn(2, o, generator=draw) * 0.05, 0.5))
            sites[name] = side_by_side(name, entries, kind="embedding" if table else "linear")
        bank = Bank(("one", "two", "three"), sites, vectors)
        return DynamicModel(model, AutoTokenizer.from_pretrained(folder), bank, gate)

    return make


@contextmanager
def watched(model: Any) -> Iterator[list[bool]]:
    """Whether a layer held its own tensor, each time that it was used."""
    layer: nn.Linear = model.model.layers[1].mlp.down_proj
    own, seen = layer.weight, list[bool]()
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(layer.weight is own))
    yield seen
    handle.remove()


def sums(network: DynamicModel, prompt: str, continuation: str) -> float:
    """A log-probability by ``forward``, which no layer holds a mixture in."""
    whole, before = (network.tokenizer(text)["input_ids"] for text in (prompt + continuation, prompt))
    with torch.no_grad():
        logprobs = network(torch.tensor([whole])).log_softmax(-1)[0]
    return sum(float(logprobs[at - 1, whole[at]]) for at in range(len(before), len(whole)))


@pytest.mark.parametrize(
    "gate", [MeanGate(3), lorahub("outputs"), lorahub("factors")], ids=["mean", "o", "f"]
)
def test_layers_hold_the_mixture_of_a_constant_gate(network: Any, gate: Gate) -> None:
    made: DynamicModel = network(gate)
    held = dict(made.model.named_parameters())
    with watched(made.model) as seen:
        texts = made.generate(TEXTS, max_new_tokens=4)
        scores = made.score(TEXTS, [" d e"] * 3)
    assert seen
    assert not any(seen)
    after = dict(made.model.named_parameters())
    assert all(after[name] is one for name, one in held.items())
    assert scores == pytest.approx([sums(made, text, " d e") for text in TEXTS], abs=1e-4)
    assert texts == [made.generate([text], max_new_tokens=4)[0] for text in TEXTS]
    own = gate.fixed()
    assert own is not None
    assert made.score(TEXTS, [" d e"] * 3, weights=own[0]) == pytest.approx(scores, abs=1e-4)
    ids = torch.tensor([made.tokenizer(TEXTS[1])["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(made(ids, weights=own[0]), made(ids), atol=1e-5, rtol=1e-5)


def test_who_shares_a_batch_changes_no_byte(network: Any) -> None:
    engine = DynamicEngine.over(network(lorahub("factors"))._running, {"half": torch.tensor([0.5, 0.5, 0.0])})
    alone = [Scoring(text, text, " d e") for text in TEXTS]
    named = [Scoring(f"{text} {name}", text, " d e", name) for text in TEXTS for name in ("one", "half")]
    wanted = [one.logprobs for one in engine.loglikelihood(alone)]
    found = engine.loglikelihood([*named, *alone])
    assert [one.logprobs for one in found[len(named) :]] == wanted
    asked = Request("a", TEXTS[0], 4, explain=True)
    (told,) = engine.generate([asked])
    assert told.weights is not None
    assert list(told.weights["mean"].values()) == pytest.approx(WEIGHTS.tolist(), abs=1e-5)
    assert engine.generate([Request("b", TEXTS[0], 4)])[0].text == told.text
    assert "".join(chunk.text for chunk in engine.stream(asked)) == told.text


def test_layers_get_their_tensors_back_when_generation_raises(network: Any) -> None:
    made: DynamicModel = network(MeanGate(3))
    held = dict(made.model.named_parameters())

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = made.model.model.layers[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        made.generate(TEXTS, max_new_tokens=4)
    handle.remove()
    after = dict(made.model.named_parameters())
    assert all(after[name] is one for name, one in held.items())


def test_short_types_and_who_says_no_keep_the_bank_beside(network: Any) -> None:
    """In bfloat16 a change that is small beside its weight would be rounded away."""
    short: DynamicModel = network(MeanGate(3), torch.bfloat16)
    with watched(short.model) as seen:
        short.generate(TEXTS, max_new_tokens=2)
    assert seen
    assert all(seen)
    long: DynamicModel = network(MeanGate(3))
    engine = DynamicEngine.over(long._running, fold=False)
    with watched(long.model) as seen:
        engine.generate([Request("a", "a b c", 2)])
        long.generate(["a b c"], max_new_tokens=2, weights={"one": 1.0})
    assert all(seen)
    size = engine.memory()
    assert size is not None
    assert (DynamicEngine.over(long._running).memory() or 0) > 1.5 * size


def test_factors_mixed_apart_are_folded_apart(network: Any) -> None:
    made: DynamicModel = network(lorahub("factors"))
    made.detach()
    attached = Attached(made.model, made.bank, lorahub("factors"))
    ids = torch.randint(0, made.model.config.vocab_size, (2, 5))
    with torch.no_grad():
        with attached.running(Run()):
            wanted: Tensor = made.model(ids).logits
        with attached.folded(WEIGHTS, "factors"):
            torch.testing.assert_close(made.model(ids).logits, wanted, atol=1e-4, rtol=1e-4)
        with attached.folded(WEIGHTS):
            assert not torch.allclose(made.model(ids).logits, wanted, atol=1e-3)
