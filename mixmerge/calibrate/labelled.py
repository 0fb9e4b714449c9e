"""Cross-entropy of a merged model on rows with answers or labels: the batches, and what is minimised.

Shapes: B rows of a batch, L tokens, N labelled positions, H hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.calibrate.attention import quick_attention
from mixmerge.calibrate.objectives import POSITIONS, Schedule, grouped, scheduled
from mixmerge.calibrate.students import capped
from mixmerge.data.batches import Batch, Task, make_batches, tokenised
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MethodError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Labelled:
    """The sum over experts of the mean cross-entropy of the merged model on their rows.

    Source: FusionBench's variant of AdaMerging for Llama, which minimises a language model's own loss.

    Args:
        score: of batch ``number`` of ``expert``, the sum of the cross-entropies of its labels.
        labels: of each batch, by expert: labelled tokens, or rows of a classifier; at least 1.
        tokens: of each batch, by expert.
        schedule: of the batches. The mean is over all labels of an expert in a step, however they share batches.
    """

    score: Callable[[int, int], Tensor]
    labels: Sequence[Sequence[int]]
    tokens: Sequence[Sequence[int]]
    schedule: Schedule

    def losses(self, step: int) -> Iterator[Tensor]:
        yield from grouped(scheduled(self.schedule, self.tokens, step, self._loss))

    def notes(self) -> tuple[str, ...]:
        return ()

    def _loss(self, expert: int, number: int, numbers: Sequence[int]) -> Tensor:
        return self.score(expert, number) / sum(self.labels[expert][one] for one in numbers)


def answer_loss(model: Any, batch: Batch) -> Tensor:
    """The sum of the cross-entropies of the tokens that ``loss_mask`` marks, of a causal language model."""
    import torch
    from torch.utils.checkpoint import checkpoint

    batch = batch.to(str(model.device))
    # A token is predicted by the state before it.
    wanted = batch.loss_mask[:, 1:]
    with quick_attention(model, batch.input_ids.shape[1]):
        states = model.base_model(**batch.inputs(), use_cache=False).last_hidden_state
    final = states[:, :-1][wanted]  # (N, H)
    tokens = batch.input_ids[:, 1:][wanted]  # (N,)

    def part(some: Tensor, right: Tensor) -> Tensor:
        logits = capped(model.config, model.get_output_embeddings()(some)).float()  # (N, V)
        return torch.nn.functional.cross_entropy(logits, right, reduction="sum")

    # Logits of all positions would take more memory than the model: each part's are made again on the way back.
    sums: Any = sum(
        checkpoint(part, final[at : at + POSITIONS], tokens[at : at + POSITIONS], use_reentrant=False)
        for at in range(0, len(final), POSITIONS)
    )
    return sums  # type: ignore[no-any-return]


def label_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The sum over rows of the cross-entropies of their labels, by logits (B, C); every row has a label."""
    import torch

    labels: Any = batch.labels
    return torch.nn.functional.cross_entropy(logits.float(), labels.to(logits.device), reduction="sum")


def labelled_batches(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    task: Task,
    max_tokens: int,
    batch_size: int,
    layout: Literal["padded", "packed"] = "padded",
) -> tuple[Batch, ...]:
    """Rows with labels as batches; for a language model, rows whose answer begins beyond ``max_tokens`` are left out.

    Of a language model, text that is no prompt is its own answer: all tokens but the first are labels.

    Raises:
        MethodError: rows have no label (of a language model: a prompt, and no answer), or no label fits.
        MixmergeError: as ``make_batches``.
    """
    if task == "classifier":
        lacking = sum(row.label is None for row in rows)
        what, allowed = "have no label", "Every row of a classifier has the number of its class as label"
        run = "Add labels, or use adamerging, which needs none"
    else:
        asks = [row for row in rows if row.prompt or row.messages or row.choices]
        lacking = sum(row.answer is None for row in asks)
        what, allowed = "have a prompt and no answer", "Rows with prompt and answer, or plain text"
        run = "Add answers, or use expert_merging, which needs none"
    if lacking:
        raise MethodError(Fault("calibration", f"{lacking:,} of {len(rows):,} rows {what}", allowed, run))
    kept = list(rows)
    if task == "causal":
        lines = tokenised(rows, tokenizer, max_tokens=max_tokens)
        kept = [rows[line.row] for line in lines if line.answer_from < len(line.ids)]
        if not kept:
            what = f"none of {len(rows):,} rows has an answer that begins within {max_tokens} tokens"
            raise MethodError(Fault("calibration", what, "Shorter prompts, or more max_tokens"))
    return make_batches(
        kept, tokenizer, task=task, max_tokens=max_tokens, batch_size=batch_size, layout=layout
    )


def label_counts(batches: Sequence[Batch]) -> list[int]:
    """Of each batch, its labels: tokens of answers, or the rows of a classifier."""
    return [
        int(batch.loss_mask[:, 1:].sum()) if batch.labels is None else len(batch.labels) for batch in batches
    ]


def not_shown(label: str, rows: Sequence[Row], batches: Sequence[Batch]) -> tuple[str, ...]:
    """A note on the rows that ``labelled_batches`` has left out, if there are any."""
    count = len(rows) - sum(len(batch.rows) for batch in batches)
    what = f"{label}: {count:,} of {len(rows):,} rows are left out: no token of an answer fits in max_tokens"
    return (what,) if count else ()


def check_classes(labels: Sequence[str], classes: Sequence[int], shown: Sequence[Sequence[Batch]]) -> None:
    """Raise unless every label is one of the classes that the expert's head tells apart.

    Args:
        labels: of the experts, for errors.
        classes: C of each expert's head.
        shown: batches of each expert.

    Raises:
        MethodError: once for each expert whose rows have others.
    """
    faults = []
    for label, count, batches in zip(labels, classes, shown, strict=True):
        most = max(int(batch.labels.max()) for batch in batches if batch.labels is not None)
        if most >= count:
            what = f"a row has label {most}, and its head tells {count} classes apart"
            faults.append(Fault(label, what, f"0 to {count - 1}"))
    if faults:
        raise MethodError(faults)
