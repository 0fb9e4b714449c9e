"""Compose fine-tuned LLMs: merge weights, route queries, let experts interact, answer big batches."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# Public name -> where it lives. Loaded on first use, so that importing mixmerge costs nothing.
_PUBLIC = {
    "merge": "mixmerge.engine.merge:merge",
    "make_plan": "mixmerge.plan:make_plan",
    "merge_state_dicts": "mixmerge.methods.memory:merge_state_dicts",
    "evaluate_models": "mixmerge.evaluate.models:evaluate_models",
    "inspect_models": "mixmerge.inspect:inspect_models",
    "OutcomeTable": "mixmerge.outcomes.table:OutcomeTable",
    "Router": "mixmerge.routers.base:Router",
    "Policy": "mixmerge.decision.policies:Policy",
    "Decision": "mixmerge.decision.records:Decision",
    "Query": "mixmerge.decision.records:Query",
    "Mixture": "mixmerge.mixture:Mixture",
    "DynamicModel": "mixmerge.dynamic.model:DynamicModel",
    "TaskModel": "mixmerge.dynamic.tasks:TaskModel",
    "MixmergeError": "mixmerge.errors:MixmergeError",
}

__all__ = [
    "Decision",
    "DynamicModel",
    "MixmergeError",
    "Mixture",
    "OutcomeTable",
    "Policy",
    "Query",
    "Router",
    "TaskModel",
    "__version__",
    "evaluate_models",
    "inspect_models",
    "make_plan",
    "merge",
    "merge_state_dicts",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mixmerge' has no attribute {name!r}")
    from mixmerge.registry import load

    return load(_PUBLIC[name])


def __dir__() -> list[str]:
    return __all__
