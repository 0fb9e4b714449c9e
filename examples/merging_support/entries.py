"""Every method of the table as data: what it is called, its recipe, and what FusionBench is asked for beside it.

Settings are the ones their papers (or FusionBench's configurations) publish, and the same on both sides of a
comparison. Where ``sweep`` names a parameter, its value is the one best on validation, and the test split is scored
with that one only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

SEEDS = (0, 1, 2)  # of calibration, for methods that draw or learn
EMBEDDINGS = "embeddings"
Data = Literal["", "train", "validation", "test"]  # "test" is transductive: its texts, never its labels


@dataclass(frozen=True)
class Entry:
    """One row of the table.

    Args:
        name: of the row, and of its files.
        method: of the recipe.
        family: for the eye: groups rows.
        each: parameters of every model of the recipe.
        top: parameters of the merge.
        sweep: (parameter, values to try on validation); looked up among ``top`` and, for ``weight``, among ``each``.
        data: which split's rows calibrate it; none: it needs none.
        examples: calibration rows of each expert.
        calibration: more keys of the recipe's calibration block.
        seeds: it draws or learns, so it is run three times.
        per_task: its result is one trunk for each task; ``top`` gets this parameter with the expert's number.
        against: (FusionBench's method, its settings).
        suites: where it is run.
    """

    name: str
    method: str
    family: str
    each: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    sweep: tuple[str, tuple[float, ...]] | None = None
    data: Data = ""
    examples: int = 256
    calibration: dict[str, Any] = field(default_factory=dict)
    seeds: bool = False
    per_task: str = ""
    against: tuple[str, dict[str, Any]] | None = None
    suites: tuple[str, ...] = ("encoders", "generative")

    def recipe(
        self,
        base: str,
        experts: dict[str, str],
        *,
        rows: dict[str, str],
        dtype: str,
        seed: int,
        value: float | None,
    ) -> dict[str, Any]:
        """The recipe over these experts (task: folder).

        Args:
            rows: task to its JSONL file of calibration rows.
            value: of the parameter that ``sweep`` names.
        """
        each, top = dict(self.each), dict(self.top)
        if self.sweep and value is not None:
            (each if self.sweep[0] in each else top)[self.sweep[0]] = value
        models = [{"model": folder, **({"parameters": each} if each else {})} for folder in experts.values()]
        made: dict[str, Any] = {"merge_method": self.method}
        if self.method != "linear":
            made["base_model"] = base
        made |= {"models": models, **({"parameters": top} if top else {}), "dtype": dtype, "seed": seed}
        if self.data:
            per_expert = {folder: rows[task] for task, folder in experts.items()}
            made["calibration"] = {
                "per_expert": per_expert,
                "max_examples": self.examples,
                **self.calibration,
            }
            if self.data == "test":
                made["calibration"]["transductive"] = True
        return made


_LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.7)
_ONE = {"weight": 1.0}
_FISHER = {
    "normalize_fisher_weight": True,
    "minimal_fisher_weight": 1e-6,
    "num_fisher_examples": 256,
    "batch_size": 32,
}
_TIES = {"merge_func": "sum", "threshold": 20, "scaling_factor": 0.3}

ENTRIES = (
    Entry("average", "linear", "entry by entry", each=_ONE),
    Entry(
        "task arithmetic, 0.3",
        "task_arithmetic",
        "entry by entry",
        each={"weight": 0.3},
        against=("task_arithmetic", {"scaling_factor": 0.3}),
    ),
    Entry("task arithmetic", "task_arithmetic", "entry by entry", each=_ONE, sweep=("weight", _LAMBDAS)),
    Entry(
        "TIES, sum, 0.3",
        "ties",
        "entry by entry",
        each={"weight": 1.0, "density": 0.2},
        top={"lambda": 0.3, "scope": "model", "normalize": False},
        against=("ties", _TIES),
    ),
    Entry(
        "TIES, mean",
        "ties",
        "entry by entry",
        each={"weight": 1.0, "density": 0.2},
        top={"scope": "model"},
        sweep=("lambda", (0.7, 1.0, 1.5, 2.0)),
    ),
    Entry(
        "DARE",
        "dare_linear",
        "entry by entry",
        each={"weight": 1.0, "density": 0.5},
        sweep=("weight", (0.2, 0.3, 0.4)),
        seeds=True,
    ),
    Entry(
        "DARE-TIES",
        "dare_ties",
        "entry by entry",
        each={"weight": 1.0, "density": 0.5},
        sweep=("weight", (0.2, 0.3, 0.4)),
        seeds=True,
    ),
    Entry(
        "Breadcrumbs",
        "breadcrumbs",
        "entry by entry",
        each={"weight": 1.0, "density": 0.85, "gamma": 0.01},
        sweep=("weight", (0.2, 0.3, 0.4)),
    ),
    Entry(
        "DELLA",
        "della",
        "entry by entry",
        each={"weight": 1.0, "density": 0.5, "epsilon": 0.15},
        sweep=("lambda", (0.7, 1.0, 1.5)),
        seeds=True,
    ),
)


def available(suite: str) -> tuple[Entry, ...]:
    """Entries of a suite whose method this mixmerge has."""
    from mixmerge.methods import METHODS

    return tuple(entry for entry in ENTRIES if suite in entry.suites and entry.method in METHODS)
