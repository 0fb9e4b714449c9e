"""Rows to batches of tokens, with masks that say which are real and which are to be predicted.

Shapes: B lines, L tokens in the longest of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.data.rows import Row, joined
from mixmerge.errors import Fault, MixmergeError

if TYPE_CHECKING:
    from torch import Tensor

Task = Literal["causal", "classifier"]
_SHOWN = 5
# Models whose first position is the one after the padding token's number.
_COUNTS_FROM_PADDING = re.compile("roberta|camembert|mpnet")


@dataclass(frozen=True)
class Batch:
    """Lines of tokens. Real tokens come first, padding after them.

    Args:
        input_ids: (B, L), whole numbers.
        attention_mask: (B, L), 1 for a real token.
        loss_mask: (B, L), true for a token to be predicted from those before it: an answer's; without an answer all
            but the first. All false for a classifier.
        labels: (B,), where every row of the batch has a label; else None.
        rows: of every row in the batch, its index; a packed line holds several.
        token_type_ids: (B, L), where the tokenizer tells the two texts of a pair apart.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    labels: Tensor | None
    rows: tuple[int, ...]
    token_type_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.attention_mask.sum())

    def inputs(self) -> dict[str, Tensor]:
        """What a model of transformers is called with."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return given if self.token_type_ids is None else {**given, "token_type_ids": self.token_type_ids}

    def to(self, device: str) -> Batch:
        """The same on another device."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.loss_mask.to(device),
            None if self.labels is None else self.labels.to(device),
            self.rows,
            None if self.token_type_ids is None else self.token_type_ids.to(device),
        )


@dataclass(frozen=True)
class Line:
    """The tokens of one row: ``row`` is its index, ``answer_from`` the first token of its answer."""

    row: int
    ids: tuple[int, ...]
    answer_from: int
    types: tuple[int, ...] = ()
    label: int | None = None


def padding(tokenizer: Any) -> int:
    """The token that fills up lines."""
    return 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def context_of(config: Any, tokenizer: Any) -> int:
    """Tokens a model takes at most, as its config and tokenizer say; positions beyond have no embedding."""
    inner = config.get_text_config()
    places = getattr(inner, "max_position_embeddings", None)
    if isinstance(places, int) and _COUNTS_FROM_PADDING.search(inner.model_type):
        places -= int(getattr(inner, "pad_token_id", 0) or 0) + 1
    said = (places, getattr(tokenizer, "model_max_length", None))
    return min([int(most) for most in said if isinstance(most, int) and most > 0], default=1 << 30)


def make_batches(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    task: Task = "causal",
    max_tokens: int = 512,
    batch_size: int = 8,
    layout: Literal["padded", "packed"] = "padded",
    order: Literal["given", "length"] = "given",
) -> tuple[Batch, ...]:
    """All rows as batches, the same for the same rows.

    Args:
        rows: any number.
        tokenizer: of transformers; a fast one, where a row has an answer.
        task: ``causal``: text, prompt or chat, and the answer after it. ``classifier``: text and its pair as the
            tokenizer joins them; a prompt counts as text, an answer is left out.
        max_tokens: of a line, 2 or more; what is longer is cut at its end.
        batch_size: lines in a batch, 1 or more.
        layout: ``padded``: a row a line. ``packed``: rows one after the other, an end token between them, in lines of
            ``max_tokens``; a token then sees the rows before its own. Causal only.
        order: ``given``, or ``length``: shortest first, which pads least.

    Raises:
        MixmergeError: a chat and no chat template; no row gives two tokens (one, for a classifier); ``packed`` rows
            for a classifier.
    """
    lines = list(tokenised(rows, tokenizer, task=task, max_tokens=max_tokens))
    if not lines:
        least = "one token" if task == "classifier" else "two tokens"
        raise MixmergeError(Fault("calibration", f"none of {len(rows)} rows gives {least}", "Longer texts"))
    if layout == "packed":
        if task == "classifier":
            raise MixmergeError(
                Fault("calibration.layout", "packed is for language models", "padded for classifiers")
            )
        packed = _packed(lines, tokenizer, max_tokens)
        return tuple(
            _batch(packed[at : at + batch_size], tokenizer) for at in range(0, len(packed), batch_size)
        )
    if order == "length":
        lines.sort(key=lambda line: len(line.ids))
    groups = ([[line] for line in lines[at : at + batch_size]] for at in range(0, len(lines), batch_size))
    return tuple(_batch(group, tokenizer, labelled=task == "classifier") for group in groups)


