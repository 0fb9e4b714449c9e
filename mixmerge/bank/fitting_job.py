"""What a gate is fitted from, and what is missing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mixmerge.bank.gate import Want
from mixmerge.bank.records import Bank, side_by_side
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts.loading import LoadedExpert

Encode = Callable[[Sequence[str]], Tensor]
Progress = Callable[[str, int, int, float | None], None]


@dataclass(frozen=True)
class Job:
    """Arguments as in ``fitting.fit_gate``."""

    bank: Bank
    model: LoadedExpert | None
    rows: Mapping[str, Sequence[Row]]
    given: Mapping[str, Tensor]
    encode: Encode | None
    seed: int
    progress: Progress
    where: str

    def lacking(self, want: Want, kind: str) -> Iterator[Fault]:
        """What is missing of one of ``Gate.wants``."""
        if want == "model":
            yield from self._of_model(kind)
        elif want == "rows" and not any(self.rows.values()):
            yield Fault(
                f"{self.where}: rows", f"{kind} learns from rows, and there are none", "Rows of the tasks"
            )
        elif want == "rows of each expert":
            for name in self.bank.experts:
                if not self.rows.get(name):
                    what = f"the expert {name!r} has none, and {kind} learns from rows of each"
                    yield Fault(f"{self.where}: rows", what, "Some of what it was trained on")
        elif want == "encode" and self.encode is None:
            yield Fault(self.where, f"{kind} reads queries by a text encoder, and there is none")
        elif want == "given" and not self.given:
            yield Fault(
                self.where, f"{kind} takes a router trained elsewhere, and none is given", "SITE.router"
            )

    def _of_model(self, kind: str) -> Iterator[Fault]:
        if self.model is None:
            yield Fault(self.where, f"{kind} learns with the base at hand, and it is not given")
        elif self.model.tokenizer is None:
            yield Fault(self.model.name, "has no tokenizer, so it cannot be shown text")
        elif self.model.kind == "other":
            yield Fault(
                self.model.name, "is no language model and no classifier, so it has no loss to learn from"
            )

    @property
    def base(self) -> LoadedExpert:
        """The model, where it is wanted."""
        if self.model is None:
            raise MixmergeError(Fault(self.where, "the base is not given"))
        return self.model

    def encoded(self, texts: Sequence[str]) -> Tensor:
        """``(N, f)`` features."""
        if self.encode is None:
            raise MixmergeError(Fault(self.where, "there is no text encoder"))
        return self.encode(texts).float().cpu()


def without_progress(what: str, done: int, total: int, loss: float | None) -> None:
    """Says nothing."""


def only(bank: Bank, expert: int) -> Bank:
    """The bank of one expert, at the sites where it changes something."""
    sites = {
        name: side_by_side(name, [site.entry(expert)], kind=site.kind, tied=site.tied)
        for name, site in bank.sites.items()
        if site.ranks[expert]
    }
    vectors = {name: one[expert : expert + 1] for name, one in bank.vectors.items()}
    return Bank((bank.experts[expert],), sites, vectors)
