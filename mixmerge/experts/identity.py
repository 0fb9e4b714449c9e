"""What tells two experts apart, or one before and after it changed."""

from __future__ import annotations

from pathlib import Path

from mixmerge.checkpoint.header import TensorHeader, read_header
from mixmerge.checkpoint.identity import canonical_hash, content, fingerprint
from mixmerge.errors import CheckpointError, Fault
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


def _of(place: str | None, expert: Expert) -> str | None:
    if place is None:
        return None
    folder = Path(place).expanduser()
    if not folder.is_dir():
        if place.startswith((".", "/", "~")) or place.count("/") > 1:
            raise CheckpointError(
                Fault(
                    f"expert {expert.name}",
                    f"{place}: no such folder",
                    "A folder, or a hub id such as org/name",
                )
            )
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
