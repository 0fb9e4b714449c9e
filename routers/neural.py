"""Small networks from embeddings to score vectors. N training queries, Q queries, E experts, D dimensions.

M members of an ensemble, H hidden units. They are trained with torch and evaluated with numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.routers.base import Embedding, Inputs, Prediction, Router, State, Training
from mixmerge.routers.logistic import sigmoid
from mixmerge.routers.shrinkage import moments
from mixmerge.routers.strengths import apart, moves
from mixmerge.routers.training import EnsembleOptions, arranged, held_out, seeded, stream, train, unarranged

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scale:
    """How outputs of a network become scores: through a logistic function, or by mean and spread.

    Args:
        bounded: all scores are in 0..1: outputs are log-odds, learned by cross-entropy. Otherwise they are
            standardised scores, learned by squared error.
        mean, spread, error: ``(E,)`` mean score, its standard deviation over queries, and variance of the mean.
        start: ``(E,)`` outputs that give the mean.
    """

    bounded: bool
    mean: Floats
    spread: Floats
    error: Floats
    start: Floats

    @classmethod
    def of(cls, score: Floats) -> Scale:
        """From ``(N, E)`` scores, NaN where missing."""
        mean, variance, count = moments(score)
        bounded = bool(((score >= 0) & (score <= 1) | np.isnan(score)).all())
        edge = 0.5 / (count + 1)
        chance = np.clip(mean, edge, 1 - edge)
        start = np.log(chance / (1 - chance)) if bounded else np.zeros_like(mean)
        return cls(bounded, mean, np.sqrt(variance), variance / np.maximum(count, 1), start)

    def targets(self, score: Floats) -> Floats:
        """What a network is to give for these scores: themselves, or standardised."""
        return score if self.bounded else (score - self.mean) / self.spread

    def arrays(self) -> dict[str, Floats]:
        return {"average": self.mean, "width": self.spread, "error": self.error}


def scores_of(raw: Floats, arrays: Mapping[str, NDArray[Any]], *, bounded: bool) -> Floats:
    """Outputs of networks, experts last, as scores."""
    return sigmoid(raw) if bounded else arrays["average"] + arrays["width"] * raw


def masked_loss(output: torch.Tensor, target: torch.Tensor, *, bounded: bool) -> torch.Tensor:
    """Mean cross-entropy (``bounded``) or squared error over the targets that are not NaN; 0 if none is."""
    import torch
    from torch.nn import functional

    known = ~torch.isnan(target)
    filled = torch.where(known, target, 0.0)
    kind = functional.binary_cross_entropy_with_logits if bounded else functional.mse_loss
    each: torch.Tensor = kind(output, filled, reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


class MlpOptions(EnsembleOptions):
    """Of the networks: ``hidden`` units, and the share of them dropped out in training."""

    hidden: int = Field(64, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    rate: float = Field(2e-3, gt=0)
    holdout: float = Field(0.15, gt=0, lt=1)


@dataclass(frozen=True, eq=False)
class Networks:
    """An ensemble with one hidden layer of rectified units.

    Args:
        arrays: ``inner`` ``(M, D, H)``, ``inner_bias`` ``(M, H)``, ``outer`` ``(M, H, E)``, ``outer_bias``
            ``(M, E)``; float32.
        held: for each member ``(N,)``, the queries it did not train on.
    """

    arrays: dict[str, NDArray[Any]]
    held: tuple[NDArray[np.bool_], ...]


def fit_networks(
    embedding: Embedding,
    target: Floats,
    texts: Sequence[str],
    *,
    options: MlpOptions,
    seed: int,
    start: Floats,
    bounded: bool,
) -> Networks:
    """Train each member from its own start, stopping on its own held-out texts.

    The last layer starts at 0 and its bias at ``start``: a member that learns nothing of use stays at the mean.

    Args:
        embedding: ``(N, D)``.
        target: ``(N, E)``, NaN where missing; in 0..1 if ``bounded``.
        texts: N.
        options: of network and training.
        seed: of starts, splits, batches and dropout.
        start: ``(E,)`` first outputs.
        bounded: cross-entropy, else squared error.
    """
    import torch

    x = torch.from_numpy(np.ascontiguousarray(embedding))
    y = torch.from_numpy(target.astype(np.float32))
    width = (
        float(embedding.shape[1]) ** 0.5
    )  # entries of a unit row are 1 / width: inputs of about 1 learn faster
    layers, held = [], []
    for member in range(options.members):
        out = held_out(texts, share=options.holdout, seed=seed, member=member)
        with seeded(stream(seed, "network", member)):
            first = torch.nn.Linear(x.shape[1], options.hidden)
            last = torch.nn.Linear(options.hidden, y.shape[1])
            net = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Dropout(options.dropout), last)
            with torch.no_grad():
                last.weight.zero_()
                last.bias.copy_(torch.from_numpy(start))
            _train(net, x * width, y, out, options=options, bounded=bounded)
        layers.append([one.detach().numpy() for one in (first.weight, first.bias, last.weight, last.bias)])
        held.append(out)
    inner, inner_bias, outer, outer_bias = (np.stack(part) for part in zip(*layers, strict=True))
    arrays = {
        "inner": inner.transpose(0, 2, 1) * np.float32(width),
        "inner_bias": inner_bias,
        "outer": outer.transpose(0, 2, 1),
        "outer_bias": outer_bias,
    }
    return Networks({name: np.ascontiguousarray(array) for name, array in arrays.items()}, tuple(held))


def _train(
    net: torch.nn.Sequential,
    x: torch.Tensor,
    y: torch.Tensor,
    out: NDArray[np.bool_],
    *,
    options: MlpOptions,
    bounded: bool,
) -> None:
    import torch

    aside = torch.from_numpy(out)
    inside, inside_target, outside, outside_target = x[~aside], y[~aside], x[aside], y[aside]
    train(
        list(net.parameters()),
        lambda index: masked_loss(net(inside[index]), inside_target[index], bounded=bounded),
        rows=len(inside),
        options=options,
        held=(lambda: float(masked_loss(net(outside), outside_target, bounded=bounded)))
        if out.any()
        else None,
        mode=net.train,
    )


def outputs(arrays: Mapping[str, NDArray[Any]], embedding: Embedding) -> Floats:
    """``(M, Q, E)`` of the networks in ``arrays``; the products in float32."""
    made = []
    for member in range(len(arrays["inner"])):
        hidden = np.maximum(embedding @ arrays["inner"][member] + arrays["inner_bias"][member], 0)
        made.append(hidden @ arrays["outer"][member] + arrays["outer_bias"][member])
    return np.stack(made).astype(np.float64)


class MlpRouter(Router):
    """An ensemble of small networks from the embedding to all experts' scores at once.

    Scores in 0..1 are learned by cross-entropy, others standardised by squared error. The expected score is the
    mean over the members; its variance is theirs and that of the expert's mean. Training begins at the experts'
    means, and ends where held-out texts are predicted best.
    """

    kind = "mlp"
    options_type = MlpOptions
    per_expert = ("outer", "outer_bias", "average", "width", "error")
    options: MlpOptions

    def learn(self, data: Training) -> State:
        ordered = arranged(data)
        score, inputs = ordered.data.score, ordered.data.inputs
        scale = Scale.of(score)
        networks = fit_networks(
            inputs.embedded(),
            scale.targets(score),
            inputs.texts,
            options=self.options,
            seed=self.seed,
            start=scale.start,
            bounded=scale.bounded,
        )
        arrays = {**networks.arrays, **scale.arrays()}
        return State(unarranged(arrays, self.per_expert, ordered.back), {"bounded": scale.bounded})

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        raw = outputs(state.arrays, inputs.embedded())
        scores = scores_of(raw, state.arrays, bounded=state.values["bounded"])
        return Prediction(scores.mean(axis=0), np.sqrt(apart(scores) + state.arrays["error"]))

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        return moves(self.experts, state.arrays["average"], self.predict(state, inputs).mean, top=top)
