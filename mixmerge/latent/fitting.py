"""Fitting the glue of frozen experts: what is wrong is said before anything is loaded, then it is trained and written.

Legend as in ``records``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixmerge import __version__
from mixmerge.checkpoint.identity import canonical_hash
from mixmerge.checkpoint.locate import locate
from mixmerge.checkpoint.reader import read_json
from mixmerge.checkpoint.used_rows import MANIFEST, inherited
from mixmerge.data.rows import Row, digests_of
from mixmerge.errors import Fault, MixmergeError, collecting
from mixmerge.experts import Expert
from mixmerge.experts.loading import check_device, kind_of, outline, read_tokenizer
from mixmerge.latent.curves import Report, write_report
from mixmerge.latent.deciding import Decider
from mixmerge.latent.decoders import shape_of
from mixmerge.latent.files import (
    CURVES,
    TRAINING,
    LatentCard,
    encode_of,
    encoder_hash,
    expert_hash,
    save_latent,
)
from mixmerge.latent.frozen import Frozen, Remembered
from mixmerge.latent.glue import Glue
from mixmerge.latent.offsets import Reader, TooLong, reader_of
from mixmerge.latent.options import BridgeOptions
from mixmerge.latent.passes import Passes
from mixmerge.latent.records import Depths, Mode, Shape, levels_of
from mixmerge.latent.resuming import alone
from mixmerge.latent.router import LatentRouter, Routed
from mixmerge.latent.settings import RouteOptions, TrainOptions
from mixmerge.latent.store import Store
from mixmerge.latent.texts import Example, Texts, examples_of, hold_out
from mixmerge.latent.training import Progress, Task, Trainer

_LATENTS = "latents"  # folder of the work
_AT = "compose"
Decide = Callable[[Sequence[Example]], Sequence[Routed]]


@dataclass(frozen=True)
class Asked:
    """What is to be fitted.

    Args:
        experts: two or more, each a causal language model, or an adapter of one.
        rows: prompts and answers.
        keep: prompts and answers that primaries are to say as likely as they do alone; who answers may not be learned.
        mode, chunk: how peers follow an answer.
        depths: where the primary reads, and where its peers are read.
        bridge: options of the bridges.
        route: who is active; None: ``decide`` says so.
        decide: the mixture's own router and policy, in place of one that learns.
        decided_by: hash of that router.
        too_long: what a peer does with a prompt longer than its context.
        train: how.
        seed: of everything that is drawn.
        device: a torch device.
    """

    experts: tuple[Expert, ...]
    rows: tuple[Row, ...]
    mode: Mode
    chunk: int
    depths: Depths
    bridge: BridgeOptions
    route: RouteOptions | None
    too_long: TooLong
    train: TrainOptions
    keep: tuple[Row, ...] = ()
    decide: Decide | None = None
    decided_by: str = ""
    seed: int = 0
    device: str = "cpu"

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.experts)

    def pairs(self) -> list[tuple[str, tuple[str, ...]]]:
        """Every expert that may be a primary, and who may be its peers."""
        only = None if self.route is None else self.route.primary
        primaries = self.names if only is None else (only,)
        return [(name, tuple(one for one in self.names if one != name)) for name in primaries]


@dataclass(frozen=True)
class Ready:
    """What was looked at, and found good.

    Args:
        asked: what is to be fitted.
        places: of each expert the folders of its model, and of its adapter.
        card: of the glue, without its values.
        texts: the rows to learn from, and after these the rows to keep.
    """

    asked: Asked
    places: Mapping[str, tuple[Path, Path | None]]
    card: LatentCard
    texts: Texts

    @property
    def lessons(self) -> tuple[Example, ...]:
        """What is learned from, or judges."""
        return tuple(self.texts.examples[: len(self.asked.rows)])

    @property
    def job(self) -> str:
        """Hash of all that the result depends on."""
        asked, card = self.asked, self.card
        return canonical_hash(
            {
                "mixmerge": __version__,
                "card": card.facts(),
                "train": asked.train.model_dump(mode="json"),
                "rows": [[one.digest, one.answer] for one in self.texts.examples],
                "keep": len(asked.keep),
                "decided_by": asked.decided_by,
                "seed": asked.seed,
                "device": asked.device,
            }
        )


@dataclass(frozen=True, eq=False)
class Trained:
    """A glue that has learned.

    Args:
        ready: what from.
        glue, router: with their best values.
        report: how it went.
        kept: rows to keep that took part: one that is held out does not, or what judges would be learned from.
    """

    ready: Ready
    glue: Glue
    router: LatentRouter | None
    report: Report
    kept: int

    def write(self, folder: Path) -> LatentCard:
        """Card, values, curves and the manifest with the rows' digests."""
        card = save_latent(folder, self.ready.card, self.glue, self.router)
        asked = self.ready.asked
        more = {"train": asked.train.model_dump(mode="json"), "seed": asked.seed}
        write_report(self.report, folder, data=TRAINING, plot=CURVES, more=more)
        facts = self._manifest(card)
        (folder / MANIFEST).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return card

    def _manifest(self, card: LatentCard) -> dict[str, Any]:
        """What was fitted of what; with it, evaluation knows which rows are none to score it by."""
        folders = [one for pair in self.ready.places.values() for one in pair if one is not None]
        return {
            "mixmerge": __version__,
            "latent": {"experts": {one.name: one.hash for one in card.experts}, "glue": card.hash},
            "calibration": {"rows": digests_of(self.ready.texts.examples)},
            **inherited(folders),
        }


