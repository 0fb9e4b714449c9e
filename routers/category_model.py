"""Which category a query belongs to, as calibrated probabilities. N queries, C categories, E experts, D dimensions.

scikit-learn fits; what is kept are arrays, and predicting is numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError
from mixmerge.routers.base import Inputs, Training
from mixmerge.routers.costs import mean_costs
from mixmerge.routers.shrinkage import group_sums, moments, shrink, strength
from mixmerge.routers.trained import text_hash, text_hashes

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
LABELS = ("category", "task", "subject")  # columns that ``labels: auto`` looks for
FOLDS = 5
# A temperature outside of these says that the folds were too small to tell.
COLDEST, HOTTEST = 0.05, 20.0


@dataclass(frozen=True, eq=False)
class CategoryModel:
    """Multinomial logistic regression: ``softmax((embedding @ weight + bias) / temperature)``.

    Args:
        weight: ``(D, C)``.
        bias: ``(C,)``.
        temperature: above 0; 1 leaves the classifier's own probabilities.
    """

    weight: Floats
    bias: Floats
    temperature: float

    def probabilities(self, embedding: NDArray[Any]) -> Floats:
        """``(N, C)`` from ``(N, D)``; rows sum to 1."""
        logits = embedding.astype(np.float64) @ self.weight + self.bias
        return softmax(logits / self.temperature)

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {
            "category_weight": self.weight,
            "category_bias": self.bias,
            "temperature": np.array([self.temperature]),
        }

    @classmethod
    def restored(cls, arrays: Mapping[str, NDArray[Any]]) -> CategoryModel:
        return cls(arrays["category_weight"], arrays["category_bias"], float(arrays["temperature"][0]))


def softmax(logits: Floats) -> Floats:
    """Over the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def fit_categories(
    embedding: NDArray[Any],
    label: Indices,
    texts: Sequence[str],
    *,
    categories: int,
    strength: float,
    seed: int,
) -> tuple[CategoryModel, Floats]:
    """A calibrated classifier, and what it says of each row when it has not seen the row.

    The temperature minimises the log loss of the rows left out of ``FOLDS`` folds; a row's fold is a hash of the seed
    and its text, so equal texts are left out together and the order of rows does not matter.

    Args:
        embedding: ``(N, D)``.
        label: ``(N,)`` in 0..C-1, each at least once.
        texts: N.
        categories: C.
        strength: inverse of the L2 penalty, above 0.

    Returns:
        The classifier, and ``(N, C)`` probabilities of the left-out rows.
    """
    if categories == 1:
        model = CategoryModel(np.zeros((embedding.shape[1], 1)), np.zeros(1), 1.0)
        return model, np.ones((len(label), 1))
    fold = np.array([text_hash(f"{seed} {text}") % FOLDS for text in texts], np.int64)
    logits = np.zeros((len(label), categories))
    usable = np.zeros(len(label), np.bool_)
    for out in range(FOLDS):
        inside, outside = fold != out, fold == out
        if len(np.unique(label[inside])) < 2 or not outside.any():
            continue
        weight, bias = _logistic(embedding[inside], label[inside], categories, strength)
        logits[outside] = embedding[outside].astype(np.float64) @ weight + bias
        usable[outside] = np.isin(label[outside], label[inside])
    temperature = _temperature(logits[usable], label[usable])
    weight, bias = _logistic(embedding, label, categories, strength)
    return CategoryModel(weight, bias, temperature), softmax(logits / temperature)


