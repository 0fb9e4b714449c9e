"""Programs in the sandbox: real processes that try real harm, with namespaces and without them."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from mixmerge.errors import MixmergeError
from mixmerge.evaluate.sandbox import Limits, run_program, run_programs

SMALL = Limits(seconds=1.5, memory=256 << 20, file_bytes=1 << 20)
BOTH = pytest.mark.parametrize("namespaces", [True, False])
BOMB = """
import os
while True:
    try:
        if os.fork() == 0:
            os.setsid()
    except OSError:
        pass
"""


def _alive(mark: str) -> list[str]:
    """Processes whose command line holds the mark."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if mark in line:
            found.append(line)
    return found


@BOTH
@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 + 1 == 2", ""),
        ("import math, json, re, collections\nassert math.sqrt(9) == 3", ""),
        ("open('mine.txt', 'w').write('x')\nassert open('mine.txt').read() == 'x'", ""),
        ("assert 1 + 1 == 3, 'no'", "AssertionError: no"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("raise ValueError('bad\\nworse')", "ValueError: bad"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "left before its end"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("x = 'a' * 10**10", "MemoryError"),
        ("open('big', 'wb').write(b'0' * (1 << 22))", "OSError: [Errno 27] File too large"),
        ("import os\nassert 'HF_TOKEN_OF_TESTS' not in os.environ", ""),
    ],
)
def test_ends(program: str, why: str, namespaces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN_OF_TESTS", "secret")
    ran = run_program(program, limits=SMALL, namespaces=namespaces)
    assert ran.passed == (why == "")
    assert ran.why.startswith(why)
    if not namespaces:
        assert ran.weaker == ("network", "processes", "files")


@BOTH
@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)", BOMB])
def test_an_endless_program_ends_and_leaves_nothing(
    program: str, namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # its processes are told by their folder
    began = time.monotonic()
    ran = run_program(program, limits=SMALL, namespaces=namespaces)
    assert not ran.passed
    assert ran.why in ("took more than 1.5 s", "was ended by signal 9 (memory or time)")
    assert time.monotonic() - began < 20
    until = time.monotonic() + 5
    while _alive(str(tmp_path)) and time.monotonic() < until:
        time.sleep(0.05)
    assert _alive(str(tmp_path)) == []


@BOTH
def test_no_address_answers(namespaces: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        came: list[object] = []
        waiting = threading.Thread(target=lambda: came.append(server.accept()), daemon=True)
        waiting.start()
        port = server.getsockname()[1]
        call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)"
        ran = run_program(call, limits=SMALL, namespaces=namespaces)
        assert not ran.passed
        assert came == []
        socket.create_connection(("127.0.0.1", port), timeout=2).close()  # the server is there, for others
        waiting.join(5)
        assert len(came) == 1


@BOTH
def test_files_of_others_stay(tmp_path: Path, namespaces: bool) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    for program in (
        f"open({str(mine)!r}, 'w').write('gone')",
        f"import os\nos.remove({str(mine)!r})",
        f"import pathlib\npathlib.Path({str(tmp_path / 'new')!r}).mkdir()",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
    ):
        ran = run_program(program, limits=SMALL, namespaces=namespaces)
        assert not ran.passed, program
        assert mine.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [mine]


def test_without_namespaces_python_refuses_new_programs() -> None:
    for program in (
        "import os\nos.fork()",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])",
        "import os\nos.system('true')",
        "import ctypes",
    ):
        ran = run_program(program, limits=SMALL, namespaces=False)
        assert not ran.passed, program
        assert "not allowed here" in ran.why or "_RefusedError" in ran.why


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_with_namespaces_a_program_is_alone() -> None:
    ran = run_program("raise ValueError(__import__('os').getppid())", limits=SMALL)
    if ran.weaker:
        pytest.skip(f"this system gives no namespaces: {ran.weaker}")
    assert ran.why == "ValueError: 1", "its parent is the first process of its own world"
    known = run_program(f"import os\nos.kill({os.getpid()}, 0)", limits=SMALL)
    assert known.why.startswith("ProcessLookupError")
    few = "import os\nfor _ in range(64):\n    if os.fork() == 0:\n        import time; time.sleep(1)"
    assert run_program(few, limits=SMALL).why.startswith("BlockingIOError"), "more than 16 processes"


def test_a_crash_is_told() -> None:
    ran = run_program("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", limits=SMALL)
    assert ran.why == "was ended by signal 11 (crash)"


def test_what_a_program_writes_does_not_count() -> None:
    forged = (
        'import os, json\nfor fd in range(3, 60):\n    try:\n        os.write(fd, b\'{"word": "x"}\\n\')\n'
    )
    assert not run_program(forged + "    except OSError: pass\nos._exit(0)", limits=SMALL).passed


def test_many_in_order() -> None:
    programs = [f"assert {number} % 2 == 0" for number in range(6)]
    ran = run_programs(programs, limits=SMALL, workers=3)
    assert [one.passed for one in ran] == [True, False] * 3


def test_limits_out_of_range_are_all_told() -> None:
    with pytest.raises(MixmergeError) as caught:
        Limits(seconds=0, memory=1, file_bytes=1, processes=0)
    assert len(caught.value.faults) == 4
