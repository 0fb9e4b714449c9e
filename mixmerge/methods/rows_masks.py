"""Rows of the methods that say of every entry which experts count: by competition, by masks, by the largest."""

from __future__ import annotations

from mixmerge.methods.parameters import choice, kept, merged_by, number, one_task, whole
from mixmerge.methods.records import ANY, Method

_MASK_LAMBDA = number(
    "mask_lambda", 0.6, "the larger, the fewer entries an expert's mask keeps", 0.0, per="expert"
)
_MULTI = choice(
    "multi",
    "sum",
    "the delta of all experts: their sum, or TIES of whole deltas",
    "sum",
    "ties",
    constant=True,
)
_TRIM = kept(0.2, "share of each whole delta that multi: ties keeps", constant=True)
_TALL = "Localizing Task Information (TALL masks), arXiv:2405.07813"

ROWS = (
    Method(
        name="pcb",
        function="mixmerge.methods.pcb:pcb",
        takes="deltas",
        parameters=(
            number("weight", 1.2, "factor on each delta", per="expert"),
            kept(0.05, "share of each whole delta that counts", constant=True),
            choice(
                "inter",
                "norm",
                "how experts agree: vision code, language code, pairs, or the paper's formula",
                *("norm", "prod", "pairwise", "softmax"),
                constant=True,
            ),
            number("clamp", 0.01, "share of magnitudes clamped at either end", 0.0, 0.5, constant=True),
        ),
        base="required",
        inputs=(1, 80),  # exp(T) has to be a float32
        summary="average each entry, weighted by how much it matters and how well the experts agree",
        paper="PCB-Merging, arXiv:2410.02396",
        differentiable=False,
        streams=True,
        sketch="mixmerge.methods.pcb:PcbSketch",
        footprint="mixmerge.methods.footprint:pcb",
    ),
    Method(
        name="emr",
        function="mixmerge.methods.emr:emr",
        takes="deltas",
        parameters=(
            one_task(),
            choice(
                "rescaler",
                "sums",
                "the size restored: of the whole delta, or of tensors' means (code)",
                *("sums", "means"),
                constant=True,
            ),
            merged_by(1.0),
        ),
        base="required",
        inputs=(1, ANY),
        summary="one task's model: its entries of the unified delta, rescaled",
        paper="EMR-Merging, arXiv:2405.17461",
        differentiable=False,
        streams=True,
        sketch="mixmerge.methods.emr:EmrSketch",
        footprint="mixmerge.methods.footprint:emr",
        masks="mixmerge.methods.emr:emr_masks",
    ),
    Method(
        name="tall",
        function="mixmerge.methods.tall:tall",
        takes="deltas",
        parameters=(one_task(), _MASK_LAMBDA, _MULTI, _TRIM, merged_by(1.0)),
        base="required",
        inputs=(1, ANY),
        summary="one task's model: the entries of all experts' delta that it needs",
        paper=_TALL,
        streams=True,
        sketch="mixmerge.methods.tall:TrimSketch",
        footprint="mixmerge.methods.footprint:tall",
        masks="mixmerge.methods.tall:tall_masks",
    ),
    Method(
        name="consensus",
        function="mixmerge.methods.tall:consensus",
        takes="deltas",
        parameters=(
            _MASK_LAMBDA,
            whole("least", 2, "how many experts must need an entry"),
            _MULTI,
            _TRIM,
            merged_by(0.3),
        ),
        base="required",
        inputs=(2, ANY),
        summary="a sum of deltas without the entries that too few experts need",
        paper=_TALL,
        streams=True,
        sketch="mixmerge.methods.tall:TrimSketch",
        footprint="mixmerge.methods.footprint:tall",
    ),
    Method(
        name="magmax",
        function="mixmerge.methods.magmax:magmax",
        takes="deltas",
        parameters=(
            number("weight", 1.0, "factor on what is taken from each delta", per="expert"),
            merged_by(0.5),
        ),
        base="required",
        inputs=(1, ANY),
        summary="of each entry, the largest change any expert made",
        paper="MagMax, arXiv:2407.06322",
        streams=True,
        footprint="mixmerge.methods.footprint:magmax",
    ),
)
