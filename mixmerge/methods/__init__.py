"""The merge methods by name: what each takes, what it needs, and where its definition is. Imports no torch.

A row is data; the definition it names is a pure function of tensors. Adding a method is a function and a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Value = float | bool | str | None
REQUIRED = "required"


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
        choices: allowed words of a choice.
        constant: the value may not change from tensor to tensor (it steers a whole-model statistic).
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
    constant: bool = False


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
    no_effect: tuple[str, ...] = ()

    def parameter(self, name: str) -> Parameter | None:
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


ANY = 1_000_000


def _weight(per: Literal["input", "expert"]) -> Parameter:
    return Parameter("weight", "number", per, REQUIRED, "mixing coefficient")


def _normalize(default: bool) -> Parameter:
    return Parameter("normalize", "bool", "merge", default, "divide by the sum of the weights that took part")


_DENSITY = Parameter("density", "number", "expert", 1.0, "share of each delta that is kept", 0.0, 1.0)
_GAMMA = Parameter("gamma", "number", "expert", 0.01, "share of the largest entries dropped", 0.0, 1.0)
_EPSILON = Parameter(
    "epsilon", "number", "expert", 0.15, "half width of the keep probabilities around density", 0.0, 1.0
)
_LAMBDA = Parameter("lambda", "number", "merge", 1.0, "factor on the merged delta")
_AGG = Parameter(
    "agg", "choice", "merge", None, "mean = normalize: true, sum = normalize: false", choices=("mean", "sum")
)
_SCOPE = Parameter(
    "scope",
    "choice",
    "merge",
    "tensor",
    "where the magnitude threshold is taken: each tensor (mergekit) or the whole delta (paper)",
    choices=("tensor", "model"),
    constant=True,
)
_RESCALE_BY = Parameter(
    "rescale_by",
    "choice",
    "merge",
    "l1",
    "what rescale restores: the delta's L1 norm (mergekit) or each entry's expectation (papers)",
    choices=("l1", "inverse_p"),
)


def _rescale(default: bool) -> Parameter:
    return Parameter("rescale", "bool", "merge", default, "scale up what is kept for what is dropped")


# sparsifier -> (its parameters, rescale's default, stochastic)
_SPARSIFIERS: dict[str, tuple[tuple[Parameter, ...], bool, bool]] = {
    "magnitude": ((_DENSITY, _SCOPE), False, False),
    "random": ((_DENSITY, _RESCALE_BY), True, True),
    "band": ((_DENSITY, _GAMMA), False, False),
    "ranked": ((_DENSITY, _EPSILON, _RESCALE_BY), True, True),
}


def _task_vectors(
    name: str, *, sparsifier: str | None, elect: bool, normalize: bool, summary: str, paper: str
) -> Method:
    extra, rescale, stochastic = _SPARSIFIERS[sparsifier] if sparsifier else ((), False, False)
    parameters = (
        _weight("expert"),
        *extra,
        _normalize(normalize),
        *((_AGG,) if elect else ()),
        *((_rescale(rescale),) if sparsifier else ()),
        _LAMBDA,
    )
    return Method(
        name=name,
        function=f"mixmerge.methods.task_vectors:{name}",
        takes="deltas",
        parameters=parameters,
        base="required",
        inputs=(1, ANY),
        summary=summary,
        paper=paper,
        kernel="task_vectors",
        stochastic=stochastic,
        no_effect=("int8_mask",) if sparsifier else ("int8_mask", "density", "rescale"),
    )


_TIES = "TIES-Merging, arXiv:2306.01708"
_DARE = "Language Models are Super Mario (DARE), arXiv:2311.03099"
_DELLA = "DELLA-Merging, arXiv:2406.11617"
_CRUMBS = "Model Breadcrumbs, arXiv:2312.06795"

_ROWS = (
    Method(
        name="linear",
        function="mixmerge.methods.average:linear",
        takes="experts",
        parameters=(_weight("input"), _normalize(True)),
        base="input",
        inputs=(1, ANY),
        summary="weighted average of the experts",
        paper="Model Soups, arXiv:2203.05482",
        kernel="linear",
    ),
    Method(
        name="slerp",
        function="mixmerge.methods.average:slerp",
        takes="experts",
        parameters=(
            Parameter("t", "number", "merge", REQUIRED, "position on the arc: 0 is the base, 1 the expert"),
        ),
        base="required",
        inputs=(1, 1),
        summary="spherical interpolation between base and one expert",
        paper="Animating Rotation with Quaternion Curves, doi:10.1145/325334.325242",
        kernel="slerp",
    ),
    Method(
        name="passthrough",
        function="mixmerge.methods.average:passthrough",
        takes="experts",
        parameters=(Parameter("scale", "number", "input", None, "factor on every entry"),),
        base="input",
        inputs=(1, 1),
        summary="one model, copied or scaled",
        paper="none",
        kernel="linear",
    ),
    _task_vectors(
        "task_arithmetic",
        sparsifier=None,
        elect=False,
        normalize=False,
        summary="base plus a weighted sum of deltas",
        paper="Editing Models with Task Arithmetic, arXiv:2212.04089",
    ),
    _task_vectors(
        "ties",
        sparsifier="magnitude",
        elect=True,
        normalize=True,
        summary="keep the largest entries, elect a sign, average those that agree",
        paper=_TIES,
    ),
    _task_vectors(
        "dare_linear",
        sparsifier="random",
        elect=False,
        normalize=False,
        summary="drop entries at random and rescale, then a weighted sum",
        paper=_DARE,
    ),
    _task_vectors(
        "dare_ties",
        sparsifier="random",
        elect=True,
        normalize=False,
        summary="drop entries at random and rescale, then elect signs",
        paper=f"{_DARE}; {_TIES}",
    ),
    _task_vectors(
        "breadcrumbs",
        sparsifier="band",
        elect=False,
        normalize=False,
        summary="drop the largest and the smallest entries, then a weighted sum",
        paper=_CRUMBS,
    ),
    _task_vectors(
        "breadcrumbs_ties",
        sparsifier="band",
        elect=True,
        normalize=False,
        summary="drop the largest and the smallest entries, then elect signs",
        paper=f"{_CRUMBS}; {_TIES}",
    ),
    _task_vectors(
        "della",
        sparsifier="ranked",
        elect=True,
        normalize=True,
        summary="drop at random, small entries more often, then elect signs",
        paper=_DELLA,
    ),
    _task_vectors(
        "della_linear",
        sparsifier="ranked",
        elect=False,
        normalize=False,
        summary="drop at random, small entries more often, then a weighted sum",
        paper=_DELLA,
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
