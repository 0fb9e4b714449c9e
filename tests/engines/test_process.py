"""Engines in processes of their own: real processes, which are killed, hang, lie and lose their parents."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixmerge.engines import process_child
from mixmerge.engines.contract import check_engine
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.process import ProcessEngine
from mixmerge.engines.process_wire import (
    WorkerError,
    chunk_of,
    generation_of,
    likelihood_of,
    line_of,
    message_of,
    request_of,
)
from mixmerge.engines.records import Chunk, Generation, Likelihood, Message, Request, Scoring
from mixmerge.errors import CheckpointError, EngineDiedError, MixmergeError, OutOfMemoryError

STANDINS = Path(__file__).parent / "standins"
ROOT = Path(__file__).parent.parent.parent
LONG = 60.0  # seconds after which a test gives up; nothing waits for them


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ProcessEngine]]:
    """``faulty(**options)``: an engine of the stand-in, in a process; all are unloaded at the end."""
    monkeypatch.syspath_prepend(str(STANDINS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STANDINS), str(ROOT)]))
    made = []

    def make(kind: str = "faulty:Faulty", arguments: Any = None, **options: Any) -> ProcessEngine:
        made.append(ProcessEngine(kind, arguments, name="f", **options))
        return made[-1]

    yield make
    for engine in made:
        engine.unload()


def ask(engine: ProcessEngine, prompt: str, **settings: Any) -> str:
    return engine.generate([Request("r", prompt, **settings)])[0].text


def gone(pid: int) -> bool:
    """Whether the process has ended; one that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + LONG
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return true()


# --- the wire

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)
NUMBERS = st.floats(max_value=0, allow_nan=False)
GENERATIONS = st.builds(
    Generation,
    TEXTS,
    TEXTS,
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from(["stop", "length"]),
    st.floats(0, 9),
    st.none() | st.lists(NUMBERS, max_size=3).map(tuple),
)
REQUESTS = st.builds(
    Request,
    TEXTS,
    TEXTS.filter(bool)
    | st.lists(st.builds(Message, st.just("user"), TEXTS), min_size=1, max_size=2).map(tuple),
    temperature=st.floats(0, 2),
    stop=st.lists(TEXTS.filter(bool), max_size=2).map(tuple),
    seed=st.integers(0, 2**63 - 1),
    logprobs=st.booleans(),
    adapter=st.none() | TEXTS,
)


def over(data: Any) -> Any:
    line = line_of({"id": 1, "given": data})
    assert line.count(b"\n") == 1
    message = message_of(line)
    assert message is not None
    return message["given"]


@given(REQUESTS, GENERATIONS)
def test_records_survive_the_wire(request: Request, generation: Generation) -> None:
    assert request_of(over(asdict(request))) == request
    assert generation_of(over(asdict(generation))) == generation
    for chunk in (Chunk("x", generation), Chunk(generation.text)):
        assert chunk_of(over(asdict(chunk))) == chunk
    likelihood = Likelihood(generation.id, generation.logprobs or (-1.0,), True)
    assert likelihood_of(over(asdict(likelihood))) == likelihood


@pytest.mark.parametrize(
    "line", [b"", b"\n", b"hello\n", b"[1]\n", b'{"id": "1"}\n', b'{"gives": 1}\n', b'{"id": 1}', b"\xff\n"]
)
def test_what_is_not_of_the_protocol(line: bytes) -> None:
    assert message_of(line) is None
    assert message_of(b'{"id": 1}\n') == {"id": 1}


# --- the protocol of engines


def test_an_echo_in_a_process_keeps_the_protocol() -> None:
    check_engine(lambda: ProcessEngine("echo", name="e"))


def test_a_process_and_its_end() -> None:
    engine = ProcessEngine("echo", name="e")
    assert (engine.loaded, engine.pid, engine.memory(), engine.adapters) == (False, None, 0, ())
    assert engine.capabilities == EchoEngine.capabilities
    assert ask(engine, "one two") == "one two"
    pid = engine.pid
    assert pid is not None
    assert pid != os.getpid()
    assert engine.loaded
    assert [one.total for one in engine.loglikelihood([Scoring("s", "one", " one")])] == [
        EchoEngine().loglikelihood([Scoring("s", "one", " one")])[0].total
    ]
    assert engine.check([Request("a", "x"), Request("b", "x", adapter="y")])[0] is None
    engine.unload()
    assert gone(pid)
    assert not engine.loaded
    assert engine.pid is None


