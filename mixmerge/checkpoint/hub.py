"""Models of the Hugging Face hub: found in its cache, planned from their headers alone, downloaded when all is well.

The cache is the hub client's own, in its layout: what other tools downloaded is used, and they use what we
download. A snapshot is one commit, so what was planned is what is merged.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from mixmerge.checkpoint.adapter import WEIGHTS as ADAPTER_WEIGHTS
from mixmerge.checkpoint.header import MAX_HEADER
from mixmerge.checkpoint.reader import BIN, SAFETENSORS, Checkpoint, open_checkpoint, read_json
from mixmerge.checkpoint.transfer import WORKERS, Progress, asking, bars, fetch, read_range
from mixmerge.errors import CheckpointError, Fault

# What a merge or a tokenizer may need beside weights. A file of this size is data, and no reader takes it.
_SMALL, _LARGE = (".json", ".jinja", ".model", ".txt"), 200_000_000
_CONFIG, _ADAPTER_CONFIG = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Snapshot:
    """One commit of a repository on the hub, and its folder in the cache.

    Args:
        name: of the repository.
        commit: 40 hexadecimal digits.
        folder: where its files are, and where the absent ones will be.
        weights: bytes of each weight file, where some are absent.
        absent: the weight files that are still to be downloaded.
    """

    name: str
    commit: str
    folder: Path
    weights: Mapping[str, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    @property
    def bytes_to_download(self) -> int:
        return sum(self.weights[file] for file in self.absent)


def find(name: str, revision: str | None, *, where: str, adapter: bool | None = None) -> Snapshot:
    """The snapshot of a model, without network if the cache has all of it; else everything but its weights.

    Args:
        name: of the repository.
        revision: branch, tag or commit; None is ``main``.
        where: for errors.
        adapter: an adapter is wanted, which comes with its weights; None takes what the repository is.

    Raises:
        CheckpointError: the hub cannot be reached or refuses, there is no such model, or only as ``*.bin``.
    """
    from huggingface_hub import constants

    with asking(name, revision, where):
        known = _cached(name, revision, adapter)
    if known is not None and adapter is None:
        adapter = not (known / _CONFIG).exists()
    lacks = None if known is None else _lacking(known, adapter)
    whole = Snapshot(name, known.name, known) if known is not None and not lacks else None
    # Loading a model alone leaves its tokenizer out of the cache, and a merge wants one.
    if whole and (adapter or constants.HF_HUB_OFFLINE or (whole.folder / "tokenizer_config.json").exists()):
        return whole
    if constants.HF_HUB_OFFLINE:
        missing = "is neither a folder here nor in the Hugging Face cache"
        what = f"is not whole in the Hugging Face cache: {lacks}" if lacks else missing
        label = name if revision is None else f"{name}@{revision}"
        run = f"Unset it, or run: HF_HUB_OFFLINE=0 {_command(name, revision)}"
        raise CheckpointError(Fault(where, f"{label} {what}", "HF_HUB_OFFLINE forbids asking the hub", run))
    try:
        with asking(name, revision, where):
            return _ask(name, revision, where, adapter)
    except CheckpointError:
        if whole:
            return whole
        raise


def _command(name: str, revision: str | None) -> str:
    return f"hf download {name}" + (f" --revision {revision}" if revision else "")


def _cached(name: str, revision: str | None, adapter: bool | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for config in (_CONFIG, _ADAPTER_CONFIG) if adapter is None else (_config(adapter),):
        path = try_to_load_from_cache(name, config, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _config(adapter: bool) -> str:
    return _ADAPTER_CONFIG if adapter else _CONFIG


def _lacking(folder: Path, adapter: bool | None) -> str:
    """What is not there yet of a snapshot, in words; nothing if it is whole."""
    weights = _weight_names(folder, {path.name for path in folder.iterdir() if path.exists()}, adapter)
    absent = [name for name in weights if not (folder / name).exists()]
    more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
    return f"it lacks {', '.join(absent[:3])}{more}" if absent else "" if weights else "it holds no weights"


def _weight_names(folder: Path, names: Collection[str], adapter: bool | None) -> tuple[str, ...]:
    """The weight files a reader will open, of a repository with these files; the folder has the index."""
    if _CONFIG not in names if adapter is None else adapter:
        return tuple(name for name in ADAPTER_WEIGHTS if name in names)[:1]
    for single in (SAFETENSORS, BIN):
        index = f"{single}.index.json"
        if index in names:
            listed = read_json(folder / index).get("weight_map")
            return tuple(sorted(set(map(str, listed.values())))) if isinstance(listed, dict) else ()
        if single in names:
            return (single,)
    return ()


# -- asking ---------------------------------------------------------------------------------------------------


def _ask(name: str, revision: str | None, where: str, adapter: bool | None) -> Snapshot:
    from huggingface_hub import HfApi, constants, hf_hub_download

    info = HfApi().model_info(
        name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    # Folders hold other formats of the same weights and a trainer's checkpoints.
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or () if "/" not in file.rfilename}
    if adapter is None:
        adapter = _CONFIG not in sizes and _ADAPTER_CONFIG in sizes
    config = _config(adapter)
    if config not in sizes:
        kind = "PEFT adapter" if adapter else "transformers model"
        raise CheckpointError(Fault(where, f"{name} on the hub has no {config}", f"A {kind} has one"))
    # Asked for by its branch, the client notes in the cache which commit that is.
    first = hf_hub_download(name, config, revision=revision, tqdm_class=bars(None, 0))
    folder = Path(first).parent
    if folder.name != info.sha:
        what = f"{name} is being changed on the hub"
        raise CheckpointError(Fault(where, what, run="Run the same command again"))
    if adapter:
        fetch([(name, info.sha, file) for file in _weight_names(folder, sizes, True)], bars(None, 0))
        return Snapshot(name, info.sha, folder)
    wanted = [file for file, size in sizes.items() if file.endswith(_SMALL) and size < _LARGE]
    if "auto_map" in read_json(folder / config):
        wanted += [file for file in sizes if file.endswith(".py")]
    fetch([(name, info.sha, file) for file in wanted], bars(None, 0))
    weights = {file: sizes[file] for file in _weight_names(folder, sizes, False) if file in sizes}
    absent = tuple(file for file in weights if not (folder / file).exists())
    if any(file.endswith(".bin") for file in absent):
        what = f"{name} has *.bin weights only, whose headers cannot be read on the hub"
        run = f"Download it, then run the same command again: {_command(name, revision)}"
        raise CheckpointError(Fault(where, what, "safetensors are planned before they are downloaded", run))
    return Snapshot(name, info.sha, folder, weights if absent else {}, absent)


def open_remote(snapshot: Snapshot, *, where: str) -> Checkpoint:
    """A model whose weights are on the hub, read and checked as if they were in its folder.

    Of each weight file two ranges are asked for: the length of the header, and the header.

    Raises:
        CheckpointError: as ``open_checkpoint``; or the hub cannot be reached or refuses.
    """
    # Files of the right size with nothing but a header in them: the code that reads and checks local files
    # reads and checks these. They are sparse, so they take no room.
    with tempfile.TemporaryDirectory(prefix="mixmerge-") as made, asking(snapshot.name, None, where):
        standin = Path(made)
        for name in (_CONFIG, f"{SAFETENSORS}.index.json"):
            if (snapshot.folder / name).exists():
                shutil.copyfile(snapshot.folder / name, standin / name)
        with ThreadPoolExecutor(WORKERS) as pool:
            list(pool.map(lambda file: _write_header(snapshot, file, standin / file), snapshot.weights))
        try:
            checkpoint = open_checkpoint(standin, name=snapshot.name)
        except CheckpointError as error:
            raise CheckpointError(
                replace(fault, where=fault.where.replace(str(standin), snapshot.name))
                for fault in error.faults
            ) from error
    folder = snapshot.folder
    return replace(
        checkpoint,
        path=folder,
        files=tuple(folder / file.name for file in checkpoint.files),
        tensors={
            name: replace(tensor, file=folder / tensor.file.name)
            for name, tensor in checkpoint.tensors.items()
        },
    )


def _write_header(snapshot: Snapshot, file: str, path: Path) -> None:
    from huggingface_hub import hf_hub_url

    url, size = hf_hub_url(snapshot.name, file, revision=snapshot.commit), snapshot.weights[file]
    head = read_range(url, 0, min(8, size))
    end = 8 + int.from_bytes(head, "little")
    if end <= min(size, 8 + MAX_HEADER):
        head += read_range(url, 8, end)
    path.write_bytes(head)
    os.truncate(path, size)


# -- downloading ----------------------------------------------------------------------------------------------


def download(snapshots: Iterable[Snapshot], *, progress: Progress | None = None) -> None:
    """Put the absent weights of snapshots into the cache.

    Args:
        snapshots: several may be of one commit; each file is downloaded once.
        progress: called with (bytes downloaded, bytes in all), from several threads.

    Raises:
        CheckpointError: the disk is too small or full, or the hub cannot be reached or refuses.
    """
    wanted = {(one.name, one.commit, file): one for one in snapshots for file in one.absent}
    total = sum(one.weights[file] for (_, _, file), one in wanted.items())
    for one in wanted.values():
        free = shutil.disk_usage(one.folder).free
        if free < total:
            raise CheckpointError(
                Fault(
                    str(one.folder.parent.parent),
                    f"the disk has {free / 1e6:,.1f} MB free, the weights to download need {total / 1e6:,.1f} MB",
                    run="Free some space, or set HF_HOME to a folder on another disk",
                )
            )
    fetch(list(wanted), bars(progress, total))
    if progress is not None:
        progress(total, total)


def fetch_all(snapshot: Snapshot) -> None:
    """``download`` of one snapshot under the hub client's own progress bars."""
    fetch([(snapshot.name, snapshot.commit, file) for file in snapshot.absent], None)
