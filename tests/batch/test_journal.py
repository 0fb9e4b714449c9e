"""The journal: what a kill, a disk or a stranger can do to it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.batch.journal import Journal, data_of, key_of, line_of
from mixmerge.errors import OutputError

JOB = {"input": "a", "mixture": "m"}


def keys(*names: str) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array([key_of(name) for name in names], np.uint64)


def ended(journal: Journal, batch: str, *names: str) -> list[int]:
    return journal.end(batch, [(key_of(name), {"text": f"said {name}"}) for name in names], {"seconds": 1.0})


@given(
    st.dictionaries(
        st.text(), st.text() | st.integers() | st.none() | st.floats(allow_nan=False, allow_infinity=False)
    )
)
def test_lines_are_read_as_they_were_written(data: dict[str, object]) -> None:
    assert data_of(line_of(data)) == data


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), min_size=1), st.data())
def test_a_changed_byte_is_noticed(data: dict[str, str], draw: st.DataObject) -> None:
    line = bytearray(line_of(data))
    at = draw.draw(st.integers(0, len(line) - 1))
    line[at] ^= draw.draw(st.integers(1, 255))
    assert data_of(bytes(line)) != data


def test_answers_of_ended_batches_are_found_again(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", job=JOB) as journal:
        places = ended(journal, "one", "a", "b")
        assert [journal.answer(place)["text"] for place in places] == ["said a", "said b"]
        journal.note({"split": "two"})
    with Journal(tmp_path / "j", job=JOB) as journal:
        found = journal.find(keys("a", "b", "c"))
        assert found.tolist() == [*places, -1]
        assert journal.answer(int(found[1]))["text"] == "said b"
        assert journal.splits == {"two"}
        assert journal.ended == {"one"}


@pytest.mark.parametrize("cut", [1, 10, 60, 150])
def test_a_torn_end_is_cut_off_and_the_batch_runs_again(tmp_path: Path, cut: int) -> None:
    with Journal(tmp_path / "j", job=JOB) as journal:
        ended(journal, "one", "a", "b")
        ended(journal, "two", "c", "d")
    os.truncate(tmp_path / "j", (tmp_path / "j").stat().st_size - cut)
    with Journal(tmp_path / "j", job=JOB) as journal:
        assert (journal.find(keys("a", "b")) >= 0).all()
        assert (journal.find(keys("c", "d")) < 0).all()
        ended(journal, "two", "c", "d")
    with Journal(tmp_path / "j", job=JOB) as journal:
        found = journal.find(keys("a", "b", "c", "d"))
        assert [journal.answer(int(place))["text"] for place in found] == [f"said {name}" for name in "abcd"]
        assert journal.damaged == 0


def test_a_damaged_line_costs_its_batch_alone(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", job=JOB) as journal:
        ended(journal, "one", "a", "b")
        ended(journal, "two", "c", "d")
    text = bytearray((tmp_path / "j").read_bytes())
    text[text.index(b"said b")] ^= 1
    (tmp_path / "j").write_bytes(text)
    with Journal(tmp_path / "j", job=JOB) as journal:
        assert journal.damaged == 1
        assert (journal.find(keys("a", "b")) < 0).all()
        assert (journal.find(keys("c", "d")) >= 0).all()


def test_the_journal_of_another_job_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path / "j", job=JOB).close()
    with pytest.raises(OutputError, match=r"another input.*--overwrite"):
        Journal(tmp_path / "j", job={**JOB, "input": "b"})
    text = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(b"x" + text[1:])
    with pytest.raises(OutputError, match="first line is damaged"):
        Journal(tmp_path / "j", job=JOB)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with Journal(tmp_path / "j", job=JOB), pytest.raises(OutputError, match="another process"):
        Journal(tmp_path / "j", job=JOB)
    Journal(tmp_path / "j", job=JOB).close()


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    code = f"""
        import resource, signal
        from pathlib import Path
        from mixmerge.batch.journal import Journal, key_of
        from mixmerge.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        journal = Journal(Path({str(tmp_path / "j")!r}), job={JOB!r})
        journal.end("one", [(key_of("a"), {{"text": "said a"}})], {{}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            journal.end("two", [(key_of("b"), {{"text": "x" * 10_000}})], {{}})
        except OutputError as error:
            print(error)
        journal.end("three", [(key_of("c"), {{"text": "said c"}})], {{}})
        journal.close()
    """
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "the disk is full" in done.stdout
    with Journal(tmp_path / "j", job=JOB) as journal:
        assert (journal.find(keys("a", "b", "c")) >= 0).tolist() == [True, False, True]
        assert journal.damaged == 0
