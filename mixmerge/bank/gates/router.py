"""Twin-Merging's router: a small network from features of a prompt to weights of the experts.

Legend as in ``mixmerge.bank.gate``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mixmerge.bank.gate import Features, Gate, Run
from mixmerge.bank.gates.refined import Refined, TaskTraining, Tensors
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank
from mixmerge.errors import Fault

Norm = Literal["batch", "layer", "none"]


class RouterOptions(BaseModel):
    """The network and its training; defaults as published. A recipe's block ``gate:`` says the same.

    Args:
        features: ``hidden``, ``layers`` or ``text``, of a query. The last hidden states are the published ones; early
            layers may tell kinds of texts apart better.
        per_token: weights for each token, by the base's hidden state of it.
        hidden: layers before the last.
        width: of such a layer, as a multiple of the features' number.
        norm: of such a layer.
        dropout: of its outputs, in training.
        top_k: experts that get anything, the likeliest, their weights made to sum to 1; None: all.
        epochs: passes over the rows trained on.
        batch: rows in a step.
        learning_rate, weight_decay: of AdamW.
        label_smoothing: share of a label given to all experts alike.
        holdout: share of the rows held out.
        temperature: ``held_out``: the likeliest on the rows held out; ``one``: 1.
        task: a second training, by the loss of the experts' tasks; None: none, as published.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: Literal["hidden", "layers", "text"] = "hidden"
    per_token: bool = False
    hidden: int = Field(default=2, ge=0, le=8)
    width: float = Field(default=2.0, gt=0, le=64)
    norm: Norm = "batch"
    dropout: float = Field(default=0.5, ge=0, lt=1)
    top_k: int | None = Field(default=None, ge=1)
    epochs: int = Field(default=50, ge=1)
    batch: int = Field(default=256, ge=2)
    learning_rate: float = Field(default=5e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    holdout: float = Field(default=0.2, gt=0, lt=1)
    temperature: Literal["held_out", "one"] = "held_out"
    task: TaskTraining | None = None


class Router(Gate):
    """``softmax(MLP((x - mean) / std) / temperature)``, one set of weights for a row or for each of its tokens.

    Source: Twin-Merging, arXiv:2406.15479, section 4.3 and its released code: layers of twice the features' number,
    BatchNorm, LeakyReLU, dropout 0.5. Added here: features are standardised by means and deviations of the rows trained
    on; a temperature; ``top_k``; what a second training adds to the weights (``Refined``). The released code selects
    the router by its accuracy on the test split and takes the hidden state of a token sampled later for generators;
    neither is done here.

    A row's weights never depend on its batch-mates: BatchNorm's are the statistics of training, unless somebody puts
    the gate in training mode.

    Args:
        experts: E, 1 or more.
        inputs: f, numbers in a feature; of ``per_token`` h.
        options: of the gate.
        temperature: above 0; below 1 sharpens.
        encoder: which model gave the features, for ``text``.
        tensors: of the bank, of a router trained by the task's loss; None: its weights are the same everywhere.
    """

    kind = "router"
    options = RouterOptions
    fitter = "mixmerge.bank.gates.router_fit:router"
    wants = ("rows of each expert",)

    def __init__(
        self,
        experts: int,
        inputs: int,
        options: RouterOptions | None = None,
        *,
        temperature: float = 1.0,
        encoder: str = "",
        tensors: Tensors | None = None,
    ) -> None:
        super().__init__()
        said = options or RouterOptions()
        self.experts, self.inputs, self.said = experts, inputs, said
        self.temperature, self.encoder = temperature, encoder
        # A row's features are asked for by what the settings say, not by the class.
        used: Features = "" if said.per_token else said.features
        self.features = used  # type: ignore[misc]
        self.second_pass = said.per_token  # type: ignore[misc]
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("deviation", torch.ones(inputs))
        self.network = _network(experts, inputs, said)
        self.refined: Refined | None = None
        self._seen: WeakKeyDictionary[Run, Tensor] = WeakKeyDictionary()
        self._parts: tuple[Tensor, bool, dict[int | str, Mix]] | None = None
        if tensors is not None:
            self.refine(tensors)
        self.eval()

    mean: Tensor
    deviation: Tensor

    @classmethod
    def faults(cls, bank: Bank, options: BaseModel) -> list[Fault]:
        whole = isinstance(options, RouterOptions) and not (options.per_token and options.task)
        what = "trains weights of whole prompts, and per_token asks for those of tokens"
        return [] if whole else [Fault("gate.task", what, run="Remove one of them")]

    def refine(self, tensors: Tensors) -> Refined:
        """Give every group of tensors weights of its own, as yet the router's."""
        said = TaskTraining() if self.said.task is None else self.said.task
        self.refined = Refined(self.experts, tensors, said)
        return self.refined

    def settings(self) -> dict[str, Any]:
        said = {
            "experts": self.experts,
            "inputs": self.inputs,
            "options": self.said.model_dump(mode="json"),
            "temperature": self.temperature,
            "encoder": self.encoder,
        }
        return said if self.refined is None else {**said, "tensors": self.refined.tensors.written()}

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Router:
        options = RouterOptions.model_validate(settings["options"])
        return cls(
            settings["experts"],
            settings["inputs"],
            options,
            temperature=settings["temperature"],
            encoder=settings["encoder"],
            tensors=Tensors.read(settings["tensors"]) if "tensors" in settings else None,
        )

    def logits(self, features: Tensor) -> Tensor:
        """``(N, f)`` to ``(N, E)``, before the temperature."""
        found: Tensor = self.network((features.to(self.mean) - self.mean) / self.deviation)
        return found

    def weights(self, features: Tensor) -> Tensor:
        """``(N, f)`` to ``(N, E)`` that sum to 1."""
        logits = self.logits(features) / self.temperature
        top = self.said.top_k
        if top is not None and top < self.experts:
            kept = logits.topk(top, dim=-1).indices
            logits = torch.full_like(logits, float("-inf")).scatter(-1, kept, logits.gather(-1, kept))
        return logits.softmax(-1)

    def query(self, features: Tensor) -> Tensor:
        """``(B, E)``; of a router that was trained by the task's loss ``(B, G * E)``, group by group."""
        router = self.weights(features)
        return router if self.refined is None else self.refined.weights(router).flatten(1)

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        if not self.said.per_token:
            if run.rows is None or self.refined is None:
                return None if run.rows is None else Mix(run.rows)
            return self._of_tensor(site, run.rows, self.refined)
        if run.hidden is None:
            return None
        if run not in self._seen:  # all sites of a pass ask for the same
            flat = self.weights(run.hidden.flatten(0, 1))  # (B * T, E)
            self._seen[run] = flat.view(*run.hidden.shape[:2], self.experts)
        found = self._seen[run]
        # A pooler sees one token of each row, its first.
        return Mix(found[:, :1] if u.dim() == 3 and u.shape[1] == 1 else found)

    def _of_tensor(self, site: str, rows: Tensor, refined: Refined) -> Mix:
        """Kept while the rows stay the same: executors sort a decision they know once."""
        learns = torch.is_grad_enabled()
        if self._parts is None or self._parts[0] is not rows or self._parts[1] is not learns:
            self._parts = rows, learns, {}
        made, group = self._parts[2], refined.tensors.groups[site]
        if group not in made:
            made[group] = Mix(rows.view(len(rows), -1, self.experts)[:, group].contiguous())
        if site not in made:
            ranks = refined.of_ranks(site, made[group].weights)
            made[site] = made[group] if ranks is None else Mix(ranks, by="rank")
        return made[site]


def _network(experts: int, inputs: int, said: RouterOptions) -> nn.Sequential:
    layers: list[nn.Module] = []
    width, wide = max(1, round(said.width * inputs)), inputs
    for _ in range(said.hidden):
        layers.append(nn.Linear(wide, width))
        if said.norm != "none":
            layers.append(nn.BatchNorm1d(width) if said.norm == "batch" else nn.LayerNorm(width))
        layers += [nn.LeakyReLU(), nn.Dropout(said.dropout)]
        wide = width
    return nn.Sequential(*layers, nn.Linear(wide, experts))
