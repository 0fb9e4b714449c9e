"""A mixture from the Hugging Face hub: its folder in the hub's cache, and what a stranger's YAML may name.

The mixture of a repository is a folder like any other: ``mixture.yaml``, and what lies beside it. It is written by
somebody else, so it may name what lies beside it and what is on the hub, and nothing else of this machine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mixmerge.checkpoint.transfer import asking, bars, fetch
from mixmerge.errors import CheckpointError, Fault, MixmergeError
from mixmerge.mixture.saving import FILE, HERE, is_fitted, spec_of
from mixmerge.mixture.schema import ComposeSpec, ExpertSpec, MixtureSpec, RouterSpec
from mixmerge.mixture.wholes import Whole, whole_of
from mixmerge.routers.storage import CARD

_HUB_ID = re.compile(r"[\w.\-]+/[\w.\-]+")
_PLACES = ("model", "adapter", "base")
_OF_ROUTER = ("model", "path")  # options of routers and features that may be paths
# what an engine may be told by a stranger: numbers and types, no paths, no code
_OPTIONS = frozenset(
    {
        *("dtype", "revision", "batch_tokens", "delay", "max_model_len", "max_loras", "sleep_mode"),
        *("concurrency", "timeout", "retries", "max_wait", "max_tokens_field", "omit"),
    }
)
# weights that are programs, or that nothing here reads
_UNREAD = (
    ".bin",
    ".pt",
    ".pth",
    ".pkl",
    ".pickle",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npy",
    ".npz",
)


def is_hub_id(source: object) -> bool:
    """Whether a mixture's name means the hub: ``org/name``, and nothing of that name is here."""
    text = str(source)
    if not isinstance(source, str | Path) or not _HUB_ID.fullmatch(text) or text.startswith("."):
        return False
    return not (text.lower().endswith((".yaml", ".yml")) or os.path.lexists(text))


def spec_from(
    source: str | Path | Mapping[str, Any], *, revision: str | None = None, trust_endpoints: bool = False
) -> MixtureSpec:
    """What a mixture says, here or on the hub.

    Args:
        source: a YAML file, a fitted mixture's folder, a mapping of the YAML's shape, or a hub id.
        revision: branch, tag or commit of a hub id.
        trust_endpoints: of a hub id, as ``confined`` says.

    Raises:
        MixmergeError: as ``spec_of``, and of a hub id as ``snapshot`` and ``confined``; a revision of what is no
            hub id.
    """
    if not isinstance(source, str | Path) or not is_hub_id(source):
        refuse_revision(source, revision)
        return spec_of(source)
    folder = snapshot(str(source), revision)
    found = spec_of(folder if is_fitted(folder) else folder / FILE)
    return confined(found, folder, name=str(source), trust_endpoints=trust_endpoints)


def refuse_revision(source: object, revision: str | None) -> None:
    """Of what is here, there are no revisions."""
    if revision is not None:
        named = source if isinstance(source, str | Path) else "the mixture"
        raise MixmergeError(
            Fault("--revision", f"{named} is no hub id", "A hub id: org/name", "Leave it out")
        )


