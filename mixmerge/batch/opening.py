"""Engines for what is loaded, and what that takes, before anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.checkpoint.header import DTYPE_BYTES, read_header
from mixmerge.checkpoint.reader import read_json
from mixmerge.dynamic.folders import Parts, is_dynamic, nbytes, parts_of
from mixmerge.engines.base import Engine
from mixmerge.engines.process_wire import arguments_taken, make_engine
from mixmerge.experts import Expert
from mixmerge.logits.places import folders_of, places_of

if TYPE_CHECKING:
    from mixmerge.batch.cluster import Cluster

# Options of an expert that say how vLLM's process is run; the others are ``VllmOptions``.
_VLLM_PROCESS = ("revision", "python", "start_timeout", "timeout", "grace")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def arguments_of(
    unit: Sequence[Expert], *, device: str, latents: Path | None = None, latents_bytes: int | None = None
) -> dict[str, Any]:
    """What the engine of these experts is made with, as JSON values."""
    first = unit[0]
    options = dict(first.options)
    if first.remote:
        return {"endpoint": first.endpoint, "model": first.model, "api_key_env": first.api_key_env, **options}
    taken = arguments_taken(first.engine)
    adapters = {one.name: one.adapter for one in unit if one.adapter is not None}
    about: dict[str, Any] = {
        "model": first.model,
        "device": device,
        **({"adapters": adapters} if adapters else {}),
    }
    about |= {} if latents is None else {"store": str(latents.absolute())}
    about |= {} if latents_bytes is None else {"store_bytes": latents_bytes}
    # What an engine does not take is nothing to it, but for adapters: those it would leave out.
    known = {name: value for name, value in about.items() if name in taken or name == "adapters"}
    if first.engine == "vllm":
        process = {name: options.pop(name) for name in _VLLM_PROCESS if name in options}
        return {**known, **process, "options": options}
    return {**known, **options}


def open_engine(
    unit: Sequence[Expert],
    *,
    device: str,
    apart: bool = False,
    cluster: Cluster | None = None,
    latents: Path | None = None,
    latents_bytes: int | None = None,
) -> Engine:
    """The engine that runs these experts, not loaded. On a GPU it is a process of its own, so that memory comes back.

    Args:
        unit: experts that share what is loaded.
        device: a torch device, or a slot of the cluster.
        apart: a process of its own on the CPU too.
        cluster: where what is no endpoint's runs; None for this machine.
        latents: folder where experts keep what others read.
        latents_bytes: it is to have at most; None: half of what its disk has room for.

    Raises:
        MixmergeError: there is no engine of that name, or it does not take the options.
    """
    first = unit[0]
    name = first.name if first.remote or len(unit) == 1 else first.model
    if cluster is not None and not first.remote:
        return _on_cluster(unit, cluster, device, name, latents, latents_bytes)
    arguments = arguments_of(unit, device=device, latents=latents, latents_bytes=latents_bytes)
    gpu = device.startswith("cuda") and not first.remote
    visible = device.partition(":")[2] or None if gpu else None
    if first.engine == "vllm":
        return make_engine("vllm", {**arguments, "visible_devices": visible}, name)
    loads = "model" in arguments or "adapters" in arguments
    if first.remote or not loads or not (gpu or apart):
        return make_engine(first.engine, arguments, name)
    from mixmerge.engines.process import ProcessEngine

    if gpu and visible is not None:
        arguments["device"] = "cuda"  # the only one that the process sees
    return ProcessEngine(first.engine, arguments, name=name, visible_devices=visible)


def _on_cluster(
    unit: Sequence[Expert],
    cluster: Cluster,
    device: str,
    name: str,
    latents: Path | None,
    latents_bytes: int | None,
) -> Engine:
    from mixmerge.engines.ray import RayEngine

    slot = cluster.slot(device)
    there = [_placed(one) for one in unit]
    base = str(_parts(there[0]).base.absolute()) if there[0].engine == "dynamic" else None
    places = {place for one in there for place in (one.model, one.adapter, base) if place is not None}
    if there[0].engine == "latent":
        told = there[0].options["experts"].values()
        places |= {str(one[key]) for one in told for key in ("model", "adapter") if key in one}
    if there[0].engine == "fusion":
        options = there[0].options
        places = {*folders_of(there[0].model, options), *([options["maps"]] if "maps" in options else ())}
    return RayEngine(
        unit[0].engine,
        arguments_of(
            there, device="cuda" if slot.gpu else "cpu", latents=latents, latents_bytes=latents_bytes
        ),
        name=name,
        slot=slot,
        folders=sorted(place for place in places if Path(place).is_absolute()),
    )


def _placed(one: Expert) -> Expert:
    """With paths from the root; the adapter of a network or a fusion is the name of an expert, or of a task."""
    if one.engine in ("dynamic", "tasks", "fusion"):
        return replace(one, model=_absolute(one.model))
    if one.engine == "latent":
        experts = {
            name: {
                key: _absolute(value) if key in ("model", "adapter") else value for key, value in told.items()
            }
            for name, told in one.options["experts"].items()
        }
        return replace(one, model=_absolute(one.model), options={**one.options, "experts": experts})
    return replace(one, model=_absolute(one.model), adapter=one.adapter and _absolute(one.adapter))


def _parts(expert: Expert) -> Parts:
    """Where a network and its base are."""
    return parts_of(expert.model, base=expert.options.get("base"))


def _absolute(place: str) -> str:
    """A folder's path from the root, as other machines need it; a hub id as it is."""
    folder = Path(place).expanduser()
    return str(folder.absolute()) if folder.is_dir() else place


