"""Rows of text a model is shown: to calibrate a merge, to learn coefficients, to evaluate. One reader for all.

A row is one of ``{"text": ...}``, ``{"prompt": ..., "answer": ...}`` and ``{"messages": [...], "answer": ...}``, with
``choices`` and ``label`` where there are choices, ``{"text": ..., "label": 3}`` for a class. Other columns are ignored.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from mixmerge.data.sources import Broken, Found, found_rows
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices as known_names

COLUMNS = ("text", "text_pair", "prompt", "messages", "answer", "choices", "label", "id")
_SHOWN = ("text", "prompt", "messages")
_SHAPES = '{"text": ...}, {"prompt": ..., "answer": ...} or {"messages": [...], "answer": ...}'
_WORDS = ("text", "text_pair", "prompt", "answer")
_HALF = re.compile("[\ud800-\udfff]")  # JSON can hold them alone, where a text was cut; they have no bytes
_LABELS = 1 << 31
_MOST = 20  # faults of one source that are told; of more, how many


@dataclass(frozen=True)
class Row:
    """One example. Of ``text``, ``prompt`` and ``messages`` exactly one is given.

    Args:
        text: a document, or what a classifier reads.
        text_pair: what a classifier of pairs reads second.
        prompt: what an answer follows.
        messages: (role, content) of a chat, without the answer.
        answer: what should follow, as it is written; ``joined`` where it is one of the choices.
        choices: answers to choose from; ``label`` is the index of the right one, if it is known.
        label: a class of a classifier, or an index in ``choices``.
        id: a name of the row; the empty text if it has none.
    """

    text: str = ""
    text_pair: str | None = None
    prompt: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] = ()
    label: int | None = None
    id: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of what a model is shown: the texts and the choices, not label, answer, id or roles.

        White space between words does not count. A prompt, a text and a chat of one message that hold the same words
        have the same digest, so a row is found again in whichever form it comes.
        """
        contents = [content for _, content in self.messages] or [self.text or self.prompt]
        shown: list[Any] = [[_words(content) for content in contents]]
        shown.append(None if self.text_pair is None else _words(self.text_pair))
        shown.append([_words(choice) for choice in self.choices])
        return hashlib.sha256(json.dumps(shown, ensure_ascii=True).encode("ascii")).hexdigest()

    @property
    def known_by(self) -> tuple[str, ...]:
        """Digests by which the row is found again: its own, and that of what it asks without its choices."""
        return tuple(dict.fromkeys((self.digest, replace(self, choices=()).digest)))


class Known(Protocol):
    """A row, or what is made of one."""

    @property
    def known_by(self) -> tuple[str, ...]: ...


def digests_of(rows: Iterable[Known]) -> list[str]:
    """What all of these rows are known by, for a manifest."""
    return sorted({digest for row in rows for digest in row.known_by})


def _words(text: str) -> str:
    return " ".join(text.split())


def joined(prompt: str, choice: str) -> str:
    """A choice as it follows its prompt: behind a space, unless either brings one."""
    return choice if not prompt or prompt[-1].isspace() or choice[:1].isspace() else f" {choice}"


