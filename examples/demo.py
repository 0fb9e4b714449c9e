"""What ``make demo`` runs: train the tiny zoo (or take it from the cache), merge it by every recipe, compare.

    python examples/demo.py [--out demo] [--limit N] [--effort SHARE]

The recipes name ``./zoo/base`` and ``./zoo/experts/...``: run ``mixmerge merge`` in the output folder to try
others. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path

import mixmerge
from mixmerge.cli.zoo import show_scores, step_progress
from mixmerge.zoo import Spec, Zoo, build, copy_to, score_models

RECIPES = Path(mixmerge.__file__).parent / "recipes"


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def place(zoo: Zoo, target: Path) -> None:
    """Make the zoo appear at ``target``: a link, or a copy where links are not allowed."""
    if target.is_symlink():
        target.unlink()
    with contextlib.suppress(OSError):
        target.symlink_to(zoo.folder.resolve(), target_is_directory=True)
        return
    copy_to(zoo, target)


def merge_all(folder: Path) -> dict[str, str]:
    """Merge every recipe into ``folder/merges/NAME``; name in the table -> where the merge is."""
    recipes = sorted(RECIPES.glob("*.yaml"))
    if not recipes:
        raise SystemExit(f"no recipes in {RECIPES}")
    found = {}
    with contextlib.chdir(folder):  # the recipes' paths start where they are run
        for recipe in recipes:
            merged = Path("merges", recipe.stem)
            note(f"merging {recipe.name}")
            mixmerge.merge(recipe, merged, overwrite=True)
            found[f"merge: {recipe.stem}"] = str(merged.resolve())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the zoo and the merges")
    parser.add_argument("--limit", type=int, help="held-out questions of each task; all by default")
    parser.add_argument("--effort", type=float, default=1.0, help="share of the zoo's training; 1 is real")
    options = parser.parse_args()

    began = time.perf_counter()
    note("the zoo: a base and its experts, trained in about a minute, or at once from the cache")
    with step_progress(quiet=False) as progress:
        zoo = build(Spec(effort=options.effort), progress=progress)
    (options.out / "merges").mkdir(parents=True, exist_ok=True)
    place(zoo, options.out / "zoo")

    models = {"base": str(zoo.base)} | {f"expert: {task}": str(zoo.expert(task)) for task in zoo.tasks}
    models |= merge_all(options.out)
    note(f"asking {len(models)} models what no expert was trained on")
    with step_progress(quiet=False) as progress:
        table = score_models(zoo, models, limit=options.limit, progress=progress)
    show_scores(table, "held-out score in % (share of the task's own expert's score that is retained)")
    print(f"{options.out}/zoo, {options.out}/merges: {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
