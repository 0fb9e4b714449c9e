"""The bank of a merge: what each expert has besides the shared model, made low-rank and written beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.files import Files
from mixmerge.checkpoint.header import TensorHeader, read_header
from mixmerge.checkpoint.identity import canonical_hash, fingerprint
from mixmerge.checkpoint.reader import open_checkpoint
from mixmerge.engine.calibration_data import experts_of
from mixmerge.engine.output import Output
from mixmerge.engine.target import BANK, BANK_CARD
from mixmerge.engine.twin_parts import Parts
from mixmerge.engine.worker import Adapters
from mixmerge.errors import CheckpointError, Fault
from mixmerge.plan import Plan, Task
from mixmerge.plan.bank import BankPlan, BankSite

if TYPE_CHECKING:
    from mixmerge.bank.records import Entry, Site

Told = Callable[[str, int, int], None]
_TORCH = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}


@dataclass(frozen=True)
class Banked:
    """What was written beside the shared model.

    Args:
        hash: of the bank.
        nbytes: of its files.
        ranks: the least and the most of an expert at a site.
        bytes_of_experts: what the tensors of all experts take.
        gate: what training the gate found; None without a gate.
    """

    hash: str
    nbytes: int
    ranks: tuple[int, int]
    bytes_of_experts: int
    gate: Mapping[str, Any] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "hash": self.hash,
            "bytes": self.nbytes,
            "bytes_of_experts": self.bytes_of_experts,
            "ranks": list(self.ranks),
            "gate": None if self.gate is None else dict(self.gate),
        }


def fitted(plan: Plan, folder: Path) -> tuple[Plan, tuple[str, ...]]:
    """A plan whose bank has no tensor that the model's layers cannot take a change of; and notes about those left out.

    Args:
        plan: with a bank.
        folder: with the config of the output, or of the base.

    Raises:
        MixmergeError: transformers does not know such a model.
    """
    from mixmerge.bank.layout import layout_of

    bank = plan.bank
    if bank is None:
        return plan, ()
    names = [*(site.name for site in bank.sites), *bank.vectors]
    layout = layout_of(folder, names)
    reasons: dict[str, str] = {}
    for name in names:
        place = layout.places.get(name)
        wanted = ("vector",) if name in bank.vectors else ("linear", "turned", "embedding")
        if place is None:
            reasons[name] = "no tensor of the model's layers"
        elif place not in wanted:
            reasons[name] = "of a layer that takes no factors"
        elif name == layout.table and layout.shared:
            reasons[name] = f"{layout.shared[0]} uses it too"
    narrowed = bank.without(reasons)
    sites = tuple(
        replace(
            site,
            kind="embedding" if layout.places[site.name] == "embedding" else "linear",
            turned=layout.places[site.name] == "turned",
            tied=site.name == layout.table,
        )
        for site in narrowed.sites
    )
    notes = replace(narrowed, left_out=reasons).notes()
    return replace(plan, bank=replace(narrowed, sites=sites)), tuple(notes)


def add_factors(
    plan: Plan,
    output: Output,
    files: Files,
    *,
    fingerprints: Mapping[str, Any],
    progress: Told | None = None,
) -> str:
    """Write the bank of a plan whose shared model is written, unless an earlier run has done so; returns its hash.

    Args:
        plan: ``fitted``.
        output: with the shared tensors and their config.
        files: open files of the inputs.
        fingerprints: of the inputs, by reference.
        progress: called with ("bank", tensors done, tensors in all).

    Raises:
        CheckpointError: a part is not finite.
        OutputError: the disk refuses.
    """
    from mixmerge.bank.files import BankWriter, read_card

    bank = plan.bank
    if bank is None:
        raise CheckpointError(Fault("plan", "has no bank"))
    if output.has(BANK_CARD):
        return read_card(output.partial).hash
    for left in (output.partial / BANK, *output.partial.glob(f".{BANK}-*")):
        shutil.rmtree(left, ignore_errors=True)
    shared: dict[str, TensorHeader] = {}
    for shard in plan.shards:
        shared.update(read_header(output.partial / shard.file))
    maker = _Maker(plan, bank, Parts(plan, shared, files, Adapters()), progress)
    hashes = {
        name: canonical_hash(fingerprints[str(plan.models[number].ref)])
        for name, number in zip(bank.experts, experts_of(plan), strict=True)
    }
    base = fingerprint(output.partial, open_checkpoint(output.partial, name=str(output.out)).tensors.values())
    with BankWriter(output.partial, bank.experts, base=base, hashes=hashes, bits=bank.bits) as writer:  # type: ignore[arg-type]
        maker.write(writer)
    output.vouch(BANK_CARD)
    return read_card(output.partial).hash


def measured(plan: Plan, folder: Path, gate: Mapping[str, Any] | None) -> Banked:
    """What a written bank is, for the manifest and the model card."""
    from mixmerge.bank.files import read_card

    card = read_card(folder)
    ranks = [rank for site in card.sites.values() for rank in site.ranks]
    size = sum(path.stat().st_size for path in (folder / BANK).glob("*"))
    experts = 0 if plan.bank is None else plan.bank.bytes_of_experts
    return Banked(card.hash, size, (min(ranks, default=0), max(ranks, default=0)), experts, gate)


class _Maker:
    """Decomposes the parts of a plan, one tensor at a time."""

    def __init__(self, plan: Plan, bank: BankPlan, parts: Parts, progress: Told | None) -> None:
        self.plan, self.bank, self.parts = plan, bank, parts
        self._tasks = {task.target.name: task for task in plan.tasks}
        self._progress, self._done = progress, 0
        self._total = len(bank.sites) * (2 if bank.budget is not None else 1) + len(bank.vectors)

    def write(self, writer: Any) -> None:
        """Every site and vector that some expert changes, in the order of the output's tensors."""
        import torch

        whole = {name: self._vectors(name) for name in self.bank.vectors}
        kept = {name: value for name, value in whole.items() if value is not None}
        ranks = self._ranks(sum(value.numel() for value in kept.values()))
        for site in self.bank.sites:
            made = self._site(site, None if ranks is None else ranks[site.name])
            if made is not None:
                writer.add(made.to("cpu", getattr(torch, _TORCH[site.dtype])))
            self._tell()
        for name, value in kept.items():
            dtype = getattr(torch, _TORCH[self._tasks[name].target.dtype])
            writer.add_vectors(name, value.cpu().to(dtype))

    def _vectors(self, name: str) -> Any:
        """``(E, n)``; None where all experts have what is shared."""
        import torch

        task = self._tasks[name]
        parts = [self.parts.whole(task, expert) for expert in range(len(self.bank.experts))]
        self._tell()
        there = [part for part in parts if part is not None]
        if not any(bool(part.any()) for part in there):
            return None
        stacked = torch.stack([torch.zeros_like(there[0]) if part is None else part for part in parts])
        self._check(bool(stacked.isfinite().all()), name)
        return stacked

    def _ranks(self, spent: int) -> dict[str, list[int]] | None:
        """The ranks of every site where a number of parameters is shared out; None where each site has its own rule."""
        from mixmerge.bank.building import allocate, spectrum

        if self.bank.budget is None:
            return None
        spectra = {}
        for site in self.bank.sites:
            task, found = self._tasks[site.name], []
            for expert in range(len(self.bank.experts)):
                part = self.parts.matrix(task, site, expert)
                found.append(_none() if part is None else spectrum(part, where=self._where(task, expert)))
            spectra[site.name] = found
            self._tell()
        shapes = {site.name: site.shape for site in self.bank.sites}
        return allocate(spectra, shapes, budget=max(1, self.bank.budget - spent), by_expert=True)

    def _site(self, site: BankSite, ranks: list[int] | None) -> Site | None:
        from mixmerge.bank.building import low_rank
        from mixmerge.bank.records import side_by_side

        task = self._tasks[site.name]
        entries: list[Entry | None] = []
        for expert in range(len(self.bank.experts)):
            rank = site.rank if ranks is None else ranks[expert]
            part = None if rank == 0 else self.parts.matrix(task, site, expert)
            if part is None:
                entries.append(None)
                continue
            made = low_rank(
                part, rank=rank, energy=site.energy, kind=site.kind, tied=site.tied,
                where=self._where(task, expert),
            )  # fmt: skip
            entries.append(made if made.rank else None)
        if not any(entry is not None for entry in entries):
            return None
        return side_by_side(site.name, entries, kind=site.kind, tied=site.tied)

    def _where(self, task: Task, expert: int) -> str:
        return f"{self.plan.models[task.sources[expert].model].ref}: tensor {task.target.name!r}"

    def _check(self, fine: bool, name: str) -> None:
        if not fine:
            run = "Check the experts: one of them is broken"
            raise CheckpointError(Fault(f"tensor {name!r}", "an expert's part holds NaN or Inf", run=run))

    def _tell(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress("bank", self._done, self._total)


def _none() -> Any:
    import torch

    return torch.zeros(0, dtype=torch.float64)