def read_rows(
    source: str | Path,
    *,
    split: str | None = None,
    limit: int | None = None,
    fields: Mapping[str, str] | None = None,
) -> tuple[Row, ...]:
    """Read rows, in the order they are stored.

    Args:
        source: a file (``.jsonl``, ``.ndjson``, ``.parquet``; ``.txt`` with a document a line), a folder with a file
            named for each split, ``builtin:code`` or ``builtin:docs``, or a data set of the Hugging Face hub,
            ``org/name`` or ``org/name:configuration``, read with the package ``datasets``.
        split: which part. Of a file: the rows whose column ``split`` says so, all of them if there is no such column.
            Of a folder or a data set of the hub: None is ``train``.
        limit: read no more than the first so many rows, 1 or more; ``sample_rows`` picks from all.
        fields: column of a row -> what it is called in the data, where that is another name.

    Raises:
        MixmergeError: the source is not there, holds no row, or holds bad rows: each with its line, all at once.
    """
    if limit is not None and limit < 1:
        raise MixmergeError(Fault("limit", f"is {limit}", "1 or more is allowed"))
    rows: list[Row] = []
    faults: list[Fault] = []
    splits: set[str] = set()
    filtered = False
    for found in found_rows(source, split=split):
        values = found.values
        if found.in_file and isinstance(values, Mapping) and isinstance(values.get("split"), str):
            splits.add(values["split"])
            if split is not None and values["split"] != split:
                filtered = True
                continue
        row = _row(found._replace(values=_renamed(values, fields or {})), faults)
        if row is not None:
            rows.append(row)
        if limit is not None and len(rows) + len(faults) >= limit:
            break
    if faults:
        more = [Fault(str(source), f"{len(faults) - _MOST:,} more faults like these")]
        raise MixmergeError([*faults[:_MOST], *(more if len(faults) > _MOST else [])])
    if not rows:
        what = f"holds no row of the split {split!r}" if filtered else "holds no rows"
        allowed = f"Its splits: {', '.join(sorted(splits))}" if filtered else f"A row is {_SHAPES}"
        raise MixmergeError(Fault(str(source), what, allowed))
    return tuple(rows)


def sample_rows(rows: Sequence[Row], count: int, *, seed: int = 0) -> tuple[Row, ...]:
    """``count`` of the rows (all, if there are no more), without those shown twice, in the order they are stored.

    Which ones depends on the rows and the seed alone: those whose hash with the seed is lowest. A row keeps its place
    in that ranking when others are added, so more examples are a superset of fewer.

    Args:
        rows: any number.
        count: 1 or more.
        seed: any whole number.
    """
    first: dict[str, int] = {}
    for at, row in enumerate(rows):
        first.setdefault(row.digest, at)
    rank = {at: hashlib.sha256(f"{seed}:{digest}".encode()).digest() for digest, at in first.items()}
    return tuple(rows[at] for at in sorted(sorted(rank, key=rank.__getitem__)[:count]))


def _renamed(values: Any, fields: Mapping[str, str]) -> Any:
    """The values of a row by the names of its columns; what is no mapping as it is."""
    if not isinstance(values, Mapping) or not fields:
        return values
    rest = {name: value for name, value in values.items() if name not in fields.values()}
    return {**rest, **{column: values[name] for column, name in fields.items() if name in values}}


def _row(found: Found, faults: list[Fault]) -> Row | None:
    values, where = found.values, found.where
    if not isinstance(values, Mapping):
        why = values.why if isinstance(values, Broken) else "is no mapping"
        faults.append(Fault(where, why, f"A row is {_SHAPES}"))
        return None
    given = {name: values[name] for name in COLUMNS if values.get(name) is not None}
    before = len(faults)
    _shape(given, list(map(str, values)), where, faults)
    for name in _WORDS:
        if name in given and not isinstance(given[name], str):
            faults.append(Fault(f"{where}, {name}", f"is {_show(given[name])}", "Text"))
    messages = _messages(given.get("messages"), where, faults)
    options = _options(given.get("choices"), where, faults)
    if half := next(filter(None, map(_HALF.search, _texts(given, messages, options))), None):
        faults.append(Fault(where, f"holds half of a character, {half[0]!r}", "Text of whole ones"))
    label = given.get("label")
    whole = isinstance(label, int) and not isinstance(label, bool)
    if label is not None and not (whole and 0 <= label < _LABELS):
        faults.append(Fault(f"{where}, label", f"is {_show(label)}", "A whole number from 0"))
    if len(faults) > before:
        return None
    answer = given.get("answer")
    if answer is None and messages and messages[-1][0] == "assistant":
        messages, answer = messages[:-1], messages[-1][1]
    row = Row(
        text=given.get("text", ""),
        text_pair=given.get("text_pair"),
        prompt=given.get("prompt", ""),
        messages=messages,
        answer=answer,
        choices=options,
        label=label,
        id=str(given.get("id", "")),
    )
    return _labelled(row, where, faults)


