"""The engine of dynamic networks keeps every promise of an engine, under each kind of gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mixmerge.dynamic.engine import DynamicEngine
from mixmerge.dynamic.model import DynamicModel
from mixmerge.engines.records import Request, Scoring
from mixmerge.errors import MixmergeError

Make = Callable[..., DynamicModel]
TEXTS = ("a b c", "one two three four five six", "x", "the quick brown fox jumps")


@pytest.mark.parametrize("kind", ["token", "prompt", "second"])
def test_experts_and_the_gate_share_an_engine(dynamic: Make, kind: str) -> None:
    """Rows of the gate and of single experts, mixed, are what each of them is alone."""
    engine = DynamicEngine.over(dynamic(kind)._running, {"half": torch.tensor([0.5, 0.5, 0.0])})
    assert engine.adapters == ("half", "one", "two", "three")
    requests = [
        Request(f"{text} {name}", text, 5, adapter=name)
        for text in TEXTS
        for name in (None, "one", "half", "three")
    ]
    together = [one.text for one in engine.generate(requests)]
    assert [engine.generate([one])[0].text for one in requests] == together
    assert len(set(together)) > len(TEXTS)
    scorings = [
        Scoring(f"{text} {name}", text, " and more", name) for text in TEXTS for name in (None, "one", "half")
    ]
    for one, found in zip(scorings, engine.loglikelihood(scorings), strict=True):
        assert found.total == pytest.approx(engine.loglikelihood([one])[0].total, abs=1e-4)
    assert len({round(one.total, 3) for one in engine.loglikelihood(scorings)}) > len(TEXTS)


def test_weights_come_with_the_answer_for_who_asks(dynamic: Make) -> None:
    engine = DynamicEngine.over(dynamic("prompt")._running)
    asked = [Request(text, text, 2 + at, explain=at != 1) for at, text in enumerate(TEXTS)]
    found = engine.generate(asked)
    assert found[1].weights is None
    first = found[0].weights
    assert first is not None
    assert first["experts"] == ["one", "two", "three"]
    assert sum(first["mean"].values()) == pytest.approx(1, abs=1e-4)
    alone = engine.generate(asked[:1])[0].weights
    assert alone is not None
    assert alone["mean"] == pytest.approx(first["mean"], abs=1e-4)
    last = list(engine.stream(asked[0]))[-1].generation
    assert last is not None
    assert last.weights is not None
    assert last.weights["layers"].keys() == {"0", "1", "lm_head"}


def test_a_bank_takes_no_further_adapters(dynamic: Make) -> None:
    engine = DynamicEngine.over(dynamic("prompt")._running)
    with pytest.raises(MixmergeError, match="takes no further adapters"):
        engine.add_adapter("new", "folder")
    with pytest.raises(MixmergeError, match="has no adapter 'four'"):
        engine.generate([Request("a", "a", adapter="four")])


def test_there_is_an_engine_of_the_name() -> None:
    from mixmerge.registry import find

    assert find("engine", "dynamic") is DynamicEngine
    with pytest.raises(MixmergeError, match=r"has no bank/bank.json"):
        DynamicEngine("nowhere").load()
