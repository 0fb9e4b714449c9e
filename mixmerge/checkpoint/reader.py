"""A model folder as headers: config, tensors and where their bytes are. No tensor data is read here."""

from __future__ import annotations

import json
import os
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.header import TensorHeader, read_header
from mixmerge.errors import CheckpointError, Fault

SAFETENSORS = "model.safetensors"
BIN = "pytorch_model.bin"
_INDEX = ".index.json"
_MAX_JSON = 200_000_000
_MAX_NAME = 255


@dataclass(frozen=True)
class Checkpoint:
    """One model folder.

    Args:
        name: as the recipe writes it.
        path: the folder on this machine.
        config: ``config.json``.
        tensors: every tensor of every weight file, by name.
        files: the weight files, sorted.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    files: tuple[Path, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise CheckpointError(Fault(str(path), "it is not a regular file"))
        if facts.st_size > _MAX_JSON:
            raise CheckpointError(Fault(str(path), f"it is larger than {_MAX_JSON:,} bytes"))
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            Fault(str(path), "no such file", run="Point the recipe at a folder saved with save_pretrained")
        ) from error
    except OSError as error:
        raise CheckpointError(Fault(str(path), f"cannot be read: {error.strerror}")) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(Fault(str(path), "it is not JSON", run="Copy or download it again")) from error
    if not isinstance(value, dict):
        raise CheckpointError(Fault(str(path), f"it holds a {type(value).__name__}, not an object"))
    return value


def _plain(name: str) -> bool:
    printable = name.isprintable() and len(name.encode()) <= _MAX_NAME
    return printable and name not in ("", ".", "..") and Path(name).name == name


def _inside(folder: Path, name: Any, where: Path) -> Path:
    """The file ``name`` of a folder, refused when an index tries to lead out of it."""
    if not isinstance(name, str) or not _plain(name):
        raise CheckpointError(
            Fault(
                str(where),
                f"it names the file {reprlib.repr(name)}",
                "A file name without folders is allowed",
            )
        )
    path = folder / name
    if path.is_symlink():
        # The Hugging Face cache links snapshots/<commit>/<file> to blobs/<hash> of the same repository.
        roots = [folder.resolve()]
        if folder.resolve().parent.name == "snapshots":
            roots.append(folder.resolve().parent.parent / "blobs")
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(root) for root in roots):
            raise CheckpointError(
                Fault(
                    str(path),
                    f"it is a link to {target}, outside the folder",
                    run="Copy the file into the folder, or name the folder it is in",
                )
            )
    return path


def _indexed(folder: Path, index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(Fault(str(index), "it has no weight_map", run="Copy or download it again"))
    names = set(map(str, weight_map.values()))
    return [_inside(folder, name, index) for name in sorted(names)], weight_map


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str], Path | None]:
    for single in (SAFETENSORS, BIN):
        index = folder / (single + _INDEX)
        # lexists: a link to nothing is a download that is not complete, not a folder without weights.
        if os.path.lexists(index):
            return *_indexed(folder, index), index
        if os.path.lexists(folder / single):
            return [_inside(folder, single, folder)], {}, None
    raise CheckpointError(
        Fault(
            str(folder),
            "it holds no weights",
            f"{SAFETENSORS} or {BIN}, or an index of shards, is looked for",
            "Finish the download, or save the model with save_pretrained",
        )
    )


def read_weights(folder: Path) -> tuple[dict[str, TensorHeader], tuple[Path, ...]]:
    """The headers of all weight files of a folder.

    Raises:
        CheckpointError: no weights, a damaged file, an index that names other files than the folder's own,
            or that disagrees with what the files hold.
    """
    files, weight_map, index = _weight_files(folder)
    tensors: dict[str, TensorHeader] = {}
    for file in files:
        if file.suffix == ".bin":
            from mixmerge.checkpoint.pickled import read_bin_header

            found = read_bin_header(file)
        else:
            found = read_header(file)
        for name in tensors.keys() & found.keys():
            raise CheckpointError(
                Fault(
                    str(file), f"tensor {name!r} is also in {tensors[name].file.name}", run="Keep one of them"
                )
            )
        tensors.update(found)
    for name, file_name in weight_map.items():
        if name not in tensors or tensors[name].file.name != file_name:
            raise CheckpointError(
                Fault(
                    str(index),
                    f"tensor {name!r} is not in {file_name}",
                    run="The download is not complete, or index and shards are of different models",
                )
            )
    return tensors, tuple(sorted(files))


def open_checkpoint(folder: Path, *, name: str) -> Checkpoint:
    """Read the config and every weight header of a model folder.

    Raises:
        CheckpointError: as ``read_json`` and ``read_weights``; or the weights are quantised.
    """
    config = read_json(folder / "config.json")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
        raise CheckpointError(
            Fault(
                str(folder / "config.json"),
                f"the weights are quantised ({method})",
                "Merging needs bfloat16, float16, float32 or float64 weights",
                "Use the model it was quantised from, or dequantise it first",
            )
        )
    tensors, files = read_weights(folder)
    return Checkpoint(name, folder, config, tensors, files)
