"""Rows of the methods whose result depends on the input: a shared model, and a bank of what each expert has besides."""

from __future__ import annotations

from mixmerge.methods.parameters import choice, number, whole
from mixmerge.methods.records import ANY, Method

DEFAULT_RANK = 16
WIDTHS = (8, 16, 32)

ROWS = (
    Method(
        name="twin",
        function="mixmerge.methods.twin:twin",
        takes="experts",
        parameters=(
            whole("rank", None, f"of every part; {DEFAULT_RANK} where nothing else is asked", 1),
            number("energy", None, "share of each part's squared norm that its rank keeps", 0.0, 1.0),
            number(
                "budget",
                None,
                "parameters of the bank, as a share of the experts'; ranks where they keep most",
                *(0.0, 1.0),
                constant=True,
            ),
            number("bits", None, "of a stored factor: 8, 16 or 32; as the tensor", 8, 32, constant=True),
            choice(
                "tables",
                "factors",
                "what embeddings and heads over a vocabulary get: factors too, or the shared part alone",
                *("factors", "shared"),
            ),
        ),
        base="required",
        inputs=(2, ANY),
        summary="a shared model by any method, and low-rank parts of each expert that a router mixes for each input",
        paper="Twin-Merging, arXiv:2406.15479",
        learner="router",
        bank=True,
    ),
)
