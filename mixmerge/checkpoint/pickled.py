"""PyTorch ``.bin`` files read as headers, through torch's weights-only loader and nothing else."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path

from mixmerge.checkpoint.header import TensorHeader, is_text
from mixmerge.errors import CheckpointError, Fault

_DTYPES = {
    "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32", "torch.float64": "F64",
    "torch.int64": "I64", "torch.int32": "I32", "torch.int16": "I16", "torch.int8": "I8",
    "torch.uint8": "U8", "torch.bool": "BOOL",
}  # fmt: skip
# What zipfile and torch raise over damaged bytes; neither promises less.
_REFUSALS = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError,
    TypeError, ValueError, pickle.PickleError, struct.error, zipfile.BadZipFile,
)  # fmt: skip


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        Fault(str(path), what, run="Save the model again with safe_serialization=True and use that folder")
    )


def _check_archive(path: Path) -> None:
    try:
        if not path.is_file():  # a folder, a pipe, a link to nothing
            raise CheckpointError(Fault(str(path), "it is not a regular file"))
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except OSError as error:
        raise CheckpointError(Fault(str(path), f"cannot be read: {error.strerror or error}")) from error
    except _REFUSALS as error:
        raise _bad(path, "it is not a zip archive of torch.save: damaged, or of before torch 1.6") from error
    if compressed:
        raise _bad(path, "its records are compressed, which torch.save never does")


def read_bin_header(path: Path) -> dict[str, TensorHeader]:
    """Every tensor of a ``.bin`` file: where its bytes are, without reading them.

    Raises:
        CheckpointError: not a zip archive, anything in it but tensors of known dtypes, or a tensor that is
            not contiguous in the file.
    """
    _check_archive(path)
    import torch

    try:
        state = torch.load(path, map_location="meta", weights_only=True)
    except _REFUSALS as error:
        raise _bad(path, "torch's weights-only loader refuses it") from error
    if not isinstance(state, dict):
        raise _bad(path, f"it holds a {type(state).__name__}, not a state dict")
    size = path.stat().st_size
    tensors = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not is_text(name) or not isinstance(tensor, torch.Tensor):
            raise _bad(path, f"entry {name!r} is not a tensor")
        if tensor.layout != torch.strided:
            raise _bad(path, f"tensor {name!r} is {tensor.layout}, not dense")
        dtype = _DTYPES.get(str(tensor.dtype))
        start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        if dtype is None or start is None or not tensor.is_contiguous():
            raise _bad(path, f"tensor {name!r} ({tensor.dtype}) cannot be read in place")
        offset = start + tensor.storage_offset() * tensor.element_size()
        if offset + tensor.nbytes > size:
            raise _bad(path, f"tensor {name!r} ends at byte {offset + tensor.nbytes:,}, the file at {size:,}")
        tensors[name] = TensorHeader(name, dtype, tuple(tensor.shape), path, offset, tensor.nbytes)
    return tensors
