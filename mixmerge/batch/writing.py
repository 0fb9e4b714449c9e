"""Answers as lines of a job's output, in the format that goes with its input.

An OpenAI request gets a line of OpenAI's batch output: ``response`` with ``status_code``, ``request_id`` and the body,
and ``error``. Where there is no answer, ``error`` has ``code`` and ``message`` and the body the same as the API's error
object: 400 and ``invalid_request`` where the input is wrong, 500 and ``server_error`` where an expert failed. Of
``logprobs`` the numbers are given and the texts of tokens are empty: engines say no more.
A line of JSONL or text gets a line of JSONL, a row of CSV itself with more columns.

Nothing here is drawn or read from a clock: the same answers give the same bytes.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from mixmerge.batch.lines import Input, Line
from mixmerge.batch.records import CHAT, Answer

_PLAIN = ("answer", "expert", "tokens_in", "tokens_out", "finish", "cost", "error")
_EXPLAINED = ("calls", "decision", "reason")
_LEAST_LOGPROB = -9999.0  # OpenAI's word for a token that cannot be; JSON has no infinity


class Form:
    """How the answers of a job are written.

    Args:
        job: it is scanned when the first line is written.
        created: seconds since 1970, of all answers; that of a job which is resumed is the first run's.
        key: what the ids of records are made from beside the line; by default the input's SHA-256.
        explain: write decisions, reasons, calls and costs too: in OpenAI's bodies under ``mixmerge``.
    """

    def __init__(self, job: Input, *, created: int, key: str = "", explain: bool = False) -> None:
        self.job, self.created, self.explain = job, created, explain
        self._key = key
        self._own = (*_PLAIN, *(_EXPLAINED if explain else ()))

    @cached_property
    def header(self) -> bytes:
        """What comes before all answers: of CSV the names of columns, else nothing."""
        return _row((*self.job.columns, *self.columns)) if self.job.format == "csv" else b""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Our columns of CSV; ``mixmerge_`` comes before a name that the input has."""
        taken, found = set(self.job.columns), []
        for name in ("line", *self._own):
            while name in taken:
                name = f"mixmerge_{name}"
            taken.add(name)
            found.append(name)
        return tuple(found)

    def record(self, line: Line, answer: Answer) -> bytes:
        """The answer to a line, as bytes with a line end; of CSV there may be more in it."""
        if self.job.format == "openai":
            return _json(self._openai(line, answer))
        values = self._plain(line, answer)
        if self.job.format != "csv":
            return _json({"id": line.id, "line": line.number, **values})
        cells = line.cells if line.cells is not None else ("",) * len(self.job.columns)
        return _row((*cells, str(line.number), *(_cell(value) for value in values.values())))

    def id(self, number: int) -> str:
        """Of the OpenAI record of a line."""
        return f"batch_req_{self.hash}{number:08x}"

    @cached_property
    def hash(self) -> str:
        """Of the job, as 24 hex digits."""
        return hashlib.sha256((self._key or self.job.sha256).encode("utf-8", "surrogatepass")).hexdigest()[
            :24
        ]

    def may_begin(self, data: bytes) -> bool:
        """Whether a record of this job that was cut off may look so: a file that is not ours is not taken for one.

        After a loss of power there may be zeros in place of what was written last.
        """
        start = {"openai": f'{{"id": "batch_req_{self.hash}', "csv": ""}.get(
            self.job.format, '{"id": "'
        ).encode()
        written = data.rstrip(b"\0")
        return written.startswith(start) or start.startswith(written)

    def number_of(self, record: bytes) -> int | None:
        """The number of the line that a record of this job answers; None if it is none."""
        try:
            if self.job.format == "csv":
                cells = next(csv.reader(io.StringIO(record.decode("utf-8"), newline=""), strict=True))
                wanted = len(self.job.columns) + len(self.columns)
                return int(cells[len(self.job.columns)]) if len(cells) == wanted else None
            given = json.loads(record)
            if self.job.format != "openai":
                return int(given["line"]) if given.keys() == {"id", "line", *self._own} else None
            number = int(given["id"].removeprefix(f"batch_req_{self.hash}"), 16)
            return number if given["id"] == self.id(number) else None
        except (ValueError, KeyError, TypeError, AttributeError, StopIteration, RecursionError, csv.Error):
            return None

    def _openai(self, line: Line, answer: Answer) -> dict[str, Any]:
        name = f"{self.hash}{line.number:08x}"
        fault = answer.fault
        status, error, body = 200, None, None
        if fault is None:
            body = self._body(line, answer, name)
        else:
            wrong = line.item is None
            status, code = (400, "invalid_request") if wrong else (500, "server_error")
            kind = "invalid_request_error" if wrong else "server_error"
            error = {"code": code, "message": str(fault)}
            body = {"error": {"message": str(fault), "type": kind, "param": _param(line), "code": code}}
        response = {"status_code": status, "request_id": f"req_{name}", "body": body}
        return {"id": self.id(line.number), "custom_id": line.id, "response": response, "error": error}

    def _body(self, line: Line, answer: Answer, name: str) -> dict[str, Any]:
        chat = line.item is None or line.item.url == CHAT
        choice: dict[str, Any] = {"index": 0}
        if chat:
            choice["message"] = {"role": "assistant", "content": answer.text, "refusal": None}
        else:
            choice["text"] = answer.text
        choice["logprobs"] = None if answer.logprobs is None else _logprobs(answer.logprobs, chat=chat)
        choice["finish_reason"] = answer.finish or "stop"
        body: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{name}",
            "object": "chat.completion" if chat else "text_completion",
            "created": self.created,
            "model": answer.expert or self.job.mixture,
            "choices": [choice],
            "usage": {
                "prompt_tokens": answer.tokens_in,
                "completion_tokens": answer.tokens_out,
                "total_tokens": answer.tokens_in + answer.tokens_out,
            },
            "system_fingerprint": None,
        }
        if self.explain:
            body["mixmerge"] = {"expert": answer.expert, "cost": answer.cost, **_explained(answer)}
        return body

    def _plain(self, line: Line, answer: Answer) -> dict[str, Any]:
        fault = answer.fault
        values: dict[str, Any] = {
            "answer": answer.text if fault is None else None,
            "expert": answer.expert,
            "tokens_in": answer.tokens_in,
            "tokens_out": answer.tokens_out,
            "finish": answer.finish,
            "cost": answer.cost,
            "error": None if fault is None else str(fault),
        }
        return values | (_explained(answer) if self.explain else {})


