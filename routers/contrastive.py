"""RouterDC: queries near the experts that answer them well. N training queries, B in a batch, Q queries, E experts.

D dimensions of an embedding, H of the space that queries and experts share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.errors import DependencyError, Fault
from mixmerge.routers.base import Embedding, Inputs, Prediction, Router, State, Training
from mixmerge.routers.features import unit
from mixmerge.routers.pretrained import Pretrained, PretrainedOptions, pack, read_pretrained, unpack
from mixmerge.routers.strengths import CALIBRATION, calibrated, expected, moves
from mixmerge.routers.training import arranged, held_out, seeded, stream, train, unarranged

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]


class ContrastiveOptions(PretrainedOptions):
    """Of the losses and what they train.

    Args:
        top, last: experts with the highest and the lowest scores on a query that are contrasted.
        temperature: cosines are divided by it, above 0.
        clusters: of k-means on the embeddings.
        cluster_weight: of the loss between queries of one cluster beside that between queries and experts.
        negatives: queries of other clusters to each query.
        dimension: H, of the projection of an embedding.
        members: networks in the ensemble, on embeddings; of an encoder there is one.
        least: steps.
        encoder: folder or hub id of a transformers encoder to fine-tune; None trains a projection of the embeddings.
    """

    top: int = Field(3, ge=1)
    last: int = Field(3, ge=1)
    temperature: float = Field(1.0, gt=0)
    clusters: int = Field(3, ge=1)
    cluster_weight: float = Field(1.0, ge=0)
    negatives: int = Field(3, ge=1)
    dimension: int = Field(128, ge=1)
    members: int = Field(3, ge=1)
    encoder: str | None = Field(None, min_length=1)
    batch: int = Field(64, ge=1)
    epochs: int = Field(1, ge=1)
    least: int = Field(500, ge=0)
    patience: int = Field(10, ge=1)
    holdout: float = Field(0.2, gt=0, lt=1)


def expert_loss(
    cosine: torch.Tensor, score: torch.Tensor, *, top: int, last: int, temperature: float
) -> torch.Tensor:
    """For every query, its good experts against its bad ones: summed over the good, averaged over queries.

    Good are the ``top`` highest scores and what ties with the lowest of these; bad the ``last`` lowest and what
    ties with the highest of those. Each good one is contrasted by softmax with the bad ones that scored less.

    Args:
        cosine: ``(B, E)`` of query and expert.
        score: ``(B, E)``, NaN where missing.
    """
    import torch

    count, known = score.shape[1], ~torch.isnan(score)
    high = torch.where(known, score, -torch.inf).topk(min(top, count)).values[:, -1:]
    low = torch.where(known, score, torch.inf).topk(min(last, count), largest=False).values[:, -1:]
    good, bad = known & (score >= high), known & (score <= low)
    pairs = good[:, :, None] & bad[:, None, :] & (score[:, None, :] < score[:, :, None])
    logits = cosine / temperature
    against = torch.where(pairs, logits[:, None, :], -torch.inf)
    total = torch.logsumexp(torch.cat([logits[:, :, None], against], dim=2), dim=2)
    return ((total - logits) * pairs.any(dim=2)).sum() / len(score)


def cluster_loss(hidden: torch.Tensor, cluster: torch.Tensor, *, negatives: int) -> torch.Tensor:
    """Every query against ``negatives`` queries of other clusters, with another one of its own as the right answer.

    Queries of the batch, drawn at random; a query with too few others is left out.

    Args:
        hidden: ``(B, H)``.
        cluster: ``(B,)``.
    """
    import torch
    from torch.nn import functional

    cosine = functional.normalize(hidden, dim=1) @ functional.normalize(hidden, dim=1).T
    same = cluster[:, None] == cluster[None, :]
    drawn = torch.rand(same.shape).to(hidden.device)
    alone = torch.eye(len(hidden), dtype=torch.bool, device=hidden.device)
    friend = torch.where(same & ~alone, drawn, -1.0).topk(1)
    others = torch.where(same, -1.0, drawn).topk(min(negatives, len(hidden)))
    usable = (friend.values[:, 0] >= 0) & ((others.values >= 0).sum(dim=1) == negatives)
    chosen = torch.cat([friend.indices, others.indices], dim=1)
    each = -torch.log_softmax(cosine.gather(1, chosen), dim=1)[:, 0]
    return (each * usable).sum() / usable.sum().clamp(min=1)


def clusters_of(embedding: Embedding, *, count: int, seed: int) -> NDArray[np.int64]:
    """``(N,)`` by k-means.

    Raises:
        DependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise DependencyError(
            Fault("router routerdc", "needs scikit-learn", run="pip install 'mixmerge[route]'")
        ) from error
    different = len(np.unique(embedding, axis=0))
    means = KMeans(min(count, different), n_init=4, random_state=seed)
    return np.asarray(means.fit_predict(embedding), np.int64)


