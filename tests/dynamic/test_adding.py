"""An expert that comes after fitting: ``mixmerge fit FOLDER OUT --add NAME=PATH``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from mixmerge import DynamicModel
from mixmerge.bank.files import load_bank, read_card
from mixmerge.bank.gate_files import load_gate

ROWS = {"one": "ab", "two": "fox", "three": "1 + 2"}


def run(*arguments: object) -> Result:
    from mixmerge.cli import app

    return CliRunner().invoke(app, [str(one) for one in arguments])


def said(done: Result) -> str:
    return " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("rows"), {}
    for name, word in ROWS.items():
        made[name] = folder / f"{name}.jsonl"
        lines = [{"prompt": f"{word} {at}", "answer": f"{at} {word}"} for at in range(4)]
        made[name].write_text("\n".join(map(json.dumps, lines)) + "\n")
    return made


def fitted(loras: Any, folder: Path, compose: str, *, without: str = "") -> Path:
    """A network of the adapters, but for one of them."""
    folder.mkdir(exist_ok=True)
    lines = [line for line in loras.entries().splitlines() if not without or f"  {without}:" not in line]
    (folder / "mix.yaml").write_text("\n".join(lines) + f"\ncompose: {{kind: adapters, {compose}}}\n")
    done = run("fit", folder / "mix.yaml", folder / "net", "-q")
    assert done.exit_code == 0, done.output
    return folder / "net"


def state(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def same(one: Path, other: Path) -> None:
    """Two networks with the same factors, gates and YAML."""
    banks = [load_bank(folder) for folder in (one, other)]
    assert banks[0].experts == banks[1].experts
    assert banks[0].sites.keys() == banks[1].sites.keys()
    for name, site in banks[0].sites.items():
        twin = banks[1].sites[name]
        assert (site.ranks, site.kind, site.tied) == (twin.ranks, twin.kind, twin.tied)
        for part in ("a", "b", "scale"):
            assert torch.equal(getattr(site, part), getattr(twin, part))
    gates = [load_gate(folder / "bank", bank=read_card(folder).hash) for folder in (one, other)]
    assert gates[0].settings() == gates[1].settings()
    known = gates[1].state_dict()
    assert all(torch.equal(value, known[key]) for key, value in gates[0].state_dict().items())
    assert (one / "mixture.yaml").read_text() == (other / "mixture.yaml").read_text()


@pytest.mark.parametrize(
    "compose",
    [
        "gate: {kind: mean}, bits: 16",
        "gate: {kind: arrow, top_k: 2}",
        "gate: {kind: smile, gate_k: 2}, bits: 8",
        "gate: {kind: self_rank, active: 3}",
    ],
    ids=lambda text: text.split("kind: ")[1].split("}")[0].split(",")[0],
)
def test_a_gate_without_data_is_that_of_fitting_anew(loras: Any, tmp_path: Path, compose: str) -> None:
    old = fitted(loras, tmp_path / "old", compose, without="three")
    before = state(old)
    done = run("fit", old, tmp_path / "more", "--add", f"three={loras.adapters['three']}", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["experts"] == ["one", "two", "three"]
    assert state(old) == before
    same(tmp_path / "more", fitted(loras, tmp_path / "anew", compose))


def test_what_was_added_answers(loras: Any, tmp_path: Path) -> None:
    old = fitted(loras, tmp_path / "old", "gate: {kind: arrow}", without="three")
    done = run("fit", old, tmp_path / "more", "--add", f"three={loras.adapters['three']}", "-q")
    assert "arrow network of one, two, three" in done.stdout
    asked = run("ask", tmp_path / "more", "a b c", "--expert", "three", "--json")
    assert json.loads(asked.stdout)["expert"] == "three"
    whole = fitted(loras, tmp_path / "anew", "gate: {kind: arrow}")
    texts = ["a b c", "the quick brown fox"]
    answers = [DynamicModel.load(one).generate(texts, max_new_tokens=4) for one in (tmp_path / "more", whole)]
    assert answers[0] == answers[1]
    again = run("fit", tmp_path / "more", tmp_path / "last", "--add", f"last={loras.adapters['two']}", "-q")
    assert again.exit_code == 0, again.output
    assert DynamicModel.load(tmp_path / "last").experts == ("one", "two", "three", "last")


def test_a_gate_that_learns_is_fitted_for_the_newcomer_alone(
    loras: Any, rows: dict[str, Path], family: Callable[..., Any], tmp_path: Path
) -> None:
    encoder = family("bert").base
    for gate, more in (
        ("{kind: phatgoose, steps: 2, batch_size: 2}", ""),
        ("{kind: average_activation}", ""),
        ("{kind: glider, steps: 1, batch_size: 2}", f", encoder: {encoder}"),
    ):
        place = tmp_path / gate.split()[1].rstrip(",}")
        place.mkdir()
        few = ", ".join(f"{name}: {rows[name]}" for name in ("one", "two"))
        every = ", ".join(f"{name}: {path}" for name, path in rows.items())
        old = fitted(loras, place / "old", f"gate: {gate}, data: {{{few}}}{more}", without="three")
        asked = ("fit", old, place / "more", "--add", f"three={loras.adapters['three']}")
        lacking = run(*asked)
        assert lacking.exit_code == 2
        assert "Add --data FILE" in said(lacking)
        assert not (place / "more").exists()
        done = run(*asked, "--data", rows["three"], "-q")
        assert done.exit_code == 0, done.output
        same(place / "more", fitted(loras, place / "anew", f"gate: {gate}, data: {{{every}}}{more}"))
        tasks = [f"{{name: {name}, data: {rows[name]}, metric: exact, max_new_tokens: 2}}" for name in rows]
        (place / "tasks.yaml").write_text(f"tasks: [{', '.join(tasks)}]\n")
        refused = run("eval", place / "more", "--tasks", place / "tasks.yaml", "-q")
        assert refused.exit_code == 2
        for name in rows:
            assert f"4 of the 4 rows of task {name}" in said(refused)


def test_lorahub_gives_a_newcomer_nothing_and_says_so(
    loras: Any, rows: dict[str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("nevergrad")
    compose = f"gate: {{kind: lorahub, how: outputs, budget: 3}}, data: {rows['one']}"
    old = fitted(loras, tmp_path / "old", compose, without="three")
    done = run("fit", old, tmp_path / "more", "--add", f"three={loras.adapters['three']}")
    assert done.exit_code == 0, done.output
    assert "three has the weight 0" in done.stdout
    models = [DynamicModel.load(folder) for folder in (old, tmp_path / "more")]
    ids = torch.tensor([models[0].tokenizer("the quick brown fox")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(models[0](ids), models[1](ids), atol=1e-5, rtol=1e-5)
    useless = run(
        "fit", old, tmp_path / "no", "--add", f"three={loras.adapters['three']}", "--data", rows["three"]
    )
    assert useless.exit_code == 2
    assert "lorahub learns nothing from rows of a further expert" in said(useless)


def test_gates_of_all_experts_refuse_by_name(loras: Any, rows: dict[str, Path], tmp_path: Path) -> None:
    few = ", ".join(f"{name}: {rows[name]}" for name in ("one", "two"))
    probe = load_bank(fitted(loras, tmp_path / "probe", "gate: {kind: mean}", without="three"))
    router = {f"{name}.router": torch.zeros(site.rank, site.a.shape[1]) for name, site in probe.sites.items()}
    save_file(router, tmp_path / "router.safetensors")
    for kind, compose in (
        ("xlora", f"gate: {{kind: xlora, steps: 1}}, data: {rows['one']}"),
        ("lora_mixer", f"gate: {{kind: lora_mixer, steps: 1}}, data: {{{few}}}"),
        ("router", f"gate: {{kind: router, epochs: 1}}, data: {{{few}}}"),
        ("smora", f"gate: {{kind: smora}}, given: {tmp_path / 'router.safetensors'}"),
        ("flylora", "gate: {kind: flylora}"),
    ):
        old = fitted(loras, tmp_path / kind, compose, without="three")
        done = run("fit", old, tmp_path / "more", "--add", f"three={loras.adapters['three']}")
        assert done.exit_code == 2
        assert f"{kind} is fitted for all its experts at once" in said(done)
        assert "mixmerge fit MIXTURE.yaml OUT" in said(done)
        assert not (tmp_path / "more").exists()


@pytest.fixture(scope="module")
def pair(loras: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters under the mean."""
    return fitted(loras, tmp_path_factory.mktemp("pair"), "gate: {kind: mean}", without="three")


