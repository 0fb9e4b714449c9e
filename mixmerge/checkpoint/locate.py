"""Model references to folders on this machine: local folders first, then the Hugging Face cache, then the hub."""

from __future__ import annotations

import re
from pathlib import Path

from mixmerge.errors import CheckpointError, Fault

_HUB_ID = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
# No pickles are asked for where a repository has safetensors; *.bin comes only as the second try.
_SMALL = ["*.json", "*.jinja", "*.txt", "*.model"]
_IGNORED = ["consolidated*", "original/*", "*.onnx", "*.gguf"]


def locate(path: str, revision: str | None, *, where: str) -> Path:
    """The folder of a model or adapter.

    Args:
        path: a local folder or a hub id (``org/name``).
        revision: branch, tag or commit on the hub.
        where: for errors.

    Raises:
        CheckpointError: no such folder, or the hub cannot give it.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        if revision:
            raise CheckpointError(
                Fault(where, f"{path} is a local folder, so it has no revision {revision!r}")
            )
        return folder
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1 or folder.exists()
    if looks_local or not _HUB_ID.fullmatch(path):
        what = "is a file, not a folder" if folder.exists() else "no such folder"
        raise CheckpointError(
            Fault(where, f"{path}: {what}", "A model folder or a hub id (org/name) is allowed")
        )
    return _download(path, revision, where)


def _download(name: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        for weights in ("*.safetensors", "*.bin"):
            folder = Path(
                snapshot_download(
                    name, revision=revision, allow_patterns=[*_SMALL, weights], ignore_patterns=_IGNORED
                )
            )
            if list(folder.glob(weights)):
                break
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            Fault(
                where,
                f"{name} is neither a folder here nor in the Hugging Face cache, and the hub cannot be reached",
                run=f"Check the spelling, or run: hf download {name}",
            )
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            Fault(
                where,
                f"{name} cannot be had from the hub: {reason}",
                run="hf auth login, for a private model",
            )
        ) from error
    return folder
