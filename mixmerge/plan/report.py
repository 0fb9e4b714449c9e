"""A plan for people and programs: counts, bytes and memory, as plain data."""

from __future__ import annotations

import math
from typing import Any

from mixmerge.methods.footprint import Sizes, held
from mixmerge.plan.bank import BankPlan
from mixmerge.plan.model import Plan, Task

# Before any tensor, on one Linux machine without a GPU: Python, numpy and the compiled kernels; with torch and its
# optimisers; with transformers.
_INTERPRETER = 300_000_000
_TORCH = 350_000_000
RUNTIME = 450_000_000
CHUNK = 1 << 18
# Blocks of memory up to this size mostly stay with the allocator once they are freed (glibc).
_KEPT_BELOW = 32_000_000


def task_rows(task: Task) -> int:
    """Inputs that are in memory at once for one chunk of a task."""
    return len(task.sources) + (task.base is not None)


def peak_memory(plan: Plan, *, threads: int) -> int:
    """Bytes the process needs at most while it merges on a CPU: an estimate, on the high side.

    Buffers of every thread, masks of the tensors under way, adapters; where a method runs by its definition, what that
    holds of the largest tensors, one for each thread, and as much of smaller ones again for what was freed.
    """
    rows = max((task_rows(task) for task in plan.tasks), default=1)
    per_thread = CHUNK * 4 * (rows + 6)
    masks = max((len(task.sources) * task.target.nbytes // 8 for task in plan.tasks), default=0)
    factors = sum(
        header.nbytes * 2
        for model in plan.models
        for delta in model.deltas.values()
        for header in delta.headers
    )
    whole = [task for task in plan.tasks if _by_definition(plan, task)]
    sizes = {task.target.name: held_bytes(plan, task) for task in whole}
    small = [task for task in whole if 4 * math.prod(task.target.shape) <= _KEPT_BELOW]
    tensors = sum(
        sum(sorted((sizes[task.target.name] for task in tasks), reverse=True)[:threads])
        for tasks in (whole, small)
    )
    runtime = RUNTIME if plan.needs_data else _TORCH if whole else _INTERPRETER
    return runtime + threads * per_thread + masks * plan.method.stochastic + factors + tensors


def _by_definition(plan: Plan, task: Task) -> bool:
    """Whether no kernel merges a tensor, or perhaps none."""
    method = plan.method
    sliced = bool(task.chunks) or task.parameters.get("chunks", 1) != 1
    return not task.copied and (not method.kernel or bool(method.footprint) or task.wide or sliced)


def held_bytes(plan: Plan, task: Task) -> int:
    """Bytes that the method's definition holds of a tensor."""
    return (8 if task.wide else 4) * held(plan.method, sizes_of(plan, task))


def sizes_of(plan: Plan, task: Task) -> Sizes:
    """A task in numbers, as ``mixmerge.methods.footprint`` takes it."""
    return Sizes(task.target.shape, task.role, len(task.sources), task.parameters, _ranks(plan, task))


def _ranks(plan: Plan, task: Task) -> tuple[int, ...]:
    """Of a task whose deltas are all factors, their ranks."""
    ranks = []
    for source in task.sources:
        adapter = source.adapter
        if not plan.method.factors or adapter is None or adapter.a is None:
            return ()
        if not source.delta_only or adapter.kind != "lowrank" or adapter.needs_weight:
            return ()
        ranks.append(adapter.a.shape[0] // adapter.experts)
    return tuple(ranks)


def _bank(plan: Plan, bank: BankPlan) -> dict[str, Any]:
    ranks = [site.most for site in bank.sites]
    return {
        "shared": plan.method.name,
        "experts": list(bank.experts),
        "sites": len(bank.sites),
        "vectors": len(bank.vectors),
        "largest_rank": max(ranks, default=0),
        "bytes_at_most": bank.nbytes,
        "bytes_of_experts": bank.bytes_of_experts,
        "memory": bank_memory(bank),
        "gate": None if bank.gate is None else bank.gate.canonical(),
        "left_out": dict(bank.left_out),
    }


def bank_memory(bank: BankPlan) -> int:
    """Bytes while the parts of the largest matrix are decomposed, the interpreter and torch not counted.

    The part itself and what it is the difference of in float32, the smaller Gram matrix with its eigenvectors and work
    space in float64, and the factors of all experts.
    """
    return max(
        (
            16 * math.prod(site.shape)
            + 32 * site.side**2
            + 8 * len(bank.experts) * site.most * sum(site.shape)
            for site in bank.sites
        ),
        default=0,
    )


def _donors(plan: Plan) -> dict[str, str]:
    """Whose config and tokenizer the output has, and whose head, if it is one expert's."""
    donor = str(plan.models[plan.donor].ref)
    if plan.owner is None:
        return {"config_and_tokenizer_from": donor}
    return {"config_and_head_from": str(plan.models[plan.owner].ref), "tokenizer_from": donor}


def as_json(plan: Plan, *, threads: int) -> dict[str, Any]:
    """Everything a plan says, as JSON data."""
    return {
        "method": plan.made_by.name,
        "hash": plan.hash,
        "models": [
            {
                "model": str(model.ref),
                "tensors": len(model.tensors),
                "adapted": len(model.deltas),
                **model.commits(),
            }
            for model in plan.models
        ],
        "base": None if plan.base is None else str(plan.models[plan.base].ref),
        **_donors(plan),
        "to_download": plan.bytes_to_download,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
        "peak_memory": max(
            peak_memory(plan, threads=threads),
            0 if plan.bank is None else RUNTIME + bank_memory(plan.bank),
        ),
        "shards": [{"file": shard.file, "bytes": shard.nbytes} for shard in plan.shards],
        "tensors": [
            {
                "name": task.target.name,
                "shape": list(task.target.shape),
                "dtype": task.target.dtype,
                "action": "copied" if task.copied else "merged",
                "inputs": [
                    {"model": str(plan.models[source.model].ref), "name": source.tensor.name}
                    for source in (*((task.base,) if task.base else ()), *task.sources)
                ],
                "parameters": task.parameters,
            }
            for task in plan.tasks
        ],
        "dropped": [
            {"model": str(plan.models[drop.model].ref), "name": drop.name, "reason": drop.reason}
            for drop in plan.dropped
        ],
        "heads": [head.expert for head in plan.heads],
        **({} if plan.bank is None else {"bank": _bank(plan, plan.bank)}),
        **({} if plan.masks is None else {"masks": plan.masks.facts()}),
        "warnings": list(plan.warnings),
    }