def snapshot(name: str, revision: str | None = None) -> Path:
    """The folder of a mixture of the hub, in the hub's own cache; what is not there is downloaded.

    Args:
        name: ``org/name``.
        revision: branch, tag or commit; None is ``main``.

    Raises:
        CheckpointError: the hub cannot be reached or refuses, or the repository holds no mixture; with
            HF_HUB_OFFLINE, it is not in the cache.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    with asking(name, revision, name):
        known = try_to_load_from_cache(name, FILE, revision=revision)
    if constants.HF_HUB_OFFLINE:
        if isinstance(known, str):
            return Path(known).parent
        run = f"Unset it, or run: HF_HUB_OFFLINE=0 hf download {name}"
        run += f" --revision {revision}" if revision else ""
        what = "is neither a file here nor a mixture in the Hugging Face cache"
        raise CheckpointError(Fault(name, what, "HF_HUB_OFFLINE forbids asking the hub", run))
    try:
        with asking(name, revision, name):
            return _ask(name, revision)
    except CheckpointError:
        if isinstance(known, str):
            return Path(known).parent
        raise


def _ask(name: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, hf_hub_download

    info = HfApi().model_info(name, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    files = [file.rfilename for file in info.siblings or ()]
    if FILE not in files:
        raise CheckpointError(Fault(name, f"has no {FILE} on the hub", "A repository that holds a mixture"))
    # Asked for by its branch, the client notes in the cache which commit that is.
    folder = Path(hf_hub_download(name, FILE, revision=revision, tqdm_class=bars(None, 0))).parent
    if folder.name != info.sha:
        what = "is being changed on the hub"
        raise CheckpointError(Fault(name, what, run="Run the same command again"))
    wanted = [file for file in files if not file.lower().endswith(_UNREAD)]
    fetch([(name, str(info.sha), file) for file in wanted], None)
    return folder


def confined(spec: MixtureSpec, folder: Path, *, name: str, trust_endpoints: bool) -> MixtureSpec:
    """The mixture of a snapshot, its relative paths in the snapshot; everything that leaves it is refused at once.

    Args:
        spec: what its YAML says.
        folder: of the snapshot.
        name: of the repository.
        trust_endpoints: prompts, and the keys of ``api_key_env``, may go to the servers that it names.

    Raises:
        MixmergeError: a path that is absolute, of a home folder, or leads out of the snapshot, by ``..`` or by a
            link; the name of a folder here; options of an engine that are not just numbers and types; an endpoint
            that is not trusted.
    """
    faults = list(_links(folder, name))
    experts = {}
    for called, expert in spec.experts.items():
        where = f"{name}: experts.{called}"
        faults += _untrusted(expert, where, trust=trust_endpoints)
        if expert.endpoint is None:
            given = {key: getattr(expert, key) for key in _PLACES}
            expert = expert.model_copy(update=_moved(given, _PLACES, folder, where, faults))
        experts[called] = expert
    router = None if spec.router is None else _router(spec.router, folder, f"{name}: router", faults)
    compose, whole = spec.compose, whole_of(spec.compose.kind)
    if whole is not None:
        compose = _compose(compose, whole, folder, f"{name}: compose", faults)
    if faults:
        raise MixmergeError(faults)
    return spec.model_copy(update={"experts": experts, "router": router, "compose": compose})


def _compose(
    compose: ComposeSpec, whole: Whole, folder: Path, where: str, faults: list[Fault]
) -> ComposeSpec:
    """Places of a whole; rows that it would be fitted on are what lies beside the YAML, too."""
    options = dict(compose.options)
    # the folder of one that lies beside the YAML was put in already
    inner = {key: value for key, value in _texts(options).items() if value != str(folder)}
    options |= _moved(inner, whole.folders, folder, where, faults)
    for section, _, key in (one.partition(".") for one in whole.folders if "." in one):
        if isinstance(options.get(section), Mapping):
            moved = _moved(_texts(options[section]), (key,), folder, f"{where}.{section}", faults)
            options[section] = {**options[section], **moved}
    for key in whole.files:
        data = options.get(key)
        if isinstance(data, str):
            options[key] = _inside(data, folder, f"{where}.{key}", faults)
        elif isinstance(data, list):
            options[key] = [
                _inside(str(one), folder, f"{where}.{key}[{at}]", faults) for at, one in enumerate(data)
            ]
        elif isinstance(data, Mapping):
            options[key] = {
                name: _inside(value, folder, f"{where}.{key}.{name}", faults)
                for name, value in _texts(data).items()
            }
    return compose.model_copy(update={"options": options})


def _router(router: RouterSpec, folder: Path, where: str, faults: list[Fault]) -> RouterSpec:
    update: dict[str, Any] = {}
    for key in ("folder", "outcomes"):
        value = getattr(router, key)
        # that which lies beside the YAML was put in already
        if value is not None and not (key == "folder" and value in (HERE, str(folder))):
            update[key] = _inside(value, folder, f"{where}.{key}", faults)
    for key in ("options", "features"):
        given = getattr(router, key)
        if given:
            moved = _moved(_texts(given), _OF_ROUTER, folder, f"{where}.{key}", faults)
            update[key] = {**given, **moved}
    if router.folder is not None:
        _fitted(Path(update.get("folder", router.folder)), where, faults)
    return router.model_copy(update=update)


def _texts(given: object) -> dict[str, str]:
    items = given.items() if isinstance(given, Mapping) else ()
    return {key: value for key, value in items if isinstance(value, str)}


def _fitted(folder: Path, where: str, faults: list[Fault]) -> None:
    """Features that a fitted router reads at work: its card is signed, so that no path can be moved."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # loading it says so
    card = card if isinstance(card, dict) else {}
    features = card.get("features")
    for key, value in _texts(features.get("options") if isinstance(features, dict) else None).items():
        if key in _OF_ROUTER and (_is_path(value) or os.path.lexists(value)):
            what = f"{value!r} would be looked for on this machine"
            faults.append(Fault(f"{where}: {CARD}: {key}", what, "A hub id", "Fit a router of your own"))


