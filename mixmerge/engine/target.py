"""Where an output may go: a place that is free, or a model folder and nothing else that may be replaced."""

from __future__ import annotations

import errno
from pathlib import Path

from mixmerge.errors import Fault, OutputError
from mixmerge.plan import Plan

BANK, BANK_CARD = "bank", "bank/bank.json"
MASKS, MASKS_CARD = "masks", "masks/masks.json"
_WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")


def unwritten(path: Path, error: OSError) -> OutputError:
    """What a disk's refusal is to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            Fault(str(path), "the disk is full", run="Free some space and run the same command: it goes on")
        )
    return OutputError(Fault(str(path), f"cannot be written: {error.strerror}"))


def check_target(plan: Plan, out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, or that would destroy something.

    Raises:
        OutputError: see the message.
    """
    try:
        _check_target(plan, named(out), overwrite=overwrite)
    except OSError as error:
        raise unwritten(out, error) from error


def named(out: Path) -> Path:
    """The folder's own name in its real parent: ``.``, ``..`` and links on the way are followed."""
    return out.resolve() if out.name in ("", "..") else out.parent.resolve() / out.name


def _check_target(plan: Plan, out: Path, *, overwrite: bool) -> None:
    for model in plan.models:
        for path in filter(None, (model.path, model.adapter, *model.files)):
            if path.resolve().is_relative_to(out.resolve()):
                raise OutputError(
                    Fault(str(out), f"{path} is an input of this merge and in it", run="Name another folder")
                )
    if not out.exists() and not out.is_symlink():
        nearest = next(folder for folder in out.parents if folder.exists())
        if not nearest.is_dir():
            raise OutputError(Fault(str(nearest), "it is a file, so no folder can be made in it"))
        return
    if not overwrite:
        raise OutputError(Fault(str(out), "it exists", run="Name another folder, or pass --overwrite"))
    refused = ""
    if out.is_symlink():
        refused = "it is a link"
    elif not out.is_dir() or not _replaceable(out):
        refused = "it is not a model folder and nothing else"
    elif Path.cwd().is_relative_to(out):
        refused = "it is the folder this command runs in"
    elif out.is_mount():
        refused = "another disk is mounted on it"
    if refused:
        raise OutputError(
            Fault(str(out), f"it exists and {refused}, so it is not overwritten", run="Name another folder")
        )


def _replaceable(folder: Path) -> bool:
    """Only a model would be lost: config, weights, heads, bank, masks, no other folder (.git); or nothing."""
    entries = list(folder.iterdir())
    weights = any(entry.match(pattern) for pattern in _WEIGHTS for entry in entries)
    ours = {"heads": _heads, BANK: _files, MASKS: _files}
    folders = [
        entry for entry in entries if entry.is_dir() and not (entry.name in ours and ours[entry.name](entry))
    ]
    model = weights and (folder / "config.json").is_file() and not folders
    return model or not entries


def _heads(folder: Path) -> bool:
    """Whether a folder holds heads of experts as a merge keeps them, and nothing else."""
    known = {"config.json", "head.safetensors"}
    return all(
        head.is_dir() and {entry.name for entry in head.iterdir()} <= known for head in folder.iterdir()
    )


def _files(folder: Path) -> bool:
    """Whether a folder holds a bank and its gate, or masks, and nothing else."""
    return all(entry.is_file() and entry.suffix in (".json", ".safetensors") for entry in folder.iterdir())
