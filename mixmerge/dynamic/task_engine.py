"""The engine of folders with masks of tasks: one model in memory, which becomes the task's that a request names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mixmerge.engines.batching import batches
from mixmerge.engines.decoding import Beside, Told
from mixmerge.engines.loading import Dtype, Loaded, load_model, loaded_of
from mixmerge.engines.local import TransformersEngine
from mixmerge.errors import Fault, MixmergeError
from mixmerge.registry import choices

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.dynamic.tasks import Switch


class TaskEngine(TransformersEngine):
    """A base and the masks of its tasks, as an expert. What holds for ``TransformersEngine`` holds for it.

    A request's ``adapter`` names a task; requests of one task share batches, and the weights are switched between
    tasks. Without one the engine's own ``task`` answers, or the base if it has none.

    Args:
        model: a folder that a merge with ``task: all`` wrote.
        adapters: further names that a request's ``adapter`` may have -> tasks.
        task: that answers requests without ``adapter``; None: the base.
        dtype, device, batch_tokens, name: as of ``TransformersEngine``.
    """

    def __init__(
        self,
        model: str,
        *,
        adapters: Mapping[str, str] | None = None,
        task: str | None = None,
        dtype: Dtype = "auto",
        device: str = "cpu",
        batch_tokens: int = 8192,
        name: str | None = None,
    ) -> None:
        super().__init__(model, dtype=dtype, device=device, batch_tokens=batch_tokens, name=name)
        self._names, self._task = dict(adapters or {}), task
        self._switch: Switch | None = None
        self._tasks: tuple[str, ...] | None = None

    @classmethod
    def over(cls, switch: Switch, model: Any, tokenizer: Any, *, name: str, batch_tokens: int = 8192) -> Self:
        """An engine of a model that is loaded already.

        Args:
            switch: of the model.
            model, tokenizer: of transformers.
            name: what errors call it.
            batch_tokens: of a batch.
        """
        made = cls(name, batch_tokens=batch_tokens)
        made._switch, made._tasks = switch, switch.tasks
        made._loaded = loaded_of(model, tokenizer, name)
        return made

    @property
    def adapters(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self._names, *self._known())))

    def add_adapter(self, name: str, folder: str) -> None:
        """Refused: tasks come from a merge.

        Raises:
            MixmergeError: always.
        """
        what = "a folder of masks takes no further adapters"
        raise MixmergeError(
            Fault(f"engine {self.name}: adapter {name}", what, run="Merge again, with its expert")
        )

    def unload(self) -> None:
        self._switch = None
        super().unload()

    def _known(self) -> tuple[str, ...]:
        if self._tasks is None:
            from mixmerge.bank.mask_files import read_mask_card

            self._tasks = read_mask_card(self.model).tasks
        return self._tasks

    def _load(self) -> Loaded:
        from mixmerge.bank.mask_files import MaskFolder
        from mixmerge.dynamic.tasks import Switch

        folder = MaskFolder(self.model)
        named = {f"adapter {name}": task for name, task in self._names.items()}
        if self._task is not None:
            named["task"] = self._task
        known = list(folder.card.tasks)
        faults = [
            Fault(f"engine {self.name}: {where}", f"there is no task {task!r}", choices(task, known))
            for where, task in named.items()
            if task not in known
        ]
        if faults:
            raise MixmergeError(faults)
        loaded = load_model(str(folder.folder), None, self.dtype, self.device, self.name)
        self._switch = Switch(folder, loaded.model)
        return loaded

    def _batches(
        self, texts: Sequence[Sequence[int]], extra: Sequence[int], adapters: Sequence[str | None]
    ) -> Iterator[list[int]]:
        """Tasks one after the other: the weights are switched as often as there are tasks."""
        tasks = [self._task_of(name) for name in adapters]
        for task in dict.fromkeys(tasks):
            some = [at for at, one in enumerate(tasks) if one == task]
            chosen = batches([texts[at] for at in some], [extra[at] for at in some], budget=self.batch_tokens)
            for batch in chosen:
                yield [some[at] for at in batch]

    def _beside(self, rows: Sequence[Told]) -> Beside:
        self._expert()
        if self._switch is None:
            raise MixmergeError(Fault(f"engine {self.name}", "is not loaded"))
        (task,) = {self._task_of(row.adapter) for row in rows}
        return _OneTask(self._switch, task)

    def _task_of(self, adapter: str | None) -> str | None:
        return self._task if adapter is None else self._names.get(adapter, adapter)


@dataclass(frozen=True)
class _OneTask:
    """Rows of one task; a ``decoding.Beside``. Another's rows may go through the model between two of their tokens."""

    switch: Switch
    task: str | None

    def running(self, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        return self.switch.running(self.task)

    def logits(self, given: Mapping[str, Any], logits: Tensor) -> Tensor:
        return logits

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing is kept of a row."""

    def weights(self, row: int) -> Mapping[str, Any] | None:
        return None
