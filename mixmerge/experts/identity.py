"""What tells two experts apart, or one before and after it changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mixmerge.checkpoint.header import TensorHeader, read_header
from mixmerge.checkpoint.identity import canonical_hash, content, fingerprint
from mixmerge.errors import CheckpointError, Fault, MixmergeError, collecting
from mixmerge.experts.expert import Expert

_TEXTS = ("*.json", "*.jinja", "*.txt", "*.model")  # config, tokenizer, chat template, defaults of generation
# of a network, and of masks; their cards have the hashes of what is large
_BANK = ("bank/*.json", "bank/gate.safetensors", "masks/masks.json")


def identity(expert: Expert) -> str:
    """64 hex digits: of folders their small files and the fingerprint of their weights, of all else its name.

    Raises:
        CheckpointError: a folder that the expert names by a path is not there, or cannot be read.
    """
    whole = [expert.engine, expert.endpoint, dict(expert.options)]
    if expert.remote:
        return canonical_hash([*whole, expert.model])
    return canonical_hash([*whole, _of(expert.model, expert), _of(expert.adapter, expert)])


def identities(experts: Iterable[Expert]) -> dict[str, str]:
    """``identity`` of each, by name.

    Raises:
        MixmergeError: what is wrong with any of them, all at once.
    """
    found: dict[str, str] = {}
    faults: list[Fault] = []
    for expert in experts:
        with collecting(faults):
            found[expert.name] = identity(expert)
    if faults:
        raise MixmergeError(faults)
    return found


def check_folders(experts: Iterable[Expert]) -> None:
    """Look for the folders that experts name by a path; nothing in them is read.

    Raises:
        MixmergeError: those that are not there, all at once.
    """
    faults: list[Fault] = []
    for expert in experts:
        for place in () if expert.remote else (expert.model, expert.adapter):
            with collecting(faults):
                _folder(place, expert)
    if faults:
        raise MixmergeError(faults)


def _folder(place: str | None, expert: Expert) -> Path | None:
    """The folder of that name; None if it is a hub id."""
    folder = Path(place or "").expanduser()
    if place is None or folder.is_dir():
        return folder
    if place.startswith((".", "/", "~")) or place.count("/") > 1:
        allowed = "A folder, or a hub id such as org/name"
        raise CheckpointError(Fault(f"expert {expert.name}", f"{place}: no such folder", allowed))
    return None


def _of(place: str | None, expert: Expert) -> str | None:
    if place is None:
        return None
    folder = _folder(place, expert)
    if folder is None:
        return f"hub {place}"
    weights: list[TensorHeader] = []
    for file in sorted(folder.glob("*.safetensors")):
        weights += read_header(file).values()
    kept = (*_TEXTS, *_BANK)
    small = sorted({path for pattern in kept for path in folder.glob(pattern) if path.is_file()})
    texts = [(path.name, canonical_hash(content(path).hex())) for path in small]
    known = ("adapter_config.json", "config.json", "bank/bank.json")
    config = next((name for name in known if (folder / name).exists()), "config.json")
    return canonical_hash([texts, fingerprint(folder, weights, config=config)])