def size_of(unit: Sequence[Expert]) -> int:
    """Bytes of the weights that are loaded for these experts; 0 if that cannot be told from files here.

    An adapter counts where it is merged into its base, too: both are in memory until it is.
    """
    first = unit[0]
    if first.remote:
        return 0
    wanted = _DTYPES.get(str(first.options.get("dtype", "auto")))
    if first.engine == "dynamic":
        return nbytes(_parts(first), wanted) if is_dynamic(first.model) else 0
    if first.engine == "tasks":
        return _weights(Path(first.model).expanduser(), wanted)
    places: Sequence[str] = [first.model, *(one.adapter for one in unit if one.adapter is not None)]
    if first.engine == "fusion":
        places = folders_of(first.model, first.options)
    if first.engine == "latent":
        glue = _weights(Path(first.model).expanduser(), None)  # whatever type the experts are loaded in
        return glue + sum(_weights(Path(place).expanduser(), wanted) for place in _read_along(unit))
    return sum(_weights(Path(place).expanduser(), wanted) for place in places)


def token_bytes(unit: Sequence[Expert]) -> int:
    """Bytes that keys and values of one token take, by the model's config; 0 if that cannot be told from files here."""
    first = unit[0]
    if first.remote:
        return 0
    if first.engine == "fusion":  # each model has keys and values of its own
        models = [one.model for one in places_of(first.model, first.options)]
        return sum(_token_bytes(Path(one).expanduser(), first.options) for one in models)
    folder = Path(first.model).expanduser()
    if first.engine == "dynamic" and is_dynamic(folder):
        folder = _parts(first).base
    if first.engine == "latent":
        return sum(_token_bytes(Path(place).expanduser(), first.options) for place in _read_along(unit))
    return _token_bytes(folder, first.options)


def _read_along(unit: Sequence[Expert]) -> list[str]:
    """Folders of the models, and of their adapters, that are in memory when these experts of an interaction are."""
    options = unit[0].options
    experts = options["experts"]
    names = [options["expert"]] if "expert" in options else list(experts)
    return [str(experts[name][key]) for name in names for key in ("model", "adapter") if key in experts[name]]


def _token_bytes(folder: Path, options: Mapping[str, Any]) -> int:
    path = folder / "config.json"
    if not path.is_file():
        return 0
    config = read_json(path)
    config = config.get("text_config") or config
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    if not (isinstance(layers, int) and isinstance(heads, int) and isinstance(width, int) and heads):
        return 0
    wanted = str(options.get("dtype", "auto"))
    stored = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = _DTYPES.get(stored if wanted == "auto" else wanted, "F32")
    shared = config.get("num_key_value_heads") or heads
    return 2 * layers * shared * (config.get("head_dim") or width // heads) * DTYPE_BYTES[dtype]


def _weights(folder: Path, dtype: str | None) -> int:
    headers = [one for file in sorted(folder.glob("*.safetensors")) for one in read_header(file).values()]
    if dtype is None:
        return sum(one.nbytes for one in headers)
    return sum(one.elements for one in headers) * DTYPE_BYTES[dtype]