def _logistic(
    embedding: NDArray[Any], label: Indices, categories: int, strength: float
) -> tuple[Floats, Floats]:
    """Weights ``(D, C)`` and bias ``(C,)``; categories without a row get the bias of the rarest, and no weight."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=strength, max_iter=1000).fit(embedding.astype(np.float64), label)
    weight, bias = fitted.coef_.T, fitted.intercept_
    if weight.shape[1] == 1:  # of two classes scikit-learn keeps the second one's logit
        weight, bias = np.hstack([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    all_weight, all_bias = np.zeros((embedding.shape[1], categories)), np.full(categories, bias.min())
    all_weight[:, fitted.classes_], all_bias[fitted.classes_] = weight, bias
    return all_weight, all_bias


def _temperature(logits: Floats, label: Indices) -> float:
    """That of the lowest log loss; 1 without rows.

    Labels count as Platt's targets (1999, Probabilistic outputs for support vector machines), ``(n + 1) / (n + 2)`` of
    n rows of a category and the rest for the others: n rows without an error do not prove that there is none.
    """
    from scipy.optimize import minimize_scalar

    if not len(label):
        return 1.0
    categories = logits.shape[1]
    other = 1.0 / (np.bincount(label, minlength=categories)[label] + 2)
    target = np.tile(other[:, None] / (categories - 1), (1, categories))
    target[np.arange(len(label)), label] = 1 - other

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        top = scaled.max(axis=1)
        normal = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float((normal - (target * scaled).sum(axis=1)).mean())

    bounds = (np.log(COLDEST), np.log(HOTTEST))
    return float(np.exp(minimize_scalar(loss, bounds=bounds, method="bounded").x))


def cluster(embedding: NDArray[Any], texts: Sequence[str], *, clusters: int, seed: int) -> Indices:
    """``(N,)`` k-means clusters to serve as categories, the largest first; the order of rows does not matter.

    At most as many as there are different rows.
    """
    from sklearn.cluster import KMeans

    order = np.argsort(text_hashes(texts), kind="stable")
    rows = embedding[order].astype(np.float64)
    k = min(clusters, len(np.unique(rows, axis=0)))
    found = KMeans(n_clusters=k, n_init=4, random_state=seed).fit(rows).labels_
    counts = np.bincount(found, minlength=k)
    rank = np.empty(k, np.int64)
    rank[np.argsort(-counts, kind="stable")] = np.arange(k)
    label = np.empty(len(rows), np.int64)
    label[order] = rank[found]
    return label


def uncertainty(probability: Floats, *, by: str) -> Floats:
    """``(N,)`` in 0..1, from ``(N, C)``: 0 if one category is certain.

    Args:
        by: ``entropy``: over that of C equally likely categories; ``top``: 1 minus the highest probability.
    """
    if by == "top":
        return np.asarray(1.0 - probability.max(axis=1))
    if probability.shape[1] == 1:
        return np.zeros(len(probability))
    logs = np.log(np.where(probability > 0, probability, 1.0))
    return np.asarray(np.clip(-(probability * logs).sum(axis=1) / np.log(probability.shape[1]), 0.0, 1.0))


def tuned_threshold(unsure: Floats, served: Floats, fallen: Floats) -> float:
    """The uncertainty above which the fallback is worth it: highest total score, then the fewest fallbacks.

    Half way between two of the uncertainties seen; below 0 if it is always worth it.

    Args:
        unsure: ``(N,)`` uncertainties.
        served, fallen: ``(N,)`` score of the expert that would be picked, and of the fallback.
    """
    order = np.argsort(-unsure, kind="stable")
    gain = np.concatenate([[0.0], np.cumsum((fallen - served)[order])])  # of the n least sure to the fallback
    edges = np.concatenate([[1.0], unsure[order], [-1.0]])
    whole = np.flatnonzero(edges[1:] < edges[:-1])  # equals fall together
    best = int(whole[np.argmax(np.round(gain[whole], 12))]) if len(whole) else 0
    return float((edges[best] + edges[best + 1]) / 2)


def label_column(labels: str, inputs: Inputs) -> str | None:
    """The column of the categories; None for clusters."""
    if labels == "none":
        return None
    if labels != "auto":
        if not any(inputs.metadata.get(labels, ())):
            raise MixmergeError(
                Fault(
                    "router categories: labels",
                    f"the outcomes have no column {labels!r} with a label",
                    f"Columns: {', '.join(inputs.metadata) or 'none'}; or auto, or none for clusters",
                )
            )
        return labels
    for name in LABELS:
        values = [one for one in inputs.metadata.get(name, ()) if one]
        if 2 <= len(set(values)) <= len(values) / 2:
            return name
    return None


def per_category(data: Training, label: Indices, categories: int, worth: float | None) -> dict[str, Floats]:
    """Of every expert: shrunk ``mean``, its ``std`` and ``count`` of scores ``(C, E)``; ``size`` and ``cost`` ``(E,)``.

    Costs that were not recorded are estimated from prices; NaN where there is neither.

    Args:
        label: ``(N,)`` category of each query.
        categories: C.
        worth: how many observations an expert's mean counts for; None: what the spread between categories says.
    """
    mean, variance, _ = moments(data.score)
    total, count = group_sums(data.score, label, categories)
    prior = strength(total / np.maximum(count, 1), count, mean, variance)
    prior = prior if worth is None else np.full(len(mean), worth)
    shrunk, std = shrink(total, count, mean, prior, variance)
    prices = [data.prices.get(name) for name in data.experts]
    size = [np.nan if price is None or price.size is None else price.size for price in prices]
    cost = mean_costs(data.costs, data.experts, data.prices, data.inputs.texts)
    return {"mean": shrunk, "std": std, "count": count, "size": np.array(size, np.float64), "cost": cost}
