"""EleutherAI's lm-evaluation-harness on local models: ``mixmerge eval --lm-eval``. It is an extra, used as it is."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.engines.local import Dtype, no_bars
from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.evaluate.model_entries import Entry

Figures = dict[str, dict[str, float]]  # task -> figure -> value


@dataclass(frozen=True)
class Harness:
    """The harness, ready to run.

    Args:
        tasks: that it knows.
        manager: its ``TaskManager``.
    """

    tasks: tuple[str, ...]
    manager: Any


def find_harness(tasks: Sequence[str], path: str | Path | None) -> Harness | None:
    """The harness for these tasks, or None if there are none; no model is loaded.

    Args:
        tasks: names of the harness, or of tasks in ``path``.
        path: a folder with tasks of your own, as YAML.

    Raises:
        DependencyError: lm_eval is not installed.
        MixmergeError: a path without tasks, or one that is no folder; a task that it does not know.
    """
    if path is not None and not tasks:
        raise MixmergeError(Fault("--lm-eval-path", "is given without tasks", run="Name them by --lm-eval"))
    if not tasks:
        return None
    if path is not None and not Path(path).is_dir():
        raise MixmergeError(Fault("--lm-eval-path", f"{path} is no folder", "A folder with YAML tasks"))
    if importlib.util.find_spec("lm_eval") is None:
        raise DependencyError(
            Fault("--lm-eval", "takes lm-evaluation-harness", run="Run: pip install 'mixmerge[lm-eval]'")
        )
    from lm_eval.tasks import TaskManager

    with _quiet():
        own = None if path is None else str(path)
        manager = TaskManager(include_path=own, include_defaults=path is None)
        if not set(tasks) <= set(manager.all_tasks):  # reading the harness's own ones takes seconds
            manager = TaskManager(include_path=own)
        _check_tasks(tasks, list(manager.all_tasks))
    return Harness(tuple(tasks), manager)


def run_lm_eval(
    entries: Sequence[Entry],
    harness: Harness,
    *,
    limit: int | None = None,
    device: str = "cpu",
    dtype: Dtype = "auto",
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Figures]:
    """Run the harness on every model: model -> task -> its figures, as it names them (``acc,none``).

    Args:
        entries: models; adapters go through peft.
        harness: what to run.
        limit: at most so many examples of each task.
        device, dtype, batch_size: as the harness takes them.
        seed: of the examples it draws for few-shot prompts.

    Raises:
        MixmergeError: a task or a model that it cannot load.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    found: dict[str, Figures] = {}
    with _quiet():
        for entry in entries:
            with _faults_of(entry.name):
                adapter = None if entry.adapter is None else str(entry.adapter)
                model: Any = HFLM(
                    pretrained=str(entry.folder),
                    peft=adapter,
                    dtype=dtype,
                    device=device,
                    batch_size=batch_size,
                )
                results = evaluate(
                    lm=model,
                    task_dict=_loaded(harness, seed),
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=False,
                )
            found[entry.name] = _figures(results)
    return found


def _loaded(harness: Harness, seed: int) -> Any:
    loaded = harness.manager.load(list(harness.tasks))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    return loaded


def _check_tasks(tasks: Sequence[str], known: list[str]) -> None:
    faults = [
        Fault("--lm-eval", f"no task is called {one!r}", choices(one, known))
        for one in tasks
        if one not in known
    ]
    if faults:
        short = [Fault(one.where, one.what, one.allowed[:300], one.run) for one in faults]
        raise MixmergeError(short)


def _figures(results: Mapping[str, Any]) -> Figures:
    return {
        task: {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and "," in name
        }
        for task, found in results["results"].items()
    }


@contextmanager
def _faults_of(name: str) -> Iterator[None]:
    """What the harness cannot do with a model or a task is said in a line."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MixmergeError(Fault(f"--lm-eval: {name}", f"the harness failed: {reason}")) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its bars and its log below errors."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with no_bars():
            yield
    finally:
        log.setLevel(level)
