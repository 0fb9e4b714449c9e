"""Safetensors files that are short, damaged or hostile: the file and the byte are named, and nothing is believed."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixmerge.checkpoint.header import DTYPE_BYTES, MAX_HEADER, read_header
from mixmerge.errors import CheckpointError

F32 = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
NEXT = {"dtype": "F32", "shape": [2], "data_offsets": [32, 40]}


def file_of(header: Any, data: int = 32, *, length: int | None = None) -> bytes:
    """A file with this header (text or JSON data), and ``data`` bytes after it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + b"\1" * data


DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it ends at byte 0, inside the 8-byte header length"),
    "short prefix": (b"\x10\0\0", "it ends at byte 3, inside the 8-byte header length"),
    "header longer than the file": (file_of({"a": F32}, length=5000), "its header ends at byte 5,008, the file"),
    "length of all ones": (b"\xff" * 8 + b"{}", "its header claims 18,446,744,073,709,551,615 bytes"),
    "header of 100 MB and a byte": (file_of(b"{}", length=MAX_HEADER + 1), "claims 100,000,001 bytes"),
    "no header": (file_of(b"", 0), "its header (from byte 8) is not JSON"),
    "not JSON": (file_of(b"{'a': 1}"), "its header (from byte 8) is not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "is not JSON"),
    "UTF-16": (file_of('{"a": 1}'.encode("utf-16")), "is not JSON"),
    "deeply nested": (file_of(b"[" * 200_000), "is not JSON"),
    "numbers without end": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "is not JSON"),
    "a list": (file_of([F32]), "is not a JSON object"),
    "cut in the header": (file_of({"a": F32})[:40], "the file at byte 40"),
    "cut in the data": (file_of({"a": F32})[:-1], "tensor 'a' ends at byte"),
    "bytes after the end": (file_of({"a": F32}, 33), "its last tensor ends at byte"),
    "a name twice": (
        file_of(b'{"a": %b, "a": %b}' % ((json.dumps(F32).encode(),) * 2)),
        "its header names 'a' twice",
    ),
    "overlap": (file_of({"a": F32, "b": {**NEXT, "data_offsets": [24, 32]}}), "overlaps the tensor before it"),
    "the same bytes twice": (file_of({"a": F32, "b": F32}), "overlaps the tensor before it"),
    "gap": (file_of({"a": F32, "b": {**NEXT, "data_offsets": [40, 48]}}, 48), "leaves a gap before it"),
    "gap at the start": (file_of({"b": NEXT}, 40), "leaves a gap before it"),
    "ends before it begins": (file_of({"a": {**F32, "data_offsets": [32, 0]}}), "needs 32 bytes, not -32"),
    "negative offset": (file_of({"a": {**F32, "data_offsets": [-32, 0]}}), "has data_offsets [-32, 0]"),
    "three offsets": (file_of({"a": {**F32, "data_offsets": [0, 16, 32]}}), "has data_offsets"),
    "fractions": (file_of({"a": {**F32, "shape": [2.0, 4]}}), "has shape [2.0, 4]"),
    "truth as a size": (file_of({"a": {**F32, "shape": [True, 8]}}), "has shape"),
    "negative sizes": (file_of({"a": {**F32, "shape": [-2, -4]}}), "has shape [-2, -4]"),
    "too few bytes": (file_of({"a": {**F32, "shape": [2, 5]}}), "needs 40 bytes, not 32"),
    "too many bytes": (file_of({"a": {**F32, "shape": [7]}}), "needs 28 bytes, not 32"),
    "2**62 by 4": (file_of({"a": {**F32, "shape": [2**62, 4]}}), "needs 73,786,976,294,838,206,464 bytes"),
    "product wraps to 32": (file_of({"a": {**F32, "shape": [2**32, 2**32, 8]}}), "bytes, not 32"),
    "sizes of 4000 digits": (file_of({"a": {**F32, "shape": [10**4000] * 9}}), "has shape"),
    "offsets of 4000 digits": (file_of({"a": {**F32, "data_offsets": [0, 10**4000]}}), "has data_offsets"),
    "a million dimensions": (file_of({"a": {**F32, "shape": [1] * 1_000_000}}), "has shape [1, 1"),
    "ends beyond the file": (file_of({"a": {**F32, "shape": [2**40, 4], "data_offsets": [0, 2**44]}}), "the file"),
    "unknown dtype": (file_of({"a": {**F32, "dtype": "F31"}}), "has dtype 'F31'. Known: BF16, BOOL"),
    "dtype is a list": (file_of({"a": {**F32, "dtype": ["F32"]}}), "has dtype ['F32']"),
    "no shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 32]}}), "not dtype, shape and data_offsets"),
    "an entry too much": (file_of({"a": {**F32, "code": "x"}}), "not dtype, shape and data_offsets"),
    "an entry that is a number": (file_of({"a": 7}), "not dtype, shape and data_offsets"),
    "a name that is not text": (file_of(b'{"\\ud800": %b}' % json.dumps(F32).encode()), "not text"),
    "a name with an escape": (file_of({"a\x1b[2J\n": {**F32, "shape": [7]}}), r"'a\x1b[2J\n'"),
    "a name of a megabyte": (file_of({"a" * 1_000_000: {**F32, "shape": [7]}}), "aaa...aaa"),
    "an HTML page": (b"<!DOCTYPE html><html>not found</html>", "its header claims"),
    "a pointer of git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2", "claims"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged(kind: str, kit: Any, cli: Any) -> None:
    content, message = DAMAGED[kind]
    bad, good = kit.model("bad", 1), kit.model("good", 2)
    (bad / "model.safetensors").write_bytes(content)
    ran = cli("merge", kit.recipe(bad, good), kit.out).refused(f"{bad / 'model.safetensors'}: ", message)
    assert "byte" in ran.err or "tensor " in ran.err or "header" in ran.err
    assert len(ran.err) < 1_000
    kit.clean()


