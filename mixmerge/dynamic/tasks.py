"""A model that is one task's at a time: a base, one delta for all tasks, and a mask of bits for each."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mixmerge.bank.attach import places
from mixmerge.bank.mask_files import MaskFolder
from mixmerge.engines.records import Request
from mixmerge.errors import CheckpointError, Fault, MixmergeError
from mixmerge.experts.loading import check_tokenizer, kind_of, load_expert, load_with_head
from mixmerge.registry import choices


class Switch:
    """Makes a loaded base the model of a task and back, in place.

    Every tensor is computed anew from the folder's files: what it was before leaves no trace, in any order of tasks.

    Args:
        folder: open base and masks.
        model: the base of this folder, loaded by transformers, in any dtype and on any device.

    Raises:
        CheckpointError: the model holds tensors in another way than the folder, as experts that transformers puts
            side by side when it loads them.
    """

    def __init__(self, folder: MaskFolder, model: Any) -> None:
        self._folder, self._lock = folder, threading.RLock()
        self._task: str | None = None
        self._whole = True
        self._held = _held(folder, model)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the recipe's order."""
        return self._folder.card.tasks

    def become(self, task: str | None) -> None:
        """Make the model that of a task; None: the base.

        Raises:
            MixmergeError: there is no such task; the model is as before.
        """
        if task is not None and task not in self.tasks:
            what = f"has no task {task!r}"
            raise MixmergeError(Fault(str(self._folder.folder), what, choices(task, list(self.tasks))))
        with self._lock:
            if self._whole and task == self._task:
                return
            self._whole = False  # what is cut short here is no model
            number = None if task is None else self.tasks.index(task)
            with torch.no_grad():
                for name, held in self._held.items():
                    folder = self._folder
                    held.copy_(folder.base(name) if number is None else folder.tensor(name, number))
            self._task, self._whole = task, True

    @contextmanager
    def running(self, task: str | None) -> Iterator[None]:
        """Within it the model is the task's. One thread at a time."""
        with self._lock:
            self.become(task)
            yield


def _held(folder: MaskFolder, model: Any) -> dict[str, Tensor]:
    """Name of each masked tensor -> the tensor of the model; of names that are tied, the embedding's."""
    found = places(model, dict.fromkeys(folder.names))
    table = getattr(model, "get_input_embeddings", lambda: None)()
    held: dict[str, Tensor] = {}
    seen: set[int] = set()
    strange = [name for name in folder.names if name not in found]
    for name, (module, attribute) in sorted(found.items(), key=lambda item: item[1][0] is not table):
        value: Tensor = getattr(module, attribute)
        if id(value) in seen:
            continue
        seen.add(id(value))
        base = folder.base(name)
        if value.shape == base.shape and torch.equal(value.detach().cpu(), base.to(value.dtype)):
            held[name] = value
        else:
            strange.append(name)
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise CheckpointError(
            Fault(
                str(folder.folder),
                f"a {type(model).__name__} does not hold {strange[0]}{more} as the file does",
                "Models whose tensors transformers loads as they are stored",
                "Merge with task: N for each task",
            )
        )
    return held


class TaskModel:
    """A base that becomes the model of any task of its folder, bit for bit what a merge for that task alone writes.

    In memory is one model; the base, the delta and the masks stay in their files, which are mapped.

    Args:
        model: the base, loaded by transformers; its weights are changed in place.
        tokenizer: its tokenizer; None where only tokens are given.
        folder: its folder, open.

    Raises:
        MixmergeError: the model is not that of the folder.
    """

    def __init__(self, model: Any, tokenizer: Any, folder: MaskFolder) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._switch, self._name = Switch(folder, model), str(folder.folder)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        head: str | None = None,
    ) -> Self:
        """Load the base, as which the model begins.

        Args:
            folder: that a merge with ``task: all`` wrote.
            device: a torch device.
            dtype: of the weights in memory; ``auto``: as they are stored.
            head: of the folder's ``heads/``: the expert whose classifier is used.

        Raises:
            MixmergeError: it has no masks; they are damaged, or the base was changed.
        """
        opened = MaskFolder(folder)
        if head is None:
            expert = load_expert(opened.folder, device=device, dtype=dtype)
        else:
            expert = load_with_head(opened.folder, head, device=device, dtype=dtype)
        return cls(expert.model, expert.tokenizer, opened)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names, in the recipe's order."""
        return self._switch.tasks

    def task(self, name: str | None) -> Any:
        """The model of transformers as that of a task; None: the base. It is the same object every time.

        Raises:
            MixmergeError: there is no such task.
        """
        self._switch.become(name)
        return self.model

    def generate(
        self,
        prompts: Sequence[str],
        *,
        task: str | Sequence[str | None] | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: tuple[str, ...] = (),
        seed: int = 0,
        batch_tokens: int = 8192,
    ) -> list[str]:
        """How the texts go on, in their order; prompts of one task share batches.

        Args:
            prompts: texts that are continued as they are.
            task: of all prompts, or of each; None: the base.
            max_new_tokens, temperature, top_p, stop, seed: as in ``engines.records.Request``.
            batch_tokens: of a batch, prompts and what may be generated.

        Raises:
            MixmergeError: a setting out of range, a prompt that does not fit, no such task; it is no language model.
        """
        from mixmerge.dynamic.task_engine import TaskEngine

        check_tokenizer(self.tokenizer, self._name)
        if kind_of(type(self.model).__name__) != "causal":
            what = f"is a {type(self.model).__name__}, which does not continue texts"
            raise MixmergeError(Fault(self._name, what, "A causal language model"))
        names = [task] * len(prompts) if task is None or isinstance(task, str) else list(task)
        requests = [
            Request(str(at), prompt, max_new_tokens, temperature, top_p, stop, seed=seed, adapter=name)
            for at, (prompt, name) in enumerate(zip(prompts, names, strict=True))
        ]
        engine = TaskEngine.over(
            self._switch, self.model, self.tokenizer, name=self._name, batch_tokens=batch_tokens
        )
        return [one.text for one in engine.generate(requests)]
