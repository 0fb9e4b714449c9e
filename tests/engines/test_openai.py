"""The engine of OpenAI-compatible servers, against a real server of this process that speaks the wire format."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mixmerge.engines.base import Engine
from mixmerge.engines.contract import check_engine
from mixmerge.engines.echo import EchoEngine
from mixmerge.engines.local import TransformersEngine
from mixmerge.engines.openai import OpenAIEngine
from mixmerge.engines.openai_waiting import asked_wait, backoff, read_span
from mixmerge.engines.openai_wire import events
from mixmerge.engines.records import Generation, Message, Request
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import find

KEY = "sk-not-for-anybody-else-1234567890"
PROMPT = "a secret of the patient"


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


@dataclass
class Service:
    """What the server does: ``act`` may answer a request itself, and says whether it did."""

    backing: Engine
    act: Callable[[int, Handler], bool] | None
    scheme: str = "http"
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    now: int = 0
    peak: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    asked: dict[str, Any]

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        service = self.server.service
        self.asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        with service.lock:
            service.seen.append(Seen(self.path, headers, self.asked))
            count = len(service.seen)
            service.now += 1
            service.peak = max(service.peak, service.now)
        try:
            if service.act is None or not service.act(count, self):
                self.answer()
        finally:
            with service.lock:
                service.now -= 1

    def reply(self, status: int, payload: Any, headers: dict[str, str] | None = None) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def answer(self) -> None:
        """The backing engine's answer in OpenAI's format."""
        service, asked = self.server.service, self.asked
        chat = self.path == "/v1/chat/completions"
        if not chat and self.path != "/v1/completions":
            self.reply(404, {"error": {"message": "no such path"}})
            return
        if asked["model"] != "tiny":
            message = f"The model `{asked['model']}` does not exist"
            self.reply(404, {"error": {"message": message, "code": "model_not_found"}})
            return
        turns = asked.get("messages", ())
        request = Request(
            id="x",
            prompt=tuple(Message(turn["role"], turn["content"]) for turn in turns)
            if chat
            else asked["prompt"],
            max_new_tokens=asked.get("max_completion_tokens") or asked["max_tokens"],
            temperature=asked.get("temperature", 1.0),
            top_p=asked.get("top_p", 1.0),
            stop=tuple(asked.get("stop", ())),
            seed=asked.get("seed", 0),
            logprobs=bool(asked.get("logprobs")),
        )
        if asked.get("stream"):
            self.stream(request, chat)
            return
        with service.lock:
            given = service.backing.generate([request])[0]
        choice = {"index": 0, "finish_reason": given.finish, "logprobs": logprobs(given, chat)}
        choice |= {"message": {"role": "assistant", "content": given.text}} if chat else {"text": given.text}
        self.reply(200, {"object": "completion", "choices": [choice], "usage": usage(given)})

    def stream(self, request: Request, chat: bool) -> None:
        with self.server.service.lock:
            chunks = list(self.server.service.backing.stream(request))
        given = chunks[-1].generation
        assert given is not None
        self.begin_events()
        if chat:
            self.event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        for chunk in chunks:
            said = {"delta": {"content": chunk.text}} if chat else {"text": chunk.text}
            self.event({"choices": [{"index": 0, **said, "finish_reason": None}], "usage": None})
        said = {"delta": {}} if chat else {"text": ""}
        last = {"index": 0, **said, "finish_reason": given.finish, "logprobs": logprobs(given, chat)}
        self.event({"choices": [last]})
        if self.asked.get("stream_options", {}).get("include_usage"):
            self.event({"choices": [], "usage": usage(given)})
        self.chunk(b"data: [DONE]\n\n")
        self.chunk(b"")

    def begin_events(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.chunk(b": this is a comment\r\n\r\n")

    def event(self, payload: Any) -> None:
        self.chunk(f"data: {json.dumps(payload, ensure_ascii=False)}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def drop(self) -> None:
        """End the connection without a word."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)


def logprobs(given: Generation, chat: bool) -> dict[str, Any] | None:
    if given.logprobs is None:
        return None
    if chat:
        return {"content": [{"token": "?", "logprob": one, "bytes": None} for one in given.logprobs]}
    return {"tokens": ["?"] * len(given.logprobs), "token_logprobs": list(given.logprobs)}


