"""Mixtures of the hub: found in its cache, and confined to their repository."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from mixmerge.cli import app
from mixmerge.errors import CheckpointError, MixmergeError
from mixmerge.mixture import Mixture
from mixmerge.mixture.hub import is_hub_id, spec_from
from mixmerge.outcomes.table import OutcomeTable

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Put = Callable[..., Path]


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Put:
    """``put(name, mixture, files)``: a repository in the hub client's cache, as it lays it out: links to blobs.

    Of another ``revision`` than ``main`` as well, if it is put again.
    """
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def make(
        name: str,
        mixture: Mapping[str, Any] | None,
        files: Mapping[str, bytes] | None = None,
        *,
        revision: str = "main",
    ) -> Path:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        commit = COMMIT if revision == "main" else hashlib.sha1(revision.encode()).hexdigest()
        folder = repository / "snapshots" / commit
        given = dict(files or {})
        if mixture is not None:
            given["mixture.yaml"] = yaml.safe_dump(dict(mixture), sort_keys=False).encode()
            given.setdefault("outcomes.jsonl", outcomes(tuple(mixture["experts"]), tmp_path))
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "blobs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        for path, content in given.items():
            blob = repository / "blobs" / hashlib.sha1(content).hexdigest()
            blob.write_bytes(content)
            link = folder / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return folder

    return make


def outcomes(names: tuple[str, ...], tmp_path: Path) -> bytes:
    score = np.tile(np.linspace(0.9, 0.1, len(names)), (4, 1)).round(3)
    table = OutcomeTable(ids=tuple("abcd"), queries=tuple("abcd"), experts=names, score=score)
    path = tmp_path / "made.jsonl"
    table.write(path)
    content = path.read_bytes()
    path.unlink()
    return content


def mixture(experts: Mapping[str, Any], **sections: Any) -> dict[str, Any]:
    router = {"kind": "best_single", "outcomes": "outcomes.jsonl"}
    return {"experts": dict(experts), "router": router, **sections}


ECHO = {"model": "echo-one", "engine": "echo"}


def faults(name: str, **options: Any) -> list[str]:
    with pytest.raises(MixmergeError) as error:
        Mixture.load(name, **options)
    return [str(fault) for fault in error.value.faults]


def test_paths_are_those_of_the_repository(put: Put) -> None:
    model = {"config.json": b"{}", "model.safetensors": b""}
    files = {f"experts/a/{name}": content for name, content in model.items()}
    files |= {f"experts/deep/down/{name}": content for name, content in model.items()}
    folder = put(
        "org/mix",
        mixture(
            {
                "a": {"model": "experts/a"},
                "b": {"model": "./experts/../experts/deep/down", "options": {"dtype": "float32"}},
                "c": {"adapter": "someone/adapter", "base": "experts/a"},
                "d": {"model": "someone/model"},
                "e": ECHO,
            }
        ),
        files,
    )
    loaded = Mixture.load("org/mix")
    assert loaded.spec.router.outcomes == str(folder / "outcomes.jsonl")
    assert [one.model for one in loaded.experts.values()] == [
        *(str(folder / "experts/a"), str(folder / "experts/deep/down"), None, "someone/model", "echo-one")
    ]
    assert loaded.experts["c"].base == str(folder / "experts/a")
    assert loaded.experts["c"].adapter == "someone/adapter"
    assert Mixture.load("org/mix", revision="main").spec == loaded.spec


def test_it_answers_by_command(put: Put) -> None:
    put("org/mix", mixture({"e": ECHO, "f": {**ECHO, "model": "echo-two"}}))
    result = CliRunner().invoke(app, ["ask", "org/mix", "hello there"])
    assert (result.exit_code, result.stdout) == (0, "hello there\n")


def test_a_fitted_mixture(put: Put, tmp_path: Path) -> None:
    put("org/raw", mixture({"e": ECHO}))
    Mixture.load("org/raw").save(tmp_path / "fitted")
    files = {path.name: path.read_bytes() for path in (tmp_path / "fitted").iterdir()}
    folder = put("org/fitted", None, files)
    loaded = Mixture.load("org/fitted")
    assert loaded.spec.router.folder == str(folder)
    assert [one.text for one in loaded.answer(["hello"])] == ["hello"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/etc", "'/etc' is no path in the repository"),
        ("~/models/mine", "'~/models/mine' is no path in the repository"),
        ("~root", "'~root' is no path in the repository"),
        ("..", "'..' leads out of the repository"),
        ("../../refs", "leads out of the repository"),
        ("./experts/../../../blobs", "leads out of the repository"),
        ("a/../../b/c", "leads out of the repository"),
        ("experts\\..\\..\\x", "is no path in the repository"),
        ("./missing", "'./missing' is not in the repository"),
        ("here/model", "something of that name is in this folder"),
        ("a\0b", "is no path in the repository"),
    ],
)
@pytest.mark.parametrize("key", ["model", "adapter", "base"])
def test_a_path_that_leaves_is_refused_by_name(put: Put, path: str, said: str, key: str) -> None:
    (Path.cwd() / "here" / "model").mkdir(parents=True)
    keys = {"adapter": "org/x", "base": "org/y"} if key != "model" else {}
    put("org/mix", mixture({"good": ECHO, "bad": {**keys, key: path}}))
    (fault,) = faults("org/mix")
    assert fault.startswith(f"org/mix: experts.bad.{key}: ")
    assert said in fault


def test_all_that_leaves_is_said_at_once(put: Put, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secrets").mkdir()
    wrong = mixture({"a": {"model": "/a"}, "b": {"model": "../b"}})
    wrong["router"] = {
        "kind": "knn",
        "outcomes": "/o.jsonl",
        "features": {"kind": "sentence", "model": "~/m"},
    }
    folder = put("org/mix", wrong, {"outcomes.jsonl": b""})
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "links").symlink_to(tmp_path / "secrets")
    found = faults("org/mix")
    assert sorted(fault.split(":")[1].strip() for fault in found) == [
        *("experts.a.model", "experts.b.model", "link", "links", "router.features.model", "router.outcomes")
    ]


def test_a_link_to_another_repository(put: Put) -> None:
    other = put("org/other", mixture({"e": ECHO}))
    folder = put("org/mix", mixture({"e": {"model": "./model"}}))
    (folder / "model").symlink_to(other)
    (fault,) = faults("org/mix")
    assert fault == "org/mix: model: is a link that leads out of the repository. Files."


def test_keys_go_to_no_stranger(put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    far = {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}
    put("org/mix", mixture({"e": ECHO, "keyed": {**far, "api_key_env": "MY_KEY"}, "open": far}))
    keyed, plain = faults("org/mix")
    assert keyed.startswith(
        "org/mix: experts.keyed.api_key_env: prompts, and the key in MY_KEY, would be sent to http://127.0.0.1:9/v1"
    )
    assert "--trust-endpoints" in keyed
    assert plain.startswith("org/mix: experts.open.endpoint: prompts would be sent to")
    assert "sk-very-secret" not in keyed
    loaded = Mixture.load("org/mix", trust_endpoints=True)
    assert loaded.experts["keyed"].api_key_env == "MY_KEY"
    refused = CliRunner().invoke(app, ["ask", "org/mix", "hello"])
    assert (refused.exit_code, "--trust-endpoints" in refused.stderr) == (2, True)
    trusted = CliRunner().invoke(app, ["ask", "org/mix", "hello", "--trust-endpoints"])
    assert (trusted.exit_code, trusted.stdout) == (0, "hello\n")


@pytest.mark.parametrize("option", ["adapters", "tokenizer", "python", "environment", "trust_remote_code"])
def test_options_are_numbers_and_types(put: Put, option: str) -> None:
    put("org/mix", mixture({"e": {"model": "someone/model", "options": {option: "x"}}}))
    (fault,) = faults("org/mix")
    assert fault.startswith(f"org/mix: experts.e.options.{option}: ")


def test_features_of_a_fitted_router_name_no_path(put: Put) -> None:
    card = b'{"format": "x", "features": {"kind": "sentence", "options": {"model": "/mine/model"}}}'
    given = {"experts": {"e": ECHO}, "router": {"folder": "router"}}
    put("org/mix", given, {"router/router.json": card})
    (fault,) = faults("org/mix")
    assert "router.json: model: '/mine/model' would be looked for on this machine" in fault


def test_what_is_not_in_the_cache(put: Put) -> None:
    (fault,) = faults("org/nowhere")
    assert fault.startswith("org/nowhere: is neither a file here nor a mixture in the Hugging Face cache.")
    assert "HF_HUB_OFFLINE=0 hf download org/nowhere" in fault
    with pytest.raises(CheckpointError, match="--revision v2"):
        Mixture.load("org/nowhere", revision="v2")


def test_what_is_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "mix").mkdir(parents=True)
    assert [is_hub_id(name) for name in ("org/mix", "org/other", Path("org/other"), "mix", "a/b/c")] == [
        *(False, True, True, False, False)
    ]
    assert not any(map(is_hub_id, ("./mix", "../mix", "/mix", "org/mix.yaml", {}, "org/a mix", "")))


def test_a_fusion_names_nothing_outside_its_repository(put: Put, tmp_path: Path) -> None:
    """Its models lie in the repository or on the hub, and so does what it would be fitted on."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    model = {"config.json": b"{}"}
    files = {f"{folder}/{name}": content for folder in ("large", "small") for name, content in model.items()}
    files |= {"rows.jsonl": b"", "outcomes.jsonl": b""}
    compose = {"kind": "logits", "base": "large", "reference": "small", "mode": "static"}
    experts = {"large": {"model": "large"}, "small": {"model": "./small"}, "tuned": {"model": "org/tuned"}}
    folder = put("org/fusion", {"experts": experts, "compose": {**compose, "data": "rows.jsonl"}}, files)
    loaded = spec_from("org/fusion")
    assert loaded.experts["large"].model == str(folder / "large")
    assert loaded.compose.options["data"] == str(folder / "rows.jsonl")
    wrong = {**experts, "tuned": {"adapter": "../../tuned", "base": "/small"}}
    put("org/wrong", {"experts": wrong, "compose": {**compose, "data": "../../../rows.jsonl"}}, files)
    assert sorted(fault.split(":")[1].strip() for fault in faults("org/wrong")) == [
        *("compose.data", "experts.tuned.adapter", "experts.tuned.base")
    ]
    put("org/fitted", {"experts": experts, "compose": {**compose, "folder": "/fitted"}}, files)
    assert "org/fitted: compose.folder: '/fitted' is no path in the repository" in faults("org/fitted")[0]


