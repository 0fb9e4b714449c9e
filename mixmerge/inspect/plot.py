"""A comparison as a picture: how far every expert moved every layer, and how alike their deltas are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import DependencyError, Fault, OutputError
from mixmerge.inspect.comparison import Comparison
from mixmerge.inspect.names import short_names

Grid = NDArray[np.float64]

# Beyond these, numbers in the cells and a name at every row can no longer be read.
_MOST_NUMBERS = 400
_MOST_ROWS = 130
# A wider range of norms is shown on a logarithmic scale.
_LINEAR_RANGE = 30


def check_png(path: Path) -> None:
    """Refuse, before any weight is read, what ``save_png`` could not do.

    Raises:
        OutputError: not called .png, or no such folder.
        DependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png":
        raise OutputError(Fault(str(path), "is not called .png", "Only PNG is written"))
    if not path.parent.is_dir():
        raise OutputError(Fault(str(path.parent), "no such folder"))
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise DependencyError(
            Fault("--png", "needs matplotlib, which is not installed", run="pip install 'mixmerge[plot]'")
        ) from error


def save_png(comparison: Comparison, path: Path) -> None:
    """Write the heat maps: rows x experts of |delta| / |base|, and experts x experts of cosines.

    Raises:
        OutputError, DependencyError: as ``check_png``; or the disk refused.
    """
    check_png(path)
    from matplotlib.figure import Figure

    experts = short_names(comparison.experts)
    rows, columns = len(comparison.rows), len(experts)
    height = max(3.6, 1.6 + 0.24 * min(rows, _MOST_ROWS), 1.2 + 0.62 * columns)
    widths = [1.0 + 0.8 * columns, max(2.6, 0.8 * columns)]
    pairs = columns > 1
    # Names of rows and experts take about this much on the left of each map.
    margins = 0.085 * max(len(row.name) for row in comparison.rows), 0.085 * max(map(len, experts))
    width = margins[0] + widths[0] + 1.4 + (margins[1] + widths[1] + 1.4 if pairs else 0)
    figure = Figure(figsize=(max(width, 5.0), height), layout="constrained")
    axes = figure.subplots(1, 1 + pairs, squeeze=False, width_ratios=widths[: 1 + pairs])[0]
    _norms(figure, axes[0], comparison, experts)
    if pairs:
        _cosines(axes[1], comparison, experts)
    figure.suptitle(_plain(f"deltas to {short_names([comparison.base])[0]}"))
    try:
        figure.savefig(path, format="png", dpi=130)
    except OSError as error:
        raise OutputError(Fault(str(path), f"cannot be written: {error.strerror}")) from error


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # else matplotlib reads mathematics


def _norms(figure: Any, axes: Any, comparison: Comparison, experts: list[str]) -> None:
    from matplotlib.colors import LogNorm, Normalize

    grid = 100 * np.array([row.relative for row in comparison.rows], np.float64)  # None becomes NaN
    seen = grid[np.isfinite(grid) & (grid > 0)]
    low, high = (seen.min(), seen.max()) if seen.size else (1.0, 1.0)
    wide = high > _LINEAR_RANGE * low
    scale = LogNorm(low, high) if wide else Normalize(0, high)
    shown = np.where(grid > 0, grid, np.nan) if wide else grid
    image = _map(axes, shown, scale=scale, colours="viridis", columns=experts)
    names = [row.name for row in comparison.rows]
    step = -(-len(names) // _MOST_ROWS)
    axes.set_yticks(range(0, len(names), step), [_plain(name) for name in names[::step]], fontsize=8)
    axes.set_title("|delta| / |base|, %", fontsize=10)
    _numbers(axes, grid, scale, "viridis", "{:.2g}")
    figure.colorbar(image, ax=axes, fraction=0.06, pad=0.03, format="%g", aspect=30)


def _cosines(axes: Any, comparison: Comparison, experts: list[str]) -> None:
    from matplotlib.colors import Normalize

    grid = np.array(comparison.total.cosines, np.float64)
    scale = Normalize(-1, 1)
    _map(axes, grid, scale=scale, colours="RdBu_r", columns=experts)
    axes.set_yticks(range(len(experts)), [_plain(name) for name in experts], fontsize=8)
    axes.set_aspect("equal", anchor="N")
    axes.set_title("cosine of deltas (red 1, white 0, blue -1)", fontsize=10)
    _numbers(axes, grid, scale, "RdBu_r", "{:.2f}")


def _map(axes: Any, grid: Grid, *, scale: Any, colours: str, columns: list[str]) -> Any:
    image = axes.imshow(grid, aspect="auto", norm=scale, cmap=colours, interpolation="nearest")
    axes.set_facecolor("0.8")  # where there is no value
    labels = [_plain(column) for column in columns]
    slanted = max(map(len, columns)) > 8
    axes.set_xticks(
        range(len(columns)), labels, rotation=35 if slanted else 0, ha="right" if slanted else "center", fontsize=8
    )  # fmt: skip
    return image


def _numbers(axes: Any, grid: Grid, scale: Any, colours: str, form: str) -> None:
    from matplotlib import colormaps

    if grid.size > _MOST_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(grid):
        if not np.isfinite(value):
            text, dark = "-", False
        else:
            text = form.format(value).replace("-0.00", "0.00")
            red, green, blue = (
                colormaps[colours](scale(value))[:3] if value > 0 or scale.vmin <= 0 else (1, 1, 1)
            )
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        ink = "white" if dark else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
