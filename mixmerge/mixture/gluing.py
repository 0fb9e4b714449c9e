"""Fitting what a mixture needs: its router, or what makes one whole of its experts."""

from __future__ import annotations

from pathlib import Path

from mixmerge.mixture.fitting import outcomes_of, unfitted
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.mixture.wholes import Fitted, Fitting, Progress, whole_of
from mixmerge.mixture.wiring import Mixture


def fit(
    spec: MixtureSpec,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Fitted:
    """Fit what a mixture needs and write it as one folder, whole or not at all.

    Args:
        spec: what its YAML says.
        out: the folder to make; ``Mixture.load`` takes it.
        overwrite: replace a fitted mixture that is there.
        device: a torch device, on which the base of a network runs where the gate learns with it.
        progress: told how far it is.

    Raises:
        OutputError: the folder exists, or cannot be written.
        MixmergeError: all that is wrong with experts, base or data: adapters of other bases, factors that are not
            finite, what cannot be part of a bank, rows that are missing; a mixture that is fitted already.
    """
    whole = whole_of(spec.compose.kind)
    if whole is not None:
        return whole.fit(spec, Path(out), Fitting(overwrite, device, progress or _silent))
    if spec.routed.folder is not None:
        mixture = Mixture.load(spec)
    else:
        mixture = Mixture.of(spec, unfitted(spec).fit(outcomes_of(spec), progress=progress))
    mixture.save(out, overwrite=overwrite)
    router = mixture.routing
    queries = 0 if router.trained_on is None else len(router.trained_on.hashes)
    return Fitted(Path(out), "router", router.kind, router.experts, {"queries": queries})


def _silent(what: str, done: int, steps: int, note: str = "", /) -> None:
    """Says nothing."""
