"""Recipe and headers in, plan out: every tensor of every input accounted for, no tensor data read."""

from __future__ import annotations

from mixmerge.plan.build import make_plan
from mixmerge.plan.fetch import fetch
from mixmerge.plan.model import Dropped, Head, Model, Plan, Shard, Source, Target, Task
from mixmerge.plan.report import as_json, peak_memory

__all__ = [
    "Dropped",
    "Head",
    "Model",
    "Plan",
    "Shard",
    "Source",
    "Target",
    "Task",
    "as_json",
    "fetch",
    "make_plan",
    "peak_memory",
]
