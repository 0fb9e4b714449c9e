"""Which coefficients of a merge are free, where they start and what keeps them in bounds; and their picture."""

from __future__ import annotations

import fnmatch
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.errors import DependencyError, Fault, MethodError
from mixmerge.methods.coefficients import Coefficients

if TYPE_CHECKING:
    from torch import Tensor

Granularity = Literal["expert", "tensor", "chunk"]
Transform = Literal["identity", "sigmoid", "softmax"]
Clamp = Literal["project", "dead", "none"]
# The input of a softmax at equal shares: bounds from 0 to 1 are then as far on either side, as in FusionBench.
_MIDDLE = 0.5
Start = float | Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class CoefficientSpace:
    """The coefficients that are learned.

    Args:
        granularity: one for each ``expert``; for each ``tensor`` and expert; or for each ``chunk`` of a tensor
            and expert.
        transform: ``identity``: the coefficient itself is learned; ``sigmoid``: its logit is;
            ``softmax``: over the experts of a row, so the coefficients of a row are shares of one.
        start: where they start: one number, one for each expert, or by tensor one for each expert.
        low, high: bounds of ``identity``, and of the input of ``softmax``.
        clamp: ``project`` puts a coefficient that left the bounds back after the step. ``dead`` bounds it in
            the forward pass only, as AdaMerging's released code does: outside, its gradient is 0, and it
            never comes back. ``none``: no bounds.
        frozen: globs of tensors that keep the start.
        chunks: of each tensor, or by tensor; with granularity ``chunk``.
    """

    granularity: Granularity = "tensor"
    transform: Transform = "identity"
    start: Start = 0.3
    low: float = 0.0
    high: float = 1.0
    clamp: Clamp = "project"
    frozen: tuple[str, ...] = ()
    chunks: int | Mapping[str, int] = 1

    def layout(self, shapes: Mapping[str, tuple[int, ...]], experts: int) -> Layout:
        """Where in the vector of free coefficients each tensor's are.

        Args:
            shapes: of every tensor that is merged.
            experts: how many.

        Raises:
            MethodError: nothing is free, or a start is not possible under the transform.
        """
        rows: dict[str, tuple[int, ...]] = {}
        start: list[tuple[float, ...]] = []
        fixed: dict[str, tuple[float, ...]] = {}
        faults: list[Fault] = []
        for name, shape in shapes.items():
            values = self._start_of(name, experts)
            elements = math.prod(shape)
            if elements == 0 or any(fnmatch.fnmatchcase(name, glob) for glob in self.frozen):
                fixed[name] = values
                continue
            faults += self._start_faults(name, values)
            if self.granularity == "expert":
                rows[name] = (0,)
                if start and start[0] != values:
                    what = "starts elsewhere than other tensors, and an expert has one coefficient for all"
                    faults.append(Fault(name, what, run="Use granularity: layer, or one weight for all"))
                start = start or [values]
                continue
            count = 1 if self.granularity == "tensor" else self._chunks_of(name, elements)
            rows[name] = tuple(range(len(start), len(start) + count))
            start += [values] * count
        if not rows:
            faults.append(Fault("learn", "no tensor has coefficients that are learned"))
        if faults:
            raise MethodError(_once(faults))
        return Layout(rows, tuple(start), fixed)

    def _start_of(self, name: str, experts: int) -> tuple[float, ...]:
        given = self.start[name] if isinstance(self.start, Mapping) else self.start
        values = (float(given),) * experts if isinstance(given, int | float) else tuple(map(float, given))
        if len(values) != experts:
            raise MethodError(Fault("start", f"has {len(values)} numbers for {experts} experts"))
        return values

    def _chunks_of(self, name: str, elements: int) -> int:
        wanted = self.chunks.get(name, 1) if isinstance(self.chunks, Mapping) else self.chunks
        return max(1, min(int(wanted), elements))

    def _start_faults(self, name: str, values: tuple[float, ...]) -> list[Fault]:
        if self.transform == "sigmoid" and not all(0 < value < 1 for value in values):
            return [Fault(name, f"starts at {values}", "Under a sigmoid, coefficients are between 0 and 1")]
        if self.transform == "softmax":
            if len(values) < 2:
                what = "has one expert, whose share is always 1: there is nothing to learn"
                return [Fault(name, what, run="Use another transform, or more experts")]
            if not (all(value > 0 for value in values) and math.isclose(sum(values), 1.0, rel_tol=1e-6)):
                allowed = "Under a softmax, coefficients are shares above 0 that add up to 1"
                return [Fault(name, f"starts at {values}", allowed)]
        bounded = self.transform != "sigmoid" and self.clamp != "none"
        inputs = values if self.transform != "softmax" else tuple(self.free([values])[0].tolist())
        if bounded and not all(self.low <= value <= self.high for value in inputs):
            allowed = f"From {self.low:g} to {self.high:g}"
            said = f"starts at {values}, out of bounds"
            if self.transform == "softmax":
                shown = ", ".join(f"{value:.3g}" for value in inputs)
                said = f"starts at {values}, by inputs of the softmax ({shown}) that are out of bounds"
            return [Fault(name, said, allowed, "Or set clamp: none")]
        return []

    def free(self, start: Sequence[Sequence[float]]) -> Tensor:
        """What is learned, (R, T) in float64, from the coefficients of the start."""
        import torch

        values = torch.tensor(start, dtype=torch.float64)
        if self.transform == "sigmoid":
            values = torch.logit(values)
        if self.transform == "softmax":
            values = torch.log(values * values.shape[1]) + _MIDDLE
        return values

    def coefficients(self, free: Tensor) -> Tensor:
        """The coefficients, (R, T), of what is learned; gradients flow."""
        import torch

        if self.transform == "sigmoid":
            return torch.sigmoid(free)
        bounded = free.clamp(self.low, self.high) if self.clamp == "dead" else free
        return torch.softmax(bounded, -1) if self.transform == "softmax" else bounded

    def project(self, free: Tensor) -> None:
        """Put what left the bounds back, in place."""
        if self.transform != "sigmoid" and self.clamp == "project":
            free.clamp_(self.low, self.high)


