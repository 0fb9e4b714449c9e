"""Public formats of outcomes, as small files of the same layout."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixmerge import registry
from mixmerge.errors import MixmergeError
from mixmerge.outcomes import OutcomeTable, Price
from mixmerge.outcomes.building import text_id
from mixmerge.outcomes.glance import glance
from mixmerge.outcomes.importers import IMPORTERS, Importer

NAN = float("nan")


def write_csv(path: Path, *rows: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_jsonl(path: Path, *rows: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_json(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value, indent=2), "utf-8")
    return path


def faults_of(path: Path, **options: Any) -> str:
    with pytest.raises(MixmergeError) as raised:
        OutcomeTable.read(path, **options)
    return str(raised.value)


def kinds_of(path: Path) -> list[str]:
    """Every format that takes the file for its own."""
    seen = glance(path)
    return [name for name, row in IMPORTERS.items() if registry.load(row.sniff)(seen)]


# --- long

LONG = ("query", "expert", "score", "id", "cost", "tokens_in", "tokens_out", "latency", "task", "answer")


def test_long_csv(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "t.csv",
        LONG,
        ("1+1?", "a", "1", "q1", "0.5", "3", "4", "0.1", "sums", "2"),
        ("1+1?", "b", "False", "q1", "", "nan", "4", "0.2", "sums", "3"),
        ("say,\nhi", "b", "0.25", "q2", "1e-3", "5", "6", "0.3", "words", "hi"),
    )
    table = OutcomeTable.read(path)
    assert kinds_of(path) == ["long"]
    assert (table.ids, table.queries, table.experts) == (("q1", "q2"), ("1+1?", "say,\nhi"), ("a", "b"))
    np.testing.assert_array_equal(table.score, [[1, 0], [NAN, 0.25]])
    np.testing.assert_array_equal(table.cost, [[0.5, NAN], [NAN, 1e-3]])
    np.testing.assert_array_equal(table.tokens_in, [[3, NAN], [NAN, 5]])
    np.testing.assert_array_equal(table.latency, [[0.1, 0.2], [NAN, 0.3]])
    assert dict(table.metadata) == {"task": ("sums", "words")}, "the answer is not the query's"


def test_long_jsonl_of_llmrouter(tmp_path: Path) -> None:
    row = {"task_name": "math", "query": "1+1?", "metric": "em", "choices": None, "input_tokens": 4}
    path = write_jsonl(
        tmp_path / "t.jsonl",
        {**row, "model_name": "a", "performance": 1.0, "output_tokens": 9, "response_time": 0.5},
        {**row, "model_name": "b", "performance": None, "output_tokens": 8, "response_time": 0.25},
    )
    table = OutcomeTable.read(path)
    assert kinds_of(path) == ["long"]
    assert table.ids == (text_id("1+1?"),)
    np.testing.assert_array_equal(table.score, [[1, NAN]])
    np.testing.assert_array_equal(table.tokens_out, [[9, 8]])
    np.testing.assert_array_equal(table.latency, [[0.5, 0.25]])
    assert dict(table.metadata) == {"task": ("math",), "metric": ("em",), "choices": ("",)}
    assert table.cost is None


def test_one_expert_is_a_table(tmp_path: Path) -> None:
    table = OutcomeTable.read(write_csv(tmp_path / "t.csv", LONG[:3], ("q", "a", "1")))
    assert table.experts == ("a",)


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([], "t.csv: holds no outcomes"),
        ([("q", "a", "good")], "line 2, column score: 'good' is no number. A finite number"),
        ([("q", "a", "inf")], "line 2, column score: 'inf' is infinite"),
        ([("q", "a", "1_000")], "line 2, column score: '1_000' is no number"),
        ([("q", "a", "1"), ("q", "a", "0")], "line 3: has other values of a on query"),
        ([("q", "a", "1"), ("q", "b")], "line 3: has 2 cells. The header has 3 columns"),
        ([(" ", "a", "1")], "line 2, the query: is empty"),
        ([("two\nlines", "a", "1"), ("q", " ", "1")], "line 4: names no expert"),
    ],
)
def test_long_rows_that_are_wrong(tmp_path: Path, rows: list[Sequence[object]], word: str) -> None:
    path = write_csv(tmp_path / "t.csv", LONG[:3], *rows)
    assert word in faults_of(path)


@pytest.mark.parametrize(
    ("rows", "word"),
    [
        ([{"score": 1, "cost": -1}], "line 1, column cost: -1 is negative"),
        ([{"score": 1, "tokens_in": [3]}], "line 1, column tokens_in: is a list, no number"),
        ([{"score": {}}], "line 1, column score: is an object, no number"),
        ([{}], "line 1: lacks score"),
        ([{"score": 1}, {"score": 1, "query": 3}], "line 2, the query: is no text"),
        ([{"score": 1}, {"score": 1, "query": "\ud800"}], "line 2, the query: is not valid Unicode"),
        ([{"score": 1}, {"score": 1, "note": "\ud800"}], "line 2, column note: is not valid Unicode"),
        ([{"score": 1, "id": "x"}, {"score": 1, "id": "x", "query": "r"}], "'x' has another query at"),
        (
            [{"score": 1, "task": "u"}, {"score": 1, "expert": "b", "task": "v"}],
            "line 2, column task: is 'v', and 'u' at",
        ),
    ],
)
def test_long_objects_that_are_wrong(tmp_path: Path, rows: list[dict[str, Any]], word: str) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", *({"query": "q", "expert": "a", **row} for row in rows))
    assert word in faults_of(path, kind="long")


def test_the_same_outcome_twice_counts_once(tmp_path: Path) -> None:
    row = {"query": "q", "expert": "a", "score": 1, "cost": None}
    assert len(OutcomeTable.read(write_jsonl(tmp_path / "t.jsonl", row, row))) == 1


def test_columns_that_are_missing_or_there_twice(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ("query", "expert", "quality"), ("q", "a", "1"))
    assert "is of no format known here; it has query, expert, quality" in faults_of(path)
    assert "line 1: lacks the column score. Needed: query, expert, score" in faults_of(path, kind="long")
    path = write_csv(tmp_path / "t.csv", ("query", "expert", "score", "score"), ("q", "a", "1", "1"))
    assert "line 1: has the column 'score' twice" in faults_of(path)


def test_a_csv_file_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('query,expert,score\nq,a,1\n"open', "utf-8")
    assert "line 3: is no row of CSV: unexpected end of data. Was it cut off?" in faults_of(path)


def test_long_fields(tmp_path: Path) -> None:
    before = csv.field_size_limit(150_000)
    path = write_csv(tmp_path / "t.csv", LONG[:3], ("x" * 200_000, "a", "1"))
    assert len(OutcomeTable.read(path).queries[0]) == 200_000
    assert csv.field_size_limit(before) == 150_000, "others' limit is put back"


def test_text_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes("query,expert,score\ngrün,a,1\n".encode("cp1252"))
    assert "t.csv, line 2: is not UTF-8 at byte 3" in faults_of(path)


@given(data=st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_follows_a_header_it_is_a_table_or_a_fault(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"query,expert,score\nq,a,1\n" + data)
    try:
        told = OutcomeTable.read(path).queries[0]
    except MixmergeError as error:
        told = str(error)
    assert told == "q" or str(path) in told


# --- RouteLLM


def test_routellm_gsm8k(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "gsm8k_responses.csv",
        ("prompt", "weak", "strong", "weak_response", "strong_response"),
        ("How many?", False, True, "1,\n2", "3"),
        ("How much?", True, True, "4", "5"),
    )
    table = OutcomeTable.read(path)
    assert kinds_of(path) == ["routellm"]
    assert table.experts == ("weak", "strong")
    np.testing.assert_array_equal(table.score, [[0, 1], [1, 1]])
    assert dict(table.metadata) == {"task": ("gsm8k", "gsm8k")}
    assert table.tokens_out is None, "texts are no tokens"


def test_routellm_mmlu_and_what_is_left_out(tmp_path: Path) -> None:
    head = ("prompt", "weak", "strong")
    write_csv(tmp_path / "mmlu" / "mmlu_anatomy.csv", head, ("Bone?", True, True), ("Skin?", False, True))
    write_csv(tmp_path / "mmlu" / "mmlu_world_religions.csv", head, ("God?", True, False), ("Bone?", 0.5, 1))
    table = OutcomeTable.read(tmp_path / "mmlu")
    assert kinds_of(tmp_path / "mmlu") == ["routellm"]
    assert table.metadata["task"] == ("anatomy", "anatomy", "world_religions", "world_religions")
    assert table.ids[3] == f"{table.ids[0]}-2", "the same text again is another row"
    assert table.score[3].tolist() == [0.5, 1.0]
    seen = write_jsonl(tmp_path / "seen.jsonl", {"train_prompt": "God?", "eval_prompt": "Bone? "})
    left = OutcomeTable.read(tmp_path / "mmlu", leave_out=seen)
    assert left.queries == ("Skin?", "God?")


def test_routellm_faults(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "mmlu_x.csv", ("prompt", "weak"), ("q", "maybe"), ("", True))
    text = faults_of(path)
    assert f"{path}, line 2, column score: 'maybe' is no number" in text
    assert f"{path}, line 3, the query: is empty" in text
    path = write_csv(tmp_path / "mmlu_x.csv", ("question", "weak"), ("q", True))
    assert "line 1: has the columns question, weak. prompt, and one for each" in faults_of(
        path, kind="routellm"
    )


def test_what_is_left_out_has_to_name_queries(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "x.csv", ("prompt", "weak"), ("q", True))
    assert "line 1: names no query" in faults_of(path, leave_out=write_jsonl(tmp_path / "s.jsonl", {"a": 1}))
    every = write_jsonl(tmp_path / "s.jsonl", {"query": " Q"})
    assert "leaves no query" in faults_of(path, leave_out=every)


# --- MT-Bench

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 82, "category": "math", "turns": ["Count."], "reference": ["3"]},
    {"question_id": 83, "category": "math", "turns": ["Not judged."]},
]


def judged(question: object, model: object, turn: int, score: object) -> dict[str, object]:
    return {
        "question_id": question,
        "model": model,
        "judge": ["gpt-4", "x"],
        "turn": turn,
        "score": score,
        "tstamp": 1.5,
    }


def test_mtbench(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "mt_bench_judgements.jsonl",
        judged(82, "b", 1, 7),
        judged(81, "a", 1, 8),
        judged(81, "a", 2, 5),
        judged(81, "b", 1, -1),
        judged(81, "b", 2, 4),
    )
    write_jsonl(tmp_path / "mt_bench_question.jsonl", *QUESTIONS)
    table = OutcomeTable.read(path)
    assert kinds_of(path) == ["mtbench"]
    assert (table.ids, table.queries) == (("81", "82"), ("Write.", "Count."))
    at = [table.experts.index(name) for name in "ab"]
    np.testing.assert_allclose(table.score[:, at], [[0.65, 0.4], [NAN, 0.7]])
    assert dict(table.metadata) == {"task": ("writing", "math"), "turn_2": ("Again.", "")}
    moved = write_jsonl(tmp_path / "else" / "q.jsonl", *QUESTIONS)
    path = path.rename(tmp_path / "j.jsonl")
    assert "without the questions. Pass the file with queries=" in faults_of(path)
    assert OutcomeTable.read(path, queries=moved).ids == table.ids


@pytest.mark.parametrize(
    ("row", "word"),
    [
        (judged(90, "a", 1, 8), "line 2: judges question 90"),
        (judged(81, "a", 1, 8), "line 2: judges turn 1 of 'a' again"),
        (judged(81, "b", 1, 11), "line 2, column score: is 11. 0 to 10, or -1"),
        (judged(81, "b", 1, "great"), "line 2, column score: 'great' is no number"),
        (judged(81, None, 1, 8), "line 2: lacks a name"),
        ({"question_id": 81, "model": "b", "score": 3}, "line 2: lacks turn"),
    ],
)
def test_mtbench_faults(tmp_path: Path, row: dict[str, object], word: str) -> None:
    path = write_jsonl(tmp_path / "judgements.jsonl", judged(81, "a", 1, 8), row)
    write_jsonl(tmp_path / "question.jsonl", *QUESTIONS)
    assert word in faults_of(path)


# --- LLMRouter


def test_llmrouter(tmp_path: Path) -> None:
    path = write_json(
        tmp_path / "train.json",
        [
            {"question": "Q: 1+1?", "scores": {"small": 0.0, "large": 1}, "cluster_id": 2},
            {"question": "Who?", "scores": {"large": None, "other": 0.5}},
        ],
    )
    known = {"choices": None, "task_id": None, "metric": "em"}
    queries = write_jsonl(
        tmp_path / "queries" / "q.jsonl",
        {"task_name": "gsm8k", "query": "Q: 1+1?", "ground_truth": "2", **known},
        {"task_name": "math", "query": "Q: 1+1?", "ground_truth": "two", **known},
        {"task_name": "trivia", "query": "Where?", "ground_truth": "there", **known},
    )
    prices = write_json(
        tmp_path / "candidates.json",
        {
            "large": {
                "size": "70B",
                "feature": "...",
                "input_price": 0.9,
                "output_price": 1.8,
                "service": "N",
            },
            "absent": {"size": "7B", "input_price": 0.2, "output_price": 0.2},
        },
    )
    table = OutcomeTable.read(path, queries=queries, prices=prices)
    assert kinds_of(path) == ["llmrouter"]
    assert table.experts == ("small", "large", "other")
    np.testing.assert_array_equal(table.score, [[0, 1, NAN], [NAN, NAN, 0.5]])
    assert dict(table.metadata) == {"task": ("gsm8k", ""), "metric": ("em", ""), "gold": ("2", "")}
    assert dict(table.prices) == {"large": Price(0.9, 1.8, 70.0)}
    assert dict(OutcomeTable.read(path, queries=queries.parent).metadata) == dict(table.metadata)
    assert dict(OutcomeTable.read(path).metadata) == {}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"question": "q", "scores": {"a": 1}}, "is no list"),
        ([], "holds no outcomes"),
        ([{"question": "q", "scores": {"a": 1}}, {"question": "q"}], "entry 2: is no outcome"),
        ([{"question": "q", "scores": {"a": "good"}}], "entry 1, column score: 'good' is no number"),
        ([{"question": "q", "scores": {"a": float("inf")}}], "entry 1, column score: 'inf' is infinite"),
        ([{"question": "", "scores": {"a": 1}}], "entry 1, the query: is empty"),
    ],
)
def test_llmrouter_faults(tmp_path: Path, value: object, word: str) -> None:
    assert word in faults_of(write_json(tmp_path / "t.json", value), kind="llmrouter")


def test_llmrouter_files_that_do_not_fit(tmp_path: Path) -> None:
    path = write_json(tmp_path / "t.json", [{"question": "q", "scores": {"a": 1}}])
    other = write_jsonl(tmp_path / "q.jsonl", {"query": "r", "task_name": "x"})
    assert "has none of the queries of" in faults_of(path, queries=other)
    assert "line 1: lacks query" in faults_of(path, queries=write_jsonl(tmp_path / "p.jsonl", {"a": 1}))
    path.write_text(path.read_text("utf-8")[:-20], "utf-8")
    assert "its first entry is no whole JSON value" in faults_of(path)
    assert "t.json: is no whole JSON value" in faults_of(path, kind="llmrouter")
    long = write_csv(tmp_path / "t.csv", LONG[:3], ("q", "a", "1"))
    assert "is not needed: long takes no file of queries" in faults_of(long, queries=other)


# --- RouterBench

BENCH = ("sample_id", "prompt", "eval_name", "org/a", "b", "org/a|model_response", "b|model_response")
COSTS = ("org/a|total_cost", "b|total_cost", "oracle_model_to_route_to")


def test_routerbench_csv(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "rb.csv",
        (*BENCH, *COSTS, "split"),
        (
            "m.1",
            "['Please answer.\\n1+1?', 'Answer:']",
            "mmlu",
            0.0,
            1.0,
            "['x']",
            "y",
            1e-5,
            2e-5,
            "b",
            "dev",
        ),
        ("m.2", "[not a list]", "mbpp", 0.5, "", "['x']", "y", 3e-5, "", "org/a", "test"),
    )
    table = OutcomeTable.read(path)
    assert kinds_of(path) == ["routerbench"]
    assert (table.ids, table.experts) == (("m.1", "m.2"), ("org/a", "b"))
    assert table.queries == ("Please answer.\n1+1?\n\nAnswer:", "[not a list]")
    np.testing.assert_array_equal(table.score, [[0, 1], [0.5, NAN]])
    np.testing.assert_array_equal(table.cost, [[1e-5, 2e-5], [3e-5, NAN]])
    assert dict(table.metadata) == {"task": ("mmlu", "mbpp"), "split": ("dev", "test")}


def test_routerbench_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rb.parquet"
    columns = {
        "sample_id": ["m.1", "m.2"],
        "prompt": [["one", "two"], ["three"]],
        "eval_name": ["mmlu", "mbpp"],
        "a": [0.0, None],
        "a|total_cost": [1e-5, 2e-5],
        "a|model_response": ["x", "y"],
    }
    pq.write_table(pa.table(columns), path)
    table = OutcomeTable.read(path)
    assert kinds_of(path) == ["routerbench"]
    assert table.queries == ("one\n\ntwo", "three")
    np.testing.assert_array_equal(table.score, [[0], [NAN]])
    np.testing.assert_array_equal(table.cost, [[1e-5], [2e-5]])


def test_routerbench_without_costs_and_its_faults(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rb.csv", BENCH[:5], ("m.1", "q", "x", 1, 0))
    assert OutcomeTable.read(path).experts == ("org/a", "b")
    path = write_csv(tmp_path / "rb.csv", BENCH[:5], ("m.1", "q", "x", 1, 0), ("m.1", "r", "x", 1, 0))
    assert "line 3: the id 'm.1' is there already" in faults_of(path)
    path = write_csv(tmp_path / "rb.csv", BENCH[:2], ("m.1", "q"))
    assert "lacks the column eval_name. sample_id, prompt" in faults_of(path, kind="routerbench")
    path = write_csv(tmp_path / "rb.csv", (*BENCH[:4], "org/a|total_cost"), ("m.1", "q", "x", 1, -0.5))
    assert "line 2, column cost: -0.5 is negative" in faults_of(path)


class Trap:
    """Unpickling it would make the file ``ran``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(("name", "protocol"), [("rb.pkl", 0), ("rb.pickle", 5), ("renamed.csv", 4)])
