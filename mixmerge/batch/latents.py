"""What experts of one request keep for each other to read, and what of it a job that goes on has still to make."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mixmerge.aggregate import Ask
from mixmerge.batch.journal import Journal
from mixmerge.batch.plan import ALONE, OFFERS, READS, Stage

NOT_NEEDED = "was not asked: who would read it has answered"


def part_of(ask: Ask) -> int:
    """The part of a stage that a call belongs to."""
    return OFFERS if ask.offers else READS if ask.reads else ALONE


def look_again(stage: Stage, journal: Journal, folder: Path) -> None:
    """Of calls that offer: those whose reader has answered are done; those whose latents are lost are made again.

    Args:
        stage: with the answers that are in the journal; changed.
        journal: holds the names that latents are kept under.
        folder: where they are kept.
    """
    if stage.parts is None:
        return
    answered = set(stage.rows[(stage.parts == READS) & (stage.offsets >= 0)].tolist())
    for call in np.flatnonzero(stage.parts == OFFERS).tolist():
        there = stage.offsets[call] >= 0
        if int(stage.rows[call]) in answered:
            if not there:
                stage.faults[call] = NOT_NEEDED
        elif there and not _kept(folder, journal.answer(int(stage.offsets[call]))["text"]):
            stage.offsets[call] = -1


def _kept(folder: Path, name: str) -> bool:
    from mixmerge.latent.store import Store

    return Store(folder).has(name)
