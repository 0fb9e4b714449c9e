"""The rows a merge may look at: read and checked before any work, and told in the manifest and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.calibrate.rows import Row, read_rows, sample_rows
from mixmerge.errors import Fault, MixmergeError, RecipeError
from mixmerge.plan import Plan


@dataclass(frozen=True)
class Data:
    """The rows of a merge.

    Args:
        rows: of every expert, by its index in ``Plan.models``.
        sources: where they are from.
        transductive: the result may be evaluated on them.
    """

    rows: Mapping[int, tuple[Row, ...]]
    sources: Mapping[int, str]
    transductive: bool

    @property
    def digests(self) -> dict[int, list[str]]:
        return {number: [row.digest for row in rows] for number, rows in self.rows.items()}


def read_data(plan: Plan) -> Data | None:
    """The rows a plan may look at, or None if its method needs none.

    Raises:
        MixmergeError: what is wrong with the data of any expert, all at once.
    """
    asked = plan.recipe.calibration
    if asked is None or not plan.method.needs_data:
        return None
    rows: dict[int, tuple[Row, ...]] = {}
    sources: dict[int, str] = {}
    faults: list[Fault] = []
    read: dict[str, tuple[Row, ...]] = {}
    for number in experts_of(plan):
        ref = plan.models[number].ref
        source = asked.source(ref)
        if source is None:
            faults.append(
                Fault("calibration", f"{ref} has no data", run="Add it to per_expert, or add data: PATH")
            )
            continue
        try:
            if source not in read:
                read[source] = read_rows(source, split=asked.split)
            rows[number] = sample_rows(read[source], asked.max_examples, seed=plan.recipe.seed)
            sources[number] = source
        except MixmergeError as error:
            faults.extend(fault for fault in error.faults if fault not in faults)
    if faults:
        raise RecipeError(faults)
    return Data(rows, sources, asked.transductive)


def experts_of(plan: Plan) -> list[int]:
    """The experts of a plan, in the recipe's order: indices into its models."""
    task = next((task for task in plan.tasks if not task.copied), None)
    return [] if task is None else [source.model for source in task.sources]


def manifest_entry(plan: Plan, data: Data, notes: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of the data: ``rows`` are the digests that an evaluation must not meet again."""
    every = sorted({digest for digests in data.digests.values() for digest in digests})
    return {
        "transductive": data.transductive,
        "experts": {
            str(plan.models[number].ref): {"source": data.sources[number], "rows": len(rows)}
            for number, rows in data.rows.items()
        },
        "notes": list(notes),
        "rows": every,
    }


def card_section(plan: Plan, data: Data) -> str:
    """What the model card says of the data."""
    lines = [
        f"- `{plan.models[number].ref}`: {len(rows)} rows of `{data.sources[number]}`"
        for number, rows in data.rows.items()
    ]
    said = "\n".join(lines)
    warning = (
        "\n**Transductive**: the data above may be what this model is evaluated on, so scores on it are no estimate"
        "\nfor new data.\n"
        if data.transductive
        else ""
    )
    return f"\n## Calibration data\n\n{said}\n{warning}"
