"""Our own files of outcomes: what is written is read, and damage is told."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixmerge.errors import MixmergeError, OutputError
from mixmerge.outcomes import OutcomeTable, Price
from mixmerge.outcomes import files as outcome_files
from mixmerge.outcomes.table import MEASURES

ENDINGS = (".parquet", ".jsonl")
NAN = float("nan")
SMALL = OutcomeTable(
    ids=("a", "b", "c"),
    queries=("2 + 2?", "Größer als 3?\n\u2028 ok", "why"),
    experts=("x|y", "org/z"),
    score=np.array([[1.0, NAN], [0.25, -1.0], [NAN, NAN]]),
    cost=np.array([[1e-6, 0.0], [NAN, 2.5], [0.1, 0.2]]),
    tokens_out=np.full((3, 2), NAN),
    metadata={"task": ("sums", "", "words"), "a.b": ("1", "2", "3")},
    prices={"org/z": Price(0.1, 0.3, 7.5), "x|y": Price(0.0, 2.0)},
)


def assert_same(one: OutcomeTable, other: OutcomeTable) -> None:
    assert (one.ids, one.queries, one.experts) == (other.ids, other.queries, other.experts)
    assert dict(one.metadata) == dict(other.metadata)
    assert list(one.metadata) == list(other.metadata)
    assert dict(one.prices) == dict(other.prices)
    for name in MEASURES:
        left, right = getattr(one, name), getattr(other, name)
        assert (left is None) == (right is None), name
        if left is not None:
            np.testing.assert_array_equal(left, right, err_msg=name)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_small_table_comes_back(tmp_path: Path, ending: str) -> None:
    SMALL.write(tmp_path / "new" / f"t{ending}")
    assert_same(OutcomeTable.read(tmp_path / "new" / f"t{ending}"), SMALL)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"t{ending}"]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ASKED = TEXT.filter(lambda text: bool(text.strip()))
NUMBER = st.one_of(st.just(NAN), st.floats(allow_nan=False, allow_infinity=False))
POSITIVE = st.one_of(st.just(NAN), st.floats(0, 1e300))


@st.composite
def tables(draw: st.DrawFn) -> OutcomeTable:
    ids = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    experts = draw(st.lists(TEXT, min_size=1, max_size=3, unique=True))

    def matrix(entries: st.SearchStrategy[float]) -> np.ndarray[Any, Any]:
        cells = st.lists(entries, min_size=len(experts), max_size=len(experts))
        return np.array(draw(st.lists(cells, min_size=len(ids), max_size=len(ids))), np.float64)

    def maybe() -> np.ndarray[Any, Any] | None:
        return matrix(POSITIVE) if draw(st.booleans()) else None

    labels = st.lists(TEXT, min_size=len(ids), max_size=len(ids)).map(tuple)
    price = st.builds(Price, st.floats(0, 1e9), st.floats(0, 1e9), st.none() | st.floats(0, 1e4))
    return OutcomeTable(
        ids=tuple(ids),
        queries=tuple(draw(st.lists(ASKED, min_size=len(ids), max_size=len(ids)))),
        experts=tuple(experts),
        score=matrix(NUMBER),
        cost=maybe(),
        tokens_in=maybe(),
        tokens_out=maybe(),
        latency=maybe(),
        metadata=draw(st.dictionaries(TEXT, labels, max_size=2)),
        prices={name: draw(price) for name in experts if draw(st.booleans())},
    )


@pytest.mark.parametrize("ending", ENDINGS)
@given(table=tables())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_every_table_comes_back(tmp_path: Path, ending: str, table: OutcomeTable) -> None:
    table.write(tmp_path / f"t{ending}")
    assert_same(OutcomeTable.read(tmp_path / f"t{ending}"), table)


@given(text=st.text(max_size=200) | st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_it_is_a_table_or_a_fault(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(MixmergeError):
        OutcomeTable.read(path)


# --- damage


def written(folder: Path, ending: str) -> Path:
    SMALL.write(folder / f"t{ending}")
    return folder / f"t{ending}"


def faults_of(path: Path, **options: Any) -> str:
    with pytest.raises(MixmergeError) as raised:
        OutcomeTable.read(path, **options)
    return str(raised.value)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_that_was_cut_off(tmp_path: Path, ending: str, share: float) -> None:
    path = written(tmp_path, ending)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * share)])
    assert str(path) in faults_of(path)
    assert str(path) in faults_of(path, kind="mixmerge")


def test_lines_that_are_gone_are_missed(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl")
    path.write_text("".join(path.read_text("utf-8").splitlines(keepends=True)[:-1]), "utf-8")
    assert "holds 2 rows. Its header says 3. Was it cut off?" in faults_of(path)


def test_a_cut_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl")
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path}, line 4: is no whole JSON value" in faults_of(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_empty_file(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    path.write_bytes(b"")
    assert faults_of(path) == f"{path}: is empty. Outcomes of at least one query."


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    assert "does not exist" in faults_of(tmp_path / "none.parquet")
    assert "holds no outcomes" in faults_of(tmp_path)
    written(tmp_path, ".jsonl")
    assert "is a folder" in faults_of(tmp_path, kind="mixmerge")


HEADER: dict[str, Any] = {"format": "mixmerge-outcomes", "version": 1, "experts": ["x", "y"]}


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({**HEADER, "version": 2}, "is of version 2. This mixmerge reads version 1"),
        ({**HEADER, "version": None}, "is of version None"),
        ({**HEADER, "expert": ["x"]}, "has the unknown key 'expert'"),
        ({**HEADER, "experts": []}, "experts: is empty"),
        ({**HEADER, "experts": "xy"}, "experts: is no list of names"),
        ({**HEADER, "experts": ["x", "x"]}, "'x' is there twice"),
        ({**HEADER, "measures": ["score", "price"]}, "'price' is unknown. score, cost"),
        ({**HEADER, "measures": ["cost"]}, "lacks score"),
        ({**HEADER, "prices": {"x": {"input": -1, "output": 1}}}, "prices: x: is no price"),
        ({**HEADER, "prices": [1]}, "is no price"),
        ({**HEADER, "prices": {"z": {"input": 1, "output": 1}}}, "no expert is called z"),
        ({**HEADER, "rows": "many"}, "rows: is 'many'"),
    ],
)
def test_a_header_that_is_wrong(tmp_path: Path, header: dict[str, Any], word: str) -> None:
    path = tmp_path / "t.jsonl"
    row = {"id": "a", "query": "q", "score": [1, 0]}
    path.write_text(f"{json.dumps(header)}\n{json.dumps(row)}\n", "utf-8")
    assert word in faults_of(path)


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"query": "q", "score": [1, 0]}, "line 3: lacks id"),
        ({"id": "b", "score": [1, 0]}, "line 3: lacks query"),
        ({"id": "b", "query": " ", "score": [1, 0]}, "line 3, column query: is empty"),
        ({"id": "b", "query": "\ud800", "score": [1, 0]}, "line 3, column query: is not valid Unicode"),
        ({"id": 3, "query": "q", "score": [1, 0]}, "line 3, column id: is no text"),
        ({"id": "a", "query": "q", "score": [1, 0]}, "'a' is there twice"),
        ({"id": "b", "query": "q", "score": [1]}, "line 3, column score: does not fit the experts"),
        ({"id": "b", "query": "q", "score": [1, "good"]}, "line 3, column score: 'good' is no number"),
        ({"id": "b", "query": "q", "score": [1, [2]]}, "line 3, column score: is a list, no number"),
        ({"id": "b", "query": "q", "score": [1, float("inf")]}, "line 3, column score: 'inf' is infinite"),
        ({"id": "b", "query": "q", "score": [1, 10**400]}, "line 3, column score: is beyond"),
        (
            {"id": "b", "query": "q", "score": [1, 1], "cost": [1, -1]},
            "line 3, column cost: holds a negative number",
        ),
        ({"id": "b", "query": "q", "scores": [1, 0]}, "line 3: has the unknown key 'scores'"),
        ({"id": "b", "query": "q", "metadata": {"x": "y"}}, "column metadata: does not fit the header"),
        ({"id": "b", "query": "q", "metadata": {"task": 3}}, "column metadata.task: is '3'. A text"),
    ],
)
def test_a_row_that_is_wrong(tmp_path: Path, row: dict[str, Any], word: str) -> None:
    path = tmp_path / "t.jsonl"
    header = {**HEADER, "measures": ["score", "cost"], "metadata": ["task"]}
    good = {"id": "a", "query": "q", "score": [1, None]}
    path.write_text("\n".join(json.dumps(one) for one in (header, good, row)), "utf-8")
    assert word in faults_of(path)


def test_all_faults_are_told_and_many_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"id": str(i), "query": "", "score": ["bad", 1]} for i in range(30)]
    path.write_text("\n".join(json.dumps(one) for one in (HEADER, *rows)), "utf-8")
    with pytest.raises(MixmergeError) as raised:
        OutcomeTable.read(path)
    assert len(raised.value.faults) == outcome_files.MOST + 1
    assert "10 more faults like these" in str(raised.value.faults[-1])


def test_what_a_header_may_leave_out(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"id": "a", "query": "q"}, {"id": "b", "query": "r", "score": [0.5, NAN]}]
    path.write_text("\n\n".join(json.dumps(one) for one in (HEADER, *rows)) + "\n\n", "utf-8")
    table = OutcomeTable.read(path)
    np.testing.assert_array_equal(table.score, [[NAN, NAN], [0.5, NAN]])
    assert table.cost is None


def test_only_a_header(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(HEADER), "utf-8")
    assert "holds no outcomes, only a header" in faults_of(path)


def test_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(json.dumps(HEADER).encode() + b'\n{"id": "a", "query": "gr\xfc\xdfe"}\n')
    assert f"{path}, line 2: is not UTF-8 at byte 25. Save the file as UTF-8." == faults_of(path)


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_same(OutcomeTable.read(path), SMALL)


def test_a_huge_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcome_files, "MAX_LINE", 1000)
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + "x" * 2000, "utf-8")
    assert f"{path}, line 2: is longer than 1,000 bytes" in faults_of(path)


def test_a_huge_query(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    row = {"id": "a", "query": "x" * 10_000_001, "score": [1, 0]}
    path.write_text(f"{json.dumps(HEADER)}\n{json.dumps(row)}", "utf-8")
    assert "has 10,000,001 characters, more than 10,000,000" in faults_of(path)


def test_json_too_deep(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(HEADER) + "\n" + "[" * 200_000, "utf-8")
    assert "line 2: is no" in faults_of(path)


# --- Parquet


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.drop_columns(["query"]), "lacks the column 'query'"),
        (lambda t: t.drop_columns(["cost|org/z"]), "lacks the column 'cost|org/z'"),
        (lambda t: t.append_column("more", t.column("id")), "has the unknown column 'more'"),
        (lambda t: t.append_column("id", t.column("id")), "has the column 'id' twice"),
        (
            lambda t: t.set_column(2, "meta.task", pa.array([1, 2, 3])),
            "column meta.task: is of type int64. text",
        ),
        (
            lambda t: t.set_column(4, "score|x|y", pa.array(["1", "2", "3"])),
            "column score|x|y: is of type string. numbers",
        ),
        (lambda t: t.set_column(0, "id", pa.array(["a", None, "c"])), "row 2, column id: is no text"),
        (
            lambda t: t.set_column(4, "score|x|y", pa.array([1.0, float("inf"), 0.0])),
            "score: holds infinite",
        ),
        (
            lambda t: t.set_column(6, "cost|x|y", pa.array([1.0, -1.0, 0.0])),
            "cost: holds negative values",
        ),
        (lambda t: t.slice(0, 0), "holds no outcomes, only a header"),
        (lambda t: t.replace_schema_metadata({"mixmerge.outcomes": "{"}), "is no whole JSON value"),
        (
            lambda t: t.replace_schema_metadata({"mixmerge.outcomes": b"\xff"}),
            "metadata mixmerge.outcomes",
        ),
        (
            lambda t: t.replace_schema_metadata({"mixmerge.outcomes": json.dumps({**HEADER, "version": 9})}),
            "is of version 9",
        ),
        (lambda t: t.replace_schema_metadata(None), "is of no format known here; it has id, query"),
    ],
)
def test_a_parquet_file_that_is_wrong(tmp_path: Path, change: Callable[[Any], Any], word: str) -> None:
    path = written(tmp_path, ".parquet")
    pq.write_table(change(pq.read_table(path)), path)
    assert word in faults_of(path)


def test_parquet_that_others_wrote_again(tmp_path: Path) -> None:
    path = written(tmp_path, ".parquet")
    table = pq.read_table(path)
    table = table.set_column(8, "tokens_out|x|y", pa.nulls(3))
    table = table.set_column(4, "score|x|y", pa.array([1, None, 0], pa.int8()))
    table = table.set_column(1, "query", table.column("query").cast(pa.large_string()))
    table = table.set_column(2, "meta.task", pa.array(["sums", None, "words"]))
    pq.write_table(table, path)
    read = OutcomeTable.read(path)
    np.testing.assert_array_equal(read.score[:, 0], [1.0, NAN, 0.0])
    assert read.metadata["task"] == ("sums", "", "words")
    assert read.queries == SMALL.queries


# --- writing


def test_another_ending(tmp_path: Path) -> None:
    with pytest.raises(MixmergeError, match=r"\.parquet or \.jsonl"):
        SMALL.write(tmp_path / "t.csv")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"queries": ("a", " ", "c")}, "query 'b': is empty"),
        ({"queries": ("a", "\ud800", "c")}, "query 'b': is not valid Unicode"),
        ({"ids": ("a", "\ud800", "c")}, "outcomes.ids: holds text"),
        ({"metadata": {"task": ("a", "\udfff", "c")}}, "outcomes.metadata.task: holds text"),
    ],
)
def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, ending: str, change: dict[str, Any], word: str
) -> None:
    with pytest.raises(MixmergeError, match=word):
        replace(SMALL, **change).write(tmp_path / f"t{ending}")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_table_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(MixmergeError, match="outcomes: is empty"):
        SMALL.rows([]).write(tmp_path / "t.jsonl")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """The system itself refuses to write more than ``size`` bytes to a file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path, ending: str) -> None:
    path = written(tmp_path, ending)
    rng = np.random.default_rng(0)
    large = OutcomeTable(
        ids=tuple(map(str, range(2000))),
        queries=tuple(rng.bytes(40).hex() for _ in range(2000)),
        experts=("x",),
        score=rng.random((2000, 1)),
    )
    with small_files(20_000), pytest.raises(OutputError, match="cannot be written"):
        large.write(path)
    assert_same(OutcomeTable.read(path), SMALL)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]
    with path.open("rb") as reader:
        before = path.read_bytes()
        large.write(path)
        assert reader.read() == before, "who reads the old file still does"
    assert_same(OutcomeTable.read(path), large)


@pytest.mark.parametrize("ending", ENDINGS)
def test_where_nothing_can_be_written(tmp_path: Path, ending: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        SMALL.write(tmp_path / "file" / f"t{ending}")
    (tmp_path / f"folder{ending}").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        SMALL.write(tmp_path / f"folder{ending}")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", f"folder{ending}"]
