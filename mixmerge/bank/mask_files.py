"""The folder ``masks`` beside the base's weights: a card, and files of masked tensors that it vouches for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mixmerge.bank.masks import BITS, ELECTED, FACTORS, UNIFIED, MaskedTensor, names_in
from mixmerge.bank.vouched import FileCard, Vouched, check_bytes, check_size, damaged
from mixmerge.checkpoint.header import TensorHeader, read_header
from mixmerge.checkpoint.identity import fingerprint
from mixmerge.checkpoint.reader import open_checkpoint
from mixmerge.errors import CheckpointError, Fault

FOLDER, CARD = "masks", "masks.json"
_AGAIN = "Merge again"


@dataclass(frozen=True, kw_only=True)
class MaskCard(Vouched):
    """Masks without their values.

    Args:
        method: that made them.
        tasks: names, by position.
        base: fingerprint of the folder's own model.
    """

    method: str
    tasks: tuple[str, ...]
    base: str

    format = "mixmerge-masks"
    version = 1
    again = _AGAIN


def has_masks(folder: str | Path) -> bool:
    """Whether a folder has masks of tasks, as far as names of files tell."""
    try:
        return (Path(folder).expanduser() / FOLDER / CARD).is_file()
    except (OSError, RuntimeError):  # a name that is too long; ~ of a user who does not exist
        return False


def read_mask_card(folder: str | Path) -> MaskCard:
    """What masks a folder has.

    Raises:
        CheckpointError: none; or the card is damaged, was changed, or is of another version.
    """
    place = Path(folder).expanduser()
    path = place / FOLDER / CARD
    if not path.is_file():
        run = "Make them: mixmerge merge with merge_method: emr or tall, and task: all"
        raise CheckpointError(
            Fault(str(folder), "has no masks of tasks", f"A folder with {FOLDER}/{CARD}", run)
        )
    raw = MaskCard.read(path, what="a card of masks")
    try:
        files = {str(name): FileCard(**one) for name, one in raw["files"].items()}
        card = MaskCard(
            method=str(raw["method"]), tasks=tuple(map(str, raw["tasks"])), base=str(raw["base"]), files=files
        )
        if not all(Path(name).name == name for name in files):
            raise ValueError("a file that lies elsewhere")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, _AGAIN) from error
    card.believed(path, raw.get("hash"))
    return card


class MaskFolder:
    """A base and the masks beside it, open: tensors of any task's model, made anew from the files each time.

    Nothing is held in memory: the files are mapped.

    Args:
        folder: a model folder with ``masks``.

    Raises:
        CheckpointError: as ``read_mask_card``; or its files are missing, cut off or changed, or the base was changed.
            All faults at once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder, self.card = Path(folder).expanduser(), read_mask_card(folder)
        base = open_checkpoint(self.folder, name=str(folder)).tensors
        faults: list[Fault] = []
        if fingerprint(self.folder, base.values()) != self.card.base:
            what = "its weights or config are not those that the masks were made for"
            faults.append(Fault(str(folder), what, "The folder as the merge wrote it", _AGAIN))
        self._files: dict[str, Path] = {}
        for name, facts in self.card.files.items():
            try:
                headers = _checked(self.folder / FOLDER / name, facts)
            except CheckpointError as error:
                faults += error.faults
                continue
            self._files.update(dict.fromkeys(headers, self.folder / FOLDER / name))
        self.names = tuple(names_in(self._files))
        faults += [
            Fault(str(self.folder / FOLDER), f"has masks of {name}, which the base lacks", run=_AGAIN)
            for name in self.names
            if name not in base
        ]
        if faults:
            raise CheckpointError(faults)
        self._base = {name: base[name].file for name in self.names}
        self._open: dict[Path, Any] = {}

    def base(self, name: str) -> Tensor:
        """A tensor of the base, as it is stored."""
        return self._read(self._base[name], name)

    def tensor(self, name: str, task: int) -> Tensor:
        """A tensor of a task's model, in the dtype of the base."""
        delta = ELECTED if f"{ELECTED}/{name}" in self._files else UNIFIED
        change, bits, factors = (
            self._read(self._files[f"{part}/{name}"], f"{part}/{name}") for part in (delta, BITS, FACTORS)
        )
        return MaskedTensor(change, bits, factors, delta == ELECTED).of_task(self.base(name), task)

    def _read(self, path: Path, name: str) -> Tensor:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        found: Tensor = self._open[path].get_tensor(name)
        return found


def _checked(path: Path, facts: FileCard) -> dict[str, TensorHeader]:
    check_size(path, facts, again=_AGAIN)
    check_bytes(path, facts, again=_AGAIN)
    return read_header(path)
