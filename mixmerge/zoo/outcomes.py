"""What every expert of a zoo makes of every held-out question, as outcomes to fit routers on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mixmerge.errors import Fault, MixmergeError, OutputError
from mixmerge.evaluate import Answered, Question, ScoreTable, ask, exact_match, load
from mixmerge.outcomes.table import OutcomeTable
from mixmerge.zoo.spec import Zoo

FILE = "outcomes.jsonl"  # in the zoo's folder


def outcomes(
    zoo: Zoo, *, limit: int | None = None, progress: Callable[[str, int, int], None] | None = None
) -> OutcomeTable:
    """Ask every expert the held-out questions of all tasks; the answers of a whole zoo are kept in its folder.

    The experts are of one size and have no prices. The latency of an answer is its share of its batch's time.

    Args:
        zoo: whose experts and questions.
        limit: at most so many questions of each task, the first ones; 1 or more.
        progress: called with (expert, tasks done, tasks in all).

    Returns:
        Query ids ``TASK-NUMBER``, scores 0 or 1, tokens, seconds, and the column ``task``.

    Raises:
        MixmergeError: ``limit`` is not 1 or more, or the kept file is damaged.
    """
    if limit is not None and limit < 1:
        raise MixmergeError(Fault("--limit", f"is {limit}", "1 or more"))
    kept = zoo.folder / FILE
    if kept.is_file():
        return _first(OutcomeTable.read(kept), limit)
    table = _ask_all(zoo, limit, progress)
    if limit is None:
        with contextlib.suppress(OutputError):  # a zoo on a disk that cannot be written is asked each time
            table.write(kept)
    return table


def scores_by_task(table: OutcomeTable) -> ScoreTable:
    """Mean scores of a zoo's outcomes: experts x tasks."""
    of = np.array(table.column("task"))
    tasks = tuple(dict.fromkeys(of.tolist()))
    scores = {
        expert: {task: float(np.nanmean(table.score[of == task, e])) for task in tasks}
        for e, expert in enumerate(table.experts)
    }
    own = {task: scores[task][task] for task in tasks if task in scores}
    return ScoreTable(tasks, scores, own, {task: int((of == task).sum()) for task in tasks})


def _first(table: OutcomeTable, limit: int | None) -> OutcomeTable:
    if limit is None:
        return table
    return table.rows([i for i, name in enumerate(table.ids) if int(name.rpartition("-")[2]) < limit])


def _ask_all(zoo: Zoo, limit: int | None, progress: Callable[[str, int, int], None] | None) -> OutcomeTable:
    questions = {task: zoo.questions(task)[:limit] for task in zoo.tasks}
    flat = [(task, n, one) for task, some in questions.items() for n, one in enumerate(some)]
    measured = np.stack([_measure(zoo, expert, questions, progress) for expert in zoo.tasks], axis=2)
    score, tokens_in, tokens_out, latency = measured  # (Q, E) each
    return OutcomeTable(
        ids=tuple(f"{task}-{n}" for task, n, _ in flat),
        queries=tuple(one.prompt for _, _, one in flat),
        experts=zoo.tasks,
        score=score,
        tokens_in=tokens_in,
        tokens_out=tokens_out,
        latency=latency,
        metadata={"task": tuple(task for task, _, _ in flat)},
    )


def _measure(
    zoo: Zoo,
    expert: str,
    questions: dict[str, list[Question]],
    progress: Callable[[str, int, int], None] | None,
) -> NDArray[np.float64]:
    """``(4, Q)``: score, tokens of the prompt, tokens of the answer, seconds."""
    answerer = load(str(zoo.expert(expert)))
    columns = []
    for number, some in enumerate(questions.values()):
        columns += _columns(ask(answerer, some), some)
        if progress is not None:
            progress(expert, number + 1, len(questions))
    return np.array(columns, np.float64).T


def _columns(given: Sequence[Answered], questions: Sequence[Question]) -> list[tuple[float, ...]]:
    return [
        (exact_match(one.text, question.answer), one.tokens_in, one.tokens_out, one.seconds)
        for one, question in zip(given, questions, strict=True)
    ]
