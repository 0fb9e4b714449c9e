"""A fitted mixture as one folder: the router's files, its policy, and a YAML that names the experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.bank.mask_files import has_masks
from mixmerge.decision.files import FILE as POLICY
from mixmerge.decision.files import read_calibration, write_policy
from mixmerge.dynamic.folders import MIXTURE, is_dynamic
from mixmerge.errors import Fault, MixmergeError
from mixmerge.mixture.gated import AdaptersOptions
from mixmerge.mixture.reading import read
from mixmerge.mixture.schema import ExpertSpec, MixtureSpec
from mixmerge.mixture.wholes import is_marked, whole_of
from mixmerge.routers.storage import CARD, replacing, write

if TYPE_CHECKING:
    from mixmerge.mixture.wiring import Mixture

FILE = MIXTURE
HERE = "."  # as a router's or a network's folder: the one that the YAML lies in
_ALLOWED = f"A mixture YAML, or a folder with {FILE} and what was fitted"
_FIT = "Make one: mixmerge fit MIXTURE.yaml FOLDER"


def is_fitted(folder: str | Path) -> bool:
    """Whether ``save`` or a fit of a whole wrote the folder, as far as names of files tell."""
    place = Path(folder)
    return (place / FILE).is_file() and ((place / CARD).is_file() or is_marked(place))


def owned_in(out: Path) -> list[str]:
    """Files by which a folder is known as a mixture that was fitted, and may be replaced.

    A YAML of this name alone, beside whatever else, is a person's own.
    """
    return [FILE if is_fitted(out) else f"{FILE} with what was fitted"]


def spec_of(source: str | Path | Mapping[str, Any]) -> MixtureSpec:
    """What a YAML, a mapping of its shape or a fitted mixture's folder says.

    Raises:
        MixmergeError: every fault of the YAML; or a folder that is no fitted mixture.
    """
    if isinstance(source, Mapping):
        return read(source).require()
    folder = _folder(source)
    if folder is not None and not is_fitted(folder):
        what = "is no mixture"
        if is_dynamic(folder):
            what = "is a model with a bank: an expert, and no mixture"
        if (folder / CARD).is_file():
            what = "is a router alone: it does not say what its experts are"
        raise MixmergeError(Fault(str(folder), what, _ALLOWED, _FIT))
    spec = read(source if folder is None else folder / FILE).require()
    beside = Path(source).parent if folder is None else folder
    if (folder is not None or Path(source).name == FILE) and is_fitted(beside):
        return _at_home(spec, beside)
    return spec


def _at_home(spec: MixtureSpec, folder: Path) -> MixtureSpec:
    """What was fitted is in this folder, where the YAML says that it lies beside it."""
    if spec.router is not None and spec.router.folder == HERE:
        spec = spec.model_copy(update={"router": spec.router.model_copy(update={"folder": str(folder)})})
    if whole_of(spec.compose.kind) is not None and spec.compose.options.get("folder") == HERE:
        options = {**spec.compose.options, "folder": str(folder)}
        spec = spec.model_copy(update={"compose": spec.compose.model_copy(update={"options": options})})
    return spec


def _folder(source: str | Path) -> Path | None:
    try:
        return Path(source) if Path(source).is_dir() else None
    except (OSError, ValueError):  # no name of a file; reading it says so
        return None


def save(mixture: Mixture, folder: Path, *, overwrite: bool) -> None:
    """Write a mixture's folder, whole or not at all; ``Mixture.save`` says what is in it."""
    with replacing(folder, overwrite=overwrite) as new:
        save_router(mixture, new)
        (new / FILE).write_text(_yaml(mixture.spec), encoding="utf-8")


def save_router(mixture: Mixture, folder: Path) -> None:
    """Write a mixture's router, and its policy if it has one of its own, into a folder that is being made."""
    router, spec, beside = mixture.routing, mixture.spec, mixture.spec.routed.folder
    version = write(router, folder)
    if spec.policy is not None:
        write_policy(spec.policy, folder, router=version)
    elif beside is not None and (Path(beside) / POLICY).is_file():
        found = read_calibration(beside, router=router.version)
        write_policy(found or mixture.policy, folder, router=version)


def save_network(spec: MixtureSpec, folder: Path, *, base: str) -> None:
    """The YAML of a network whose bank and gate are in the folder already: its experts are named, and what it runs in.

    Args:
        spec: that was fitted.
        folder: to write into.
        base: of all experts, as the mixture names it.
    """
    (folder / FILE).write_text(_dumped(network_of_yaml(spec, base=base)), encoding="utf-8")


def network_of_yaml(spec: MixtureSpec, *, base: str | None = None) -> dict[str, Any]:
    """The keys of a fitted network's YAML, in its folder; ``base`` as for ``save_network``, or what is said."""
    asked = AdaptersOptions.model_validate(spec.compose.options)
    places = {"base": base or asked.base, "encoder": asked.encoder}
    compose: dict[str, Any] = {key: anchored(value) for key, value in places.items() if value}
    if asked.dtype != "auto":
        compose["dtype"] = asked.dtype
    return whole_of_yaml(spec, compose)


def save_whole(spec: MixtureSpec, folder: Path, compose: Mapping[str, Any]) -> None:
    """The YAML of a whole that was fitted into a folder: its experts are named.

    Args:
        spec: that was fitted; a router of its own is in the folder too, if it has one.
        folder: to write into.
        compose: its options, but for kind and folder.
    """
    (folder / FILE).write_text(_dumped(whole_of_yaml(spec, compose)), encoding="utf-8")


def whole_of_yaml(spec: MixtureSpec, compose: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that ``save_whole`` writes."""
    data: dict[str, Any] = {"experts": _experts(spec)}
    if spec.router is not None:
        data["router"] = {"folder": HERE}
    data["compose"] = {"kind": spec.compose.kind, "folder": HERE, **compose}
    generate = spec.generate.model_dump(mode="json", exclude_defaults=True)
    if generate:
        data["generate"] = generate
    return data


def _experts(spec: MixtureSpec) -> dict[str, Any]:
    return {name: _anchored(expert) for name, expert in spec.experts.items()}


def _dumped(data: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True)
    return text


def _yaml(spec: MixtureSpec) -> str:
    """The policy is not in it: it lies beside, where calibration changes it."""
    rest = spec.model_dump(
        mode="json", exclude_none=True, exclude_defaults=True, include={"compose", "generate"}
    )
    if "compose" in rest:
        rest["compose"] = {"kind": spec.compose.kind, **spec.compose.options}
    return _dumped(
        {
            "experts": _experts(spec),
            "router": {"folder": HERE},
            **{name: section for name, section in rest.items() if section},
        }
    )


def _anchored(expert: ExpertSpec) -> dict[str, Any]:
    """Keys of an expert, with paths that hold from any folder."""
    given = expert.model_dump(mode="json", exclude_none=True)
    task = expert.adapter is not None and has_masks(str(expert.base))  # a name, no place
    local = () if expert.endpoint is not None else ("model", "base") if task else ("model", "adapter", "base")
    return {name: anchored(value) if name in local else value for name, value in given.items()}


def anchored(path: str) -> str:
    """A local path from the root of the file system; a hub id as it is."""
    try:
        local = path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()
        return str(Path(path).expanduser().absolute()) if local else path
    except (OSError, RuntimeError):  # a name that is too long; ~ of a user who does not exist
        return path
