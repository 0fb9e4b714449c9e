"""What the input of a job may be, and what a record of it says.

``openai``: a request of OpenAI's batch API on each line (``mixmerge.batch.formats_openai``).
``jsonl``: a text on each line, or an object with the text (``text``, ``query``, ``prompt``, ``question`` or a named
field) or the ``messages`` of a chat, and perhaps an ``id``, ``query_id`` or ``custom_id``. Its other texts and numbers
are metadata, as is all of an object ``metadata``; other lists and objects are left out.
``csv``: columns by the same names, the first row says them; all other columns are metadata.
``text``: a prompt on each line.

What has no id of its own gets the number of its line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mixmerge.batch.records import Item
from mixmerge.decision.lines import ID_FIELDS, TEXT_FIELDS, fields_of, no_text
from mixmerge.decision.parsing import parse_json, raw_lines
from mixmerge.decision.records import Query
from mixmerge.engines.records import Message, Request
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

Format = Literal["openai", "jsonl", "csv", "text"]
MAX_BYTES = 16_000_000  # of one record
_BY_SUFFIX: dict[str, Format] = {".csv": "csv", ".txt": "text"}
_LINES = ("", ".jsonl", ".ndjson")  # what their first line looks like
_READ = "OpenAI batch JSONL, JSONL, CSV and text with a prompt a line"
_LOOKED_AT = 64  # lines, until one is JSON
_MESSAGE_NEUTRAL: dict[str, tuple[object, ...]] = {
    "name": (None,),
    "refusal": (None,),
    "audio": (None,),
    "function_call": (None,),
    "tool_calls": (None, []),
    "annotations": (None, []),
}


@dataclass(frozen=True)
class Parsed:
    """What a record says.

    Args:
        id: that it gives itself; "" if none, or none that can be read.
        item: None if there are faults.
        faults: ``where`` is the field, "" for the whole record.
    """

    id: str
    item: Item | None
    faults: tuple[Fault, ...] = ()

    @classmethod
    def wrong(cls, what: str, allowed: str = "", *, id: str = "", where: str = "") -> Parsed:
        return cls(id, None, (Fault(where, what, allowed),))


def format_of(path: Path, given: str | None, *, called: str) -> Format:
    """The format that was named, or that the file's name or first lines tell.

    Raises:
        MixmergeError: there is no such format, or none that is read.
        OSError: the file cannot be read.
    """
    if given is not None:
        for name in get_args(Format):
            if name == given:
                return name  # type: ignore[no-any-return]
        raise MixmergeError(
            Fault("format", f"no format is called {given!r}", choices(given, [*get_args(Format)]))
        )
    suffix = path.suffix.lower()
    if suffix in _BY_SUFFIX:
        return _BY_SUFFIX[suffix]
    if suffix in (".tsv", ".parquet", ".json", ".yaml", ".yml", ".gz", ".zst", ".xlsx"):
        raise MixmergeError(Fault(called, f"jobs are not read from {suffix} files", _READ))
    with path.open("rb") as file:
        looked = 0
        for line in raw_lines(file, most=MAX_BYTES):
            text = line.text(errors="replace").strip()
            if not text:
                continue
            looked += 1
            if suffix not in _LINES[1:] and not text.startswith(("{", '"')):
                return "text"
            try:
                value = parse_json(text)
            except ValueError:
                value = None
            if isinstance(value, dict):
                return "openai" if "body" in value and "custom_id" in value else "jsonl"
            if value is not None or looked == _LOOKED_AT:
                break
    return "jsonl"


def parse_object(text: str, *, number: int, field: str | None) -> Parsed:
    """The request in a line of JSONL."""
    try:
        given = parse_json(text)
    except ValueError as error:
        return Parsed.wrong(f"is not JSON: {error}", "An object or a string")
    if isinstance(given, str):
        return checked(Item(str(number), turn_of(given)), where={"prompt": ""}, named="")
    if not isinstance(given, dict):
        return Parsed.wrong(f"is JSON, but {kind(given)}", "An object or a string")
    try:
        found = fields_of(given, field=field)
    except MixmergeError as error:
        return Parsed("", None, _moved(error, ""))
    name = found.id or str(number)
    if field == "messages" or (field is None and found.text is None and given.get("messages") is not None):
        turns, faults = messages(given.get("messages"), where="messages")
        if faults:
            return Parsed(found.id, None, tuple(faults))
        item = Item(name, turns, metadata=found.metadata)
        return checked(item, where={"prompt": "messages"}, named=found.id)
    if not isinstance(found.text, str):
        fault = no_text(dict.fromkeys(list(given)[:20]), found, field=field)
        return Parsed.wrong(fault.what, f"{fault.allowed}. {fault.run}", id=found.id)
    item = Item(name, turn_of(found.text), metadata=found.metadata)
    return checked(item, where={"prompt": found.name}, named=found.id)


@dataclass(frozen=True)
class Columns:
    """Which column of a CSV file is what."""

    names: tuple[str, ...]
    text: int
    id: int | None

    @classmethod
    def of(cls, names: Sequence[str], *, where: str, field: str | None) -> Columns:
        """The columns that the first row names.

        Raises:
            MixmergeError: a name is there twice, or none has the text.
        """
        faults = [
            Fault(where, f"has the column {name!r} twice")
            for name, times in Counter(names).items()
            if times > 1
        ]
        text = next((name for name in ((field,) if field else TEXT_FIELDS) if name in names), None)
        if text is None:
            what = f"has no column {field!r}" if field else "has no column of texts"
            allowed = f"Columns here: {', '.join(names)}. Usual names: {', '.join(TEXT_FIELDS)}"
            faults.append(Fault(where, what, allowed, "Name it with --field"))
        if faults or text is None:
            raise MixmergeError(faults)
        id_name = next((name for name in ID_FIELDS if name in names and name != text), None)
        return cls(tuple(names), names.index(text), None if id_name is None else names.index(id_name))


def parse_row(cells: Sequence[str], columns: Columns, *, number: int) -> Parsed:
    """The request in a row of CSV."""
    named = "" if columns.id is None else "".join(cells[columns.id : columns.id + 1])
    if len(cells) != len(columns.names):
        what = f"has {len(cells):,} cells"
        return Parsed.wrong(what, f"The first row has {len(columns.names):,} columns", id=named)
    metadata = {
        name: cell
        for at, (name, cell) in enumerate(zip(columns.names, cells, strict=True))
        if at not in (columns.text, columns.id)
    }
    item = Item(named or str(number), turn_of(cells[columns.text]), metadata=metadata)
    return checked(item, where={"prompt": columns.names[columns.text]}, named=named)


def parse_text(line: str, *, number: int) -> Parsed:
    """The request in a line of text."""
    return checked(Item(str(number), turn_of(line.rstrip("\r\n"))), where={"prompt": ""}, named="")


def turn_of(text: str) -> tuple[Message, ...]:
    """A text that is asked: a user's turn. Nothing at all if it is empty, which is a fault."""
    return (Message("user", text),) if text else ()


