"""Recipe in, model folder out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixmerge import __version__
from mixmerge.checkpoint.files import Files, opened
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.engine.calibrating import Calibrated, GatheringProgress, cache_folder, calibrated, forget
from mixmerge.engine.calibration_data import Data, Part, read_data
from mixmerge.engine.calibration_data import identity as shown
from mixmerge.engine.copying import copy
from mixmerge.engine.finish import add_config, add_record, input_fingerprints, verify
from mixmerge.engine.heads import add_heads
from mixmerge.engine.kernels import Context
from mixmerge.engine.learning import LearningProgress, draw, with_learned
from mixmerge.engine.masks import add_masks, base_alone
from mixmerge.engine.outlook import plan_with_data
from mixmerge.engine.output import Output
from mixmerge.engine.schedule import Job, Schedule
from mixmerge.engine.target import MASKS, check_target
from mixmerge.engine.twin import Banked, add_factors, fitted, measured
from mixmerge.engine.worker import Adapters, Worker, chunk_length
from mixmerge.errors import CheckpointError, DependencyError, Fault, MethodError
from mixmerge.kernels.layout import WIDTHS
from mixmerge.machine import cores
from mixmerge.methods.coefficients import Coefficients
from mixmerge.plan import Plan, Task, fetch
from mixmerge.plan.report import CHUNK
from mixmerge.recipe import ModelRef, Recipe
from mixmerge.registry import find, load

# Beyond this many threads the memory bus, not the cores, is what a merge waits for.
_MOST_THREADS = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Args:
        path: the model folder.
        plan: what was done.
        seconds: from plan to renamed folder.
        resumed: output tensors an earlier, killed run had finished.
        notes: what was found on the way that a person should know.
        learned: the coefficients, if the method learned some in this run or before it was killed.
        bank: what stands beside the shared model, if the method leaves a bank.
        masks: bytes of the masks beside the base, if it is the model of all tasks.
    """

    path: Path
    plan: Plan
    seconds: float
    resumed: int
    notes: tuple[str, ...] = ()
    learned: Coefficients | None = None
    bank: Banked | None = None
    masks: int = 0


def default_threads() -> int:
    """Cores this process may use, within reason."""
    return min(_MOST_THREADS, cores())


