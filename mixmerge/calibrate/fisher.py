"""The diagonal of an expert's Fisher information: squared gradients of its own predictions, row by row."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    for value in named.values():
        value.requires_grad_(True)
    try:
        with _looked_up(model, named) as table:
            for batch in batches:
                moved = batch.to(device)
                if expert.kind == "causal" and not moved.loss_mask[:, 1:].any():
                    continue  # the answers were cut off
                table.seen.clear()
                logits = model(**moved.inputs()).logits.float()
                if expert.kind == "causal":
                    lines = int(moved.loss_mask[:, 1:].any(1).sum())
                    terms = [(_likelihood(logits, moved, rows, seed), 1.0)]
                else:
                    lines = len(logits)
                    terms = [term for line in logits for term in expectation(line, model.config)]
                if together:
                    terms = [(sum(value * factor**0.5 for value, factor in terms), 1.0)]  # type: ignore[misc]
                for number, (value, factor) in enumerate(terms):
                    _add_squares(value, factor, named, table, sums, keep=number < len(terms) - 1)
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


@dataclass
class _Table:
    """Embeddings that tokens alone look up: gradients of what was looked up stand for those of the whole table.

    Args:
        name: of the parameter; empty if there is no such table.
        silent: the token whose vector never learns, or none.
        seen: of one pass, token numbers (B, L) and their vectors (B, L, d).
    """

    name: str
    silent: int | None = None
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def rows(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
        """Token numbers ``(U,)`` and the gradients of their rows ``(U, d)``."""
        import torch

        found = [
            (ids, gradient)
            for (ids, _), gradient in zip(self.seen, gradients, strict=True)
            if gradient is not None
        ]
        if not found:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, self.seen[0][1].shape[-1])
        ids = torch.cat([ids.reshape(-1) for ids, _ in found])
        flat = torch.cat([gradient.reshape(-1, gradient.shape[-1]).float() for _, gradient in found])
        rows, place = torch.unique(ids, return_inverse=True)
        summed = torch.zeros(len(rows), flat.shape[-1], device=flat.device).index_add_(0, place, flat)
        learns = rows != (-1 if self.silent is None else self.silent)
        return rows[learns], summed[learns]


@contextmanager
def _looked_up(model: Any, named: Mapping[str, Tensor]) -> Iterator[_Table]:
    """While in it, the token embeddings, if nothing else uses them, note what is looked up in them."""
    import torch

    module = model.get_input_embeddings()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = next((name for name, value in named.items() if value is module.weight), "")
    plain = type(module) is torch.nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq
    if not name or not plain or (head is not None and head.weight is module.weight):
        yield _Table("")
        return
    table = _Table(name, module.padding_idx)
    handle = module.register_forward_hook(
        lambda module, given, vectors: table.seen.append((given[0], vectors))
    )
    try:
        yield table
    finally:
        handle.remove()


def _add_squares(
    value: Tensor, factor: float, named: Mapping[str, Tensor], table: _Table, sums: Sums, *, keep: bool
) -> None:
    """Add ``factor`` times the squared gradients of ``value``; ``keep`` what another pass backward needs."""
    import torch

    others = [name for name in named if name != table.name]
    inputs = [*(named[name] for name in others), *(vectors for _, vectors in table.seen)]
    gradients = torch.autograd.grad(value, inputs, retain_graph=keep, allow_unused=True)
    for name, gradient in zip(others, gradients, strict=False):
        if gradient is not None:
            sums.add_square(name, gradient, factor)
    if table.name:
        rows, summed = table.rows(gradients[len(others) :])
        sums.add_rows(table.name, named[table.name].shape, rows, summed, factor)


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
