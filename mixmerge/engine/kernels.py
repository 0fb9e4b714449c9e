"""The fused CPU form of every method that has one: a job per tensor, made of passes over its chunks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mixmerge.engine.cuts import LOOSE, Cut, order_statistics
from mixmerge.engine.schedule import Job, Pass
from mixmerge.engine.worker import Worker, chunk_length, chunks, inputs_of
from mixmerge.errors import CheckpointError, Fault
from mixmerge.kernels import loops
from mixmerge.kernels.layout import CODES, KEEP_ALL, KEEP_BITS, KEEP_CUT, WIDTHS, rank_words
from mixmerge.kernels.philox import Draw
from mixmerge.plan import Plan, Task

# Below this an L1 norm or a sum of weights is taken for zero, as the definitions do.
TINY_L1, ZERO_SUM, ZERO_NORM, COLLINEAR = 1e-7, 1e-8, 1e-8, 0.9995
_INF = 0x7F800000


@dataclass(frozen=True)
class Context:
    """What jobs need besides their task.

    Args:
        plan: the plan.
        write: writes the first bytes of a worker's ``out`` at an element of a task's target.
        cuts: per task, for methods whose thresholds are of the whole model.
        sketch: what the method's sketch found in the whole model.
        statistics: of a task, the statistics of calibration data: by their names, one tensor for each expert.
    """

    plan: Plan
    write: Callable[[Task, int, memoryview], None]
    cuts: dict[str, list[Cut]] | None = None
    sketch: Any = None
    statistics: Callable[[Task], Mapping[str, Sequence[Any]]] | None = None


def _numbers(task: Task, name: str) -> list[float]:
    values = task.parameters[name]
    if not isinstance(values, tuple):
        raise TypeError(f"{name} is not a parameter per input")
    return [math.nan if value is None else float(value) for value in values]


def _one(task: Task, name: str, default: float = 0.0) -> float:
    value = task.parameters.get(name, default)
    return default if value is None or isinstance(value, tuple | str) else float(value)


def _added(values: list[float]) -> float:
    # One by one, as the definitions do: sum() compensates from Python 3.12 on.
    total = 0.0
    for value in values:
        total += value
    return total


def _finish(context: Context, worker: Worker, task: Task, start: int, stop: int) -> None:
    """Refuse what is not finite, then write."""
    inputs = inputs_of(task)
    seen = worker.seen[: len(inputs) + 1]
    if seen.max() >= _INF:
        _refuse(context.plan, worker, task, start, stop)
    width = WIDTHS[task.target.dtype]
    context.write(task, start, worker.out.data[: (stop - start) * width])


def _refuse(plan: Plan, worker: Worker, task: Task, start: int, stop: int) -> None:
    inputs = inputs_of(task)
    worker.load(task, start, stop)  # what a method made of them in place is not what the files hold
    values = np.empty(stop - start, np.float32)
    for row, source in enumerate(inputs):
        loops.decode(worker.codes[row], worker.raw[row], 0, values)
        if not np.isfinite(values).all():
            at = start + int(np.flatnonzero(~np.isfinite(values))[0])
            raise CheckpointError(
                Fault(
                    str(plan.models[source.model].ref),
                    f"tensor {source.tensor.name!r} has {values[at - start]} at element {at:,} of its data",
                    run=f"The model is broken; its file is {source.tensor.file}",
                )
            )
    raise CheckpointError(
        Fault(
            f"tensor {task.target.name!r}",
            f"the merged values do not fit {task.target.dtype}",
            run="Set out_dtype: bfloat16 or float32, or smaller weights",
        )
    )


def _linear_pass(context: Context, task: Task, factors: NDArray[np.float32], length: int) -> Pass:
    code = CODES[task.target.dtype]

    def run(worker: Worker, number: int, start: int, stop: int) -> None:
        worker.load(task, start, stop)
        count = len(factors)
        worker.seen[: count + 1] = 0
        loops.linear_chunk(
            worker.raw[:count], worker.codes[:count], stop - start, factors, worker.out, code,
            worker.scratch, worker.seen,
        )  # fmt: skip
        _finish(context, worker, task, start, stop)

    return Pass(run, chunks(task, length))


def linear(context: Context, task: Task) -> Job:
    """``mixmerge.methods.average:linear`` and ``passthrough``: one pass."""
    if "scale" in task.parameters:
        weights = [1.0 if math.isnan(scale) else scale for scale in _numbers(task, "scale")]
    else:
        weights = _numbers(task, "weight")
        if _one(task, "normalize"):
            total = _added(weights)
            weights = [weight / total for weight in weights]
    yield _linear_pass(context, task, np.array(weights, np.float32), chunk_length(task, rows_whole=False))


def slerp(context: Context, task: Task) -> Job:
    """``mixmerge.methods.average:slerp``: one pass for the angle, one to write."""
    length = chunk_length(task, rows_whole=False)

    def products(worker: Worker, number: int, start: int, stop: int) -> tuple[float, float, float]:
        worker.load(task, start, stop)
        sums = np.empty(3)
        loops.products_chunk(
            worker.raw[:2], worker.codes[:2], stop - start, worker.scratch, worker.lanes, sums
        )
        aa, bb, ab = map(float, sums)
        return aa, bb, ab

    parts = yield Pass(products, chunks(task, length))
    aa, bb, ab = (sum(part[i] for part in parts) for i in range(3))
    of_base, of_expert = _arc(aa, bb, ab, _one(task, "t"))
    yield _linear_pass(context, task, np.array([of_base, of_expert], np.float32), length)


def _arc(aa: float, bb: float, ab: float, t: float) -> tuple[float, float]:
    lengths = [norm if norm > ZERO_NORM else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    cosine = ab / (lengths[0] * lengths[1])
    # A NaN or Inf in the inputs lands here as NaN; the pass that writes finds and names it.
    if not abs(cosine) <= COLLINEAR:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@dataclass
class _Deltas:
    """How the deltas of one task are sparsified; filled in by the passes before the last."""

    keep: NDArray[np.int64]
    cuts: NDArray[np.int64]
    factors: NDArray[np.float32]
    masks: NDArray[np.uint8]


def task_vectors(context: Context, task: Task) -> Job:
    """``mixmerge.methods.task_vectors``: thresholds or masks, then norms if asked, then one pass to write."""
    count, method = len(task.sources), context.plan.method
    ranked = method.parameter("epsilon") is not None
    length = chunk_length(task, rows_whole=ranked)
    pieces = chunks(task, length)
    inverse = task.parameters.get("rescale_by") == "inverse_p" and bool(task.parameters.get("rescale"))
    state = _Deltas(
        np.zeros(count, np.int64),
        np.tile(np.array(LOOSE, np.int64), (count, 1)),
        np.ones(count, np.float32),
        np.zeros((1, count, 1), np.uint8),
    )
    prepare = None
    if method.stochastic and ranked and inverse:
        prepare = _inverse_ranked(context, task)
    elif method.stochastic:
        yield from _draw_masks(context, task, state, pieces, length)
        if inverse:
            densities = _numbers(task, "density")
            state.factors[:] = [1 / density if density else 1.0 for density in densities]
    elif method.parameter("density") is not None:
        yield from _find_cuts(context, task, state, pieces)
        if task.parameters.get("rescale"):
            yield from _restore_norms(task, state, pieces)
    yield _combine_pass(context, task, state, pieces, prepare)


def _combine_pass(
    context: Context,
    task: Task,
    state: _Deltas,
    pieces: list[tuple[int, int]],
    prepare: Callable[[Worker, int, int], None] | None,
) -> Pass:
    count, code = len(task.sources), CODES[task.target.dtype]
    weights = np.array(_numbers(task, "weight"), np.float32)
    total = _added(_numbers(task, "weight"))
    divisor = np.float32(total if abs(total) >= ZERO_SUM else 1.0)
    elect = "agg" in task.parameters
    normalize, scale = bool(task.parameters["normalize"]), np.float32(_one(task, "lambda", 1.0))

    def run(worker: Worker, number: int, start: int, stop: int) -> None:
        worker.load(task, start, stop)
        worker.seen[: count + 2] = 0
        if prepare is not None:
            prepare(worker, start, stop)
        masks = state.masks[min(number, len(state.masks) - 1)]
        loops.combine_chunk(
            worker.raw[: count + 1], worker.codes[: count + 1], worker.direct[: count + 1], stop - start, start,
            weights, state.factors, state.keep, state.cuts, masks, elect, normalize, divisor, scale,
            worker.out, code, worker.scratch, worker.seen,
        )  # fmt: skip
        _finish(context, worker, task, start, stop)

    return Pass(run, pieces)


def _find_cuts(context: Context, task: Task, state: _Deltas, pieces: list[tuple[int, int]]) -> Job:
    elements, count = math.prod(task.target.shape), len(task.sources)
    if context.cuts is not None:
        cuts = context.cuts[task.target.name]
    else:
        density = _numbers(task, "density")
        gamma = _numbers(task, "gamma") if "gamma" in task.parameters else [0.0] * count
        wanted = [band(elements, density[k], gamma[k]) for k in range(count)]
        cuts = yield from order_statistics(task, wanted, pieces)
    for k, cut in enumerate(cuts):
        state.cuts[k] = cut
        state.keep[k] = KEEP_ALL if cut == LOOSE else KEEP_CUT


def band(elements: int, density: float, gamma: float) -> tuple[int, int]:
    """(how many of the largest are dropped, how many of the next are kept)."""
    kept = min(elements, max(1, int(density * elements))) if density > 0 else 0
    bottom = max(0, elements - kept - int(gamma * elements))
    return elements - bottom - kept, kept


def _restored(every: float, kept: float) -> np.float32:
    # Not finite: an input is not, and the pass that writes its chunk, no other, has to say so.
    usable = TINY_L1 <= every < math.inf and TINY_L1 <= kept < math.inf
    return np.float32(every / kept if usable else 1.0)


def _restore_norms(task: Task, state: _Deltas, pieces: list[tuple[int, int]]) -> Job:
    count = len(task.sources)

    def norms(worker: Worker, number: int, start: int, stop: int) -> NDArray[np.float64]:
        worker.load(task, start, stop)
        sums = np.empty((count, 2))
        for k in range(count):
            loops.magnitudes_chunk(
                worker.raw, worker.codes, worker.direct, stop - start, start, k + 1, state.keep[k],
                state.cuts[k], state.masks[0, 0], worker.scratch, worker.lanes, sums[k],
            )  # fmt: skip
        return sums

    parts = yield Pass(norms, pieces)
    state.factors[:] = _factors(parts, count)


def _factors(parts: list[NDArray[np.float64]], experts: int) -> list[np.float32]:
    """What restores the norm of each expert, from its (every, kept) in every chunk."""
    total = np.zeros((experts, 2))
    for part in parts:
        total += part
    return [_restored(float(every), float(kept)) for every, kept in total]


def _stream(plan: Plan, task: Task, expert: int) -> NDArray[np.uint32]:
    draw = Draw(plan.recipe.seed, task.target.name)
    return np.array([*draw.key, expert, *draw.name_words], np.uint32)


def _chance(task: Task, k: int) -> tuple[int, float, float]:
    """(row length or 0, density, epsilon) of one expert's keep-probabilities."""
    density = _numbers(task, "density")[k]
    if "epsilon" not in task.parameters:
        return 0, density, 0.0
    row = task.target.shape[-1] if task.target.shape else 1
    return row, density, min(_numbers(task, "epsilon")[k], density, 1 - density)