def test_a_full_model_is_added_at_a_rank(loras: Any, pair: Path, tmp_path: Path) -> None:
    asked = ("fit", pair, tmp_path / "more", "--add", f"whole={loras.experts['three']}")
    unsized = run(*asked)
    assert unsized.exit_code == 2
    assert "is a full model, and no size is said" in said(unsized)
    done = run(*asked, "--rank", 2, "-q")
    assert done.exit_code == 0, done.output
    text = (pair.parent / "mix.yaml").read_text()
    (tmp_path / "mix.yaml").write_text(
        text.replace(
            "compose: {kind: adapters",
            f"  whole: {{model: {loras.experts['three']}}}\ncompose: {{kind: adapters, rank: 2",
        )
    )
    assert run("fit", tmp_path / "mix.yaml", tmp_path / "anew", "-q").exit_code == 0
    same(tmp_path / "more", tmp_path / "anew")


def test_everything_that_is_wrong_with_a_newcomer_is_said_at_once(
    loras: Any, pair: Path, rows: dict[str, Path], tmp_path: Path
) -> None:
    before = state(pair)
    done = run(
        *("fit", pair, tmp_path / "out", "--add", f"one={tmp_path / 'gone'}"),
        *("--data", rows["three"]),
    )
    assert done.exit_code == 2
    for words in (
        "an expert is called 'one' already",
        "gone: no such folder",
        "mean learns nothing from rows",
    ):
        assert words in said(done)
    for arguments, words in (
        (("--add", "three"), "NAME=PATH"),
        (("--add", f"mixture={loras.adapters['three']}"), "is what all experts as one are called"),
        (("--add", f"three={loras.adapters['three']}", "--rank", "2"), "has no effect on an adapter"),
        (("--data", rows["three"]), "has no effect without --add"),
    ):
        done = run("fit", pair, tmp_path / "out", *arguments)
        assert done.exit_code == 2
        assert words in said(done)
    inside = run("fit", pair, pair, "--overwrite", "--add", f"three={loras.adapters['three']}")
    assert inside.exit_code == 2
    assert "is read, and in it" in said(inside)
    assert state(pair) == before
    assert list(tmp_path.iterdir()) == []


