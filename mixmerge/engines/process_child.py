"""A worker's process as the one sees it who started it: calls and their answers, and how it ended."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Generator, Mapping
from queue import Empty, SimpleQueue
from typing import IO, Any, cast

from mixmerge.engines.process_wire import LONGEST, VERSION, error_of, line_of, message_of
from mixmerge.errors import EngineDiedError, Fault

WORKER = "mixmerge.engines.worker"
_KEPT, _QUOTED, _WIDTH = 50, 5, 2000  # lines of its standard error, those told in a fault, bytes of one
_GLANCE = 0.5  # seconds between looks at whether it lives
_PATIENCE = 5.0  # seconds that its pipes may take to close when it has ended
_CRASH = "Fatal Python error"  # a stack follows, its most recent call first
_ENDED = "its process ended"


class Child:
    """A worker, from its start to its end. Threads may share it.

    Args:
        name: of the engine, for faults.
        python: the interpreter that runs it.
        environment: all of its environment.

    Raises:
        EngineDiedError: it cannot be started.
    """

    def __init__(self, name: str, *, python: str, environment: Mapping[str, str]) -> None:
        self.name, self.loaded = name, False
        self._lock, self._writing, self._reaping = threading.Lock(), threading.Lock(), threading.Lock()
        self._hello: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._answers = {0: self._hello}
        self._last, self._heard = 0, time.monotonic()
        self._why = ""
        self._exited, self._over = threading.Event(), threading.Event()
        self._said: deque[str] = deque(maxlen=_KEPT)
        try:
            self._process = subprocess.Popen(
                [python, "-P", "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment),
                start_new_session=True,  # a group of its own, which ends with it; Ctrl-C is ours to handle
            )
        except OSError as error:
            raise EngineDiedError(
                Fault(f"engine {name}", f"cannot start {python}: {error.strerror}")
            ) from error
        self._stdin, out, err = (
            cast(IO[bytes], pipe)
            for pipe in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        self._calls = self._stdin.fileno()
        os.set_blocking(self._calls, False)  # a worker that does not read must not hold us up
        self._readers = [
            threading.Thread(target=self._read, args=(out,), daemon=True),
            threading.Thread(target=self._overhear, args=(err,), daemon=True),
        ]
        for thread in (*self._readers, threading.Thread(target=self._wait, daemon=True)):
            thread.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return not self._exited.is_set() and not self._why

    def greet(self, timeout: float) -> None:
        """Waits until it says who it is.

        Raises:
            EngineDiedError: it does not, or speaks another version of the protocol.
        """
        hello = self._next(self._hello, "hello", time.monotonic(), timeout)
        if hello.get("protocol") != VERSION:
            self.kill(f"its mixmerge speaks version {hello.get('protocol')} of the protocol, not {VERSION}")
            raise self._died()

    def call(self, what: str, given: Any, timeout: float | None) -> Any:
        """What the worker gives back.

        Args:
            timeout: seconds that it may be silent; None for any.

        Raises:
            EngineDiedError: it ended before, or was silent for longer and was ended.
            MixmergeError: what the engine raised.
            OutOfMemoryError: so it did, and its memory had run out.
            WorkerError: the engine has a bug.
        """
        pieces = self.pieces(what, given, timeout)
        while True:
            try:
                next(pieces)
            except StopIteration as done:
                return done.value

    def pieces(self, what: str, given: Any, timeout: float | None) -> Generator[Any, None, Any]:
        """What comes before the answer, piece by piece; raises as ``call`` does. Closed, it tells the worker."""
        asked, answers = time.monotonic(), SimpleQueue[dict[str, Any] | None]()
        with self._lock:
            self._last += 1
            number = self._last
            if not self._over.is_set():
                self._answers[number] = answers
        done = False
        try:
            self._send({"id": number, "call": what, "given": given}, asked, timeout)
            while True:
                message = self._next(answers, what, asked, timeout)
                if "piece" in message:
                    yield message["piece"]
                    continue
                done = True
                if "raises" in message:
                    raise error_of(message["raises"], self.name)
                return message["gives"]
        finally:
            with self._lock:
                self._answers.pop(number, None)
            if not done and self.alive:
                with contextlib.suppress(EngineDiedError):
                    self._send({"id": number, "call": "cancel"}, time.monotonic(), _PATIENCE)

    def end(self, grace: float) -> None:
        """Ends it: kindly if it has nothing to do, and at once after ``grace`` seconds."""
        with self._lock:
            busy = len(self._answers) > 1
        if self.alive and not busy:
            with contextlib.suppress(EngineDiedError):
                self._send({"id": 0, "call": "end"}, time.monotonic(), grace)
            self._exited.wait(grace)
        self.kill(_ENDED)
        self._over.wait(2 * _PATIENCE)

    def kill(self, why: str) -> None:
        """Ends it and all it started, at once; ``why`` is what calls in flight say."""
        self._why = self._why or why
        with self._reaping:  # its number is its own until it is reaped
            if self._process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)

    # --- what is said

    def _send(self, message: dict[str, Any], asked: float, timeout: float | None) -> None:
        rest = memoryview(line_of(message))
        with self._writing, selectors.DefaultSelector() as ready:
            if not self.alive:
                raise self._died()
            ready.register(self._calls, selectors.EVENT_WRITE)
            while rest:
                if not self.alive:
                    raise self._died()
                if ready.select(_GLANCE):
                    try:
                        rest = rest[os.write(self._calls, rest) :]
                    except BlockingIOError:
                        continue
                    except OSError:
                        self._exited.wait(_PATIENCE)
                        raise self._died() from None
                    asked = time.monotonic()
                else:
                    self._bound(message["call"], asked, timeout)

    def _next(
        self, answers: SimpleQueue[dict[str, Any] | None], what: str, asked: float, timeout: float | None
    ) -> dict[str, Any]:
        while True:
            since = max(asked, self._heard)
            left = None if timeout is None else max(0.0, since + timeout - time.monotonic())
            try:
                message = answers.get(timeout=left)
            except Empty:
                self._bound(what, asked, timeout)
                continue
            if message is None:
                raise self._died()
            return message

    def _bound(self, what: str, asked: float, timeout: float | None) -> None:
        if timeout is not None and time.monotonic() - max(asked, self._heard) >= timeout:
            self.kill(f"did not answer ({what}) for {timeout:g} s, and was ended")
            raise self._died()

    # --- threads, until it has ended

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(LONGEST):
                message = message_of(line)
                if message is None:
                    self.kill(f"wrote what is not of the protocol, {line[:60]!r}, and was ended")
                    return
                self._heard = time.monotonic()
                self.loaded = bool(message.get("loaded"))
                with self._lock:
                    answers = self._answers.get(message["id"])
                if answers is not None:
                    answers.put(message)
        if not self._exited.wait(_PATIENCE):
            self.kill("closed its pipe, and was ended")

    def _overhear(self, pipe: IO[bytes]) -> None:
        with pipe:
            while line := pipe.readline(_WIDTH):
                text = line.decode("utf-8", "replace").rstrip().rpartition("\r")[2].strip()
                if text:
                    self._said.append(text)

    def _wait(self) -> None:
        if hasattr(os, "waitid"):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        else:
            self._process.wait()
        self._exited.set()
        self.kill(self._why)  # what it started must not outlive it
        for thread in self._readers:
            thread.join(_PATIENCE)
        with self._reaping:
            self._process.wait()
        with self._lock:
            self._over.set()
            waiting = list(self._answers.values())
        for answers in waiting:
            answers.put(None)
        with self._writing, contextlib.suppress(OSError):
            self._stdin.close()

    def _died(self) -> EngineDiedError:
        self._over.wait(2 * _PATIENCE)
        code = self._process.returncode
        why = self._why
        if not why and code is not None and code < 0:
            why = f"its process was killed by {signal.Signals(-code).name}"
        elif not why:
            why = f"its process ended with exit code {code}"
        lines = list(self._said)
        crash = next((at for at, line in enumerate(lines) if line.startswith(_CRASH)), len(lines) - _QUOTED)
        last = " | ".join(lines[max(0, crash) :][:_QUOTED])
        said = f"It said last: {last}" if last else ""
        return EngineDiedError(Fault(f"engine {self.name}", why, said), exit_code=code)
