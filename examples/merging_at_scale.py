"""Methods x number of experts x strength of the base, on the zoo: one command, one figure.

    python examples/merging_at_scale.py [--out merging-at-scale] [--limit N] [--effort SHARE]

After Yadav et al., What Matters for Model Merging at Scale (2024): they merge 2 to 8 experts of a pretrained (weak) and
of an instruction-tuned (strong) base by four methods, and score the merged tasks (held-in) and others (held-out). Here
the weak base is that of a zoo with a third of the training, and fewer questions. Its experts are trained for as many
steps as those of the strong one. Scores are shares of what each task's own expert of the same base scores.

The zoo comes from the cache; training the experts of both bases takes two minutes on two cores, the rest about three.
A second run goes on with what is there. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo_support import note

import mixmerge
from mixmerge.evaluate import Question, answers, load
from mixmerge.evaluate.drawing import COLOURS, as_png, new_panels
from mixmerge.evaluate.model_records import ModelReport
from mixmerge.outcomes.whole import whole_file
from mixmerge.zoo import Spec, Zoo, build

WEAK = 0.3  # of the base's training
# name -> parameters of the recipe, those of recipes/
METHODS: Mapping[str, Mapping[str, float]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.5},
    "dare_linear": {"weight": 0.5, "density": 0.7},
    "ties": {"weight": 1.0, "density": 0.5, "lambda": 1.5},
}
DRAWS = 2  # sets of experts of each size


@dataclass(frozen=True)
class Strength:
    """A base and its experts: ``folder/base`` and ``folder/experts/TASK``."""

    name: str
    zoo: Zoo
    folder: Path

    @property
    def base(self) -> Path:
        return self.zoo.base

    def expert(self, task: str) -> Path:
        return self.folder / "experts" / task


@dataclass(frozen=True)
class Merge:
    """One merge: which experts, by what."""

    method: str
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method}-{'+'.join(self.tasks)}"


def train_experts(strength: Strength, spec: Spec) -> None:
    """An expert of every task: its questions, and the base's own answers to the others, so that it forgets little."""
    from mixmerge.zoo.training import Pool, batches, train_expert

    zoo = strength.zoo
    if all((strength.expert(task) / "config.json").exists() for task in zoo.tasks):
        return
    base = load(str(strength.base))
    said: dict[str, list[Question]] = {}
    for task in zoo.tasks:
        asked = zoo.questions(task, "train")[: spec.count(300, least=8)]
        given = answers(base, [one.prompt for one in asked], max_new_tokens=10)
        said[task] = [
            Question(one.prompt, text.partition("\n")[0]) for one, text in zip(asked, given, strict=True)
        ]
    for task in zoo.tasks:
        note(f"training {task} on the {strength.name} base")
        own = Pool(zoo.questions(task, "train"), 0.65)
        others = [Pool(said[other], 0.35 / (len(zoo.tasks) - 1)) for other in zoo.tasks if other != task]
        model = copy.deepcopy(base.model)
        train_expert(
            model,
            batches([own, *others], base.tokenizer, seed=spec.seed),
            steps=spec.expert_steps(task),
            targets=spec.family.targets,
            report=lambda done, steps: None,
        )
        base.tokenizer.save_pretrained(strength.expert(task))
        model.save_pretrained(strength.expert(task))