class ContrastiveRouter(Router):
    """Queries and experts in one space, trained so that a query is nearer to the experts that score high on it.

    A cosine is no score: less the mean over the experts it goes through lines through their means (``strengths``),
    fitted on texts held out.

    Source: Chen et al. (2024), RouterDC: Query-Based Router by Dual Contrastive Learning for Assembling Large Language
    Models, arXiv 2409.19886, its two losses, and its released code; 500 steps (released: 1000) and 3 clusters as in
    LLMRouter. Deviations: on embeddings, a linear projection is trained instead of an encoder, at a higher rate; with
    ``encoder`` the mean of the hidden states is used (released: the first token). A bad expert is one that scored
    less than the good one (released: at most 0.5), ties are kept together, a query is not its own friend, k-means
    runs on the embeddings themselves (published: on their t-SNE), the best pass is chosen on held-out texts
    (released: on the test set).
    """

    kind = "routerdc"
    options_type = ContrastiveOptions
    per_expert = ("vectors", *CALIBRATION)
    options: ContrastiveOptions

    _made: tuple[State, Pretrained] | None = None  # the encoder of a state, made once

    def learn(self, data: Training) -> State:
        ordered = arranged(data)
        score, inputs = ordered.data.score, ordered.data.inputs
        members = 1 if self.options.encoder else self.options.members
        held = [
            held_out(inputs.texts, share=self.options.holdout, seed=self.seed, member=member)
            for member in range(members)
        ]
        cluster = clusters_of(inputs.embedded(), count=self.options.clusters, seed=self.seed)
        if self.options.encoder:
            with seeded(stream(self.seed, "contrast"), threads=None):
                kept, vectors, hidden = self._tune(
                    self.options.encoder, inputs.texts, score, cluster, held[0]
                )
        else:
            kept, vectors, hidden = self._project(inputs.embedded(), score, cluster, held)
        arrays: dict[str, Any] = {
            "vectors": vectors,
            **calibrated(list(_cosines(hidden, vectors)), held, score),
        }
        return State({**kept.arrays, **unarranged(arrays, self.per_expert, ordered.back)}, kept.values)

    def _project(
        self,
        embedding: Embedding,
        score: Floats,
        cluster: NDArray[np.int64],
        held: Sequence[NDArray[np.bool_]],
    ) -> tuple[State, NDArray[np.float32], NDArray[np.float32]]:
        """The projections ``(M, D, H)``, the experts' vectors ``(M, H, E)`` and the projected ``(M, N, H)``."""
        import torch

        x = torch.from_numpy(np.ascontiguousarray(embedding))
        projections, vectors = [], []
        for member, out in enumerate(held):
            with seeded(stream(self.seed, "contrast", member)):
                project = torch.nn.Linear(x.shape[1], self.options.dimension, bias=False)
                vectors.append(
                    fit_contrast(
                        _projected(project, x),
                        score,
                        cluster,
                        out,
                        options=self.options,
                        width=self.options.dimension,
                        parameters={"params": list(project.parameters())},
                        mode=project.train,
                    )
                )
                projections.append(project.weight.detach().numpy().T)
        projection = np.ascontiguousarray(np.stack(projections))
        return State({"projection": projection}), np.stack(vectors), embedding @ projection

    def _tune(
        self,
        path: str,
        texts: Sequence[str],
        score: Floats,
        cluster: NDArray[np.int64],
        out: NDArray[np.bool_],
    ) -> tuple[State, NDArray[np.float32], NDArray[np.float32]]:
        """The encoder, the experts' vectors ``(1, W, E)`` and the queries' hidden states ``(1, N, W)``."""
        options = self.options
        net = read_pretrained(path, kind="encoder", length=options.length, device=options.device)
        rows = net.tokens(texts)
        vectors = fit_contrast(
            lambda index: net.hidden([rows[i] for i in index]),
            score,
            cluster,
            out,
            options=options,
            width=net.width,
            parameters={"params": list(net.model.parameters()), "lr": options.pretrained_rate},
            mode=net.model.train,
            device=options.device,
        )
        return pack(net), vectors[None], net.embed(rows, batch=options.batch).numpy()[None]

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        if self.options.encoder:
            net = self._net(state)
            hidden = net.embed(net.tokens(inputs.texts), batch=self.options.batch).numpy()[None]
        else:
            hidden = inputs.embedded() @ state.arrays["projection"]
        return expected(_cosines(hidden, state.arrays["vectors"]), state.arrays)

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        return moves(self.experts, state.arrays["average"], self.predict(state, inputs).mean, top=top)

    def _net(self, state: State) -> Pretrained:
        if self._made is None or self._made[0] is not state:
            options = self.options
            made = unpack(state, kind="encoder", length=options.length, device=options.device)
            self._made = state, made
        return self._made[1]