def _moved(
    given: Mapping[str, str | None], keys: tuple[str, ...], folder: Path, where: str, faults: list[Fault]
) -> dict[str, str]:
    """Those values of the keys that are paths in the snapshot, from the root of the file system."""
    found = {}
    for key in keys:
        value = given.get(key)
        if value is None:
            continue
        if _is_path(value) or os.path.lexists(folder / value):
            found[key] = _inside(value, folder, f"{where}.{key}", faults)
        elif os.path.lexists(value):
            what = f"{value!r} is not in the repository, and something of that name is in this folder"
            faults.append(Fault(f"{where}.{key}", what, _ALLOWED, "Run the command in another folder"))
    return found


_ALLOWED = "A path in the repository, or a hub id"


def _is_path(value: str) -> bool:
    return value.startswith((".", "/", "~")) or value.count("/") > 1 or "\\" in value or "\0" in value


def _inside(value: str, folder: Path, where: str, faults: list[Fault]) -> str:
    """The path in the snapshot; one that leaves it is a fault."""
    if "\0" in value or "\\" in value or value.startswith(("/", "~")):
        faults.append(Fault(where, f"{value!r} is no path in the repository", _ALLOWED))
        return value
    path = os.path.normpath(folder / value)
    if not Path(path).is_relative_to(os.path.normpath(folder)):
        faults.append(Fault(where, f"{value!r} leads out of the repository", _ALLOWED))
    elif not os.path.lexists(path):
        faults.append(Fault(where, f"{value!r} is not in the repository", _ALLOWED))
    return path


def _links(folder: Path, name: str) -> Iterator[Fault]:
    """Links of a snapshot that lead elsewhere than to the snapshot or to the cache's files of this repository."""
    blobs = folder.parent.parent / "blobs"
    homes = [Path(os.path.realpath(one)) for one in (folder, blobs)]
    for root, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            path = Path(root) / entry
            if not path.is_symlink():
                continue
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(home) for home in homes):
                shown = path.relative_to(folder)
                yield Fault(f"{name}: {shown}", "is a link that leads out of the repository", "Files")


def _untrusted(expert: ExpertSpec, where: str, *, trust: bool) -> Iterator[Fault]:
    if expert.endpoint is not None and not trust:
        key = f", and the key in {expert.api_key_env}," if expert.api_key_env else ""
        what = f"prompts{key} would be sent to {expert.endpoint}, which the mixture's author has chosen"
        at = f"{where}.{'api_key_env' if expert.api_key_env else 'endpoint'}"
        yield Fault(at, what, run="If you trust it, pass --trust-endpoints (trust_endpoints=True)")
    for option in expert.options:
        if option not in _OPTIONS:
            what = "is an option that a mixture of the hub may not set"
            allowed = f"Allowed: {', '.join(sorted(_OPTIONS))}"
            yield Fault(f"{where}.options.{option}", what, allowed, "Write a mixture of your own")