def prepare(asked: Asked) -> Ready:
    """Look at everything before a weight is loaded.

    Raises:
        MixmergeError: experts that are not there, are no causal language models, or are the same one twice; depths
            that they do not have; no fast tokenizer; a text encoder that is not there; rows without answers, or that
            an expert cannot read. All of it at once, as far as one does not stand in another's way.
    """
    faults: list[Fault] = []
    places: dict[str, tuple[Path, Path | None]] = {}
    shapes: dict[str, Shape] = {}
    readers: dict[str, Reader] = {}
    with collecting(faults):
        check_device(asked.device, "the glue")
    encoder = ""
    examples: dict[str, tuple[Example, ...]] = {}
    for expert in asked.experts:
        with collecting(faults):
            places[expert.name], shapes[expert.name], readers[expert.name] = _known(expert)
    faults += _twice(shapes)
    if shapes.keys() == set(asked.names):
        faults += _levels(asked, shapes)
    learned = asked.route is not None and asked.route.kind == "learned"
    if asked.route is not None and learned:
        with collecting(faults):
            encoder = encoder_hash(asked.route.encoder)
    for key, rows in (("data", asked.rows), ("keep", asked.keep)):
        with collecting(faults):
            examples[key] = examples_of(rows, f"{_AT}.{key}")
    every = [one for some in examples.values() for one in some]
    texts = Texts(readers, every, mode=asked.mode, too_long=asked.too_long)
    if readers.keys() == set(asked.names):
        first = 0
        for key, some in examples.items():
            faults += texts.faults(asked.pairs(), f"{_AT}.{key}", range(first, first + len(some)))
            first += len(some)
    if faults:
        raise MixmergeError(faults)
    card = LatentCard(
        experts=tuple(shapes[name] for name in asked.names),
        mode=asked.mode,
        chunk=asked.chunk,
        depths=asked.depths,
        bridge=asked.bridge,
        route=asked.route,
        too_long=asked.too_long,
        encoder=encoder,
    )
    return Ready(asked, places, card, texts)


def _known(expert: Expert) -> tuple[tuple[Path, Path | None], Shape, Reader]:
    """What can be known of an expert from its small files."""
    where = f"experts.{expert.name}"
    model = locate(expert.model, None, where=where)
    adapter = None if expert.adapter is None else locate(expert.adapter, None, where=where)
    named = read_json(model / "config.json").get("architectures") or [""]
    if kind_of(str(named[0])) != "causal":
        what = f"is a {named[0] or 'model that names no architecture'}, which does not continue texts"
        raise MixmergeError(Fault(where, what, "A causal language model"))
    tokenizer = read_tokenizer(model, where)
    if tokenizer is None:
        raise MixmergeError(Fault(where, "has no tokenizer, so it cannot be shown text"))
    shell = outline(model, where)
    shape = shape_of(shell, name=expert.name, hash=expert_hash(expert))
    return (model, adapter), shape, reader_of(tokenizer, shell.config, name=expert.name)


def _twice(shapes: Mapping[str, Shape]) -> list[Fault]:
    first: dict[str, str] = {}
    faults = []
    for name, shape in shapes.items():
        before = first.setdefault(shape.hash, name)
        if before != name:
            what = f"is the same model as {before}, which has nothing to tell it"
            faults.append(Fault(f"experts.{name}", what, run="Leave one of them out"))
    return faults


