"""The folder ``masks`` beside the base's weights: a card, and files of masked tensors that it vouches for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from mixmerge.bank.cards import FileCard
from mixmerge.bank.masks import BITS, ELECTED, FACTORS, UNIFIED, MaskedTensor, names_in
from mixmerge.checkpoint.header import TensorHeader, read_header
from mixmerge.checkpoint.identity import canonical_hash, digest, fingerprint
from mixmerge.checkpoint.reader import open_checkpoint, read_json
from mixmerge.errors import CheckpointError, Fault

FOLDER, CARD = "masks", "masks.json"
FORMAT, VERSION = "mixmerge-masks", 1
_AGAIN = "Merge again"


@dataclass(frozen=True)
class MaskCard:
    """Masks without their values.

    Args:
        method: that made them.
        tasks: names, by position.
        base: fingerprint of the folder's own model.
        files: by name.
    """

    method: str
    tasks: tuple[str, ...]
    base: str
    files: Mapping[str, FileCard]

    @property
    def hash(self) -> str:
        """SHA-256 over all of it, and so over every byte of its files."""
        return canonical_hash(json.loads(json.dumps(asdict(self))))

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files.values())

    def text(self) -> str:
        """What is in the file."""
        whole = {"format": FORMAT, "version": VERSION, "hash": self.hash, **asdict(self)}
        return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


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
    raw = read_json(path)
    if raw.get("format") != FORMAT:
        raise CheckpointError(Fault(str(path), "is not a card of masks", f"format: {FORMAT}"))
    if raw.get("version") != VERSION:
        what = f"is of version {raw.get('version')!r}"
        raise CheckpointError(Fault(str(path), what, f"This mixmerge reads version {VERSION}", _AGAIN))
    try:
        files = {str(name): FileCard(**one) for name, one in raw["files"].items()}
        card = MaskCard(str(raw["method"]), tuple(map(str, raw["tasks"])), str(raw["base"]), files)
        whole = all(Path(name).name == name for name in files) and card.hash == raw.get("hash")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = "is damaged: a fact of it is missing or wrong"
        raise CheckpointError(Fault(str(path), what, run=_AGAIN)) from error
    if not whole:
        raise CheckpointError(Fault(str(path), "was changed after it was written", run=_AGAIN))
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
    again = "Copy it again, or merge again"
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(Fault(str(path), "is missing", run=again)) from error
    if size != facts.nbytes:
        what = f"has {size:,} bytes, its card says {facts.nbytes:,}"
        raise CheckpointError(Fault(str(path), what, run=again))
    if digest([path]) != facts.sha256:
        raise CheckpointError(
            Fault(str(path), "was changed after it was written: its hash differs", run=again)
        )
    return read_header(path)
