"""Classification by a head that comes with the request: the same head on whatever trunk is judged. Q rows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixmerge.bank.mask_files import MaskFolder, has_masks
from mixmerge.data.rows import Row
from mixmerge.dynamic.folders import is_dynamic, parts_of
from mixmerge.dynamic.tasks import Switch
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.evaluate.scoring_tasks import TaskScores, no_numbers
from mixmerge.evaluate.task_file import EvalTask
from mixmerge.registry import choices

if TYPE_CHECKING:
    from mixmerge.dynamic.model import DynamicModel
    from mixmerge.engines.loading import Dtype
    from mixmerge.experts.loading import LoadedExpert

_ROWS = 64  # of a batch
_LONGEST = 512  # tokens of a row where a model has no bound of its own
_POOLER = "pooler."


@dataclass(frozen=True)
class HeadSource:
    """An expert whose head classifies, and its folder."""

    name: str
    folder: Path


def score_classes(
    folder: Path,
    task: EvalTask,
    heads: Mapping[str, HeadSource],
    *,
    name: str,
    device: str = "cpu",
    dtype: Dtype = "auto",
    alone: str | None = None,
) -> TaskScores:
    """Accuracy of a trunk with a task's head.

    The head is the one that a merged folder keeps in ``heads/``, else that of the expert of this name. Trunk, biases
    and norms are the judged model's; a pooler that it does not have is the head's.

    Args:
        folder: of the model: a merged trunk with heads, a classifier, or a bare trunk.
        task: of the metric ``accuracy``.
        heads: experts by name.
        name: of the model, for messages.
        device: a torch device.
        dtype: of the weights in memory; ``auto``: float32.
        alone: of a folder with a bank, the expert that answers in place of the gate; of one with masks, the task.

    Raises:
        MixmergeError: no such head, trunk and head do not fit, or a label is no class of the head.
    """
    width = "float32" if dtype == "auto" else dtype
    expert = _with_head(folder, task, heads, name=name, device=device, dtype=width)
    classes = int(expert.model.config.num_labels)
    _check(expert, task, classes, name)
    if alone is not None and has_masks(folder):
        Switch(MaskFolder(folder), expert.model).become(alone)
    began = time.perf_counter()
    picks, tokens, cut = _classes(expert, task.rows, _network(folder, expert), alone)
    seconds = time.perf_counter() - began
    right = np.array([pick == row.label for pick, row in zip(picks, task.rows, strict=True)], np.float64)
    short = f"{task.name}: {cut:,} of {len(task.rows):,} rows were cut to the model's length"
    notes = [*([short] if cut else []), *no_numbers(task, picks)]
    return TaskScores(right, tokens, seconds, tuple(map(str, picks)), tuple(notes))


def head_faults(folder: Path, task: EvalTask, heads: Mapping[str, HeadSource], *, name: str) -> list[Fault]:
    """What is wrong with a task's head and its labels, as far as configs say; arguments as in ``score_classes``."""
    from mixmerge.experts.loading import HEADS, heads_of, kind_of, read_config

    head, kept = task.spec.head or "", heads_of(folder)
    if head not in kept and head not in heads:
        known = sorted({*kept, *heads})
        allowed = choices(head, known) if known else "It keeps no heads, and no experts are given"
        what = f"{name} has no head {head!r}"
        return [Fault(f"task {task.name}", what, allowed, "Name the expert by --experts")]
    faults: list[Fault] = []
    with collecting(faults):
        place = folder / HEADS / head if head in kept else heads[head].folder
        config = read_config(place, str(place))
        if kind_of(str((config.architectures or [""])[0])) == "classifier":
            faults += _no_class(task, int(config.num_labels))
    return faults


def _no_class(task: EvalTask, classes: int) -> list[Fault]:
    """The least label that is no class of the head, if there is one."""
    wrong = sorted({row.label for row in task.rows if row.label is not None and row.label >= classes})
    what = (
        f"label {wrong[0]} is none of the {classes} classes of the head {task.spec.head!r}" if wrong else ""
    )
    return [Fault(f"task {task.name}", what, f"0 to {classes - 1}")] if wrong else []