def _projected(project: torch.nn.Linear, x: torch.Tensor) -> Callable[[NDArray[np.int64]], torch.Tensor]:
    def encode(rows: NDArray[np.int64]) -> torch.Tensor:
        hidden: torch.Tensor = project(x[rows])
        return hidden

    return encode


def _cosines(hidden: NDArray[np.float32], vectors: NDArray[Any]) -> Floats:
    """``(M, Q, E)`` cosines less their mean over experts, from ``(M, Q, H)`` and such vectors ``(M, H, E)``."""
    return np.asarray(unit(hidden) @ vectors, np.float64)


def fit_contrast(
    encode: Callable[[NDArray[np.int64]], torch.Tensor],
    score: Floats,
    cluster: NDArray[np.int64],
    out: NDArray[np.bool_],
    *,
    options: ContrastiveOptions,
    width: int,
    parameters: dict[str, Any],
    mode: Callable[[bool], object],
    device: str = "cpu",
) -> NDArray[np.float32]:
    """Train what ``encode`` rests on and a vector for each expert. Uses torch's random state.

    Args:
        encode: rows of the training queries to ``(B, H)``.
        score: ``(N, E)``, NaN where missing.
        cluster: ``(N,)``.
        out: ``(N,)``, rows that decide when to stop.
        options: of losses and training.
        width: H.
        parameters: a group, as torch's optimizers take it, of what ``encode`` rests on.
        mode: called with True before training and False before it is measured.
        device: that ``encode`` gives its tensors on.

    Returns:
        ``(H, E)`` unit vectors of the experts less their mean: a unit query times it is its cosines, of mean 0.
    """
    import torch
    from torch.nn import functional

    target = torch.from_numpy(score.astype(np.float32)).to(device)
    group = torch.from_numpy(cluster).to(device)
    inside, outside = np.flatnonzero(~out), np.flatnonzero(out)
    experts = torch.nn.Parameter((0.78 * torch.randn(score.shape[1], width)).to(device))

    def contrast(hidden: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        cosine = functional.normalize(hidden, dim=1) @ functional.normalize(experts, dim=1).T
        return expert_loss(
            cosine, target[rows], top=options.top, last=options.last, temperature=options.temperature
        )

    def loss(index: torch.Tensor) -> torch.Tensor:
        rows = inside[index.numpy()]
        hidden = encode(rows)
        between = cluster_loss(hidden, group[rows], negatives=options.negatives)
        return contrast(hidden, rows) + options.cluster_weight * between

    def held() -> float:
        parts = [outside[s : s + options.batch] for s in range(0, len(outside), options.batch)]
        return float(contrast(torch.cat([encode(rows) for rows in parts]), outside))

    train(
        [parameters, {"params": [experts]}],
        loss,
        rows=len(inside),
        options=options,
        held=held if len(outside) else None,
        mode=mode,
    )
    vectors = functional.normalize(experts.detach(), dim=1).cpu()
    return np.ascontiguousarray((vectors - vectors.mean(dim=0)).T.numpy())
