"""Outcomes from running: every expert answers every labelled query, and a check says what the answers are worth.

Q queries, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mixmerge.aggregate.bench import AggregatorBench, Answered
from mixmerge.aggregate.extraction import extractor
from mixmerge.batch.costs import Report
from mixmerge.batch.job import Job, Progress
from mixmerge.batch.lines import Input, Line
from mixmerge.batch.records import Item
from mixmerge.batch.setup import Conditions, Source
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts import ExpertSet
from mixmerge.mixture.aggregators import bench
from mixmerge.mixture.answering import expert_set
from mixmerge.mixture.everyone import everyone
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.outcomes.table import OutcomeTable, Price

Check = Callable[[str, str], float]  # (an answer, the reference) -> score
REFERENCE = "answer"  # field of a task that holds the reference


@dataclass(frozen=True)
class Profile:
    """What every expert made of the queries, what that took, and who aggregates best, if that was asked."""

    outcomes: OutcomeTable
    report: Report
    aggregators: AggregatorBench | None = None


def same(extract: str) -> Check:
    """1 where an answer says what the reference does, as read by an extractor of ``mixmerge.aggregate``; else 0."""
    read = extractor(extract)

    def check(answer: str, reference: str) -> float:
        said = read(answer)
        wanted = read(reference)
        return float(said is not None and said == (reference.strip() if wanted is None else wanted))

    return check


def profile(
    spec: MixtureSpec,
    tasks: Path,
    work: Path,
    *,
    check: Check,
    conditions: Conditions | None = None,
    reference: str = REFERENCE,
    draws: int = 1,
    temperature: float | None = None,
    format: str | None = None,
    field: str | None = None,
    aggregators: bool = False,
    progress: Progress | None = None,
) -> Profile:
    """Ask all experts of a mixture all queries of a file, grouped; a call that was killed goes on.

    Args:
        spec: of the mixture, whose router need not be there yet.
        tasks: JSONL or CSV of queries, each with a reference.
        work: folder of the job; it stays, so that more can be asked of it.
        check: (answer, reference) -> score.
        conditions: where it runs.
        reference: field of the file that holds the reference.
        draws: answers of each expert to a query, whose scores are averaged; 1 or more.
        temperature: of the answers; None: the mixture's.
        format: of the file, ``jsonl`` or ``csv``; None to tell.
        field: that holds the text, where it has another name than the usual ones.
        aggregators: measure who makes the best one answer of several too, as a second job beside ``work``.
        progress: told how far it is.

    Raises:
        MixmergeError: queries without a reference, each with its line; lines that are no queries; as ``Job.run``.
    """
    experts = expert_set(spec)
    source = Input.open(tasks, format=format, field=field, experts=experts.names, mixture_name="mixmerge")
    _refuse(source, reference)  # before there is a job that would have to be forgotten
    setup = everyone(spec, experts, draws=draws, temperature=temperature)
    with Job(source, setup, work, conditions, progress=progress) as job:
        job.run()
        said = _said(job, reference) if aggregators else ()
        made = Profile(_table(job, experts, check, reference, draws), job.report())
    if not aggregators:
        return made
    found = bench(spec, said, bench_folder(work), check=check, conditions=conditions, progress=progress)
    return replace(made, aggregators=found)


def bench_folder(work: Path) -> Path:
    """Of the job that measures aggregators."""
    return work.with_name(f"{work.name}.aggregators")


def _said(job: Job, reference: str) -> tuple[Answered, ...]:
    """The first answer of every expert to every query."""
    found = []
    for view in job.replays(range(len(job))):
        first: dict[str, str] = {}
        for one in view.heard():
            if one is not None:
                first.setdefault(one["expert"], one["text"])
        found.append(Answered(view.item.id, view.item.text, view.item.metadata[reference], first))
    return tuple(found)


def _refuse(source: Source, reference: str) -> None:
    """All lines that cannot be profiled, at once."""
    faults = []
    for line in source.scan():
        fault = _wrong(line, reference)
        if fault is not None:
            faults.append(fault)
    if faults:
        shown = faults[:20]
        more = [Fault("tasks", f"and {len(faults) - 20:,} more faults")] if len(faults) > 20 else []
        raise MixmergeError([*shown, *more])


def _wrong(line: Line, reference: str) -> Fault | None:
    if line.item is None:
        return line.fault
    if not line.item.metadata.get(reference, "").strip():
        return Fault(
            f"line {line.number}: {reference}", "is missing", "The reference answer", "--reference NAME"
        )
    return None


def _table(job: Job, experts: ExpertSet, check: Check, reference: str, draws: int) -> OutcomeTable:
    shape = (len(job), len(experts))
    score, tokens_in, tokens_out = (np.full(shape, np.nan) for _ in range(3))
    items: list[Item] = []
    for row, view in enumerate(job.replays(range(len(job)))):
        items.append(view.item)
        wanted = view.item.metadata[reference]
        heard = [one for one in view.heard() if one is not None]
        for e, name in enumerate(experts.names):
            mine = [one for one in heard if one["expert"] == name]
            if len(mine) < draws:
                continue  # an expert that could not answer has no outcome
            score[row, e] = np.mean([check(one["text"], wanted) for one in mine])
            tokens_in[row, e] = np.mean([one["tokens_in"] for one in mine])
            tokens_out[row, e] = np.mean([one["tokens_out"] for one in mine])
    columns = sorted({name for item in items for name in item.metadata} - {reference})
    prices: dict[str, Price] = {one.name: one.price for one in experts if one.price is not None}
    return OutcomeTable(
        ids=tuple(item.id for item in items),
        queries=tuple(item.text for item in items),
        experts=experts.names,
        score=score,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        metadata={name: tuple(item.metadata.get(name, "") for item in items) for name in columns},
        prices=prices,
    )
