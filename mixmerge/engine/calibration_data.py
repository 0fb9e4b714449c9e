"""The rows a merge may look at: read and checked before any work, and told in the manifest and the model card."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.data.rows import Row, digests_of, read_rows, sample_rows
from mixmerge.data.sources import is_of_hub
from mixmerge.errors import Fault, MixmergeError, RecipeError
from mixmerge.plan import Plan
from mixmerge.recipe import Calibration, ModelRef


@dataclass(frozen=True)
class Part:
    """One expert's rows.

    Args:
        source: where they are from.
        rows: that are used.
        there: how many the source has, with those that come twice.
    """

    source: str
    rows: tuple[Row, ...]
    there: int


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


def read_data(plan: Plan, known: Mapping[ModelRef, Part] | None = None) -> Data | None:
    """The rows a plan may look at, or None if neither its method nor a gate needs any.

    Args:
        plan: the plan.
        known: rows of experts that were read for it already.

    Raises:
        MixmergeError: what is wrong with the data of any expert, all at once.
    """
    asked = plan.recipe.calibration
    if asked is None or not plan.needs_data:
        return None
    faults: list[Fault] = []
    refs = {number: plan.models[number].ref for number in experts_of(plan)}
    found = dict(known or {})
    unread = [ref for ref in refs.values() if ref not in found]
    found |= read_parts(asked, unread, plan.recipe.seed, faults)
    if faults:
        raise RecipeError(faults)
    parts = {number: found[ref] for number, ref in refs.items()}
    rows = {number: part.rows for number, part in parts.items()}
    return Data(rows, {number: part.source for number, part in parts.items()}, asked.transductive)


def read_parts(
    asked: Calibration, experts: Sequence[ModelRef], seed: int, faults: list[Fault], *, hub: bool = True
) -> dict[ModelRef, Part]:
    """The rows of each expert that has some.

    Args:
        asked: the block of the recipe.
        experts: of the merge.
        seed: of the recipe.
        faults: gets what is wrong with any of them, each once.
        hub: read data sets of the hub; without, experts that have theirs there are left out.
    """
    read: dict[str, tuple[Row, ...] | None] = {}
    parts: dict[ModelRef, Part] = {}
    for ref in experts:
        source = asked.source(ref)
        if source is None:
            run = "Add it to per_expert, or add data: PATH"
            faults.append(Fault("calibration", f"{ref} has no data", run=run))
            continue
        if source not in read:
            read[source] = None
            try:
                if hub or not is_of_hub(source):
                    read[source] = read_rows(source, split=asked.split)
            except MixmergeError as error:
                faults.extend(fault for fault in error.faults if fault not in faults)
        rows = read[source]
        if rows is not None:
            parts[ref] = Part(source, sample_rows(rows, asked.max_examples, seed=seed), len(rows))
    return parts


def identity(rows: Sequence[Row]) -> str:
    """One hash of rows with all that is in them: their digests leave out answers and roles, which models are shown."""
    return canonical_hash([dataclasses.asdict(row) for row in rows])


def experts_of(plan: Plan) -> list[int]:
    """The experts of a plan, in the recipe's order: indices into its models."""
    task = next((task for task in plan.tasks if not task.copied), None)
    return [] if task is None else [source.model for source in task.sources]


def manifest_entry(plan: Plan, data: Data, notes: Sequence[str]) -> dict[str, Any]:
    """What the manifest says of the data: ``rows`` are what an evaluation must not meet again: ``known_by``."""
    every = digests_of(row for rows in data.rows.values() for row in rows)
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