def test_factors_with_nan_and_another_base(
    loras: Any, pair: Path, family: Callable[..., Any], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(loras.adapters["three"], broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, broken / "adapter_model.safetensors")
    done = run("fit", pair, tmp_path / "out", "--add", f"three={broken}")
    assert done.exit_code == 2
    assert "NaN" in said(done)
    other = family("llama", experts=3, dtype="float32", seed=1).base
    stranger = tmp_path / "stranger"
    shutil.copytree(loras.adapters["three"], stranger)
    config = json.loads((stranger / "adapter_config.json").read_text())
    (stranger / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(other)})
    )
    done = run("fit", pair, tmp_path / "out", "--add", f"three={stranger}")
    assert done.exit_code == 2
    assert "whose weights are not those of" in said(done)
    moved = tmp_path / "moved"
    shutil.copytree(pair, moved)
    text = (moved / "mixture.yaml").read_text()
    (moved / "mixture.yaml").write_text(text.replace(str(loras.base), str(other)))
    done = run("fit", moved, tmp_path / "out", "--add", f"three={loras.adapters['three']}")
    assert done.exit_code == 2
    assert "was made for another base" in said(done)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_no_fitted_network_takes_no_expert(loras: Any, pair: Path, tmp_path: Path) -> None:
    done = run("fit", pair.parent / "mix.yaml", tmp_path / "out", "--add", f"x={loras.adapters['three']}")
    assert done.exit_code == 2
    assert "is not fitted yet" in said(done)
    twin = tmp_path / "twin"
    shutil.copytree(loras.base, twin)
    shutil.copytree(pair / "bank", twin / "bank")
    done = run("fit", twin, tmp_path / "out", "--add", f"x={loras.adapters['three']}")
    assert done.exit_code == 2
    assert "mixmerge merge RECIPE.yaml OUT" in said(done)
    lines = [{"query": f"q{at}", "expert": "a", "score": at / 4} for at in range(5)]
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    (tmp_path / "route.yaml").write_text(
        f"experts: {{a: {{model: {loras.base}}}}}\nrouter: {{kind: knn, outcomes: {tmp_path / 'table.jsonl'}}}\n"
    )
    done = run("fit", tmp_path / "route.yaml", tmp_path / "out", "--add", f"x={loras.adapters['three']}")
    assert done.exit_code == 2
    assert "was fitted for the experts it has" in said(done)