def usage(given: Generation) -> dict[str, int]:
    return {"prompt_tokens": given.tokens_in, "completion_tokens": given.tokens_out}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    service: Service

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that go away are part of the tests


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def serve() -> Iterator[Callable[..., Service]]:
    """``serve(act=None, *, backing=EchoEngine(), tls=None)``: a server that runs until the test ends."""
    running: list[Server] = []

    def start(
        act: Callable[[int, Handler], bool] | None = None,
        *,
        backing: Engine | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> Service:
        server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        scheme = "http" if tls is None else "https"
        server.service = Service(backing or EchoEngine(), act, scheme, server.server_address[1])
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server.service

    yield start
    for server in running:
        server.service.over.set()
        server.shutdown()
        server.server_close()


@dataclass
class Clock:
    """Time that passes only while somebody sleeps."""

    now: float = 0.0
    slept: list[float] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(round(seconds, 6))
        self.now += seconds
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock: Clock) -> Iterator[Callable[..., OpenAIEngine]]:
    """``engine(service, **options)``: its waits take no time, and the random numbers are 1/2."""
    made: list[OpenAIEngine] = []

    def make(service: Service | str, **options: Any) -> OpenAIEngine:
        endpoint = service if isinstance(service, str) else service.endpoint
        given = {"model": "tiny", "sleep": clock.sleep, "clock": lambda: clock.now, "uniform": lambda: 0.5}
        made.append(OpenAIEngine(endpoint, **{**given, **options}))
        return made[-1]

    yield make
    for one in made:
        one.unload()


def ask(count: int = 1, **options: Any) -> list[Request]:
    return [Request(f"r{at}", f"{PROMPT} {at}", **options) for at in range(count)]


def chat(*said: str) -> tuple[Message, ...]:
    return tuple(Message("user", one) for one in said)


def refused(engine: OpenAIEngine, requests: list[Request]) -> list[Fault]:
    given = engine.generate_each(requests)
    assert all(isinstance(one, Fault) for one in given), given
    return [one for one in given if isinstance(one, Fault)]


# --- the contract


def test_an_echo_behind_a_server_keeps_the_protocol(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    service = serve()
    check_engine(lambda: engine(service))


@pytest.mark.parametrize("omit", [(), ("stop",)])
def test_a_model_behind_a_server_keeps_the_protocol(
    omit: tuple[str, ...],
    serve: Callable[..., Service],
    engine: Callable[..., OpenAIEngine],
    family: Callable[..., Any],
) -> None:
    service = serve(backing=TransformersEngine(str(family("llama", dtype="float32").base)))
    check_engine(lambda: engine(service, omit=omit))
    assert any("stop" in seen.body for seen in service.seen) is not bool(omit)


def test_answers_are_those_of_the_expert(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine], family: Callable[..., Any]
) -> None:
    local = TransformersEngine(str(family("llama", dtype="float32").base))
    asked = [
        Request("a", "one two", 9, temperature=0.9, top_p=0.8, seed=4, logprobs=True),
        Request("b", chat("one two"), 9, logprobs=True),
        Request("c", "one", 5, stop=("e",)),
    ]
    for given, expected in zip(
        engine(serve(backing=local)).generate(asked), local.generate(asked), strict=True
    ):
        assert (given.id, given.text, given.finish) == (expected.id, expected.text, expected.finish)
        assert (given.tokens_in, given.tokens_out) == (expected.tokens_in, expected.tokens_out)
        assert given.logprobs == pytest.approx(expected.logprobs)


def test_what_is_sent(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    service = serve()
    remote = engine(service, api_key_env="TINY_KEY", concurrency=1)
    stop = ("1", "2", "3", "4", "5")
    remote.generate(
        [
            Request("a", "x", 3, temperature=0.5, top_p=0.7, stop=stop, seed=2**63 - 1),
            Request("b", (Message("system", "s"), Message("user", "u")), 4, logprobs=True),
        ]
    )
    text, turns = service.seen
    assert text.path == "/v1/completions"
    assert text.body == {
        "model": "tiny",
        "prompt": "x",
        "max_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.7,
        "seed": 2**63 - 1,
        "stop": list(stop),
    }
    assert turns.path == "/v1/chat/completions"
    assert turns.body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "max_tokens": 4,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "logprobs": True,
    }
    assert text.headers["authorization"] == f"Bearer {KEY}"
    bare = engine(f"{service.endpoint}/", max_tokens_field="max_completion_tokens", omit=["seed", "top_p"])
    bare.generate([Request("c", chat("u"), 4)])
    assert set(service.seen[2].body) == {"model", "messages", "max_completion_tokens", "temperature"}
    assert "authorization" not in service.seen[2].headers