@pytest.mark.parametrize("kind", [None, "routerbench"])
def test_a_pickle_is_refused(tmp_path: Path, name: str, protocol: int, kind: str | None) -> None:
    path = tmp_path / name
    path.write_bytes(pickle.dumps(Trap(tmp_path / "ran"), protocol))
    assert "is a pickle: reading it would run whatever code it holds" in faults_of(path, kind=kind)
    assert not (tmp_path / "ran").exists()


# --- RouterArena


def arena(index: str, expert: str, score: float | None, **more: object) -> dict[str, object]:
    result = None
    if score is not None:
        result = {"score": score, "metric": "mcq", "ground_truth": "D", "inference_cost": 3e-5}
    return {
        "global_index": index,
        "question": f"What of {index}?",
        "llm_selected": expert,
        "token_usage": {"input_tokens": 10, "output_tokens": 5, "total_tokens": 15},
        "success": True,
        "evaluation_result": result,
        "run_number": 1,
        **more,
    }


def test_routerarena(tmp_path: Path) -> None:
    folder = tmp_path / "cached"
    one = write_jsonl(folder / "a.jsonl", arena("AIME_112", "a", 0.0), arena("Arc_MMLU_6", "a", 1.0))
    write_jsonl(
        folder / "b.jsonl", arena("Arc_MMLU_6", "b", 0.5), arena("SuperGLUE", "b", None, token_usage=None)
    )
    table = OutcomeTable.read(folder)
    assert kinds_of(folder) == kinds_of(one) == ["routerarena"]
    assert (table.ids, table.experts) == (("AIME_112", "Arc_MMLU_6", "SuperGLUE"), ("a", "b"))
    np.testing.assert_array_equal(table.score, [[0, NAN], [1, 0.5], [NAN, NAN]])
    np.testing.assert_array_equal(table.cost, [[3e-5, NAN], [3e-5, 3e-5], [NAN, NAN]])
    np.testing.assert_array_equal(table.tokens_in, [[10, NAN], [10, 10], [NAN, NAN]])
    assert table.metadata["task"] == ("AIME", "Arc_MMLU", "SuperGLUE")
    assert table.metadata["gold"] == ("D", "D", "")