def _once(faults: Sequence[Fault]) -> list[Fault]:
    """Faults that say the same of several tensors as one, which names the first of them."""
    names: dict[Fault, list[str]] = {}
    for fault in faults:
        names.setdefault(replace(fault, where=""), []).append(fault.where)
    return [
        replace(fault, where=first[0] if len(first) == 1 else f"{first[0]} and {len(first) - 1} more tensors")
        for fault, first in names.items()
    ]


@dataclass(frozen=True)
class Layout:
    """Rows of the matrix of free coefficients: by tensor, one for each of its chunks, or of its directions.

    Args:
        rows: by tensor; the tensors of one coefficient for each expert share row 0.
        start: coefficients of each row at the start, one for each expert; of a direction one for all.
        fixed: tensors that are not learned, with their coefficients.
        nuclear: of tensors whose rows are directions, the sum of their singular values.
    """

    rows: Mapping[str, tuple[int, ...]]
    start: tuple[tuple[float, ...], ...]
    fixed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    nuclear: Mapping[str, float] = field(default_factory=dict)

    def weights(self, values: Sequence[Sequence[float]]) -> dict[str, tuple[tuple[float, ...], ...]]:
        """Coefficients by tensor, chunk and expert, from one of each row."""
        found = {name: tuple(tuple(values[row]) for row in rows) for name, rows in self.rows.items()}
        return {**found, **{name: (fixed,) for name, fixed in self.fixed.items()}}


_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.+)$")
_COLUMNS = 24


def place(name: str) -> tuple[int | None, str]:
    """(layer, kind) of a tensor: ``model.layers.3.mlp.up_proj.weight`` is (3, ``up_proj``)."""
    found = _LAYER.search(name)
    inner = found[2] if found else name
    parts = [part for part in inner.split(".") if part not in ("weight", "self")]
    return (int(found[1]) if found else None), ".".join(parts[-2:] if parts[-1:] == ["bias"] else parts[-1:])


