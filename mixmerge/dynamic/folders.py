"""Folders of dynamic networks: a model with a bank beside its weights, or a fitted mixture that names its base.

Of the first kind the base is the folder itself; of the second the ``compose.base`` of its ``mixture.yaml``. In both the
bank and its gate lie in ``bank/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge import registry
from mixmerge.bank.building import fingerprint_of
from mixmerge.bank.cards import CARD, FOLDER, BankCard, read_card
from mixmerge.bank.gate import Gate
from mixmerge.bank.gate_files import GATE, GATE_STATE, load_gate
from mixmerge.bank.mask_files import has_masks
from mixmerge.checkpoint.header import DTYPE_BYTES, TensorHeader, read_header
from mixmerge.checkpoint.locate import locate
from mixmerge.checkpoint.reader import read_json
from mixmerge.document import Kind, Report, load, read_file
from mixmerge.document.tree import to_data
from mixmerge.errors import CheckpointError, Fault, MixmergeError

MIXTURE, TRAINING = "mixture.yaml", "training.json"
_KIND = Kind("mixture", needs="compose: {kind: adapters, base: FOLDER}")
_WANTED = f"A model folder with {FOLDER}/, or a folder that mixmerge fit made"


@dataclass(frozen=True)
class Parts:
    """Where the parts of a dynamic network are.

    Args:
        folder: with ``bank/`` in it.
        base: of the model that it runs in.
        encoder: of texts, where the folder names one: a folder or hub id.
    """

    folder: Path
    base: Path
    encoder: str | None = None

    @property
    def bank(self) -> Path:
        return self.folder / FOLDER


def is_dynamic(folder: str | Path) -> bool:
    """Whether a folder has a bank, as far as names of files tell."""
    try:
        return (Path(folder).expanduser() / FOLDER / CARD).is_file()
    except (OSError, RuntimeError):  # a name that is too long; ~ of a user who does not exist
        return False


def parts_of(folder: str | Path, *, base: str | Path | None = None) -> Parts:
    """The parts of a network; a base on the hub is downloaded.

    Args:
        folder: a model folder with a bank, or a fitted mixture's.
        base: the base, where it is no longer where the mixture says; a folder or hub id.

    Raises:
        MixmergeError: there is no bank in it, or its base cannot be found.
    """
    place = Path(folder).expanduser()
    if has_masks(place) and not is_dynamic(place):
        what = "has masks of tasks, and no bank: a task is named, never weighed"
        raise CheckpointError(
            Fault(str(folder), what, _WANTED, "Load it with TaskModel, or the engine tasks")
        )
    if not is_dynamic(place):
        run = "Make one: mixmerge fit MIXTURE.yaml OUT, or mixmerge merge with merge_method: twin"
        raise CheckpointError(Fault(str(folder), f"has no {FOLDER}/{CARD}", _WANTED, run))
    fitted = (place / MIXTURE).is_file()
    if base is None and (place / "config.json").is_file() and not fitted:
        return Parts(place, place)
    compose = _compose(place) if fitted or base is None else {}
    encoder = compose.get("encoder")
    where = f"{folder}: base" if base is not None else f"{place / MIXTURE}: compose.base"
    found = locate(str(base or _named_base(place, compose)), None, where=where)
    return Parts(place, found, encoder if isinstance(encoder, str) else None)


def _compose(folder: Path) -> dict[str, Any]:
    """What a fitted mixture says of its network."""
    path = folder / MIXTURE
    report = Report(_KIND)
    text = read_file(path, name=str(path), report=report)
    root = None if text is None else load(text, name=str(path), report=report)
    if report.faulty:
        raise MixmergeError(report.faults(str(path)))
    data = None if root is None else to_data(root)
    compose = data.get("compose") if isinstance(data, dict) else None
    return compose if isinstance(compose, dict) else {}


def _named_base(folder: Path, compose: dict[str, Any]) -> str:
    base = compose.get("base")
    if not isinstance(base, str):
        path = str(folder / MIXTURE)
        raise CheckpointError(Fault(path, "does not say what the base is", _WANTED, "Fit it again"))
    return base


def checked_card(parts: Parts) -> BankCard:
    """What a bank says of itself, if it was made for this base.

    Raises:
        MixmergeError: it is damaged, or of another base.
    """
    card = read_card(parts.folder)
    found = fingerprint_of(parts.base)
    if card.base != found:
        what = f"its bank was made for another base than {parts.base}"
        more = f"Its fingerprint begins with {card.base[:12]}, that of the base with {found[:12]}"
        raise CheckpointError(
            Fault(str(parts.folder), what, more, "Give the base it was made for, or fit it again")
        )
    return card


def gate_of(parts: Parts, card: BankCard) -> Gate | None:
    """The gate beside a bank; None of a merge that was asked to leave it out.

    Args:
        parts: of the network.
        card: of its bank.

    Raises:
        MixmergeError: there was one, and it is gone; it is damaged, or of another bank.
    """
    path = parts.bank / GATE
    if path.is_file():
        return load_gate(parts.bank, bank=card.hash, earlier=card.earlier, experts=card.experts)
    fitted = (parts.folder / MIXTURE).is_file()
    if fitted or any((parts.bank / name).is_file() for name in (GATE_STATE, TRAINING)):
        run = "mixmerge fit MIXTURE.yaml OUT" if fitted else "mixmerge merge RECIPE.yaml OUT"
        what = "is missing, and without its gate the network would answer as its base"
        raise CheckpointError(
            Fault(str(path), what, f"The {GATE} that was written with its bank", f"Again: {run}")
        )
    return None


def weights_of(parts: Parts) -> list[TensorHeader]:
    """Every tensor of base and bank, as far as they are in safetensors."""
    files = [*sorted(parts.base.glob("*.safetensors")), *sorted(parts.bank.glob("factors*.safetensors"))]
    return [header for path in files for header in read_header(path).values()]


def nbytes(parts: Parts, dtype: str | None = None) -> int:
    """Bytes of base and bank in memory.

    Args:
        dtype: of safetensors (``F32``), that all are held in; None: as they are stored.
    """
    headers = weights_of(parts)
    if dtype is None:
        return sum(header.nbytes for header in headers)
    return sum(header.elements for header in headers) * DTYPE_BYTES[dtype]


def is_constant(parts: Parts) -> bool:
    """Whether the network's gate is of a kind whose weights are the same for every input, as far as its card tells."""
    path = parts.bank / GATE
    found = read_json(path).get("kind") if path.is_file() else None
    known = registry.table("gate")
    return found in known and registry.find("gate", found).fixed is not Gate.fixed


def folded_nbytes(parts: Parts, dtype: str | None = None) -> int:
    """Bytes of the base's tensors that the bank changes, for layers that hold one mixture; 0 of types that are shorter.

    Args:
        dtype: as in ``nbytes``.
    """
    card = read_card(parts.folder)
    changed = {*card.sites, *card.vectors}
    headers = [one for path in parts.base.glob("*.safetensors") for one in read_header(path).values()]
    types = {dtype or one.dtype for one in headers if one.name in changed}
    if not types <= {"F32", "F64"}:
        return 0
    return sum(one.elements * DTYPE_BYTES[dtype or one.dtype] for one in headers if one.name in changed)
