"""What the glue learns from: prompts and answers, as each expert reads them, and which of them are held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mixmerge.data.rows import Row
from mixmerge.engines.records import Message
from mixmerge.errors import Fault, MixmergeError
from mixmerge.latent.offsets import Reader, TooLong
from mixmerge.latent.records import Mode, Reading

_MOST = 10  # rows of one fault that are named


@dataclass(frozen=True)
class Example:
    """A prompt and what should follow.

    Args:
        prompt: text, or the turns of a chat.
        answer: not empty.
        digest: of the prompt, as ``Row.digest``.
        known_by: as ``Row.known_by``.
    """

    prompt: str | tuple[Message, ...]
    answer: str
    digest: str
    known_by: tuple[str, ...]


def examples_of(rows: Sequence[Row], where: str) -> tuple[Example, ...]:
    """Rows as examples.

    Raises:
        MixmergeError: rows without an answer, or with another text beside the prompt.
    """
    lacking = [at for at, row in enumerate(rows, 1) if not row.answer]
    pairs = [at for at, row in enumerate(rows, 1) if row.text_pair is not None]
    faults = []
    if lacking:
        what = f"{_named(lacking)} no answer, and the glue learns from answers"
        faults.append(Fault(where, what, '{"prompt": ..., "answer": ...}, or a chat with an answer'))
    if pairs:
        faults.append(Fault(where, f"{_named(pairs)} a text_pair, which no language model is shown"))
    if faults:
        raise MixmergeError(faults)
    return tuple(Example(_prompt(row), str(row.answer), row.digest, row.known_by) for row in rows)


def _prompt(row: Row) -> str | tuple[Message, ...]:
    if row.messages:
        return tuple(Message(role, content) for role, content in row.messages)
    return row.prompt or row.text


def _named(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:_MOST])) + (", ..." if len(rows) > _MOST else "")
    return f"{len(rows):,} rows ({shown}) have" if len(rows) > 1 else f"row {shown} has"


def hold_out(digests: Sequence[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Places of the rows to learn from, and of those that are held out.

    Rows of one digest are on one side. Which are held out depends on digests and seed alone: those whose hash with the
    seed is lowest, so that a row stays where it is when others are added, as far as the share allows.

    Args:
        digests: of the rows.
        share: of them, 0 to below 1; above 0 it is one at least, but never all.
        seed: any whole number.
    """
    every = sorted(set(digests), key=lambda one: hashlib.sha256(f"{seed}:{one}".encode()).digest())
    count = 0 if share == 0 else min(len(every) - 1, max(1, round(share * len(every))))
    held = set(every[:count])
    return (
        [at for at, one in enumerate(digests) if one not in held],
        [at for at, one in enumerate(digests) if one in held],
    )


class Texts:
    """Examples as experts read them; each reading is made once.

    Args:
        readers: of every expert.
        examples: any number.
        mode: how peers follow an answer.
        too_long: what a peer does with a prompt longer than its context.
    """

    def __init__(
        self,
        readers: Mapping[str, Reader],
        examples: Sequence[Example],
        *,
        mode: Mode,
        too_long: TooLong,
    ) -> None:
        self.examples, self._readers, self._mode, self._too_long = examples, readers, mode, too_long
        self._primary: dict[tuple[str, int], Reading] = {}
        self._peer: dict[tuple[str, int, str], Reading] = {}

    def primary(self, expert: str, row: int) -> Reading:
        """A row as its primary reads and says it.

        Raises:
            MixmergeError: the expert cannot be shown it, or it is too long.
        """
        key = (expert, row)
        if key not in self._primary:
            one, reader = self.examples[row], self._readers[expert]
            self._primary[key] = reader.with_answer(one.prompt, one.answer, role="primary")
        return self._primary[key]

    def peer(self, expert: str, row: int, primary: str) -> Reading:
        """A row as a peer reads it while the primary answers.

        Raises:
            MixmergeError: the expert cannot be shown it, or it is too long.
        """
        key = (expert, row, "" if self._mode == "prompt" else primary)
        if key not in self._peer:
            one, reader = self.examples[row], self._readers[expert]
            if self._mode == "prompt":
                found = reader.prompt(one.prompt, too_long=self._too_long)
            else:
                found = reader.with_answer(
                    one.prompt, self._said(primary, row), role="peer", too_long=self._too_long, end=False
                )
            self._peer[key] = found
        return self._peer[key]

    def _said(self, primary: str, row: int) -> str:
        """The answer as the primary's tokens say it."""
        reading, reader = self.primary(primary, row), self._readers[primary]
        ids = list(reading.ids[reading.answer_from :])
        if ids and ids[-1] == reader.tokenizer.eos_token_id:
            ids.pop()
        return reader.said(ids)

    def faults(self, pairs: Sequence[tuple[str, Sequence[str]]], where: str, rows: range) -> Iterator[Fault]:
        """What keeps experts from reading rows: each is read.

        Args:
            pairs: every expert that may be a primary, and who may be its peers.
            where: for messages.
            rows: which ones; messages count from the first of them.
        """
        said: dict[tuple[str, str], tuple[Fault, list[int]]] = {}

        def note(expert: str, error: MixmergeError, row: int) -> None:
            for fault in error.faults:
                said.setdefault((expert, fault.run or fault.allowed), (fault, []))[1].append(
                    row - rows.start + 1
                )

        for row in rows:
            for primary, peers in pairs:
                try:
                    self.primary(primary, row)
                except MixmergeError as error:
                    note(primary, error, row)
                    continue
                for peer in peers:
                    try:
                        self.peer(peer, row, primary)
                    except MixmergeError as error:
                        note(peer, error, row)
        for (expert, _), (fault, named) in said.items():
            places = sorted(set(named))
            shown = ", ".join(map(str, places[:_MOST])) + (", ..." if len(places) > _MOST else "")
            at = f"{where}: {'row' if len(places) == 1 else f'{len(places):,} rows,'} {shown}, as {expert} reads it"
            yield Fault(at, fault.what, fault.allowed, fault.run or "Leave such rows out")
