"""What makes a zoo: its specification, the key of its bytes, and the folder it lies in."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mixmerge.errors import CheckpointError, Fault, MixmergeError
from mixmerge.evaluate import Question
from mixmerge.machine import cache_root
from mixmerge.registry import choices
from mixmerge.zoo.families import FAMILIES, Family
from mixmerge.zoo.tasks import TASKS

_VERSIONS = ("torch", "transformers", "tokenizers", "safetensors", "reasoning-gym")
MANIFEST = "zoo.json"


@dataclass(frozen=True)
class Spec:
    """Everything a zoo's bytes follow from, but for the versions of the libraries.

    Args:
        variant: a key of ``FAMILIES``.
        seed: of questions, initial weights and batches; 0 or more.
        tasks: names from ``TASKS``; one expert each, and the base sees all of them.
        effort: training steps and questions, as a share of the full zoo's; above 0. Below 1 nothing is
            learned well: for trying the mechanics.

    Raises:
        MixmergeError: a name or number is none of these.
    """

    variant: str = "llama"
    seed: int = 0
    tasks: tuple[str, ...] = tuple(TASKS)
    effort: float = 1.0

    def __post_init__(self) -> None:
        faults = []
        if self.variant not in FAMILIES:
            faults.append(
                Fault("--variant", f"no zoo is called {self.variant!r}", choices(self.variant, [*FAMILIES]))
            )
        faults += unknown_tasks(self.tasks, tuple(TASKS))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            faults.append(Fault("--tasks", "it needs one name or more, each once"))
        if self.seed < 0:
            faults.append(Fault("--seed", f"{self.seed} is negative", "0 or more"))
        if not 0 < self.effort <= 10:
            faults.append(Fault("--effort", f"{self.effort} is out of range", "Above 0, at most 10"))
        if faults:
            raise MixmergeError(faults)

    @property
    def family(self) -> Family:
        return FAMILIES[self.variant]

    def expert_steps(self, task: str) -> int:
        """Training steps of a task's expert."""
        return self.count(round(150 * TASKS[task].patience), least=2)

    def count(self, full: int, *, least: int) -> int:
        """A number of steps or questions under this effort."""
        return max(least, round(full * self.effort))


def unknown_tasks(names: tuple[str, ...], known: tuple[str, ...]) -> list[Fault]:
    """A fault for each name that is no task."""
    return [
        Fault("--tasks", f"no task is called {name!r}", choices(name, list(known)))
        for name in names
        if name not in known
    ]


def versions() -> dict[str, str]:
    """The libraries whose change may change the bytes; the standard library is also a text we learn from."""
    found = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def key(spec: Spec) -> str:
    """Hash of the specification, the zoo's source and the versions: equal keys, equal bytes."""
    here = Path(__file__).parent
    digest = hashlib.sha256(json.dumps([asdict(spec), versions()], sort_keys=True).encode())
    for path in [*sorted(here.glob("*.py")), here.parent / "evaluate" / "answering.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cache_folder(spec: Spec) -> Path:
    """Where this zoo lies, or would: under ``$MIXMERGE_CACHE``, by default ``~/.cache/mixmerge``."""
    return cache_root() / "zoo" / f"{spec.variant}-{key(spec)[:16]}"


@dataclass(frozen=True)
class Zoo:
    """A built zoo on disk.

    ``base/``, ``experts/NAME/`` are models that ``from_pretrained`` loads, ``adapters/NAME/`` the same experts
    as PEFT adapters of the base, ``questions/NAME.{train,heldout}.jsonl`` what they learned and are asked, and
    ``questions/NAME.choices.jsonl`` the first that they learned with answers to choose from.
    """

    folder: Path
    tasks: tuple[str, ...]
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Zoo:
        """Read the manifest of a zoo.

        Raises:
            CheckpointError: the folder is no zoo.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            return cls(folder, tuple(manifest["tasks"]), manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:
            run = "Run: mixmerge zoo build"
            raise CheckpointError(Fault(str(folder), "there is no zoo here", run=run)) from error

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def expert(self, task: str) -> Path:
        return self.folder / "experts" / task

    def adapter(self, task: str) -> Path:
        return self.folder / "adapters" / task

    def questions(self, task: str, part: str = "heldout") -> list[Question]:
        """The ``heldout`` questions of a task, or those of ``train``; in a random order that never changes."""
        return read_questions(self.folder, task, part)

    def expert_score(self, task: str, limit: int | None = None) -> float:
        """Mean score of a task's own expert on the first held-out questions, measured when it was built."""
        right: str = self.manifest["right"][task][task][:limit]
        return right.count("1") / len(right)


def _questions_path(folder: Path, task: str, part: str) -> Path:
    return folder / "questions" / f"{task}.{part}.jsonl"


def read_questions(folder: Path, task: str, part: str) -> list[Question]:
    text = _questions_path(folder, task, part).read_text(encoding="utf-8")
    return [Question(**json.loads(line)) for line in text.splitlines()]


def write_questions(folder: Path, task: str, part: str, questions: list[Question]) -> None:
    path = _questions_path(folder, task, part)
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(asdict(question)) + "\n" for question in questions)
    path.write_text("".join(lines), encoding="utf-8")
