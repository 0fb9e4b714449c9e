"""What a row of the table of merge methods is. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Value = float | bool | str | None
# What a tensor is for: the matrix of a linear map (outputs x inputs), the same or a stack of them stored as inputs x
# outputs (Conv1D, fused experts of some models), a table whose rows belong to tokens or positions (embeddings,
# heads over a vocabulary), or anything else.
Role = Literal["linear", "transposed", "table", "other"]
REQUIRED = "required"
ALL = "all"  # a position: every expert's
ANY = 1_000_000
_LISTED = re.compile(r"[0-9]{1,6}( ?, ?[0-9]{1,6})*")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Args:
        name: as written in a recipe.
        kind: ``number``, ``bool`` or ``choice``.
        per: ``input`` (every input, an added base included), ``expert`` (every input but the base) or
            ``merge`` (one value for all inputs of a tensor; under a model it has no meaning).
        default: the value when nobody gives one; ``REQUIRED`` if somebody must.
        low, high: closed range of a number.
        choices: allowed words of a choice; of a number, words that may stand in its place.
        listed: of a choice: or whole numbers, commas between.
        constant: the value may not change from tensor to tensor (it steers a whole-model statistic).
        position: the number is the position of one of the experts, from 0, and the result is that expert's model: it
            has the expert's own head where heads differ.
        whole: the number counts something: it has no fraction, and gradients go in steps.
        learning: it steers how coefficients are learned, or statistics gathered; the definition does not take it.
        doc: one line for tables and errors.
    """

    name: str
    kind: Literal["number", "bool", "choice"]
    per: Literal["input", "expert", "merge"]
    default: Value
    doc: str
    low: float = float("-inf")
    high: float = float("inf")
    choices: tuple[str, ...] = ()
    listed: bool = False
    constant: bool = False
    position: bool = False
    whole: bool = False
    learning: bool = False

    def knows(self, word: str) -> bool:
        """Whether a choice may have this value."""
        return word in self.choices or (self.listed and bool(_LISTED.fullmatch(word)))

    @property
    def words(self) -> tuple[str, ...]:
        """What a choice may be, for people."""
        return (*self.choices, "'4,8,12'") if self.listed else self.choices


def misplaced(value: float, count: int) -> str:
    """What is wrong with a position among ``count`` experts; empty if nothing is."""
    if value in range(count):
        return ""
    experts = "the only expert has position 0" if count == 1 else f"experts have positions 0 to {count - 1}"
    return f"is {value:g}, and {experts}"


@dataclass(frozen=True)
class Method:
    """One published method.

    Args:
        name: as written in ``merge_method``.
        function: ``module:attr`` of the plain torch definition.
        takes: what the function's first argument holds: the ``experts`` themselves or their ``deltas``.
        parameters: in the order a person would want to read them.
        base: ``required``; or ``input``: a ``base_model`` is one more input, as in mergekit.
        inputs: least and most experts (the base not counted where it is required).
        kernel: name of the fused CPU kernel in the engine; empty for none.
        stochastic: draws random masks, so it takes a ``draw``.
        differentiable: gradients flow to experts, base and numeric parameters.
        roles: it takes ``role``, and treats the matrices of linear maps in another way than the rest.
        streams: it asks for one input at a time, by index, and the engine reads them as they are asked. It keeps none,
            unless its definition says so under Memory or of its arguments (``doge_ta``, two forms of ``pcb``).
        factors: a delta that is a product of two factors (an adapter's) it takes as a ``LowRank``, not multiplied out.
        sketch: ``module:attr`` of what it must know of the whole model first (``mixmerge.methods.sketch``).
        statistics: name of the statistics of calibration data it takes, one of each expert; empty for none.
        learner: name of what learns its coefficients from calibration data; empty for none.
        masks: ``module:attr`` of what the models of all tasks share of a tensor, and what each keeps of it; ``task:
            all`` writes that. Empty if there is no such thing.
        bank: the result depends on the input: a shared model by another method, and a bank of what each expert has
            besides. The definition is that for given weights.
        footprint: ``module:attr`` of how many numbers the definition holds at once (``mixmerge.methods.footprint``). A
            row with a kernel has one if its definition may run all the same.
        no_effect: parameters mergekit accepts here that change nothing: warned about, then dropped.
        summary: one line.
        paper: title and where to find it.
    """

    name: str
    function: str
    takes: Literal["experts", "deltas"]
    parameters: tuple[Parameter, ...]
    base: Literal["required", "input"]
    inputs: tuple[int, int]
    summary: str
    paper: str
    kernel: str = ""
    stochastic: bool = False
    differentiable: bool = True
    roles: bool = False
    streams: bool = False
    factors: bool = False
    sketch: str = ""
    statistics: str = ""
    learner: str = ""
    masks: str = ""
    bank: bool = False
    footprint: str = ""
    no_effect: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        return bool(self.statistics or self.learner)

    @property
    def learns_directions(self) -> bool:
        """Whether what it learns are factors of a sum's directions, and not weights of experts."""
        return self.learner == "spectrum"

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)
