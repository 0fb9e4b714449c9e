"""Transformers fine-tuned to score experts: an encoder with a head, or a causal model by its label tokens.

N training queries, Q queries, E experts, W the width of the hidden states.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from mixmerge.routers.base import Inputs, Options, Prediction, Router, State, Training
from mixmerge.routers.neural import Scale, masked_loss, scores_of
from mixmerge.routers.pretrained import (
    Kind,
    Pretrained,
    PretrainedOptions,
    adapted,
    add_labels,
    label_logits,
    pack,
    read_pretrained,
    unpack,
)
from mixmerge.routers.strengths import CALIBRATION, calibrated, expected, moves
from mixmerge.routers.training import arranged, held_out, seeded, stream, train, unarranged

if TYPE_CHECKING:
    import torch

Floats = NDArray[np.float64]


class FineTunedOptions(PretrainedOptions):
    """``path``: the folder or hub id of the transformers model to start from."""

    path: str = Field(min_length=1)


class FineTunedRouter(Router):
    """What the two share: a model that is trained on score vectors, kept whole in the router, and calibrated.

    The loss is cross-entropy for scores in 0..1 and squared error of standardised scores otherwise, over the known
    scores. It starts at the experts' means and keeps the pass with the lowest held-out loss. A line through each
    expert's mean, fitted on the held-out texts (``strengths``), makes of the outputs the expected scores: where the
    model learned nothing, they are the means. Scoring needs neither network nor the folder it started from.
    """

    embeds = False
    options_type: ClassVar[type[Options]] = FineTunedOptions
    model_kind: ClassVar[Kind]
    options: FineTunedOptions

    _made: tuple[State, Pretrained] | None = None  # the model of a state, made once

    @abstractmethod
    def tune(self, net: Pretrained, data: Training, scale: Scale, out: NDArray[np.bool_]) -> dict[str, Any]:
        """Train, and give the arrays that ``raw`` reads beside the model's."""

    @abstractmethod
    def raw(self, net: Pretrained, texts: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Floats:
        """``(Q, E)`` outputs, log-odds or standardised scores."""

    def learn(self, data: Training) -> State:
        options, ordered = self.options, arranged(data)
        score, texts = ordered.data.score, ordered.data.inputs.texts
        scale = Scale.of(score)
        out = held_out(texts, share=options.holdout, seed=self.seed, member=0)
        with seeded(stream(self.seed, self.kind), threads=None):
            net = read_pretrained(
                options.path, kind=self.model_kind, length=options.length, device=options.device
            )
            new = self.tune(net, ordered.data, scale, out)
            kept = pack(net)
        scores = scores_of(self.raw(net, texts, new), scale.arrays(), bounded=scale.bounded)
        arrays = {**new, **scale.arrays(), **calibrated([scores], [out], score)}
        values = {**kept.values, "bounded": scale.bounded}
        return State({**kept.arrays, **unarranged(arrays, self.per_expert, ordered.back)}, values)

    def predict(self, state: State, inputs: Inputs) -> Prediction:
        raw = self.raw(self._net(state), inputs.texts, state.arrays)
        scores = scores_of(raw, state.arrays, bounded=state.values["bounded"])
        return expected(scores[None], state.arrays)

    def explain(self, state: State, inputs: Inputs, *, top: int) -> list[dict[str, Any]]:
        return moves(self.experts, state.arrays["average"], self.predict(state, inputs).mean, top=top)

    def _net(self, state: State) -> Pretrained:
        if self._made is None or self._made[0] is not state:
            options = self.options
            made = unpack(state, kind=self.model_kind, length=options.length, device=options.device)
            self._made = state, made
        return self._made[1]

    def _fit(
        self,
        data: Training,
        scale: Scale,
        out: NDArray[np.bool_],
        *,
        parameters: Sequence[dict[str, Any]],
        output: Callable[[NDArray[np.int64]], torch.Tensor],
        mode: Callable[[bool], object],
    ) -> None:
        """Train on the rows that are not held out, given the outputs of any rows."""
        import torch

        target = torch.from_numpy(scale.targets(data.score).astype(np.float32)).to(self.options.device)
        inside, outside = np.flatnonzero(~out), np.flatnonzero(out)

        def loss(index: torch.Tensor) -> torch.Tensor:
            rows = inside[index.numpy()]
            return masked_loss(output(rows), target[rows], bounded=scale.bounded)

        def held() -> float:
            parts = [outside[s : s + self.options.batch] for s in range(0, len(outside), self.options.batch)]
            raw = torch.cat([output(rows) for rows in parts])
            return float(masked_loss(raw, target[outside], bounded=scale.bounded))

        train(
            parameters,
            loss,
            rows=len(inside),
            options=self.options,
            held=held if len(outside) else None,
            mode=mode,
        )


class EncoderRouter(FineTunedRouter):
    """A transformers encoder: the mean of its hidden states, and a linear head to all experts' scores."""

    kind = "encoder"
    model_kind = "encoder"
    per_expert = ("head", "head_bias", "width", *CALIBRATION)

    def tune(self, net: Pretrained, data: Training, scale: Scale, out: NDArray[np.bool_]) -> dict[str, Any]:
        import torch

        rows, device = net.tokens(data.inputs.texts), self.options.device
        head = torch.nn.Linear(net.width, len(data.experts)).to(device)
        with torch.no_grad():
            head.weight.zero_()
            head.bias.copy_(torch.from_numpy(scale.start))
        self._fit(
            data,
            scale,
            out,
            parameters=[
                {"params": list(net.model.parameters()), "lr": self.options.pretrained_rate},
                {"params": list(head.parameters())},
            ],
            output=lambda index: head(net.hidden([rows[i] for i in index])),
            mode=net.model.train,
        )
        return {"head": head.weight.detach().cpu().numpy().T, "head_bias": head.bias.detach().cpu().numpy()}

    def raw(self, net: Pretrained, texts: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Floats:
        hidden = net.embed(net.tokens(texts), batch=self.options.batch).numpy()
        return np.asarray((hidden @ arrays["head"]).astype(np.float64) + arrays["head_bias"], np.float64)


class CausalOptions(FineTunedOptions):
    """``suffix``: what is asked after the query. ``lora``: rank of the adapters to train; 0 trains all weights."""

    suffix: str = "\nExpert:"
    lora: int = Field(0, ge=0)


class CausalRouter(FineTunedRouter):
    """A causal language model that scores each expert by the log-odds it gives to that expert's label token.

    Each expert gets a new token. What the model gives those tokens to come after query and suffix, plus the
    expert's mean in log-odds, is the output; nothing is generated or parsed. Of the output embedding only the label
    tokens' rows are trained, so where it is tied the input embedding stays as it was; logits are read before any cap
    or scale that a model puts on them. LoRA weights are merged into the model before it is kept.

    Source: Ong et al. (2024), RouteLLM, arXiv 2406.18665, section 4.2, its causal LLM classifier. Deviation: there the
    label tokens say which of two experts wins (released: one expert's quality, 1 to 5); here each expert has one,
    and is trained on its score.
    """

    kind = "causal"
    model_kind = "causal"
    options_type = CausalOptions
    per_expert = ("labels", "start", "width", *CALIBRATION)
    options: CausalOptions

    def tune(self, net: Pretrained, data: Training, scale: Scale, out: NDArray[np.bool_]) -> dict[str, Any]:
        import torch

        ids = add_labels(net, data.experts)
        rows = net.tokens(data.inputs.texts, suffix=self.options.suffix)
        start = torch.from_numpy(scale.start.astype(np.float32)).to(self.options.device)
        wrapped = adapted(net, rank=self.options.lora) if self.options.lora else net.model
        weight = net.model.get_output_embeddings().weight.requires_grad_(True)
        only = torch.zeros(len(weight), 1, device=weight.device)
        only[torch.from_numpy(ids)] = 1.0
        hook = weight.register_hook(lambda gradient: gradient * only)
        others = [one for one in net.model.parameters() if one.requires_grad and one is not weight]
        self._fit(
            data,
            scale,
            out,
            parameters=[
                {"params": others, "lr": self.options.pretrained_rate},
                {"params": [weight], "weight_decay": 0.0},  # decay would move the rows that are not trained
            ],
            output=lambda index: label_logits(net, net.hidden([rows[i] for i in index]), ids) + start,
            mode=wrapped.train,
        )
        hook.remove()
        if self.options.lora:
            wrapped.merge_and_unload()
        return {"labels": ids, "start": scale.start}

    def raw(self, net: Pretrained, texts: Sequence[str], arrays: Mapping[str, NDArray[Any]]) -> Floats:
        import torch

        hidden = net.embed(net.tokens(texts, suffix=self.options.suffix), batch=self.options.batch)
        with torch.no_grad():
            logits = label_logits(net, hidden, arrays["labels"]).cpu().numpy()
        return np.asarray(logits + arrays["start"], np.float64)
