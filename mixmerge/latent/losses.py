"""What the glue learns from: the answer's likelihood, and three terms on the routing. Pure functions of tensors.

Shapes: B rows, M experts, K active ones, N tokens to predict, V entries of the primary's vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixmerge.latent.settings import LossWeights

TEMPERATURE = 2.0  # of the distributions that two routings are compared by


def answer_losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the tokens of answers, ``(N,)`` nats.

    Args:
        logits: ``(N, V)``.
        wanted: ``(N,)``, whole numbers.
    """
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none")


def departures(logits: Tensor, alone: Tensor) -> Tensor:
    """KL(alone || now) of the tokens of answers, ``(N,)`` nats: 0 where the primary says what it says by itself.

    Source: knowledge distillation from a model before it was changed, as Li and Hoiem, Learning without Forgetting
    (arXiv 1606.09282), section 3, at temperature 1; ours in that nothing but the glue can forget.

    Args:
        logits: ``(N, V)``.
        alone: ``(N, V)``, of the primary that reads nobody; no gradient flows through it.
    """
    wanted = alone.detach().float().log_softmax(-1)
    return (wanted.exp() * (wanted - logits.float().log_softmax(-1))).sum(-1)


def choice(scores: Tensor, primary: Tensor, losses: Tensor, *, noise: float) -> Tensor:
    """Whose gradient is that of the expected loss by who answers: ``mean_b (L_b - mean of the others') log p_b``.

    Who answers is drawn: the argmax of scores with Gumbel noise is expert e with ``p_e = softmax(s / noise)_e``. The
    loss has no derivative by a draw, and the gates say how much is read and written, not who does it: without this term
    nothing teaches a router who can answer. What other rows lose is taken off, which changes no expectation.

    Source: Williams, Simple statistical gradient-following algorithms (1992): REINFORCE; the baseline is leave-one-out.

    Args:
        scores: ``(B, M)``, without noise.
        primary: ``(B,)``, who was drawn.
        losses: ``(B,)`` nats of each answer; no gradient flows through them.
        noise: as drawn, above 0.
    """
    logs = (scores.float() / noise).log_softmax(-1).gather(1, primary[:, None])[:, 0]
    losses = losses.detach().to(logs)
    others = (losses.sum() - losses) / max(1, len(losses) - 1)
    return ((losses - others) * logs).mean()


def entropy(scores: Tensor) -> Tensor:
    """The mean entropy of ``softmax(s)`` over rows, in nats: 0 to log M.

    Source: Mixture of Thoughts (arXiv 2509.21164), section 3 as summarised by others; its sign is that of the weight.

    Args:
        scores: ``(B, M)``, without noise.
    """
    logs = scores.float().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def balance(scores: Tensor, active: Tensor) -> Tensor:
    """``M * sum_e f_e p_e``: 1 where all experts are used alike, up to M where one has all the probability.

    Source: Switch Transformer (Fedus et al., 2022), section 2.2. A coefficient of variation of how often experts were
    picked would say the same and have no gradient; here the gradient is that of p.

    Args:
        scores: ``(B, M)``, without noise; p_e is the mean of an expert's softmax.
        active: ``(B, K)``, whole numbers: who was picked; f_e is the share of all picks. No gradient flows through it.
    """
    experts = scores.shape[-1]
    share = torch.bincount(active.flatten(), minlength=experts).to(scores.device) / active.numel()  # (M,)
    return experts * (share.detach() * scores.float().softmax(-1).mean(0)).sum()


def consistency(first: Tensor, second: Tensor, *, temperature: float = TEMPERATURE) -> Tensor:
    """Symmetric Kullback-Leibler divergence of two predictions, ``(KL(p|q) + KL(q|p)) / 2``, summed over tokens.

    Source: the routing consistency of Mixture of Thoughts' port: one primary under two independently perturbed
    routings. Both get the gradient. Two primaries could not be compared: their vocabularies differ.

    Args:
        first, second: ``(N, V)`` logits of the same tokens under one and the other routing.
        temperature: above 0; that of the compared distributions.
    """
    p = (first.float() / temperature).log_softmax(-1)
    q = (second.float() / temperature).log_softmax(-1)
    return ((p.exp() - q.exp()) * (p - q)).sum() / 2


@dataclass(frozen=True)
class Parts:
    """The terms of a loss, each a scalar; of a routing that nothing decides, only the first.

    Args:
        lm: mean cross-entropy of the answers' tokens.
        entropy, balance: of the routing.
        consistency: mean over the answers' tokens; None where no second routing was tried.
    """

    lm: Tensor
    entropy: Tensor | None = None
    balance: Tensor | None = None
    consistency: Tensor | None = None

    def total(self, weights: LossWeights) -> Tensor:
        """``lm * LM - entropy * H + balance * M sum f p + consistency * symKL``."""
        loss = weights.lm * self.lm
        for part, weight in (
            (self.entropy, -weights.entropy),
            (self.balance, weights.balance),
            (self.consistency, weights.consistency),
        ):
            if part is not None:
                loss = loss + weight * part
        return loss
