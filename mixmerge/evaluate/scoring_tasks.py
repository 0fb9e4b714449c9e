"""One model's scores on tasks: what it is asked, what it gives, what that is worth. Q rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mixmerge.aggregate.extraction import extractor
from mixmerge.data.rows import Row, joined
from mixmerge.engines.base import Engine
from mixmerge.engines.records import Generation, Message, Request, Scoring
from mixmerge.evaluate.metrics import likeliest, program_of, text_metric
from mixmerge.evaluate.sandbox import NOT_STARTED, Limits, run_programs
from mixmerge.evaluate.task_file import EvalTask

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TaskScores:
    """What a model's answers to a task are worth.

    Args:
        scores: ``(Q,)`` in [0, 1], in the order of the rows.
        tokens: generated, or of the choices that were scored, or read by a classifier.
        seconds: that the model took for them; tests of programs do not count.
        given: ``(Q,)`` what it gave, as text.
        notes: what a reader must know.
    """

    scores: Floats
    tokens: int
    seconds: float
    given: tuple[str, ...]
    notes: tuple[str, ...] = field(default=())


def score_task(
    engine: Engine,
    task: EvalTask,
    *,
    adapter: str | None = None,
    limits: Limits | None = None,
    workers: int = 1,
) -> TaskScores:
    """Ask a model a task's questions, greedily, and score what it gives.

    Args:
        engine: it is loaded if it is not.
        task: of any metric but ``accuracy``.
        adapter: the engine's adapter that answers.
        limits: of ``pass@1``'s programs.
        workers: programs that run side by side.

    Raises:
        MixmergeError: a question does not fit into the model's context, or the model cannot be loaded.
        DependencyError: the metric takes a package that is not installed.
    """
    if task.metric.asked == "choices":
        return _choices(engine, task, adapter)
    engine.load()
    requests = [_request(task, row, at, adapter) for at, row in enumerate(task.rows)]
    began = time.perf_counter()
    given = engine.generate(requests)
    seconds = time.perf_counter() - began
    tokens = sum(one.tokens_out for one in given)
    texts = tuple(one.text for one in given)
    if task.metric.asked == "program":
        scores, notes = _programs(task, texts, limits or Limits(), workers)
        return TaskScores(scores, tokens, seconds, texts, notes)
    return TaskScores(_texts(task, texts), tokens, seconds, texts, _cut(task, given))


def _request(task: EvalTask, row: Row, at: int, adapter: str | None) -> Request:
    turns = tuple(Message(role, content) for role, content in row.messages)
    return Request(
        id=f"{task.name}, row {row.id or at + 1}",
        prompt=turns or row.prompt,
        max_new_tokens=task.tokens,
        stop=task.spec.stop,
        adapter=adapter,
    )


def _texts(task: EvalTask, given: Sequence[str]) -> Floats:
    metric = text_metric(task.metric.name)
    expected = [row.answer or "" for row in task.rows]
    if task.spec.extract is None:
        return np.array([metric(one, right) for one, right in zip(given, expected, strict=True)], np.float64)
    extract = extractor(task.spec.extract)
    said = ((extract(one), extract(right)) for one, right in zip(given, expected, strict=True))
    # An answer that says nothing of the kind is wrong, whatever is expected.
    return np.array([one is not None and one == right for one, right in said], np.float64)


def _cut(task: EvalTask, given: Sequence[Generation]) -> tuple[str, ...]:
    cut = sum(one.finish == "length" for one in given)
    if cut * 2 <= len(given):
        return ()
    return (f"{task.name}: {cut:,} of {len(given):,} answers were cut at {task.tokens} tokens",)


def _choices(engine: Engine, task: EvalTask, adapter: str | None) -> TaskScores:
    scorings, owners = [], []
    for at, row in enumerate(task.rows):
        for number, choice in enumerate(row.choices):
            name = f"{task.name}, row {row.id or at + 1}, choice {number}"
            scorings.append(Scoring(name, row.prompt, joined(row.prompt, choice), adapter))
            owners.append(at)
    engine.load()
    began = time.perf_counter()
    found = engine.loglikelihood(scorings)
    seconds = time.perf_counter() - began
    logprobs: list[list[tuple[float, ...]]] = [[] for _ in task.rows]
    for at, one in zip(owners, found, strict=True):
        logprobs[at].append(one.logprobs)
    picks = [likeliest(logprobs[at], row.choices, task.spec.normalise) for at, row in enumerate(task.rows)]
    scores = np.array([pick == row.label for pick, row in zip(picks, task.rows, strict=True)], np.float64)
    given = tuple("" if pick < 0 else row.choices[pick] for pick, row in zip(picks, task.rows, strict=True))
    tokens = sum(len(one.logprobs) for one in found)
    return TaskScores(scores, tokens, seconds, given, no_numbers(task, picks))


def no_numbers(task: EvalTask, picks: Sequence[int]) -> tuple[str, ...]:
    """A note on the picks that are -1: a model whose logits are no numbers is wrong, not the first choice."""
    count = sum(pick < 0 for pick in picks)
    what = f"{task.name}: {count:,} of {len(picks):,} rows count as wrong: the model's logits are no numbers"
    return (what,) if count else ()


def _programs(
    task: EvalTask, given: Sequence[str], limits: Limits, workers: int
) -> tuple[Floats, tuple[str, ...]]:
    programs = []
    for row, text in zip(task.rows, given, strict=True):
        answer = row.prompt + text if task.spec.program == "continue" else program_of(text)
        programs.append(f"{answer}\n\n{row.answer}\n")
    ran = run_programs(programs, limits=limits, workers=workers)
    notes = []
    if lost := sum(one.why == NOT_STARTED for one in ran):
        notes.append(f"{task.name}: {lost:,} of {len(ran):,} programs {NOT_STARTED} and count as wrong")
    if weaker := sorted({name for one in ran if one.why != NOT_STARTED for name in one.weaker}):
        what = f"{task.name}: this system keeps no {', '.join(weaker)} apart; Python refused them instead"
        notes.append(what + ", which a program can break out of")
    return np.array([one.passed for one in ran], np.float64), tuple(notes)
