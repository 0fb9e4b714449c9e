"""Every method of the table as data: what it is called, its recipe, and what FusionBench is asked for beside it.

Settings are the ones their papers (or FusionBench's configurations) publish, and the same on both sides of a
comparison. Where ``sweep`` names a parameter, its value is the one best on validation, and the test split is scored
with that one only.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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
        each: parameters of every model of the recipe.
        top: parameters of the merge.
        sweep: (parameter, values to try on validation); looked up among ``top`` and, for ``weight``, among ``each``.
        data: which split's rows calibrate it; none: it needs none.
        examples: calibration rows of each expert.
        calibration: more keys of the recipe's calibration block.
        generators: keys of that block that are other for generators.
        seeds: it draws or learns, so it is run three times.
        per_task: its result is one trunk for each task; ``top`` gets this parameter with the expert's number.
        parts: of an entry with ``per_task``: what it makes of each expert is merged in the experts' place.
        search: what a search may change, as in a space of ``mixmerge search``; starts from the recipe.
        against: (FusionBench's method, its settings).
        suites: where it is run.
    """

    name: str
    method: str
    each: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    sweep: tuple[str, tuple[float, ...]] | None = None
    data: Data = ""
    examples: int = 256
    calibration: dict[str, Any] = field(default_factory=dict)
    generators: dict[str, Any] = field(default_factory=dict)
    seeds: bool = False
    per_task: str = ""
    parts: Entry | None = None
    search: dict[str, Any] = field(default_factory=dict)
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
        generators: bool = False,
    ) -> dict[str, Any]:
        """The recipe over these experts (task: folder).

        Args:
            generators: whether they are.
            rows: task to its JSONL file of calibration rows.
            value: of the parameter that ``sweep`` names.
        """
        from mixmerge.methods import METHODS

        each, top = dict(self.each), dict(self.top)
        if self.sweep and value is not None:
            (each if self.sweep[0] in each else top)[self.sweep[0]] = value
        models = [{"model": folder, **({"parameters": each} if each else {})} for folder in experts.values()]
        made: dict[str, Any] = {"merge_method": self.method}
        if METHODS[self.method].base == "required":  # elsewhere a base would be one more expert
            made["base_model"] = base
        made |= {"models": models, **({"parameters": top} if top else {}), "dtype": dtype, "seed": seed}
        if self.data:
            per_expert = {folder: rows[task] for task, folder in experts.items()}
            made["calibration"] = {
                "per_expert": per_expert,
                "max_examples": self.examples,
                **self.calibration,
                **(self.generators if generators else {}),
            }
            if self.data == "test":
                made["calibration"]["transductive"] = True
        return made


_LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.7)
_ONE = {"weight": 1.0}
_HALF = {"weight": 1.0, "density": 0.5}
_FIFTH = {"weight": 1.0, "density": 0.2}
_FISHER = {
    "normalize_fisher_weight": True,
    "minimal_fisher_weight": 1e-6,
    "num_fisher_examples": 256,
    "batch_size": 32,
}
_REGMEAN = {"num_regmean_examples": 256, "reduce_non_diagonal_ratio": 0.9, "batch_size": 32}
_TIES = {"merge_func": "sum", "threshold": 20, "scaling_factor": 0.3}
# Without embeddings, which are averaged: as ours, and FusionBench's WUDI would want a matrix of words by words.
_NO_TABLES = {"exclude_embeddings": True}
_ADA = {"max_steps": 300, "lr": 1e-3, "init_values": 0.3, "batch_size": 8}
_STEPS = {"steps": 300, "rows": 8, "learning_rate": 1e-3, "clamp": "none"}
_HALF_FLOATS = {"precision": "bfloat16"}  # of the passes, which take half as long then
_FREE = {"transform": "none", "weight": 0.3, "from_layer": 0, "average_attention": False}
_SHORT = {"max_tokens": 48, "batch_size": 8}
_WHOLE = {"max_tokens": 128}  # a question, its answer and the template around them