def tokenised(
    rows: Sequence[Row], tokenizer: Any, *, task: Task = "causal", max_tokens: int = 512
) -> Iterator[Line]:
    """The tokens of every row that is long enough to say anything: two, for a classifier one.

    Raises:
        MixmergeError: as in ``make_batches``.
    """
    chats = [str(at) for at, row in enumerate(rows) if row.messages]
    if chats and task == "causal" and not getattr(tokenizer, "chat_template", None):
        what = f"the tokenizer has no chat template, and {len(chats)} rows are chats ({', '.join(chats[:_SHOWN])})"
        raise MixmergeError(
            Fault("calibration", what, "Rows of text or prompt", "Or add a chat_template.jinja")
        )
    for at, row in enumerate(rows):
        line = (
            _classified(at, row, tokenizer, max_tokens)
            if task == "classifier"
            else _written(at, row, tokenizer)
        )
        cut = Line(at, line.ids[:max_tokens], line.answer_from, line.types[:max_tokens], line.label)
        if len(cut.ids) >= (1 if task == "classifier" else 2):
            yield cut


def _classified(at: int, row: Row, tokenizer: Any, max_tokens: int) -> Line:
    text = row.text or row.prompt or "\n".join(content for _, content in row.messages)
    # The tokenizer cuts, so that the tokens that end a text are kept.
    found = tokenizer(text, row.text_pair, truncation=True, max_length=max_tokens)
    types = tuple(found.get("token_type_ids") or ()) if row.text_pair is not None else ()
    return Line(at, tuple(found["input_ids"]), len(found["input_ids"]), types, row.label)


def _written(at: int, row: Row, tokenizer: Any) -> Line:
    """What a language model reads, and where the answer in it begins."""
    special = not row.messages  # a template writes its own
    if row.messages:
        chat = [{"role": role, "content": content} for role, content in row.messages]
        shown = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    else:
        shown = row.prompt or "\n".join(filter(None, (row.text, row.text_pair)))
    if row.answer is None:
        return Line(at, tuple(tokenizer(shown, add_special_tokens=special)["input_ids"]), 1)
    answer = joined(shown, row.answer) if row.choices and not row.messages else row.answer
    if not tokenizer.is_fast:
        before = _opened(tokenizer(shown, add_special_tokens=special)["input_ids"], tokenizer)
        after = tokenizer(answer, add_special_tokens=False)["input_ids"]
        return Line(at, (*before, *after), max(1, len(before)))
    found = tokenizer(shown + answer, add_special_tokens=special, return_offsets_mapping=True)
    # Of a token across the border, the end counts: it says something of the answer.
    ends = [end for _, end in found["offset_mapping"]]
    first = next((place for place, end in enumerate(ends) if end > len(shown)), len(ends))
    return Line(at, tuple(found["input_ids"]), max(1, first))


def _opened(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens without one that ends a text, which has no place before an answer."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if ids and ids[-1] in ends else ids


def _packed(lines: Sequence[Line], tokenizer: Any, max_tokens: int) -> list[list[Line]]:
    """Rows to lines of at most ``max_tokens``; a row that does not fit in the rest of a line begins the next."""
    end = tokenizer.eos_token_id
    packed: list[list[Line]] = []
    used = max_tokens
    for line in lines:
        closed = line if end is None or len(line.ids) >= max_tokens else _closed(line, int(end))
        if used + len(closed.ids) > max_tokens:
            packed.append([])
            used = 0
        packed[-1].append(closed)
        used += len(closed.ids)
    return packed


def _closed(line: Line, end: int) -> Line:
    ids = line.ids if line.ids[-1] == end else (*line.ids, end)
    return Line(line.row, ids, line.answer_from, line.types, line.label)


def _batch(lines: Sequence[Sequence[Line]], tokenizer: Any, *, labelled: bool = False) -> Batch:
    """Each of ``lines`` is what stands in one line."""
    import torch

    length = max(sum(len(part.ids) for part in parts) for parts in lines)
    pad = padding(tokenizer)
    ids = torch.full((len(lines), length), pad, dtype=torch.int64)
    mask = torch.zeros((len(lines), length), dtype=torch.int64)
    loss = torch.zeros((len(lines), length), dtype=torch.bool)
    types = torch.zeros((len(lines), length), dtype=torch.int64)
    for number, parts in enumerate(lines):
        at = 0
        for part in parts:
            stop = at + len(part.ids)
            ids[number, at:stop] = torch.tensor(part.ids)
            mask[number, at:stop] = 1
            loss[number, min(at + part.answer_from, stop) : stop] = not labelled
            if part.types:
                types[number, at:stop] = torch.tensor(part.types)
            at = stop
    flat = [part for parts in lines for part in parts]
    labels = [part.label for part in flat]
    known = labelled and all(label is not None for label in labels)
    paired = any(part.types for part in flat)
    return Batch(
        ids,
        mask,
        loss,
        torch.tensor(labels) if known else None,
        tuple(part.row for part in flat),
        types if paired else None,
    )
