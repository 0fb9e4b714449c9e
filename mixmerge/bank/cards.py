"""``bank.json``: all that a bank's folder says of itself but the values. Legend as in ``records``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from mixmerge.bank.records import Kind
from mixmerge.bank.vouched import FileCard, Vouched, damaged
from mixmerge.errors import CheckpointError, Fault

FOLDER, CARD = "bank", "bank.json"
Bits = Literal[8, 16, 32]
AGAIN = "Make the bank again"


@dataclass(frozen=True)
class SiteCard:
    """One site.

    Args:
        inputs, outputs: d (of a table V) and o.
        ranks: of each expert.
        kind, tied: as in ``Site``.
        file: that has its factors.
    """

    inputs: int
    outputs: int
    ranks: tuple[int, ...]
    kind: Kind
    tied: bool
    file: str

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors ``a``, ``b`` and ``scale``."""
        rank = sum(self.ranks)
        a = (self.inputs, rank) if self.kind == "embedding" else (rank, self.inputs)
        return {"a": a, "b": (rank, self.outputs), "scale": (rank,)}


@dataclass(frozen=True)
class VectorCard:
    """What all experts add to one vector: its length, and the file that has it."""

    length: int
    file: str


@dataclass(frozen=True, kw_only=True)
class BankCard(Vouched):
    """A bank without its values.

    Args:
        experts: names, in the bank's order.
        base: fingerprint of the base.
        hashes: of every expert, its fingerprint.
        bits: of a number in the factors; None: as they were given.
        sites, vectors: by the name of the base's tensor.
        earlier: hashes of the banks that this one was made of by adding experts at their end.
    """

    experts: tuple[str, ...]
    base: str
    hashes: Mapping[str, str]
    bits: Bits | None
    sites: Mapping[str, SiteCard]
    vectors: Mapping[str, VectorCard]
    earlier: tuple[str, ...] = ()

    format = "mixmerge-bank"
    version = 1
    again = AGAIN

    @property
    def parameters(self) -> int:
        """Numbers in all factors and vectors."""
        factors = sum(sum(site.ranks) * (site.inputs + site.outputs) for site in self.sites.values())
        return factors + len(self.experts) * sum(one.length for one in self.vectors.values())


def read_card(folder: Path) -> BankCard:
    """What a bank is.

    Args:
        folder: that has the folder ``bank``.

    Raises:
        CheckpointError: there is none; its card is damaged, was changed, or is of another version.
    """
    path = Path(folder) / FOLDER / CARD
    if not path.is_file():
        raise CheckpointError(Fault(str(folder), "holds no bank", f"A folder with {FOLDER}/{CARD}"))
    raw = BankCard.read(path, what="a bank's card")
    try:
        card = _card(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, AGAIN) from error
    card.believed(path, raw.get("hash"))
    return card


def _card(raw: Mapping[str, Any]) -> BankCard:
    sites = {
        name: SiteCard(**{**one, "ranks": tuple(map(int, one["ranks"]))})
        for name, one in raw["sites"].items()
    }
    card = BankCard(
        experts=tuple(map(str, raw["experts"])),
        base=raw["base"],
        hashes=dict(raw["hashes"]),
        bits=raw["bits"],
        sites=sites,
        vectors={name: VectorCard(**one) for name, one in raw["vectors"].items()},
        files={name: FileCard(**one) for name, one in raw["files"].items()},
        earlier=tuple(raw["earlier"]),
    )
    files = {site.file for site in sites.values()} | {one.file for one in card.vectors.values()}
    kinds = {site.kind for site in sites.values()} <= set(get_args(Kind))
    lengths = all(len(site.ranks) == len(card.experts) and min(site.ranks) >= 0 for site in sites.values())
    plain = all(Path(name).name == name != ".." for name in card.files)
    sizes = [size for site in sites.values() for size in (site.inputs, site.outputs)]
    sizes += [one.length for one in card.vectors.values()] + [one.nbytes for one in card.files.values()]
    texts = [card.base, *card.hashes.values(), *card.earlier, *(one.sha256 for one in card.files.values())]
    plain &= all(type(one) is int for one in sizes) and all(isinstance(one, str) for one in texts)
    plain &= len(set(card.experts)) == len(card.experts) and card.hashes.keys() == set(card.experts)
    plain &= all(isinstance(site.tied, bool) for site in sites.values())
    if not (kinds and lengths and plain and files <= card.files.keys() and card.bits in (None, 8, 16, 32)):
        raise ValueError("facts that contradict each other")
    return card
