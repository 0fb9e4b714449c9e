"""What a router's second training adds to its weights: tensor by tensor, and not bound to sum to 1.

Legend as in ``mixmerge.bank.gate``; N rows, G groups of tensors that share weights, R ranks of a site.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mixmerge.bank.gates.places import PerSite
from mixmerge.bank.records import Bank

_LAYER = re.compile(r"\.(\d+)\.")
_LEAST, _SPREAD = (
    1e-4,
    3.0,
)  # weights below are alike; their logarithms are brought to the size of a network's inputs


class TaskTraining(BaseModel):
    """A second training of a router, by the loss of the experts' own tasks. A recipe's ``gate: task:`` says the same.

    Args:
        scope: which tensors share weights: those of a ``layer``, or those of one module, ``site``.
        hidden: width of the network between the router's weights and what is added to them.
        ranks: learn a factor for every rank of the bank too, the same for all inputs.
        epochs: passes over the rows, at most.
        batch: rows in a step.
        learning_rate: of the network; it rises for the first 6 % of the steps and falls to 0 as a cosine does.
        rank_rate: the same of the factors of ranks.
        weight_decay: of the network.
        label_smoothing: share of a label given to all classes, or tokens, alike.
        patience: epochs without a better loss on the rows held out, after which it ends.
        dtype: the model, the bank and their products in training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scope: Literal["layer", "site"] = "layer"
    hidden: int = Field(default=128, ge=1)
    ranks: bool = True
    epochs: int = Field(default=3, ge=1)
    batch: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    rank_rate: float = Field(default=2e-2, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    patience: int = Field(default=1, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"


class Tensors:
    """Which tensors of a bank share weights, and the ranks of its sites.

    Args:
        groups: name of a tensor -> the number of its group, from 0 without gaps.
        ranks: name of a site -> the rank of each expert there.
    """

    def __init__(self, groups: Mapping[str, int], ranks: Mapping[str, tuple[int, ...]]) -> None:
        self.groups, self.ranks = dict(groups), dict(ranks)
        self.count = max(self.groups.values(), default=-1) + 1

    @classmethod
    def of(cls, bank: Bank, scope: str) -> Tensors:
        names = {name: _group(name, scope) for name in (*bank.sites, *bank.vectors)}
        numbers = {group: number for number, group in enumerate(sorted(set(names.values()), key=_in_order))}
        ranks = {name: tuple(site.ranks) for name, site in bank.sites.items()}
        return cls({name: numbers[group] for name, group in names.items()}, ranks)

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Tensors:
        """What ``written`` gave."""
        return cls(said["groups"], {name: tuple(ranks) for name, ranks in said["ranks"].items()})

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        return {"groups": self.groups, "ranks": {name: list(ranks) for name, ranks in self.ranks.items()}}


class Refined(nn.Module):
    """``w_ge = p_e + f(log p)_ge``, at a site's rank i of expert e times ``c_i``: f starts at 0 and c at 1.

    p are the router's weights, so that a text that two experts may be meant by can get more than a half of both, and f
    is a network of one hidden layer (GELU). Ours: Twin-Merging's weights are the same for all tensors and sum to 1.

    Args:
        experts: E.
        tensors: of the bank.
        said: width, ranks.
    """

    def __init__(self, experts: int, tensors: Tensors, said: TaskTraining) -> None:
        super().__init__()
        self.experts, self.tensors = experts, tensors
        last = nn.Linear(said.hidden, tensors.count * experts)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.network = nn.Sequential(nn.Linear(experts, said.hidden), nn.GELU(), last)
        totals = {name: sum(ranks) for name, ranks in tensors.ranks.items()} if said.ranks else {}
        self.factors = PerSite({name: torch.ones(total) for name, total in totals.items()}, learned=True)
        owners = {
            name: torch.tensor(
                [expert for expert, rank in enumerate(tensors.ranks[name]) for _ in range(rank)]
            )
            for name in totals
        }
        self.owners = PerSite(owners, saved=False)

    def weights(self, router: Tensor) -> Tensor:
        """``(N, E)`` of the router to ``(N, G, E)``; what ``top_k`` has put to 0 stays 0."""
        logs = router.clamp_min(_LEAST).log() / _SPREAD
        added = self.network(logs).unflatten(-1, (self.tensors.count, self.experts))
        return torch.where(router[:, None] == 0, 0.0, router[:, None] + added)

    def of_ranks(self, site: str, weights: Tensor) -> Tensor | None:
        """``(.., E)`` of a tensor to ``(.., R)``; None where its ranks have no factors of their own."""
        factors = self.factors.get(site)
        return None if factors is None else weights.index_select(-1, self.owners[site]) * factors


def _group(name: str, scope: str) -> str:
    layer = _LAYER.search(name)
    return name.rpartition(".")[0] if scope == "site" or layer is None else layer.group(1)


def _in_order(group: str) -> tuple[float, str]:
    return (float(group), "") if group.isdigit() else (math.inf, group)
