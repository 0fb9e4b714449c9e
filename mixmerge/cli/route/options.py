"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Outcomes = Annotated[
    Path, typer.Argument(metavar="OUTCOMES", help="A table of outcomes.", show_default=False)
]
RouterDir = Annotated[
    Path, typer.Argument(metavar="ROUTER_DIR", help="A fitted router's folder.", show_default=False)
]
Data = Annotated[Path, typer.Option("--data", help="A table of outcomes.", show_default=False)]
Kind = Annotated[
    str | None,
    typer.Option("--kind", help="Format of the outcomes; by default found by content.", show_default=False),
]
Prices = Annotated[
    Path | None,
    typer.Option("--prices", help="JSON or YAML: {expert: {input, output, size}}.", show_default=False),
]
OutputTokens = Annotated[
    float | None,
    typer.Option(
        "--output-tokens",
        min=0,
        help="Of an answer, to estimate costs from prices where there are no tokens; else 256.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]
PolicyText = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="KIND or KIND(NAME=VALUE, ...), as decisions print it: 'lower_bound(z=2)'.",
        show_default=False,
    ),
]
TopK = Annotated[int | None, typer.Option("--top-k", help="So many experts answer.", show_default=False)]
Budget = Annotated[
    float | None, typer.Option("--budget", help="Mean dollars a query, as calibrated.", show_default=False)
]
Pay = Annotated[
    float | None,
    typer.Option("--willingness-to-pay", help="Dollars for one more point of score.", show_default=False),
]
Fallback = Annotated[
    str | None, typer.Option("--fallback", help="Expert that answers instead of nobody.", show_default=False)
]
AbstainBelow = Annotated[
    float | None,
    typer.Option("--abstain-below", help="Expected score below which nobody is picked.", show_default=False),
]
Meta = Annotated[
    list[str] | None,
    typer.Option(
        "--meta", metavar="NAME=VALUE", help="Label of the prompt, such as task=sums.", show_default=False
    ),
]
Unseen = Annotated[bool, typer.Option("--unseen", help="Leave out queries that were fitted on.")]
AllowTrained = Annotated[bool, typer.Option("--allow-trained", help="Use them too; the result says so.")]
