"""Data sets of the Hugging Face hub, read from a stand-in on the loopback by the real client, then from its cache."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip(
    "datasets", reason="reading data sets of the hub takes datasets: pip install 'mixmerge[data]'"
)

NAME, COMMIT = "org/questions", "c" * 40
TEXTS = {
    "sums/train": [{"text": f"{n} + {n} = {2 * n}, and that is all"} for n in range(6)],
    "sums/test": [{"text": "one more that nobody has seen"}],
    "words/train": [{"prompt": f"spell {word}", "answer": " ".join(word)} for word in ("fox", "dog", "lazy")],
}
CARD = """---
configs:
- config_name: sums
  default: true
  data_files:
  - {split: train, path: sums/train.jsonl}
  - {split: test, path: sums/test.jsonl}
- config_name: words
  data_files:
  - {split: train, path: words/train.jsonl}
---
"""
FILES = {"README.md": CARD.encode()} | {
    f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in TEXTS.items()
}


class Handler(BaseHTTPRequestHandler):
    """What of the hub's API a client of data sets asks."""

    protocol_version = "HTTP/1.1"
    sent: list[str]

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        place, _, rest = path.removeprefix(f"/api/datasets/{NAME}").strip("/").partition("/")
        if path.startswith(f"/datasets/{NAME}/resolve/"):
            self.file(path.split("/", 6)[6])
        elif not path.startswith(f"/api/datasets/{NAME}"):
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif place == "tree":
            folder = rest.partition("/")[2]
            self.json(
                [one for one in self.listing() if one["path"].startswith(f"{folder}/" if folder else "")]
            )
        elif place == "paths-info":
            wanted = json.loads(body)["paths"]
            self.json([one for one in self.listing() if one["path"] in wanted])
        else:
            siblings = [{"rfilename": file} for file in FILES]
            self.json({"id": NAME, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})

    def listing(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for file, content in FILES.items()
        ]

    def file(self, name: str) -> None:
        if name not in FILES:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        if self.command == "GET":
            self.sent.append(name)
        etag = f'"{hashlib.sha1(FILES[name]).hexdigest()}"'
        self.answer(200, FILES[name], {"ETag": etag, "X-Repo-Commit": COMMIT})

    def json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the files it has sent."""
    sent: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"sent": sent}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", sent
    server.shutdown()
    server.server_close()


READ = """
import json, sys
from mixmerge.data.rows import read_rows
from mixmerge.errors import MixmergeError

def told(source, split=None):
    try:
        return [row.text or row.prompt + "|" + row.answer for row in read_rows(source, split=split)]
    except MixmergeError as error:
        return str(error)

found = [told(*asked) for asked in json.loads(sys.argv[1])]
if len(sys.argv) > 2:
    from pathlib import Path
    from mixmerge.engine.merge import merge
    from mixmerge.engine.outlook import plan_with_data

    recipe, out = json.loads(sys.argv[2]), Path(sys.argv[3])
    found.append(plan_with_data(recipe)[1].notes)
    merge(recipe, out)
    found.append(json.loads((out / "mixmerge_manifest.json").read_text())["calibration"])
print(json.dumps(found))
"""


@pytest.mark.slow
def test_data_sets_of_the_hub(hub: tuple[str, list[str]], family: Callable[..., Any], tmp_path: Path) -> None:
    url, sent = hub
    ours = str(Path(__file__).resolve().parents[2])
    home = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": url, "PYTHONPATH": ours}
    online = {**home, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}

    def read(environment: dict[str, str], *arguments: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-P", "-c", READ, *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        assert "examples/s" not in done.stderr  # no bars but our own
        return json.loads(done.stdout.splitlines()[-1])

    asked = [(NAME,), (NAME, "test"), (f"{NAME}:words",), (NAME, "dev"), (f"{NAME}:wrods",), ("org/nothing",)]
    sums = [row["text"] for row in TEXTS["sums/train"]]
    words = [f"{row['prompt']}|{row['answer']}" for row in TEXTS["words/train"]]
    made = family("llama", dtype="float32")
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": str(path)} for path in made.experts],
        "calibration": {"data": NAME, "max_examples": 4},
    }
    found = read(online, json.dumps(asked), json.dumps(recipe), str(tmp_path / "out"))
    assert found[:3] == [sums, [TEXTS["sums/test"][0]["text"]], words]
    start = "is no file here, and the data set cannot be had from the hub: "
    for said, named, why in zip(
        found[3:6], (NAME, f"{NAME}:wrods", "org/nothing"), ("dev", "wrods", ""), strict=True
    ):
        assert said.startswith(f"{named}: {start}"), said
        assert why in said.removeprefix(named)
    assert found[6] == [f"{NAME}: is no file here, so it is read from the hub at merge time"]
    assert len(found[7]["rows"]) == 4
    assert {one["source"] for one in found[7]["experts"].values()} == {NAME}
    assert sorted(set(sent)) == ["README.md", "sums/test.jsonl", "sums/train.jsonl", "words/train.jsonl"]
    assert len([name for name in sent if name != "README.md"]) == 3  # each once, whoever asked again

    before = len(sent)
    offline = {**home, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    # Without the card, a cache of several configurations does not tell which is the default.
    named = [(f"{NAME}:sums",), (f"{NAME}:sums", "test"), (f"{NAME}:words",), ("org/nothing",)]
    found = read(offline, json.dumps(named))
    assert found[:3] == [sums, [TEXTS["sums/test"][0]["text"]], words]
    assert found[3].startswith(f"org/nothing: {start}")
    assert len(sent) == before
