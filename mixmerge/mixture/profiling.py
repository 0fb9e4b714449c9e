"""Outcomes from running: every expert answers every labelled query, and a check says what the answers are worth.

Q queries, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mixmerge.aggregate import Ask, Composition, Question, Said, Settled
from mixmerge.aggregate.bench import Answered
from mixmerge.aggregate.extraction import extractor
from mixmerge.batch.costs import Report
from mixmerge.batch.job import Job, Progress
from mixmerge.batch.lines import Input, Line
from mixmerge.batch.records import Item
from mixmerge.batch.setup import Conditions, Setup, Source
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.decision.records import Decision, Pick, Query
from mixmerge.errors import Fault, MixmergeError
from mixmerge.experts import ExpertSet, identity
from mixmerge.mixture.answering import defaults_of, expert_set
from mixmerge.mixture.schema import MixtureSpec
from mixmerge.outcomes.table import OutcomeTable, Price

Check = Callable[[str, str], float]  # (an answer, the reference) -> score
REFERENCE = "answer"  # field of a task that holds the reference


@dataclass(frozen=True)
class Everyone(Composition):
    """Every expert is asked, and nothing is made of it.

    Args:
        names: of the experts.
        draws: answers of each, 1 or more; with more than 1 they need a temperature above 0.
        temperature: of the answers; None: the mixture's.
    """

    names: tuple[str, ...]
    draws: int = 1
    temperature: float | None = None

    def first(self, question: Question) -> tuple[Ask, ...]:
        return tuple(
            Ask(name, draw, temperature=self.temperature) for name in self.names for draw in range(self.draws)
        )

    def then(self, question: Question, said: Sequence[Sequence[Said]]) -> tuple[Ask, ...] | Settled:
        return Settled("", None, None)


@dataclass(frozen=True)
class Profile:
    """What every expert made of the queries, and what that took; ``answered`` where the texts were asked for."""

    outcomes: OutcomeTable
    report: Report
    answered: tuple[Answered, ...] = ()


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
    texts: bool = False,
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
        texts: keep what was said, for ``mixture.aggregators.bench``.
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
        said = _said(job, reference) if texts else ()
        return Profile(_table(job, experts, check, reference, draws), job.report(), said)


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


def everyone(
    spec: MixtureSpec, experts: ExpertSet, *, draws: int = 1, temperature: float | None = None
) -> Setup:
    """What answers a job in which all experts are asked everything."""
    composition = Everyone(experts.names, draws, temperature)

    def route(queries: Sequence[Query]) -> Sequence[Decision]:
        picks = tuple(Pick(name) for name in experts.names)
        return [Decision(one.id, picks, picks[0].expert, {}, "everyone", {}, "") for one in queries]

    about = {
        "experts": {one.name: identity(one) for one in experts},
        "generate": spec.generate.model_dump(mode="json"),
        "draws": composition.draws,
        "temperature": composition.temperature,
    }
    return Setup(experts, composition, route, False, defaults_of(spec), canonical_hash(about))


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