def test_a_header_bomb_is_read_in_bounded_time(tmp_path: Path) -> None:
    """Two million entries, all of them named twice or more; and a header of a terabyte, in a file with a hole."""
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(file_of(b"{" + b'"a":1,"b":1,' * 1_000_000 + b'"c":1}'))
    began = time.process_time()
    with pytest.raises(CheckpointError, match="twice"):
        read_header(path)
    with path.open("wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)  # the disk holds 8 bytes of it
    with pytest.raises(CheckpointError, match="claims"):
        read_header(path)
    assert time.process_time() - began < 20, "a second or two is right"


UNREADABLE: dict[str, Callable[[Path], None]] = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("gone"),
    "link to itself": lambda path: path.symlink_to(path.name),
}
REASONS = re.compile(
    "not a regular file|no such file|is a directory|too many levels of symbolic", re.IGNORECASE
)


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json", "tokenizer.json"])
def test_unreadable(kind: str, name: str, kit: Any, cli: Any) -> None:
    """Root may read every file, so what cannot be read here is no file."""
    bad, good = kit.model("bad", 1), kit.model("good", 2)
    if name == "tokenizer.json":
        (good / name).write_text("{}")
    if name == "pytorch_model.bin":
        (bad / "model.safetensors").unlink()
    (bad / name).unlink(missing_ok=True)
    UNREADABLE[kind](bad / name)
    ran = cli("merge", kit.recipe(good, bad), kit.out)
    if name == "tokenizer.json" and kind.startswith("link"):
        assert ran.code == 0  # none, as good as
        return
    ran.refused(f"{bad / name}: ")
    assert REASONS.search(ran.err), ran.err
    kit.clean()


def test_all_faults_of_all_models_at_once(kit: Any, process: Any) -> None:
    """A line each, from a real process."""
    models = [kit.model(name, 1) for name in ("short", "folder", "trailing", "good")]
    (models[0] / "model.safetensors").write_bytes(b"\0")
    (models[1] / "model.safetensors").unlink()
    (models[1] / "model.safetensors").mkdir()
    with (models[2] / "model.safetensors").open("ab") as file:
        file.write(b"more")
    ran = process("merge", kit.recipe(*models, "./nowhere"), kit.out)
    ran.refused("ends at byte 1", "Is a directory", "its last tensor", "nowhere: no such folder", faults=4)
    assert "models[0].model: " in ran.err
    kit.clean()


ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BYTES, "F31", 4, None]),
        "shape": st.lists(st.integers(-2, 9) | st.just(2**62), max_size=4),
        "data_offsets": st.lists(st.integers(-1, 80), min_size=2, max_size=2),
    }
)


def check(path: Path, content: bytes) -> bool:
    """Either refused, or every tensor is in the file and they cover it exactly once."""
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except CheckpointError:
        return False
    at = 8 + int.from_bytes(content[:8], "little")
    for name, tensor in tensors.items():
        assert tensor.name == name
        assert tensor.nbytes == math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        assert tensor.offset == at
        at += tensor.nbytes
    assert at == len(content)
    return True


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


EMPTY = {"dtype": "I64", "shape": [0, 3], "data_offsets": [40, 40]}
GOOD = file_of({"__metadata__": {"format": "pt"}, "a": F32, "b": NEXT, "c": EMPTY}, 40)


def test_the_good_one_is_good(scratch: Path) -> None:
    assert check(scratch, GOOD)


@settings(max_examples=300)
@given(edits=st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_bytes_changed(edits: list[tuple[int, int]], scratch: Path) -> None:
    content = bytearray(GOOD)
    for at, value in edits:
        content[at] = value
    check(scratch, bytes(content))


@settings(max_examples=200)
@given(cut=st.integers(0, len(GOOD)), tail=st.binary(max_size=20))
def test_any_cut_and_tail(cut: int, tail: bytes, scratch: Path) -> None:
    assert check(scratch, GOOD[:cut] + tail) == (cut + len(tail) == len(GOOD) and cut > len(GOOD) - 40)


ENTRIES = st.dictionaries(st.text(max_size=3), ENTRY | st.integers() | st.none(), max_size=4)


@settings(max_examples=300)
@given(entries=ENTRIES, data=st.integers(0, 80))
def test_any_entries(entries: dict[str, Any], data: int, scratch: Path) -> None:
    check(scratch, file_of(entries, data))


@settings(max_examples=200)
@given(content=st.binary(max_size=60))
def test_any_bytes(content: bytes, scratch: Path) -> None:
    check(scratch, content)
    check(scratch, len(content).to_bytes(8, "little") + content)