def _with_head(
    folder: Path, task: EvalTask, heads: Mapping[str, HeadSource], *, name: str, device: str, dtype: Dtype
) -> LoadedExpert:
    from mixmerge.experts.loading import heads_of, load_expert, load_with_head

    head = task.spec.head or ""
    if faults := head_faults(folder, task, heads, name=name):
        raise MixmergeError(faults)
    if head in heads_of(folder):
        return load_with_head(folder, head, device=device, dtype=dtype)
    source = heads[head]
    whole = load_expert(source.folder, device=device, dtype=dtype)
    if source.folder == folder:
        return whole
    return _moved(load_expert(folder, device=device, dtype=dtype), whole, name=name, head=head)


def _moved(judged: LoadedExpert, whole: LoadedExpert, *, name: str, head: str) -> LoadedExpert:
    """The head's model with the trunk of the judged one."""
    own = _trunk(whole)
    try:
        missing, _ = own.load_state_dict(_trunk(judged).state_dict(), strict=False)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise MixmergeError(Fault(name, f"its trunk does not fit the head {head!r}: {reason}")) from error
    lacking = [one for one in missing if not one.startswith(_POOLER)]
    if lacking:
        what = (
            f"its trunk lacks {len(lacking)} tensors that the head {head!r} stands on, {lacking[0]} for one"
        )
        raise MixmergeError(Fault(name, what, "Experts and merges of one architecture"))
    return whole


def _trunk(expert: LoadedExpert) -> Any:
    return getattr(expert.model, expert.prefix.removesuffix(".")) if expert.prefix else expert.model


def _check(expert: LoadedExpert, task: EvalTask, classes: int, name: str) -> None:
    if expert.kind != "classifier":
        what = f"{name} with the head {task.spec.head!r} is no classifier of texts"
        raise MixmergeError(Fault(f"task {task.name}", what, "A head of a *ForSequenceClassification"))
    if expert.tokenizer is None:
        raise MixmergeError(Fault(name, "has no tokenizer"))
    if faults := _no_class(task, classes):
        raise MixmergeError(faults)


def _network(folder: Path, expert: LoadedExpert) -> DynamicModel | None:
    """The bank and the gate of a folder around its trunk with the head; None if it has none."""
    if not is_dynamic(folder):
        return None
    from mixmerge.dynamic.model import DynamicModel

    return DynamicModel.around(parts_of(folder), expert.model, expert.tokenizer)


def _classes(
    expert: LoadedExpert, rows: Sequence[Row], network: DynamicModel | None, alone: str | None
) -> tuple[list[int], int, int]:
    """The likeliest class of every row, tokens read, and how many rows were cut."""
    import torch

    model, tokenizer = expert.model, expert.tokenizer
    longest = min(getattr(model.config, "max_position_embeddings", None) or _LONGEST, _LONGEST)
    longest -= (
        int(getattr(model.config, "pad_token_id", 0) or 0) + 1 if "roberta" in model.config.model_type else 0
    )
    order = sorted(range(len(rows)), key=lambda at: (len(rows[at].text) + len(rows[at].text_pair or ""), at))
    picks, tokens, cut = [0] * len(rows), 0, 0
    for start in range(0, len(order), _ROWS):
        chosen = order[start : start + _ROWS]
        texts = [rows[at].text for at in chosen]
        pairs = (
            [rows[at].text_pair or "" for at in chosen] if any(rows[at].text_pair for at in chosen) else None
        )
        uncut = tokenizer(texts, pairs, truncation=False, verbose=False)["input_ids"]
        cut += sum(len(ids) > longest for ids in uncut)
        batch = tokenizer(
            texts, pairs, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        ).to(model.device)
        tokens += int(batch["attention_mask"].sum())
        with torch.inference_mode():
            if network is None:
                logits = model(**batch).logits
            else:
                whole = [f"{one} {two}" for one, two in zip(texts, pairs or [""] * len(texts), strict=True)]
                logits = network(
                    batch["input_ids"],
                    batch["attention_mask"],
                    token_type_ids=batch.get("token_type_ids"),
                    weights=None if alone is None else {alone: 1.0},
                    texts=[one.strip() for one in whole],
                )
        found = logits.argmax(dim=-1).masked_fill(logits.isnan().any(dim=-1), -1)
        for at, pick in zip(chosen, found.tolist(), strict=True):
            picks[at] = int(pick)
    return picks, tokens, cut