def test_faults_are_those_of_the_engine() -> None:
    asked = [Request("a", "x", adapter="y"), Request("b", "x"), Request("c", "x", adapter="z")]
    with ProcessEngine("echo", name="e") as engine:
        with pytest.raises(MixmergeError) as caught:
            engine.generate(asked)
        with pytest.raises(MixmergeError) as here:
            EchoEngine("e").generate(asked)
        assert caught.value.faults == here.value.faults
        assert engine.check(asked) == EchoEngine("e").check(asked)
        given = engine.generate_each(asked)
        assert [given[0], given[2]] == list(here.value.faults)
        assert isinstance(given[1], Generation)


@pytest.mark.slow
def test_a_model_in_a_process(family: Callable[..., Any], programs: Any) -> None:
    """Those that keep the protocol need not load torch each, those that are killed do."""
    from mixmerge.engines.local import TransformersEngine

    folder = str(family("llama", dtype="float32").base)
    asked = [Request(str(at), "one two three"[: 3 + at], 8, temperature=at % 2, seed=at) for at in range(6)]
    expected = TransformersEngine(folder).generate(asked)
    check_engine(
        lambda: ProcessEngine("transformers", {"model": folder}, name="tiny", python=programs.python)
    )
    engine = ProcessEngine("transformers", {"model": folder, "dtype": "float32"}, name="tiny")
    before = engine.memory()
    chance = random.Random(0)
    for _ in range(2):
        engine.load()
        assert engine.memory() == before
        pid = engine.pid
        assert pid is not None
        killer = threading.Timer(chance.random() * 0.2, os.kill, (pid, signal.SIGKILL))
        killer.start()
        with contextlib.suppress(EngineDiedError):
            while True:
                engine.generate(asked)
        killer.join()
        assert [one.text for one in engine.generate(asked)] == [one.text for one in expected]
    engine.unload()
    with pytest.raises(MixmergeError, match="engine gone: cannot load it"):
        ProcessEngine("transformers", {"model": folder + "-not"}, name="gone", python=programs.python).load()


# --- what is refused before anything starts


def test_wrong_arguments() -> None:
    with pytest.raises(MixmergeError, match=r"no engine is called 'ecko'\. Did you mean 'echo'"):
        ProcessEngine("ecko", name="e")
    with pytest.raises(MixmergeError) as caught:
        ProcessEngine("transformers", {"modle": "x", "dtype": "auto"}, name="e")
    assert [str(fault) for fault in caught.value.faults] == [
        "engine e: modle: transformers has no such argument. Did you mean 'model'? Known: adapters, "
        "batch_tokens, device, dtype, model, name, revision.",
        "engine e: model: is missing: transformers needs it.",
    ]
    with pytest.raises(MixmergeError) as caught:
        ProcessEngine("echo", {"reply": len, "name": {1, 2}}, name="e")
    assert [fault.where for fault in caught.value.faults] == ["engine e: reply", "engine e: name"]
    with pytest.raises(MixmergeError) as caught:
        ProcessEngine("echo", name="e", start_timeout=0, timeout=-1, grace=float("nan"))
    assert len(caught.value.faults) == 3
    with pytest.raises(MixmergeError, match="dtype: is 'float8'"):
        ProcessEngine("transformers", {"model": "x", "dtype": "float8"}, name="e")
    with pytest.raises(MixmergeError, match="is no engine"):
        ProcessEngine("mixmerge.errors:Fault", {"where": "x", "what": "y"}, name="e")


# --- a worker that dies


@pytest.mark.parametrize(
    ("prompt", "said", "code"),
    [
        ("exit 3", r"its process ended with exit code 3\. It said last: progress 20% \| something broke", 3),
        ("exit 0", "its process ended with exit code 0", 0),
        ("crash", "its process was killed by SIGABRT. It said last: Fatal Python error: Aborted", -6),
    ],
)
def test_a_worker_that_dies(faulty: Callable[..., ProcessEngine], prompt: str, said: str, code: int) -> None:
    engine = faulty()
    engine.load()
    with pytest.raises(EngineDiedError, match=f"engine f: {said}") as caught:
        ask(engine, prompt)
    assert caught.value.exit_code == code
    assert not engine.loaded
    assert ask(engine, "again") == "again"


