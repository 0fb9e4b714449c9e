"""Which method to try next, and why: rules on measured facts, in one table, each with its source. E experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mixmerge.evaluate.model_records import Advice, ModelReport, ModelRow
from mixmerge.registry import table

_LARGE = 0.005  # root mean square of a delta's entries
_BIG_MODEL = 7e9  # parameters
_MOST = 4  # pieces of advice
_SUMS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")  # whose lambda is the length of the step
_ALIKE = 0.5  # cosine of deltas that agree


@dataclass(frozen=True)
class Deltas:
    """What is known of the deltas, expert - base, over all weights.

    Args:
        relative: ``(E,)`` norms over the base's norm.
        spread: ``(E,)`` root mean squares of their entries.
        cosine: mean over the pairs; None for one expert.
        conflicts: share of the entries that one expert raises and another lowers.
        expected: the same if signs were drawn by chance, 1 - 2^(1-E).
        parameters: compared.
        lora: all experts are adapters.
    """

    relative: tuple[float, ...]
    spread: tuple[float, ...]
    cosine: float | None
    conflicts: float
    expected: float
    parameters: int
    lora: bool


@dataclass(frozen=True)
class Facts:
    """What the rules look at.

    Args:
        report: of the evaluation; with experts.
        deltas: None without a base.
        data: there are rows to calibrate on.
        methods: that this installation has.
    """

    report: ModelReport
    deltas: Deltas | None
    data: bool
    methods: frozenset[str]

    @property
    def best(self) -> ModelRow | None:
        """The model judged with the highest average."""
        merges = [row for row in self.report.rows if row.role == "merge"]
        return max(merges, key=lambda row: row.average.value, default=None)

    @property
    def tried(self) -> frozenset[str]:
        return frozenset(row.method for row in self.report.rows if row.method is not None)

    @property
    def classifies(self) -> bool:
        return any(task.metric == "accuracy" for task in self.report.tasks)

    def first(self, *names: str) -> str:
        """The methods of these that are here and have not been tried, at most two; else "" if none is."""
        here = [name for name in names if name in self.methods and name not in self.tried]
        return " or ".join(here[:2])


@dataclass(frozen=True)
class Rule:
    """One piece of advice.

    Args:
        name: of the rule.
        when: the advice and its reason where it applies, else None.
        source: who found it.
    """

    name: str
    when: Callable[[Facts], tuple[str, str] | None]
    source: str


def _no_harm(facts: Facts) -> tuple[str, str] | None:
    best, single = facts.best, facts.report.best_single
    if best is None or single is None or best.over_best is None:
        return None
    gain = best.over_best.difference
    if gain.value >= 0:
        return None
    sure = "and the interval says so" if gain.high < 0 else "though the interval does not exclude a tie"
    return (
        f"Do no harm: serve {single}, or route to the experts (mixmerge route), unless it has to be one model.",
        f"The best merge here, {best.name}, is {abs(gain.value):.3f} below {single} on average, {sure}.",
    )


def _enough(facts: Facts) -> tuple[str, str] | None:
    best = facts.best
    if best is None or best.worst is None or best.worst[1].value < 0.97:
        return None
    task, worst = best.worst
    return (
        f"Stop here: {best.name} keeps what its experts know.",
        f"Its worst task, {task}, retains {worst.value:.0%} of its own expert.",
    )


def _scale(facts: Facts) -> tuple[str, str] | None:
    """Too large a step: a sum below the base on some task."""
    best = facts.best
    base = next((row for row in facts.report.rows if row.role == "base"), None)
    if best is None or base is None or best.method not in _SUMS:
        return None
    below = [name for name in best.scores if best.scores[name].high < base.scores[name].low]
    if not below:
        return None
    return (
        "Lower lambda (0.2 to 0.4 with many experts), or let `mixmerge search` find it.",
        f"{best.name} is below the base on {', '.join(below)}: the sum of the deltas goes too far.",
    )


def _large_deltas(facts: Facts) -> tuple[str, str] | None:
    deltas = facts.deltas
    if deltas is None or max(deltas.spread) <= _LARGE:
        return None
    return (
        "Do not drop entries at random (dare_*); average with `linear`, or route.",
        f"Entries of the deltas have a root mean square of up to {max(deltas.spread):.4f}, above {_LARGE}: the experts "
        "were trained far from the base.",
    )


def _uneven(facts: Facts) -> tuple[str, str] | None:
    deltas = facts.deltas
    if deltas is None or min(deltas.relative) <= 0 or max(deltas.relative) < 3 * min(deltas.relative):
        return None
    names = facts.first("iso_c", "tsv_m")
    rest = f", or try {names}, which evens out strong directions" if names else ""
    return (
        f"Give the small deltas more weight{rest}.",
        f"The largest delta is {max(deltas.relative) / min(deltas.relative):.1f} times the smallest, and drowns it in "
        "a sum.",
    )


def _with_data(facts: Facts) -> tuple[str, str] | None:
    if not facts.data or (facts.best is not None and facts.best.worst is None):
        return None
    order = (
        ("learned_spectrum", "regmean", "adamerging", "fisher")
        if facts.classifies
        else ("regmean", "regmean_plus", "learned_spectrum", "expert_merging")
    )
    names = facts.first(*order)
    if not names:
        return None
    best = facts.best
    lost = f" {best.worst[0]} retains {best.worst[1].value:.0%}." if best is not None and best.worst else ""
    return (
        f"Use your data: try {names}.",
        f"There are rows to calibrate on, kept apart from these tasks.{lost}",
    )


def _apart(facts: Facts, *names: str, lora: bool) -> tuple[Deltas, str] | None:
    """Deltas that do not agree, of adapters or of whole models, and the methods of these to try."""
    deltas, untried = facts.deltas, facts.first(*names)
    if deltas is None or deltas.lora != lora or not untried or (deltas.cosine or 0.0) > _ALIKE:
        return None
    return deltas, untried


def _interference(facts: Facts) -> tuple[str, str] | None:
    found = _apart(facts, "tsv_m", "iso_c", "wudi", "ties", lora=False)
    if found is None or found[0].cosine is None:
        return None
    deltas, names = found
    return (
        f"Without data, try {names}.",
        f"The deltas point apart (mean cosine {deltas.cosine:.2f}), and {deltas.conflicts:.0%} of the entries are "
        f"pulled both ways ({deltas.expected:.0%} would be by chance): what is lost is lost to interference.",
    )


def _low_rank(facts: Facts) -> tuple[str, str] | None:
    found = _apart(facts, "tsv_m", "wudi", "iso_c", "ties", lora=True)
    if found is None:
        return None
    return (
        f"Try {found[1]}, with lambda not above 0.3 where it is a sum.",
        "The experts are LoRA adapters: each moves few directions, and plain sums of them break sooner.",
    )


def _alike(facts: Facts) -> tuple[str, str] | None:
    deltas = facts.deltas
    if deltas is None or deltas.cosine is None or deltas.cosine <= _ALIKE:
        return None
    pair = ("slerp",) if len(deltas.relative) == 2 else ()  # it takes two
    names = facts.first("linear", *pair)
    if not names:
        return None
    return (
        f"Average: {names}.",
        f"The deltas agree (mean cosine {deltas.cosine:.2f}): there is little interference to resolve, and a sum goes "
        "too far.",
    )


def _big(facts: Facts) -> tuple[str, str] | None:
    deltas = facts.deltas
    if deltas is None or deltas.parameters < _BIG_MODEL:
        return None
    return (
        "Keep to `linear` or `task_arithmetic`, and spend the effort on which experts to take.",
        f"The model has {deltas.parameters / 1e9:.0f} billion parameters, and methods come together with size.",
    )


def _weak_base(facts: Facts) -> tuple[str, str] | None:
    base = next((row for row in facts.report.rows if row.role == "base"), None)
    experts = sum(row.role == "expert" for row in facts.report.rows)
    if base is None or base.retained_average is None or experts < 4 or base.retained_average.value > 0.3:
        return None
    return (
        "Merge fewer experts at a time, or fine-tune them from a stronger (instruction-tuned) base.",
        f"The base has {base.retained_average.value:.0%} of its experts' scores: weak bases lose more with every "
        f"expert that is added, and there are {experts}.",
    )


def _worst_task(facts: Facts) -> tuple[str, str] | None:
    best = facts.best
    if best is None or best.worst is None or best.retained_average is None:
        return None
    task, worst = best.worst
    if best.retained_average.value - worst.value < 0.15:
        return None
    expert = next((one.expert for one in facts.report.tasks if one.name == task), None) or task
    return (
        f"Give {expert}, the expert of {task}, more weight than the others.",
        f"{best.name} retains {worst.value:.0%} of it, and {best.retained_average.value:.0%} on average.",
    )


RULES: tuple[Rule, ...] = (
    Rule(
        "do no harm", _no_harm, "a guard, not a paper: FusionBench's tables show merges below single experts"
    ),
    Rule("enough", _enough, "what is retained"),
    Rule(
        "scale",
        _scale,
        "FusionBench, Flan-T5-base LoRA: 78.1 at lambda 0.2, 73.5 at 0.4, tasks at 0 from 0.6",
    ),
    Rule("large deltas", _large_deltas, "DARE's authors (Yu et al., ICML 2024): entries up to about 0.005"),
    Rule(
        "data",
        _with_data,
        "mixmerge's docs/real-models.md; RegMean (Jin et al., ICLR 2023), Expert Merging (arXiv:2509.25712)",
    ),
    Rule("uneven", _uneven, "AdaMerging (Yang et al., ICLR 2024), Iso-C (Marczak et al., 2025)"),
    Rule("worst task", _worst_task, "AdaMerging (Yang et al., ICLR 2024): coefficients of tasks differ"),
    Rule(
        "alike",
        _alike,
        "task arithmetic (Ilharco et al., ICLR 2023): deltas add up where they are orthogonal",
    ),
    Rule("low rank", _low_rank, "FusionBench, Flan-T5-base LoRA"),
    Rule(
        "interference",
        _interference,
        "TSV-M (Gargiulo et al., 2025) and Iso-C's Table 1; TIES (Yadav et al., 2023)",
    ),
    Rule("weak base", _weak_base, "What Matters for Model Merging at Scale (Yadav et al., 2024)"),
    Rule("big model", _big, "What Matters for Model Merging at Scale (Yadav et al., 2024)"),
)


def advise(facts: Facts) -> tuple[Advice, ...]:
    """What the rules say of these facts, in the order of the table, at most four; nothing behind "stop here"."""
    found = []
    for rule in RULES:
        said = rule.when(facts)
        if said is not None:
            found.append(Advice(said[0], said[1], rule.source))
        if said is not None and rule.when is _enough:
            break
    return tuple(found[:_MOST])


def installed_methods() -> frozenset[str]:
    """Names of the merge methods that are here."""
    return frozenset(table("method"))


def deltas_of(experts: Sequence[object], base: object) -> Deltas:
    """Read all weights once, and measure how experts differ from their base and from each other.

    Args:
        experts: two or more, or one: references or folders as ``mixmerge.inspect`` takes them.
        base: the same.

    Raises:
        CheckpointError: weights cannot be compared.
    """
    from mixmerge.inspect import inspect_models

    found = inspect_models(list(experts), base=base, by="kind").comparison  # type: ignore[arg-type]
    if found is None:
        return Deltas((0.0,), (0.0,), None, 0.0, 0.0, 0, False)
    total, size = found.total, len(found.experts)
    cosines = [total.cosines[i][j] for i in range(size) for j in range(i)]
    known = [one for one in cosines if one is not None]
    return Deltas(
        relative=tuple(one or 0.0 for one in total.relative),
        spread=tuple(norm / math.sqrt(max(1, total.parameters)) for norm in total.norms),
        cosine=sum(known) / len(known) if known else None,
        conflicts=total.conflicts or 0.0,
        expected=1 - 2.0 ** (1 - size),
        parameters=total.parameters,
        lora=bool(experts) and all(getattr(one, "adapter", None) is not None for one in experts),
    )
