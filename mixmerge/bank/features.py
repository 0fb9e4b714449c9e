"""Features of prompts that a gate reads: means of a model's hidden states over the tokens that are no padding.

Legend as in ``mixmerge.bank.gate``; N rows, L tokens in the longest of a batch, K tokens that are kept of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixmerge.data.batches import Batch, context_of, make_batches
from mixmerge.data.rows import Row
from mixmerge.experts.encoding import mean_of
from mixmerge.experts.loading import LoadedExpert, check_tokenizer

Told = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Shown:
    """What a model makes of rows.

    Args:
        values: ``(N, f)``, or of tokens ``(N * K, f)`` at most, float32.
        rows: which row each is of; rows that give no tokens are in none.
    """

    values: Tensor
    rows: tuple[int, ...]


def prompts(rows: Sequence[Row]) -> list[Row]:
    """The rows as a gate meets them: without the answers that are not there yet."""
    return [replace(row, answer=None, choices=(), label=None) for row in rows]


def features_of(
    model: LoadedExpert,
    rows: Sequence[Row],
    *,
    max_tokens: int = 512,
    batch_size: int = 8,
    tokens: int = 0,
    layers: bool = False,
    unit: bool = False,
    progress: Told | None = None,
) -> Shown:
    """Features of rows' prompts.

    Args:
        model: whose last hidden states they are.
        rows: text, prompts or chats.
        max_tokens: of a row; the rest is cut off.
        batch_size: rows in a batch. Nothing depends on it but the rounding.
        tokens: of each row the states of so many single tokens, evenly spread, in place of their mean; 0: the mean.
        layers: the states of all layers side by side, the embeddings' first.
        unit: of length 1, as features of text are.
        progress: called with (rows done, rows in all).

    Raises:
        MixmergeError: no tokenizer; a chat and no template; no row that gives tokens.
    """
    check_tokenizer(model.tokenizer, model.name)
    most = min(max_tokens, context_of(model.model.config, model.tokenizer))
    batches = make_batches(
        prompts(rows), model.tokenizer, task="causal" if model.kind == "causal" else "classifier",
        max_tokens=most, batch_size=batch_size, order="length",
    )  # fmt: skip
    values, owners, done = [], [], 0
    for batch, hidden in _states(model, batches, layers):
        mask = batch.attention_mask.bool()
        if tokens:
            found, places = _spread(hidden, mask, tokens)
            owners += [batch.rows[place] for place in places]
        else:
            found = mean_of(hidden, mask)
            owners += list(batch.rows)
        values.append(found.cpu())
        done += len(batch.rows)
        if progress is not None:
            progress(done, len(rows))
    whole = torch.cat(values)
    return Shown(torch.nn.functional.normalize(whole, dim=-1) if unit else whole, tuple(owners))


def states_of(output: Any, layers: bool) -> Tensor:
    """``(B, L, h)``: the last hidden states in what a trunk gives; of all layers ``(B, L, (layers + 1) * h)``."""
    found: Tensor = torch.cat(output.hidden_states, dim=-1) if layers else output.last_hidden_state
    return found


def _states(model: LoadedExpert, batches: Sequence[Batch], layers: bool) -> Iterator[tuple[Batch, Tensor]]:
    trunk: Any = model.model.base_model
    device = str(next(trunk.parameters()).device)
    with torch.no_grad():
        for batch in batches:
            on = batch.to(device)
            yield on, states_of(trunk(**on.inputs(), output_hidden_states=layers), layers)


def _spread(hidden: Tensor, mask: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """At most ``count`` tokens of each row, evenly spread, and whose row each is of in the batch."""
    found, places = [], []
    for place, length in enumerate(mask.sum(1).tolist()):
        most = min(count, length)
        at = torch.linspace(0, length - 1, most).round().long()  # no place twice: no more of them than tokens
        found.append(hidden[place, at.to(hidden.device)].float())
        places += [place] * len(at)
    return torch.cat(found), places
