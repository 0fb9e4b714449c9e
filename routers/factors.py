"""Matrix factorisation of pairwise wins. N training queries, B in a batch, Q queries, E experts, D dimensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.routers.base import Embedding, Inputs, Prediction, Router, State, Training
from mixmerge.routers.strengths import CALIBRATION, calibrated, expected, moves
from mixmerge.routers.training import EnsembleOptions, arranged, held_out, seeded, stream, train, unarranged

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]


class FactorsOptions(EnsembleOptions):
    """``dimension`` of the factors, and the standard deviation of the ``noise`` on a query's embedding in training."""

    dimension: int = Field(128, ge=1)
    noise: float = Field(0.1, ge=0)
    rate: float = Field(3e-4, gt=0)
    decay: float = Field(1e-5, ge=0)
    least: int = Field(1000, ge=0)


def pair_loss(strength: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of who wins, over all pairs of experts with a score on the same query.

    The chance that i beats j is the logistic function of the difference of their strengths; the label is 1 if i
    scored higher, 0 if lower, and one half for a tie.

    Args:
        strength: ``(B, E)``.
        score: ``(B, E)``, NaN where missing.
    """
    import torch
    from torch.nn import functional

    gap = score[:, :, None] - score[:, None, :]
    known = torch.triu(~torch.isnan(gap), diagonal=1)
    label = torch.where(known, (torch.sign(gap) + 1) / 2, 0.0)
    difference = strength[:, :, None] - strength[:, None, :]
    each = functional.binary_cross_entropy_with_logits(difference, label, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


class FactorsRouter(Router):
    """Strengths from a product of factors of query and expert, learned from who beats whom.

    ``strength = head . (project(query) * unit(expert))``. All experts on a query are compared with each other.
    Pairs say nothing about how hard a query is, so strengths are taken less their mean over the experts, and
    become scores by lines through the experts' means (``strengths``) on texts held out. At scoring all of it is one
    matrix for each member.

    Source: Ong et al. (2024), RouteLLM: Learning to Route LLMs with Preference Data, arXiv 2406.18665, section 4.2, its
    matrix factorization router, with the published optimizer and batch, and the dimension, the noise and the
    projection without a bias of the released code (the paper's has one). Deviations: any number of experts, and ties
    count one half (released: they are dropped); a batch is of queries with all their pairs, not of pairs;
    training stops on held-out texts; there is no noise outside training (the released script adds it to
    validation too); an ensemble of ``members``.
    """

    kind = "mf"
    options_type = FactorsOptions
    per_expert = ("direction", *CALIBRATION)
    options: FactorsOptions

    def learn(self, data: Training) -> State:
        ordered = arranged(data)
        score, inputs = ordered.data.score, ordered.data.inputs
        directions, held = [], []
        for member in range(self.options.members):
            out = held_out(inputs.texts, share=self.options.holdout, seed=self.seed, member=member)
            with seeded(stream(self.seed, "factors", member)):
                directions.append(fit_factors(inputs.embedded(), score, out, options=self.options))
            held.append(out)
        strengths = [(inputs.embedded() @ one).astype(np.float64) for one in directions]
        arrays: dict[str, Any] = {
            "direction": np.stack(directions),
            **calibrated(strengths, held, score),
        }
        return State(unarranged(arrays, self.per_expert, ordered.back))

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        strengths = [inputs.embedded() @ one for one in state.arrays["direction"]]
        return expected(np.stack(strengths).astype(np.float64), state.arrays)

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        return moves(self.experts, state.arrays["average"], self.predict(state, inputs).mean, top=top)


def fit_factors(
    embedding: Embedding, score: Floats, out: NDArray[np.bool_], *, options: FactorsOptions
) -> NDArray[np.float32]:
    """``(D, E)``: a query times it gives the experts' strengths, of mean 0. Uses torch's random state.

    Args:
        embedding: ``(N, D)``.
        score: ``(N, E)``, NaN where missing.
        out: ``(N,)``, rows that decide when to stop.
        options: of factors and training.
    """
    import torch
    from torch.nn import functional

    x, y = torch.from_numpy(np.ascontiguousarray(embedding)), torch.from_numpy(score.astype(np.float32))
    aside = torch.from_numpy(out)
    inside, inside_score, outside, outside_score = x[~aside], y[~aside], x[aside], y[aside]
    project = torch.nn.Linear(x.shape[1], options.dimension, bias=False)
    experts = torch.nn.Embedding(y.shape[1], options.dimension)
    head = torch.nn.Linear(options.dimension, 1, bias=False)

    def factor() -> torch.Tensor:  # (dimension, E)
        return (functional.normalize(experts.weight, dim=1) * head.weight).T

    def loss(index: torch.Tensor) -> torch.Tensor:
        query = inside[index]
        query = query + options.noise * torch.randn_like(query)
        return pair_loss(project(query) @ factor(), inside_score[index])

    train(
        [project.weight, experts.weight, head.weight],
        loss,
        rows=len(inside),
        options=options,
        held=(lambda: float(pair_loss(project(outside) @ factor(), outside_score))) if out.any() else None,
        decoupled=False,
    )
    with torch.no_grad():
        direction = project.weight.T @ factor()
        return np.ascontiguousarray((direction - direction.mean(dim=1, keepdim=True)).numpy())
