"""The bank of a plan: which tensors get factors, which are kept whole, and how large it can get. From headers alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.checkpoint.header import FLOATS
from mixmerge.errors import Fault
from mixmerge.methods import Method, Value
from mixmerge.methods.rows_dynamic import DEFAULT_RANK
from mixmerge.recipe import Recipe
from mixmerge.recipe.gate import GateBlock

if TYPE_CHECKING:
    from mixmerge.plan.model import Task

_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_SCALES = 12  # bytes beside each rank of an expert: its scale, and those of factors of 8 bits
_SHOWN = 3

Lookup = Callable[[str], dict[str, Value]]


@dataclass(frozen=True)
class BankSite:
    """One matrix that experts change by factors.

    Args:
        name: of the output tensor.
        shape: as it is stored.
        dtype: of the output tensor.
        kind: a table whose rows are looked up, or the matrix of a linear map.
        turned: stored as inputs x outputs.
        rank: at most, of every expert; None: as many as ``energy`` or the budget of the whole asks for.
        energy: share of the squared norm that is kept; None: all that ``rank`` allows.
        tied: it is the model's head too.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    kind: Literal["linear", "embedding"]
    turned: bool
    rank: int | None
    energy: float | None
    tied: bool = False

    @property
    def side(self) -> int:
        """The most ranks a change of it can have."""
        return min(self.shape)

    @property
    def most(self) -> int:
        """Ranks of an expert, at most."""
        return self.side if self.rank is None else min(self.rank, self.side)


@dataclass(frozen=True)
class BankPlan:
    """What stands beside the shared model.

    Args:
        method: the row of the recipe's method; ``Plan.method`` is that of the shared part.
        experts: names of the bank's experts, in the plan's order.
        sites: in the order of the output's tensors.
        vectors: tensors of one dimension, kept whole for every expert: name -> length.
        left_out: what stays as in the shared model, and why.
        bits: of a stored factor; None: as the tensor.
        budget: parameters in all, at most; None: no limit.
        gate: how the gate is trained; None for none.
        parameters: of one expert.
        bytes_of_experts: what the tensors of all experts take, in the output's types.
    """

    method: Method
    experts: tuple[str, ...]
    sites: tuple[BankSite, ...]
    vectors: dict[str, int]
    left_out: dict[str, str]
    bits: int | None
    budget: int | None
    gate: GateBlock | None
    parameters: int
    bytes_of_experts: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk, at most."""
        count = len(self.experts)
        factors = sum(
            count * site.most * (sum(site.shape) * self.width(site.dtype) + _SCALES) for site in self.sites
        )
        whole = 4 * count * sum(self.vectors.values())
        if self.budget is None:
            return factors + whole
        widest = max((self.width(site.dtype) for site in self.sites), default=4)
        return min(factors, self.budget * (widest + _SCALES)) + whole

    def width(self, dtype: str) -> int:
        """Bytes of a factor's entry."""
        return _BYTES[dtype] if self.bits is None else self.bits // 8

    def notes(self) -> list[str]:
        """What a person should know."""
        reasons: dict[str, list[str]] = {}
        for name, why in self.left_out.items():
            reasons.setdefault(why, []).append(name)
        return [
            f"bank: {len(names)} tensor{'s stay' if len(names) > 1 else ' stays'} as in the shared model ({why}): "
            + ", ".join(names[:_SHOWN])
            + (", ..." if len(names) > _SHOWN else "")
            for why, names in reasons.items()
        ]

    def without(self, reasons: dict[str, str]) -> BankPlan:
        """The same, some of its tensors left out as well."""
        return replace(
            self,
            sites=tuple(site for site in self.sites if site.name not in reasons),
            vectors={name: size for name, size in self.vectors.items() if name not in reasons},
            left_out={**self.left_out, **reasons},
        )

    def facts(self) -> dict[str, Any]:
        """Everything that decides what is written, as JSON data."""
        return {
            "method": self.method.name,
            "experts": list(self.experts),
            "sites": [
                [site.name, site.shape, site.dtype, site.kind, site.turned, site.rank, site.energy]
                for site in self.sites
            ],
            "vectors": self.vectors,
            "bits": self.bits,
            "budget": self.budget,
            "gate": None if self.gate is None else self.gate.canonical(),
        }


