"""Rows of the table whose parameters a search found: candidates see the validation split, the table the test split."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merging_support.entries import Entry
from merging_support.fusion import read
from merging_support.stages import say, stage, write_json
from merging_support.suites import Suite, flat, slug


@dataclass(frozen=True)
class SuiteScorer:
    """The suite's own scores as what a search maximises; answers stay in ``folder``, those to the last merge."""

    suite: Suite
    folder: Path

    @property
    def identity(self) -> str:
        return json.dumps(self.suite.identity, sort_keys=True)

    @property
    def chosen_by(self) -> tuple[str, ...]:
        """None are named: the suite itself keeps its splits apart, and the best recipe stays with it."""
        return ()

    def rows(self, folder: Path, part: str) -> dict[str, NDArray[np.float64]]:
        out = self.folder / f"{part}.json"
        split = "validation" if part == "dev" else "test"
        self.suite.score(dict.fromkeys(self.suite.experts, folder), split, out)
        return {task: np.asarray(right, np.float64) for task, right in flat(read(out))["right"].items()}


def run_search(suite: Suite, entry: Entry, budget: int) -> None:
    """Search the entry's space from its recipe on, and keep what the best one answers on the test split.

    Args:
        budget: merges that are scored on validation.
    """
    told = {"method": entry.method, "each": entry.each, "top": entry.top, "search": entry.search}
    told |= {"budget": budget, "inputs": suite.identity}
    name = f"{suite.name}/results/{slug(entry.name)}-seed0.json"
    stage(suite.work, name, told, partial(_search, suite, entry, budget))


def _search(suite: Suite, entry: Entry, budget: int, out: Path) -> None:
    import yaml

    from mixmerge.methods import METHODS
    from mixmerge.recipe import parse
    from mixmerge.searching.search import search
    from mixmerge.searching.space import read_space

    kept = suite.folder / "searches" / out.stem
    kept.mkdir(parents=True, exist_ok=True)
    made = entry.recipe(str(suite.base), suite.experts, rows={}, dtype=suite.dtype, seed=0, value=None)
    recipe = parse(yaml.safe_dump(made)).require()
    space = kept / "space.yaml"
    asked: dict[str, Any] = {"parameters": dict(entry.search), "budget": budget}
    space.write_text(yaml.safe_dump(asked), encoding="utf-8")
    found = search(
        recipe,
        read_space(space, METHODS[entry.method]),
        SuiteScorer(suite, kept),
        kept,
        threads=1,
        progress=lambda trial, trials: say(
            f"  {entry.name}: {trial.number + 1} of {trials}: {trial.worth:.3f}"
        ),
    )
    spent = sum(trial.seconds for trial in found.trials)
    start = found.trials[0].worth
    note = f"{budget} merges, validation {start:.1%} to {found.best.worth:.1%}"
    answers = flat(read(kept / "test.json"))
    write_json(out, answers | {"cost": {"seconds": spent, "peak": 0}, "note": note, "value": None})