def _draw_masks(
    context: Context, task: Task, state: _Deltas, pieces: list[tuple[int, int]], length: int
) -> Job:
    count = len(task.sources)
    chances = [_chance(task, k) for k in range(count)]
    drawn = [k for k in range(count) if chances[k][1] < 1.0]
    if not drawn:
        return
    state.masks = np.zeros((max(1, len(pieces)), count, (length + 7) // 8 + 1), np.uint8)
    streams = [_stream(context.plan, task, k) for k in range(count)]
    state.keep[drawn] = KEEP_BITS
    row = max(row for row, _, _ in chances)

    def draw(worker: Worker, number: int, start: int, stop: int) -> NDArray[np.float64]:
        worker.load(task, start, stop)
        draws = worker.extra("draws", (worker.length,), np.uint32)
        keep = worker.extra("keep", (worker.length,), np.uint8)
        ranks, sums = worker.extra("ranks", (rank_words(row),), np.uint32), np.empty((len(drawn), 2))
        for at, k in enumerate(drawn):
            _, density, epsilon = chances[k]
            loops.mask_chunk(
                worker.raw, worker.codes, worker.direct, stop - start, start, row, k + 1, streams[k],
                density, epsilon, state.masks[number, k], worker.values, draws, keep, worker.scratch[0],
                worker.words, ranks, worker.lanes, sums[at],
            )  # fmt: skip
        return sums

    parts = yield Pass(draw, pieces)
    if task.parameters["rescale"] and task.parameters["rescale_by"] == "l1":
        state.factors[drawn] = _factors(parts, len(drawn))


def _inverse_ranked(context: Context, task: Task) -> Callable[[Worker, int, int], None]:
    """Each entry over its own probability: the rows are made in place, as deltas, before they are combined."""
    count = len(task.sources)
    streams = [_stream(context.plan, task, k) for k in range(count)]

    def prepare(worker: Worker, start: int, stop: int) -> None:
        draws = worker.extra("draws", (worker.length,), np.uint32)
        keep = worker.extra("keep", (worker.length,), np.uint8)
        for k in range(count):
            row, density, epsilon = _chance(task, k)
            ranks = worker.extra("ranks", (rank_words(row),), np.uint32)
            loops.inverse_chunk(
                worker.raw, worker.codes, worker.direct, stop - start, start, row, k + 1, streams[k],
                density, epsilon, draws, keep, worker.scratch[0], worker.words, ranks, worker.values,
            )  # fmt: skip
            worker.raw[k + 1].view(np.float32)[: stop - start] = worker.values[: stop - start]
            worker.codes[k + 1], worker.direct[k + 1] = CODES["F32"], True
        worker.loaded = None

    return prepare


KERNELS: dict[str, Callable[[Context, Task], Job]] = {
    "linear": linear,
    "slerp": slerp,
    "task_vectors": task_vectors,
}