def _levels(asked: Asked, shapes: Mapping[str, Shape]) -> list[Fault]:
    faults: list[Fault] = []
    for primary, peers in asked.pairs():
        for peer in peers:
            try:
                levels_of(asked.depths, shapes[primary].layers, shapes[peer].layers)
            except MixmergeError as error:
                found = [
                    replace(one, where=f"{_AT}.{one.where}", what=f"{one.what} ({primary} reads {peer})")
                    for one in error.faults
                ]
                faults += [one for one in found if one not in faults]
    return faults


def train(ready: Ready, work: Path, *, progress: Progress) -> Trained:
    """Train the glue; what was killed goes on from its folder of work.

    Args:
        ready: what ``prepare`` found good.
        work: folder for what a killed fit goes on from, the peers' latents among it. It is left to who calls.
        progress: told (what, done, in all, how it goes).

    Raises:
        OutputError: the disk refuses.
        MixmergeError: as ``training.Trainer.run``; an expert that changed.
    """
    asked, card = ready.asked, ready.card
    glue, decider, card = _decider(ready)
    glue = glue.to(asked.device)
    ready = replace(ready, card=card)
    frozen = Frozen(ready.places, device=asked.device, dtype=asked.train.precision)
    store = Store(work / _LATENTS, limit=int(asked.train.latents_gb * 2**30))
    remembered = Remembered(
        frozen,
        store,
        hashes={one.name: one.hash for one in card.experts},
        depths={name: glue.peer_depths(name) for _, peers in asked.pairs() for name in peers},
    )
    _think(ready, frozen, remembered, progress)
    passes = Passes(
        frozen,
        remembered,
        glue,
        ready.texts,
        mode=asked.mode,
        chunk=asked.chunk,
        checkpointing=asked.train.checkpointing,
    )
    learn, held = hold_out([one.digest for one in ready.lessons], asked.train.holdout, asked.seed)
    judging = {_pair(ready.lessons[row]) for row in held}
    after = range(len(asked.rows), len(asked.rows) + len(asked.keep))
    keep = [row for row in after if _pair(ready.texts.examples[row]) not in judging]
    task = Task(
        experts=asked.names,
        texts=ready.texts,
        learn=learn,
        held=held,
        keep=keep,
        options=asked.train,
        seed=asked.seed,
        device=asked.device,
        work=work,
        job=ready.job,
    )
    report = Trainer(task, glue, decider, passes).run(progress)
    frozen.check()
    return Trained(ready, glue, decider.router, report, len(keep))


def _pair(one: Example) -> tuple[str, str]:
    """Prompt and answer: behind another answer, a row to keep says nothing of the one that judges."""
    return one.digest, one.answer


def _decider(ready: Ready) -> tuple[Glue, Decider, LatentCard]:
    """Glue and decisions before anything is learned, and the card with the width of the router's features."""
    asked, card, examples = ready.asked, ready.card, ready.texts.examples
    route = asked.route
    if route is not None and route.kind == "learned":
        encode = encode_of(route.encoder, route.features, device=asked.device)
        card = replace(card, features=encode(["a"]).shape[-1])
        glue, router = card.blank(seed=asked.seed)
        return glue, Decider(asked.names, examples, router=router, encode=encode), card
    glue, _ = card.blank(seed=asked.seed)
    if asked.decide is not None:
        given = asked.decide(examples)
    else:
        gates = dict.fromkeys(asked.names, 1 / len(asked.names))
        given = [Routed(str(card.primary), gates, {})] * len(examples)
    return glue, Decider(asked.names, examples, given=given), card


def _think(ready: Ready, frozen: Frozen, remembered: Remembered, progress: Progress) -> None:
    """Every peer reads all that it may be asked for; who is never a primary is let go of."""
    asked, texts = ready.asked, ready.texts
    pairs = asked.pairs()
    for name in asked.names:
        primaries = [primary for primary, peers in pairs if name in peers]
        if not primaries:
            continue
        readings = [
            texts.peer(name, row, primary) for row in range(len(texts.examples)) for primary in primaries
        ]

        def say(done: int, steps: int, what: str = f"latents of {name}") -> None:
            progress(what, done, steps, "")

        remembered.prepare(name, readings, say)
        if name not in {primary for primary, _ in pairs}:
            frozen.drop(name)


def working(work: Path, out: Path) -> AbstractContextManager[None]:
    """The folder of work, for this process alone."""
    return alone(work, out)
