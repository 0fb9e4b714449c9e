"""Rows of the methods that look at a matrix as a map: singular values, and least interference."""

from __future__ import annotations

from mixmerge.methods.parameters import (
    choice,
    flag,
    kept,
    merged_by,
    number,
    one_part,
    tables,
    tolerance,
    whole,
)
from mixmerge.methods.records import ANY, Method, Parameter


def _adam(steps: int, rate: float) -> tuple[Parameter, Parameter]:
    return (
        whole("steps", steps, "steps of Adam", 0, 1_000_000),
        number("lr", rate, "step size of Adam", 0.0),
    )


def _row(
    name: str, where: str, extra: tuple[Parameter, ...], *, summary: str, paper: str, sketch: str = ""
) -> Method:
    rest = tables("base" if sketch else "mean")
    doc = (
        "factor on each delta's share of a matrix"
        if sketch
        else "factor on each delta before it is decomposed"
    )
    return Method(
        name=name,
        function=f"mixmerge.methods.{where}:{name}",
        takes="deltas",
        parameters=(number("weight", 1.0, doc, per="expert"), *extra, rest, tolerance(), merged_by(1.0)),
        base="required",
        inputs=(1, ANY),
        summary=summary,
        paper=paper,
        differentiable=False,
        roles=True,
        streams=True,
        factors=True,
        sketch=sketch,
        footprint=f"mixmerge.methods.footprint:{name}",
    )


_ISO = "No Task Left Behind, arXiv:2502.04959"

ROWS = (
    _row(
        "tsv_m",
        "tsv",
        (),
        summary="the leading singular vectors of each delta, made orthogonal, added",
        paper="Task Singular Vectors, arXiv:2412.00081",
    ),
    _row(
        "iso_c",
        "isotropic",
        (),
        summary="the sum of the deltas, all its singular values made equal",
        paper=f"{_ISO}, Iso-C",
    ),
    _row(
        "iso_cts",
        "isotropic",
        (number("common_fraction", 0.8, "share of the directions that are the sum's", 0.0, 1.0),),
        summary="as `iso_c`, the last directions being each expert's own",
        paper=f"{_ISO}, Iso-CTS",
    ),
    _row(
        "wudi",
        "wudi",
        (
            choice(
                "solver",
                "adam",
                "adam = the paper's early stop near the sum, closed = the minimum itself",
                *("adam", "closed"),
            ),
            *_adam(300, 1e-5),
            number(
                "reach",
                1.0,
                "of closed: the largest norm of the merged delta, as a share of the sum of the experts'",
                0.01,
            ),
        ),
        summary="the delta that interferes least with what each expert's delta reads",
        paper="Whoever Started the Interference Should End It, arXiv:2503.08099",
    ),
    _row(
        "doge_ta",
        "doge",
        (
            kept(0.3, "share of each expert's entries that is kept"),
            number("eta", 0.07, "size of each expert's share of a matrix", 0.0),
            whole("subspace", 6, "the shared subspace has k / subspace directions", 1),
            *_adam(400, 1e-4),
            choice(
                "projection",
                "gradient",
                "what leaves the shared subspace alone: gradient (the authors' code) or every step as well",
                *("gradient", "step"),
            ),
            one_part(),
            flag("scaled", False, "of part: scaled as in the merge, so that the parts of all add up to it"),
        ),
        summary="one correction of all deltas outside their shared subspace, then the largest entries of each",
        paper="Adaptive Projective Gradient Descent (DOGE), arXiv:2501.01230",
        sketch="mixmerge.methods.doge:LargestEntries",
    ),
)
