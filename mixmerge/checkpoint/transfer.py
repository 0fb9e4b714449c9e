"""Bytes from the Hugging Face hub: parts of files, whole files, and what goes wrong on the way, in one line."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from mixmerge.errors import CheckpointError, Fault

WORKERS = 8

Progress = Callable[[int, int], None]


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes ``start`` to ``stop`` of a file on the hub; the rest is not read, whatever the server sends."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    if stop <= start:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET",
        url,
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),
        retry_on_status_codes=(408, 429),
    ) as response:
        hf_raise_for_status(response)
        skipped = 0 if response.status_code == 206 else start
        data = bytearray()
        for block in response.iter_bytes():
            data += block
            if len(data) >= skipped + stop - start:
                break
    if len(data) < skipped + stop - start:
        raise OSError(f"{url} ends at byte {start - skipped + len(data):,}")
    return bytes(data[skipped : skipped + stop - start])


def fetch(files: Sequence[tuple[str, str, str]], bar: type[Bar] | None) -> None:
    """Download (repository, commit, file) in parallel; the first that fails stops the others."""

    def one(name: str, commit: str, file: str) -> None:
        from huggingface_hub import hf_hub_download

        with asking(name, commit, f"{name}/{file}"):
            hf_hub_download(name, file, revision=commit, tqdm_class=bar)

    with ThreadPoolExecutor(WORKERS) as pool:
        running = [pool.submit(one, *file) for file in files]
        try:
            for done in as_completed(running):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if bar is not None:
                bar.stopped.set()
            raise


class Bar(SimpleNamespace):
    """What the hub's client takes for one of its progress bars, made with whatever options; it shows nothing."""

    stopped: threading.Event

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None: ...

    def update(self, count: float | None = 1) -> None: ...

    # With these two the client knows that bytes from the network and bytes on the disk are one bar.
    def update_transfer(self, count: float | None = 1) -> None: ...

    def set_transfer_postfix_str(self, text: str, refresh: bool = True) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...


def bars(progress: Progress | None, total: int) -> type[Bar]:
    """A class of bars that add up, and that end a download by raising once they are stopped."""
    lock, bytes_done = threading.Lock(), 0

    class Counted(Bar):
        stopped = threading.Event()

        def update(self, count: float | None = 1) -> None:
            nonlocal bytes_done
            if self.stopped.is_set():
                raise InterruptedError("another file could not be downloaded")
            with lock:
                bytes_done += int(count or 0)
                if progress is not None:
                    progress(min(bytes_done, total), total)

    return Counted


@contextmanager
def asking(name: str, revision: str | None, where: str) -> Iterator[None]:
    """Says what is between hub and user in one line: refused, cut off, no space, a name the hub cannot have."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(_fault(error, name, revision, where)) from error


def _fault(error: Any, name: str, revision: str | None, where: str) -> Fault:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _fault(error.__cause__, name, revision, where)
    said = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, errors.GatedRepoError):
        run = "Ask for access on its page there, then run: hf auth login"
        return Fault(where, f"{name} is gated: the hub gives it to those who were granted access", run=run)
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{name} is neither a folder here nor a model on the hub that you may see"
        return Fault(where, what, run="Check the spelling, or run: hf auth login")
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{name} has no revision {revision!r} on the hub"
        return Fault(where, what, "A branch, a tag or a commit is allowed")
    if isinstance(error, errors.HfHubHTTPError):
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        return Fault(where, f"{name} cannot be had from the hub: it answered {status}", run=_AGAIN)
    if isinstance(error, errors.HTTPError | ConnectionError):
        what = f"{name} is not here, and the hub cannot be reached or cut the connection ({said[0]})"
        return Fault(where, what, run=f"Check the network. {_AGAIN}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        run = "Free some space, or set HF_HOME to a folder on another disk, and run the same command again"
        return Fault(where, f"{name} cannot be downloaded: the disk is full", run=run)
    return Fault(where, f"{name} cannot be had from the hub: {said[0]}")


_AGAIN = "Run the same command again: files that are whole are kept"
