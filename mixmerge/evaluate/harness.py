"""EleutherAI's lm-evaluation-harness on local models: ``mixmerge eval --lm-eval``. It is an extra, used as it is."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.engines.local import no_bars
from mixmerge.errors import DependencyError, Fault, MixmergeError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.evaluate.model_entries import Entry

Figures = dict[str, dict[str, float]]  # task -> figure -> value


def check_lm_eval(tasks: Sequence[str], path: str | Path | None) -> None:
    """Whether the harness can be asked for these tasks at all: before any model is loaded.

    Raises:
        DependencyError: lm_eval is not installed.
        MixmergeError: a path without tasks, or one that is no folder.
    """
    if path is not None and not tasks:
        raise MixmergeError(Fault("--lm-eval-path", "is given without tasks", run="Name them by --lm-eval"))
    if not tasks:
        return
    if path is not None and not Path(path).is_dir():
        raise MixmergeError(Fault("--lm-eval-path", f"{path} is no folder", "A folder with YAML tasks"))
    if importlib.util.find_spec("lm_eval") is None:
        raise DependencyError(
            Fault("--lm-eval", "takes lm-evaluation-harness", run="Run: pip install 'mixmerge[lm-eval]'")
        )


def run_lm_eval(
    entries: Sequence[Entry],
    tasks: Sequence[str],
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, Figures]:
    """Run the harness on every model: model -> task -> its figures, as it names them (``acc,none``).

    Args:
        entries: models; adapters go through peft.
        tasks: names of the harness, or of tasks in ``path``.
        path: a folder with tasks of your own, as YAML.
        limit: at most so many examples of each task.
        device, batch_size: as the harness takes them.
        seed: of the examples it draws for few-shot prompts.

    Raises:
        DependencyError: lm_eval is not installed.
        MixmergeError: a task that it does not know, or cannot load; a model that it cannot load.
    """
    check_lm_eval(tasks, path)
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with _quiet():
        own = None if path is None else str(path)
        manager = TaskManager(include_path=own, include_defaults=path is None)
        if not set(tasks) <= set(manager.all_tasks):  # reading the harness's own ones takes seconds
            manager = TaskManager(include_path=own)
        _check_tasks(tasks, list(manager.all_tasks))
        found: dict[str, Figures] = {}
        for entry in entries:
            with _faults_of(entry.name):
                adapter = None if entry.adapter is None else str(entry.adapter)
                model: Any = HFLM(
                    pretrained=str(entry.folder),
                    peft=adapter,
                    dtype="auto",
                    device=device,
                    batch_size=batch_size,
                )
                results = evaluate(
                    lm=model,
                    task_dict=_loaded(tasks, manager, seed),
                    limit=limit,
                    bootstrap_iters=0,
                    log_samples=False,
                )
            found[entry.name] = _figures(results)
    return found


def _loaded(tasks: Sequence[str], manager: Any, seed: int) -> Any:
    loaded = manager.load(list(tasks))
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
