"""The objective of alignment: what each expert shows on its own rows, kept on disk, and the loss against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.coefficients import CoefficientSpace
from mixmerge.calibrate.lessons import Lesson
from mixmerge.calibrate.mixed import Mixed
from mixmerge.calibrate.objectives import Alignment, AlignmentOptions, Schedule
from mixmerge.calibrate.students import ClassifierStudent, LanguageStudent, check_language_model, expert_head
from mixmerge.calibrate.teachers import Teachers
from mixmerge.data.batches import Batch
from mixmerge.errors import Fault, MethodError

if TYPE_CHECKING:
    from torch import Tensor


def check_losses(options: Mapping[str, Any]) -> None:
    """Raise unless alignment has something to minimise.

    Raises:
        MethodError: all parts of its loss are left out.
    """
    hidden = options["hidden_layers"] != "none" and options["hidden_weight"]
    if not hidden and not options["logit_weight"]:
        what = "is 0 and no hidden states are aligned: there is no loss"
        raise MethodError(Fault("logit_weight", what, "logit_weight or hidden_weight above 0"))


def aligned(lesson: Lesson, shown: Sequence[Sequence[Batch]], each: int, folder: Path) -> Alignment:
    """The objective of a lesson; every expert is put into the model, and sees its rows, once.

    Args:
        lesson: its options are those of the loss.
        shown: batches of each expert.
        each: batches of each expert in a step.
        folder: where the experts' states are kept.

    Raises:
        MethodError: a language model whose logits are not its head's product with its last hidden states.
        OutputError: no room for the experts' states.
    """
    options, model = lesson.options, lesson.model
    student: LanguageStudent | ClassifierStudent
    if lesson.kind == "causal":
        check_language_model(model)
        student = LanguageStudent(model, shown)
        weight = model.get_output_embeddings().weight
        name = next((name for name, value in lesson.parameters.items() if value is weight), None)
        head = expert_head(model, lesson.deltas, name)
    else:
        student = ClassifierStudent(model, lesson.heads, shown)
        head = student.logits
    layers = layers_of(str(options["hidden_layers"]), int(model.config.get_text_config().num_hidden_layers))
    teachers = Teachers(folder, layers, head)
    everything = CoefficientSpace(granularity="expert", start=1.0).layout(
        lesson.deltas.shapes, lesson.deltas.experts
    )
    mixed = Mixed(lesson.parameters, lesson.deltas, everything, {})
    for expert in range(lesson.deltas.experts):
        mixed.build(_one_hot(expert, lesson.deltas.experts), everything=True)
        teachers.remember(expert, student, range(len(shown[expert])))
    return Alignment(
        student,
        teachers,
        [[batch.tokens for batch in part] for part in shown],
        Schedule(tuple(map(len, shown)), each, lesson.seed),
        AlignmentOptions(
            layers=layers,
            hidden=options["hidden_loss"],
            hidden_weight=lesson.number("hidden_weight"),
            logit=options["logit_loss"],
            logit_weight=lesson.number("logit_weight"),
            temperature=lesson.number("temperature"),
            importance=tuple(map(float, options["importance"])),
        ),
        lesson.answers,
    )


def layers_of(asked: str, depth: int) -> tuple[int, ...]:
    """Whose hidden states are aligned, of a model of so many layers.

    Args:
        asked: ``all``, ``last``, ``none``, or layers by number from 1, commas between.

    Raises:
        MethodError: the model has no such layer.
    """
    known = {"all": tuple(range(1, depth + 1)), "last": (depth,), "none": ()}
    if asked in known:
        return known[asked]
    found = tuple(sorted({int(one) for one in asked.split(",")}))
    beyond = [str(one) for one in found if not 1 <= one <= depth]
    if beyond:
        what = f"names layer {', '.join(beyond)}, and the model has layers 1 to {depth}"
        raise MethodError(Fault("hidden_layers", what))
    return found


def _one_hot(expert: int, experts: int) -> Tensor:
    import torch

    return torch.eye(experts, dtype=torch.float64)[expert : expert + 1]
