"""Scores of models on a zoo's held-out questions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

from mixmerge.errors import MixmergeError
from mixmerge.evaluate import ScoreTable, grade, load
from mixmerge.zoo.spec import Zoo, unknown_tasks


def built_scores(zoo: Zoo) -> ScoreTable:
    """Base and experts as they were measured when the zoo was built."""
    right = zoo.manifest["right"]
    scores = {
        model: {task: row[task].count("1") / len(row[task]) for task in zoo.tasks}
        for model, row in right.items()
    }
    own = {task: scores[task][task] for task in zoo.tasks}
    return ScoreTable(zoo.tasks, scores, own, {task: len(right[task][task]) for task in zoo.tasks})


def score_models(
    zoo: Zoo,
    models: Mapping[str, str],
    *,
    tasks: tuple[str, ...] | None = None,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ScoreTable:
    """Ask models held-out questions.

    Args:
        zoo: whose questions; its experts' scores on the same questions are what is retained or lost.
        models: name in the table -> folder, hub id or ``BASE+ADAPTER``.
        tasks: all of the zoo's by default.
        limit: at most so many questions of each task, the first ones; 1 or more.
        progress: called with (model, tasks done, tasks in all).

    Raises:
        MixmergeError: an unknown task, or a model that does not load.
    """
    tasks = tasks or zoo.tasks
    faults = unknown_tasks(tasks, zoo.tasks)
    if faults:
        raise MixmergeError(faults)
    questions = {task: zoo.questions(task)[:limit] for task in tasks}
    scores: dict[str, dict[str, float]] = {}
    for name, model in models.items():
        answerer = load(model)
        scores[name] = {}
        for number, task in enumerate(tasks):
            scores[name][task] = statistics.fmean(grade(answerer, questions[task]))
            if progress is not None:
                progress(name, number + 1, len(tasks))
    own = {task: zoo.expert_score(task, limit) for task in tasks}
    return ScoreTable(tasks, scores, own, {task: len(found) for task, found in questions.items()})
