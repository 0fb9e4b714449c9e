"""Tiny real experts, trained here in about a minute: one base, and an expert for each of a few tasks.

The base has learned generic text and how each task is done, but then to answer carelessly most of the time;
an expert is the base after careful training on one task, with a replay of what the base saw. So the experts
differ by small deltas, each is good at one thing, and merging them is worth trying.
"""

from __future__ import annotations

from mixmerge.zoo.build import build, copy_to, find
from mixmerge.zoo.families import FAMILIES
from mixmerge.zoo.outcomes import outcomes
from mixmerge.zoo.scores import built_scores, score_models
from mixmerge.zoo.spec import Spec, Zoo
from mixmerge.zoo.tasks import TASKS

__all__ = [
    "FAMILIES",
    "TASKS",
    "Spec",
    "Zoo",
    "build",
    "built_scores",
    "copy_to",
    "find",
    "outcomes",
    "score_models",
]
