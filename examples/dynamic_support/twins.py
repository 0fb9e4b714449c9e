"""Twin merges of a suite of merge_real: which ones, how each is made, and how its answers are scored.

A twin is scored by its own router, and by the task's own part (told whose a row is: an oracle). It is timed beside its
shared model, on the same batches in the same process.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from merging_support import encoders, generative
from merging_support.fusion import cost, read, run_ours
from merging_support.stages import stage, write_json
from merging_support.suites import Suite, accuracy, slug
from merging_support.texts import SOURCES, read_task

from dynamic_support import small
from mixmerge.errors import Fault, MixmergeError
from mixmerge.evaluate import Question
from mixmerge.zoo import Zoo

if TYPE_CHECKING:
    from mixmerge import DynamicModel

RANKS = (1, 4, 16, 64)
# Of each task's train split, for the router: it learns whose rows they are, and ``by_task`` their labels. Skills that
# are asked in other words take few, and a generator reads them slowly.
ROWS = {"encoders": 800, small.NAME: 800, "generative": 160}
TOKENS = 128  # of such a row
TIMED = 4  # batches
# A linear map of the means of all layers: the published network of the last layer's takes more texts for another's.
DEEP = {
    "features": "layers",
    "hidden": 0,
    "dropout": 0.0,
    "epochs": 60,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
}
CUT = 48  # tokens that encoders are shown of a text when they are scored, at most


@dataclass(frozen=True)
class Twin:
    """One twin merge.

    Args:
        name: of the row.
        shared: method and parameters of the shared part.
        rank: of every part.
        bits: of its factors.
        gate: settings of the router.
        tokens: of a row that the router learns from; None: ``TOKENS``.
    """

    name: str
    shared: dict[str, Any]
    rank: int = 16
    bits: int = 8
    gate: dict[str, Any] = field(default_factory=dict)
    tokens: int | None = None

    def recipe(self, suite: Suite, rows: dict[str, Path]) -> dict[str, Any]:
        return {
            "merge_method": "twin",
            "base_model": str(suite.base),
            "models": [{"model": folder} for folder in suite.headed.values()],
            "shared": self.shared,
            "parameters": {"rank": self.rank, "bits": self.bits},
            "gate": self.gate,
            "calibration": {
                "per_expert": {suite.headed[task]: str(file) for task, file in rows.items()},
                "max_examples": ROWS[suite.name],
                "max_tokens": self.tokens or TOKENS,
            },
            "dtype": suite.dtype,
        }


def by_task(*, ranks: bool) -> dict[str, Any]:
    """A second training, whose settings were chosen on validation rows: with a factor for every rank, or without."""
    told = {"dtype": "bfloat16"}
    return {**DEEP, "task": told if ranks else {**told, "ranks": False}}


def twins(best: dict[str, Any], *, tokens: int | None = None) -> tuple[Twin, ...]:
    """The rows of a suite.

    Args:
        best: method and parameters of the best static merge, which is the shared part of the sweep.
        tokens: of a row that a router by task loss learns from.
    """
    published = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.3}}
    name = best["merge_method"]
    sweep = tuple(Twin(f"{name}, rank {rank}", best, rank=rank, gate=DEEP) for rank in RANKS)
    return (
        *sweep,
        Twin(f"{name}, rank 64, router by task loss", best, rank=64, gate=by_task(ranks=True), tokens=tokens),
        Twin(
            f"{name}, rank 64, router by task loss, layers alone",
            best,
            rank=64,
            gate=by_task(ranks=False),
            tokens=tokens,
        ),
        Twin(f"{name}, router as published", best),
        Twin("task arithmetic 0.3, router as published", published),
    )


Right = dict[str, list[bool]]
Scored = tuple[Right, Right, dict[str, float]]  # by its own router, told the task; tokens a second


def run_twin(suite: Suite, twin: Twin) -> None:
    """Merge and score, unless both have been done."""
    asked = {name: value for name, value in vars(twin).items() if value is not None}
    told = {"twin": asked, "inputs": suite.identity, "rows": ROWS[suite.name]}
    name = f"{suite.name}/twins/{slug(twin.name)}.json"
    stage(suite.work, name, told, lambda out: _run(suite, twin, out))


def _run(suite: Suite, twin: Twin, out: Path) -> None:
    recipe = suite.folder / "recipes" / f"twin-{out.stem}.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    made = twin.recipe(suite, suite.rows("train", ROWS[suite.name]))
    recipe.write_text(yaml.safe_dump(made, sort_keys=False), encoding="utf-8")
    merged = suite.folder / "merges" / f"twin-{out.stem}"
    merged.parent.mkdir(parents=True, exist_ok=True)
    spent = cost(run_ours(recipe.resolve(), merged.resolve()))
    own, oracle, speed = SCORES[suite.name](suite, merged)
    bank = sum(file.stat().st_size for file in (merged / "bank").rglob("*") if file.is_file())
    write_json(
        out,
        {
            "own": own,
            "oracle": oracle,
            "speed": speed,
            "storage": bank,
            "experts": added_bytes(suite),
            "cost": spent,
        },
    )
    shutil.rmtree(merged)


def added_bytes(suite: Suite) -> int:
    """What the experts take beside their base: whole models, or adapters."""
    places = [Path(named.rpartition("+")[2]) for named in suite.experts.values()]
    return sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))


def _rates(model: DynamicModel, batches: list[Any], under: Callable[[Any, bool], object]) -> dict[str, float]:
    """Tokens a second of the shared model and of the mixture, batch by batch in turn."""
    spent = {"shared": 0.0, "mixture": 0.0}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    for batch in batches:
        for name in spent:
            start = time.perf_counter()
            under(batch, name == "mixture")
            spent[name] += time.perf_counter() - start
    return {name: tokens / seconds for name, seconds in spent.items()}


def _score_encoders(suite: Suite, merged: Path) -> Scored:
    import torch

    from mixmerge import DynamicModel

    own: Right = {}
    oracle: Right = {}
    speed: dict[str, float] = {}
    for task, place in suite.headed.items():
        model = DynamicModel.load(merged, head=Path(place).name)
        texts, labels = read_task(suite.data / task, "test")
        told = {name: float(name == Path(place).name) for name in model.experts}
        ways: dict[str, Any] = {"own": None, "oracle": told}
        kept = []
        for name, found in (("own", own), ("oracle", oracle)):
            right = [False] * len(texts)
            order = list(range(len(texts)))
            with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                for rows, batch in encoders.batches(model.tokenizer, texts, SOURCES[task].tokens, 64, order):
                    said = model(batch["input_ids"], batch["attention_mask"], weights=ways[name]).argmax(1)
                    for row, one in zip(rows, said.tolist(), strict=True):
                        right[row] = one == labels[row]
                    kept.append(batch)
            found[task] = right
        if not speed:

            def under(batch: Any, mixed: bool, model: DynamicModel = model) -> None:
                with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                    if mixed:
                        model(batch["input_ids"], batch["attention_mask"])
                    else:
                        model.model(**batch)

            speed = _rates(model, kept[:TIMED], under)
        model.detach()
    return own, oracle, speed


@dataclass(frozen=True)
class Exam:
    """What a generator is asked of one task.

    Args:
        right: whether a text answers the question of this number.
        longest: tokens of an answer, at most.
        stop: texts that end an answer.
    """

    task: str
    prompts: list[str]
    right: Callable[[int, str], bool]
    longest: int
    stop: tuple[str, ...] = ()


def _score_generators(suite: Suite, merged: Path) -> Scored:
    from mixmerge import DynamicModel

    model = DynamicModel.load(merged, dtype="bfloat16")
    exams = []
    for skill in suite.skills:
        prompts = [generative.chat(model.tokenizer, item.question) for item in skill.test]
        longest = max(len(model.tokenizer(item.answer)["input_ids"]) for item in skill.test) + 8

        def right(number: int, text: str, skill: generative.Skill = skill) -> bool:
            return skill.correct(text.strip(), skill.test[number])

        exams.append(Exam(skill.name, prompts, right, longest))
    return _examined(suite, model, exams)


def _score_small(suite: Suite, merged: Path) -> Scored:
    from mixmerge import DynamicModel

    zoo, exams = Zoo.open(suite.base.parent), []
    for task in suite.experts:
        questions = small.asked(zoo, task)

        def right(number: int, text: str, questions: list[Question] = questions) -> bool:
            return small.is_right(text, questions[number])

        exams.append(Exam(task, [one.prompt for one in questions], right, small.ANSWER, small.STOP))
    return _examined(suite, DynamicModel.load(merged), exams)


def _examined(suite: Suite, model: DynamicModel, exams: list[Exam]) -> Scored:
    import torch

    own: Right = {}
    oracle: Right = {}
    names = dict(zip(suite.headed, model.experts, strict=True))
    for exam in exams:
        told = {name: float(name == names[exam.task]) for name in model.experts}
        for found, weights in ((own, None), (oracle, told)):
            said = model.generate(exam.prompts, weights=weights, max_new_tokens=exam.longest, stop=exam.stop)
            found[exam.task] = [exam.right(number, text) for number, text in enumerate(said)]
    asked = model.tokenizer(exams[-1].prompts, padding=True, return_tensors="pt")
    starts = range(0, min(8 * TIMED, len(exams[-1].prompts)), 8)
    batches = [{key: asked[key][start : start + 8] for key in asked} for start in starts]

    def under(batch: Any, mixed: bool) -> None:
        with torch.inference_mode():
            model(batch["input_ids"], batch["attention_mask"]) if mixed else model.model(**batch)

    return own, oracle, _rates(model, batches, under)


SCORES: dict[str, Callable[[Suite, Path], Scored]] = {
    "encoders": _score_encoders,
    "generative": _score_generators,
    small.NAME: _score_small,
}


def best_static(suite: Suite) -> dict[str, Any]:
    """Method and parameters of the best single model that merge_real has scored on this suite's validation rows.

    Raises:
        MixmergeError: it has scored none.
    """
    found = []
    for entry in small.entries_of(suite.name):
        if entry.sweep is None or entry.per_task or entry.search or entry.data:
            continue
        for file in sorted((suite.folder / "validation").glob(f"{slug(entry.name)}-*.json")):
            value = file.stem.removeprefix(f"{slug(entry.name)}-")
            if value.replace(".", "", 1).isdigit():
                found.append((accuracy(read(file)), entry, float(value)))
    if not found:
        run = f"Run: python examples/merge_real.py methods {suite.name}"
        raise MixmergeError(Fault(str(suite.folder), "no static merge has been scored here", run=run))
    _, entry, value = max(found, key=lambda one: one[0])
    parameters = {**entry.each, **entry.top, str(entry.sweep and entry.sweep[0]): value}
    return {"merge_method": entry.method, "parameters": parameters}