def test_routerarena_faults(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", arena("x_1", "a", 0.0), {"global_index": "x_2", "question": "q"})
    write_jsonl(tmp_path / "b.jsonl", arena("x_1", "b", 1.0, question="Another?"), arena("x_3", "b", NAN))
    write_jsonl(tmp_path / "c.jsonl", arena("x_1", "a", 1.0))
    text = faults_of(tmp_path)
    assert f"{tmp_path / 'a.jsonl'}, line 2: lacks llm_selected" in text
    assert f"{tmp_path / 'b.jsonl'}, line 1: the id 'x_1' has another query at {tmp_path / 'a.jsonl'}" in text
    assert f"{tmp_path / 'c.jsonl'}, line 1: has other values of a on query 'x_1'" in text


# --- prices


@pytest.mark.parametrize("name", ["p.json", "p.yaml"])
def test_price_lists(tmp_path: Path, name: str) -> None:
    outcomes = write_csv(tmp_path / "t.csv", LONG[:3], ("q", "a", "1"), ("q", "b", "1"), ("q", "c", "1"))
    path = write_json(
        tmp_path / name,
        {
            "a": {"input": 0.1, "output": 2, "size": "350M"},
            "b": {"input": "1e-5", "output": 0},
            "c": {"input": 1, "output": 2, "size": 8},
        },
    )
    wanted = {"a": Price(0.1, 2.0, 0.35), "b": Price(1e-5, 0.0), "c": Price(1.0, 2.0, 8.0)}
    assert dict(OutcomeTable.read(outcomes, prices=path).prices) == wanted


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{}", "is no price list"),
        ("[1]", "is no price list"),
        ('{"a": 3}', "a: is no price"),
        ('{"a": {"input": 1}}', "a: has no output price"),
        ('{"a": {"input": -1, "output": 1}}', "a.input: is -1"),
        ('{"a": {"input": "free", "output": 1}}', "a.input: 'free' is no number"),
        ('{"a": {"input": null, "output": 1}}', "a.input: is None"),
        ('{"a": {"input": 1, "output": 1, "size": "large"}}', "a.size: is 'large'"),
        ('{"z": {"input": 1, "output": 1}}', "has no price of a. It has z"),
        ('{"a": {"input": 1', "p.yaml: is no YAML that can be read"),
    ],
)
def test_price_lists_that_are_wrong(tmp_path: Path, text: str, word: str) -> None:
    outcomes = write_csv(tmp_path / "t.csv", LONG[:3], ("q", "a", "1"))
    (tmp_path / "p.yaml").write_text(text, "utf-8")
    assert word in faults_of(outcomes, prices=tmp_path / "p.yaml")