# --- commands


@pytest.fixture
def work(put: Put) -> Path:
    """A folder with queries, tasks and a mixture of its own, where ``org/mix`` of the hub has two revisions."""
    put("org/mix", mixture({"old": ECHO}))
    put("org/mix", mixture({"new": ECHO}), revision="v2")
    here = Path.cwd()
    (here / "queries.txt").write_text("hello\n")
    (here / "tasks.jsonl").write_text('{"text": "hello", "answer": "hello"}\n')
    (here / "outcomes.jsonl").write_bytes(outcomes(("e",), here))
    (here / "own.yaml").write_text(yaml.safe_dump(mixture({"e": ECHO})))
    return here


COMMANDS = {
    "ask": "ask MIXTURE hello --json",
    "batch": "batch MIXTURE -i queries.txt -o out.jsonl -q",
    "profile": "profile MIXTURE --tasks tasks.jsonl -o out.jsonl -q",
    "route ask": "route ask MIXTURE hello --json",
    "route fit": "route fit MIXTURE --out fitted -q",
}


def command(name: str, mixture: str, *more: str) -> Any:
    return CliRunner().invoke(app, [*COMMANDS[name].replace("MIXTURE", mixture).split(), *more])


def expert(name: str, said: str) -> str:
    """Of a mixture of one expert: that which a command has used."""
    if name == "profile":
        return OutcomeTable.read("out.jsonl").experts[0]
    if name == "route fit":
        return next(iter(Mixture.load("fitted").experts))
    found = json.loads(Path("out.jsonl").read_text() if name == "batch" else said)
    return str(found["primary" if name == "route ask" else "expert"])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("more", "used"), [([], "old"), (["--revision", "main"], "old"), (["--revision", "v2"], "new")]
)
def test_commands_take_hub_ids_and_revisions(work: Path, name: str, more: list[str], used: str) -> None:
    done = command(name, "org/mix", *more)
    assert done.exit_code == 0, done.stderr
    assert expert(name, done.stdout) == used


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_here_has_no_revisions(work: Path, name: str) -> None:
    before = sorted(path.name for path in work.iterdir())
    for given in ("own.yaml", *(["outcomes.jsonl"] if name == "route fit" else [])):
        refused = command(name, given, "--revision", "v2")
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert f"--revision: {given} is no hub id" in refused.stderr
    assert sorted(path.name for path in work.iterdir()) == before
    assert command(name, "own.yaml").exit_code == 0
    if name == "route ask":
        Mixture.load("own.yaml").router.save("router")
        assert "--revision: router is no hub id" in command(name, "router", "--revision", "v2").stderr
    with pytest.raises(MixmergeError, match="--revision: the mixture is no hub id"):
        Mixture.load(mixture({"e": ECHO}), revision="v2")


@pytest.mark.parametrize("name", COMMANDS)
def test_endpoints_of_the_hub_are_trusted_by_word(put: Put, work: Path, name: str) -> None:
    """But for a decision, which is all that ``route ask`` makes: nothing is sent for it."""
    far = {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}
    put("org/far", mixture({"e": ECHO, "far": far}))
    first = command(name, "org/far")
    if name == "route ask":
        assert (first.exit_code, expert(name, first.stdout)) == (0, "e")
        return
    assert (first.exit_code, "--trust-endpoints" in first.stderr) == (2, True)
    if name != "profile":  # which would ask all
        assert command(name, "org/far", "--trust-endpoints").exit_code == 0


def test_a_fitted_folder_is_profiled(work: Path) -> None:
    assert command("route fit", "own.yaml").exit_code == 0
    assert command("profile", "fitted").exit_code == 0
    assert expert("profile", "") == "e"


def test_a_table_that_is_missing_is_asked_of_nobody(work: Path) -> None:
    missing = command("route fit", "data/missing.csv")
    assert (missing.exit_code, "Hugging Face" in missing.stderr) == (2, False)
    assert "data/missing.csv" in missing.stderr
