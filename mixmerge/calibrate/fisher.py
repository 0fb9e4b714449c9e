"""The diagonal of an expert's Fisher information: squared gradients of its own predictions, row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.anatomy import Anatomy, Need, Shown
from mixmerge.data.batches import Batch
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import LoadedExpert

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.calibrate.sums import Sums


def add_fisher(
    expert: LoadedExpert,
    batches: Iterable[Batch],
    rows: Sequence[Row],
    seed: int,
    sums: Sums,
    *,
    together: bool = False,
) -> None:
    """Squared gradients of single lines: a sum over lines or classes before the square would keep cross terms.

    Args:
        expert: what is run.
        batches: of one line each, unless ``together``.
        rows: what the batches are of.
        seed: of drawn labels.
        sums: get the squares, and how many lines they are of.
        together: square the sum over all lines and classes of a batch, ``sum_i sum_k sqrt(p_ik) log p_ik`` of a
            classifier, as FusionBench and MergeLM do: cross terms and all.
    """
    import torch

    model = expert.model
    named = {name: value for name, value in model.named_parameters() if sums.wants(name)}
    device = str(next(model.parameters()).device)
    table = _table(model)
    for value in named.values():
        value.requires_grad_(True)
    try:
        for batch in batches:
            moved = batch.to(device)
            if expert.kind == "causal" and not moved.loss_mask[:, 1:].any():
                continue  # the answers were cut off
            logits = model(**moved.inputs()).logits.float()
            if expert.kind == "causal":
                lines = int(moved.loss_mask[:, 1:].any(1).sum())
                terms = [(_likelihood(logits, moved, rows, seed), 1.0)]
            else:
                lines = len(logits)
                terms = [term for line in logits for term in expectation(line, model.config)]
            if together:
                terms = [(sum(value * factor**0.5 for value, factor in terms), 1.0)]  # type: ignore[misc]
            looked_up = torch.unique(moved.input_ids)
            for number, (value, factor) in enumerate(terms):
                gradients = torch.autograd.grad(
                    value, list(named.values()), retain_graph=number < len(terms) - 1, allow_unused=True
                )
                for name, gradient in zip(named, gradients, strict=True):
                    if gradient is not None:
                        sums.add_square(name, gradient, factor, looked_up if name == table else None)
                del gradients, gradient  # or they are there until the next ones have been made
            for name in named:
                sums.counts[name] = sums.counts.get(name, 0) + lines
    finally:
        model.requires_grad_(False)
    if not sums.counts:
        raise MixmergeError(
            Fault(expert.name, "no row has a token to predict", "Longer max_tokens, or other rows")
        )
    for name, value in named.items():
        sums.values.setdefault(name, torch.zeros(value.shape, dtype=torch.float32))


def fisher_need(anatomy: Anatomy, shown: Shown) -> Need:
    """What ``add_fisher`` takes: the sum of squares is an array as large as each parameter, and so are the gradients.

    Gradients of one line are freed before those of the next are made. Logits are there as such, as log-likelihoods,
    as chances and as gradients of these.
    """
    model = 4 * anatomy.elements
    logits = 4 * 5 * shown.places * anatomy.vocabulary
    squares = 2 * 4 * anatomy.largest  # of one tensor, before they are added up
    return Need(
        {
            "expert": anatomy.loading,
            "squared gradients": model,
            "gradients": model + squares,
            "activations": anatomy.backward(shown) + logits,
        }
    )


def _table(model: Any) -> str:
    """The name of the embeddings that tokens alone look up; empty if a head has the same weights."""
    tokens = model.get_input_embeddings().weight
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is not None and head.weight is tokens:
        return ""
    return next((name for name, value in model.named_parameters() if value is tokens), "")


def _generator(seed: int, digests: Sequence[str]) -> Any:
    """Draws that depend on the seed and the row, not on what else there is."""
    import torch

    words = hashlib.sha256(f"{seed}:{':'.join(digests)}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(words[:8], "big") >> 1)


def _likelihood(logits: Tensor, batch: Batch, rows: Sequence[Row], seed: int) -> Tensor:
    """Log-likelihood of a batch whose scored tokens are drawn from the model itself: ``(B, L, vocabulary)`` to ``()``.

    A line's draws depend on the seed and its row alone; where lines hold several rows, on those of the batch.
    """
    owners = [[at] for at in batch.rows] if len(batch.rows) == len(logits) else [list(batch.rows)]
    size = len(logits) // len(owners)
    parts = [
        _drawn(logits[at * size : (at + 1) * size], batch.loss_mask[at * size : (at + 1) * size], generator)
        for at, generator in enumerate(_generator(seed, [rows[row].digest for row in own]) for own in owners)
    ]
    return sum(parts[1:], parts[0])


def _drawn(logits: Tensor, loss_mask: Tensor, generator: Any) -> Tensor:
    """Log-likelihood of lines whose scored tokens are drawn from the model itself.

    The draws of two places are independent and each has a score of mean zero, so the square of the sum has the
    expectation of the sum of the squares: one backward pass gives an unbiased Fisher of all places.

    Shapes:
        logits ``(B, L, vocabulary)``, loss_mask ``(B, L)``.
    """
    import torch

    scores = torch.log_softmax(logits[:, :-1][loss_mask[:, 1:]], -1)
    if not len(scores):
        return scores.sum()
    drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=generator).to(scores.device)
    return scores.gather(1, drawn).sum()


def expectation(logits: Tensor, config: Any) -> list[tuple[Tensor, float]]:
    """(what to differentiate, its factor): the exact expectation over the model's own labels of one line."""
    import torch

    if getattr(config, "problem_type", None) == "multi_label_classification":
        chances = torch.sigmoid(logits.detach())
        return [(logits[k], float(chances[k] * (1 - chances[k]))) for k in range(len(logits))]
    if len(logits) == 1:  # a regression: a normal variable of variance one around the output
        return [(logits[0], 1.0)]
    scores = torch.log_softmax(logits, -1)
    return [(scores[k], float(scores[k].detach().exp())) for k in range(len(scores))]