def heat_map(coefficients: Coefficients, *, title: str = "") -> bytes:
    """A PNG: a panel for each expert, a row for each layer, a column for each kind of tensor.

    A cell is the mean over a tensor's chunks or directions, and over what shares layer and kind. Cells of tensors that
    were not learned are hatched. Factors of directions are the same for all experts: there is one panel.

    Raises:
        DependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        run = "pip install 'mixmerge[plot]'"
        raise DependencyError(Fault("heat map", "matplotlib is not installed", run=run)) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells, kinds, layers = _cells(coefficients)
    panels = ("all experts",) if coefficients.shared else tuple(map(_short, coefficients.experts))
    count = len(panels)
    learned = [value for rows in coefficients.weights.values() for row in rows for value in row]
    if coefficients.shared:  # thousands of a tensor, whose extremes no mean is near
        learned = [value for means, _ in cells.values() for value in means]
    low, high = min(learned), max(learned)
    width = min(2.2 + 0.32 * len(kinds), 9.0)
    down = -(-count // max(1, min(count, int(18 // width))))
    across = -(-count // down)
    height = 1.9 + 0.24 * len(layers)
    figure = Figure(figsize=(width * across + 1.2, height * down + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False)
    shown: Any = None
    for number, axis in enumerate(axes.flat):
        if number >= count:
            axis.set_axis_off()
            continue
        shown = _panel(axis, cells, kinds, layers, number, (low, high if high > low else low + 1e-6))
        axis.set_title(panels[number], fontsize=9)
    figure.colorbar(shown, ax=axes, label="mean factor" if coefficients.shared else "coefficient", shrink=0.5)
    what = "factors by layer" if coefficients.shared else "coefficients by layer and expert"
    figure.suptitle(title or f"{coefficients.method}: {what}", fontsize=10)
    buffer = io.BytesIO()
    with matplotlib.rc_context({"hatch.linewidth": 0.4}):
        figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _short(expert: str) -> str:
    return expert.rstrip("/").split("/")[-1]


def _cells(
    coefficients: Coefficients,
) -> tuple[dict[tuple[int | None, str], tuple[list[float], bool]], list[str], list[int | None]]:
    """Mean coefficients by (layer, kind), whether any was learned; kinds as they appear, layers in order."""
    sums: dict[tuple[int | None, str], tuple[list[list[float]], bool]] = {}
    frozen = set(coefficients.frozen)
    kinds: list[str] = []
    often: dict[str, int] = {}
    for name in coefficients.weights:
        often[place(name)[1]] = often.get(place(name)[1], 0) + 1
    for name, rows in coefficients.weights.items():
        layer, kind = place(name)
        if kind not in kinds and len(often) > _COLUMNS and often[kind] < 2:
            kind = "other"
        if kind not in kinds:
            kinds.append(kind)
        known, learned = sums.get((layer, kind), ([], False))
        sums[layer, kind] = [*known, *map(list, rows)], learned or name not in frozen
    layers: list[int | None] = [*sorted({layer for layer, _ in sums if layer is not None})]
    if any(layer is None for layer, _ in sums):
        layers.append(None)
    kinds = [kind for kind in kinds if kind != "other"] + (["other"] if "other" in kinds else [])
    means = {
        key: ([sum(column) / len(rows) for column in zip(*rows, strict=True)], learned)
        for key, (rows, learned) in sums.items()
    }
    return means, kinds, layers


def _panel(
    axis: Any,
    cells: Mapping[tuple[int | None, str], tuple[list[float], bool]],
    kinds: list[str],
    layers: list[int | None],
    expert: int,
    limits: tuple[float, float],
) -> Any:
    from matplotlib.patches import Rectangle

    grid = [[math.nan] * len(kinds) for _ in layers]
    for y, layer in enumerate(layers):
        for x, kind in enumerate(kinds):
            values, learned = cells.get((layer, kind), ([], True))
            if values:
                grid[y][x] = values[expert]
            if values and not learned:
                box = Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, hatch="////", edgecolor="grey", lw=0)
                axis.add_patch(box)
    shown = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
    axis.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", rotation_mode="anchor", fontsize=6)
    axis.set_yticks(range(len(layers)), ["-" if one is None else str(one) for one in layers], fontsize=6)
    axis.set_ylabel("layer", fontsize=7)
    return shown
