"""The entropy of predictions, and distances of outputs and hidden states, by what a model's outputs say.

Shapes: N rows or positions, H hidden size, V vocabulary, classes or outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Answers = Literal["one", "many", "numbers"]


def answers_of(config: Mapping[str, Any]) -> Answers:
    """What the outputs of a classifier of transformers say, by its ``config.json``.

    Returns:
        ``one`` of several classes; ``many``: of each class, whether it is there (``multi_label_classification``);
        ``numbers``, of a regression: of one output, or of as many as its ``problem_type`` says so of.
    """
    kind, names = config.get("problem_type"), config.get("id2label")
    count = len(names) if names else int(config.get("num_labels") or 2)
    if kind == "multi_label_classification":
        return "many"
    return "numbers" if kind == "regression" or count == 1 else "one"


def entropy(logits: Tensor, answers: Answers = "one") -> Tensor:
    """Shannon entropy, in nats, of what each row predicts.

    Args:
        logits: (N, V); those that are -inf take no part.
        answers: ``one``: of the softmax; ``many``: the sum over classes of that of a Bernoulli variable.

    Returns:
        (N,).

    Raises:
        ValueError: of numbers: they say no chances.
    """
    import torch

    if answers == "numbers":
        raise ValueError("numbers have no entropy")
    if answers == "many":
        there, absent = _bernoulli(logits)
        return -(there.exp() * there + absent.exp() * absent).sum(-1)
    logs = torch.log_softmax(logits.float(), dim=-1)
    return -(logs.exp() * logs.masked_fill(logs.isneginf(), 0.0)).sum(-1)


def logit_loss(
    logits: Tensor,
    wanted: Tensor,
    *,
    form: Literal["kl", "soft_ce"] = "kl",
    temperature: float = 1.0,
    answers: Answers = "one",
) -> Tensor:
    """Distance of two outputs, for each position.

    Args:
        logits: (N, V) of the merged model.
        wanted: (N, V) of the expert.
        form: ``kl``: KL(expert || merged); ``soft_ce``: that plus the expert's entropy.
        temperature: both logits are divided by it, and the loss is multiplied by its square.
        answers: ``one``: of distributions over V; ``many``: the sum over V of that of two Bernoulli variables;
            ``numbers``: half the squared distance, the KL of two normal variables of variance one, in either form and
            at any temperature.

    Returns:
        (N,).
    """
    import torch

    if answers == "numbers":
        return (logits.float() - wanted.float()).square().sum(-1) / 2
    if answers == "many":
        mine_, theirs_ = (_bernoulli(one / temperature) for one in (logits, wanted))
        pairs = list(zip(mine_, theirs_, strict=True))
    else:
        mine = torch.log_softmax(logits.float() / temperature, -1)
        pairs = [(mine, torch.log_softmax(wanted.float() / temperature, -1))]
    loss = sum(_distance(mine, theirs, form) for mine, theirs in pairs)
    return loss * temperature**2  # type: ignore[return-value]


def _distance(mine: Tensor, theirs: Tensor, form: str) -> Tensor:
    """Of log-likelihoods (N, V): -sum_v p log q, less that of p with itself for ``kl``."""
    weight = theirs.exp()
    loss = -(weight * mine).sum(-1)
    return loss + (weight * theirs).sum(-1) if form == "kl" else loss


def _bernoulli(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-likelihoods that a class is there, and that it is not."""
    import torch

    logits = logits.float()
    return torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)


def hidden_loss(gaps: Sequence[Tensor], *, form: Literal["mean", "sum"] = "mean") -> Tensor:
    """The hidden loss from the difference (N, H) at each layer; ``form`` as in ``AlignmentOptions``."""
    import torch

    if form == "sum":
        return torch.stack([gap.square().sum(-1).mean() for gap in gaps]).sum()
    return torch.stack([gap.square().mean() for gap in gaps]).mean()