def _adamerging(name: str, data: Data, *, method: str = "adamerging", granularity: str = "layer") -> Entry:
    beside = method == "adamerging" and granularity == "layer" and data == "validation"
    precision = {} if beside else _HALF_FLOATS  # FusionBench's is float32
    return Entry(
        name,
        method,
        each={"weight": 0.3},
        top={**_STEPS, **precision, "granularity": granularity},
        data=data,
        examples=600 if data == "test" else 300,
        calibration=_SHORT,
        seeds=True,
        against=("adamerging", _ADA) if beside else None,
        suites=("encoders",),  # a language model has no classes whose entropy could fall
    )


def _entry_by_entry() -> tuple[Entry, ...]:
    weights = ("weight", (0.2, 0.3, 0.4))
    return (
        Entry("average", "linear", each=_ONE),
        Entry(
            "task arithmetic, 0.3",
            "task_arithmetic",
            each={"weight": 0.3},
            against=("task_arithmetic", {"scaling_factor": 0.3}),
        ),
        Entry("task arithmetic", "task_arithmetic", each=_ONE, sweep=("weight", _LAMBDAS)),
        Entry(
            "TIES, sum, 0.3",
            "ties",
            each=_FIFTH,
            top={"lambda": 0.3, "scope": "model", "normalize": False},
            against=("ties", _TIES),
        ),
        Entry(
            "TIES, mean", "ties", each=_FIFTH, top={"scope": "model"}, sweep=("lambda", (0.7, 1.0, 1.5, 2.0))
        ),
        Entry("DARE", "dare_linear", each=_HALF, sweep=weights, seeds=True),
        Entry("DARE-TIES", "dare_ties", each=_HALF, sweep=weights, seeds=True),
        Entry(
            "Breadcrumbs", "breadcrumbs", each={"weight": 1.0, "density": 0.85, "gamma": 0.01}, sweep=weights
        ),
        Entry(
            "DELLA", "della", each={**_HALF, "epsilon": 0.15}, sweep=("lambda", (0.7, 1.0, 1.5)), seeds=True
        ),
    )


def _without_data() -> tuple[Entry, ...]:
    scales = ("lambda", (0.7, 1.0, 1.5))
    wider = ("lambda", (1.0, 1.5, 2.0, 2.5))
    encoders = ("encoders",)
    return (
        Entry("MagMax", "magmax", sweep=("lambda", (0.3, 0.5, 0.8))),
        Entry("PCB", "pcb", each={"weight": 1.2}, sweep=("weight", (0.8, 1.2, 1.8))),
        Entry("Consensus", "consensus", sweep=("lambda", (0.3, 0.5, 0.7))),
        Entry("TALL masks, by task", "tall", per_task="task"),
        Entry("EMR, by task", "emr", per_task="task"),
        Entry("TSV-M, 1", "tsv_m", against=("tsv_m", {"alpha": 1.0, **_NO_TABLES})),
        Entry("TSV-M", "tsv_m", sweep=scales),
        Entry("Iso-C, 1", "iso_c", against=("iso_c", {"scaling_factor": 1.0, **_NO_TABLES})),
        Entry("Iso-C", "iso_c", sweep=wider),
        Entry("Iso-CTS", "iso_cts", sweep=wider),
        Entry("WUDI, Adam", "wudi", top={"steps": 300}, against=("wudi", {"iter_num": 300, **_NO_TABLES})),
        Entry("WUDI, closed", "wudi", top={"solver": "closed"}),
        Entry("DOGE-TA", "doge_ta", top={"steps": 400}),
        Entry(
            "Iso-CTS, tables too",
            "iso_cts",
            top={"tables": "spectral"},
            sweep=("lambda", (2.0, 2.5, 3.0, 3.5)),
            suites=encoders,
        ),
        Entry("TSV-M, tables too", "tsv_m", top={"tables": "spectral"}, sweep=wider, suites=encoders),
        Entry(
            "WUDI, closed, tables too",
            "wudi",
            top={"solver": "closed", "tables": "spectral"},
            sweep=wider,
            suites=encoders,
        ),
    )


