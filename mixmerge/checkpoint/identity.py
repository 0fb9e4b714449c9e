"""What makes two folders the same model: fingerprints of weights, and the vocabulary of a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from mixmerge.checkpoint.header import TensorHeader
from mixmerge.checkpoint.reader import Checkpoint, read_json
from mixmerge.errors import CheckpointError, Fault

SAMPLE = 4096


def fingerprint(folder: Path, tensors: Iterable[TensorHeader], *, config: str = "config.json") -> str:
    """SHA-256 over the config, every header, file sizes and the first 4 KiB of every tensor.

    It tells models apart in milliseconds; ``digest`` hashes every byte.

    Raises:
        CheckpointError: a file ends before its header says, or cannot be read.
    """
    state = hashlib.sha256()
    state.update((folder / config).read_bytes())
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        state.update(
            f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0{tensor.file.name}\0{tensor.offset}\n".encode()
        )
    by_file: dict[Path, list[TensorHeader]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file in sorted(by_file):
        try:
            handle = os.open(file, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(Fault(str(file), f"cannot be read: {error.strerror}")) from error
        try:
            state.update(str(os.fstat(handle).st_size).encode())
            for tensor in sorted(by_file[file], key=lambda tensor: tensor.offset):
                state.update(os.pread(handle, min(SAMPLE, tensor.nbytes), tensor.offset))
        except OSError as error:
            raise CheckpointError(Fault(str(file), f"cannot be read: {error.strerror}")) from error
        finally:
            os.close(handle)
    return state.hexdigest()


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over every byte of the files, in the order given."""
    state = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            while block := handle.read(1 << 22):
                state.update(block)
    return state.hexdigest()


def stamp(checkpoint: Checkpoint) -> dict[str, tuple[int, int]]:
    """Size and modification time (ns) of every weight file: a resumed merge wants them unchanged."""
    stats = {file.name: file.stat() for file in checkpoint.files}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


_VOCABULARY_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def vocabulary(folder: Path) -> dict[str, int] | str | None:
    """What token has which id: a mapping; a hash where only a binary vocabulary exists; None without one.

    Padding, templates and normalisers do not count: they change no row of an embedding.
    """
    fast = folder / "tokenizer.json"
    if fast.exists():
        data = read_json(fast)
        model = data.get("model") or {}
        vocab = model.get("vocab") or {}
        pairs = (
            dict(vocab)
            if isinstance(vocab, dict)
            else {str(entry[0] if isinstance(entry, list) else entry): i for i, entry in enumerate(vocab)}
        )
        pairs.update({token["content"]: token["id"] for token in data.get("added_tokens") or []})
        return pairs
    for name in _VOCABULARY_FILES:
        path = folder / name
        if path.exists():
            if name == "vocab.json":
                return {str(token): int(number) for token, number in read_json(path).items()}
            return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def canonical_hash(value: object) -> str:
    """SHA-256 of the value as sorted, compact JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
