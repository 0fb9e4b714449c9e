"""Programs in the sandbox: real processes that try real harm, with namespaces and without them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
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
        ("import numpy\nassert numpy.ones(3).sum() == 3", ""),
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


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="annotations are not evaluated")
def test_a_program_has_no_future_that_it_does_not_import() -> None:
    ran = run_program(
        "def total(values: List[int]): return sum(values)\nassert total([1, 2]) == 3", limits=SMALL
    )
    assert ran.why.startswith("NameError"), "its import of List is missing"


@BOTH
def test_sockets_that_are_files_do_not_answer(namespaces: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        path = Path(folder) / "bus"
        server.bind(str(path))
        server.listen()
        path.chmod(0o777)
        Path(folder).chmod(0o755)
        call = f"import socket\nsocket.socket(socket.AF_UNIX).connect({str(path)!r})"
        assert not run_program(call, limits=SMALL, namespaces=namespaces).passed
        if namespaces:
            pair = "import socket\none, other = socket.socketpair()\none.send(b'x')\nassert other.recv(1) == b'x'"
            assert run_program(pair, limits=SMALL).passed, "event loops take pairs"
            sent = f"import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', {str(path)!r})"
            assert run_program(sent, limits=SMALL).why.startswith("PermissionError: [Errno 1]")


@BOTH
def test_other_processes_are_neither_read_nor_ended(namespaces: bool) -> None:
    secret = {**os.environ, "TOKEN_OF_ANOTHER": "secret"}
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=secret) as other:
        for program in (
            f"import os\nos.kill({other.pid}, 9)",
            f"import os\nos.killpg(os.getpgid({other.pid}), 0)",
            f"assert b'TOKEN_OF_ANOTHER' in open('/proc/{other.pid}/environ', 'rb').read()",
            f"assert open('/proc/self/root/proc/{other.pid}/environ', 'rb').read()",
            f"import os\nassert os.pidfd_open({other.pid})",
        ):
            assert not run_program(program, limits=SMALL, namespaces=namespaces).passed, program
        assert other.poll() is None
        other.communicate(b"\n")
    own = "import os\nopen('/proc/self/environ').read()\nos.kill(os.getpid(), 0)"
    assert run_program(own, limits=SMALL, namespaces=namespaces).passed


def test_python_refuses_files_that_are_named_by_their_folder(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("kept")
    opened = f"import os, pathlib\nat = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
    for program in (
        opened + "os.open('mine.txt', os.O_WRONLY | os.O_TRUNC, dir_fd=at)",
        opened + "os.remove('mine.txt', dir_fd=at)",
        f"import os, pathlib\nos.remove(pathlib.Path({str(mine)!r}))",
        f"import os\nos.mkfifo({str(tmp_path / 'pipe')!r})",
        f"import sqlite3\nsqlite3.connect({str(tmp_path / 'base')!r})",
    ):
        assert not run_program(program, limits=SMALL, namespaces=False).passed, program
        assert mine.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [mine]


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="root can be another user")
def test_a_user_who_is_not_root_gets_no_rights_in_a_world_of_its_own() -> None:
    """With them a program mounts the files anew, writable."""
    python = shutil.which("python3", path=os.defpath)
    if python is None:
        pytest.skip("no interpreter that every user can read")
    source = Path(sys.modules[run_program.__module__].__file__ or "").with_name("sandbox_child.py")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as report:
        child = Path(shutil.copy(source, folder))
        Path(folder).chmod(0o755)
        child.chmod(0o644)
        rights = "[line for line in open('/proc/self/status') if line.startswith('CapEff')]"
        job = {
            "program": f"raise ValueError({rights})",
            "packages": folder,
            "word": "word",
            "namespaces": True,
            "room": 1 << 22,
            "seconds": 5,
            "memory": 1 << 28,
            "file_bytes": 1 << 20,
            "processes": 16,
        }
        subprocess.run(
            [python, "-I", "-S", "-B", child, str(report.fileno()), folder, "0"],
            input=json.dumps(job).encode(),
            pass_fds=(report.fileno(),),
            cwd=folder,
            user=65534,
            group=65534,
            extra_groups=[],
            check=True,
        )
        report.seek(0)
        first, last = map(json.loads, report.read().splitlines())
    if not first["files"]:
        pytest.skip("this system gives users no namespaces")
    assert "CapEff:\\t0000000000000000" in last["why"]


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
