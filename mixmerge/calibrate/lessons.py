"""What a learner works on: a model, its experts' deltas and their rows of data, as batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mixmerge.calibrate.deltas import Deltas
from mixmerge.calibrate.labelled import labelled_batches
from mixmerge.calibrate.losses import Answers
from mixmerge.calibrate.students import choice_batches
from mixmerge.data.batches import Batch, make_batches
from mixmerge.data.rows import Row
from mixmerge.errors import Fault, MethodError
from mixmerge.experts.loading import Kind, kind_of

if TYPE_CHECKING:
    from torch import Tensor

    from mixmerge.methods.sketch import Group

# Learners that make the merged model answer as each expert does.
ALIGNING = ("alignment", "spectrum")
_COMPARES = {
    "entropy": "the entropy is that of its predictions",
    "labels": "labels are held against its predictions",
    **dict.fromkeys(ALIGNING, "alignment compares logits"),
}


@dataclass(frozen=True)
class Lesson:
    """Everything a learner works on.

    Args:
        model: of transformers, on its device, in evaluation mode; its weights are overwritten.
        tokenizer: of the base.
        parameters: tensors of the model by the names of the deltas.
        deltas: of the experts.
        rows: of each expert, in the order they are taken.
        labels: of the experts, for errors and notes.
        start: by tensor, the coefficient of each expert before the first step.
        frozen: tensors that keep it.
        chunks: by tensor, coefficients of each expert, for a slice each; none: one for the tensor.
        heads: of each expert, the tensors of its classifier's head, which is not merged.
        options: the method's values, by their names in a recipe.
        group: of a tensor by its name, what the method's definition takes, read anew by each call.
        max_tokens, batch_size, layout: of the data, as in ``make_batches``.
        seed: of the recipe.
        gathers: whether single rows of a tensor of this name can be read.
        answers: what the outputs of each expert say; none: one class, or token, is right.
        scratch: folder for the experts' states; removed by whoever made it. The system's own without.
    """

    model: Any
    tokenizer: Any
    parameters: Mapping[str, Tensor]
    deltas: Deltas
    rows: Sequence[Sequence[Row]]
    labels: Sequence[str]
    start: Mapping[str, Sequence[float]]
    frozen: frozenset[str]
    heads: Sequence[Mapping[str, Tensor]]
    options: Mapping[str, Any]
    group: Callable[[str], Group]
    max_tokens: int = 512
    batch_size: int = 8
    layout: Literal["padded", "packed"] = "padded"
    seed: int = 0
    gathers: Callable[[str], bool] = lambda name: False
    answers: Sequence[Answers] = ()
    chunks: Mapping[str, int] = field(default_factory=dict)
    scratch: Path | None = None

    def number(self, name: str) -> float:
        return float(self.options[name])

    @property
    def kind(self) -> Kind:
        """What the model's outputs are."""
        return kind_of(type(self.model).__name__)


def step_sizes(rows: int, batch_size: int) -> tuple[int, int]:
    """Rows of a batch, and batches of each expert in a step that takes so many rows of each."""
    size = min(batch_size, rows)
    return size, -(-rows // size)


def batches_of(
    learner: str,
    kind: Kind,
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_tokens: int,
    batch_size: int,
    layout: Literal["padded", "packed"],
) -> tuple[Batch, ...]:
    """One expert's rows as a learner shows them to a model with such outputs.

    Raises:
        MethodError: the entropy of a language model, and no row has choices; rows without the labels it learns from.
        MixmergeError: as ``make_batches``.
    """
    if learner == "entropy" and kind == "causal":
        found = choice_batches(rows, tokenizer, max_tokens=max_tokens, batch_size=batch_size)
        return tuple(choices.batch for choices in found)
    task: Literal["causal", "classifier"] = "classifier" if kind == "classifier" else "causal"
    make = labelled_batches if learner == "labels" else make_batches
    return make(rows, tokenizer, task=task, max_tokens=max_tokens, batch_size=batch_size, layout=layout)


def all_batches(lesson: Lesson, size: int, learner: str) -> list[tuple[Batch, ...]]:
    """``batches_of`` every expert's rows, of ``size`` rows each."""
    return [
        batches_of(
            learner, lesson.kind, rows, lesson.tokenizer,
            max_tokens=lesson.max_tokens, batch_size=size, layout=lesson.layout,
        )
        for rows in lesson.rows
    ]  # fmt: skip


def check_outputs(learner: str, kind: Kind, architecture: str) -> None:
    """Raise unless a model's outputs are what a learner compares.

    Raises:
        MethodError: it has no head, or is of another kind than a classifier of texts or a causal language model.
    """
    if kind != "other":
        return
    allowed = "A classifier, or a language model and rows with choices"
    if learner == "labels":
        allowed = "A causal language model and rows with answers, or a classifier and rows with labels"
    if learner in ALIGNING:
        allowed = "A classifier of texts, or a causal language model"
    what = f"{architecture} has no head, and {_COMPARES[learner]}"
    if "For" in architecture:
        what = f"coefficients are not learned of a {architecture} yet"
    raise MethodError(Fault("base_model", what, allowed))


def check_answers(learner: str, answers: Sequence[Answers], labels: Sequence[str]) -> None:
    """Raise unless the outputs of each expert say what a learner takes them for.

    Args:
        learner: one of ``LEARNERS``.
        answers: of each expert.
        labels: of the experts, for errors.

    Raises:
        MethodError: the entropy of numbers, or labels where not one class is right; once for each such expert.
    """
    numbers = "gives numbers, a regression or a single class,"
    refused = {
        "entropy": {"numbers": f"{numbers} which have no entropy"},
        "labels": {
            "numbers": f"{numbers} and a label is one of several classes",
            "many": "says of each class whether it is there, and a row has one label",
        },
    }.get(learner, {})
    allowed = "A classifier of two classes or more"
    run = "Use expert_merging, which compares them with the expert's"
    faults = [
        Fault(label, refused[each], allowed, run)
        for label, each in zip(labels, answers, strict=bool(answers))
        if each in refused
    ]
    if faults:
        raise MethodError(faults)
