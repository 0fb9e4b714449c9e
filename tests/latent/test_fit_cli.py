"""``mixmerge fit`` of mixtures whose experts read each other: as a user runs it, with what a user gets wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import mixmerge
from mixmerge.checkpoint.used_rows import MANIFEST, manifest_of, read_used
from mixmerge.data.rows import read_rows
from mixmerge.errors import MixmergeError
from mixmerge.latent.files import load_latent
from mixmerge.mixture import parse
from mixmerge.mixture.hub import confined
from mixmerge.mixture.latent import check_fitted
from mixmerge.mixture.saving import spec_of

QUICK = "{steps: 4, batch_size: 4, evaluate_every: 2, save_steps: 1, learning_rate: 1e-2}"
SMALL = "bridge: {width: 24, heads: 3}, depths: [[0, last]]"


def run(*arguments: object) -> Result:
    from mixmerge.cli import app

    return CliRunner().invoke(app, [str(one) for one in arguments])


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    names = ("alpha", "kilo", "mike", "tango")
    lines = [
        {"prompt": f"{one} and {other}: ", "answer": f"{one[0]}{other[0]}"}
        for one in names
        for other in names
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def mixture(homes: Mapping[str, Path], rows: Path, tmp_path: Path) -> Callable[..., Path]:
    """``mixture(compose, name="mix.yaml", **changed experts)``: a file; ROWS stands for the rows."""

    def make(compose: str, name: str = "mix.yaml", more: str = "", **changed: str) -> Path:
        entries = {one: f"{{model: {folder}}}" for one, folder in homes.items()} | changed
        listed = "\n".join(f"  {one}: {entry}" for one, entry in entries.items())
        text = f"experts:\n{listed}\ncompose: {{kind: latent, {compose}}}\n{more}"
        (tmp_path / name).write_text(text.replace("ROWS", str(rows)))
        return tmp_path / name

    return make


def test_a_glue_is_fitted_and_its_folder_says_all(
    mixture: Callable[..., Path], homes: Mapping[str, Path], tmp_path: Path
) -> None:
    path = mixture(
        f"{SMALL}, mode: chunked, chunk: 2, route: {{k: 2, hidden: [8]}}, data: ROWS, train: {QUICK}, dtype: float32"
    )
    done = run("fit", path, tmp_path / "glue", "--quiet")
    assert done.exit_code == 0, done.output
    text = plain(done.stdout)
    assert "chunked glue of llama, gpt_neox, opt" in text
    assert "trained for 4 steps on 14 rows" in text
    assert "2 rows held out:" in text
    assert "reading nobody" in text
    found = sorted(one.name for one in (tmp_path / "glue").iterdir())
    assert found == [
        "glue.safetensors",
        "latent.json",
        "mixmerge_manifest.json",
        "mixture.yaml",
        "training.json",
        "training.png",
    ]
    assert not (tmp_path / ".glue.fit").exists()
    card = load_latent(tmp_path / "glue")
    assert (card.mode, card.chunk, card.depths) == ("chunked", 2, ((0, "last"),))
    told = json.loads((tmp_path / "glue" / "training.json").read_text())
    assert [one["step"] for one in told["points"]] == [1, 2, 3, 4]
    assert [one["step"] for one in told["looks"]] == [0, 2, 4]
    spec = spec_of(tmp_path / "glue")
    assert spec.compose.options == {"folder": str(tmp_path / "glue"), "dtype": "float32"}
    check_fitted(spec, answers=True)
    again = run("fit", path, tmp_path / "glue", "-q")
    assert again.exit_code == 2
    assert "it exists" in again.stderr
    assert run("fit", tmp_path / "glue", tmp_path / "other", "-q").exit_code == 2
    assert not (tmp_path / "other").exists()
    redone = run("fit", path, tmp_path / "glue", "--overwrite", "--json")
    assert redone.exit_code == 0, redone.output
    facts = json.loads(redone.stdout)
    assert facts["what"] == "glue"
    assert facts["hash"] == card.hash, "the same is fitted again"
    assert facts["parameters"] == card.parameters


def test_an_expert_that_changed_since_is_refused(
    mixture: Callable[..., Path], homes: Mapping[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(homes["opt"], tmp_path / "opt")
    train = "{steps: 1, batch_size: 2, holdout: 0}"
    fixed = f"{SMALL}, route: {{kind: fixed, primary: llama}}, data: ROWS, train: {train}"
    path = mixture(fixed, opt=f"{{model: {tmp_path / 'opt'}}}")
    done = run("fit", path, tmp_path / "glue", "-q")
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "opt" / "config.json").read_text())
    (tmp_path / "opt" / "config.json").write_text(json.dumps({**config, "dropout": 0.25}))
    spec = spec_of(tmp_path / "glue")
    check_fitted(spec, answers=False)
    with pytest.raises(MixmergeError, match=r"experts\.opt: is not the expert that the glue was fitted with"):
        check_fitted(spec, answers=True)


KILLED = """
import os, signal, sys
from mixmerge.mixture.gluing import fit
from mixmerge.mixture.reading import read

