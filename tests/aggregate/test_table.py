"""Compositions by name with their options; and each of them over an echo engine and a tiny real model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mixmerge import registry
from mixmerge.aggregate.cascade import Ladder
from mixmerge.aggregate.options import MoaOptions, VoteOptions
from mixmerge.aggregate.records import Ask, Composition, Question, Said
from mixmerge.aggregate.table import COMPOSITIONS, composition, options_of
from mixmerge.aggregate.vote import Vote
from mixmerge.engines.base import Engine
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.records import Message, Request
from mixmerge.errors import MixmergeError

Asks, Runs = Callable[..., Question], Callable[..., Any]
# kind -> options that keep the calls few, and how many calls there are then for three picks
CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "answer": ({}, 1),
    "vote": ({"confidence": True}, 3),
    "best": ({}, 3),
    "self_consistency": ({"samples": 3}, 3),
    "aggregate": ({"aggregator": "b"}, 4),
    "moa": ({"layers": 3}, 7),
    "self_moa": ({"samples": 2}, 3),
    "self_moa_seq": ({"samples": 5, "window": 3, "reserved": 1}, 7),
    "cascade": ({"experts": ["a", "b"], "thresholds": [1.0], "confidence": "verification", "samples": 2}, 4),
}


def answers_of(engines: Mapping[str, Engine], question: Question) -> Callable[[Ask], Said]:
    """What a runner does with an ask, one at a time."""

    def reply(asked: Ask) -> Said:
        request = Request(
            id="q",
            prompt=question.prompt if asked.prompt is None else asked.prompt,
            max_new_tokens=6,
            temperature=asked.temperature or 0.0,
            seed=asked.draw,
            logprobs=asked.logprobs,
        )
        (fault,) = engines[asked.expert].check([request])
        if fault is not None:
            return Said(asked, "", fault=str(fault))
        (one,) = engines[asked.expert].generate([request])
        return Said(asked, one.text, one.logprobs)

    return reply


# --- names and options


def test_every_row_can_be_made() -> None:
    assert set(COMPOSITIONS) == set(CALLS) == set(registry.table("composition"))
    for kind, (options, _) in CALLS.items():
        made = composition(kind, options)
        assert isinstance(made, Composition)
        assert type(made).__name__ in COMPOSITIONS[kind].target
        assert made == composition(kind, options_of(kind)(**options)), "options are compared by value"
        assert hash(made) == hash(composition(kind, options))
        assert json.dumps(made.options.model_dump())  # type: ignore[attr-defined]
    assert composition("vote") == Vote(VoteOptions()) == Vote()


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("voet", {}, "composition: no composition is called 'voet'. Did you mean 'vote'?"),
        ("answer", {"k": 1}, "compose.k: there is no such option. It has none"),
        ("vote", {"extrct": "number"}, "compose.extrct: there is no such option. Did you mean 'extract'?"),
        ("vote", {"extract": "nmber"}, "compose.extract: extraction: no extraction is called 'nmber'"),
        ("vote", {"weights": "votes"}, "compose.weights: is 'votes'"),
        ("vote", {"temperature": -1.0}, "compose.temperature: is -1.0"),
        ("best", {"score": "max"}, "compose.score: is 'max'"),
        ("self_consistency", {"samples": 1}, "compose.samples: is 1"),
        ("self_consistency", {"samples": "3"}, "compose.samples: is '3'"),
        ("self_consistency", {"temperature": 0.0}, "compose.temperature: is 0.0"),
        ("moa", {"layers": 1}, "compose.layers: is 1"),
        ("moa", {"proposers": ["a", "a"]}, "compose.proposers: names an expert twice"),
        ("moa", {"proposers": []}, "compose.proposers: is []"),
        (
            "self_moa_seq",
            {"window": 3, "reserved": 3},
            "compose: reserved is 3: it leaves no room in a window of 3",
        ),
        ("cascade", {}, "compose.experts: are not given"),
        (
            "cascade",
            {"experts": ["a", "b"]},
            "compose: thresholds are 0: one for each of 2 experts but the last",
        ),
        ("cascade", {"experts": ["a", "a"], "thresholds": [1.0]}, "compose: experts names one twice"),
        ("cascade", {"thresholds": [1.0]}, "compose: thresholds need the experts"),
    ],
)
def test_wrong_options(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(MixmergeError) as caught:
        composition(kind, options)
    assert words in str(caught.value)


def test_all_faults_at_once_and_where_they_are() -> None:
    with pytest.raises(MixmergeError) as caught:
        composition("moa", {"layers": 0, "temperature": -1, "aggregator": ""}, where="x.yaml: compose")
    assert sorted(fault.where for fault in caught.value.faults) == [
        f"x.yaml: compose.{name}" for name in ("aggregator", "layers", "temperature")
    ]
    with pytest.raises(MixmergeError, match="compose: vote takes no escalation"):
        composition("vote", escalation=Ladder(("a",), ()))
    assert composition("cascade", escalation=Ladder(("a",), ())).experts() == {"a"}
    assert MoaOptions(proposers=["a", "b"]).proposers == ("a", "b")  # type: ignore[arg-type]


PLUG_IN = """
from dataclasses import dataclass

