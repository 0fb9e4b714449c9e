"""Evaluation: of models by their answers (``answering``), and of routers by outcomes (``routing``, ``report``)."""

from __future__ import annotations

from mixmerge.evaluate.answering import (
    Answered,
    Answerer,
    Metric,
    Question,
    ScoreTable,
    answered,
    answers,
    ask,
    exact_match,
    grade,
    load,
)

__all__ = [
    "Answered",
    "Answerer",
    "Metric",
    "Question",
    "ScoreTable",
    "answered",
    "answers",
    "ask",
    "exact_match",
    "grade",
    "load",
]
