"""Controls that no mixture can be asked for: peers that read another query, and glue that sees what comes.

Both are scored with the right answer before the primary: an answer counts where each of its tokens is the likeliest one
after the right ones before it, as in greedy decoding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from merging_support.stages import stage, write_json

from latent_support.rows import Row, mixture, slug
from latent_support.suite import Right, Suite
from latent_support.world import SPLITS
from mixmerge.data.rows import Row as TextRow
from mixmerge.evaluate import Question
from mixmerge.latent.files import load_glue, load_latent
from mixmerge.latent.fitting import Asked, Ready, prepare, train
from mixmerge.latent.frozen import Frozen, Remembered
from mixmerge.latent.glue import Glue
from mixmerge.latent.passes import Passes
from mixmerge.latent.records import Reading
from mixmerge.latent.settings import TrainOptions
from mixmerge.latent.store import Store
from mixmerge.latent.texts import Texts

_AT_ONCE = 64
T = TypeVar("T", bound=Texts)


class Shuffled(Texts):
    """Every peer reads the prompt of another row."""

    order: Sequence[int] = ()

    def peer(self, expert: str, row: int, primary: str) -> Reading:
        return super().peer(expert, self.order[row], primary)


class Unmasked(Texts):
    """Every token of the primary sees all that its peers have read: while it learns that is the answer, too."""

    told = True

    def peer(self, expert: str, row: int, primary: str) -> Reading:
        one = self.examples[row]
        text = f"{one.prompt}{one.answer}" if self.told else str(one.prompt)
        found = self._readers[expert].prompt(text)
        return replace(found, ends=(0,) * len(found.ids))


def run_controls(suite: Suite, *, shuffled: Row, unmasked: Row) -> None:
    """Both controls.

    Args:
        suite: of a seed.
        shuffled: of whose glue, which has been fitted, the peers read other queries.
        unmasked: which is fitted again without its mask. Its peers' states have to say what a token is, not what
            follows it, or there is nothing to leak: middle layers do.
    """
    for name, row, made in (
        ("peers that read another query", shuffled, _shuffled),
        ("no mask", unmasked, _unmasked),
    ):
        told = {"control": name, "row": vars(row), **suite.made_from}
        stage(suite.folder, f"results/{slug(name)}.json", told, partial(made, suite, row, name))


def shuffled_right(suite: Suite, asked: Mapping[str, Any], folder: Path, splits: Sequence[str]) -> Right:
    """Which answers are right where every peer reads the prompt of another query of the split.

    Args:
        suite: whose exam.
        asked: the mixture as it was fitted.
        folder: what was fitted.
        splits: of the exam.
    """
    ready = _ready(suite, asked)
    glue = load_glue(folder, load_latent(folder))

    def texts(some: Sequence[Question]) -> Texts:
        made = _of(ready, Shuffled, some)
        made.order = _moved(len(some), suite.seed)
        return made

    return _right(suite, ready, glue, texts, splits)


def _shuffled(suite: Suite, row: Row, name: str, out: Path) -> None:
    asked = mixture(suite, row, suite.steps.glue)
    found = shuffled_right(suite, asked, suite.folder / "glue" / slug(row.name), SPLITS)
    write_json(out, {"name": name, "control": True, "right": found})


def _unmasked(suite: Suite, row: Row, name: str, out: Path) -> None:
    ready = _ready(suite, mixture(suite, row, suite.steps.glue))
    work = out.with_suffix(".fit")
    seeing = replace(ready, texts=_of(ready, Unmasked, suite.lessons))
    glue = train(seeing, work, progress=lambda what, done, of, note: None).glue

    def texts(some: Sequence[Question], *, told: bool) -> Texts:
        made = _of(ready, Unmasked, some)
        made.told = told
        return made

    found = {told: _right(suite, ready, glue, partial(texts, told=told), SPLITS) for told in (True, False)}
    write_json(out, {"name": name, "control": True, "right": found[False], "while it learns": found[True]})


def _ready(suite: Suite, asked: Mapping[str, Any]) -> Ready:
    """The fit of a mixture as ``mixmerge fit`` prepares it."""
    from mixmerge.mixture import read as read_mixture
    from mixmerge.mixture.answering import expert_set
    from mixmerge.mixture.latent import LatentOptions

    spec = read_mixture(asked).require()
    told = LatentOptions.model_validate(spec.compose.options)
    options: TrainOptions = told.train
    return prepare(
        Asked(
            experts=expert_set(spec).experts,
            rows=tuple(TextRow(prompt=one.prompt, answer=one.answer) for one in suite.lessons),
            mode="prompt",
            chunk=1,
            depths=told.places,
            bridge=told.bridge,
            route=told.route,
            too_long="refuse",
            train=options,
            seed=suite.seed,
        )
    )


def _of(ready: Ready, kind: type[T], questions: Sequence[Question]) -> T:
    from mixmerge.latent.texts import examples_of

    rows = [TextRow(prompt=one.prompt, answer=one.answer) for one in questions]
    return kind(ready.texts._readers, examples_of(rows, "exam"), mode="prompt", too_long="refuse")


def _moved(count: int, seed: int) -> list[int]:
    """A cycle through all places, so that none stays where it is."""
    order = list(range(count))
    Random(f"shuffle {seed}").shuffle(order)
    found = [0] * count
    for at, place in enumerate(order):
        found[place] = order[(at + 1) % count]
    return found


def _right(
    suite: Suite,
    ready: Ready,
    glue: Glue,
    texts: Callable[[Sequence[Question]], Texts],
    splits: Sequence[str],
) -> Right:
    frozen = Frozen(ready.places, device="cpu", dtype="float32")
    primary = str(ready.card.primary)
    peers = {name: glue.peer_depths(name) for name in ready.asked.names if name != primary}
    hashes = {one.name: one.hash for one in ready.card.experts}
    found: Right = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        remembered = Remembered(frozen, Store(Path(folder)), hashes=hashes, depths=peers)
        for split in splits:
            some = suite.exam[split]
            passes = Passes(
                frozen, remembered, glue, texts(some), mode="prompt", chunk=1, checkpointing=False
            )
            found[split] = []
            for start in range(0, len(some), _AT_ONCE):
                rows = range(start, min(start + _AT_ONCE, len(some)))
                told = passes.predict(primary, rows, [list(peers)] * len(rows), None)
                hits = (told.logits.argmax(-1) == told.wanted).split(list(told.counts))
                found[split] += [bool(one.all()) for one in hits]
    return found