def test_a_worker_that_is_killed(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty()
    child = int(ask(engine, "spawn"))
    pid = engine.pid
    assert pid is not None
    threading.Timer(0.2, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(EngineDiedError, match="killed by SIGKILL") as caught:
        ask(engine, "sleep 600")
    assert caught.value.exit_code == -signal.SIGKILL
    assert wait_until(lambda: gone(child)), "what it started ends with it"
    engine.load()
    assert engine.pid != pid
    idle = engine.pid
    assert idle is not None
    os.kill(idle, signal.SIGKILL)
    assert wait_until(lambda: not engine.loaded)
    assert ask(engine, "one") == "one", "nothing was lost, so nothing is raised"


def test_a_worker_that_is_killed_while_it_streams(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty()
    pieces = engine.stream(Request("r", "x"))
    assert next(pieces).text == "0 "
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineDiedError):
        list(pieces)


def test_what_it_writes_is_bounded(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty()
    assert ask(engine, "say 20000") == "say 20000", "a pipe that nobody reads would block it"
    child = engine._child
    assert child is not None
    assert wait_until(lambda: child._said[-1] == "the last")
    assert len(child._said) == process_child._KEPT
    assert max(len(line) for line in child._said) <= process_child._WIDTH


# --- a worker that hangs


def test_a_worker_that_hangs(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty(timeout=1.0)
    assert ask(engine, "sleep 0.1") == "sleep 0.1"
    pid = engine.pid
    assert pid is not None
    with pytest.raises(EngineDiedError, match=r"did not answer \(generate\) for 1 s, and was ended"):
        ask(engine, "sleep 600")
    assert gone(pid)
    assert ask(engine, "one") == "one"


def test_a_worker_that_does_not_read(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty(timeout=1.0)
    engine.load()
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineDiedError, match="did not answer"):
        ask(engine, "x" * 4_000_000)
    assert gone(pid)
    assert len(ask(engine, "x" * 4_000_000)) == 4_000_000


def test_unloading_does_not_wait_for_work(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty(grace=600.0)
    engine.load()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, engine, "sleep 600")
        child = engine._child
        assert child is not None
        assert wait_until(lambda: len(child._answers) > 1)
        engine.unload()
        with pytest.raises(EngineDiedError, match="its process ended"):
            asked.result(LONG)
    assert gone(child.pid)


def test_a_worker_that_does_not_end(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty(grace=0.2)
    engine.load()
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    engine.unload()
    assert gone(pid)


# --- a worker that never becomes one

HELLO = 'import sys, time\nsys.stdout.write(\'{"id": 0, "protocol": 1}\\n\')\nsys.stdout.flush()\n'


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (
            "print('Welcome!')\nimport time\ntime.sleep(600)",
            r"not of the protocol, b'Welcome!\\n', and was ended",
        ),
        (HELLO.replace("1", "99") + "time.sleep(600)", "speaks version 99 of the protocol, not 1"),
        (HELLO + "print('x' * 10**6, end='', flush=True)\nsys.exit(7)", "not of the protocol"),
        (HELLO + "sys.stdin.readline()\nsys.exit(7)", "ended with exit code 7"),
        (
            HELLO + "sys.stdin.readline()\nimport os\nos.close(1)\ntime.sleep(600)",
            "closed its pipe, and was ended",
        ),
        ("import sys\nsys.exit('no such module')", "exit code 1. It said last: no such module"),
        ("import time\ntime.sleep(600)", r"did not answer \(hello\) for 2 s"),
        (HELLO + "time.sleep(600)", r"did not answer \(open\) for 2 s"),
    ],
)
def test_what_is_no_worker(code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_child, "_PATIENCE", 0.5)
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{code}\n")
    python.chmod(0o755)
    engine = ProcessEngine("echo", name="e", python=str(python), start_timeout=2.0)
    with pytest.raises(EngineDiedError, match=said):
        engine.load()
    assert engine.pid is None


def test_no_interpreter() -> None:
    with pytest.raises(EngineDiedError, match="engine e: cannot start /no/python: No such file"):
        ProcessEngine("echo", name="e", python="/no/python").load()


def test_an_engine_that_is_refused_in_the_process(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty("faulty:Refusing", environment={"REFUSE": "1"})
    with pytest.raises(CheckpointError, match="here: only in the process"):
        engine.load()
    assert engine.pid is None


# --- errors of the engine


def test_errors_keep_their_kind(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty(arguments={"broken": "is torn"})
    with pytest.raises(CheckpointError) as caught:
        engine.load()
    assert [str(fault) for fault in caught.value.faults] == ["a: is torn. fine ones. mend it.", "b: is torn."]
    assert not engine.loaded
    engine = faulty()
    for prompt, kind, said in [
        ("bug", WorkerError, "faulty.py.*ZeroDivisionError: a bug"),
        ("memory", OutOfMemoryError, "engine f: out of memory: no memory left"),
        ("device", OutOfMemoryError, "CUDA out of memory"),
    ]:
        with pytest.raises(kind, match=f"(?s){said}"):
            ask(engine, prompt)
        pid = engine.pid
    assert ask(engine, "one") == "one"
    assert engine.pid == pid, "it lives on"


# --- the conversation


def test_prints_do_not_disturb_it(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty()
    assert ask(engine, "print") == "''", "its standard input is empty"
    child = engine._child
    assert child is not None
    assert wait_until(lambda: "from a child" in child._said)
    assert {"to standard output", "from a child"} <= set(child._said)


def test_threads_share_a_worker(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty()
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda at: ask(engine, f"text {at}"), range(80)))
    assert texts == [f"text {at}" for at in range(80)]
    assert len({ask(engine, "pid") for _ in range(3)}) == 1


def test_a_stream_that_is_not_read_to_its_end(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty()
    pieces = engine.stream(Request("r", "x"))
    assert [next(pieces).text for _ in range(3)] == ["0 ", "1 ", "2 "]
    pieces.close()  # type: ignore[attr-defined]
    assert ask(engine, "one") == "one", "its stream had no end"


def test_environment_and_devices(faulty: Callable[..., ProcessEngine]) -> None:
    engine = faulty(environment={"COLOUR": "red"}, visible_devices="")
    assert ask(engine, "environment COLOUR") == "red"
    assert ask(engine, "environment CUDA_VISIBLE_DEVICES") == ""
    assert ask(engine, "environment PYTHONPATH") == os.environ["PYTHONPATH"]
    assert "COLOUR" not in os.environ
    assert ask(faulty(visible_devices="2,3"), "environment CUDA_VISIBLE_DEVICES") == "2,3"


def test_an_engine_that_is_forgotten(faulty: Callable[..., ProcessEngine], monkeypatch: Any) -> None:
    engine = ProcessEngine("faulty:Faulty", name="f")
    engine.load()
    pid = engine.pid
    assert pid is not None
    del engine
    gc.collect()
    assert wait_until(lambda: gone(pid))


PARENT = """
import os, sys, threading, time
sys.path.insert(0, {standins!r})
from mixmerge.engines.process import ProcessEngine
from mixmerge.engines.records import Request

engine = ProcessEngine("faulty:Faulty", name="f")
child = engine.generate([Request("r", "spawn")])[0].text
if {busy}:
    threading.Thread(target=engine.generate, args=([Request("r", "sleep 600")],), daemon=True).start()
    time.sleep(0.3)
fork = os.fork() if {fork} else 0
if {fork} and fork == 0:
    time.sleep(600)
print(engine.pid, child, fork, flush=True)
{then}
"""


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize(
    ("then", "fork"),
    [("time.sleep(600)", False), ("time.sleep(600)", True), ("sys.exit(0)", False), ("1 / 0", False)],
)
def test_a_worker_that_loses_its_parent(
    faulty: Callable[..., ProcessEngine], then: str, fork: bool, busy: bool
) -> None:
    code = textwrap.dedent(PARENT).format(standins=str(STANDINS), then=then, busy=busy, fork=fork)
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    worker, child, forked = (int(one) for one in parent.stdout.readline().split())
    try:
        if "sleep" in then:
            assert not gone(worker)
            parent.kill()
        parent.wait(LONG)
        assert wait_until(lambda: gone(worker) and gone(child))
    finally:
        parent.stdout.close()
        if forked:
            os.kill(forked, signal.SIGKILL)