def test_it_is_found_by_name_and_loads_no_client_before_it_is_used() -> None:
    assert find("engine", "openai") is OpenAIEngine
    made = OpenAIEngine("http://127.0.0.1:9/v1", model="m")
    assert (made.loaded, made.memory(), made.name, made.adapters) == (False, 0, "m", ())


# --- many at once


def test_order_and_the_limit_of_requests_at_once(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def slow(count: int, handler: Handler) -> bool:
        time.sleep(0.01 * (count % 3))
        return False

    service = serve(slow)
    given = engine(service, concurrency=3).generate(ask(24))
    assert [one.text for one in given] == [f"{PROMPT} {at}" for at in range(24)]
    assert [one.id for one in given] == [f"r{at}" for at in range(24)]
    assert service.peak == 3


def test_the_limit_holds_over_calls_of_many_threads(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    service = serve(lambda count, handler: bool(time.sleep(0.01)))
    remote = engine(service, concurrency=2)
    threads = [threading.Thread(target=remote.generate, args=(ask(6),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(service.seen) == 24
    assert service.peak == 2


def test_one_failure_keeps_the_others_answers(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def act(count: int, handler: Handler) -> bool:
        if handler.asked["prompt"].endswith("2"):
            handler.reply(400, {"error": {"message": "maximum context\nlength is 8 tokens"}})
            return True
        return False

    service = serve(act)
    asked = [*ask(5), Request("lost", "x", adapter="none")]
    given = engine(service).generate_each(asked)
    assert [one.text if isinstance(one, Generation) else None for one in given] == [
        *(f"{PROMPT} {at}" if at != 2 else None for at in range(5)),
        None,
    ]
    said = "request r2: tiny: the server refused it (400): maximum context length is 8 tokens."
    assert str(given[2]) == said
    assert "request lost: adapter" in str(given[5])
    assert len(service.seen) == 5
    with pytest.raises(MixmergeError) as caught:
        engine(service).generate(ask(5))
    assert str(caught.value) == said
    with pytest.raises(MixmergeError, match="adapter"):
        engine(service).generate(asked)
    assert len(service.seen) == 10, "nothing is sent when a request cannot be"


# --- another attempt


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 529])
def test_a_status_that_passes(
    status: int, serve: Callable[..., Service], engine: Callable[..., OpenAIEngine], clock: Clock
) -> None:
    def act(count: int, handler: Handler) -> bool:
        if count < 3:
            handler.reply(status, b"<html>")
        return count < 3

    service = serve(act)
    assert engine(service).generate(ask())[0].text == f"{PROMPT} 0"
    assert clock.slept == [0.25, 0.5], "half of bounds that double"


@pytest.mark.parametrize(
    ("headers", "slept"),
    [
        ({"Retry-After": "7"}, 7.25),
        ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.75),
        ({"x-ratelimit-reset-requests": "1m1s", "x-ratelimit-reset-tokens": "20ms"}, 60.0),
        ({"x-ratelimit-reset-tokens": "3s", "x-ratelimit-remaining-tokens": "0"}, 3.25),
        ({"Retry-After": "86400"}, 60.0),
        ({"Retry-After": "soon"}, 0.25),
    ],
)
def test_what_a_server_asks_to_wait(
    headers: dict[str, str],
    slept: float,
    serve: Callable[..., Service],
    engine: Callable[..., OpenAIEngine],
    clock: Clock,
) -> None:
    def act(count: int, handler: Handler) -> bool:
        if count == 1:
            handler.reply(429, {"error": {"message": "slow down"}}, headers)
        return count == 1

    service = serve(act)
    assert engine(service).generate(ask())[0].finish == "stop"
    assert clock.slept == [slept]


def test_what_a_server_asks_one_holds_for_all(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine], clock: Clock
) -> None:
    started = threading.Event()

    def act(count: int, handler: Handler) -> bool:
        if count == 1:
            handler.reply(429, b"{}", {"Retry-After": "30"})
        return count == 1

    async def sleep(seconds: float) -> None:
        clock.slept.append(seconds)
        started.set()
        await asyncio.sleep(0.05)
        clock.now += seconds

    service = serve(act)
    remote = engine(service, sleep=sleep)
    first = threading.Thread(target=remote.generate, args=(ask(),))
    first.start()
    assert started.wait(10)
    remote.generate(ask())
    first.join()
    assert clock.slept == [30.25, 30.0]


def test_a_server_that_never_recovers(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine], clock: Clock
) -> None:
    def act(count: int, handler: Handler) -> bool:
        handler.reply(500, {"error": {"message": "out of order"}})
        return True

    service = serve(act)
    (fault,) = refused(engine(service, retries=3), ask())
    expected = "request r0: tiny: no answer in 4 attempts; at last: the server answered 500: out of order."
    assert str(fault) == expected
    assert len(service.seen) == 4
    assert clock.slept == [0.25, 0.5, 1.0]


def test_a_timeout(serve: Callable[..., Service], engine: Callable[..., OpenAIEngine], clock: Clock) -> None:
    def act(count: int, handler: Handler) -> bool:
        if "0" in handler.asked["prompt"] or count == 1:
            handler.server.service.over.wait(20)
            return True
        return False

    service = serve(act)
    given = engine(service, timeout=0.3, retries=1).generate_each(ask(2))
    assert "no answer in 2 attempts; at last: the server sent nothing within the timeout" in str(given[0])
    assert isinstance(given[1], Generation)


@pytest.mark.parametrize(
    "payload",
    [
        b"{",
        b"",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"choices": []}',
        b'{"choices": [{"text": 5, "finish_reason": "stop"}]}',
        b'{"choices": [{"text": "half", "finish_reason": null}]}',
        b'{"choices": [{"text": "x", "finish_reason": "stop"}], "usage": {"prompt_tokens": -1}}',
        b'{"error": {"message": "overloaded"}}',
    ],
)
def test_an_answer_that_cannot_be_read(
    payload: bytes, serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def act(count: int, handler: Handler) -> bool:
        if broken or count == 1:
            handler.reply(200, payload)
            return True
        return False

    broken = False
    service = serve(act)
    assert engine(service).generate(ask())[0].text == f"{PROMPT} 0"
    assert len(service.seen) == 2
    broken = True
    (fault,) = refused(engine(service, retries=1), ask())
    assert "no answer in 2 attempts" in str(fault)


def test_a_connection_that_breaks(serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]) -> None:
    def act(count: int, handler: Handler) -> bool:
        if count == 2:
            handler.send_response(200)
            handler.send_header("Content-Length", "100")
            handler.end_headers()
            handler.wfile.write(b'{"choices"')
        if count < 3:
            handler.drop()
        return count < 3

    service = serve(act)
    assert engine(service).generate(ask())[0].text == f"{PROMPT} 0"
    assert len(service.seen) == 3