def plan_bank(
    recipe: Recipe,
    method: Method,
    experts: Sequence[str],
    tasks: Sequence[Task],
    values: Lookup,
    faults: list[Fault],
    *,
    own: Collection[str] = (),
) -> BankPlan:
    """The bank of a recipe.

    Args:
        recipe: whose method has a bank.
        method: its row.
        experts: names of the experts.
        tasks: of the shared part.
        values: the method's parameters for a tensor.
        faults: gets what no bank can be made of.
        own: tensors of heads that are kept whole for every expert: whoever takes an expert's head has all of it.
    """
    sites, vectors, left_out = [], {}, {}
    asked: dict[str, Value] = {}
    for task in tasks:
        target = task.target
        if task.copied or target.dtype not in FLOATS:
            left_out[target.name] = "no floating-point numbers"
            continue
        asked = values(target.name)
        why = "each expert's own is kept in heads/" if target.name in own else _why_not(task, asked)
        if why:
            left_out[target.name] = why
        elif len(target.shape) == 1:
            vectors[target.name] = target.shape[0]
        else:
            sites.append(_site(task, asked))
    _check_ranks(sites, faults)
    one = sum(math.prod(task.target.shape) for task in tasks if task.target.dtype in FLOATS)
    size = sum(task.target.nbytes for task in tasks)
    share, bits = asked.get("budget"), asked.get("bits")
    budget = None if share is None else int(float(share) * one * len(experts))
    whole = len(experts) * sum(vectors.values())
    if budget is not None and budget <= whole:
        least = (whole + 1) / (one * len(experts))
        what = (
            f"is {float(share or 0):g}, and biases and gains of norms, which are kept whole, take {least:.2g}"
        )
        faults.append(Fault("parameters.budget", what, "A larger share"))
    return BankPlan(
        method, tuple(experts), tuple(sites), vectors, left_out, None if bits is None else int(float(bits)),
        budget, recipe.gate, one, size * len(experts),
    )  # fmt: skip


def _why_not(task: Task, asked: dict[str, Value]) -> str:
    """Why a tensor gets no place in the bank; empty if it gets one."""
    shape = task.target.shape
    if 0 in shape:
        return "empty"
    if len(shape) not in (1, 2):
        return f"{len(shape)} dimensions"
    if task.role == "table" and asked.get("tables") == "shared":
        return "tables: shared"
    return ""


def _site(task: Task, asked: dict[str, Value]) -> BankSite:
    rows, columns = task.target.shape
    rank, energy = asked.get("rank"), asked.get("energy")
    plain = rank is None and energy is None and asked.get("budget") is None
    return BankSite(
        task.target.name,
        (rows, columns),
        task.target.dtype,
        "embedding" if task.role == "table" else "linear",
        task.role == "transposed",
        DEFAULT_RANK if plain else None if rank is None else int(float(rank)),
        None if energy is None else float(energy),
    )


def _check_ranks(sites: Sequence[BankSite], faults: list[Fault]) -> None:
    """A rank that no matrix can have is a mistake; of smaller matrices all ranks are kept."""
    if not sites:
        faults.append(Fault("models", "no tensor is a matrix, so there is nothing to make factors of"))
        return
    largest = max(site.side for site in sites)
    ranks = [site.rank for site in sites if site.rank is not None]
    if ranks and min(ranks) > largest:
        what = f"is {min(ranks)}, and no matrix has more than {largest} rows or columns"
        faults.append(Fault("parameters.rank", what, f"1 to {largest}"))
