"""Models that are asked: their names, their roles, and where they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mixmerge.bank.mask_files import has_masks, read_mask_card
from mixmerge.checkpoint.locate import locate
from mixmerge.dynamic.folders import is_dynamic, parts_of
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.evaluate.flops import flops_per_token
from mixmerge.evaluate.leaks import Made, read_made, with_adapter
from mixmerge.evaluate.mixtures import folders_of, is_mixture, load_whole, made_of
from mixmerge.evaluate.model_records import Role
from mixmerge.recipe import ModelRef

if TYPE_CHECKING:
    from mixmerge.mixture import Mixture

_CONFIGS = ("config.json", "adapter_config.json")
Models = Mapping[str, str | Path] | Sequence[str | Path]


@dataclass(frozen=True)
class Entry:
    """A model that is asked.

    Args:
        name: in the report.
        role: as in ``ModelRow``.
        ref: where it is.
        folder: of the model on this machine.
        adapter: of the adapter, if it has one.
        made: what its manifest says.
        mixture: several models that answer as one; None for a model.
        masks: experts that a merge for all tasks (``task: all``) has masks of.
    """

    name: str
    role: Role
    ref: ModelRef
    folder: Path
    adapter: Path | None
    made: Made
    mixture: Mixture | None = None
    masks: tuple[str, ...] = ()

    @property
    def network(self) -> bool:
        """Whether a gate weighs experts in it."""
        return self.mixture is None and self.adapter is None and is_dynamic(self.folder)

    @property
    def storage(self) -> int:
        """Bytes of all weights in its folders."""
        folders = {self.folder} if self.adapter is None else {self.folder, self.adapter}
        if self.mixture is not None:
            folders = set(folders_of(self.mixture))
        if self.network:
            folders.add(parts_of(self.folder).base)
        files = {path for folder in folders for path in folder.rglob("*.safetensors")}
        return sum(path.stat().st_size for path in files if path.is_file())

    @property
    def flops(self) -> float:
        """Operations of a token; NaN if that is not known, as where it depends on who is asked."""
        if self.mixture is not None:
            return math.nan
        if self.network:
            parts = parts_of(self.folder)
            return flops_per_token(parts.base, parts.bank)
        return flops_per_token(self.folder, self.adapter)


def is_folder(path: str) -> bool:
    """Whether there is a folder of that name; whatever signs it has, it is that folder."""
    try:
        return Path(path).expanduser().is_dir()
    except (OSError, RuntimeError):  # a name that is too long; ~ of a user who does not exist
        return False


def named(models: Models, *, where: str) -> dict[str, str]:
    """Names and models. Of a list, a model's name is the last part of its path, or all of it where two are alike.

    Raises:
        MixmergeError: a model is given twice.
    """
    if isinstance(models, Mapping):
        return {name: str(model) for name, model in models.items()}
    listed = [str(model) for model in ([models] if isinstance(models, str | Path) else models)]
    twice = sorted({one for one in listed if listed.count(one) > 1})
    if twice:
        raise MixmergeError(Fault(where, f"{', '.join(twice)} is given twice"))
    last = [Path(one.partition("+")[2] or one).name or one for one in listed]
    return {one if last.count(short) > 1 else short: one for one, short in zip(listed, last, strict=True)}


def entries_of(models: Models, experts: Models, base: str | Path | None, faults: list[Fault]) -> list[Entry]:
    """The models judged, the experts, the base, in the order of a report; those that cannot be found are left out.

    Args:
        models, experts, base: as ``evaluate_models`` takes them; what is on the hub is downloaded.
        faults: gets what is wrong with any of them.
    """
    listed: list[tuple[Role, str, str]] = []
    with collecting(faults):
        listed += [("merge", name, model) for name, model in named(models, where="models").items()]
    with collecting(faults):
        listed += [("expert", name, model) for name, model in named(experts, where="experts").items()]
    listed += [("base", "base", str(base))] if base is not None else []
    if not listed and not faults:
        faults.append(Fault("models", "none is given", "A folder, a hub id or BASE+ADAPTER"))
    names = [name for _, name, _ in listed]
    faults += [
        Fault("models", f"two are called {name!r}", run="Name them: NAME=MODEL")
        for name in sorted({one for one in names if names.count(one) > 1})
    ]
    entries = []
    for role, name, model in listed:
        with collecting(faults):
            entries.append(_entry(role, name, model))
    return entries


def _entry(role: Role, name: str, model: str) -> Entry:
    where = {"merge": "model", "expert": "experts", "base": "base"}[role]
    if is_mixture(model, folder=is_folder(model)):
        if role != "merge":
            what = f"{model} is a mixture of several models"
            raise MixmergeError(Fault(f"{where} {name}", what, "A model that was merged, or its base"))
        whole = load_whole(model, where=f"{where} {name}")
        return Entry(name, role, ModelRef(model), Path(model).expanduser(), None, made_of(whole), whole)
    ref = ModelRef(model) if is_folder(model) else ModelRef.parse(model, where=where)
    folder = locate(ref.path, ref.revision, where=where)
    if not (is_dynamic(folder) or any((folder / config).is_file() for config in _CONFIGS)):
        raise MixmergeError(Fault(f"{where} {name}", f"{folder} has no config.json", "A folder of a model"))
    adapter = None if ref.adapter is None else locate(ref.adapter, ref.adapter_revision, where=where)
    masks = read_mask_card(folder).tasks if adapter is None and has_masks(folder) else ()
    made = read_made(folder) if adapter is None else with_adapter(read_made(folder), adapter)
    return Entry(name, role, ref, folder, adapter, made, masks=masks)
