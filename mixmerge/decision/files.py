"""A policy beside its router: ``policy.json`` in the router's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mixmerge.decision.calibration import Calibrated
from mixmerge.decision.parsing import parse_json
from mixmerge.decision.policies import Policy
from mixmerge.decision.whole import write_whole
from mixmerge.errors import Fault, MixmergeError, OutputError
from mixmerge.registry import choices

FILE, FORMAT, VERSION = "policy.json", "mixmerge-policy", 1
_KEYS = ("format", "version", "router", "policy", "calibration")
_AGAIN = "Write it again: mixmerge route calibrate"


def write_policy(given: Policy | Calibrated, folder: str | Path, *, router: str = "") -> Path:
    """Write ``policy.json`` into a folder that exists, whole or not at all; one that is there is replaced.

    Args:
        given: a policy, or one with what its calibration found.
        folder: of the router.
        router: the router's version, to refuse the policy beside another one; "" if any will do.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(folder) / FILE
    calibration = None if isinstance(given, Policy) else given
    policy = given if isinstance(given, Policy) else given.policy
    card = {
        "format": FORMAT,
        "version": VERSION,
        "router": router,
        "policy": policy.as_dict(),
        "calibration": None
        if calibration is None
        else calibration.model_dump(mode="json", exclude={"policy"}, exclude_none=True),
    }
    if not path.parent.is_dir():
        raise OutputError(Fault(str(path.parent), "is no folder", "That of a router"))
    text = json.dumps(card, ensure_ascii=False, allow_nan=False, indent=1)
    write_whole(path, [text.encode("utf-8")], overwrite=True)
    return path


def read_policy(folder: str | Path, *, router: str = "") -> Policy:
    """The policy in a router's folder.

    Args:
        folder: of the router.
        router: the router's version; a policy that was written for another one is refused.

    Raises:
        MixmergeError: there is none, it is damaged, of another version or router, or no such policy can be.
    """
    return _read(Path(folder) / FILE, router)[0]


def read_calibration(folder: str | Path, *, router: str = "") -> Calibrated | None:
    """The policy with what its calibration found; None if it was written without.

    Raises:
        MixmergeError: as ``read_policy``.
    """
    return _read(Path(folder) / FILE, router)[1]


def _read(path: Path, router: str) -> tuple[Policy, Calibrated | None]:
    card = _card(path)
    unknown = [name for name in card if name not in _KEYS]
    if unknown:
        raise MixmergeError(
            Fault(str(path), f"unknown key {name!r}", choices(name, list(_KEYS))) for name in unknown
        )
    if router and card.get("router") not in ("", router):
        what = f"is of router {card.get('router')!r}, and this is {router!r}"
        raise MixmergeError(Fault(str(path), what, run="Calibrate again: mixmerge route calibrate"))
    try:
        policy = Policy.model_validate(card.get("policy"))
        found = card.get("calibration")
        if found is None:
            return policy, None
        if not isinstance(found, dict):
            raise MixmergeError(Fault("calibration", f"is {found!r:.60}", "A mapping, or null"))
        return policy, Calibrated.model_validate({**found, "policy": policy})
    except MixmergeError as error:
        faults = [Fault(f"{path}: {one.where}", one.what, one.allowed, one.run) for one in error.faults]
        raise MixmergeError(faults) from error
    except ValidationError as error:
        raise MixmergeError(
            Fault(f"{path}: {'.'.join(map(str, one['loc']))}", one["msg"], run=_AGAIN)
            for one in error.errors()
        ) from error


def _card(path: Path) -> dict[str, Any]:
    try:
        card = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MixmergeError(
            Fault(str(path), "is not there: the router has no policy of its own", run=_AGAIN)
        ) from error
    except (OSError, ValueError) as error:
        raise MixmergeError(Fault(str(path), f"cannot be read: {error}", run=_AGAIN)) from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise MixmergeError(Fault(str(path), "is no policy", f"format: {FORMAT}"))
    if card.get("version") != VERSION:
        what = f"is of version {card.get('version')}"
        raise MixmergeError(Fault(str(path), what, f"This mixmerge reads version {VERSION}", _AGAIN))
    return card
