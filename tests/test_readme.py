"""The documents tell the truth: each bash, python and yaml block of README.md and docs/ runs or is validated.

The blocks of one document run in order in one empty folder, as a reader would try them. A yaml block whose
first line is ``# NAME.yaml`` is saved under that name for the blocks after it. Where a block mentions
``./zoo``, a small zoo lies there. A block that cannot run says why, right before it:
``<!-- not run: REASON -->``. Blocks that are only shown are ``text``, ``json``, ``toml`` or ``diff``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mixmerge.methods.table import markdown
from mixmerge.mixture import parse as parse_mixture
from mixmerge.recipe import parse as parse_recipe
from mixmerge.zoo import Zoo, copy_to

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = ("bash", "python", "yaml")
SHOWN = ("text", "json", "toml", "diff")
SECONDS = 600  # a block that hangs ends here; none should come near it

_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}|~{3,}) *(?P<language>[^\s`]*)")
_NOT_RUN = re.compile(r"^ *<!--\s*not run:?\s*(?P<reason>.*?)\s*-->\s*$")
_NAMED = re.compile(r"^# (?P<name>[\w.-]+\.ya?ml)\b")
_METHODS = re.compile(r"<!-- methods -->\n(.*?)\n<!-- /?methods -->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run


@dataclass(frozen=True)
class Report:
    ran: int
    skipped: int
    faults: list[str]


def blocks_of(document: str) -> tuple[list[Block], list[str]]:
    """The fenced blocks of a Markdown text, and what is wrong with how they are written."""
    blocks: list[Block] = []
    faults: list[str] = []
    lines = document.splitlines()
    reason: str | None = None
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        fence = _FENCE.match(line)
        if fence is None:
            marker = _NOT_RUN.match(line)
            if reason is not None and line.strip():
                faults.append(f"{number}: a 'not run' comment stands right before a block")
            reason = marker["reason"] if marker else reason if not line.strip() else None
            continue
        start, indent, text = number, len(fence["indent"]), []
        while number < len(lines) and not lines[number].strip().startswith(fence["ticks"]):
            text.append(lines[number][min(indent, len(lines[number]) - len(lines[number].lstrip())) :])
            number += 1
        faults += [f"{start}: the block is never closed"] if number == len(lines) else []
        faults += [f"{start}: not run, and no reason given"] if reason == "" else []
        if fence["language"] not in RUN + SHOWN:
            faults.append(f"{start}: language {fence['language']!r}; it is one of {', '.join(RUN + SHOWN)}")
        blocks.append(Block(start, fence["language"], "\n".join(text) + "\n", reason))
        reason, number = None, number + 1
    return blocks, faults


def _yaml_fault(block: Block, folder: Path) -> str:
    named = _NAMED.match(block.text)
    if named:
        (folder / named["name"]).write_text(block.text, encoding="utf-8")
    content = yaml.safe_load(block.text)
    if isinstance(content, dict) and "experts" in content:
        return "\n".join(map(str, parse_mixture(block.text, where=f"block at line {block.line}").faults))
    if not isinstance(content, dict) or "merge_method" not in content:
        return "neither a recipe nor a mixture, so nothing can check it"
    return "\n".join(map(str, parse_recipe(block.text, where=f"block at line {block.line}").faults))


def _run_fault(block: Block, folder: Path, programs: Path) -> str:
    shell = ["bash", "-euo", "pipefail", "-c", block.text]
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        done = subprocess.run(
            shell if block.language == "bash" else [str(programs / "python"), "-P", "-c", block.text],
            cwd=folder,
            env={**os.environ, "PATH": path, "HOME": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"still running after {SECONDS} s"
    return f"exit code {done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else ""


def check(document: str, folder: Path, *, programs: Path, place_zoo: Callable[[], None]) -> Report:
    """Run or validate every block of a document in ``folder``, with the ``python`` and ``mixmerge`` of a folder."""
    blocks, faults = blocks_of(document)
    live = [block for block in blocks if block.language in RUN and block.reason is None]
    if any(re.search(r"(\./|\b)zoo/|\./zoo\b", block.text) for block in live):
        place_zoo()
    for block in live:
        yaml_block = block.language == "yaml"
        fault = _yaml_fault(block, folder) if yaml_block else _run_fault(block, folder, programs)
        if fault:
            faults.append(f"{block.line}: {block.language} block: {fault}")
    return Report(len(live), sum(block.reason is not None for block in blocks), faults)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_run(path: Path, programs: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The programs of the blocks are real processes that have loaded torch already."""

    def place_zoo() -> None:
        copy_to(Zoo.open(request.getfixturevalue("zoo")), tmp_path / "zoo")

    text = path.read_text(encoding="utf-8")
    report = check(text, tmp_path, programs=programs.folder, place_zoo=place_zoo)
    assert not report.faults, "\n".join(f"{path.name}:{fault}" for fault in report.faults)
    if path.name == "README.md":
        assert report.ran > 0, f"no block of the README ran ({report.skipped} are marked as not run)"
        assert report.ran >= report.skipped, "more blocks of the README are skipped than run"


