"""The learners by name: from a model, its experts' deltas and their rows of data to coefficients."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixmerge.calibrate.aligning import aligned, check_losses
from mixmerge.calibrate.anatomy import Anatomy, Need, Shown
from mixmerge.calibrate.coefficients import CoefficientSpace, Granularity, Transform
from mixmerge.calibrate.deltas import PIECE, Deltas, pieces
from mixmerge.calibrate.labelled import (
    Labelled,
    answer_loss,
    check_classes,
    label_counts,
    label_loss,
    not_shown,
)
from mixmerge.calibrate.learning import Learned, Learning, Objective, Progress, learn
from mixmerge.calibrate.lessons import ALIGNING, Lesson, all_batches, check_answers, check_outputs, step_sizes
from mixmerge.calibrate.objectives import POSITIONS, TOKENS, Entropy, Schedule, chunk_counts
from mixmerge.calibrate.spectrum import spectrum
from mixmerge.calibrate.students import (
    ClassifierStudent,
    check_language_model,
    choice_batches,
    choice_logits,
    left_out,
)
from mixmerge.data.batches import Batch
from mixmerge.experts.loading import Kind

if TYPE_CHECKING:
    from torch import Tensor


def learning_need(
    learner: str,
    anatomy: Anatomy,
    shown: Sequence[Shown],
    *,
    kind: Kind,
    rows: int,
    batch_size: int,
    layers: int = 0,
    width: int = 4,
) -> Need:
    """What a learner takes in memory: one model and the gradient of one tensor; of deltas only pieces.

    Losses go backward together until they hold ``TOKENS`` tokens, so no more activations are there at once, unless
    one batch has more. States of the experts come from the disk for the batches under way.

    Args:
        learner: one of ``LEARNERS``.
        anatomy: of the model.
        shown: of each expert, its largest batch.
        kind: what the model's outputs are.
        rows, batch_size: of each expert in a step; of a batch.
        layers: whose hidden states are compared.
        width: bytes of an element of the model.
    """
    _, each = step_sizes(rows, batch_size)
    padding = max(one.places / (one.tokens or one.places) for one in shown)
    most = max(max(one.places for one in shown), int(TOKENS * padding))
    places = min(each * sum(one.places for one in shown), most)
    longest = max(one.length for one in shown)
    once = Shown(-(-places // longest), longest)
    memory = {
        "model": 2 * width * anatomy.elements,
        "gradient of a tensor": 2 * width * anatomy.largest,
        "pieces of deltas": 4 * PIECE * (2 * len(shown) + 4),
        "activations": anatomy.backward(once, width=width),
    }
    if learner in ALIGNING:
        memory["states of the experts"] = 2 * 4 * places * anatomy.hidden * (1 + layers)
    if kind == "causal":
        # Those of the expert and of the model: as such, as log-likelihoods and chances, and their gradients.
        share = max((one.places if one.scored is None else one.scored) / one.places for one in shown)
        scored = int(places * share) if learner == "entropy" else min(places, POSITIONS)
        memory["logits"] = 4 * scored * anatomy.vocabulary * (10 if learner in ALIGNING else 4)
    return Need(memory)


def entropy(lesson: Lesson, *, progress: Progress | None = None) -> Learned:
    """AdaMerging: minimise the entropy of what the merged model predicts on each expert's rows.

    Raises:
        MethodError: a model without a head, experts that give numbers, a language model whose rows have no choices,
            and what ``learn`` raises.
    """
    check_outputs("entropy", lesson.kind, type(lesson.model).__name__)
    check_answers("entropy", lesson.answers, lesson.labels)
    size, each = step_sizes(int(lesson.number("rows")), lesson.batch_size)
    said: tuple[str, ...] = ()
    if lesson.kind == "causal":
        found = [
            choice_batches(rows, lesson.tokenizer, max_tokens=lesson.max_tokens, batch_size=size)
            for rows in lesson.rows
        ]
        shown = [[one.batch for one in choices] for choices in found]
        told = zip(lesson.labels, lesson.rows, found, strict=True)
        said = tuple(note for one in told for note in left_out(*one))

        def predict(expert: int, number: int) -> Tensor:
            return choice_logits(lesson.model, found[expert][number])

    else:
        shown = [list(batches) for batches in all_batches(lesson, size, "entropy")]
        predict = ClassifierStudent(lesson.model, lesson.heads, shown).predict
    schedule = Schedule(tuple(map(len, shown)), each, lesson.seed)
    objective = Entropy(
        predict, [[batch.tokens for batch in part] for part in shown], schedule, lesson.labels, lesson.answers
    )
    space = space_of("entropy", lesson.options, lesson.start, lesson.frozen)
    learned = _learn(lesson, objective, space, _by_adam(lesson, schedule), shown, progress)
    return dataclasses.replace(learned, warnings=(*said, *learned.warnings))


def labels(lesson: Lesson, *, progress: Progress | None = None) -> Learned:
    """FusionBench's AdaMerging for Llama: minimise the cross-entropy of each expert's rows, by answers or labels.

    Raises:
        MethodError: a model without a head, classifiers of which not one class is right, rows without labels, and what
            ``learn`` raises.
    """
    import torch

    check_outputs("labels", lesson.kind, type(lesson.model).__name__)
    check_answers("labels", lesson.answers, lesson.labels)
    size, each = step_sizes(int(lesson.number("rows")), lesson.batch_size)
    shown = all_batches(lesson, size, "labels")
    said = tuple(
        note for one in zip(lesson.labels, lesson.rows, shown, strict=True) for note in not_shown(*one)
    )
    if lesson.kind == "causal":
        check_language_model(lesson.model)

        def score(expert: int, number: int) -> Tensor:
            return answer_loss(lesson.model, shown[expert][number])

    else:
        student = ClassifierStudent(lesson.model, lesson.heads, shown)
        with torch.no_grad():
            classes = [student.predict(expert, 0).shape[-1] for expert in range(len(shown))]
        check_classes(lesson.labels, classes, shown)

        def score(expert: int, number: int) -> Tensor:
            return label_loss(student.predict(expert, number), shown[expert][number])

    schedule = Schedule(tuple(map(len, shown)), each, lesson.seed)
    objective = Labelled(
        score,
        [label_counts(part) for part in shown],
        [[batch.tokens for batch in part] for part in shown],
        schedule,
    )
    space = space_of("labels", lesson.options, lesson.start, lesson.frozen)
    learned = _learn(lesson, objective, space, _by_adam(lesson, schedule), shown, progress)
    return dataclasses.replace(learned, warnings=(*said, *learned.warnings))


def _by_adam(lesson: Lesson, schedule: Schedule) -> Learning:
    return Learning(
        steps=int(lesson.number("steps")),
        learning_rate=lesson.number("learning_rate"),
        turn=schedule.turn,
        seed=lesson.seed % 2**63,
    )


def space_of(
    learner: str, options: Mapping[str, Any], start: Mapping[str, Sequence[float]], frozen: frozenset[str]
) -> CoefficientSpace:
    """The coefficients of ``entropy``, ``labels`` or ``alignment``; arguments as of ``Lesson``."""
    if learner == "alignment":
        return CoefficientSpace(transform="sigmoid", start=start, frozen=_globs(frozen))
    if learner == "labels":
        transform: Transform = "softmax" if options["transform"] == "softmax" else "identity"
        return CoefficientSpace(
            transform=transform, start=start, clamp=options["clamp"], frozen=_globs(frozen)
        )
    granularity: Granularity = "expert" if options["granularity"] == "task" else "tensor"
    return CoefficientSpace(granularity, start=start, clamp=options["clamp"], frozen=_globs(frozen))


def alignment(lesson: Lesson, *, progress: Progress | None = None) -> Learned:
    """Expert Merging: make the merged model's hidden states and logits those of each expert, on its own rows.

    With the option ``budget``, a second run gives more coefficients to tensors that mattered in the first.

    Raises:
        MethodError: a model without a head, and what ``learn`` raises.
        OutputError: no room for the experts' states.
    """
    check_outputs("alignment", lesson.kind, type(lesson.model).__name__)
    check_losses(lesson.options)
    size, each = step_sizes(int(lesson.number("rows")), lesson.batch_size)
    shown = all_batches(lesson, size, "alignment")
    with tempfile.TemporaryDirectory(prefix="mixmerge-teachers-", dir=lesson.scratch) as folder:
        objective = aligned(lesson, shown, each, Path(folder))
        space = space_of("alignment", lesson.options, lesson.start, lesson.frozen)
        if any(count > 1 for count in lesson.chunks.values()):
            space = dataclasses.replace(space, granularity="chunk", chunks=lesson.chunks)
        learning = Learning(
            steps=int(lesson.number("steps")),
            optimiser="adamw",
            learning_rate=lesson.number("learning_rate"),
            weight_decay=lesson.number("weight_decay"),
            schedule="cosine",
            period=int(lesson.number("period")),
            clip=lesson.number("clip"),
            regulariser=lesson.number("regulariser"),
            turn=objective.schedule.turn,
            seed=lesson.seed % 2**63,
        )
        first = _learn(lesson, objective, space, learning, shown, progress)
        if "budget" not in lesson.options:
            return first
        chunks = chunk_counts(
            l1_norms(lesson.deltas, list(first.layout.rows)),
            first.weights,
            budget=lesson.number("budget"),
            kappa=lesson.number("kappa"),
            least=int(lesson.number("least_chunks")),
        )
        if set(chunks.values()) == {1}:  # a second run would be the first again
            said = "no tensor's share of the chunks reaches 2: as expert_merging; raise budget, or kappa"
            return dataclasses.replace(first, warnings=(*first.warnings, said))
        dropped = frozenset(name for name, count in chunks.items() if count < 1)
        space = dataclasses.replace(
            space, granularity="chunk", chunks=chunks, frozen=_globs(lesson.frozen | dropped)
        )
        return _learn(lesson, objective, space, learning, shown, progress)


def l1_norms(deltas: Deltas, names: Sequence[str]) -> dict[str, list[float]]:
    """By tensor, the L1 norm of each expert's delta."""
    import torch

    found = {}
    for name in names:
        total = torch.zeros(deltas.experts, dtype=torch.float64)
        for start, stop in pieces(deltas, name):
            total += deltas.read(name, start, stop)[1].abs().sum(1).double()
        found[name] = total.tolist()
    return found