def messages(given: Any, *, where: str) -> tuple[tuple[Message, ...], list[Fault]]:
    """The turns of a chat, and what is wrong with them.

    The role ``developer`` is that of newer models for ``system``, and taken for it. A content in several parts is
    their texts with line ends between, as vLLM joins them for templates that take texts.
    """
    if not isinstance(given, list):
        return (), [Fault(where, f"is {kind(given)}", "A list of messages")]
    turns, faults = [], []
    for at, one in enumerate(given):
        path = f"{where}[{at}]"
        if not isinstance(one, dict):
            faults.append(Fault(path, f"is {kind(one)}", "An object with role and content"))
            continue
        faults += [
            Fault(f"{path}.{name[:40]}", "is not supported", "Fields: role, content")
            for name, value in one.items()
            if name not in ("role", "content")
            and not any(same(value, fine) for fine in _MESSAGE_NEUTRAL.get(name, ()))
        ]
        role = one.get("role")
        if not isinstance(role, str):
            faults.append(Fault(f"{path}.role", f"is {kind(role)}", "A text"))
        content, wrong = _content(one.get("content"), f"{path}.content")
        faults += wrong
        turns.append(Message("system" if role == "developer" else str(role)[:40], content))
    return tuple(turns), faults


def _content(given: Any, where: str) -> tuple[str, list[Fault]]:
    if isinstance(given, str):
        return given, []
    if not isinstance(given, list):
        return "", [Fault(where, f"is {kind(given)}", "A text, or a list of parts with texts")]
    texts, faults = [], []
    for at, part in enumerate(given):
        sort = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, dict) and sort == "text" and isinstance(part.get("text"), str) and len(part) == 2:
            texts.append(part["text"])
        else:
            what = (
                f"is of type {sort!r:.40}" if isinstance(sort, str) and sort != "text" else "is no text part"
            )
            faults.append(Fault(f"{where}[{at}]", what, "Text parts only: {type: text, text: ...}"))
    return "\n".join(texts), faults


def checked(item: Item, *, where: Mapping[str, str], named: str) -> Parsed:
    """The item, or what the engines and the router would say of it.

    Args:
        where: fields of an engine's request to what the input calls them.
        named: the id that it gives itself.
    """
    given = item.settings
    faults: tuple[Fault, ...] = ()
    try:
        Request(
            "",
            item.prompt,
            max_new_tokens=_or(given.max_new_tokens, Request.max_new_tokens),
            temperature=_or(given.temperature, Request.temperature),
            top_p=_or(given.top_p, Request.top_p),
            stop=_or(given.stop, Request.stop),
            seed=_or(given.seed, Request.seed),
        )
    except MixmergeError as error:
        faults = _moved(error, "request : ", where)
    if item.expert is None and item.prompt:
        try:
            Query(item.text, id=item.id, metadata=item.metadata)
        except MixmergeError as error:
            faults += tuple(Fault(where["prompt"], one.what, one.allowed, one.run) for one in error.faults)
    return Parsed(named, None if faults else item, faults)


def _or(given: Any, default: Any) -> Any:
    return default if given is None else given


def _moved(error: MixmergeError, prefix: str, where: Mapping[str, str] | None = None) -> tuple[Fault, ...]:
    """Faults with the names of the input's fields."""
    moved = []
    for one in error.faults:
        name, bracket, rest = one.where.removeprefix(prefix).partition("[")
        place = "" if where is None else f"{where.get(name, name)}{bracket}{rest}"
        moved.append(Fault(place, one.what, one.allowed, one.run))
    return tuple(moved)


def same(value: object, other: object) -> bool:
    """Equal as JSON values: true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def kind(value: object) -> str:
    """What a JSON value is, for a message; not its content."""
    if value is None:
        return "nothing"
    names = {bool: "true or false", str: "a text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number")
