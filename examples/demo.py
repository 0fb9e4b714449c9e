"""What ``make demo`` runs: train the tiny zoo (or take it from the cache), merge it by every recipe, route, compare.

    python examples/demo.py [--out demo] [--limit N] [--effort SHARE]

The recipes name ``./zoo/base`` and ``./zoo/experts/...``: run ``mixmerge merge`` in the output folder to try
others, or ``mixmerge ask routed.yaml "sort up 3142 -> "``. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from zoo_support import named, note, place, read_answers, write_questions

import mixmerge
from mixmerge.cli.zoo import show_scores, step_progress
from mixmerge.dynamic.folders import is_dynamic
from mixmerge.evaluate import exact_match
from mixmerge.mixture import Mixture, read
from mixmerge.mixture.profiling import profile, same
from mixmerge.zoo import Spec, Zoo, build, score_models

RECIPES = Path(mixmerge.__file__).parent / "recipes"
LONGEST = 40  # tokens of an answer
HELD_IN = 40  # questions of each task that the router learns from; the experts have learned from them too


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
            shared = ", its shared part alone" if is_dynamic(merged) else ""
            found[f"merge: {recipe.stem}{shared}"] = str(merged.resolve())
    return found


def gated(zoo: Zoo, folder: Path, limit: int | None) -> dict[str, float]:
    """Ask a merge that keeps a bank, under its own gate; task -> mean score."""
    model, scores = mixmerge.DynamicModel.load(folder), {}
    for task in zoo.tasks:
        questions = zoo.questions(task)[:limit]
        said = model.generate([one.prompt for one in questions], max_new_tokens=LONGEST, stop=("\n",))
        right = [exact_match(text, one.answer) for text, one in zip(said, questions, strict=True)]
        scores[task] = statistics.fmean(right)
    return scores


def route(zoo: Zoo, folder: Path, limit: int | None) -> dict[str, float]:
    """Fit the shipped mixture's router on how experts answer questions of the training, then answer the held-out ones
    in one grouped batch; task -> mean score.
    """
    held_in = {task: zoo.questions(task, "train")[:HELD_IN] for task in zoo.tasks}
    held_out = {task: zoo.questions(task)[:limit] for task in zoo.tasks}
    with contextlib.chdir(folder):
        shutil.copyfile(RECIPES / "mixtures" / "routed.yaml", "routed.yaml")
        write_questions(Path("tasks.jsonl"), held_in, answers=True)
        write_questions(Path("questions.jsonl"), held_out, answers=False)
        spec = read("routed.yaml").require()
        with tempfile.TemporaryDirectory() as work:
            made = profile(spec, Path("tasks.jsonl"), Path(work), check=same("first_line"))
        made.outcomes.write("outcomes.jsonl")
        Mixture.load(spec).batch("questions.jsonl", "answers.jsonl", overwrite=True)
        given = read_answers(Path("answers.jsonl"))
    right = {name: exact_match(given[name]["answer"], one.answer) for name, one in named(held_out).items()}
    return {
        task: statistics.fmean(right[name] for name in named({task: some})) for task, some in held_out.items()
    }


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
    note("fitting a router, and answering in one batch")
    routed = {"routed: an expert for each question": route(zoo, options.out, options.limit)}
    for folder in sorted((options.out / "merges").iterdir()):
        if is_dynamic(folder):
            routed[f"merge: {folder.name}, its own gate"] = gated(zoo, folder, options.limit)
    table = replace(table, scores={**table.scores, **routed})
    show_scores(table, "held-out score in % (share of the task's own expert's score that is retained)")
    print(f"{options.out}/zoo, {options.out}/merges: {time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
