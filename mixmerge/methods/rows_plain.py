"""Rows of the methods that need nothing but the weights, entry by entry."""

from __future__ import annotations

from typing import Literal

from mixmerge.methods.parameters import choice, flag, kept, merged_by, number, threshold_scope
from mixmerge.methods.records import ANY, REQUIRED, Method, Parameter


def _weight(per: Literal["input", "expert"]) -> Parameter:
    return number("weight", REQUIRED, "mixing coefficient", per=per)


def _normalize(default: bool) -> Parameter:
    return flag("normalize", default, "divide by the sum of the weights that took part")


_DENSITY = kept(1.0)
_GAMMA = number("gamma", 0.01, "share of the largest entries dropped", 0.0, 1.0, per="expert")
_EPSILON = number(
    "epsilon", 0.15, "half width of the keep probabilities around density", 0.0, 1.0, per="expert"
)
_LAMBDA = merged_by(1.0)
_AGG = choice("agg", None, "mean = normalize: true, sum = normalize: false", "mean", "sum")
_SCOPE = threshold_scope(
    "tensor", "where the magnitude threshold is taken: each tensor (mergekit) or the whole delta (paper)"
)
_RESCALE_BY = choice(
    "rescale_by",
    "l1",
    "what rescale restores: the delta's L1 norm (mergekit) or each entry's expectation (papers)",
    *("l1", "inverse_p"),
)


def _rescale(default: bool) -> Parameter:
    return flag("rescale", default, "scale up what is kept for what is dropped")


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

ROWS = (
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
        parameters=(number("t", REQUIRED, "position on the arc: 0 is the base, 1 the expert"),),
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
        parameters=(number("scale", None, "factor on every entry", per="input"),),
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
