"""Connections to one server: an HTTP client on an event loop of its own thread, and what its replies mean."""

from __future__ import annotations

import asyncio
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from mixmerge.engines.openai_waiting import asked_wait
from mixmerge.engines.openai_wire import AttemptError, code_of, complaint

if TYPE_CHECKING:
    from httpx2 import AsyncClient, Response

T = TypeVar("T")
_LARGEST = 64 * 2**20  # bytes of a whole answer
_LARGEST_REFUSAL = 2**16
_CONNECT = 10.0  # seconds, at most


class Link:
    """A client, and the loop that it lives on. The thread is a daemon: a link that is not closed ends with Python.

    Args:
        connections: open at once, at most, of all that is asked; 1 or more.
        timeout: seconds without a byte.

    Raises:
        AttemptError: the proxy or the certificates that the environment names cannot be used.
    """

    def __init__(self, *, connections: int, timeout: float) -> None:
        self.resume_at = 0.0  # by the engine's clock; the server asked to be left alone until then
        self._loop = asyncio.new_event_loop()
        self._closing = False
        self._workers: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="mixmerge-http", daemon=True)
        self._thread.start()
        try:
            self.client = self.run(_client(connections, timeout))
        except BaseException:
            self._end()
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin some work on the loop; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result. Who is interrupted while waiting cancels it."""
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()

    async def together(self, work: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
        """Run ``work`` so many times at once, until all end or ``cancel`` ends them."""
        if self._closing:
            return
        workers = [asyncio.create_task(work()) for _ in range(count)]
        self._workers.update(workers)
        try:
            ended = await asyncio.gather(*workers, return_exceptions=True)
        finally:
            self._workers.difference_update(workers)
        for one in ended:
            if isinstance(one, Exception):
                raise one

    def cancel(self) -> None:
        """End what runs together now; from any thread."""
        self._loop.call_soon_threadsafe(self._cancel_workers)

    def close(self) -> None:
        """End everything, then close the connections."""
        self.run(self._close())
        self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _cancel_workers(self) -> None:
        for worker in self._workers:
            worker.cancel()

    async def _close(self) -> None:
        self._closing = True
        self._cancel_workers()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.aclose()


async def _client(connections: int, timeout: float) -> AsyncClient:
    import httpx2

    try:
        return httpx2.AsyncClient(
            follow_redirects=False,  # a key goes to no host that the user has not named
            timeout=httpx2.Timeout(timeout, connect=min(timeout, _CONNECT), pool=None),  # waits for its turn
            limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
        )
    except (OSError, ValueError, ImportError, httpx2.InvalidURL) as error:
        # What it says is not passed on: the address of a proxy may hold a password.
        what = f"the environment's proxy or certificates cannot be used ({type(error).__name__})"
        run = "Look at SSL_CERT_FILE, SSL_CERT_DIR, HTTPS_PROXY, HTTP_PROXY and ALL_PROXY"
        raise AttemptError(what, run=run, shared=True) from None


@asynccontextmanager
async def posted(
    client: AsyncClient, url: str, content: bytes, headers: dict[str, str]
) -> AsyncIterator[Response]:
    """The server's response to a POST, its status looked at and its body not read.

    Raises:
        AttemptError: it cannot be reached, breaks off, or refuses.
    """
    import httpx2

    reached = False
    try:
        async with client.stream("POST", url, content=content, headers=headers) as response:
            reached = True
            if response.status_code != 200:
                raise _refusal(response, await read(response, _LARGEST_REFUSAL))
            yield response
    except httpx2.InvalidURL:
        raise AttemptError("its address cannot be used", shared=True) from None
    except httpx2.HTTPError as error:
        # Not chained: the library's error holds the request, and that the key.
        raise _broken(error, reached) from None


async def read(response: Response, most: int = _LARGEST) -> bytes:
    """The body.

    Raises:
        AttemptError: it has more than ``most`` bytes.
    """
    pieces, size = [], 0
    async for piece in response.aiter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise AttemptError(f"the server answers with more than {most:,} bytes")
    return b"".join(pieces)


def _broken(error: Exception, reached: bool) -> AttemptError:
    import httpx2

    certificate = _certificate_fault(error)
    if certificate is not None:
        return AttemptError(
            f"its certificate is not trusted: {certificate}",
            run="For an authority of your own, put its certificates' file into SSL_CERT_FILE",
            shared=True,
        )
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        what = f"cannot be reached: {_first_line(error)}"
        return AttemptError(what, run="Check its address, and that it runs", again=True, shared=True)
    if isinstance(error, httpx2.TimeoutException):
        return AttemptError("the server sent nothing within the timeout", again=True)
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError):
        return AttemptError(f"the request cannot be sent: {type(error).__name__}", shared=True)
    when = "in the middle of its answer" if reached else "before it answered"
    return AttemptError(f"the connection broke {when} ({type(error).__name__})", again=True)


def _certificate_fault(error: BaseException) -> str | None:
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, ssl.SSLCertVerificationError):
            return inner.verify_message or "it cannot be verified"
        inner = inner.__cause__ or inner.__context__
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _refusal(response: Response, payload: bytes) -> AttemptError:
    """What a status other than 200 means."""
    import httpx2

    status, said = response.status_code, complaint(payload)
    tail = f": {said}" if said else ""
    if 300 <= status < 400:
        try:
            target = response.url.join(response.headers.get("location", ""))
            where = f"{target.scheme}://{target.netloc.decode('ascii')}"
        except (httpx2.InvalidURL, UnicodeDecodeError):
            where = "an address that cannot be read"
        what = f"redirects ({status}) to {where}"
        return AttemptError(
            what, allowed="Redirects are not followed", run="Name the final address", shared=True
        )
    if status == 401:  # what it says may quote a part of the key
        return AttemptError("refuses the key (401)", run="Check the variable of api_key_env", shared=True)
    if status == 404:
        what = f"knows no such model or path (404){tail}"
        return AttemptError(what, run="Check model, and that endpoint ends as in http://host/v1", shared=True)
    if status == 429 and code_of(payload) in ("insufficient_quota", "billing_hard_limit_reached"):
        return AttemptError(f"says that the quota is used up (429){tail}", shared=True)
    if status in (408, 409, 429) or status >= 500:
        wait = asked_wait(response.headers, time.time())
        return AttemptError(f"the server answered {status}{tail}", again=True, wait=wait)
    return AttemptError(f"the server refused it ({status}){tail}")
