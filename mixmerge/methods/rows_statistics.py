"""Rows of the closed forms that need statistics of calibration data."""

from __future__ import annotations

from dataclasses import replace

from mixmerge.methods.parameters import choice, flag, kept, number
from mixmerge.methods.records import ANY, Method
from mixmerge.methods.rows_plain import ROWS as PLAIN

_WEIGHT = number("weight", 1.0, "how much the expert counts", 0.0, per="input")
_REGMEAN = Method(
    name="regmean",
    function="mixmerge.methods.statistics:regmean",
    takes="experts",
    parameters=(
        _WEIGHT,
        number("alpha", 0.9, "factor on what is off a Gram matrix's diagonal", 0.0, 1.0),
        number("ridge", 1e-6, "share of the mean energy added to the diagonal", 0.0),
    ),
    base="input",
    inputs=(1, ANY),
    summary="linear maps whose outputs are nearest to every expert's on its own data, by least squares",
    paper="Dataless Knowledge Fusion (RegMean), arXiv:2212.09849",
    roles=True,
    statistics="gram",
    footprint="mixmerge.methods.footprint:regmean",
    differentiable=False,
)
_TIES = next(row for row in PLAIN if row.name == "ties")

ROWS = (
    Method(
        name="fisher",
        function="mixmerge.methods.statistics:fisher",
        takes="experts",
        parameters=(
            _WEIGHT,
            flag("normalize_fisher", True, "divide each Fisher by its norm", constant=True),
            number("floor", 1e-6, "added to every entry of a Fisher", 0.0),
            flag(
                "relative_floor",
                False,
                "the floor is a share of each Fisher's norm; false, as released: the smallest norm wins",
                constant=True,
            ),
            choice(
                "squares",
                "examples",
                "of what: each example's gradient, or sums over batches of calibration.batch_size (released code)",
                *("examples", "batches"),
                constant=True,
                learning=True,
            ),
        ),
        base="input",
        inputs=(1, ANY),
        summary="average of each entry by how much an expert's predictions depend on it",
        paper="Merging Models with Fisher-Weighted Averaging, arXiv:2111.09832",
        statistics="fisher",
        footprint="mixmerge.methods.footprint:fisher",
        differentiable=False,
    ),
    _REGMEAN,
    replace(
        _REGMEAN,
        name="regmean_plus",
        summary="RegMean block by block, each on the activations of the blocks merged before it",
        paper="RegMean++, arXiv:2508.03121",
        statistics="gram_sequential",
    ),
    Method(
        name="activation_ties",
        function="mixmerge.methods.statistics:activation_ties",
        takes="deltas",
        parameters=(
            number("weight", 1.0, "mixing coefficient", per="expert"),
            kept(1.0),
            flag("elect", True, "elect a sign for each entry; false: a weighted sum"),
            *(
                parameter
                for name in ("normalize", "agg", "rescale", "lambda")
                if (parameter := _TIES.parameter(name))
            ),
        ),
        base="required",
        inputs=(1, ANY),
        summary="TIES that keeps the entries which change the activations most",
        paper="ours: the score of Wanda, arXiv:2306.11695, in TIES-Merging, arXiv:2306.01708",
        roles=True,
        statistics="second_moment",
        footprint="mixmerge.methods.footprint:activation_ties",
        differentiable=False,
    ),
)
