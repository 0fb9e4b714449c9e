"""Twin-Merging's router: a small network from features of a prompt to weights of the experts.

Legend as in ``mixmerge.bank.gate``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from mixmerge.bank.gate import Features, Gate, Run
from mixmerge.bank.mix import Mix

Norm = Literal["batch", "layer", "none"]


class Router(Gate):
    """``softmax(MLP((x - mean) / std) / temperature)``, one set of weights for a row or for each of its tokens.

    Source: Twin-Merging, arXiv:2406.15479, section 4.3 and its released code: layers of twice the features' number,
    BatchNorm, LeakyReLU, dropout 0.5. Added here: features are standardised by means and deviations of the rows trained
    on; a temperature; ``top_k``. The released code selects the router by its accuracy on the test split and takes the
    hidden state of a token sampled later for generators; neither is done here.

    A row's weights never depend on its batch-mates: BatchNorm's are the statistics of training, unless somebody puts
    the gate in training mode.

    Args:
        experts: E, 1 or more.
        inputs: f, numbers in a feature; of ``per_token`` h.
        use: the features of a query: ``hidden`` or ``text``.
        per_token: weights for each token, by the base's hidden state of it.
        hidden: layers before the last.
        width: of such a layer, as a multiple of ``inputs``.
        norm: of such a layer.
        dropout: of its outputs, in training.
        temperature: above 0; below 1 sharpens.
        top_k: experts that get anything, the likeliest, their weights made to sum to 1; None: all.
        encoder: which model gave the features, for ``text``.
    """

    kind = "router"

    def __init__(
        self,
        experts: int,
        inputs: int,
        *,
        use: Literal["hidden", "text"] = "hidden",
        per_token: bool = False,
        hidden: int = 2,
        width: float = 2.0,
        norm: Norm = "batch",
        dropout: float = 0.5,
        temperature: float = 1.0,
        top_k: int | None = None,
        encoder: str = "",
    ) -> None:
        super().__init__()
        self.experts, self.inputs, self.use, self.per_token = experts, inputs, use, per_token
        self.hidden, self.width, self.norm, self.dropout = hidden, width, norm, dropout
        self.temperature, self.top_k, self.encoder = temperature, top_k, encoder
        # A row's features are asked for by what the settings say, not by the class.
        used: Features = "" if per_token else use
        self.features = used  # type: ignore[misc]
        self.second_pass = per_token  # type: ignore[misc]
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.network = _network(experts, inputs, hidden, max(1, round(width * inputs)), norm, dropout)
        self.eval()

    mean: Tensor
    deviation: Tensor

    def settings(self) -> dict[str, Any]:
        return {
            "experts": self.experts,
            "inputs": self.inputs,
            "use": self.use,
            "per_token": self.per_token,
            "hidden": self.hidden,
            "width": self.width,
            "norm": self.norm,
            "dropout": self.dropout,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "encoder": self.encoder,
        }

    def logits(self, features: Tensor) -> Tensor:
        """``(N, f)`` to ``(N, E)``, before the temperature."""
        found: Tensor = self.network((features.to(self.mean) - self.mean) / self.deviation)
        return found

    def weights(self, features: Tensor) -> Tensor:
        """``(N, f)`` to ``(N, E)`` that sum to 1."""
        logits = self.logits(features) / self.temperature
        if self.top_k is not None and self.top_k < self.experts:
            kept = logits.topk(self.top_k, dim=-1).indices
            logits = torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))
        return logits.softmax(-1)

    def query(self, features: Tensor) -> Tensor:
        return self.weights(features)

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        if not self.per_token:
            return None if run.rows is None else Mix(run.rows)
        if run.hidden is None:
            return None
        flat = self.weights(run.hidden.flatten(0, 1))  # (B * T, E)
        return Mix(flat.view(*run.hidden.shape[:2], self.experts))


def _network(experts: int, inputs: int, hidden: int, width: int, norm: Norm, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    wide = inputs
    for _ in range(hidden):
        layers.append(nn.Linear(wide, width))
        if norm != "none":
            layers.append(nn.BatchNorm1d(width) if norm == "batch" else nn.LayerNorm(width))
        layers += [nn.LeakyReLU(), nn.Dropout(dropout)]
        wide = width
    return nn.Sequential(*layers, nn.Linear(wide, experts))
