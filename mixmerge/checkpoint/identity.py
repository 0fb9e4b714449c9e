"""What makes two folders the same model: fingerprints of weights, and the vocabulary of a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.header import TensorHeader
from mixmerge.checkpoint.reader import read_json
from mixmerge.errors import CheckpointError, Fault

SAMPLE = 4096


def fingerprint(folder: Path, tensors: Iterable[TensorHeader], *, config: str = "config.json") -> str:
    """SHA-256 over the config, every header, file sizes and the first 4 KiB of every tensor.

    It tells models apart in milliseconds; ``digest`` hashes every byte.

    Raises:
        CheckpointError: a file ends before its header says, or cannot be read.
    """
    state = hashlib.sha256()
    state.update(content(folder / config))
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        state.update(
            f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0{tensor.file.name}\0{tensor.offset}\n".encode()
        )
    by_file: dict[Path, list[TensorHeader]] = {}
    for tensor in tensors:
        by_file.setdefault(tensor.file, []).append(tensor)
    for file in sorted(by_file):
        try:
            with file.open("rb", buffering=0) as handle:
                state.update(str(os.fstat(handle.fileno()).st_size).encode())
                for tensor in sorted(by_file[file], key=lambda tensor: tensor.offset):
                    state.update(_sample(handle.fileno(), tensor))
        except OSError as error:
            raise _unreadable(file, error) from error
    return state.hexdigest()


def _unreadable(file: Path, error: OSError) -> CheckpointError:
    return CheckpointError(Fault(str(file), f"cannot be read: {error.strerror}"))


def content(file: Path) -> bytes:
    """Every byte of a small file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from error


def _sample(handle: int, tensor: TensorHeader) -> bytes:
    wanted = min(SAMPLE, tensor.nbytes)
    sample = os.pread(handle, wanted, tensor.offset)
    if len(sample) < wanted:
        at = tensor.offset + len(sample)
        raise CheckpointError(
            Fault(
                str(tensor.file),
                f"it ends at byte {at:,}, inside tensor {tensor.name!r}: it was just changed",
            )
        )
    return sample


def digest(files: Iterable[Path]) -> str:
    """SHA-256 over every byte of the files, in the order given.

    Raises:
        CheckpointError: a file cannot be read.
    """
    state = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as handle:
                while block := handle.read(1 << 22):
                    state.update(block)
        except OSError as error:
            raise _unreadable(file, error) from error
    return state.hexdigest()


_VOCABULARY_FILES = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


def vocabulary(folder: Path) -> dict[str, int] | str | None:
    """What token has which id: a mapping; a hash where only a binary vocabulary exists; None without one.

    Padding, templates and normalisers do not count: they change no row of an embedding.

    Raises:
        CheckpointError: a tokenizer file cannot be read, or is not what tokenizers writes.
    """
    fast = folder / "tokenizer.json"
    if fast.exists():
        return _checked(fast, _fast_pairs)
    for name in _VOCABULARY_FILES:
        path = folder / name
        if path.exists():
            if name == "vocab.json":
                return _checked(path, lambda data: {token: int(number) for token, number in data.items()})
            return hashlib.sha256(content(path)).hexdigest()
    return None


def _fast_pairs(data: dict[str, Any]) -> dict[str, int]:
    vocab = (data.get("model") or {}).get("vocab") or {}
    if isinstance(vocab, dict):
        pairs = dict(vocab)
    else:  # Unigram: [token, score] in the order of their ids
        pairs = {str(entry[0] if isinstance(entry, list) else entry): i for i, entry in enumerate(vocab)}
    pairs.update({token["content"]: token["id"] for token in data.get("added_tokens") or []})
    return pairs


def _checked(path: Path, read: Callable[[dict[str, Any]], dict[str, int]]) -> dict[str, int]:
    try:
        return read(read_json(path))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            Fault(str(path), "it is no vocabulary as tokenizers writes it", run="Copy or download it again")
        ) from error


def canonical_hash(value: object) -> str:
    """SHA-256 of the value as sorted, compact JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
