"""Figures as PNG images. No display and no global state of matplotlib is used."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

from mixmerge.errors import DependencyError, Fault

# Paul Tol's bright scheme, told apart by most kinds of colour-blind eyes, then darker ones.
COLOURS = (
    *("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377"),
    *("#332288", "#882255", "#117733", "#999933", "#44AA99", "#661100"),
)
GREY, DARK = "#888888", "#333333"
_DPI = 130
_NAME = 44  # characters of a name that are shown


def shown_name(name: str) -> str:
    """A name as text for matplotlib: no formulas, no control characters, not hidden from legends, not too long."""
    plain = "".join(c if c.isprintable() else " " for c in name).strip() or "(no name)"
    short = plain if len(plain) <= _NAME else f"{plain[: _NAME - 12]}...{plain[-9:]}"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")


def colours_of(number: int) -> Sequence[str]:
    """So many colours; after twelve they begin again."""
    return [COLOURS[i % len(COLOURS)] for i in range(number)]


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches and its axes.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    figure, axes = new_panels(width, height, 1, 1)
    return figure, axes[0]


def new_panels(width: float, height: float, rows: int, columns: int) -> tuple[Any, list[Any]]:
    """A figure and all its axes, row by row.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError(
            Fault("plots", "need matplotlib", run="Run: pip install 'mixmerge[plot]'")
        ) from error
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8.5)
    return figure, grid


def check_plots() -> None:
    """Whether plots can be drawn: before hours are spent on what they show.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    new_figure(1, 1)


def as_png(figure: Any) -> bytes:
    """The figure as a PNG image."""
    image = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # the name is in the text of the page too
        figure.savefig(image, format="png", bbox_inches="tight", metadata={"Software": None})
    return image.getvalue()