def _texts(
    given: Mapping[str, Any], messages: Iterable[tuple[str, str]], options: Iterable[str]
) -> Iterator[str]:
    """Everything of a row that a model may be shown."""
    yield from (given[name] for name in _WORDS if isinstance(given.get(name), str))
    yield from (text for message in messages for text in message)
    yield from options


def _shape(given: dict[str, Any], columns: list[str], where: str, faults: list[Fault]) -> None:
    """Exactly one of the three forms, and nothing empty where words should be."""
    shown = [name for name in _SHOWN if name in given]
    if not shown:
        hints = [hint for column in columns[:8] if (hint := known_names(column, list(_SHOWN)))]
        meant = next((hint.split("?")[0] + "? " for hint in hints if hint.startswith("Did")), "")
        has = f"it has {', '.join(columns[:8])}" if columns else "it is empty"
        faults.append(
            Fault(where, f"has neither text, prompt nor messages; {has}", f"{meant}A row is {_SHAPES}")
        )
    elif len(shown) > 1:
        faults.append(Fault(where, f"has {' and '.join(shown)}", f"One of them: a row is {_SHAPES}"))
    for name in ("text", "prompt"):
        if isinstance(given.get(name), str) and not given[name].strip():
            faults.append(Fault(f"{where}, {name}", "is empty", "Text"))
    if "text_pair" in given and "text" not in given and shown:
        faults.append(Fault(f"{where}, text_pair", "stands without text", "Beside text"))


def _messages(value: Any, where: str, faults: list[Fault]) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    allowed = 'A list of {"role": ..., "content": ...}, content being text'
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        faults.append(Fault(f"{where}, messages", f"is {_show(value)}", allowed))
        return ()
    pairs: list[tuple[str, str]] = []
    for at, message in enumerate(value):
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(role, str) and isinstance(content, str):
            pairs.append((role, content))
        else:
            faults.append(Fault(f"{where}, messages[{at}]", f"is {_show(message)}", allowed))
    if len(pairs) == 1 and pairs[0][0] == "assistant":
        faults.append(Fault(f"{where}, messages", "holds an answer alone", "At least one message before it"))
    return tuple(pairs)


def _options(value: Any, where: str, faults: list[Fault]) -> tuple[str, ...]:
    if value is None:
        return ()
    listed = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if len(listed) < 2 or not all(isinstance(choice, str) and choice for choice in listed):
        faults.append(Fault(f"{where}, choices", f"is {_show(value)}", "A list of at least two texts"))
        return ()
    if len(set(listed)) < len(listed):
        faults.append(Fault(f"{where}, choices", "has a choice twice", "Each choice once"))
    return tuple(listed)


def _labelled(row: Row, where: str, faults: list[Fault]) -> Row | None:
    """The row with its label and its answer both set, where there are choices and either is known."""
    if not row.choices:
        return row
    count = len(row.choices)
    if row.label is not None and row.label >= count:
        faults.append(
            Fault(f"{where}, label", f"is {row.label}, and there are {count} choices", f"0 to {count - 1}")
        )
        return None
    if row.answer is None:
        return row if row.label is None else replace(row, answer=row.choices[row.label])
    if row.answer not in row.choices:
        faults.append(Fault(f"{where}, answer", f"{_show(row.answer)} is none of the choices", "One of them"))
        return None
    right = row.choices.index(row.answer)
    if row.label is not None and row.label != right:
        what = f"names choice {right} ({_show(row.answer)}), and label is {row.label}"
        faults.append(Fault(f"{where}, answer", what, run="Correct one, or give one of them"))
        return None
    return replace(row, label=right)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