def test_a_server_that_is_not_there(engine: Callable[..., OpenAIEngine], clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    faults = refused(engine(f"http://127.0.0.1:{port}/v1", retries=2, concurrency=1), ask(50))
    assert len(set(faults)) == 1
    assert str(faults[0]).startswith("engine tiny: no answer in 3 attempts; at last: cannot be reached: ")
    assert len(clock.slept) == 2, "who waits is not kept waiting for what is known"


# --- streams


def pieces(handler: Handler, *said: str, finish: str | None = None) -> None:
    handler.begin_events()
    for one in said:
        handler.event({"choices": [{"index": 0, "text": one, "finish_reason": None}]})
    if finish is not None:
        handler.event({"choices": [{"index": 0, "text": "", "finish_reason": finish}]})


def test_a_stream_that_breaks_off_goes_on(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def act(count: int, handler: Handler) -> bool:
        if count == 1:
            pieces(handler, "a secret", " of")
            handler.drop()
        elif count == 2:
            pieces(handler, "a")
            handler.event({"error": {"message": "worker died", "code": 500}})
            handler.chunk(b"")
        elif count == 3:
            pieces(handler, "a secret of", " the")
            handler.chunk(b"data: [DONE]\n\n")
            handler.chunk(b"")
        return count < 4

    chunks = list(engine(serve(act)).stream(ask()[0]))
    assert [chunk.text for chunk in chunks] == ["a secret", " of", " the", " patient", " 0", ""]
    assert chunks[-1].generation is not None
    assert chunks[-1].generation.text == f"{PROMPT} 0"
    assert chunks[-1].generation.tokens_out == 6


@pytest.mark.parametrize("second", ["b different", "a"])
def test_a_stream_that_says_something_else_the_second_time(
    second: str, serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def act(count: int, handler: Handler) -> bool:
        if count == 1:
            pieces(handler, "a secret")
            handler.drop()
        else:
            pieces(handler, second, finish="stop")
            handler.chunk(b"")
        return True

    said: list[str] = []
    with pytest.raises(MixmergeError, match="said something else when it was asked again"):
        said.extend(chunk.text for chunk in engine(serve(act)).stream(ask()[0]))


def test_a_stream_that_always_breaks_off(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def act(count: int, handler: Handler) -> bool:
        pieces(handler, "a secret")
        handler.chunk(b"")
        return True

    service = serve(act)
    with pytest.raises(MixmergeError, match=r"in 3 attempts; at last: the server's answer ended early"):
        list(engine(service, retries=2).stream(ask()[0]))
    assert len(service.seen) == 3


def test_a_stop_text_across_pieces_and_no_usage(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def act(count: int, handler: Handler) -> bool:
        pieces(handler, "one \u2028 #", "# two", "##", "# three", finish="length")
        handler.chunk(b"")  # neither [DONE] nor usage
        return True

    chunks = list(engine(serve(act)).stream(Request("a", "x" * 9, 50, stop=("###",))))
    assert [chunk.text for chunk in chunks] == ["one \u2028 ", "## two", ""]
    given = chunks[-1].generation
    assert given is not None
    assert (given.text, given.finish) == ("one \u2028 ## two", "stop")
    assert (given.tokens_in, given.tokens_out) == (3, 6)  # 9 and 24 bytes


def test_who_stops_reading_ends_the_request(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    gone = threading.Event()

    def act(count: int, handler: Handler) -> bool:
        try:
            handler.begin_events()
            while not handler.server.service.over.wait(0.01):
                handler.event({"choices": [{"index": 0, "text": "on and ", "finish_reason": None}]})
        except OSError:
            gone.set()
        return True

    reading = engine(serve(act)).stream(ask()[0])
    assert next(reading).text == "on and "
    reading.close()
    assert gone.wait(10)


def test_a_server_that_does_not_stream(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    def act(count: int, handler: Handler) -> bool:
        del handler.asked["stream"]
        return False

    chunks = list(engine(serve(act)).stream(ask()[0]))
    assert [chunk.text for chunk in chunks] == [f"{PROMPT} 0", ""]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_by_hand(size: int) -> None:
    raw = (
        b": comment\r\n\r\nevent: x\ndata: 1\n\ndata:2\r\ndata: 3\r\n\r\n\n\n"
        + "data: \u2028\x85é\n\n".encode()
        + b"data: [DONE]\n\ndata: after\n\n"
    )

    async def heard(raw: bytes) -> list[bytes]:
        async def cut() -> Any:
            for at in range(0, len(raw), size):
                yield raw[at : at + size]

        return [event async for event in events(cut())]

    assert asyncio.run(heard(raw)) == [b"1", b"2\n3", "\u2028\x85é".encode()]
    assert asyncio.run(heard(b"data: 1\n\ndata: 2\n")) == [b"1", b"2"]
    assert asyncio.run(heard(b"data: 1\n\ndata: 2")) == [b"1"], "a line that does not end is not whole"


# --- faults that stay


@pytest.mark.parametrize(
    ("status", "payload", "words"),
    [
        (401, {"error": {"message": f"Incorrect API key provided: {KEY[:8]}****"}}, "refuses the key (401)"),
        (
            403,
            {"error": {"message": f"not with {KEY}, country"}},
            "refused it (403): not with [key], country",
        ),
        (404, {"detail": "Not Found"}, "knows no such model or path (404): Not Found"),
        (422, {"message": "x" * 360 + KEY + "y" * 999}, "refused it (422): xxx"),
        (429, {"error": {"message": "pay", "code": "insufficient_quota"}}, "the quota is used up (429): pay"),
    ],
)
def test_a_refusal_is_final_and_names_no_key(
    status: int,
    payload: dict[str, Any],
    words: str,
    serve: Callable[..., Service],
    engine: Callable[..., OpenAIEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TINY_KEY", KEY)

    def act(count: int, handler: Handler) -> bool:
        handler.reply(status, payload)
        return True

    service = serve(act)
    remote = engine(service, api_key_env="TINY_KEY", concurrency=1)
    with pytest.raises(MixmergeError) as caught:
        remote.generate(ask(3))
    assert words in str(caught.value)
    shared = status not in (403, 422)
    assert len(service.seen) == len(caught.value.faults) == (1 if shared else 3)
    assert service.seen[0].headers["authorization"] == f"Bearer {KEY}"
    told = [str(caught.value), repr(caught.value), repr(remote), repr(vars(remote)), caplog.text]
    assert caplog.records, "the client logs something"
    assert not [text for text in told if KEY[:8] in text]
    assert PROMPT not in caplog.text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert all(len(fault.what) < 450 for fault in caught.value.faults)


def test_a_success_logs_neither_key_nor_prompt(
    serve: Callable[..., Service],
    engine: Callable[..., OpenAIEngine],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("TINY_KEY", KEY)
    remote = engine(serve(), api_key_env="TINY_KEY")
    given = remote.generate(ask())
    assert list(remote.stream(ask()[0]))[-1].generation is not None
    assert caplog.records
    assert KEY not in caplog.text + repr(given)
    assert PROMPT not in caplog.text


def test_an_unknown_model_and_a_wrong_path(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    service = serve()
    (fault,) = refused(engine(service, model="huge"), ask())
    assert str(fault).startswith(
        "engine huge: knows no such model or path (404): The model `huge` does not exist. Check model"
    )
    (fault,) = refused(engine(service.endpoint.removesuffix("/v1")), ask())
    assert "(404): no such path" in str(fault)
    unknown = engine(service, model="huge", concurrency=1).generate_each([*ask(2), Request("c", chat("x"))])
    assert unknown[0] is unknown[1]
    assert len(service.seen) == 4, "what is known of one path says nothing of the other"


def test_a_key_that_is_not_there(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    remote = engine(service, api_key_env="TINY_KEY")
    for value in (None, "", " \n"):
        monkeypatch.delenv("TINY_KEY", raising=False) if value is None else monkeypatch.setenv(
            "TINY_KEY", value
        )
        for use in (remote.load, lambda: remote.generate_each(ask()), lambda: list(remote.stream(ask()[0]))):
            with pytest.raises(MixmergeError, match="the environment variable TINY_KEY is not set"):
                use()
    monkeypatch.setenv("TINY_KEY", f"{KEY}\r\nx-other: y")
    with pytest.raises(MixmergeError, match="holds no key that can be sent") as caught:
        remote.load()
    assert KEY not in str(caught.value)
    monkeypatch.setenv("TINY_KEY", f"{KEY}\n")
    assert remote.generate(ask())[0].finish == "stop"
    monkeypatch.delenv("TINY_KEY")
    (fault,) = refused(remote, ask())
    assert "TINY_KEY is not set" in str(fault)
    assert [seen.headers["authorization"] for seen in service.seen] == [f"Bearer {KEY}"]
    with pytest.raises(MixmergeError, match="the variable that api_key_env names is not set"):
        engine(service, api_key_env="gsk_perhapsakey").load()


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_takes_no_key_elsewhere(
    status: int,
    serve: Callable[..., Service],
    engine: Callable[..., OpenAIEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    other = serve()

    def act(count: int, handler: Handler) -> bool:
        handler.reply(status, b"", {"Location": f"http://localhost:{other.port}/v1/completions?token=1"})
        return True

    service = serve(act)
    (fault,) = refused(engine(service, api_key_env="TINY_KEY"), ask())
    assert f"redirects ({status}) to http://localhost:{other.port}. Redirects are not followed" in str(fault)
    assert len(service.seen) == 1
    assert other.seen == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that it signed itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made, key = folder / "cert.pem", folder / "key.pem"
    options = f"-newkey rsa:2048 -nodes -days 2 -subj /CN=mixmerge -keyout {key.name} -out {made.name}"
    command = [openssl, "req", "-x509", *options.split(), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return made, key


def test_a_certificate_of_ones_own(
    certificate: tuple[Path, Path],
    serve: Callable[..., Service],
    engine: Callable[..., OpenAIEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TINY_KEY", KEY)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    service = serve(tls=tls)
    faults = refused(engine(service, api_key_env="TINY_KEY", concurrency=1), ask(3))
    assert len(set(faults)) == 1
    assert "engine tiny: its certificate is not trusted: self-signed certificate" in str(faults[0])
    assert "SSL_CERT_FILE" in str(faults[0])
    assert service.seen == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    assert engine(service, api_key_env="TINY_KEY").generate(ask())[0].text == f"{PROMPT} 0"
    elsewhere = service.endpoint.replace("127.0.0.1", "localhost")
    (fault,) = refused(engine(elsewhere), ask())
    assert "its certificate is not trusted" in str(fault), "it is not made out to that host"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SSL_CERT_FILE", "nothing.pem"),
        ("HTTPS_PROXY", "socks5://ann:hunter2@127.0.0.1:9"),
        ("HTTPS_PROXY", "gopher://ann:hunter2@127.0.0.1:9"),
    ],
)
def test_an_environment_that_cannot_be_used(
    variable: str, value: str, engine: Callable[..., OpenAIEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv(variable, value)
    before = threading.active_count()
    remote = engine("https://127.0.0.1:9/v1")
    with pytest.raises(MixmergeError, match="proxy or certificates cannot be used") as caught:
        remote.load()
    assert "hunter2" not in str(caught.value)
    assert not remote.loaded
    assert threading.active_count() == before


def test_a_process_ends_though_nothing_was_unloaded(serve: Callable[..., Service]) -> None:
    code = (
        "from mixmerge.engines.openai import OpenAIEngine\n"
        "from mixmerge.engines.records import Request\n"
        f"engine = OpenAIEngine({serve().endpoint!r}, model='tiny')\n"
        "reading = engine.stream(Request('a', 'x y'))\n"
        "print(engine.generate([Request('a', 'x')])[0].text, next(reading).text)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "x x\n", "")


def test_answers_that_are_none(serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]) -> None:
    def act(count: int, handler: Handler) -> bool:
        said = {"message": {"content": None}, "finish_reason": handler.asked["messages"][0]["content"]}
        tokens = {"prompt_tokens": 3, "completion_tokens": 2}
        if said["finish_reason"] == "eos":
            said["logprobs"] = {"content": [{"token": "?", "logprob": 1e-9}]}
        handler.reply(200, {"choices": [{"index": 1, "text": "?"}, {"index": 0, **said}], "usage": tokens})
        return True

    remote = engine(serve(act), concurrency=1)
    (fault,) = refused(remote, [Request("a", chat("content_filter"))])
    assert "the server ended the answer by 'content_filter'" in str(fault)
    (fault,) = refused(remote, [Request("a", chat("stop"), logprobs=True)])
    assert "the server gives no log-probabilities" in str(fault)
    counted = remote.generate([Request("a", chat("eos"), logprobs=True)])[0]
    assert (counted.tokens_out, counted.logprobs) == (1, (0.0,)), "one for each, and none is above 0"
    (silent,) = remote.generate([Request("a", chat("length"))])
    assert (silent.text, silent.finish, silent.tokens_in, silent.tokens_out) == ("", "length", 3, 2)


def test_wrong_options() -> None:
    with pytest.raises(MixmergeError) as caught:
        OpenAIEngine(
            "ftp://ann:hunter2@h/v1?x=1",
            model="",
            api_key_env=KEY,
            concurrency=0,
            timeout=float("nan"),
            retries=-1,
            max_wait=0,
            max_tokens_field="tokens",  # type: ignore[arg-type]
            omit=["model"],
            name="far",
        )
    assert [fault.where.removeprefix("engine far: ") for fault in caught.value.faults] == [
        *(
            "model",
            "concurrency",
            "timeout",
            "retries",
            "max_wait",
            "max_tokens_field",
            "omit",
            "api_key_env",
        ),
        *("endpoint", "endpoint", "endpoint"),
    ]
    assert KEY not in str(caught.value)
    assert "hunter2" not in str(caught.value)
    for endpoint in ("", "localhost:8000", "http://", "http://h:port/v1", "http://[::1/v1", "http://h/\n"):
        with pytest.raises(MixmergeError, match="endpoint"):
            OpenAIEngine(endpoint, model="m")
    with pytest.raises(MixmergeError, match="What comes before /chat/completions"):
        OpenAIEngine("http://h/v1/chat/completions/", model="m")


# --- cancelling


def test_cancelling_keeps_what_is_there(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    stuck = threading.Event()

    def act(count: int, handler: Handler) -> bool:
        if count > 3:
            stuck.set()
            handler.server.service.over.wait(20)
        return count > 3

    service = serve(act)
    remote = engine(service, concurrency=1)
    given: list[Generation | Fault] = []
    asking = threading.Thread(target=lambda: given.extend(remote.generate_each(ask(9))))
    asking.start()
    assert stuck.wait(10)
    remote.cancel()
    asking.join(10)
    assert not asking.is_alive()
    assert [isinstance(one, Generation) for one in given] == [True] * 3 + [False] * 6
    assert str(given[8]) == "request r8: was cancelled before it was answered."
    assert len(service.seen) == 4
    stuck.clear()
    reading = threading.Thread(target=lambda: given.append(stream_fault(remote)))
    reading.start()
    assert stuck.wait(10)
    remote.unload()
    reading.join(10)
    assert "was cancelled" in str(given[9])
    assert not remote.loaded


def stream_fault(remote: OpenAIEngine) -> Fault:
    with pytest.raises(MixmergeError) as caught:
        list(remote.stream(ask()[0]))
    return caught.value.faults[0]


def test_an_interrupt_ends_the_requests(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    import signal

    gone = threading.Event()

    def act(count: int, handler: Handler) -> bool:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        handler.connection.settimeout(10)
        if handler.connection.recv(1) == b"":
            gone.set()
        return True

    remote = engine(serve(act))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            remote.generate(ask())
    finally:
        signal.signal(signal.SIGINT, before)
    assert gone.wait(10), "the connection is closed, not left"
    assert remote.loaded


def test_within_a_running_event_loop(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    remote = engine(serve())

    async def notebook() -> str:
        return remote.generate(ask())[0].text

    assert asyncio.run(notebook()) == f"{PROMPT} 0"


def test_connections_are_used_again(
    serve: Callable[..., Service], engine: Callable[..., OpenAIEngine]
) -> None:
    ports: set[int] = set()

    def act(count: int, handler: Handler) -> bool:
        ports.add(handler.client_address[1])
        return False

    remote = engine(serve(act), concurrency=2)
    for _ in range(5):
        remote.generate(ask(4))
    assert len(ports) <= 2


# --- waits by hand


def test_backoff_by_hand() -> None:
    bounds = [backoff(attempt, base=0.5, most=60.0, uniform=1.0) for attempt in range(9)]
    assert bounds == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert backoff(3, base=0.5, most=60.0, uniform=0.25) == 1.0
    assert backoff(10**6, base=0.5, most=60.0, uniform=0.5) == 30.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1.5", 1.5),
        ("20ms", 0.02),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("1d", 86400.0),
        ("1700000007", 7.0),
        ("1600000000", 0.0),
        ("", None),
        ("soon", None),
        ("-1", None),
        ("nan", None),
        ("inf", None),
        ("1s later", None),
    ],
)
def test_spans_by_hand(text: str, seconds: float | None) -> None:
    assert read_span(text, 1.7e9) == (None if seconds is None else pytest.approx(seconds))


def test_asked_waits_by_hand() -> None:
    now = 784_111_777.0  # Sun, 06 Nov 1994 08:49:37 GMT, the example of RFC 9110
    assert asked_wait({"retry-after": "Sun, 06 Nov 1994 08:49:49 GMT"}, now) == 12.0
    assert asked_wait({"retry-after": "Sun, 06 Nov 1994 08:49:00 GMT"}, now) == 0.0
    assert asked_wait({}, now) is None
    used, left = "x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens"
    resets = {"x-ratelimit-reset-requests": "2s", "x-ratelimit-reset-tokens": "9s"}
    assert asked_wait({**resets, used: "0", left: "50"}, now) == 2.0
    assert asked_wait(resets, now) == 9.0
    assert asked_wait({**resets, used: "3", left: "50"}, now) is None
