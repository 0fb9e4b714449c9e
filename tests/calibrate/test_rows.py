"""Rows of data: every form and place they come in, what is the same row, and what is wrong with bad ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mixmerge.data.rows import Row, read_rows, sample_rows
from mixmerge.errors import MixmergeError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_every_form(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    rows = read_rows(
        write(
            tmp_path / "rows.jsonl",
            {"text": "a film", "label": 3, "id": 7, "idx": "ignored"},
            {"text": "a", "text_pair": "b"},
            {"prompt": "1+1=", "answer": "2"},
            {"prompt": "Red?", "choices": ["yes", "no"], "answer": "no"},
            {"prompt": "Red?", "choices": ["yes", "no"], "label": 0},
            {"messages": chat[:1], "answer": "Ho"},
            {"messages": chat},
        )
    )
    assert rows[0] == Row(text="a film", label=3, id="7")
    assert rows[1] == Row(text="a", text_pair="b")
    assert rows[2] == Row(prompt="1+1=", answer="2")
    assert rows[3] == Row(prompt="Red?", choices=("yes", "no"), answer="no", label=1)
    assert rows[4] == Row(prompt="Red?", choices=("yes", "no"), answer="yes", label=0)
    assert rows[5] == rows[6] == Row(messages=(("user", "Hi"),), answer="Ho")


def test_text_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n two\n")
    assert [row.text for row in read_rows(tmp_path / "a.txt")] == ["one", " two"]
    plain = [{"text": "one", "label": 0}, {"text": "two", "label": None}]
    parquet.write_table(pyarrow.Table.from_pylist(plain), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == (Row(text="one", label=0), Row(text="two"))
    chats = [{"messages": [{"role": "user", "content": "x"}], "choices": ["a", "b"], "answer": "b"}]
    parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "b.parquet")
    expected = Row(messages=(("user", "x"),), choices=("a", "b"), answer="b", label=1)
    assert read_rows(str(tmp_path / "b.parquet")) == (expected,)


def test_splits_of_files_and_folders(tmp_path: Path) -> None:
    rows = [{"text": name, "split": name} for name in ("train", "test", "train")]
    file = write(tmp_path / "all.jsonl", *rows)
    assert len(read_rows(file)) == 3
    assert [row.text for row in read_rows(file, split="test")] == ["test"]
    with pytest.raises(MixmergeError, match=r"no row of the split 'dev'. Its splits: test, train"):
        read_rows(file, split="dev")
    write(tmp_path / "train.jsonl", {"text": "t"})
    assert [row.text for row in read_rows(tmp_path)] == ["t"]
    with pytest.raises(
        MixmergeError, match=r"without a file of the split 'test'. It has all.jsonl, train.jsonl"
    ):
        read_rows(tmp_path, split="test")


def test_builtin_is_the_same_every_time() -> None:
    for name in ("builtin:code", "builtin:docs"):
        rows = read_rows(name)
        assert rows[:20] == read_rows(name, limit=20)
        assert len({row.digest for row in rows}) > 256
    assert read_rows("builtin:code", limit=1)[0].text.startswith("def ")
    with pytest.raises(MixmergeError, match="Did you mean 'docs'"):
        read_rows("builtin:doc")


def test_digest_is_of_what_a_model_is_shown() -> None:
    prompt = Row(prompt="What is  1+1?\n", answer="2", id="x")
    for same in (Row(text="What is 1+1?", label=1), Row(messages=(("user", "What is 1+1?"),), answer="3")):
        assert same.digest == prompt.digest
    others = [
        prompt,
        Row(prompt="What is 1+2?"),
        Row(prompt="What is 1+1?", choices=("2", "3")),
        Row(text="What is 1+1?", text_pair=""),
        Row(messages=(("user", "What"), ("user", "is 1+1?"))),
    ]
    assert len({row.digest for row in others}) == len(others)


def test_a_sample_depends_on_the_rows_alone() -> None:
    rows = [Row(text=str(number)) for number in range(100)]
    few, more = sample_rows(rows, 10), sample_rows(rows, 30)
    assert len(few) == 10
    assert set(few) < set(more)
    assert list(few) == sorted(few, key=lambda row: int(row.text))
    assert set(sample_rows(rows[::-1], 10)) == set(few)
    assert set(sample_rows(rows, 10, seed=1)) != set(few)
    assert sample_rows([rows[0], rows[0], rows[1]], 9) == (rows[0], rows[1])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([1], "line 2: is no mapping"),
        ({}, "line 2: has neither text, prompt nor messages; it is empty"),
        ({"txt": "a"}, "it has txt. Did you mean 'text'"),
        ({"text": "a", "prompt": "b"}, "line 2: has text and prompt. One of them"),
        ({"text": " "}, "line 2, text: is empty"),
        ({"text": 3}, "line 2, text: is 3. Text"),
        ({"prompt": "a", "text_pair": "b"}, "line 2, text_pair: stands without text"),
        ({"prompt": "a", "answer": 2}, "line 2, answer: is 2. Text"),
        ({"messages": []}, "line 2, messages: is []"),
        ({"messages": [{"role": "user"}]}, "line 2, messages[0]: is {'role': 'user'}"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages: holds an answer alone"),
        ({"prompt": "a", "choices": ["b"]}, "line 2, choices: is ['b']. A list of at least two"),
        ({"prompt": "a", "choices": ["b", "b"]}, "line 2, choices: has a choice twice"),
        ({"prompt": "a", "choices": ["b", "c"], "label": 2}, "label: is 2, and there are 2 choices. 0 to 1"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "answer: 'd' is none of the choices"),
        (
            {"prompt": "a", "choices": ["b", "c"], "answer": "c", "label": 0},
            "names choice 1 ('c'), and label is 0",
        ),
        ({"text": "a", "label": -1}, "line 2, label: is -1. A whole number from 0"),
        ({"text": "a", "label": True}, "line 2, label: is True"),
        ({"text": "a", "label": 1.0}, "line 2, label: is 1.0"),
        ({"text": "a", "label": 10**30}, "line 2, label: is 1000"),
        (
            {"prompt": "a", "answer": "cut \ud83d"},
            r"line 2: holds half of a character, '\ud83d'. Text of whole",
        ),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "line 2: holds half of a character"),
        ({"prompt": "a", "choices": ["b", "\udc00"], "label": 0}, "line 2: holds half of a character"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(MixmergeError) as raised:
        read_rows(write(tmp_path / "rows.jsonl", {"text": "fine"}, row, {"text": "fine"}))
    assert said in str(raised.value)
    assert len(raised.value.faults) == 1


def test_all_bad_rows_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n\n7\n' + "{}\n" * 40, encoding="utf-8")
    with pytest.raises(MixmergeError) as raised:
        read_rows(path)
    said = [str(fault) for fault in raised.value.faults]
    assert "line 2: is not JSON: Expecting value" in said[0]
    assert "line 4: is no mapping" in said[1]
    assert said[-1].endswith("22 more faults like these.")
    assert len(said) == 21


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\n")
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    (tmp_path / "a.csv").write_text("text\na\n")
    for source, said in {
        "empty.jsonl": "holds no rows",
        "a.txt": "line 2: is not UTF-8 text",
        "a.parquet": "is no Parquet that can be read",
        "a.csv": "is of no kind known here (.csv). .jsonl",
        "missing.jsonl": "does not exist",
        "x" * 300: "cannot be looked up: File name too long",
    }.items():
        with pytest.raises(MixmergeError) as raised:
            read_rows(str(tmp_path / source))
        assert said in str(raised.value)
    with pytest.raises(
        MixmergeError, match=r"nobody\.here/rows\.jsonl: cannot be looked up: .* home directory"
    ):
        read_rows("~nobody.here/rows.jsonl")
    with pytest.raises(MixmergeError, match="limit: is 0"):
        read_rows("builtin:docs", limit=0)


def test_a_data_set_of_the_hub_that_cannot_be_had() -> None:
    code = (
        "from mixmerge.data.rows import read_rows\nfrom mixmerge.errors import MixmergeError\n"
        "try:\n    read_rows('nobody/no-such-set')\nexcept MixmergeError as error:\n    print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("nobody/no-such-set: is no file here, and "), done.stderr


def test_reading_rows_loads_nothing_heavy() -> None:
    code = (
        "import sys, mixmerge.data.rows as r\nr.read_rows('builtin:docs', limit=3)\n"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["False"], done.stderr
