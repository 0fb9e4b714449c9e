"""What is measured: one recipe for every method, and the bars of DESIGN.md section 5."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench_support.checkpoints import DTYPES, Models, weights

DENSITY, GAMMA, EPSILON = 0.5, 0.01, 0.15
MEMORY_FLOOR, MEMORY_SETS = 600_000_000, 3
FLAT = 1.1  # a peak at full size over the peak at half of it
BOOKKEEPING = 10.0


@dataclass(frozen=True)
class Bars:
    """What a method has to reach.

    Args:
        copy: the engine alone takes at most so many times the copy of the same bytes.
        faster: the whole process is at least so many times faster than mergekit's.
    """

    copy: float | None = None
    faster: float | None = None


_STREAMED, _SPARSIFIED, _DRAWN = Bars(1.5, 5), Bars(4, 20), Bars(4, 10)
BARS = {
    "linear": _STREAMED,
    "slerp": _STREAMED,
    "passthrough": Bars(),
    "task_arithmetic": _STREAMED,
    "ties": _SPARSIFIED,
    "dare_linear": _DRAWN,
    "dare_ties": _DRAWN,
    "della": _SPARSIFIED,
    "della_linear": _SPARSIFIED,
    "breadcrumbs": _SPARSIFIED,
    "breadcrumbs_ties": _SPARSIFIED,
}


@dataclass(frozen=True)
class Case:
    """One merge.

    Args:
        inputs: the weight files it reads.
        data_bytes: the output's tensors, without headers.
        set_bytes: the largest tensor, in all inputs together.
    """

    method: str
    recipe: dict[str, Any]
    inputs: tuple[Path, ...]
    data_bytes: int
    set_bytes: int

    @property
    def output_bytes(self) -> int:
        return self.inputs[0].stat().st_size

    @property
    def input_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.inputs)

    @property
    def memory_bar(self) -> int:
        return MEMORY_FLOOR + MEMORY_SETS * self.set_bytes


def case_of(method: str, models: Models) -> Case:
    """The recipe of a method over all experts; slerp and passthrough take the first."""
    experts = models.experts[:1] if method in ("slerp", "passthrough") else models.experts
    recipe: dict[str, Any] = {"merge_method": method, "dtype": models.dtype}
    inputs = list(experts)
    if method not in ("linear", "passthrough"):
        recipe["base_model"] = str(models.base)
        inputs.insert(0, models.base)
    recipe["models"] = [_entry(method, path, number, len(experts)) for number, path in enumerate(experts)]
    if method == "slerp":
        recipe["parameters"] = {"t": 0.3}
    width = DTYPES[models.dtype][1]
    return Case(
        method,
        recipe,
        tuple(weights(folder) for folder in inputs),
        data_bytes=models.size.parameters * width,
        set_bytes=len(inputs) * models.size.largest * width,
    )


def _entry(method: str, path: Path, number: int, count: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"model": str(path)}
    parameters: dict[str, float] = {}
    if method not in ("slerp", "passthrough"):
        parameters["weight"] = round(1 / count + 0.02 * number, 3)
    if method.startswith(("ties", "dare", "della", "breadcrumbs")):
        parameters["density"] = DENSITY
    if method.startswith("breadcrumbs"):
        parameters["gamma"] = GAMMA
    if method.startswith("della"):
        parameters["epsilon"] = EPSILON
    return entry | ({"parameters": parameters} if parameters else {})