def test_method_table_of_the_readme() -> None:
    found = _METHODS.search((ROOT / "README.md").read_text(encoding="utf-8"))
    assert found, "README.md has no <!-- methods --> table <!-- /methods -->"
    assert found[1].strip() == markdown(), f"the README's table of methods is old; it should be\n{markdown()}"


def test_method_table_has_a_line_for_each_method() -> None:
    from mixmerge.methods import METHODS

    head, rule, *rows = markdown().splitlines()
    assert [row.split("`")[1] for row in rows] == list(METHODS)
    assert {line.replace("\\|", "").count("|") for line in (head, rule, *rows)} == {head.count("|")}
    ties = next(row for row in rows if row.startswith("| `ties`"))
    assert "**`weight`**, `density` = 1, `scope` = tensor, `normalize` = true" in ties
    assert "| required | 1 or more |" in ties


SAMPLE = """
# Sample
```text
$ this is only shown
```
```yaml
# merge.yaml
merge_method: linear
models:
  - {model: zoo/a, parameters: {weight: 1}}
  - {model: zoo/b, parameters: {weight: 1}}
```
1. In a list, and the block before is there:

   ```bash
   test -f merge.yaml && ls ./zoo > listing   # the zoo is there too
   if true; then
     mixmerge() { python -c 'import mixmerge, sys; print(sys.executable)'; }
   fi
   mixmerge > where
   ```
~~~python
from pathlib import Path
for name in ("where", "listing"):
    assert Path(name).read_text().strip(), name
~~~
<!-- not run: it would reinstall this very machine -->

```bash
rm -rf everything && make install
```
"""


@pytest.fixture
def check_sample(programs: Any, tmp_path: Path) -> Callable[[str], Report]:
    def place_zoo() -> None:
        (tmp_path / "zoo").mkdir()
        (tmp_path / "zoo" / "a").touch()

    return lambda document: check(document, tmp_path, programs=programs.folder, place_zoo=place_zoo)


def test_sample_runs(check_sample: Any, tmp_path: Path) -> None:
    assert check_sample(SAMPLE) == Report(ran=3, skipped=1, faults=[])
    assert Path((tmp_path / "where").read_text().strip()).samefile(sys.executable)
    assert (tmp_path / "listing").read_text() == "a\n"


@pytest.mark.parametrize(
    ("document", "fault"),
    [
        ("```bash\nfalse\necho on\n```\n", "1: bash block: exit code 1"),
        ("text\n```bash\nfalse | cat\n```\n", "2: bash block: exit code 1"),
        ("```python\nimport nowhere_at_all\n```\n", "No module named 'nowhere_at_all'"),
        ("```yaml\nmerge_method: linaer\nmodels: []\n```\n", "linear"),
        ("```yaml\nkey: value\n```\n", "neither a recipe nor a mixture"),
        (
            "```yaml\nexperts: {a: {model: a}}\nrouter: {kind: knnn, outcomes: o}\n```\n",
            "Did you mean 'knn'?",
        ),
        ("```\nmixmerge\n```\n", "1: language ''"),
        ("```sh\nmixmerge\n```\n", "1: language 'sh'"),
        ("<!-- not run: -->\n```bash\nfalse\n```\n", "2: not run, and no reason"),
        ("<!-- not run: because -->\n\nSo.\n```bash\ntrue\n```\n", "3: a 'not run' comment"),
        ("```python\nx = 1\n", "1: the block is never closed"),
    ],
)
def test_a_planted_fault_is_found(check_sample: Any, document: str, fault: str) -> None:
    report = check_sample(document)
    assert len(report.faults) == 1
    assert fault in report.faults[0]


def test_composition_table_of_the_docs() -> None:
    from mixmerge.aggregate.table import markdown as compositions

    text = (ROOT / "docs" / "batch.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- compositions -->\n(.*?)\n<!-- /compositions -->", text, re.DOTALL)
    assert found, "docs/batch.md has no <!-- compositions --> table <!-- /compositions -->"
    assert found[1] == compositions(), f"the table of compositions is old; it should be\n{compositions()}"