def _explained(answer: Answer) -> dict[str, Any]:
    return {"calls": answer.calls, "decision": dict(answer.decision), "reason": dict(answer.reason)}


def _param(line: Line) -> str | None:
    """The field that is wrong, if it is one."""
    if len(line.faults) != 1:
        return None
    return line.faults[0].where.removeprefix(f"line {line.number}").removeprefix(": ") or None


def _logprobs(values: Sequence[float], *, chat: bool) -> dict[str, Any]:
    finite = [value if math.isfinite(value) else _LEAST_LOGPROB for value in values]
    if not chat:
        return {"tokens": None, "token_logprobs": finite, "top_logprobs": None, "text_offset": None}
    tokens: list[dict[str, Any]] = [
        {"token": "", "logprob": value, "bytes": None, "top_logprobs": []} for value in finite
    ]
    return {"content": tokens, "refusal": None}


def _json(value: Mapping[str, Any]) -> bytes:
    # a lone surrogate of a tokenizer becomes \udc80, which is how JSON writes it
    return _dumped(value).encode("utf-8", "backslashreplace") + b"\n"


def _dumped(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """The same JSON value with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else _dumped(value)


def _row(cells: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    end = "\r\n"  # so that both are quoted in cells; rows end like lines of JSONL
    csv.writer(text, lineterminator=end).writerow(cells)
    return text.getvalue().removesuffix(end).encode("utf-8", "replace") + b"\n"