from pydantic import BaseModel

from mixmerge.aggregate.answer import PrimaryAnswer
from mixmerge.aggregate.table import CompositionRow


class LoudOptions(BaseModel, frozen=True, extra="forbid"):
    volume: int = 11


@dataclass(frozen=True)
class Loud(PrimaryAnswer):
    options: LoudOptions


def shout(text: str) -> str:
    return text.upper()


ROW = CompositionRow("loud_package:Loud", "loud_package:LoudOptions", "as answer, but loud")
"""


def test_a_plug_in_adds_one(ask: Asks, run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loud_package.py").write_text(PLUG_IN, encoding="utf-8")
    (tmp_path / "loud-1.0.dist-info").mkdir()
    (tmp_path / "loud-1.0.dist-info" / "METADATA").write_text("Name: loud\nVersion: 1.0\n", encoding="utf-8")
    (tmp_path / "loud-1.0.dist-info" / "entry_points.txt").write_text(
        "[mixmerge.composition]\nloud = loud_package:ROW\n[mixmerge.extraction]\nshout = loud_package:shout\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = composition("loud", {"volume": 3})
    assert made.options.volume == 3  # type: ignore[attr-defined]
    assert run(made, ask("a"), {"a": "x"}).settled.text == "x"
    votes = run(composition("vote", {"extract": "shout"}), ask("a", "b"), {"a": "x", "b": "X"})
    assert votes.settled.reason["agreement"] == 1.0
    with pytest.raises(MixmergeError, match="Did you mean 'volume'"):
        composition("loud", {"volum": 3})


# --- end to end


@pytest.mark.parametrize("kind", sorted(CALLS))
@pytest.mark.parametrize("chat", [False, True])
def test_over_echo(ask: Asks, run: Runs, kind: str, chat: bool) -> None:
    engines = {name: EchoEngine(name, reply=lambda one, name=name: f"{name} {one.seed}") for name in "abc"}
    question = ask("a", "b", "c", prompt=(Message("user", "what?"),) if chat else "what?")
    options, calls = CALLS[kind]
    done = run(composition(kind, options), question, answers_of(engines, question))
    assert sum(map(len, done.said)) == calls
    assert done.settled.fault is None
    assert done.settled.expert == done.settled.text.split()[0]
    assert done.settled.reason["kind"] == kind
    assert json.loads(json.dumps(dict(done.settled.reason))) == done.settled.reason


@pytest.fixture(scope="module")
def experts(family: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """Three tiny Llamas; b and c read 4096 tokens, a only 64."""
    made = family("llama", dtype="float32", experts=2)
    engines: dict[str, Engine] = {}
    for name, folder in zip("abc", [made.base, *made.experts], strict=True):
        copy = Path(shutil.copytree(folder, tmp_path_factory.mktemp("experts") / name))
        config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
        config["max_position_embeddings"] = 64 if name == "a" else 4096
        (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
        engines[name] = TransformersEngine(str(copy))
    return engines


@pytest.mark.parametrize("kind", sorted(CALLS))
def test_over_a_real_model(ask: Asks, run: Runs, experts: dict[str, Engine], kind: str) -> None:
    question = ask("b", "c", "a", prompt="1 + 2 = ")
    options = {**CALLS[kind][0], **({"experts": ["b", "c"]} if kind == "cascade" else {})}
    made = composition(kind, options)
    done = run(made, question, answers_of(experts, question))
    assert done.settled.fault is None
    assert done.settled == run(made, question, answers_of(experts, question)).settled
    failed = {one["expert"] for one in done.settled.reason.get("failed", [])}
    assert failed == ({"a"} if kind == "moa" else set()), "a prompt with answers in it is too long for a"
