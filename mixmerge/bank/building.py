"""Banks from experts on disk: adapters exactly, full experts at low rank, any of both over one base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mixmerge.bank.adapters import adapter_entries, base_faults
from mixmerge.bank.assembling import (
    Changes,
    assembled,
    changes_of,
    chosen,
    compact,
    compact_changes,
    extended,
)
from mixmerge.bank.checkpoints import Difference, to_low_rank
from mixmerge.bank.factors import allocate, check_size, low_rank, spectrum
from mixmerge.bank.records import Bank
from mixmerge.checkpoint.adapter import adapter_file
from mixmerge.checkpoint.adapter_config import CONFIG
from mixmerge.checkpoint.header import read_header
from mixmerge.checkpoint.identity import fingerprint
from mixmerge.checkpoint.pickled import read_bin_header
from mixmerge.checkpoint.reader import open_checkpoint
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

__all__ = [
    "Changes",
    "adapter_entries",
    "allocate",
    "assembled",
    "bank_of",
    "changes_of",
    "chosen",
    "compact",
    "compact_changes",
    "extended",
    "fingerprint_of",
    "low_rank",
    "spectrum",
    "to_low_rank",
]


def bank_of(
    base: str | Path,
    experts: Mapping[str, str | Path],
    *,
    rank: int | Mapping[str, int] | None = None,
    energy: float | None = None,
    budget: int | None = None,
) -> Bank:
    """A bank of adapters and full experts over one base.

    Args:
        base: its model folder.
        experts: name -> folder of a PEFT adapter, which is taken exactly, or of a full model, which is made low-rank.
        rank, energy: of full experts, as ``to_low_rank`` takes them; a rank for all, or by expert one for each.
        budget: numbers in the factors of all full experts together; shared out by ``allocate``, where each expert's
            energy counts as much.

    Raises:
        CheckpointError: a folder cannot be read.
        MixmergeError: adapters of another base; a full expert and no size; a rank of none of the full experts; or as
            ``adapter_entries``, ``to_low_rank`` and ``assembled``. The faults of all experts at once.
    """
    headers = open_checkpoint(Path(base), name=str(base)).tensors
    folders = {name: Path(folder) for name, folder in experts.items()}
    adapters = {name: folder for name, folder in folders.items() if (folder / CONFIG).is_file()}
    whole = {name: folder for name, folder in folders.items() if name not in adapters}
    faults = _size_faults(whole, rank, energy, budget)
    faults += base_faults(adapters, Path(base))
    changes: dict[str, Changes] = {}
    differences: dict[str, Difference] = {}
    for name, folder in folders.items():
        try:
            if name in adapters:
                changes[name] = adapter_entries(folder, headers, where=f"expert {name}")
            else:
                differences[name] = Difference.of(folder, base)
        except MixmergeError as error:
            faults += error.faults
    if faults:
        raise MixmergeError(faults)
    own = {name: rank.get(name) if isinstance(rank, Mapping) else rank for name in whole}
    ranks = {} if budget is None else _shared_out(differences, budget, own)
    for name, one in differences.items():
        try:
            changes[name] = one.entries(rank=ranks.get(name, own[name]), energy=energy)
        except MixmergeError as error:
            faults += error.faults
    if faults:
        raise MixmergeError(faults)
    return assembled({name: changes[name] for name in experts})


def fingerprint_of(folder: str | Path) -> str:
    """What tells an adapter's or a model's folder apart from others: a SHA-256 over config, headers and samples.

    Raises:
        CheckpointError: it cannot be read.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return fingerprint(folder, open_checkpoint(folder, name=str(folder)).tensors.values())
    file = adapter_file(folder, where="adapter")
    headers = read_bin_header(file) if file.suffix == ".bin" else read_header(file)
    return fingerprint(folder, headers.values(), config=CONFIG)


def _size_faults(
    whole: Mapping[str, Path],
    rank: int | Mapping[str, int] | None,
    energy: float | None,
    budget: int | None,
) -> list[Fault]:
    each = rank if isinstance(rank, Mapping) else dict.fromkeys(whole, rank)
    faults = [
        Fault(
            f"bank: rank.{name}",
            "is no full expert",
            choices(name, list(whole)) if whole else "There is none",
        )
        for name in each
        if name not in whole
    ]
    sized = energy is not None or budget is not None
    if lacking := [name for name in whole if each.get(name) is None and not sized]:
        what = f"{', '.join(lacking)}: full experts, and no size for their factors"
        faults.append(Fault("bank", what, "rank, energy or budget"))
    for name in whole:
        try:
            check_size(each.get(name), energy, f"bank: {name}" if isinstance(rank, Mapping) else "bank")
        except MixmergeError as error:
            faults += [one for one in error.faults if one not in faults]
    return faults


def _shared_out(
    differences: Mapping[str, Difference], budget: int, most: Mapping[str, int | None]
) -> dict[str, dict[str, int]]:
    """For each expert the rank it may have at each site."""
    found: dict[str, dict[str, Tensor]] = {}
    faults: list[Fault] = []
    for name, one in differences.items():
        try:
            found[name] = one.spectra()
        except MixmergeError as error:
            faults += error.faults
    if faults:
        raise MixmergeError(faults)
    sides = {site: side for name, one in differences.items() for site, side in one.sides(found[name]).items()}
    none = next(iter(next(iter(found.values())).values()), None) if found else None
    if none is None:
        return {}
    spectra = {site: [one.get(site, none[:0]) for one in found.values()] for site in sides}
    ranks = allocate(spectra, sides, budget=budget, by_expert=True)
    bounds = {name: most.get(name) or max(map(max, ranks.values())) for name in found}
    return {
        name: {site: min(each[number], bounds[name]) for site, each in ranks.items()}
        for number, name in enumerate(found)
    }
