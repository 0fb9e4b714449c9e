"""Queries and scores a block at a time: the same as all at once, and in bounded memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mixmerge.decision.lines import parse_queries, read_queries, stream_queries
from mixmerge.decision.policies import Policy
from mixmerge.decision.records import queries_of
from mixmerge.errors import MixmergeError
from mixmerge.routers.base import Router
from mixmerge.routers.constants import BestSingleRouter
from mixmerge.routers.contract import sample
from mixmerge.routers.nearest import NearestRouter


@pytest.fixture(scope="module")
def router() -> Router:
    return NearestRouter().fit(sample(60))


def test_blocks_are_the_scores(router: Router) -> None:
    held = queries_of(sample(25, seed=1))
    whole, blocks = router.score(held), list(router.score_blocks(held, block=10))
    assert [len(scores) for _, scores in blocks] == [10, 10, 5]
    assert [query for some, _ in blocks for query in some] == held
    np.testing.assert_allclose(np.concatenate([one.mean for _, one in blocks]), whole.mean, atol=1e-12)
    np.testing.assert_allclose(np.concatenate([one.std for _, one in blocks]), whole.std, atol=1e-12)
    costs = [one.cost for _, one in blocks if one.cost is not None]
    assert whole.cost is not None
    np.testing.assert_array_equal(np.concatenate(costs), whole.cost)
    assert list(router.score_blocks([])) == []
    assert router.score([]).mean.shape == (0, 4)


def test_a_block_is_read_when_it_is_wanted(router: Router) -> None:
    read: list[int] = []

    def endless() -> Iterator[str]:
        for i in range(1000):
            read.append(i)
            yield f"add the number {i}"

    blocks = router.score_blocks(endless(), block=4)
    assert read == []
    next(blocks)
    assert len(read) == 4
    some, _ = next(blocks)
    assert len(read) == 8
    assert some[0].text == "add the number 4"


def test_blocks_that_cannot_be(router: Router) -> None:
    with pytest.raises(MixmergeError, match=r"block: is 0\. 1 or more"):
        router.score_blocks([], block=0)
    with pytest.raises(MixmergeError, match="is not fitted"):
        NearestRouter().score_blocks([])


def test_policies_of_the_whole_batch() -> None:
    assert Policy(kind="sample", trim=0.1).whole
    assert not Policy(kind="sample").whole
    assert not Policy(kind="budget", budget=1.0).whole


def test_a_file_is_read_again_and_not_held(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": f"query {i}"}) + "\n" for i in range(7)))
    found = stream_queries(path)
    assert len(found) == 7
    assert [one.id for one in found] == [one.id for one in found] == list("0123456")
    assert [one.text for one in read_queries(path)] == [one.text for one in found]
    path.write_text('{"id": "a", "text": "query"}\n[1]\n')
    with pytest.raises(MixmergeError, match=r"q.jsonl, line 2: is JSON, but a list"):
        list(found)
    path.write_text("a query\n")
    with pytest.raises(MixmergeError, match=r"q.jsonl, line 1: is not JSON"):
        list(found)
    path.write_text('"a query"\n')
    with pytest.raises(MixmergeError, match=r"q.jsonl: had 7 queries and has 1 now"):
        list(found)
    path.unlink()
    with pytest.raises(MixmergeError, match=r"q.jsonl: cannot be read: No such file"):
        list(found)


def test_names_that_are_there_twice_and_other_faults_stand_in_order(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    lines = [{"id": "a", "text": "x"}, {"id": "b"}, {"id": "a", "text": "y"}, {"id": "c", "text": " "}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(MixmergeError) as raised:
        stream_queries(path)
    assert [fault.where.split(", ")[1] for fault in raised.value.faults] == ["line 2", "line 3", "line 4"]
    assert "'a' is the name of line 1 too" in str(raised.value)
    path.write_text("".join('{"id": "a", "text": "x"}\n' for _ in range(50)))
    with pytest.raises(MixmergeError) as raised:
        stream_queries(path)
    assert len(raised.value.faults) == 21
    assert "and 29 more like these" in str(raised.value)


def test_what_can_be_read_once_is_copied(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.txt"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=("one\ntwo\n",))
    writer.start()
    found = stream_queries(pipe)
    writer.join()
    assert [one.text for one in found] == [one.text for one in found] == ["one", "two"]
    reader, end = os.pipe()
    large = b"x" * 1_000_000 + b"\n"

    def fill() -> None:
        with os.fdopen(end, "wb") as file:
            for _ in range(12):
                file.write(large)

    writer = threading.Thread(target=fill)
    writer.start()
    with os.fdopen(reader, "rb") as file:
        found = parse_queries(file, name="stdin")
    writer.join()
    assert [len(one.text) for one in found] == [1_000_000] * 12


_MEASURED = """
import resource, sys
from mixmerge.cli import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_queries(tmp_path: Path) -> None:
    """150,000 more of them, which as objects would be tens of megabytes."""
    BestSingleRouter().fit(sample()).save(tmp_path / "router")
    peaks = []
    for number in (50_000, 200_000):
        with (tmp_path / "q.txt").open("w") as file:
            file.writelines(
                f"which expert answers the question that has the number {i}\n" for i in range(number)
            )
        asked = ["route", "ask", "router", "-i", "q.txt", "-o", f"{number}.jsonl"]
        command = [sys.executable, "-P", "-c", _MEASURED, *asked]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    with (tmp_path / "200000.jsonl").open() as file:
        assert sum(1 for _ in file) == 200_000
    assert peaks[1] - peaks[0] < 15, peaks
