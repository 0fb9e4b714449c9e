"""The terms of the glue's loss, against numbers worked out by hand, and what each pulls at."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixmerge.latent.losses import Parts, answer_losses, balance, choice, consistency, entropy
from mixmerge.latent.settings import LossWeights

HALF = math.log(3.0)  # the logit of 3 : 1


def scores_of(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, requires_grad=True)


def test_cross_entropy_of_an_answer_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0], [HALF, 0.0]])
    # -log 1/2 of the first token, -log 1/4 of the second
    assert answer_losses(logits, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(2), math.log(4)])


def test_entropy_by_hand() -> None:
    p = (0.75, 0.25)
    expected = (math.log(2) - sum(one * math.log(one) for one in p)) / 2
    assert entropy(scores_of([5.0, 5.0], [HALF, 0.0])).item() == pytest.approx(expected)


def test_balance_by_hand() -> None:
    scores = scores_of([HALF, 0.0], [HALF, 0.0])  # p = (3/4, 1/4)
    # Both rows pick the first: f = (1, 0); 2 * (1 * 3/4)
    assert balance(scores, torch.tensor([[0], [0]])).item() == pytest.approx(1.5)
    # one each: f = (1/2, 1/2); 2 * (3/8 + 1/8)
    assert balance(scores, torch.tensor([[0], [1]])).item() == pytest.approx(1.0)


def test_balance_has_the_gradient_that_counts_of_picks_lack() -> None:
    scores = scores_of([HALF, 0.0, 0.0], [HALF, 0.0, 0.0])
    active = scores.topk(1).indices
    counts = torch.bincount(active.flatten(), minlength=3).float()
    variation = counts.var(correction=0) / counts.mean() ** 2
    assert not variation.requires_grad
    balance(scores, active).backward()  # type: ignore[no-untyped-call]
    assert scores.grad is not None
    assert (scores.grad[:, 0] > 0).all(), "descent takes probability from who is used too much"
    assert (scores.grad[:, 1:] < 0).all()


def test_consistency_by_hand() -> None:
    first, second = torch.tensor([[2 * HALF, 0.0]]), torch.tensor([[0.0, 2 * HALF]])
    # temperature 2: (3/4, 1/4) and (1/4, 3/4); KL = 3/4 log 3 + 1/4 log 1/3 = 1/2 log 3, the same both ways
    assert consistency(first, second).item() == pytest.approx(0.5 * math.log(3))
    assert consistency(first, second, temperature=1e6).item() == pytest.approx(0, abs=1e-6)


@given(st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=1, max_size=5))
def test_what_holds_of_all_scores(rows: list[list[float]]) -> None:
    scores = torch.tensor(rows)
    assert -1e-5 <= entropy(scores).item() <= math.log(4) + 1e-5
    active = scores.topk(2).indices
    assert 0 <= balance(scores, active).item() <= 4 + 1e-4
    assert balance(torch.zeros_like(scores), active).item() == pytest.approx(1, abs=1e-5)
    other = scores.flip(-1)
    assert consistency(scores, scores).item() == 0
    assert consistency(scores, other).item() >= -1e-5
    assert consistency(scores, other).item() == pytest.approx(consistency(other, scores).item(), abs=1e-4)


def test_signs_of_the_sum() -> None:
    parts = Parts(*(torch.tensor(value) for value in (2.0, 0.5, 1.25, 0.25)))
    weights = LossWeights(lm=1.0, entropy=0.1, balance=0.2, consistency=0.4)
    assert parts.total(weights).item() == pytest.approx(2.0 - 0.05 + 0.25 + 0.1)
    assert Parts(torch.tensor(2.0)).total(weights).item() == pytest.approx(2.0)


def test_every_term_reaches_the_scores_or_the_predictions() -> None:
    scores = scores_of([1.0, 0.5, -0.5], [0.0, 2.0, 0.25])
    for term in (entropy(scores), balance(scores, scores.topk(2).indices)):
        (grad,) = torch.autograd.grad(term, scores)
        assert (grad != 0).any()
    first, second = scores_of([1.0, 0.0]), scores_of([0.0, 0.5])
    for grad in torch.autograd.grad(consistency(first, second), (first, second)):
        assert (grad != 0).all()


def test_who_answers_badly_is_drawn_less() -> None:
    scores = torch.zeros(2, 2, requires_grad=True)
    surrogate = choice(scores, torch.tensor([0, 1]), torch.tensor([3.0, 1.0]), noise=1.0)
    # leave-one-out: +2 and -2; d log p / d s is 1/2 for who was drawn, -1/2 for the other
    assert surrogate.item() == pytest.approx((2 * math.log(0.5) - 2 * math.log(0.5)) / 2)
    surrogate.backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.5, -0.5], [0.5, -0.5]]
    assert choice(scores, torch.tensor([0, 1]), torch.tensor([2.0, 2.0]), noise=1.0).item() == 0.0


def test_the_choice_has_the_gradient_of_the_expected_loss() -> None:
    """Over all pairs of draws, by their probabilities."""
    scores = torch.tensor([[0.3, -0.2], [1.0, 0.4]], requires_grad=True)
    losses = torch.tensor([[1.0, 2.0], [0.5, 3.0]])
    chances = scores.softmax(-1)
    (wanted,) = torch.autograd.grad((chances * losses).sum(-1).mean(), scores)
    found = torch.zeros_like(scores)
    for one in range(2):
        for other in range(2):
            drawn = torch.tensor([one, other])
            told = losses.gather(1, drawn[:, None])[:, 0]
            (part,) = torch.autograd.grad(choice(scores, drawn, told, noise=1.0), scores)
            found += part * (scores.softmax(-1)[0, one] * scores.softmax(-1)[1, other]).detach()
    torch.testing.assert_close(found, wanted)