def merges_of(tasks: Sequence[str], methods: Sequence[str]) -> list[Merge]:
    """Every method on neighbours in the circle of tasks: two sets of each size, one of all."""
    sets = {
        tuple(tasks[(start + step) % len(tasks)] for step in range(size))
        for size in range(2, len(tasks))
        for start in (0, len(tasks) // 2)[:DRAWS]
    }
    return [
        Merge(method, one)
        for one in (*sorted(sets, key=lambda one: (len(one), one)), tuple(tasks))
        for method in methods
    ]


def merge(strength: Strength, one: Merge) -> Path:
    """The folder of a merge, made now if it is not there."""
    folder = strength.folder / "merges" / one.name
    if folder.exists():
        return folder
    recipe: dict[str, Any] = {
        "merge_method": one.method,
        "models": [{"model": str(strength.expert(task))} for task in one.tasks],
        "parameters": dict(METHODS[one.method]),
        "dtype": "float32",
    }
    if one.method != "linear":
        recipe["base_model"] = str(strength.base)
    mixmerge.merge(recipe, folder)
    return folder


def evaluate(strength: Strength, made: Sequence[Merge], limit: int | None) -> ModelReport:
    """All merges, the experts and the base on the held-out questions of all tasks."""
    rows = []
    for task in strength.zoo.tasks:
        path = strength.folder / "questions" / f"{task}.jsonl"
        path.parent.mkdir(exist_ok=True)
        asked = strength.zoo.questions(task)[:limit]
        path.write_text(
            "".join(json.dumps({"prompt": one.prompt, "answer": one.answer}) + "\n" for one in asked)
        )
        rows.append(
            {"name": task, "data": str(path), "metric": "exact", "expert": task, "max_new_tokens": 12}
        )
    return mixmerge.evaluate_models(
        {one.name: merge(strength, one) for one in made},
        tasks={"tasks": rows},
        experts={task: strength.expert(task) for task in strength.zoo.tasks},
        base=strength.base,
        resamples=200,
        progress=lambda model, done, tasks: note(f"{strength.name}: {model}") if done == tasks else None,
    )


def curves(report: ModelReport, made: Sequence[Merge]) -> dict[str, dict[str, dict[int, float]]]:
    """``held-in`` and ``held-out`` -> method -> number of experts -> mean share of the own experts' scores."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {"held-in": {}, "held-out": {}}
    for one in made:
        for task, share in report.row(one.name).retained.items():
            part = found["held-in" if task in one.tasks else "held-out"]
            part.setdefault(one.method, {}).setdefault(len(one.tasks), []).append(share.value)
    return {
        part: {
            method: {size: statistics.fmean(values) for size, values in sorted(sizes.items())}
            for method, sizes in methods.items()
        }
        for part, methods in found.items()
    }


def draw(found: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]]) -> bytes:
    """A row of panels for each part, a column for each strength."""
    parts = ("held-in", "held-out")
    figure, panels = new_panels(4.4 * len(found), 6.4, len(parts), len(found))
    for axes, (part, strength) in zip(panels, ((part, one) for part in parts for one in found), strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=False):
            line = found[strength][part].get(method, {})
            axes.plot(list(line), list(line.values()), "o-", color=colour, markersize=4, label=method)
        axes.set_title(f"{strength} base, {part}", fontsize=9.5)
        axes.set_xlabel("experts")
        axes.set_ylabel("share of the own expert's score")
        axes.set_ylim(0, 1.05)
        axes.set_xticks(range(2, 6))
        axes.grid(color="#e4e4e4", linewidth=0.7)
    panels[0].legend(frameon=False, fontsize=8)
    return as_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("merging-at-scale"))
    parser.add_argument("--limit", type=int, default=75, help="held-out questions of each task")
    parser.add_argument("--effort", type=float, default=1.0, help="below 1 only to try the mechanics")
    parser.add_argument("--methods", default=",".join(METHODS), help="with commas; all by default")
    given = parser.parse_args()
    methods = given.methods.split(",")
    if not set(methods) <= set(METHODS):
        parser.error(f"--methods: known are {', '.join(METHODS)}")
    spec = Spec(effort=given.effort)
    zoos = {"weak": build(Spec(effort=max(0.01, WEAK * given.effort))), "strong": build(spec)}
    found, tables = {}, {}
    for name, zoo in zoos.items():
        strength = Strength(name, zoo, given.out.resolve() / name)
        train_experts(strength, spec)
        made = merges_of(zoo.tasks, methods)
        report = evaluate(strength, made, given.limit)
        found[name] = curves(report, made)
        tables[name] = report.as_dict()
    with whole_file(given.out / "merging-at-scale.json") as file:
        file.write(json.dumps({"curves": found, "reports": tables}, indent=2).encode())
    with whole_file(given.out / "merging-at-scale.png") as file:
        file.write(draw(found))
    for name, parts in found.items():
        for part, methods in parts.items():
            for method, line in methods.items():
                shown = "  ".join(f"{size}: {share:.2f}" for size, share in line.items())
                print(f"{name:6} base, {part:8} {method:16} {shown}")
    print(given.out / "merging-at-scale.png")


if __name__ == "__main__":
    main()
