"""The rows of the table whose experts read each other, and their controls: each a mixture that is fitted and asked."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging_support.stages import stage, write_json

from latent_support.experts import FIRST, SECOND
from latent_support.suite import LONGEST, OTHER, UNTRAINED, Suite, judged, router, score

LAST = [[0, "last"]]
NEAR = 0.03  # bytes: a token reads what stands where it stands
FIXED = {"kind": "fixed", "primary": SECOND}
LEARNED = {"kind": "learned", "k": 2, "features": 1024, "hidden": [64]}
LONGER = 4 / 3  # of what says a name and its digit: it is two things to learn
ROUTER = "the mixture's own router"  # which learned from outcomes who is right


@dataclass(frozen=True)
class Row:
    """One mixture.

    Args:
        name: in the table.
        mode, chunk, depths: as in a mixture's YAML.
        reach: of the bridges.
        null: whether a token may read nothing.
        route: as in the YAML; ``ROUTER``: there is a router, and both experts are active.
        weights: of the losses on the routing.
        longer: it takes so many times the steps.
        keep: the answering expert is held to what it says of words that mean nothing.
        first, second: folders of the two experts.
        control: it must fail where two experts are needed.
        ablation: it shows what a part is worth, and is not judged.
    """

    name: str
    mode: str = "prompt"
    chunk: int | None = None
    depths: Any = field(default_factory=lambda: LAST)
    reach: float = NEAR
    route: Mapping[str, Any] | str = field(default_factory=lambda: FIXED)
    weights: Mapping[str, float] = field(default_factory=dict)
    longer: float = 1.0
    keep: bool = False
    first: str = FIRST
    second: str = SECOND
    control: bool = False
    ablation: bool = False


ROWS = (
    Row("latent, Mixture of Thoughts' depths", depths=4, reach=8.0),
    Row("latent, Mixture of Thoughts' depths, near", depths=4),
    Row("latent, (0, last)", reach=8.0),
    Row("latent, (0, last), near"),
    Row("latent, every layer reads the last, near", depths=[[depth, "last"] for depth in range(4)]),
    Row("latent, (0, last), near, chunks of 4", mode="chunked", chunk=4),
    Row("latent, (0, last), near, lockstep", mode="lockstep", longer=LONGER, keep=True),
    Row("latent, (0, last), near, own router", route=ROUTER),
    Row(
        "latent, (0, last), near, lockstep, own router",
        mode="lockstep",
        route=ROUTER,
        longer=LONGER,
        keep=True,
    ),
    Row("latent, (0, last), near, learned routing", route=LEARNED),
    Row(
        "latent, learned routing, no auxiliary losses",
        route=LEARNED,
        weights={"entropy": 0.0, "balance": 0.0},
        ablation=True,
    ),
    Row("latent, lockstep, nothing kept", mode="lockstep", longer=LONGER, ablation=True),
    Row("a peer that never learned", first=UNTRAINED, control=True),
    Row("a primary with another table", second=OTHER, control=True),
)
# Half an hour is for three seeds of what is judged: the first one alone has these.
ONCE = {"latent, Mixture of Thoughts' depths, near", "latent, lockstep, nothing kept"}
SHUFFLED_OF = next(row for row in ROWS if row.name == "latent, (0, last), near")
UNMASKED_OF = next(row for row in ROWS if row.depths == 4)


def slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


def mixture(suite: Suite, row: Row, steps: int) -> dict[str, Any]:
    """What a user writes."""
    routed = row.route == ROUTER
    data = "lessons.jsonl" if row.route == FIXED else "lessons-of-both.jsonl"
    route = {} if isinstance(row.route, str) else {"route": dict(row.route)}
    own = {"router": router(suite), "policy": {"kind": "top_k", "k": 2}} if routed else {}
    chunk = {} if row.chunk is None else {"chunk": row.chunk}
    weights = {"weights": dict(row.weights)} if row.weights else {}
    keep = {"keep": str(suite.folder / "keep.jsonl")} if row.keep else {}
    return {
        "experts": {
            FIRST: {"model": suite.expert(row.first)},
            SECOND: {"model": suite.expert(row.second)},
        },
        **own,
        "compose": {
            "kind": "latent",
            "mode": row.mode,
            **chunk,
            "depths": row.depths,
            "bridge": {"width": 64, "heads": 4, "reach": row.reach},
            **route,
            "data": str(suite.folder / data),
            **keep,
            "train": {
                "steps": steps,
                "batch_size": suite.steps.batch,
                "rows_at_once": suite.steps.batch,
                "learning_rate": 3e-3,
                "holdout": 0.05,
                "evaluate_every": max(1, steps // 2),
                **weights,
            },
            "seed": suite.seed,
        },
        "generate": {"max_new_tokens": LONGEST},
    }


def run_row(suite: Suite, row: Row) -> None:
    """Fit a row and ask it the exam; both are kept."""
    told = {"row": vars(row), **suite.made_from}
    stage(suite.folder, f"glue/{slug(row.name)}", told, lambda out: fit_row(suite, row, out))
    stage(suite.folder, f"results/{slug(row.name)}.json", told, lambda out: score_row(suite, row, out))


def fit_row(suite: Suite, row: Row, out: Path) -> None:
    from mixmerge.mixture import read as read_mixture
    from mixmerge.mixture.gluing import fit

    steps = round(row.longer * suite.steps.glue)
    fit(read_mixture(mixture(suite, row, steps)).require(), out, overwrite=True)


def score_row(suite: Suite, row: Row, out: Path) -> None:
    began = time.process_time()
    given = score(suite, suite.folder / "glue" / slug(row.name))
    seconds = time.process_time() - began
    write_json(
        out,
        {
            "name": row.name,
            "control": row.control,
            "right": judged(suite, given),
            "given": given,
            "seconds": seconds,
        },
    )


def glue_parameters(suite: Suite, row: Row) -> int:
    """Of a row that was fitted."""
    from mixmerge.latent.files import load_latent

    return load_latent(suite.folder / "glue" / slug(row.name)).parameters