def merge(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    kernels: bool = True,
    threads: int | None = None,
    allow_tokenizer_mismatch: bool = False,
    verify_inputs: bool = False,
    progress: Progress | None = None,
    downloading: Progress | None = None,
    learning: LearningProgress | None = None,
    gathering: GatheringProgress | None = None,
) -> Merged:
    """Merge models into a folder that ``from_pretrained`` loads.

    Args:
        recipe: path of a YAML recipe, or the recipe as a mapping.
        out: the folder to make. It appears under this name only when it is whole; a killed merge is gone on
            with by calling again.
        overwrite: replace ``out`` if it is a model folder.
        device: ``cpu``, or a torch device such as ``cuda`` (same results to rounding).
        kernels: use the fused CPU kernels; False takes the plain torch definitions.
        threads: 1 or more; by default the cores this process may use, 16 at most. No result depends on it.
        allow_tokenizer_mismatch: merge rows by id even where tokenizers give an id to different tokens.
        verify_inputs: hash every byte of the inputs into the manifest, not a sample of every tensor.
        progress: called with (bytes written, bytes in all) after every tensor.
        downloading: called with (bytes downloaded, bytes in all), from several threads, where inputs are
            on the Hugging Face hub and not in its cache.
        learning: called with (steps done, steps in all, loss) where coefficients are learned.
        gathering: called with (expert, rows done, rows in all) where statistics of data are gathered.

    Raises:
        RecipeError: anything wrong with recipe, inputs or calibration data, all at once, before any weight is read
            or downloaded; data sets of the hub are read after.
        CheckpointError: an input turned out damaged, or holds NaN or Inf.
        OutputError: the output exists, is being written by another merge, or the disk refused.
    """
    plan, outlook = plan_with_data(recipe, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    plan = fetch_for(plan, Path(out), overwrite=overwrite, device=device, progress=downloading)
    return run(
        plan,
        Path(out),
        overwrite=overwrite,
        device=device,
        kernels=kernels,
        threads=threads,
        verify_inputs=verify_inputs,
        progress=progress,
        learning=learning,
        gathering=gathering,
        parts=None if outlook is None else outlook.parts,
    )


def fetch_for(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Plan:
    """``fetch``, once it is known that ``run`` would take the output and the device."""
    if plan.remote:
        _check_device(device)
        check_target(plan, out, overwrite=overwrite)
    return fetch(plan, progress=progress)


def run(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    kernels: bool = True,
    threads: int | None = None,
    verify_inputs: bool = False,
    progress: Progress | None = None,
    learning: LearningProgress | None = None,
    gathering: GatheringProgress | None = None,
    parts: Mapping[ModelRef, Part] | None = None,
) -> Merged:
    """Carry a plan out; arguments as in ``merge``, and ``parts``, rows an ``Outlook`` has: they are not read again."""
    began = time.perf_counter()
    if plan.remote:
        names = ", ".join(snapshot.name for snapshot in plan.remote)
        what = f"the weights of {names} are still on the hub"
        raise CheckpointError(
            Fault("plan", what, run="Call mixmerge.plan.fetch(plan), and run what it gives")
        )
    _check_device(device)
    count = threads or default_threads()
    if count < 1:
        raise MethodError(Fault("threads", f"is {count}", "1 or more is allowed"))
    check_target(plan, out, overwrite=overwrite)
    stamps = _stamps(plan)
    fingerprints = input_fingerprints(plan, every_byte=verify_inputs)
    data = read_data(plan, parts)
    rows = [] if data is None else [{number: shown(found) for number, found in data.rows.items()}]
    identity = canonical_hash(
        [__version__, plan.hash, plan.text, fingerprints, stamps, device, kernels, *rows]
    )
    fused = kernels and device == "cpu" and bool(plan.method.kernel)
    with Output(plan, out, identity=identity, overwrite=overwrite) as output, opened() as files:
        resumed = len(output.finished)
        found, learned = Calibrated(), None
        if data is not None and plan.method.statistics:
            found = calibrated(
                plan, data, cache_folder(out),
                fingerprints=fingerprints, device=device, progress=gathering,
            )  # fmt: skip
        if data is not None and plan.method.learner:
            plan, learned = with_learned(
                plan, data, output, files,
                device=device, threads=count, fingerprints=fingerprints, progress=learning,
            )  # fmt: skip
            found.notes.extend(learned.warnings)
        if resumed < len(plan.tasks):
            _tensors(
                plan, output, files,
                fused=fused, device=device, threads=count, statistics=found.statistics, progress=progress,
            )  # fmt: skip
        output.flush()
        _check_unchanged(stamps, _stamps(plan))
        add_config(output, plan)
        add_heads(output, plan, files)
        bank = None
        if plan.bank is not None:
            plan, bank = _bank(
                plan, data, output, files, found.notes,
                device=device, fingerprints=fingerprints, gathering=gathering, learning=learning,
            )  # fmt: skip
        add_masks(plan, output, files, device=device, threads=count, progress=gathering)
        add_record(output, plan, fingerprints, data=data, notes=found.notes, bank=bank)
        if learned is not None:
            draw(output, learned)
        verify(output.partial, plan)
        output.publish()
    forget(out)
    masks = sum(path.stat().st_size for path in (out / MASKS).glob("*")) if plan.masks else 0
    return Merged(out, plan, time.perf_counter() - began, resumed, tuple(found.notes), learned, bank, masks)


def _bank(
    plan: Plan,
    data: Data | None,
    output: Output,
    files: Files,
    notes: list[str],
    *,
    device: str,
    fingerprints: Mapping[str, Any],
    gathering: GatheringProgress | None,
    learning: LearningProgress | None,
) -> tuple[Plan, Banked]:
    """Bank and gate beside a shared model that is written."""
    from mixmerge.engine.twin_gate import add_gate, notes_of

    plan, left_out = fitted(plan, output.partial)
    notes.extend(left_out)
    made = add_factors(plan, output, files, fingerprints=fingerprints, progress=gathering)
    gate = None
    if plan.bank is not None and plan.bank.gate is not None and data is not None:
        gate = add_gate(plan, data, output, bank=made, device=device, gathering=gathering, learning=learning)
        notes.extend(notes_of(gate))
    return plan, measured(plan, output.partial, gate)


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise DependencyError(
            Fault("device", f"torch cannot use {device!r} here: {reason}", "cpu is always allowed")
        ) from error


def _stamps(plan: Plan) -> list[tuple[str, int, int]]:
    """Path, size and time of every input file."""
    stamps = []
    for file in (file for model in plan.models for file in model.files):
        try:
            facts = file.stat()
        except OSError as error:
            raise CheckpointError(Fault(str(file), f"cannot be read: {error.strerror}")) from error
        stamps.append((str(file), facts.st_size, facts.st_mtime_ns))
    return stamps


def _check_unchanged(before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]) -> None:
    changed = sorted(name for name, _, _ in set(before) - set(after))
    if changed:
        raise CheckpointError(
            Fault(changed[0], "it was changed during the merge", run="Run the same command again")
        )


def _tensors(
    plan: Plan,
    output: Output,
    files: Files,
    *,
    fused: bool,
    device: str,
    threads: int,
    statistics: Callable[[Task], Mapping[str, Sequence[Any]]] | None = None,
    progress: Progress | None = None,
) -> None:
    from mixmerge.engine.plain import plain

    adapters = Adapters()
    ranked = plan.method.parameter("epsilon") is not None
    tasks = [task for task in plan.tasks if not task.copied]
    whole_model = bool(tasks) and tasks[0].parameters.get("scope") == "model"
    chunked = [task for task in tasks if (fused or whole_model) and not task.wide]
    length = max([CHUNK, *(chunk_length(task, rows_whole=ranked) for task in chunked)])
    workers = [Worker(plan, files, adapters, length) for _ in range(threads if device == "cpu" else 1)]

    def write(task: Task, start: int, data: memoryview) -> None:
        output.write(task, start * WIDTHS.get(task.target.dtype, 8), data)

    cuts = None
    if whole_model:
        from mixmerge.engine.model_scope import model_cuts

        cuts = model_cuts(tasks, workers)
    sketch = None
    if plan.method.sketch and tasks and plan.masks is None:
        from mixmerge.engine.sketching import sketched

        passes = load(plan.method.sketch)()
        sketch = sketched(passes, plan, tasks, workers, files=files, adapters=adapters, device=device)
    context = Context(plan, write, cuts, sketch, statistics)
    written = sum(task.target.nbytes for task in plan.tasks if task.target.name in output.finished)
    total = sum(task.target.nbytes for task in plan.tasks)

    kernel: Callable[[Context, Task], Job] | None = find("kernel", plan.method.kernel) if fused else None

    def job_of(task: Task) -> Job:
        if task.copied:
            return copy(plan, task, files, output)
        if plan.masks is not None:
            return base_alone(context, task, files=files, adapters=adapters, device=device)
        if kernel is not None and not task.wide and not task.chunks:
            return kernel(context, task)
        return plain(context, task, files=files, adapters=adapters, device=device)

    def jobs() -> Iterator[tuple[Job, Callable[[], None]]]:
        nonlocal written
        for task in plan.tasks:
            if task.target.name in output.finished:
                continue

            def done(task: Task = task) -> None:
                nonlocal written
                output.done(task)
                written += task.target.nbytes
                if progress is not None:
                    progress(written, total)

            yield job_of(task), done

    Schedule(jobs(), workers).run()
