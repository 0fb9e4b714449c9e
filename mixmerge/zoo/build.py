"""Building a zoo: questions here, training in one-thread processes, the whole placed in the cache at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mixmerge.errors import Fault, OutputError
from mixmerge.machine import cores
from mixmerge.zoo.choices import with_choices, write_choices
from mixmerge.zoo.spec import MANIFEST, Spec, Zoo, cache_folder, key, versions, write_questions
from mixmerge.zoo.tasks import TASKS

Progress = Callable[[str, int, int], None]  # (part, steps done, steps in all)
Right = dict[str, dict[str, str]]  # model -> task -> for each held-out question 1 if it was answered right
_TRAIN = 12_000
_HELD_OUT = 250
_CHOICES = 200
# One thread each, whatever the machine: a second one would change how sums are split, and so the bytes.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
}


def build(spec: Spec | None = None, *, progress: Progress | None = None) -> Zoo:
    """The zoo of this specification: from the cache, or trained now, in about a minute on two cores.

    Args:
        spec: what to build; the full zoo by default.
        progress: called with (part, steps done, steps in all), from several threads.

    Raises:
        DependencyError: reasoning-gym is not installed.
        OutputError: the cache cannot be written.
    """
    spec = spec or Spec()
    target = cache_folder(spec)
    if not (target / MANIFEST).exists():
        with _placed(target) as folder:
            _fill(folder, spec, progress or (lambda part, done, steps: None))
    return Zoo.open(target)


def find(spec: Spec | None = None) -> Zoo:
    """The zoo of this specification, if it has been built.

    Raises:
        CheckpointError: it has not.
    """
    return Zoo.open(cache_folder(spec or Spec()))


def copy_to(zoo: Zoo, folder: Path) -> Zoo:
    """A copy of a zoo, placed at once. The same zoo already there is left as it is.

    Raises:
        OutputError: something else is there, or it cannot be written.
    """
    if (folder / MANIFEST).exists() and Zoo.open(folder).manifest == zoo.manifest:
        return Zoo.open(folder)
    if folder.exists():
        raise OutputError(
            Fault(str(folder), "it exists, and is not this zoo", run="Name a new folder, or remove this one")
        )
    with _placed(folder) as partial:
        # A hidden file is one that another process is writing (``outcomes``): it may be gone when it is copied.
        hidden = shutil.ignore_patterns(".*")
        shutil.copytree(zoo.folder, partial, dirs_exist_ok=True, ignore=hidden)
    return Zoo.open(folder)


@contextmanager
def _placed(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, renamed to it at the end; removed if anything fails before."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise OutputError(Fault(str(target), f"cannot write there: {error.strerror}")) from error
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it for its owner alone
        try:
            partial.rename(target)
        except OSError:
            if not (target / MANIFEST).exists():  # another process may have built the same zoo meanwhile
                raise
    except OSError as error:
        raise OutputError(Fault(str(target), f"cannot write there: {error.strerror}")) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(folder: Path, spec: Spec, progress: Progress) -> None:
    for task in spec.tasks:
        train, held_out = TASKS[task].split(
            spec.seed, spec.count(_TRAIN, least=100), spec.count(_HELD_OUT, least=20)
        )
        both = {question.prompt for question in train} & {question.prompt for question in held_out}
        if both:
            raise RuntimeError(f"{task}: {len(both)} held-out questions would be trained on")
        write_questions(folder, task, "train", train)
        write_questions(folder, task, "heldout", held_out)
        write_choices(folder, task, with_choices(TASKS[task], train[:_CHOICES], spec.seed))
    (folder / "spec.json").write_text(json.dumps(asdict(spec)), encoding="utf-8")
    right = _train(folder, spec, progress)
    (folder / "spec.json").unlink()
    manifest = {
        "key": key(spec),
        "spec": asdict(spec),
        "versions": versions(),
        "tasks": {task: TASKS[task].summary for task in spec.tasks},
        "right": {part: right[part] for part in ("base", *spec.tasks)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _train(folder: Path, spec: Spec, progress: Progress) -> Right:
    """The base, then its experts side by side in as many processes as there are cores; none depends on how."""
    shifts = _shifts(spec, workers=cores())
    base_is_there = threading.Event()
    with ThreadPoolExecutor(len(shifts)) as threads:
        first = threads.submit(_work, folder, ["base", *shifts[0]], progress, base_is_there)
        base_is_there.wait()
        rest = [] if first.done() else shifts[1:]  # it has failed: result() below says why
        works = [first, *(threads.submit(_work, folder, shift, progress) for shift in rest)]
        return {part: right for work in works for part, right in work.result().items()}


def _shifts(spec: Spec, *, workers: int) -> list[list[str]]:
    """Share the experts out, the longest first, each to who has least to do; at least 100 steps for each."""
    steps = {task: spec.expert_steps(task) for task in spec.tasks}
    workers = max(1, min(workers, len(steps), sum(steps.values()) // 100))
    shifts: list[list[str]] = [[] for _ in range(workers)]
    for task in sorted(steps, key=lambda task: -steps[task]):
        min(shifts, key=lambda shift: sum(steps[other] for other in shift)).append(task)
    return shifts


def _work(
    folder: Path, parts: Sequence[str], progress: Progress, base_is_there: threading.Event | None = None
) -> Right:
    """Run a worker until it ends; the event is set when it has made the base, or has failed."""
    command = [sys.executable, "-P", "-m", "mixmerge.zoo.worker", str(folder), *parts]
    right: Right = {}
    base_is_there = base_is_there or threading.Event()
    try:
        with (
            tempfile.TemporaryFile("w+") as log,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | _ONE_THREAD
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                message: dict[str, Any] = json.loads(line)
                if "right" in message:
                    right[message["part"]] = message["right"]
                    base_is_there.set()
                else:
                    progress(message["part"], message["done"], message["steps"])
            if process.wait():
                log.seek(0)
                raise RuntimeError(f"training {', '.join(parts)} failed:\n{log.read()}")
    finally:
        base_is_there.set()
    return right