def _with_statistics() -> tuple[Entry, ...]:
    return (
        Entry("Fisher", "fisher", data="train", calibration=_SHORT, generators=_WHOLE),
        Entry(
            "Fisher, squares of batches",
            "fisher",
            top={"squares": "batches"},
            data="train",
            calibration={**_SHORT, "batch_size": _FISHER["batch_size"]},
            against=("fisher", _FISHER),
            suites=("encoders",),
        ),
        Entry(
            "Fisher, floors by norm",
            "fisher",
            top={"relative_floor": True},
            data="train",
            calibration=_SHORT,
            suites=("encoders",),
        ),
        Entry(
            "RegMean",
            "regmean",
            top={"alpha": 0.9},
            data="train",
            calibration=_SHORT,
            generators=_WHOLE,
            against=("regmean", _REGMEAN),
        ),
        Entry(
            "RegMean++",
            "regmean_plus",
            top={"alpha": 0.9},
            data="train",
            calibration=_SHORT,
            generators=_WHOLE,
        ),
        Entry(
            "TIES by activations",
            "activation_ties",
            each=_FIFTH,
            sweep=("lambda", (1.0, 1.5)),
            data="train",
            calibration=_SHORT,
            generators=_WHOLE,
        ),
    )


def _doge_am() -> Entry:
    """AdaMerging of DOGE-TA's parts, from where the authors' code starts."""
    parts = Entry("part", "doge_ta", top={"steps": 400, "scaled": False}, per_task="part")
    return replace(_adamerging("DOGE-AM", "validation"), each={"weight": 0.3}, parts=parts, against=None)


def _from_answers(name: str, **top: Any) -> Entry:
    """Fewer steps than FusionBench's 1000, at a rate of 0.01 where it has 1e-4 or 1e-3: they go about as far."""
    return Entry(
        name,
        "adamerging_labels",
        top={"rows": 8, "learning_rate": 0.01, **top, **_HALF_FLOATS},
        data="train",
        calibration=_WHOLE,
        seeds=True,
        suites=("generative",),
    )


def _learned() -> tuple[Entry, ...]:
    aligned = {"Expert Merging": "expert_merging", "Expert Merging++": "expert_merging_plus"}
    few = {"max_tokens": 128}
    return (
        _adamerging("AdaMerging, tasks", "validation", granularity="task"),
        _adamerging("AdaMerging, layers", "validation"),
        _adamerging("AdaMerging++, layers", "validation", method="adamerging_plus"),
        _adamerging("AdaMerging, layers, transductive", "test"),
        _doge_am(),
        *(
            Entry(name, method, top=_HALF_FLOATS, data="train", examples=64, calibration=few, seeds=True)
            for name, method in aligned.items()
        ),
        _from_answers("AdaMerging from answers", steps=90),
        _from_answers("AdaMerging from answers, all layers", steps=60, **_FREE),
        Entry(
            "learned spectrum",
            "learned_spectrum",
            top={"lambda": 2.0, "steps": 300, "rows": 8, "learning_rate": 0.03, **_HALF_FLOATS},
            data="train",
            calibration={"max_tokens": 64, "batch_size": 8},
            seeds=True,
            suites=("encoders",),  # of a generator 300 steps are an hour for each seed
        ),
    )


def _searched() -> tuple[Entry, ...]:
    """Rows whose candidates answer the validation questions: few enough only where a merge is scored in a minute."""
    anywhere = {"low": 0.0, "high": 1.0, "per": "expert", "anchors": 3}
    return (
        Entry(
            "search, weights by expert and depth",
            "task_arithmetic",
            each={"weight": 0.4},
            search={"weight": anywhere},
            suites=("generative",),
        ),
        Entry(
            "search, Iso-C by expert and depth",
            "iso_c",
            each=_ONE,
            top={"lambda": 2.0},
            search={
                "weight": {"low": 0.3, "high": 2.5, "per": "expert"},
                "lambda": {"low": 0.8, "high": 3.5, "anchors": 3},
            },
            suites=("encoders",),
        ),
    )


ENTRIES = (*_entry_by_entry(), *_without_data(), *_with_statistics(), *_learned(), *_searched())


def available(suite: str) -> tuple[Entry, ...]:
    """Entries of a suite whose method this mixmerge has."""
    from mixmerge.methods import METHODS

    return tuple(entry for entry in ENTRIES if suite in entry.suites and entry.method in METHODS)
