"""Models on the Hugging Face hub: planned from headers, downloaded once, and every refusal in one line.

A server on the loopback speaks the part of the hub's API that its client needs, and notes every request. The
commands run in real processes with a cache of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from mixmerge.checkpoint.hub import Snapshot, download
from mixmerge.errors import CheckpointError

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32"}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": []}
# What is never wanted of a repository that has safetensors.
DECOYS = (
    "README.md", ".gitattributes", "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth",
    "model.gguf", "tf_model.h5", "original/params.json", "original/consolidated.safetensors",
    "onnx/config.json", "modeling_own.py", "adapter_model.safetensors",
)  # fmt: skip
Tensors = Mapping[str, NDArray[Any]]

# Imports everything once, then makes a process for each command: their start would be most of the time. What
# the client has read from the environment by then is set again where a command has another.
STARTER = """
import json, os, sys, traceback
import huggingface_hub.file_download, huggingface_hub.hf_api, rich.console, rich.progress, rich.table
from huggingface_hub import constants
from mixmerge import cli
from mixmerge.engine.merge import merge
merge(*sys.argv[1:])  # the kernels are loaded by a first merge
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        constants.HF_HUB_OFFLINE = asked["offline"]
        constants.ENDPOINT = asked["endpoint"]
        for stream, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(asked[stream], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        code = 0
        try:
            if asked["code"]:
                exec(asked["code"], {})
            else:
                sys.argv = ["mixmerge", *asked["arguments"]]
                cli.main()
        except SystemExit as done:
            code = done.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


# -- the hub --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One request to the hub, and how many bytes of a file it was sent."""

    method: str
    file: str  # org/name/file, or the path of an API call
    range: str
    sent: int


@dataclass
class Hub:
    """Repositories: name -> commit -> file -> content, and what each branch is."""

    url: str = ""
    files: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    broken: dict[str, list[int]] = field(default_factory=dict)  # file -> bytes to send; negative: a status
    ranges: bool = True
    requests: list[Request] = field(default_factory=list)
    after: Callable[[Request], None] = lambda request: None

    def put(self, name: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """A new commit of a repository, at the tip of a branch."""
        commit = hashlib.sha1(f"{name} {len(self.files.get(name, {}))}".encode()).hexdigest()
        self.files.setdefault(name, {})[commit] = dict(files)
        self.branches.setdefault(name, {})[branch] = commit
        return commit

    def note(self, request: Request) -> None:
        self.requests.append(request)
        self.after(request)

    def sent(self, suffix: str = "") -> dict[str, int]:
        """Bytes sent of each file with this ending."""
        sums: dict[str, int] = {}
        for request in self.requests:
            if request.method == "GET" and request.file.endswith(suffix):
                sums[request.file] = sums.get(request.file, 0) + request.sent
        return sums

    def reset(self) -> None:
        """Empty again, and in order."""
        fresh = Hub(self.url)
        self.__dict__.update(fresh.__dict__)


class Handler(BaseHTTPRequestHandler):
    """Answers as huggingface.co does: weights are redirected to another host, which stores them by hash."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 20
    disable_nagle_algorithm = True
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/models/"):
            self.api(path.removeprefix("api/models/"))
        elif match := re.fullmatch(r"(cdn/)?(.+?)/resolve/([^/]+)/(.+)", path):
            self.file(match[2], match[3], match[4], stored=bool(match[1]))
        else:
            self.refuse(path, 404, "")

    def refuse(self, file: str, status: int, code: str) -> None:
        self.hub.note(Request(self.command, file, "", 0))
        self.answer(status, {"X-Error-Code": code} if code else {}, b"")

    def answer(self, status: int, headers: Mapping[str, str], body: bytes, *, length: int = -1) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def commit(self, name: str, revision: str) -> str | None:
        """The commit of a revision; None once the request has been refused."""
        if name not in self.hub.files:
            self.refuse(self.path, 401, "RepoNotFound")
            return None
        commit = self.hub.branches[name].get(revision, revision)
        if commit not in self.hub.files[name]:
            self.refuse(self.path, 404, "RevisionNotFound")
            return None
        return commit

    def api(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        commit = self.commit(name, revision or "main")
        if commit is None:
            return
        siblings = [
            {"rfilename": file, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            for file, content in self.hub.files[name][commit].items()
        ]
        self.hub.note(Request(self.command, f"api/{name}", "", 0))
        body = json.dumps({"_id": "1", "id": name, "sha": commit, "siblings": siblings}).encode()
        self.answer(200, {"Content-Type": "application/json"}, body)

    def file(self, name: str, revision: str, file: str, *, stored: bool) -> None:
        commit = self.commit(name, revision)
        if commit is None:
            return
        label = f"{name}/{file}"
        content = self.hub.files[name][commit].get(file)
        if name in self.hub.gated:
            return self.refuse(label, 403, "GatedRepo")
        if content is None:
            return self.refuse(label, 404, "EntryNotFound")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = {"X-Repo-Commit": commit, "ETag": etag, "Accept-Ranges": "bytes"}
        if file.endswith((".safetensors", ".bin")) and not stored:
            self.hub.note(Request(self.command, label, "redirect", 0))
            port = urlsplit(self.hub.url).port
            headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(len(content))}
            headers |= {"Location": f"http://localhost:{port}/cdn/{name}/resolve/{commit}/{file}"}
            return self.answer(302, headers, b"")
        asked = self.headers.get("Range", "")
        status, part = 200, content
        if asked and self.hub.ranges:
            begin, _, end = asked.removeprefix("bytes=").partition("-")
            part = content[int(begin) : int(end) + 1 if end else None]
            headers["Content-Range"] = f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}"
            status = 206
        length = len(part)
        if self.command == "GET" and self.hub.broken.get(label):
            fault = self.hub.broken[label].pop(0)
            if fault < 0:
                return self.refuse(label, -fault, "")
            part, self.close_connection = part[:fault], True
        self.hub.note(Request(self.command, label, asked, len(part) if self.command == "GET" else 0))
        self.answer(status, headers, part, length=length)


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": made}))
    server.daemon_threads = True
    made.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    server.shutdown()
    server.server_close()


# -- models and commands --------------------------------------------------------------------------------------


def weights(seed: int, *, rows: int = 16, layers: int = 4) -> dict[str, NDArray[np.float32]]:
    draw = np.random.default_rng(seed)
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(layers)]
    return {name: draw.standard_normal((rows, 64), np.float32) for name in names}


def small(**config: Any) -> dict[str, bytes]:
    """A model's files but for its weights."""
    return {
        "config.json": json.dumps({**CONFIG, **config}).encode(),
        "tokenizer.json": json.dumps(TOKENIZER).encode(),
        "tokenizer_config.json": b"{}",
    }


def model(seed: int, *, rows: int = 16, decoys: bool = False, **config: Any) -> dict[str, bytes]:
    """The files of a model with one weight file."""
    extra = dict.fromkeys(DECOYS, b"x" * 1000) if decoys else {}
    return {**small(**config), "model.safetensors": save(weights(seed, rows=rows)), **extra}


def sharded(seed: int) -> dict[str, bytes]:
    """The same in two shards."""
    tensors = list(weights(seed).items())
    shards = {f"model-0000{n}-of-00002.safetensors": dict(tensors[2 * n - 2 : 2 * n]) for n in (1, 2)}
    index = {name: file for file, held in shards.items() for name in held}
    files = {file: save(held) for file, held in shards.items()}
    return {**small(), **files, "model.safetensors.index.json": json.dumps({"weight_map": index}).encode()}


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    """The same model as a folder of one's own."""
    folder.mkdir()
    for file, content in files.items():
        if "/" not in file:
            (folder / file).write_bytes(content)
    return folder


def header_size(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """In one line that has all the words, by exit code 2 and without a traceback."""
        assert self.code == 2, f"{self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err
        errors = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, self.err
        missing = [word for word in words if word not in errors[0]]
        assert not missing, f"{missing} not in: {errors[0]}"

    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


@dataclass(frozen=True)
class Shell:
    """Commands in processes, at a hub and with an empty cache."""

    root: Path
    env: Mapping[str, str]
    starter: subprocess.Popen[str]

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def cache(self) -> Path:
        return Path(self.env["HF_HOME"])

    def run(
        self, *arguments: str | Path, code: str = "", offline: bool = False, endpoint: str | None = None
    ) -> Ran:
        out, err = self.root / "stdout", self.root / "stderr"
        asked = {
            "arguments": list(map(str, arguments)),
            "code": code,
            "offline": offline,
            "endpoint": endpoint or self.env["HF_ENDPOINT"],
            "out": str(out),
            "err": str(err),
        }
        assert self.starter.stdin is not None
        assert self.starter.stdout is not None
        self.starter.stdin.write(json.dumps(asked) + "\n")
        self.starter.stdin.flush()
        return Ran(int(self.starter.stdout.readline()), out.read_text(), err.read_text())

    def recipe(self, *models: Path | str, method: str = "linear", **more: Any) -> Path:
        entries = [{"model": str(one), "parameters": {"weight": 1.0}} for one in models]
        path = self.root / "recipe.yaml"
        path.write_text(json.dumps({"merge_method": method, "models": entries, **more}))
        return path

    def manifest(self) -> Any:
        return json.loads((self.out / "mixmerge_manifest.json").read_text())


@pytest.fixture(scope="module")
def env(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path_factory.mktemp("cache") / "huggingface"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture(scope="module")
def starter(env: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    warm = tmp_path_factory.mktemp("warm")
    entries = [{"model": str(write(warm / name, model(1))), "parameters": {"weight": 1.0}} for name in "ab"]
    recipe = {"merge_method": "linear", "models": entries}
    (warm / "recipe.yaml").write_text(json.dumps(recipe))
    command = [sys.executable, "-P", "-c", STARTER, str(warm / "recipe.yaml"), str(warm / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env={**os.environ, **env}, text=True, **pipes) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def hub(server: Hub) -> Hub:
    """An empty hub."""
    server.reset()
    return server


@pytest.fixture
def shell(tmp_path: Path, env: dict[str, str], starter: subprocess.Popen[str], hub: Hub) -> Shell:
    shutil.rmtree(env["HF_HOME"], ignore_errors=True)
    return Shell(tmp_path, env, starter)


# -- planning -------------------------------------------------------------------------------------------------


def test_a_plan_is_made_of_headers(shell: Shell, hub: Hub) -> None:
    """Nothing of a weight file but its header is sent, and of the rest only what a merge may need."""
    one, two = model(1, decoys=True), sharded(2)
    commits = [hub.put("org/one", one), hub.put("org/two", two, branch="v2")]
    planned = shell.run("plan", shell.recipe("org/one", "org/two@v2"), "--json").json()

    headers = {
        f"org/one/{file}": header_size(content)
        for file, content in one.items()
        if file == "model.safetensors"
    }
    headers |= {f"org/two/{file}": header_size(two[file]) for file in two if file.endswith(".safetensors")}
    assert {file: count for file, count in hub.sent(".safetensors").items() if count} == headers
    assert all(
        re.fullmatch(r"bytes=(0-7|8-\d+)|redirect", r.range) for r in hub.requests if r.file in headers
    )
    wanted = {f"org/one/{file}" for file in (*small(), "model.safetensors")} | {
        f"org/two/{file}" for file in two
    }
    assert {r.file for r in hub.requests if not r.file.startswith("api/")} == wanted
    once = [r.file for r in hub.requests if r.method == "GET" and r.file not in headers]
    assert len(once) == len(set(once))

    bytes_of = [sum(len(files[file]) for file in files if f"{name}/{file}" in headers)
                for name, files in (("org/one", one), ("org/two", two))]  # fmt: skip
    assert planned["to_download"] == sum(bytes_of)
    assert [entry["commit"] for entry in planned["models"]] == commits
    table = shell.run("plan", shell.root / "recipe.yaml").out
    assert re.search(r"to download\D+[\d.]+ kB", table)
    local = shell.recipe(write(shell.root / "one", one), write(shell.root / "two", two))
    as_folders = shell.run("plan", local, "--json").json()
    assert (as_folders["hash"], as_folders["tensors"][0]["shape"]) == (planned["hash"], [16, 64])
    assert as_folders["to_download"] == 0


def test_a_hub_without_ranges(shell: Shell, hub: Hub) -> None:
    """A mirror that answers with the whole file is read as far as the header goes."""
    hub.ranges = False
    hub.put("org/one", model(1))
    hub.put("org/two", sharded(2))
    assert shell.run("plan", shell.recipe("org/one", "org/two"), "--json").json()["to_download"] > 0


def test_faults_are_found_before_anything_is_downloaded(shell: Shell, hub: Hub) -> None:
    one, two = model(1), model(2, rows=17)
    hub.put("org/one", one)
    hub.put("org/two", two)
    recipe = shell.recipe("org/one", "org/two")
    shell.run("merge", recipe, shell.out).refused("models[1].model", "[17, 64]", "[16, 64]")
    recipe = shell.recipe("org/one", model_name="x")
    shell.run("merge", recipe, shell.out).refused("model_name")
    shell.out.mkdir()
    shell.run("merge", shell.recipe("org/one"), shell.out).refused("it exists", "--overwrite")
    shell.out.rmdir()
    shell.run("merge", shell.recipe("org/one"), shell.out, "--device", "nowhere").refused(
        "device", "'nowhere'"
    )
    for files, label in ((one, "org/one"), (two, "org/two")):
        header = header_size(files["model.safetensors"])
        assert hub.sent(f"{label}/model.safetensors")[f"{label}/model.safetensors"] % header == 0
        assert not list(shell.cache.rglob("model.safetensors"))


def test_remote_headers_are_checked_like_local_ones(shell: Shell, hub: Hub) -> None:
    whole = model(1)["model.safetensors"]
    hub.put("org/cut", {**small(), "model.safetensors": whole[:-4]})
    hub.put("org/bomb", {**small(), "model.safetensors": b"\xff" * 8 + whole[8:]})
    hub.put("org/empty", {**small(), "model.safetensors": b""})
    shell.run("plan", shell.recipe("org/cut")).refused(
        "models[0].model: org/cut/model.safetensors", "ends at"
    )
    shell.run("plan", shell.recipe("org/bomb")).refused("org/bomb/model.safetensors", "claims")
    shell.run("plan", shell.recipe("org/empty")).refused(
        "org/empty/model.safetensors", "8-byte header length"
    )
    shards = sharded(1)
    del shards["model-00002-of-00002.safetensors"]
    hub.put("org/shards", shards)
    shell.run("plan", shell.recipe("org/shards")).refused("org/shards/model-00002-of-00002.safetensors")
    shards["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x"}}'
    hub.put("org/shards", shards)
    shell.run("plan", shell.recipe("org/shards")).refused("'../../x'")


def test_code_comes_only_where_the_config_names_it(shell: Shell, hub: Hub) -> None:
    hub.put("org/own", model(1, decoys=True, auto_map={"AutoModel": "modeling_own.Own"}))
    shell.run("plan", shell.recipe("org/own"), "--json").json()
    assert hub.sent(".py") == {"org/own/modeling_own.py": 1000}


# -- merging --------------------------------------------------------------------------------------------------


def test_a_merge_downloads_each_file_once(shell: Shell, hub: Hub) -> None:
    """The result is that of the same models in folders; from then on the cache is all it takes."""
    one, two = model(1, decoys=True), sharded(2)
    commits = [hub.put("org/one", one), hub.put("org/two", two)]
    hub.branches["org/one"]["v1"] = commits[0]
    recipe = shell.recipe("org/one", "org/two", "org/one@v1")
    merged = shell.run("merge", recipe, shell.out, "--json")
    sizes = {f"org/one/{file}": len(one[file]) for file in one if file == "model.safetensors"}
    sizes |= {f"org/two/{file}": len(two[file]) for file in two if file.endswith(".safetensors")}
    whole = [r.file for r in hub.requests if r.method == "GET" and r.sent == sizes.get(r.file)]
    assert merged.json()["tensors"] == 4
    assert sorted(whole) == sorted(sizes)
    assert "Traceback" not in merged.err
    assert [entry["commit"] for entry in shell.manifest()["inputs"]] == [*commits, commits[0]]

    asked = len(hub.requests)
    result = (shell.out / "model.safetensors").read_bytes()
    for offline in (False, True):
        again = shell.run("merge", recipe, shell.out, "--overwrite", "--json", offline=offline).json()
        assert again["plan"] == merged.json()["plan"]
    assert len(hub.requests) == asked
    folders = [write(shell.root / "one", one), write(shell.root / "two", two)]
    recipe = shell.recipe(*folders, write(shell.root / "again", one))
    assert shell.run("merge", recipe, shell.out, "--overwrite").code == 0
    assert (shell.out / "model.safetensors").read_bytes() == result


def test_what_was_planned_is_merged(shell: Shell, hub: Hub) -> None:
    """A branch that moves on between plan and download changes nothing."""
    first = hub.put("org/one", model(1))

    def move(request: Request) -> None:
        if request.file == "org/one/model.safetensors" and request.range.startswith("bytes=8-"):
            hub.put("org/one", model(2))

    hub.after = move
    assert shell.run("merge", shell.recipe("org/one"), shell.out).code == 0
    assert hub.branches["org/one"]["main"] != first
    assert [entry["commit"] for entry in shell.manifest()["inputs"]] == [first]
    kept = np.frombuffer((shell.out / "model.safetensors").read_bytes()[-16 * 64 * 4 :], np.float32)
    assert (kept == weights(1)["model.layers.3.mlp.up_proj.weight"].ravel()).all()


def test_an_adapter_is_downloaded_to_be_planned(shell: Shell, hub: Hub) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = np.ones((2, 64), np.float32), np.ones((16, 2), np.float32)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}
    base = hub.put("org/base", model(1))
    adapter = hub.put("org/lora", {**files, "adapter_model.bin": b"x", "optimizer.pt": b"x"})
    recipe = shell.recipe("org/base+org/lora")
    planned = shell.run("plan", recipe, "--json").json()
    assert (planned["models"][0]["commit"], planned["models"][0]["adapter_commit"]) == (base, adapter)
    assert planned["to_download"] == len(model(1)["model.safetensors"])
    assert {file for file in hub.sent() if "org/lora/" in file} == {f"org/lora/{file}" for file in files}
    inspected = shell.run("inspect", "org/base+org/lora", "--json").json()
    assert "lowrank" in json.dumps(inspected)
    assert shell.run("merge", recipe, shell.out).code == 0
    merged = np.frombuffer((shell.out / "model.safetensors").read_bytes()[-4 * 16 * 64 * 4 :], np.float32)
    wanted = weights(1)["model.layers.0.mlp.up_proj.weight"] + 2
    assert np.allclose(merged[: 16 * 64], wanted.ravel(), atol=1e-6)


def test_from_python(shell: Shell, hub: Hub) -> None:
    """``run`` takes no plan whose weights are elsewhere; ``merge`` downloads them and says how far it is."""
    hub.put("org/one", model(1))
    recipe = shell.recipe("org/one")
    ran = shell.run(
        code=f"""if True:
        from pathlib import Path
        import mixmerge
        from mixmerge.engine.merge import run
        from mixmerge.plan import fetch, make_plan
        plan = make_plan({str(recipe)!r})
        assert plan.bytes_to_download == {len(model(1)["model.safetensors"])}
        try:
            run(plan, Path({str(shell.out)!r}))
        except mixmerge.MixmergeError as error:
            print(error)
        steps = []
        mixmerge.merge({str(recipe)!r}, {str(shell.out)!r}, downloading=lambda *step: steps.append(step))
        assert steps[-1] == (plan.bytes_to_download,) * 2, steps
        local = make_plan({str(recipe)!r})
        assert not local.remote and local.hash == plan.hash and fetch(local) is local
        print("done")
    """
    )
    assert ran.code == 0, ran.err
    assert "weights of org/one are still on the hub" in ran.out
    assert "fetch" in ran.out
    assert ran.out.endswith("done\n")
    assert ran.err == ""


# -- refusals -------------------------------------------------------------------------------------------------


def test_what_the_hub_refuses(shell: Shell, hub: Hub) -> None:
    hub.put("org/gated", model(1))
    hub.gated.add("org/gated")
    hub.put("org/one", model(1))
    hub.put("org/pickled", {**small(), "pytorch_model.bin": b"x"})
    hub.put("org/data", {"README.md": b"x"})
    hub.put("org/bare", small())
    hub.put("org/down", model(1))
    hub.broken["org/down/model.safetensors"] = [-500] * 9
    refusals = {
        "org/gated": ("org/gated is gated", "hf auth login"),
        "org/nowhere": ("neither a folder here nor a model on the hub", "hf auth login"),
        "org/one@v9": ("no revision 'v9'",),
        "org/pickled": ("*.bin", "hf download org/pickled"),
        "org/data": ("org/data on the hub has no config.json",),
        "org/bare": ("it holds no weights",),
        "org/down": ("it answered 500",),
        "org/--": ("org/-- cannot be had",),
    }
    for name, words in refusals.items():
        shell.run("merge", shell.recipe(name), shell.out).refused("models[0].model", *words)
    assert not shell.out.exists()
    assert not list(shell.cache.rglob("pytorch_model.bin"))


def test_an_unreachable_hub(shell: Shell, hub: Hub) -> None:
    """What is whole in the cache works; the rest is refused at once."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        hub.put("org/one", model(1))
        hub.put("org/two", model(2))
        recipe = shell.recipe("org/one")
        assert shell.run("merge", recipe, shell.out).code == 0
        assert shell.run("merge", recipe, shell.out, "--overwrite", endpoint=nobody).code == 0
        refused = shell.run("merge", shell.recipe("org/two"), shell.out, "--overwrite", endpoint=nobody)
        refused.refused("org/two is not here, and the hub cannot be reached")


def test_offline_asks_nobody(shell: Shell, hub: Hub) -> None:
    hub.put("org/one", sharded(1))
    recipe = shell.recipe("org/one@main")
    offline = shell.run("merge", recipe, shell.out, offline=True)
    offline.refused("neither a folder here nor", "hf download org/one --revision main")
    assert hub.requests == []
    shell.run("plan", recipe, "--json").json()
    asked = len(hub.requests)
    partly = shell.run("merge", recipe, shell.out, offline=True)
    partly.refused(
        "not whole in the Hugging Face cache", "lacks model-00001-of-00002.safetensors", "hf download"
    )
    assert len(hub.requests) == asked


def test_a_model_cached_without_its_tokenizer(shell: Shell, hub: Hub) -> None:
    """That is how models are loaded; a merge gets the tokenizer, or does without where nobody can be asked."""
    hub.put("org/one", model(1))
    code = """if True:
        from huggingface_hub import hf_hub_download
        for file in ("config.json", "model.safetensors"):
            hf_hub_download("org/one", file)
    """
    assert shell.run(code=code).code == 0
    recipe = shell.recipe("org/one")
    assert shell.run("merge", recipe, shell.out, endpoint="http://127.0.0.1:9").code == 0
    assert shell.run("merge", recipe, shell.out, "--overwrite", offline=True).code == 0
    assert not (shell.out / "tokenizer.json").exists()
    assert shell.run("merge", recipe, shell.out, "--overwrite").code == 0
    assert (shell.out / "tokenizer.json").exists()
    assert len([r for r in hub.requests if r.file.endswith("model.safetensors") and r.sent]) == 1


def test_a_cut_connection(shell: Shell, hub: Hub) -> None:
    """Cut once, a download goes on; cut for good, it says so, and the next run goes on with what is whole."""
    hub.put("org/two", sharded(2))
    hub.put("org/one", model(1))
    plan = shell.run("plan", shell.recipe("org/one", "org/two"), "--json")
    assert plan.code == 0
    first = "org/two/model-00001-of-00002.safetensors"
    # Two ranges are read for the plan; then the file is cut at half, and the hub is down.
    hub.broken[first] = [10**9, 10**9, 3000, -503]
    cut = shell.run("merge", shell.root / "recipe.yaml", shell.out)
    cut.refused(first, "it answered 503", "Run the same command again")
    assert not shell.out.exists()
    assert not list(shell.cache.rglob("*.incomplete"))
    asked = len(hub.requests)
    kept = {path.name for path in shell.cache.rglob("snapshots/*/*.safetensors")}
    hub.broken[first] = [10**9, 10**9, 3000]
    assert shell.run("merge", shell.root / "recipe.yaml", shell.out).code == 0
    again = [r.sent for r in hub.requests[asked:] if r.file == first and not r.range]
    assert again == [3000, len(sharded(2)["model-00001-of-00002.safetensors"])]
    whole = {r.file.rpartition("/")[2] for r in hub.requests[asked:] if r.sent and not r.range}
    assert not kept & whole
    hub.put("org/cut", sharded(3))
    hub.broken["org/cut/model-00001-of-00002.safetensors"] = [0]
    shell.run("plan", shell.recipe("org/cut")).refused("cut the connection", "org/cut")


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    """Said before the first byte is asked for."""
    absent = Snapshot("org/huge", "0" * 40, tmp_path, {"model.safetensors": 1 << 60}, ("model.safetensors",))
    with pytest.raises(CheckpointError, match=r"the disk has [\d,.]+ MB free.*HF_HOME"):
        download([absent, absent])


def test_the_command_itself(shell: Shell, hub: Hub) -> None:
    """As users start it, with bars that are shown to nobody: stdout is the result, stderr has no fault."""
    hub.put("org/one", model(1))
    command = [sys.executable, "-P", "-m", "mixmerge", "merge", str(shell.recipe("org/one")), str(shell.out)]
    ended = subprocess.run(
        [*command, "--quiet"], env={**os.environ, **shell.env}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert ended.stdout.startswith(f"{shell.out}: 4 tensors")


# -- mixtures -------------------------------------------------------------------------------------------------


def test_a_mixture_is_downloaded_once_and_stays_here(shell: Shell, hub: Hub) -> None:
    """With what lies beside it, but for weights that are programs; and the cache is good without the hub."""
    spec = {
        "experts": {"a": {"model": "one", "engine": "echo"}, "b": {"model": "experts/b"}},
        "router": {"kind": "best_single", "outcomes": "data/outcomes.jsonl"},
    }
    path = shell.root / "outcomes.jsonl"
    code = (
        "from mixmerge.outcomes.table import OutcomeTable; import numpy as np;"
        "OutcomeTable(ids=tuple('wxyz'), queries=tuple('wxyz'), experts=('a', 'b'),"
        f"score=np.tile([0.9, 0.1], (4, 1))).write({str(path)!r})"
    )
    assert shell.run(code=code).code == 0
    files = {
        "mixture.yaml": json.dumps(spec).encode(),
        "data/outcomes.jsonl": path.read_bytes(),
        "experts/b/config.json": b"{}",
        "experts/b/pytorch_model.bin": b"code",
    }
    commit = hub.put("org/mix", files)
    asked = shell.run("ask", "org/mix", "hello there")
    assert (asked.code, asked.out) == (0, "hello there\n"), asked.err
    folder = shell.cache / "hub" / "models--org--mix" / "snapshots" / commit
    there = {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}
    assert there == files.keys() - {"experts/b/pytorch_model.bin"}
    sent = len(hub.sent())
    assert shell.run("ask", "org/mix", "again", offline=True).out == "again\n"
    assert shell.run("ask", "org/mix", "again", endpoint="http://127.0.0.1:9").out == "again\n"
    assert len(hub.sent()) == sent
    shell.run("ask", "org/none", "hello").refused("org/none", "neither a folder here nor a model on the hub")
    hub.put("org/model", model(1))
    shell.run("ask", "org/model", "hello").refused("org/model: has no mixture.yaml on the hub")
