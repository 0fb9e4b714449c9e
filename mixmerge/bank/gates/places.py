"""The linear sites that a gate speaks for, its tensors by site, and what a gate says where it has no inputs.

Legend as in ``gate``; r_e the rank of an expert at a site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from mixmerge.bank.gate import Gate, Run
from mixmerge.bank.mix import Mix
from mixmerge.bank.records import Bank


class Options(BaseModel):
    """What a user may say of a gate: one key for each field, of exactly its type."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SiteOptions(Options):
    """Of a gate that decides at each linear site.

    Args:
        others: what embeddings, norms and biases of layers without factors get: ``mean``, the same share of every
            expert, so that one expert alone is that expert; ``base``, nothing.
    """

    others: Literal["mean", "base"] = "mean"


class TrainingOptions(SiteOptions):
    """Of a gate that is trained.

    Args:
        steps: of AdamW.
        learning_rate: after the warm-up, constant.
        warm_up: share of the steps in which it rises evenly.
        weight_decay: of AdamW.
        batch_size: rows of a step.
        max_tokens: of a row; what is longer is cut.
    """

    steps: int = Field(default=100, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    warm_up: float = Field(default=0.06, ge=0, le=1)
    weight_decay: float = Field(default=0.0, ge=0)
    batch_size: int = Field(default=8, ge=1)
    max_tokens: int = Field(default=512, ge=2)


@dataclass(frozen=True)
class Places:
    """Which linear sites a bank has, and who is there.

    Args:
        experts: E.
        widths: d of each site, by name.
        ranks: ``(r_0, .., r_E-1)`` of each; 0 where an expert changes nothing.
    """

    experts: int
    widths: Mapping[str, int]
    ranks: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, bank: Bank) -> Places:
        linear = {name: site for name, site in bank.sites.items() if site.kind == "linear"}
        widths = {name: int(site.a.shape[1]) for name, site in linear.items()}
        return cls(len(bank.experts), widths, {name: site.ranks for name, site in linear.items()})

    @classmethod
    def read(cls, said: Mapping[str, Any]) -> Places:
        """What ``written`` gave."""
        sites = said["sites"]
        return cls(
            said["experts"],
            {name: one[0] for name, one in sites.items()},
            {name: tuple(one[1]) for name, one in sites.items()},
        )

    def written(self) -> dict[str, Any]:
        """As JSON values."""
        sites = {name: [width, list(self.ranks[name])] for name, width in self.widths.items()}
        return {"experts": self.experts, "sites": sites}

    def home(self, name: str) -> str | None:
        """The linear site whose inputs a tensor has: itself, or the weight beside a bias; None if there is none."""
        weight = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
        return weight if weight in self.widths else None


class PerSite(nn.Module):
    """A tensor for each site, by its name.

    Args:
        tensors: of each site.
        learned: they are parameters; else buffers.
        saved: they are in the state dict.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, learned: bool = False, saved: bool = True) -> None:
        super().__init__()
        self.sites, self.saved = tuple(tensors), saved
        for site, tensor in tensors.items():
            if learned:
                self.register_parameter(_key(site), nn.Parameter(tensor))
            else:
                self.register_buffer(_key(site), tensor, persistent=saved)

    def __getitem__(self, site: str) -> Tensor:
        found: Tensor = getattr(self, _key(site))
        return found

    def get(self, site: str) -> Tensor | None:
        """That of a site, if it has one."""
        return self[site] if site in self.sites else None

    def __contains__(self, site: str) -> bool:
        return site in self.sites

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)


def _key(site: str) -> str:
    """No name in a state dict may hold a dot."""
    return site.replace(".", "/")


Said = TypeVar("Said", bound=SiteOptions)


class SiteGate(Gate, Generic[Said]):
    """A gate that decides at every linear site, from its inputs or from what ``Run`` holds.

    Args:
        places: of the bank.
        options: of the kind.
    """

    options: ClassVar[type[SiteOptions]] = SiteOptions

    def __init__(self, places: Places, options: Said) -> None:
        super().__init__()
        self.places, self.said = places, options
        absent = {site: torch.tensor(ranks) == 0 for site, ranks in places.ranks.items() if 0 in ranks}
        self.absent = PerSite(absent, saved=False)

    def settings(self) -> dict[str, Any]:
        return {"places": self.places.written(), "options": self.said.model_dump(mode="json")}

    @classmethod
    def build(cls, settings: Mapping[str, Any]) -> Self:
        options = cast(Said, cls.options.model_validate(settings["options"]))
        return cls(Places.read(settings["places"]), options)

    def known(self) -> int:
        return self.places.experts

    def mix(self, site: str, u: Tensor, run: Run) -> Mix | None:
        home = self.places.home(site)
        if home is not None and u.is_floating_point() and u.shape[-1] == self.places.widths[home]:
            return self.decide(home, u, run)
        return self.elsewhere(u)

    def elsewhere(self, u: Tensor) -> Mix | None:
        """What ``others`` says."""
        if self.said.others == "base":
            return None
        count = self.places.experts
        return Mix(torch.full((len(u), count), 1 / count, device=u.device))

    def decide(self, site: str, u: Tensor, run: Run) -> Mix | None:
        """The weights at a linear site.

        Args:
            site: its name.
            u: ``(B, T, d)``; ``(1, B * T, d)`` of layers that see rows and tokens as one.
            run: of the batch.
        """
        raise NotImplementedError