# --- which format


def test_every_format_has_a_row_that_loads() -> None:
    for name, row in registry.table("outcomes").items():
        assert callable(registry.load(row.read)), name
        assert callable(registry.load(row.sniff)), name


def test_a_format_that_does_not_exist(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", LONG[:3], ("q", "a", "1"))
    assert "Did you mean 'routerbench'?" in faults_of(path, kind="routerbensh")
    assert "lacks sample_id" not in faults_of(path, kind="mtbench")


@pytest.mark.parametrize("kind", IMPORTERS)
def test_a_file_of_another_kind(tmp_path: Path, kind: str) -> None:
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    assert str(image) in faults_of(image, kind=kind)
    prose = tmp_path / "prose.txt"
    prose.write_text("Dear reader,\nthis is no table.\n", "utf-8")
    assert str(prose) in faults_of(prose, kind=kind)
    assert "is of no format known here" in faults_of(prose)


def read_lines(source: Any) -> OutcomeTable:
    texts = source.path.read_text("utf-8").splitlines()[1:]
    return OutcomeTable(tuple(map(str, range(len(texts)))), tuple(texts), ("a",), np.ones((len(texts), 1)))


def sniff_lines(seen: Any) -> bool:
    return bool(seen.columns == ("lines",))


PLUGIN = Importer(f"{__name__}:sniff_lines", f"{__name__}:read_lines", "a line for each query")


def test_a_format_of_another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("lines", f"{__name__}:PLUGIN", "mixmerge.outcomes")

    def entries(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [entry] if group == entry.group else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entries)
    monkeypatch.setattr(registry, "load", _loading_here(registry.load))
    path = tmp_path / "t.txt"
    path.write_text("lines\none\ntwo\n", "utf-8")
    assert OutcomeTable.read(path).queries == ("one", "two")
    assert OutcomeTable.read(path, kind="lines").queries == ("one", "two")


def _loading_here(load: Any) -> Any:
    """This module is not importable by name: pytest imports it from its file."""

    def loaded(target: str) -> Any:
        module, _, name = target.partition(":")
        return globals()[name] if module == __name__ else load(target)

    return loaded
