"""A network as its user makes and asks it: ``mixmerge fit``, ``ask``, ``batch``, ``eval`` and ``export``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from mixmerge import DynamicModel, Mixture
from mixmerge.batch.setup import Conditions
from mixmerge.checkpoint.used_rows import read_used
from mixmerge.dynamic.engine import DynamicEngine
from mixmerge.engines.contract import check_engine
from mixmerge.errors import MixmergeError

TEXTS = ("a b c", "one two three four five six", "x", "the quick brown fox jumps")
GENERATE = "generate: {max_new_tokens: 5}\n"


def run(*arguments: object) -> Result:
    from mixmerge.cli import app

    return CliRunner().invoke(app, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few rows of each expert."""
    folder, made = tmp_path_factory.mktemp("rows"), {}
    for name, word in (("one", "ab"), ("two", "fox"), ("three", "1 + 2")):
        made[name] = folder / f"{name}.jsonl"
        lines = [{"prompt": f"{word} {at}", "answer": f"{at} {word}"} for at in range(6)]
        made[name].write_text("\n".join(map(json.dumps, lines)) + "\n")
    return made


@pytest.fixture(scope="module")
def fitted(loras: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of three adapters with Arrow's gate, which needs no rows."""
    folder = tmp_path_factory.mktemp("fitted")
    (folder / "mix.yaml").write_text(
        loras.entries() + "compose: {kind: adapters, gate: {kind: arrow, top_k: 2}}\n" + GENERATE
    )
    done = run("fit", folder / "mix.yaml", folder / "net", "--quiet")
    assert done.exit_code == 0, done.output
    assert "arrow network of one, two, three" in done.stdout
    return folder / "net"


def test_a_fitted_network_is_its_experts(fitted: Path, loras: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = DynamicModel.load(fitted)
    assert model.experts == ("one", "two", "three")
    ids = torch.tensor([model.tokenizer("the quick brown fox")["input_ids"]])
    with torch.no_grad():
        for at, (name, folder) in enumerate(loras.adapters.items()):
            base = AutoModelForCausalLM.from_pretrained(loras.base, dtype=torch.float32)
            alone = PeftModel.from_pretrained(base, str(folder)).eval()(ids).logits
            torch.testing.assert_close(model(ids, weights={name: 1.0}), alone, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model(ids, weights=torch.eye(3)[at]), alone, atol=1e-4, rtol=1e-4)
    shown = model.explain(["the quick brown fox"])[0]
    assert len(shown.layers()) == 2


def test_the_engine_of_a_fitted_network_keeps_its_promises(fitted: Path) -> None:
    check_engine(lambda: DynamicEngine(str(fitted)), adapters=["one", "three"])
    engine = DynamicEngine(str(fitted), adapters={"first": "one"}, weights={"two": 0.5, "one": 0.5})
    size = engine.memory()
    with engine:
        assert engine.adapters == ("first", "one", "two", "three")
        assert engine.memory() == pytest.approx(size, rel=0.02)


def test_answers_by_each_way_are_the_same(fitted: Path, tmp_path: Path) -> None:
    mixture = Mixture.load(fitted)
    answers = mixture.answer(list(TEXTS))
    model = DynamicModel.load(fitted, dtype="auto")
    assert [one.text for one in answers] == model.generate(TEXTS, max_new_tokens=5)
    assert {one.expert for one in answers} == {"mixture"}
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    done = run("batch", fitted, "-i", tmp_path / "in.txt", "-o", tmp_path / "out.jsonl", "--explain", "-q")
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["answer"] for line in lines] == [one.text for one in answers]
    weights = lines[0]["reason"]["weights"]
    assert weights["experts"] == ["one", "two", "three"]
    assert weights["layers"].keys() == {"0", "1"}
    assert sum(weights["mean"].values()) == pytest.approx(1, abs=1e-3)
    plan = json.loads(run("batch", fitted, "-i", tmp_path / "in.txt", "--plan", "--json").stdout)
    assert plan["loads"] == 1
    assert plan["groups"][0]["bytes"] > 0
    assert "reason" not in _answered(fitted, tmp_path)[0]


def _answered(fitted: Path, folder: Path) -> list[dict[str, Any]]:
    """One request for the network, and one for each expert by name."""
    names = (None, "one", "two", "three")
    lines = [{"id": f"r{at}", "prompt": TEXTS[0], "expert": name} for at, name in enumerate(names)]
    (folder / "named.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    done = run(
        "batch", fitted, "-i", folder / "named.jsonl", "-o", folder / "named.out.jsonl", "-q", "--json"
    )
    assert done.exit_code == 0, done.output
    assert sum(one["times"] for one in json.loads(done.stdout)["loads"]) == 1
    return [json.loads(line) for line in (folder / "named.out.jsonl").read_text().splitlines()]


def test_ask_says_the_weights_of_each_layer(fitted: Path) -> None:
    done = run("ask", fitted, TEXTS[1], "--explain")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip("\n") == Mixture.load(fitted).answer([TEXTS[1]])[0].text.strip("\n")
    for word in ("answered by mixture", "weights of the experts", "layer", "three", "all"):
        assert word in done.stderr
    told = json.loads(run("ask", fitted, TEXTS[1], "--json", "--explain").stdout)
    assert told["reason"]["weights"]["layers"].keys() == {"0", "1"}
    alone = json.loads(run("ask", fitted, TEXTS[1], "--expert", "two", "--json").stdout)
    assert alone["expert"] == "two"
    model = DynamicModel.load(fitted, dtype="auto")
    assert alone["answer"] == model.generate([TEXTS[1]], weights={"two": 1.0}, max_new_tokens=5)[0]


def test_a_network_is_an_expert_of_another_mixture(fitted: Path, loras: Any) -> None:
    """Nobody has to say which engine runs it."""
    from mixmerge.mixture.answering import expert_set
    from mixmerge.mixture.reading import read

    spec = read(
        {
            "experts": {"net": {"model": str(fitted)}, "base": {"model": str(loras.base)}},
            "router": {"kind": "knn", "outcomes": "none.jsonl"},
        }
    ).require()
    experts = expert_set(spec)
    assert [one.engine for one in experts] == ["dynamic", "transformers"]
    from mixmerge.batch.opening import open_engine, size_of

    unit = experts.units()[experts["net"].unit]
    assert size_of(unit) > size_of(experts.units()[experts["base"].unit]) > 0
    assert isinstance(open_engine(unit, device=Conditions().devices[0].name), DynamicEngine)


@pytest.mark.parametrize("form", ["checkpoint", "adapter"])
def test_an_exported_mixture_is_that_mixture(fitted: Path, loras: Any, tmp_path: Path, form: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = run("export", fitted, tmp_path / "out", "--weights", "one=0.5, three=-0.25", "--as", form)
    assert done.exit_code == 0, done.output
    place = loras.base if form == "adapter" else tmp_path / "out"
    plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    if form == "adapter":
        plain = PeftModel.from_pretrained(plain, str(tmp_path / "out"))
    model = DynamicModel.load(fitted)
    ids = torch.tensor([model.tokenizer("the quick brown fox")["input_ids"]])
    with torch.no_grad():
        mixed = model(ids, weights={"one": 0.5, "three": -0.25})
        torch.testing.assert_close(plain.eval()(ids).logits, mixed, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_exported(fitted: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("--weights", "one=x,two"), "NAME=WEIGHT"),
        (("--weights", "four=1"), "is no expert of the bank"),
        (("--weights", "one=1", "--as", "gguf"), "Known: adapter, checkpoint, vllm"),
        (("--weights", "one=1", "--mix", "all"), "Known: factors, outputs"),
    ):
        done = run("export", fitted, tmp_path / "out", *arguments)
        assert done.exit_code == 2
        assert words in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["mean", "lorahub"])
def test_a_constant_gate_is_exported_as_it_is(
    loras: Any, rows: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM

    gate = "kind: mean"
    if kind == "lorahub":
        pytest.importorskip("nevergrad")
        gate = f"kind: lorahub, how: outputs, budget: 4}}, data: {{one: {rows['one']}"
    (tmp_path / "mix.yaml").write_text(loras.entries() + f"compose: {{kind: adapters, gate: {{{gate}}}}}\n")
    assert run("fit", tmp_path / "mix.yaml", tmp_path / "net", "-q").exit_code == 0
    done = run("export", tmp_path / "net", tmp_path / "out", "-q", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["weights"].keys() == {"one", "two", "three"}
    model = DynamicModel.load(tmp_path / "net")
    model.export(None, tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.tensor([model.tokenizer("the quick brown fox")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, model(ids), atol=1e-4, rtol=1e-4)
    names = ("model.safetensors", "mixmerge_manifest.json")
    seen = json.loads((tmp_path / "out" / names[1]).read_text())
    assert bool(read_used(seen)[0]) == (kind == "lorahub"), "what the gate was fitted on is not to be scored"
    assert all(
        (tmp_path / "out" / one).read_bytes() == (tmp_path / "again" / one).read_bytes() for one in names
    )


def test_a_gate_that_reads_its_input_has_no_mixture_of_its_own(fitted: Path, tmp_path: Path) -> None:
    done = run("export", fitted, tmp_path / "out", "-q")
    assert done.exit_code == 2
    said = " ".join(done.stderr.split())
    assert "the gate arrow has none that are the same for every input" in said
    assert "--weights NAME=WEIGHT" in said
    assert not (tmp_path / "out").exists()


def test_a_gate_that_learns_from_rows(loras: Any, rows: dict[str, Path], tmp_path: Path) -> None:
    data = ", ".join(f"{name}: {path}" for name, path in rows.items())
    (tmp_path / "mix.yaml").write_text(
        loras.entries()
        + f"compose: {{kind: adapters, gate: {{kind: phatgoose, steps: 2}}, data: {{{data}}}, samples: 4}}\n"
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["what"], told["kind"], told["experts"]) == ("network", "phatgoose", ["one", "two", "three"])
    assert Mixture.load(tmp_path / "net").answer(["a"])[0].fault is None
    again = run("fit", tmp_path / "mix.yaml", tmp_path / "net")
    assert again.exit_code == 2
    assert "exists" in again.stderr
    other = run("fit", tmp_path / "mix.yaml", tmp_path / "net", "--overwrite", "--json")
    assert json.loads(other.stdout)["hash"] == told["hash"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mix.yaml", "net"]


def test_full_models_beside_adapters(loras: Any, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        loras.entries()
        + f"  whole: {{model: {loras.experts['one']}}}\n"
        + "compose: {kind: adapters, gate: {kind: mean}, rank: 2, bits: 16}\n"
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net", "--json")
    assert done.exit_code == 0, done.output
    assert DynamicModel.load(tmp_path / "net").experts == ("one", "two", "three", "whole")


def test_everything_that_is_wrong_is_said_at_once(loras: Any, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        loras.entries()
        + f"  whole: {{model: {loras.experts['one']}}}\n"
        + "  far: {endpoint: 'http://localhost:1', model: m}\n"
        + "router: {kind: knn, outcomes: table.jsonl}\n"
        + "compose: {kind: adapters, gate: {kind: phatgoose, step: 2}, data: {ones: a.jsonl}, wide: 3}\n"
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net")
    assert done.exit_code == 2
    for words in ("behind an endpoint", "the gate weighs the experts", "wide", "no such option"):
        assert words in done.stderr
    assert "the mixture has no expert 'ones'" in done.stderr
    (tmp_path / "mix.yaml").write_text(
        loras.entries()
        + f"  whole: {{model: {loras.experts['one']}}}\n"
        + "compose: {kind: adapters, gate: {kind: phatgoose, step: 2}}\n"
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net")
    assert "no such option" in done.stderr
    assert "whole is a full model, and no size is said" in done.stderr


@pytest.mark.parametrize(
    ("compose", "words"),
    [
        ("{kind: adapters}", "the key gate is missing"),
        ("{kind: adapters, gate: {top_k: 2}}", "the key kind is missing"),
        ("{kind: adapters, gate: {kind: arow}}", "Did you mean 'arrow'"),
        ("{kind: adapters, gate: {kind: arrow}, rank: 2}", "has no effect on adapters"),
        ("{kind: adapters, gate: {kind: arrow}, data: rows.jsonl}", "arrow learns from no rows"),
        ("{kind: adapters, gate: {kind: phatgoose}}", "the key data is missing"),
        ("{kind: adapters, gate: {kind: phatgoose}, data: rows.jsonl}", "rows of each expert"),
        ("{kind: adapters, gate: {kind: phatgoose}, data: {one: a.jsonl}}", "no rows of two, three"),
        ("{kind: adapters, gate: {kind: glider}, data: {one: a, two: b, three: c}}", "encoder is missing"),
        (
            "{kind: adapters, gate: {kind: router, features: text}, data: {one: a, two: b, three: c}}",
            "router reads texts by an encoder, and the key encoder is missing",
        ),
        ("{kind: adapters, gate: {kind: arow}, rank: 0}", "Did you mean 'arrow'"),
        ("{kind: adapters, gate: {kind: arrow, topk: 2}, rank: many}", "no such option"),
        ("{kind: adapters, gate: {kind: arrow}, rank: 0, data: rows.jsonl}", "arrow learns from no rows"),
        ("{kind: adapters, rank: 0}", "the key gate is missing"),
        ("{kind: adapters, folder: net, rank: 3}", "has no effect on a fitted network"),
        ("{kind: adapters, folder: net, rank: 0}", "has no effect on a fitted network"),
    ],
)
def test_a_network_that_makes_no_sense(loras: Any, compose: str, words: str) -> None:
    from mixmerge.mixture.reading import parse

    faults = parse(loras.entries() + f"compose: {compose}\n").faults
    assert any(words in str(fault) for fault in faults), faults


def test_adapters_of_two_bases(loras: Any, family: Callable[..., Any], tmp_path: Path) -> None:
    other = family("llama", experts=3, dtype="float32", seed=1).base
    text = loras.entries().replace(f"two, base: {loras.base}", f"two, base: {other}")
    assert text != loras.entries()
    (tmp_path / "mix.yaml").write_text(text + "compose: {kind: adapters, gate: {kind: mean}}\n")
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net")
    assert done.exit_code == 2
    assert "the adapters are of 2 bases" in done.stderr
    (tmp_path / "mix.yaml").write_text(
        text + f"compose: {{kind: adapters, base: {loras.base}, gate: {{kind: mean}}}}\n"
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net")
    assert done.exit_code == 2
    assert "Adapters of one base" in done.stderr
    assert not (tmp_path / "net").exists()


def test_a_network_in_another_base_or_with_other_experts(
    fitted: Path, family: Callable[..., Any], tmp_path: Path
) -> None:
    other = family("llama", experts=3, dtype="float32", seed=1).base
    with pytest.raises(MixmergeError, match="made for another base"):
        DynamicModel.load(fitted, base=other)
    text = (fitted / "mixture.yaml").read_text()
    (tmp_path / "mix.yaml").write_text(
        text.replace("folder: .", f"folder: {fitted}").replace("  two:", "  second:")
    )
    with pytest.raises(MixmergeError, match="the mixture of one, second, three"):
        Mixture.load(tmp_path / "mix.yaml")
    unfitted = text.replace("folder: .", "gate: {kind: mean}")
    (tmp_path / "mix.yaml").write_text(unfitted)
    with pytest.raises(MixmergeError, match="not fitted yet"):
        Mixture.load(tmp_path / "mix.yaml")
    with pytest.raises(MixmergeError, match="the gate weighs the experts"):
        Mixture.load(fitted).route(["a"])


def test_a_mixture_with_a_router_is_fitted_too(loras: Any, tmp_path: Path) -> None:
    lines = [
        {"query": f"{word} {at}", "expert": name, "score": float((at + number) % 2)}
        for at, word in enumerate(("a", "b", "c", "d", "e", "f"))
        for number, name in enumerate(("one", "two"))
    ]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "mix.yaml").write_text(
        f"experts:\n  one: {{model: {loras.base}}}\n  two: {{model: {loras.experts['one']}}}\n"
        f"router: {{kind: knn, outcomes: {tmp_path / 'table.jsonl'}}}\n{GENERATE}"
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["queries"] == 6
    assert Mixture.load(tmp_path / "out").answer(["a 1"])[0].fault is None


def test_a_network_is_evaluated_as_a_model_is(fitted: Path, loras: Any, tmp_path: Path) -> None:
    """Its own answers, and with --task-id those of each task's expert, which an adapter gives too."""
    tasks = []
    for name in ("one", "two"):
        model = DynamicModel.load(fitted, dtype="auto")
        texts = model.generate(TEXTS, weights={name: 1.0}, max_new_tokens=4)
        rows = [
            {"prompt": text, "answer": answer.strip() or "-"}
            for text, answer in zip(TEXTS, texts, strict=True)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        tasks.append(
            f"- {{name: {name}, data: {tmp_path / name}.jsonl, metric: exact, expert: {name}, max_new_tokens: 4}}"
        )
    (tmp_path / "tasks.yaml").write_text("tasks:\n" + "\n".join(tasks) + "\n")
    asked = ("eval", fitted, "--tasks", tmp_path / "tasks.yaml", "--json", "-q", "--resamples", "100")
    named = [("--experts", f"{name}={loras.base}+{loras.adapters[name]}") for name in ("one", "two")]
    done = run(*asked, "--task-id", *named[0], *named[1])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    rows_by_name = {row["name"]: row for row in report["rows"]}
    for name in ("one", "two"):
        own = rows_by_name[name]["scores"][name]["value"]
        assert rows_by_name["net"]["scores"][name]["value"] == own
    assert any("Told which expert" in note for note in report["notes"])
    base = sum(path.stat().st_size for path in loras.base.glob("*.safetensors"))
    assert rows_by_name["net"]["storage"] > base
    gated = json.loads(run(*asked).stdout)
    assert not any("Told which expert" in note for note in gated["notes"])
    refused = run("eval", fitted, "--lm-eval", "arc_easy")
    assert refused.exit_code == 2


@pytest.mark.parametrize(
    "gate",
    [
        "{kind: xlora, steps: 2}, data: {all}",
        "{kind: glider, steps: 2}, data: {each}, encoder: {encoder}",
        "{kind: router, epochs: 2, per_token: true}, data: {each}",
        "{kind: router, epochs: 2}, data: {each}",
    ],
    ids=["xlora", "glider", "router of tokens", "router of prompts"],
)
def test_gates_with_a_second_pass_or_an_encoder(
    loras: Any, rows: dict[str, Path], family: Callable[..., Any], tmp_path: Path, gate: str
) -> None:
    """Rows are alone, and a text read whole is the text read token by token."""
    each = "{" + ", ".join(f"{name}: {path}" for name, path in rows.items()) + "}"
    said = gate.replace("{all}", str(rows["one"])).replace("{each}", each)
    said = said.replace("{encoder}", str(family("bert").base))
    (tmp_path / "mix.yaml").write_text(loras.entries() + f"compose: {{kind: adapters, gate: {said}}}\n")
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net", "-q")
    assert done.exit_code == 0, done.output
    model = DynamicModel.load(tmp_path / "net")
    together = model.generate(TEXTS, max_new_tokens=4)
    assert [model.generate([text], max_new_tokens=4)[0] for text in TEXTS] == together
    continued = ["!", " and more", " 1 2", "."]
    scores = model.score(TEXTS, continued)
    for text, more, score in zip(TEXTS, continued, scores, strict=True):
        prompt, whole = (model.tokenizer(one)["input_ids"] for one in (text, text + more))
        if whole[: len(prompt)] != prompt:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([whole]), prompt=[len(prompt)], texts=[text])[0].log_softmax(-1)
        told = sum(float(logits[at - 1, whole[at]]) for at in range(len(prompt), len(whole)))
        assert score == pytest.approx(told, abs=1e-4)
    mixture = Mixture.load(tmp_path / "net")
    assert [one.fault for one in mixture.answer(list(TEXTS))] == [None] * len(TEXTS)
    assert DynamicModel.load(tmp_path / "net").generate(TEXTS, max_new_tokens=4) == together


def test_what_is_missing_of_experts_and_data_is_said_at_once(
    loras: Any, rows: dict[str, Path], tmp_path: Path
) -> None:
    entries = loras.entries().replace(str(loras.adapters["two"]), str(tmp_path / "gone"))
    data = f"{{one: {rows['one']}, two: {tmp_path / 'lost.jsonl'}, three: {rows['three']}}}"
    said = f"{{kind: adapters, gate: {{kind: glider}}, data: {data}, encoder: {tmp_path / 'none'}}}"
    (tmp_path / "mix.yaml").write_text(f"{entries}compose: {said}\n")
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net", "-q")
    assert done.exit_code == 2
    for words in ("experts.two", "gone", "lost.jsonl", "compose.encoder", "none"):
        assert words in done.stderr
    assert not (tmp_path / "net").exists()


def test_rows_that_a_gate_has_learned_from_are_not_scored(
    loras: Any, rows: dict[str, Path], tmp_path: Path
) -> None:
    data = ", ".join(f"{name}: {path}" for name, path in rows.items())
    said = f"{{kind: adapters, gate: {{kind: average_activation}}, data: {{{data}}}, samples: 4}}"
    (tmp_path / "mix.yaml").write_text(f"{loras.entries()}compose: {said}\n")
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net", "-q")
    assert done.exit_code == 0, done.output
    task = f"{{name: one, data: {rows['one']}, metric: exact, max_new_tokens: 2}}"
    (tmp_path / "tasks.yaml").write_text(f"tasks: [{task}]\n")
    asked = ("eval", tmp_path / "net", "--tasks", tmp_path / "tasks.yaml", "-q", "--resamples", "100")
    refused = run(*asked)
    assert refused.exit_code == 2
    assert "was made with 4 of the 6 rows of task one" in " ".join(refused.stderr.split())
    assert run(*asked, "--transductive", "--json").exit_code == 0


def test_a_folder_that_holds_a_yaml_of_its_own_is_not_overwritten(loras: Any, tmp_path: Path) -> None:
    place = tmp_path / "project"
    place.mkdir()
    (place / "mixture.yaml").write_text(loras.entries() + "compose: {kind: adapters, gate: {kind: arrow}}\n")
    (place / "notes.txt").write_text("mine")
    done = run("fit", place / "mixture.yaml", place, "--overwrite", "-q")
    assert done.exit_code == 2
    assert "holds no mixture.yaml with what was fitted" in " ".join(done.stderr.split())
    assert (place / "notes.txt").read_text() == "mine"
    assert run("fit", place / "mixture.yaml", tmp_path / "net", "-q").exit_code == 0
    assert run("fit", place / "mixture.yaml", tmp_path / "net", "--overwrite", "-q").exit_code == 0


def test_a_device_that_is_not_here(loras: Any, rows: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(
        loras.entries() + f"compose: {{kind: adapters, gate: {{kind: xlora}}, data: {rows['one']}}}\n"
    )
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "net", "--device", "nowhere", "-q")
    assert done.exit_code == 2
    assert "cannot be put on the device 'nowhere'" in " ".join(done.stderr.split())
    assert not (tmp_path / "net").exists()