def _globs(names: frozenset[str]) -> tuple[str, ...]:
    """Names as globs that match nothing else."""
    return tuple(sorted(name.replace("[", "[[]") for name in names))


def _learn(
    lesson: Lesson,
    objective: Objective,
    space: CoefficientSpace,
    learning: Learning,
    shown: Sequence[Sequence[Batch]],
    progress: Progress | None,
) -> Learned:
    return learn(
        lesson.parameters,
        lesson.deltas,
        objective,
        space,
        learning=learning,
        labels=lesson.labels,
        used_rows=_used_rows(lesson, shown),
        progress=progress,
    )


def _used_rows(lesson: Lesson, shown: Sequence[Sequence[Batch]]) -> dict[str, Tensor]:
    """The rows of the token embedding that the data look up, if nothing else uses the table."""
    import torch

    table = lesson.model.get_input_embeddings().weight
    head = getattr(lesson.model, "get_output_embeddings", lambda: None)()
    name = next((name for name, value in lesson.parameters.items() if value is table), None)
    if name is None or not lesson.gathers(name) or (head is not None and head.weight is table):
        return {}
    ids = torch.cat([batch.input_ids.reshape(-1) for part in shown for batch in part])
    return {name: torch.unique(ids)}


LEARNERS: dict[str, Callable[..., Learned]] = {
    "entropy": entropy,
    "labels": labels,
    "alignment": alignment,
    "spectrum": spectrum,
}