def progress(what, done, steps, note="", /):
    if what == sys.argv[3] and done >= int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

fit(read(sys.argv[1]).require(), sys.argv[2], progress=progress)
"""


@pytest.mark.slow
def test_a_fit_that_is_killed_goes_on_to_the_same_result(
    mixture: Callable[..., Path], programs: Any, tmp_path: Path
) -> None:
    path = mixture(f"{SMALL}, route: {{k: 2, hidden: [8]}}, data: ROWS, train: {QUICK}")
    assert run("fit", path, tmp_path / "whole", "-q").exit_code == 0
    (tmp_path / "killed.py").write_text(KILLED)
    out = tmp_path / "out"
    for what, at in (("latents of opt", 1), ("learning", 2)):
        done = programs("killed.py", path, out, what, str(at), folder=tmp_path)
        assert done.returncode == -9, done.stderr
        assert not out.exists()
        assert (tmp_path / ".out.fit").is_dir()
    done = run("fit", path, out, "-q")
    assert done.exit_code == 0, done.output
    mine, wanted = (load_file(place / "glue.safetensors") for place in (out, tmp_path / "whole"))
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(one, wanted[name]) for name, one in mine.items())
    assert (out / "latent.json").read_text() == (tmp_path / "whole" / "latent.json").read_text()
    assert not (tmp_path / ".out.fit").exists()


def test_two_fits_of_one_folder(mixture: Callable[..., Path], tmp_path: Path) -> None:
    from mixmerge.latent.resuming import alone

    path = mixture(f"{SMALL}, data: ROWS, train: {QUICK}")
    with alone(tmp_path / ".glue.fit", tmp_path / "glue"):
        done = run("fit", path, tmp_path / "glue", "-q")
    assert done.exit_code == 2
    assert "another fit is writing it. Wait for it" in plain(done.stderr)


def test_rows_that_the_glue_has_learned_from_are_named(
    mixture: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    train = "{steps: 1, batch_size: 2}"
    path = mixture(f"{SMALL}, route: {{k: 2, hidden: []}}, data: [ROWS], samples: 6, train: {train}")
    assert run("fit", path, tmp_path / "glue", "-q").exit_code == 0
    used, meant = read_used(manifest_of(tmp_path / "glue" / MANIFEST))
    assert len(used) == 6
    assert used < {row.digest for row in read_rows(str(rows))}
    assert not meant
    asked = ("eval", tmp_path / "glue", "--task", rows, "--metric", "f1", "--resamples", 100, "-q")
    refused = run(*asked)
    assert (refused.exit_code, "was made with 6 of the 16 rows" in plain(refused.stderr)) == (2, True)
    scored = run(*asked, "--transductive", "--limit", 4, "--json")
    assert scored.exit_code == 0, scored.output
    told = json.loads(scored.stdout)
    assert any("experts answer as one" in note for note in told["notes"])


def test_rows_to_keep_are_named_among_those_it_was_made_with(
    mixture: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    lines = rows.read_text().splitlines()
    (tmp_path / "own.jsonl").write_text("\n".join(lines[:3]) + "\n")
    (tmp_path / "lessons.jsonl").write_text("\n".join(lines[3:9]) + "\n")
    fixed = "route: {kind: fixed, primary: opt}"
    train = "{steps: 2, batch_size: 2, keep_batch_size: 3, holdout: 0}"
    data = f"data: {tmp_path}/lessons.jsonl, keep: [{tmp_path}/own.jsonl]"
    path = mixture(f"{SMALL}, {fixed}, {data}, train: {train}")
    done = run("fit", path, tmp_path / "glue")
    assert done.exit_code == 0, done.output
    text = " ".join(plain(done.stdout).split())
    assert "trained for 2 steps on 6 rows" in text
    assert re.search(r"3 rows to keep: in the last step \d\S* nats per token from the primaries alone", text)
    used, _ = read_used(manifest_of(tmp_path / "glue" / MANIFEST))
    assert used == {row.digest for row in read_rows(str(rows))[:9]}
    told = json.loads((tmp_path / "glue" / "training.json").read_text())
    assert [point["keep"] > 0 for point in told["points"]] == [False, True]
    assert told["train"]["keep_batch_size"] == 3


def test_an_adapter_is_an_expert(
    mixture: Callable[..., Path], homes: Mapping[str, Path], rows: Path, tmp_path: Path
) -> None:
    from mixmerge.zoo.adapters import save_adapter

    base = load_file(homes["llama"] / "model.safetensors")
    deltas = {name: 0.1 * one for name, one in base.items() if name.endswith("q_proj.weight")}
    save_adapter(tmp_path / "tuned", deltas, targets=("q_proj",), rank=2)
    train = "{steps: 1, batch_size: 2, holdout: 0}"
    path = mixture(
        f"{SMALL}, route: {{kind: fixed, primary: gpt_neox}}, data: ROWS, train: {train}",
        opt=f"{{adapter: {tmp_path / 'tuned'}, base: {homes['llama']}}}",
    )
    done = run("fit", path, tmp_path / "glue", "-q")
    assert done.exit_code == 0, done.output
    hashes = {one.hash for one in load_latent(tmp_path / "glue").experts}
    assert len(hashes) == 3, "an adapter is not its base"
    check_fitted(spec_of(tmp_path / "glue"), answers=True)


def test_a_text_encoder_and_a_router_of_the_mixtures_own(
    mixture: Callable[..., Path],
    family: Callable[..., Any],
    homes: Mapping[str, Path],
    rows: Path,
    tmp_path: Path,
) -> None:
    train = "{steps: 1, batch_size: 4, holdout: 0}"
    encoder = family("bert").base
    path = mixture(f"{SMALL}, route: {{k: 2, hidden: [8], encoder: {encoder}}}, data: ROWS, train: {train}")
    done = run("fit", path, tmp_path / "encoded", "-q")
    assert done.exit_code == 0, done.output
    assert spec_of(tmp_path / "encoded").compose.options["encoder"] == str(encoder)
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    outcomes = [
        {"query": one["prompt"], "expert": name, "score": float((at + number) % 3 == 0)}
        for at, one in enumerate(lines)
        for number, name in enumerate(homes)
    ]
    (tmp_path / "outcomes.jsonl").write_text("\n".join(map(json.dumps, outcomes)) + "\n")
    router = f"router: {{kind: knn, outcomes: {tmp_path / 'outcomes.jsonl'}}}\n"
    compose = f"{SMALL}, data: ROWS, train: {train}"
    several = mixture(compose, "own.yaml", f"{router}policy: {{kind: top_k, k: 2}}\n")
    done = run("fit", several, tmp_path / "own", "-q")
    assert done.exit_code == 0, done.output
    spec = spec_of(tmp_path / "own")
    assert spec.router is not None
    assert spec.router.folder == str(tmp_path / "own")
    check_fitted(spec, answers=True)
    assert load_latent(tmp_path / "own").route is None
    one = run("fit", mixture(compose, "one.yaml", router), tmp_path / "one", "-q")
    assert one.exit_code == 2
    assert "the policy picks one expert for every row, so nobody is read" in plain(one.stderr)
    assert not (tmp_path / "one").exists()


# --- what a user gets wrong

WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown keys at every depth": (
        "dats: ROWS, bridge: {widht: 3}, route: {kk: 1}, train: {step: 3, weights: {enropy: 1}}",
        (
            "Did you mean 'data'",
            "Did you mean 'width'",
            "Did you mean 'k'",
            "Did you mean 'steps'",
            "'entropy'",
            "the key data is missing",
        ),
    ),
    "values": (
        "mode: loud, bridge: {width: 10, heads: 3}, route: {k: 0}, train: {steps: -1, learning_rate: fast}, data: ROWS",
        (
            "compose.mode",
            "compose.bridge (line 5): width 10 is no multiple of heads 3",
            "compose.route.k",
            "compose.train.steps",
            "compose.train.learning_rate",
        ),
    ),
    "depths of one": ("depths: 1, data: ROWS", ("compose.depths", "2 or more, or a list of pairs", "got 1")),
    "depths that are no pairs": ("depths: [[0]], data: ROWS", ("pair 1: expected [PRIMARY, PEER]",)),
    "a primary's last": ("depths: [[0, last], [last, 1]], data: ROWS", ("pair 2: a primary reads at",)),
    "a peer's share": ("depths: [[0, 1.5]], data: ROWS", ("pair 1: a peer is read at", "got 1.5")),
    "what has no effect": (
        "chunk: 4, encoder: here, data: ROWS, route: {kind: fixed, primary: opt, k: 2},"
        " train: {holdout: 0, patience: 3, weights: {entropy: 1.0}}",
        (
            "compose.chunk (line 5): has no effect in prompt mode",
            "compose.encoder (line 5): has no effect before it is fitted",
            "compose.route.k (line 5): has no effect on a fixed routing",
            "compose.train.patience (line 5): has no effect without rows that are held out",
            "compose.train.weights.entropy (line 5): has no effect where no router learns",
        ),
    ),
    "lockstep has no chunk": ("mode: lockstep, chunk: 4, data: ROWS", ("has no effect in lockstep mode",)),
    "too many, unknown": (
        "route: {k: 4, primary: opd}, data: ROWS",
        ("there are only 3 experts", "Did you mean 'opt'"),
    ),
    "a mode that hides nothing beside it": (
        "mode: promt, chunk: 4, route: {k: 9}, data: ROWS",
        ("compose.mode (line 5): expected", "there are only 3 experts"),
    ),
    "nobody is read": ("route: {k: 1}, data: ROWS", ("with one active expert nobody is read",)),
    "who answers": ("route: {kind: fixed}, data: ROWS", ("the key primary is missing",)),
    "nothing differs": (
        "route: {k: 3}, train: {weights: {consistency: 0.1}}, data: ROWS",
        ("where all experts are active",),
    ),
    "no data": ("mode: prompt", ("the key data is missing",)),
    "nothing to keep": (
        "data: ROWS, train: {keep_batch_size: 4, weights: {keep: 2.0}}",
        (
            "compose.train.weights.keep (line 5): has no effect without rows to keep",
            "compose.train.keep_batch_size (line 5): has no effect without rows to keep",
        ),
    ),
    "who is to keep them": (
        "data: ROWS, keep: ROWS",
        ("compose.keep (line 5): has rows to be answered as they are without peers, and who answers is",),
    ),
    "what is to be kept": (
        "data: ROWS, keep: 3, train: {keep_batch_size: 0, weights: {keep: -1}}",
        ("compose.keep", "compose.train.keep_batch_size", "compose.train.weights.keep"),
    ),
    "fitted already": (
        "folder: here, data: ROWS, mode: prompt",
        ("compose.data (line 5): has no effect on a fitted glue", "compose.mode (line 5)"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_yaml_gets_wrong(name: str, mixture: Callable[..., Path], tmp_path: Path) -> None:
    compose, words = WRONG[name]
    faults = parse(mixture(compose).read_text()).faults
    text = plain("\n".join(map(str, faults)))
    for word in words:
        assert word in text
    assert len({fault.where for fault in faults}) <= len(words), "nothing that is right is said to be wrong"
    done = run("fit", tmp_path / "mix.yaml", tmp_path / "out", "-q")
    assert done.exit_code == 2
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mix.yaml"]


def test_experts_that_cannot_be_part_of_it(mixture: Callable[..., Path], tmp_path: Path) -> None:
    path = mixture(
        "data: ROWS",
        llama="{endpoint: 'http://localhost:1/v1', model: x}",
        opt="{model: ./opt, engine: vllm, options: {dtype: float32}}",
    )
    text = plain(run("fit", path, tmp_path / "out", "-q").stderr)
    assert "experts.llama (line 2): an expert behind an endpoint cannot be part of" in text
    assert "experts.opt (line 4): vllm cannot run" in text
    assert "options has no effect" in text
    (tmp_path / "one.yaml").write_text(
        "experts:\n  a: {model: ./a}\ncompose: {kind: latent, data: x.jsonl}\n"
    )
    assert "has one expert, and nobody for it to read" in plain(
        run("fit", tmp_path / "one.yaml", tmp_path / "out").stderr
    )


def test_all_that_is_wrong_with_experts_and_rows_is_said_at_once(
    mixture: Callable[..., Path], homes: Mapping[str, Path], family: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"text": "no answer"}\n')
    path = mixture(
        f"data: [{tmp_path / 'rows.jsonl'}, {tmp_path / 'lost.jsonl'}], route: {{encoder: {tmp_path / 'none'}}}",
        gpt_neox=f"{{model: {family('bert').base}}}",
        opt=f"{{model: {tmp_path / 'gone'}}}",
        twin=f"{{model: {homes['llama']}}}",
    )
    done = run("fit", path, tmp_path / "out", "-q", "--device", "nowhere")
    assert done.exit_code == 2
    text = plain(done.stderr)
    for words in (
        "experts.gpt_neox: is a BertModel, which does not continue texts",
        "gone: no such folder",
        "experts.twin: is the same model as llama",
        "row 2 has no answer",
        "lost.jsonl",
        "none: no such folder",
        "cannot be put on the device 'nowhere'",
    ):
        assert words in text
    assert not [one for one in tmp_path.iterdir() if "out" in one.name]


def test_depths_and_rows_that_an_expert_does_not_have(mixture: Callable[..., Path], tmp_path: Path) -> None:
    long = {"prompt": "alpha kilo " * 200, "answer": "b"}
    (tmp_path / "long.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' + json.dumps(long) + "\n")
    path = mixture(f"depths: [[0, 4], [3, 1]], data: {tmp_path / 'long.jsonl'}")
    done = run("fit", path, tmp_path / "out", "-q")
    assert done.exit_code == 2
    text = plain(done.stderr)
    assert "compose.depths[0][1]" in text
    assert "compose.depths[1][0]" in text
    for name in ("llama", "gpt_neox", "opt"):
        assert re.search(rf"compose.data: row 2, as {name} reads it", text), text
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_the_hub_stays_in_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    for name in ("a", "b", "encoder"):
        (folder / name).mkdir(parents=True)
    (folder / "rows.jsonl").touch()
    text = (
        "experts: {a: {model: ./a}, b: {model: ./b}}\n"
        "compose: {kind: latent, route: {encoder: PLACE/encoder, k: 2}, data: [rows.jsonl, PLACE/rows.jsonl]}\n"
    )
    inside = confined(
        parse(text.replace("PLACE", ".")).require(), folder, name="org/x", trust_endpoints=False
    )
    assert inside.compose.options["route"] == {"encoder": str(folder / "encoder"), "k": 2}
    assert inside.compose.options["data"] == [str(folder / "rows.jsonl")] * 2
    with pytest.raises(MixmergeError) as caught:
        confined(parse(text.replace("PLACE", "..")).require(), folder, name="org/x", trust_endpoints=False)
    told = "\n".join(str(one) for one in caught.value.faults)
    assert "org/x: compose.route.encoder: '../encoder' leads out of the repository" in told
    assert "org/x: compose.data[1]: '../rows.jsonl' leads out of the repository" in told


def test_the_recipe_that_comes_with_mixmerge(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(mixmerge.__file__).parent / "recipes" / "mixtures" / "latent.yaml").read_text()
    assert parse(text).faults == ()
    (tmp_path / "zoo").symlink_to(zoo)
    monkeypatch.chdir(tmp_path)
    lines = [
        line
        for task in ("sort", "keep")
        for line in (zoo / "questions" / f"{task}.train.jsonl").read_text().splitlines()[:8]
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "latent.yaml").write_text(
        text.replace("steps: 200, batch_size: 16", "steps: 2, batch_size: 4")
    )
    done = run("fit", "latent.yaml", "latent", "-q")
    assert done.exit_code == 0, done.output
    assert load_latent("latent").names == ("sort", "keep", "reverse")
