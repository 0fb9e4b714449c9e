"""A bank as a folder of JSON and safetensors; the experts themselves are never in it.

``bank/bank.json`` says what is there (``cards``), ``bank/factors-00001.safetensors`` and the next hold ``a/SITE``,
``b/SITE``, ``scale/SITE`` and ``vector/NAME``. A gate lies beside it (``gate_files``). Legend as in ``records``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixmerge.bank.assembling import Changes, extended
from mixmerge.bank.cards import (
    AGAIN,
    CARD,
    FOLDER,
    BankCard,
    Bits,
    SiteCard,
    VectorCard,
    read_card,
)
from mixmerge.bank.eight_bits import from_codes, to_codes
from mixmerge.bank.gate_files import load_gate, save_gate
from mixmerge.bank.publishing import check_free, hidden, publish, unwritable
from mixmerge.bank.records import Bank, Site
from mixmerge.bank.vouched import FileCard, check_bytes, check_size
from mixmerge.checkpoint.header import FLOATS, read_header
from mixmerge.errors import CheckpointError, Fault, MixmergeError

__all__ = [
    "FOLDER",
    "BankCard",
    "BankWriter",
    "extend_bank",
    "load_bank",
    "load_gate",
    "read_card",
    "save_bank",
    "save_gate",
]

SHARD_SIZE = 1_000_000_000
_TYPES = {16: torch.bfloat16, 32: torch.float32}


class BankWriter:
    """Writes a bank site by site; no more than a shard is in memory. The folder ``bank`` appears when it is whole.

    Use it in a ``with`` block, or call ``close`` at the end.

    Args:
        folder: in which the folder ``bank`` is made.
        experts: names, in the order of what will be side by side.
        base: fingerprint of the base.
        hashes: fingerprint of every expert.
        bits: of a number in the factors: 8 (``eight_bits``), 16 (bfloat16), 32, or None for their own type. Vectors
            keep theirs.
        shard_size: bytes; a site is never split.
        earlier: hashes of the banks that this one only adds experts to.
        overwrite: take the place of a bank that is there.

    Raises:
        OutputError: a bank is there; the disk refuses.
        MixmergeError: two experts of one name, hashes of others than the experts, an unknown number of bits.
    """

    def __init__(
        self,
        folder: Path,
        experts: Sequence[str],
        *,
        base: str,
        hashes: Mapping[str, str],
        bits: Bits | None = None,
        shard_size: int = SHARD_SIZE,
        earlier: Sequence[str] = (),
        overwrite: bool = False,
    ) -> None:
        faults = []
        if not experts or len(set(experts)) < len(experts):
            faults.append(Fault("bank", "has no experts, or two of one name", "One name for each"))
        if set(hashes) != set(experts):
            faults.append(Fault("bank", "has hashes of others than its experts", "One for each"))
        if bits not in (None, 8, 16, 32):
            faults.append(Fault("bank", f"has {bits} bits", "8, 16, 32 or none"))
        if faults:
            raise MixmergeError(faults)
        self.folder = Path(folder) / FOLDER
        check_free(self.folder, overwrite=overwrite, of=[CARD])
        self._new = hidden(self.folder)
        self._card = BankCard(
            experts=tuple(experts),
            base=base,
            hashes=dict(hashes),
            bits=bits,
            sites={},
            vectors={},
            files={},
            earlier=tuple(earlier),
        )
        self._sites: dict[str, SiteCard] = {}
        self._vectors: dict[str, VectorCard] = {}
        self._files: dict[str, FileCard] = {}
        self._size, self._waiting, self._bytes = shard_size, dict[str, Tensor](), 0
        self.card: BankCard | None = None

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            shutil.rmtree(self._new, ignore_errors=True)

    def add(self, site: Site) -> None:
        """Write one site; one of rank 0 is left out.

        Raises:
            MixmergeError: it is there already, is of another number of experts, its factors do not fit each other or
                are not finite.
            OutputError: the disk refuses.
        """
        wrong = self._wrong(site)
        if wrong:
            raise MixmergeError(Fault(f"bank: {site.name}", wrong))
        if not site.rank:
            return
        stored = self._stored(site)
        file = self._keep({f"{part}/{site.name}": getattr(stored, part) for part in ("a", "b", "scale")})
        inputs = site.a.shape[0 if site.kind == "embedding" else 1]
        self._sites[site.name] = SiteCard(
            int(inputs), int(site.b.shape[1]), tuple(site.ranks), site.kind, site.tied, file
        )

    def add_vectors(self, name: str, values: Tensor) -> None:
        """Write what all experts add to one vector.

        Args:
            name: of the base's tensor.
            values: ``(E, n)``.

        Raises:
            MixmergeError: it is there already, of another shape, or not finite.
            OutputError: the disk refuses.
        """
        wrong = ""
        if name in self._vectors or name in self._sites:
            wrong = "is there already"
        elif values.dim() != 2 or len(values) != len(self._card.experts):
            wrong = f"has values of shape {tuple(values.shape)} for {len(self._card.experts)} experts"
        elif not values.isfinite().all():
            wrong = "holds NaN or Inf"
        if wrong:
            raise MixmergeError(Fault(f"bank: {name}", wrong))
        file = self._keep({f"vector/{name}": values})
        self._vectors[name] = VectorCard(int(values.shape[1]), file)

    def close(self) -> BankCard:
        """Write the card, and give the folder its name.

        Raises:
            OutputError: the disk refuses.
            MixmergeError: nothing was added.
        """
        if self.card is not None:
            return self.card
        try:
            if not self._sites and not self._vectors:
                raise MixmergeError(Fault("bank", "is empty: no expert changes anything"))
            self._flush()
            card = replace(self._card, sites=self._sites, vectors=self._vectors, files=self._files)
            (self._new / CARD).write_text(card.text(), encoding="utf-8")
            publish(self._new, self.folder)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        finally:
            shutil.rmtree(self._new, ignore_errors=True)
        self.card = card
        return card

    def _wrong(self, site: Site) -> str:
        if site.name in self._sites or site.name in self._vectors:
            return "is there already"
        if len(site.ranks) != len(self._card.experts):
            return f"has ranks of {len(site.ranks)} experts, the bank {len(self._card.experts)}"
        ranks = site.a.shape[-1] if site.kind == "embedding" else site.a.shape[0]
        if site.a.dim() != 2 or site.b.dim() != 2:
            return "has factors that are no matrices"
        if not site.rank == ranks == site.b.shape[0] == len(site.scale):
            return f"has factors of {ranks} and {site.b.shape[0]} ranks, the experts {site.rank}"
        finite = all(bool(one.isfinite().all()) for one in (site.a, site.b, site.scale))
        return "" if finite else "holds NaN or Inf"

    def _stored(self, site: Site) -> Site:
        if self._card.bits == 8:
            return to_codes(site)
        dtype = site.b.dtype if self._card.bits is None else _TYPES[self._card.bits]
        return site.to("cpu", dtype)

    def _keep(self, tensors: Mapping[str, Tensor]) -> str:
        """Into the shard that is being filled, or the next; returns its name."""
        # copies: safetensors takes no two views of one storage
        ready = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
        nbytes = sum(one.numel() * one.element_size() for one in ready.values())
        if self._waiting and self._bytes + nbytes > self._size:
            self._flush()
        self._waiting.update(ready)
        self._bytes += nbytes
        return self._name()

    def _name(self) -> str:
        return f"factors-{len(self._files) + 1:05d}.safetensors"

    def _flush(self) -> None:
        path = self._new / self._name()
        try:
            save_file(self._waiting, path)
            self._files[path.name] = FileCard.of(path)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        except SafetensorError as error:  # its own name for what the disk refuses
            raise unwritable(self.folder, OSError(str(error))) from error
        self._waiting, self._bytes = {}, 0


def save_bank(
    folder: Path,
    bank: Bank,
    *,
    base: str,
    hashes: Mapping[str, str],
    bits: Bits | None = None,
    shard_size: int = SHARD_SIZE,
    earlier: Sequence[str] = (),
    overwrite: bool = False,
) -> BankCard:
    """Write a bank that is in memory. Arguments and errors as those of ``BankWriter``."""
    with BankWriter(
        folder,
        bank.experts,
        base=base,
        hashes=hashes,
        bits=bits,
        shard_size=shard_size,
        earlier=earlier,
        overwrite=overwrite,
    ) as writer:
        for site in bank.sites.values():
            writer.add(site)
        for name, values in bank.vectors.items():
            writer.add_vectors(name, values)
        return writer.close()


def extend_bank(
    folder: Path, out: Path, name: str, changes: Changes, *, fingerprint: str, overwrite: bool = False
) -> BankCard:
    """Write a bank with one more expert at its end, in the same bits.

    Gates for the old bank that are ``open_to_new`` are taken by the new one: its card names the old one's hash.

    Args:
        folder: that has the old bank, which stays as it is.
        out: in which the new one is made.
        name: of the expert.
        changes: as ``adapter_entries`` and ``to_low_rank`` give them.
        fingerprint: the expert's.
        overwrite: as in ``BankWriter``.

    Raises:
        CheckpointError: as ``load_bank``.
        MixmergeError: as ``extended``.
        OutputError: as ``BankWriter``.
    """
    card = read_card(folder)
    return save_bank(
        out,
        extended(load_bank(folder), name, changes),
        base=card.base,
        hashes={**card.hashes, name: fingerprint},
        bits=card.bits,
        earlier=(*card.earlier, card.hash),
        overwrite=overwrite,
    )


def load_bank(folder: Path) -> Bank:
    """Read a bank, every byte of it checked by its hash.

    Factors of 8 bits come as bfloat16, which has them exactly; others in the type they were written in.

    Args:
        folder: that has the folder ``bank``.

    Raises:
        CheckpointError: as ``read_card``; or files are missing, cut off, changed, hold other tensors than the card
            says, or NaN. All faults at once.
    """
    card = read_card(folder)
    place = Path(folder) / FOLDER
    faults: list[Fault] = []
    tensors: dict[str, Tensor] = {}
    wanted = _wanted(card)
    for name, facts in card.files.items():
        try:
            tensors |= _checked(place / name, facts, wanted[name], codes=card.bits == 8)
        except CheckpointError as error:
            faults += error.faults
    if faults:
        raise CheckpointError(faults)
    sites = {}
    for name, one in card.sites.items():
        a, b, scale = (tensors[f"{part}/{name}"] for part in ("a", "b", "scale"))
        site = Site(name, a, b, scale, one.ranks, one.kind, one.tied)
        sites[name] = from_codes(site) if card.bits == 8 else site
    return Bank(card.experts, sites, {name: tensors[f"vector/{name}"] for name in card.vectors})


def _wanted(card: BankCard) -> dict[str, dict[str, tuple[int, ...]]]:
    """File -> shapes of its tensors."""
    found: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in card.files}
    for name, site in card.sites.items():
        found[site.file] |= {f"{part}/{name}": shape for part, shape in site.shapes.items()}
    for name, one in card.vectors.items():
        found[one.file][f"vector/{name}"] = (len(card.experts), one.length)
    return found


def _checked(
    path: Path, facts: FileCard, wanted: Mapping[str, tuple[int, ...]], *, codes: bool
) -> dict[str, Tensor]:
    check_size(path, facts, again=AGAIN)
    headers = read_header(path)
    shapes = {name: header.shape for name, header in headers.items()}
    if shapes != wanted:
        wrong = sorted(name for name in shapes.keys() | wanted if shapes.get(name) != wanted.get(name))
        raise CheckpointError(Fault(str(path), f"holds {wrong[0]} otherwise than its card says", run=AGAIN))
    for name, header in headers.items():
        if codes and name.startswith(("a/", "b/")):
            fits = header.dtype == "I8"
        else:
            fits = header.dtype in FLOATS
        if not fits:
            what = f"holds {name} as {header.dtype}, which its card does not say"
            raise CheckpointError(Fault(str(path), what, run=AGAIN))
    check_bytes(path, facts, again=AGAIN)
    tensors: dict[str, Tensor] = load_file(path)
    for name, one in tensors.items():
        if one.is_floating_point() and not one.isfinite().all():
            raise CheckpointError(Fault(str(path), f"{name} holds NaN or Inf", run=AGAIN))
    return tensors
